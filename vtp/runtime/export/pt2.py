"""PyTorch's own format, by torch.export: runs wherever PyTorch does, without this package or timm."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vtp.runtime.export.checked import Run, Target, write_checked


def load(path: Path) -> Run:
    """A file of torch.export, on the CPU."""
    return torch.export.load(path).module()


TARGET = Target(
    "torch.export",
    ".pt2",
    "",
    (),
    (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    load,
)


def export_pt2(
    model: nn.Module,
    path: str | Path,
    image_shape: tuple[int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    images: Tensor | None = None,
) -> float:
    """Write a model as one .pt2 file, for any number of images, once PyTorch computes the same by it.

    `torch.export.load(path).module()` takes images [batch, channels, height, width] in `dtype` and gives
    outputs [batch, classes]. It is made of PyTorch's own operators: nothing but PyTorch has to be installed.

    Args:
        model: from `vtp.compact` or `vtp.load`, or a timm model; in eval mode, on the CPU. It is not changed.
        path: the file; it is replaced only by a whole one whose outputs were checked.
        image_shape: (channels, height, width) of an image; None takes the model's own.
        dtype: float32, float16, bfloat16 or float64, that the file computes in; None takes the model's own.
        images: to check the outputs on, normalised, [any number, *image_shape]; None takes random ones.

    Returns:
        The largest relative error of the outputs against the model in float64, for 1 and for 5 images.

    Raises:
        TypeError: the model is packed (`vtp.optimize`) or gated: export a compact or dense model.
        ValueError: the model is in training mode or not on the CPU, or an argument is not as above.
        ExportError: it cannot be exported, or what was written cannot be run, or computes something else.
        FileError: the file cannot be written.
    """
    return write_checked(TARGET, _write, model, path, image_shape, dtype, images)


def _write(model: nn.Module, images: Tensor, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported(model, images), file)


def exported(
    model: nn.Module, images: Tensor, *, most_images: int | None = None
) -> torch.export.ExportedProgram:
    """A model as a graph of PyTorch's operators, for any number of such images, or up to `most_images`."""
    batch = torch.export.Dim("batch", min=1, max=most_images)
    return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
