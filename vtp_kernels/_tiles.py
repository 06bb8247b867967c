"""Device code that the kernels of several ops share: the order of tiles, loading one, pairs of numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from vtp_kernels.launching import tl, triton


class Matrix(NamedTuple):
    """A matrix [rows, columns] in device code: its pointer, or a descriptor of tiles, and its row stride."""

    source: Any
    rows: Any
    columns: Any
    stride: Any


@triton.jit
def grouped_tile(i_program, rows, columns, GROUP: tl.constexpr):
    """Tile (row, column) of a program: GROUP rows of tiles at a time, so that their operands stay in L2."""
    per_group = GROUP * columns
    first = i_program // per_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = i_program % per_group
    return first + within % height, within // height


@triton.jit
def load_tile(
    source, o_row, o_column, rows, columns, stride,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, PADDED: tl.constexpr = False,
):  # fmt: skip
    """source[o_row, o_column] of a matrix [rows, columns], 0 beyond the edges that are masked.

    With PADDED its rows are padded: whole 16 bytes are loaded at their end, and what lies behind the width
    may be anything.
    """
    p_tile = source + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
    readable = (columns + 7) // 8 * 8 if PADDED and MASK_COLUMNS else columns
    if MASK_ROWS and MASK_COLUMNS:
        b_tile = tl.load(p_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] < readable), other=0.0)
    elif MASK_ROWS:
        b_tile = tl.load(p_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] >= 0), other=0.0)
    elif MASK_COLUMNS:
        b_tile = tl.load(p_tile, mask=(o_column[None, :] < readable) & (o_row[:, None] >= 0), other=0.0)
    else:
        b_tile = tl.load(p_tile)
    if PADDED and MASK_COLUMNS:
        b_tile = tl.where(o_column[None, :] < columns, b_tile, tl.zeros_like(b_tile))
    return b_tile


@triton.jit
def load_matrix_tile(
    matrix, i_row, o_row, i_column, o_column,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PADDED: tl.constexpr = False,
):  # fmt: skip
    """The tile of a `Matrix` that begins at (i_row, i_column): by its descriptor, or at [o_row, o_column]."""
    if DESCRIPTORS:  # tiles are clipped, and filled with 0, by the hardware
        return matrix.source.load([i_row, i_column])
    else:
        return load_tile(
            matrix.source, o_row, o_column, matrix.rows, matrix.columns, matrix.stride,
            MASK_ROWS, MASK_COLUMNS, PADDED,
        )  # fmt: skip


@triton.jit
def load_gate_and_value(z, o_row, o_h, M, hidden, stride_z):
    """Both halves of z [M, 2 hidden] at columns o_h, 0 beyond hidden; o_row: a column of 64-bit numbers."""
    p_z = z + o_row * stride_z + o_h[None, :]
    # Of the gate whole 16 bytes are loaded, which end among values, or in the padding behind few of them.
    m_gate = (o_row < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)
    b_gate = tl.load(p_z, mask=m_gate, other=0.0).to(tl.float32)
    b_value = tl.load(p_z + hidden, mask=(o_row < M) & (o_h[None, :] < hidden), other=0.0).to(tl.float32)
    return tl.where(o_h[None, :] < hidden, b_gate, 0.0), b_value


@triton.jit
def split_pairs(b_tile):
    """The numbers of the even columns of a tile, and those of the odd ones."""
    return tl.split(tl.reshape(b_tile, (b_tile.shape[0], b_tile.shape[1] // 2, 2)))


@triton.jit
def join_pairs(b_first, b_second):
    """The tile of which `split_pairs` makes these."""
    return tl.reshape(tl.join(b_first, b_second), (b_first.shape[0], 2 * b_first.shape[1]))
