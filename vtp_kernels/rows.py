"""How operands and results of the ops lie in memory: rows that start at 16 bytes, padded to 8 elements.

The ops of the compact model read such rows, so that their kernels load whole 16 bytes up to the edge at any
width. What lies in the padding of an operand is undefined; an op writes 0 to that of its results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all rows of these 2-D tensors start at 16 bytes and have a multiple of 8 elements.

    Only then can a kernel load 16 bytes at a time up to the edge, or load tiles by descriptor (TMA).
    """
    return all(
        t.data_ptr() % 16 == 0
        and t.shape[1] % 8 == 0
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        and t.stride(1) == 1
        for t in tensors
    )


def padded_width(width: int) -> int:
    """`width` rounded up to a multiple of 8 elements: of 16 bytes at least."""
    return -(-width // 8) * 8


def empty_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor of `shape`, [..., width], whose rows are `padded_width(width)` elements apart.

    So its rows start at 16 bytes. A kernel that fills it writes 0 to the padding too.
    """
    *lead, width = shape
    return torch.empty((*lead, padded_width(width)), dtype=dtype, device=device)[..., :width]


def empty_rows_like(t: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`empty_rows` of `shape` on the device of `t`, and in its dtype unless another is given."""
    return empty_rows(*shape, dtype=dtype or t.dtype, device=t.device)


def in_padded_rows(t: Tensor) -> Tensor:
    """`t` [..., width] with the strides that `empty_rows` gives and 0 in the padding, as kernels return it.

    It is a copy only where the width is no multiple of 8, or t not contiguous.
    """
    width = t.shape[-1]
    return t.contiguous() if width % 8 == 0 else F.pad(t, (0, -width % 8))[..., :width]


def has_padded_rows(t: Tensor) -> bool:
    """Whether the rows of `t` [M, width] start at 16 bytes, each with room up to a multiple of 8 elements.

    Then a kernel may load whole 16 bytes at the end of every row; what lies behind the width is undefined.
    """
    (rows, width), (stride, step) = t.shape, t.stride()
    end = t.storage_offset() + (rows - 1) * stride + padded_width(width)
    return (
        t.data_ptr() % 16 == 0
        and step == 1
        and stride % 8 == 0
        and stride >= width
        and (rows == 0 or end * t.element_size() <= t.untyped_storage().nbytes())
    )


def with_padded_rows(t: Tensor) -> Tensor:
    """`t` [..., width] as an [M, width] of which `has_padded_rows` holds.

    It is a copy, with 0 in the padding, only where t does not have such rows already.
    """
    width = t.shape[-1]
    if t.ndim != 2:
        t = t.reshape(math.prod(t.shape[:-1]), width)
    if has_padded_rows(t):
        return t
    full = t.new_zeros(len(t), padded_width(width))
    full[:, :width] = t
    return full[:, :width]


def clear_padding(t: Tensor) -> None:
    """Write 0 to the padding of t [..., width] of padded rows, as a kernel does that fills one."""
    if t.shape[-1] % 8:
        whole_rows(t)[..., t.shape[-1] :] = 0


def whole_rows(t: Tensor) -> Tensor:
    """t [..., width] of padded rows together with their padding, up to a multiple of 8 columns."""
    return t.as_strided((*t.shape[:-1], padded_width(t.shape[-1])), t.stride())


def zero_padded(matrix: Tensor, rows: bool = False) -> Tensor:
    """matrix with zeros up to a multiple of 8 columns, and of rows if asked: sums over them stay exact."""
    padding = (0, -matrix.shape[1] % 8, 0, -len(matrix) % 8 if rows else 0)
    return F.pad(matrix, padding) if any(padding) else matrix
