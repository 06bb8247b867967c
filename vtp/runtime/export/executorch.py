"""ExecuTorch, for phones and other devices, on its XNNPACK kernels for CPUs."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vtp.runtime.export.checked import Run, Target, write_checked
from vtp.runtime.export.pt2 import exported

MOST_IMAGES = 8  # in a batch: ExecuTorch plans its memory for them when a file is written


def load(path: Path) -> Run:
    """A .pte file in ExecuTorch, on the CPU."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    return lambda images: method.execute([images.contiguous()])[0].clone()  # its own memory is used again


TARGET = Target("ExecuTorch", ".pte", "executorch", ("executorch",), (torch.float32, torch.float16), load)


def export_executorch(
    model: nn.Module,
    path: str | Path,
    image_shape: tuple[int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    images: Tensor | None = None,
) -> float:
    """Write a model for ExecuTorch, for up to `MOST_IMAGES` images, once ExecuTorch computes the same by it.

    Its method "forward" takes images [batch, channels, height, width] in `dtype` and gives outputs [batch,
    classes].

    Args:
        model: from `vtp.compact` or `vtp.load`, or a timm model; in eval mode, on the CPU. It is not changed.
        path: the .pte file; it is replaced only by a whole one whose outputs were checked.
        image_shape: (channels, height, width) of an image; None takes the model's own.
        dtype: float32 or float16, that the file computes in; None takes the model's own.
        images: to check the outputs on, normalised, [any number, *image_shape]; None takes random ones.

    Returns:
        The largest relative error of the outputs against the model in float64, for 1 and for 5 images.

    Raises:
        TypeError: the model is packed (`vtp.optimize`) or gated: export a compact or dense model.
        ValueError: the model is in training mode or not on the CPU, or an argument is not as above.
        ExportError: it cannot be converted, or ExecuTorch does not run what was written, or computes
            something else.
        ModuleNotFoundError: ExecuTorch is not installed; the message says how to get it.
        FileError: the file cannot be written.
    """
    return write_checked(TARGET, _write, model, path, image_shape, dtype, images)


def _write(model: nn.Module, images: Tensor, file: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exported(model, images, most_images=MOST_IMAGES)
        # ExecuTorch's verifier takes the length of the first part of a split, which fixes the batch.
        aten = torch.ops.aten
        splits = {aten.split_with_sizes.default: _slices, aten.split.Tensor: _equal_slices}
        program = program.run_decompositions(splits)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with open(file, "wb") as out:
        lowered.write_to_file(out)


def _slices(x: Tensor, widths: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(widths[:part]) for part in range(len(widths))]
    return [x.narrow(dim, start, width) for start, width in zip(starts, widths, strict=True)]


def _equal_slices(x: Tensor, width: int, dim: int = 0) -> list[Tensor]:
    size = x.shape[dim]
    return _slices(x, [min(width, size - start) for start in range(0, size, width)], dim)
