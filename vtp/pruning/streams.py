"""The residual stream of calibration images, block by block: what calibration and refit run over.

Images are embedded once. From then on only the stream is kept, [images, tokens, embed_dim] in pieces, and a
block is run over all pieces before the next: so no more than one block's sums are in memory at a time,
however deep the model is. Pieces that the memory has no room for lie in temporary files.
"""

import copy
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from vtp.files import FileError, fingerprint, refuse_meta
from vtp.group import Group, gathered, place, refuse_different, share, together
from vtp.model.architecture import Architecture, describe, replace_sites
from vtp.model.eva import ropes, with_fused_sites
from vtp.pruning.gates import GatedLinear
from vtp.words import counted

Progress = Callable[[str, float], None]
_PIECE = 2048  # tokens of one piece: its widest activations stay in memory that is at hand, not mapped anew


class ImagesError(ValueError):
    """Calibration images that cannot be used; the message says what came and what was expected."""


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with the gates folded into its weights, in float32, or float64 if it is that.

    Raises:
        ValueError: the model is on the meta device.
    """
    refuse_meta(model.state_dict())
    plain = with_fused_sites(copy.deepcopy(model)).eval().requires_grad_(False)
    if any(isinstance(module, GatedLinear) for module in plain.modules()):
        replace_sites(plain, lambda _, layer: _folded(layer) if isinstance(layer, GatedLinear) else layer)
    return plain if plain.patch_embed.proj.weight.dtype == torch.float64 else plain.float()


def _folded(layer: GatedLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.folded_weight(), requires_grad=False)
    linear.bias = layer.bias
    return linear.eval()


@dataclasses.dataclass
class Stream:
    """Tokens of all images, in pieces [images, tokens, embed_dim]; whoever runs a block writes in place.

    Attributes:
        pieces: at least one; those of this process, where several share the images.
        ropes: by block what timm's Eva hands to it beside the tokens, the angles of its rotary embedding;
            None where there is none.
        images: how many images all processes have.
        group: of these processes; None for this one alone.
    """

    pieces: list[Tensor]
    ropes: list[Tensor | None]
    images: int
    group: Group = None

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.pieces[0].shape[1]

    def numbers(self) -> Iterator[Tensor]:
        """Of each piece the numbers of its images among all, int64 [images], on the CPU: they were dealt in
        turn, so the n-th of process r of R is number r + n R."""
        (rank, ranks), before = place(self.group), 0
        for piece in self.pieces:
            yield rank + ranks * torch.arange(before, before + len(piece))
            before += len(piece)

    def first(self, images: int) -> Tensor:
        """A copy of the tokens of the first images."""
        taken, rest = [], images
        for piece in self.pieces:
            taken.append(piece[:rest].clone())
            rest -= len(taken[-1])
            if rest <= 0:
                break
        return torch.cat(taken)


class Store:
    """Where pieces lie: in memory as long as `memory_gb` allows, then in a temporary file.

    As a context it is closed at the end.

    Args:
        memory_gb: for all that is stored, in units of 1e9 bytes; None for no limit.
        device: of the pieces that are in memory.
    """

    def __init__(self, memory_gb: float | None, device: torch.device) -> None:
        if memory_gb is not None and not memory_gb >= 0:
            raise ValueError(f"memory_gb: got {memory_gb!r}, expected a number of at least 0, or None")
        self._left = math.inf if memory_gb is None else 1e9 * memory_gb
        self._device = device
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files = 0

    def keep(self, piece: Tensor) -> Tensor:
        """The piece, where it may stay."""
        size = piece.nbytes
        if size <= self._left:
            self._left -= size
            return piece
        self._left = 0
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vtp-")
        self._files += 1
        name = f"{self._folder.name}/{self._files}"
        _allocate(name, size)
        kept = torch.from_file(name, shared=True, size=piece.numel(), dtype=piece.dtype).view(piece.shape)
        return kept.copy_(piece)

    def for_a_while(self) -> "Store":
        """Another one in the memory that is left, to be closed before more is kept here."""
        return Store(None if self._left == math.inf else self._left / 1e9, self._device)

    def close(self) -> None:
        """Remove the temporary files."""
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _allocate(name: str, size: int) -> None:
    """A file whose bytes the disk has room for: to write into a mapping that has none ends the process."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with open(name, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise FileError(
                f"memory_gb: the rest of the images' tokens lies in temporary files, and {Path(name).parent} "
                f"has no room for {size / 1e9:.2f} GB more ({error.strerror}); TMPDIR names another folder"
            ) from error


def embedded(
    model: nn.Module,
    images: Tensor | Iterable,
    store: Store,
    progress: Progress | None = None,
    *,
    most: int,
    group: Group = None,
) -> Stream:
    """What goes into the first block, for the images of this process.

    Args:
        model: from `plain_copy`.
        images: [M, C, H, W], or an iterable of such batches, or of (batch, whatever else).
        store: where the stream lies.
        progress: told how much that is.
        most: how many of the images of all processes are read, of which each reads its share.
        group: of the processes whose images these are all together; some may have none.

    Raises:
        ImagesError: no image, another shape than the model's, another kind of numbers, NaN or infinity.
        RankError: another process met an error.
        ValueError: the processes have models of different weights.
    """
    if group is not None:
        refuse_different(group, "model", fingerprint(model.state_dict()))
    weight = model.patch_embed.proj.weight
    pieces: list[Tensor] = []
    with together(group):
        for batch in _pieces(first_images(images, share(most, group)), model):
            x = model._pos_embed(model.patch_embed(batch.to(weight)))
            pieces.append(store.keep(model.norm_pre(x[0] if isinstance(model, Eva) else x)))
    everyones = sum(gathered(group, sum(map(len, pieces))))
    if not everyones:
        raise ImagesError("images: got none, expected at least one")
    stream = Stream(pieces or [_no_image(model)], ropes(model), everyones, group)
    if progress is not None:
        size = stream.images * stream.tokens * weight.element_size() * describe(model).embed_dim / 1e9
        progress(
            f"{counted(stream.images, 'image')} of {counted(stream.tokens, 'token')}, {size:.2f} GB", 0.0
        )
    return stream


def _no_image(model: nn.Module) -> Tensor:
    """A piece of no image."""
    architecture = describe(model)
    return model.patch_embed.proj.weight.new_zeros(0, architecture.num_tokens, architecture.embed_dim)


def batches(images: Tensor | Iterable) -> Iterator[Any]:
    """The batches of images in what a user gave; whether they are any is left to `embedded`."""
    try:
        given = iter([images] if isinstance(images, Tensor) else images)
    except TypeError:
        raise ImagesError(
            f"images: got {type(images).__name__}, expected a tensor or an iterable of them"
        ) from None
    for batch in given:
        yield batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def first_images(images: Tensor | Iterable, most: int) -> Iterator[Any]:
    """Batches with so many of the images and no more, which are not read either: a stream may be endless."""
    for batch in batches(images):
        yield batch[:most] if isinstance(batch, Tensor) and batch.ndim else batch
        most -= len(batch)
        if most <= 0:
            return


def _pieces(images: Iterable, model: nn.Module) -> Iterator[Tensor]:
    """The images in batches of about `_PIECE` tokens, checked."""
    architecture = describe(model)
    size = max(1, _PIECE // architecture.num_tokens)
    waiting: list[Tensor] = []
    for batch in images:
        _check(batch, architecture)
        waiting.append(batch)
        if sum(map(len, waiting)) >= size:
            *full, rest = torch.cat(waiting).split(size)
            if len(rest) == size:
                full, rest = [*full, rest], rest[:0]
            yield from full
            waiting = [rest]
    if any(len(batch) for batch in waiting):
        yield torch.cat(waiting)


def _check(batch: object, architecture: Architecture) -> None:
    expected = f"[M, {architecture.in_chans}, {architecture.img_size[0]}, {architecture.img_size[1]}]"
    if not isinstance(batch, Tensor):
        raise ImagesError(f"images: got {type(batch).__name__}, expected tensors {expected}")
    if batch.ndim != 4 or tuple(batch.shape[1:]) != (architecture.in_chans, *architecture.img_size):
        raise ImagesError(f"images: got shape {tuple(batch.shape)}, expected {expected}")
    if not batch.is_floating_point():
        raise ImagesError(f"images: got {batch.dtype}, expected normalised images in floating point")
    if not batch.isfinite().all():
        raise ImagesError("images: they contain NaN or infinity")
