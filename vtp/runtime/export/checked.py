"""What all targets share: models that none of them takes, and files that are checked before they have a name.

A file is written beside its place, loaded by the runtime that it is for, and compared there with the model in
float64; only then it is renamed. So what lies under its name has computed what the model does.
"""

import copy
import functools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.layers import Format, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtp.files import FileError, refuse_unwritable, write_atomic
from vtp.pruning.gates import GatedLinear
from vtp.runtime.accuracy import CEILINGS, relative_error
from vtp.runtime.optimize import OptimizedViT
from vtp.words import counted

BATCHES = (1, 5)  # that a file is checked at; it was traced with another
TRACED = 2  # images in the batch that a model is traced with: a size of 1 would become a constant

Run = Callable[[Tensor], Tensor]
Write = Callable[[nn.Module, Tensor, Path], object]


class ExportError(ValueError):
    """A model that a target's converter or runtime does not take, or computes wrongly, and why."""


@dataclass(frozen=True)
class Target:
    """A runtime that models are written for.

    Attributes:
        runtime: its name.
        suffix: that its files have.
        extra: of this package, which installs `packages`.
        packages: what has to be installed to write a file and to check it, by the names they are imported as.
        dtypes: that a file may compute in.
        load: a file to a function of images [B, C, H, W] in the file's dtype, on the CPU, with as many
            threads as PyTorch has.
        beside: suffixes of further files that belong to one.
    """

    runtime: str
    suffix: str
    extra: str
    packages: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[Path], Run]
    beside: tuple[str, ...] = ()

    def size(self, path: Path) -> int:
        """Bytes of a file and of those that belong to it."""
        return sum(path.with_suffix(suffix).stat().st_size for suffix in (path.suffix, *self.beside))

    def check_packages(self, packages: tuple[str, ...] | None = None) -> None:
        """Raises ModuleNotFoundError with what to install where one of `packages` (None: all) is missing."""
        names = self.packages if packages is None else packages
        if missing := [name for name in names if find_spec(name) is None]:
            raise ModuleNotFoundError(
                f"export for {self.runtime} needs {' and '.join(missing)}: pip install 'vtp[{self.extra}]'"
            )


def write_checked(
    target: Target,
    write: Write,
    model: nn.Module,
    path: str | Path,
    image_shape: tuple[int, int, int] | None,
    dtype: torch.dtype | None,
    images: Tensor | None,
) -> float:
    """Write a model for a target, check what was written, and give it its name.

    Args:
        write: takes the model in `dtype`, images [2, C, H, W] to trace it with, and the path of the file.
        others: those of `export_onnx`, whose errors are raised too.

    Returns:
        The largest relative error (norm of the difference over the norm) at the batch sizes of `BATCHES`.
    """
    path = Path(path)
    check_model(model)
    shape = check_shape(model, image_shape)
    own = next(model.parameters()).dtype
    dtype = own if dtype is None else dtype
    if dtype not in target.dtypes:
        expected = ", ".join(map(_name, target.dtypes))
        raise ValueError(f"dtype: got {_name(dtype)}, expected one that {target.runtime} has: {expected}")
    images = _check_images(images, shape)
    target.check_packages()
    refuse_unwritable(path)
    converted = model if dtype == own else copy.deepcopy(model).to(dtype)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            file = Path(folder) / path.name
            with torch.autocast("cpu", enabled=False):
                traced = images[:TRACED].to(dtype)
                one_size = of_one_size(converted, shape)
                _in_words(target, "convert", lambda: write(one_size, traced, file))
                error = _check(target, file, model, converted, images)
            # The file by whose name it is opened comes last: it then finds those that it refers to.
            for written in sorted(Path(folder).iterdir(), key=lambda each: each == file):
                write_atomic(path.parent / written.name, functools.partial(os.replace, written))
    except OSError as failure:
        raise FileError(f"path: cannot write {path}: {failure.strerror or failure}") from failure
    return error


def check_model(model: nn.Module) -> None:
    """Refuse a model that no target takes: TypeError or ValueError."""
    if isinstance(model, OptimizedViT):
        raise TypeError(
            "model: got OptimizedViT, whose kernels no other runtime has; export the compact model that it "
            "was made from"
        )
    if any(isinstance(module, GatedLinear) for module in model.modules()):
        raise TypeError("model: got one with gates, expected what vtp.compact(gated, plan) makes of it")
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise ValueError(f"model: on {parameter.device}, expected cpu")


def check_shape(model: nn.Module, image_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """`image_shape`, or where it is None the model's own. Raises ValueError."""
    if image_shape is None and hasattr(model, "patch_embed"):
        image_shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    if not (isinstance(image_shape, tuple) and len(image_shape) == 3 and all(n > 0 for n in image_shape)):
        raise ValueError(f"image_shape: got {image_shape}, expected (channels, height, width)")
    return image_shape


def of_one_size(model: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
    """The model, or where it would resample its position embeddings at every call, a copy that has those of
    images of this shape: a file is for one, and OpenVINO and ExecuTorch have no such resampling."""
    if not (isinstance(model, VisionTransformer) and model.dynamic_img_size and model.pos_embed is not None):
        return model
    model = copy.deepcopy(model)
    patch = model.patch_embed
    positions = resample_abs_pos_embed(
        model.pos_embed,
        new_size=patch.dynamic_feat_size(image_shape[1:]),
        old_size=patch.grid_size,
        num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
    )
    model.pos_embed = nn.Parameter(positions.detach(), requires_grad=False)
    model.dynamic_img_size, patch.flatten, patch.output_fmt = False, True, Format.NCHW
    return model


def _check_images(images: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Normalised images, as many as the largest batch; random ones where there are none."""
    if images is None:
        return torch.randn(max(BATCHES), *shape, generator=torch.Generator().manual_seed(0))
    got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not (isinstance(got, tuple) and len(got) == 4 and got[0] > 0 and got[1:] == shape):
        raise ValueError(f"images: got {got}, expected a tensor [at least 1, {', '.join(map(str, shape))}]")
    if not torch.isfinite(images).all():
        raise ValueError("images: got values that are not finite, expected normalised pixels")
    copies = -(-max(BATCHES) // len(images))
    return images.float().cpu().repeat(copies, 1, 1, 1)[: max(BATCHES)]


@torch.inference_mode()
def _check(target: Target, file: Path, model: nn.Module, converted: nn.Module, images: Tensor) -> float:
    """The largest relative error of a file. Raises ExportError where it is too large, or the file fails."""
    dtype = next(converted.parameters()).dtype
    exact = copy.deepcopy(model).double()(images.double())
    # Where a model amplifies rounding, PyTorch does no better in this dtype.
    bound = max(CEILINGS[_name(dtype)], 2 * relative_error(converted(images.to(dtype)), exact))
    run = _in_words(target, "load", lambda: target.load(file))
    worst = 0.0
    for batch in BATCHES:
        got = _in_words(
            target, f"run with {counted(batch, 'image')}", lambda n=batch: run(images[:n].to(dtype))
        )
        error = relative_error(got, exact[:batch])
        if not (math.isfinite(error) and error <= bound):
            raise ExportError(
                f"model: {target.runtime} computes something else, with {counted(batch, 'image')} in "
                f"{_name(dtype)}: relative error {error:.2g}, at most {bound:.2g} expected; nothing was "
                "written"
            )
        worst = max(worst, error)
    return worst


def _in_words(target: Target, doing: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; of whatever it raises an ExportError with the first line."""
    try:
        return call()
    except (ExportError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ExportError(
            f"model: {target.runtime} cannot {doing} it ({reason}); nothing was written"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
