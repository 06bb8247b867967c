"""Device code that the kernels of several ops share: the order of tiles, and loading one."""

from __future__ import annotations

from vtp_kernels.launching import tl, triton


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
    source, o_row, o_column, rows, columns, stride, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """source[o_row, o_column] of a matrix [rows, columns], 0 beyond the edges that are masked."""
    p_tile = source + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(p_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] < columns), other=0.0)
    if MASK_ROWS:
        return tl.load(p_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] >= 0), other=0.0)
    if MASK_COLUMNS:
        return tl.load(p_tile, mask=(o_column[None, :] < columns) & (o_row[:, None] >= 0), other=0.0)
    return tl.load(p_tile)


@triton.jit
def load_padded_tile(
    source, o_row, o_column, rows, columns, stride, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """`load_tile` of a matrix in padded rows: whole 16 bytes are loaded at the end of a row.

    What lies behind its width may be anything, and is 0 in the result.
    """
    b_tile = load_tile(source, o_row, o_column, rows, (columns + 7) // 8 * 8, stride, MASK_ROWS, MASK_COLUMNS)
    if MASK_COLUMNS:
        b_tile = tl.where(o_column[None, :] < columns, b_tile, tl.zeros_like(b_tile))
    return b_tile
