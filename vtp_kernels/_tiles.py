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


class Pairs(NamedTuple):
    """Constants of the pairs of a head in device code, as one constexpr."""

    COUNT: Any  # d / 2
    BLOCK: Any  # COUNT rounded up to a power of two, or more
    HALVES: Any  # whether pairs are columns i and i + d / 2, not 2 i and 2 i + 1


@triton.jit
def load_pairs(p_row, m_row, PAIRS: tl.constexpr):
    """Both numbers of each pair in d columns, float32 [rows, BLOCK] each."""
    if PAIRS.HALVES:
        o_pair = tl.arange(0, PAIRS.BLOCK)[None, :]
        m_tile = m_row & (o_pair < PAIRS.COUNT)
        b_first = tl.load(p_row + o_pair, mask=m_tile, other=0.0).to(tl.float32)
        b_second = tl.load(p_row + PAIRS.COUNT + o_pair, mask=m_tile, other=0.0).to(tl.float32)
        return b_first, b_second
    else:
        o_d = tl.arange(0, 2 * PAIRS.BLOCK)[None, :]
        b_tile = tl.load(p_row + o_d, mask=m_row & (o_d < 2 * PAIRS.COUNT), other=0.0).to(tl.float32)
        return split_pairs(b_tile)


@triton.jit
def load_sines(rope, head, o_n, m_row, prefix_tokens, table_rows, PAIRS: tl.constexpr):
    """Sines and then cosines of the pairs of tokens o_n; m_row: those of them that are rotated.

    table_rows: how many rows of rope a head has to itself, 0 where all share one table.
    """
    row = tl.cast(head, tl.int64) * table_rows + (o_n[:, None] - prefix_tokens)
    p_row = rope + row * (4 * PAIRS.COUNT)
    b_sin_first, b_sin_second = load_pairs(p_row, m_row, PAIRS)
    b_cos_first, b_cos_second = load_pairs(p_row + 2 * PAIRS.COUNT, m_row, PAIRS)
    return b_sin_first, b_sin_second, b_cos_first, b_cos_second


@triton.jit
def rotate_pairs(pairs, sines, m_rotated, ADJOINT: tl.constexpr):
    """Pairs, rotated where m_rotated says so; with ADJOINT by the transpose of that."""
    b_first, b_second = pairs
    b_sin_first, b_sin_second, b_cos_first, b_cos_second = sines
    if ADJOINT:
        b_out_first = b_first * b_cos_first + b_second * b_sin_second
        b_out_second = b_second * b_cos_second - b_first * b_sin_first
    else:
        b_out_first = b_first * b_cos_first - b_second * b_sin_first
        b_out_second = b_second * b_cos_second + b_first * b_sin_second
    return tl.where(m_rotated, b_out_first, b_first), tl.where(m_rotated, b_out_second, b_second)
