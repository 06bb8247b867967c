"""Linear projection with its epilogue: `out = act(x W^T + b) + residual`, act none, GELU (erf) or SwiGLU.

x [..., K], W [N, K], b [N], residual [..., N]; M is the number of rows of x. For SwiGLU W is [2 hidden, K],
the rows of the gate and then those of the value, and the result silu(gate) * value [..., hidden]. K and N are
what pruning left, any integers, and cost what they keep: the product is made of full tiles and of two borders
in small ones, the right border for the last columns and the bottom border for the last rows, and the last
inputs in short steps. So 461 inputs cost 464, not 512, and 1,411 outputs 1,440, not 1,536.

With many rows the product is the vendor's GEMM, on widths padded with zeros to multiples of 8.
`add_linear_` adds `x W^T` to a tensor where it is: the residual is then read and written once, by the product
itself, which as a pass of its own reads two numbers and writes one for each.

Two epilogues are of pairs of results: SwiGLU, and the rotary embedding of queries and keys (`rotated_linear`
in rotary.py), in its interleaved or its halved order of pairs. A tile makes the two of a pair side by side,
by the order in which it takes the rows of W, so that on NVIDIA's tensor cores one thread makes both.
Where that order is not the one in memory, rows of W are loaded by pointer, not by descriptor. With SwiGLU
half of the numbers are written, and z = x W^T + b is never in memory. Both are for inference.

Numbers: in the kernel, products, bias, GELU and residual are float32; the result is rounded once. The
vendor's GEMM rounds what it hands on to GELU, SwiGLU and residual, as PyTorch does. Where tiles are too few
for a GPU the inputs are split among programs; each part is a float32 product of its own, and a second kernel
adds the parts in order. Saved for backward: x, W and, with GELU, z = x W^T + b in the dtype of x.

    dz = dY gelu'(z)    dx = dz W    dW = dz^T x    db = sum_m dz[m]    d residual = dY

dx and dW are the vendor's GEMM; dz and the first stage of db are one kernel.

Deterministic: every sum over rows or parts is made in stages of fixed order; there are no atomics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _arguments, launching, library
from vtp_kernels._tiles import (
    grouped_tile,
    join_pairs,
    load_gate_and_value,
    load_tile,
    split_pairs,
)
from vtp_kernels.launching import Config, TensorDescriptor, Variant, cdiv, choice, is_amd, launch, tl, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.rows import (
    clear_padding,
    empty_rows,
    empty_rows_like,
    in_padded_rows,
    is_aligned,
    padded_width,
    whole_rows,
    with_padded_rows,
    zero_padded,
)

# ------------------------------------------------------------------------------------------------ reference


def compact_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `compact_linear` in plain PyTorch: `act(x @ weight.T + bias) + residual`."""
    y = activated(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


def activated(z: Tensor, activation: str | None) -> Tensor:
    """z [..., N] after the activation: None, "gelu", or "swiglu", of which the result has N / 2 columns."""
    if activation == "swiglu":
        gate, value = z.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(z) if activation == "gelu" else z


# -------------------------------------------------------------------------------------------------- kernels


class _Operand(NamedTuple):
    """A matrix [rows, columns] that device code multiplies; tiles: None, or a descriptor to load them by."""

    p: Any
    tiles: Any
    rows: Any
    columns: Any
    stride: Any


class _Epilogue(NamedTuple):
    """What device code makes of a product, and where it stores the results: arguments of the kernels."""

    bias: Any
    bias_width: Any
    gelu: Any
    residual: Any
    stride_residual: Any
    z: Any
    out: Any
    stride_out: Any


class _Rope(NamedTuple):
    """Rotary embedding of queries and keys in device code: arguments of the kernel (see `Rotation`)."""

    table: Any
    heads: Any
    tokens: Any
    prefix_tokens: Any
    table_rows: Any


class _Pairs(NamedTuple):
    """Constants of the pairs that an epilogue is of, as one constexpr; none without the first two."""

    SWIGLU: Any
    HEAD: Any  # None, or the width of the heads that are rotated
    HALVES: Any  # whether their pairs are columns i and i + HEAD / 2, not 2 i and 2 i + 1


@triton.jit
def _columns_of_tile(i_n, N, heads, TILE_N: tl.constexpr, PAIRS: tl.constexpr):
    """The columns of the product, rows of W, that a tile makes, those of a pair side by side."""
    o_n = i_n + tl.arange(0, TILE_N)
    if PAIRS.SWIGLU:
        o_n = o_n // 2 + o_n % 2 * (N // 2)
    elif PAIRS.HALVES:
        o_d = o_n % PAIRS.HEAD
        o_half = o_d // 2 + o_d % 2 * (PAIRS.HEAD // 2)
        o_n = tl.where(o_n < 2 * heads * PAIRS.HEAD, o_n - o_d + o_half, o_n)
    return o_n


@triton.jit
def _add_product(acc, b_x, b_w, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    if TRANSPOSED:  # `else`, because what follows a `return` is compiled too
        return tl.dot(b_w, tl.trans(b_x), acc, input_precision=PRECISION)
    else:
        return tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)


@triton.jit
def _product_tile(
    x, weight, i_m, i_n, o_n, begin, end,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[i_m:, begin:end] W[o_n, begin:end]^T, float32 [TILE_M, TILE_N].

    o_n: TILE_N rows of W, those from i_n on where W has a descriptor.

    Tensor cores take 16 rows at least but 8 columns: TRANSPOSED makes W x^T, for a tile of 8 rows.
    """
    # Rows beyond the end read the last row again and are dropped at the store: no mask in the loop.
    r_m = tl.minimum(i_m + tl.arange(0, TILE_M), x.rows - 1)
    r_n = tl.minimum(o_n, weight.rows - 1)
    if TRANSPOSED:
        acc = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    else:
        acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    full = begin + (end - begin) // BLOCK_K * BLOCK_K
    for k in range(begin, full, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        if DESCRIPTORS:  # rows beyond the end are clipped, and filled with 0, by the hardware
            b_x = x.tiles.load([i_m, k])
        else:
            b_x = load_tile(x.p, r_m, o_k, x.rows, x.columns, x.stride, False, False)
        if DESCRIPTORS and weight.tiles is not None:
            b_w = weight.tiles.load([i_n, k])
        else:
            b_w = load_tile(weight.p, r_n, o_k, weight.rows, weight.columns, weight.stride, False, False)
        acc = _add_product(acc, b_x, b_w, TRANSPOSED, PRECISION)
    for k in range(full, end, TAIL_K):
        o_k = k + tl.arange(0, TAIL_K)
        b_x = load_tile(x.p, r_m, o_k, x.rows, x.columns, x.stride, False, True, PADDED=True)
        b_w = load_tile(
            weight.p, r_n, o_k, weight.rows, weight.columns, weight.stride, False, True, PADDED=True
        )
        acc = _add_product(acc, b_x, b_w, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _turned(b_own, b_other, p_sin, m_rotated, HEAD: tl.constexpr):
    """own * cos + other * sin where m_rotated says so; p_sin: sines, HEAD numbers before their cosines."""
    b_sin = tl.load(p_sin, mask=m_rotated, other=0.0).to(tl.float32)
    b_cos = tl.load(p_sin + HEAD, mask=m_rotated, other=0.0).to(tl.float32)
    return tl.where(m_rotated, b_own * b_cos + b_other * b_sin, b_own)


@triton.jit
def _rotated(acc, rope, i_n, o_m, M, PAIRS: tl.constexpr):
    """A tile of pairs, those of queries and keys rotated behind the prefix tokens of each image."""
    table, heads, tokens, prefix_tokens, table_rows = rope
    HEAD: tl.constexpr = PAIRS.HEAD
    TILE_N: tl.constexpr = acc.shape[1]
    o_token = o_m % tokens - prefix_tokens
    m_token = ((o_m < M) & (o_token >= 0))[:, None]
    b_first, b_second = split_pairs(acc)
    if PAIRS.HALVES:  # one number of each pair after the other, for fewer registers
        HALF: tl.constexpr = HEAD // 2
        o_pair = tl.multiple_of(i_n // 2, TILE_N // 2) + tl.arange(0, TILE_N // 2)
        row = (o_pair // HALF % heads).to(tl.int64)[None, :] * table_rows + o_token[:, None]
        p_sin = table + row * (2 * HEAD) + (o_pair % HALF)[None, :]
        m_rotated = m_token & (o_pair[None, :] < 2 * heads * HALF)
        b_out_first = _turned(b_first, -b_second, p_sin, m_rotated, HEAD)
        b_out_second = _turned(b_second, b_first, p_sin + HALF, m_rotated, HEAD)
        return join_pairs(b_out_first, b_out_second)
    else:
        o_n = i_n + tl.arange(0, TILE_N)
        row = (o_n // HEAD % heads).to(tl.int64)[None, :] * table_rows + o_token[:, None]
        p_sin = table + row * (2 * HEAD) + (o_n % HEAD)[None, :]
        m_rotated = m_token & (o_n[None, :] < 2 * heads * HEAD)
        return _turned(acc, join_pairs(-b_second, b_first), p_sin, m_rotated, HEAD)


@triton.jit
def _store_halves(acc, out, stride_out, heads, i_n, o_m, M, N, PAIRS: tl.constexpr):
    """Store a tile of pairs, of which those of queries and keys lie half a head apart; 0 in the padding."""
    HALF: tl.constexpr = PAIRS.HEAD // 2
    TILE_N: tl.constexpr = acc.shape[1]
    o_n = i_n + tl.arange(0, TILE_N)
    o_pair = tl.multiple_of(i_n // 2, TILE_N // 2) + tl.arange(0, TILE_N // 2)
    m_row = o_m[:, None] < M
    p_row = out + o_m.to(tl.int64)[:, None] * stride_out
    p_pair = p_row + (o_pair + o_pair // HALF * HALF)[None, :]
    m_pair = m_row & (o_pair[None, :] < 2 * heads * HALF)
    b_first, b_second = split_pairs(acc)
    tl.store(p_pair, b_first.to(out.dtype.element_ty), mask=m_pair)
    tl.store(p_pair + HALF, b_second.to(out.dtype.element_ty), mask=m_pair)
    b_values = tl.where(o_n[None, :] < N, acc, 0.0).to(out.dtype.element_ty)
    m_values = m_row & (o_n[None, :] >= 2 * heads * PAIRS.HEAD) & (o_n[None, :] < (N + 7) // 8 * 8)
    tl.store(p_row + o_n[None, :], b_values, mask=m_values)


@triton.jit
def _swiglu(b_gate, b_value):
    return b_gate / (1.0 + tl.exp(-b_gate)) * b_value


@triton.jit
def _store_swiglu(acc, finish, i_n, o_m, o_z, M, hidden):
    """silu(gate) * value of a tile of pairs, columns o_z of z without the bias; 0 in the padding."""
    TILE_H: tl.constexpr = acc.shape[1] // 2
    o_h = tl.multiple_of(i_n // 2, TILE_H) + tl.arange(0, TILE_H)
    acc += tl.load(finish.bias + o_z, mask=o_z < finish.bias_width, other=0.0).to(tl.float32)[None, :]
    b_gate, b_value = split_pairs(acc)
    b_h = tl.where(o_h[None, :] < hidden, _swiglu(b_gate, b_value), 0.0)
    m_tile = (o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)
    p_h = finish.out + o_m[:, None].to(tl.int64) * finish.stride_out + o_h[None, :]
    tl.store(p_h, b_h.to(finish.out.dtype.element_ty), mask=m_tile)


@triton.jit
def _store_result(
    acc, finish, rope, i_n, o_m, o_n, M, N, SAVE: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """out = act(acc + bias) + residual, and with SAVE z = acc + bias; 0 in the padding of both.

    o_n: the columns that acc is of; rope, i_n: where they are rotated, how, and the first column of the tile.
    """
    bias, bias_width, gelu, residual, stride_residual, z, out, stride_out = finish
    m_tile = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)
    m_padding = o_n[None, :] >= N
    o_out = o_m[:, None].to(tl.int64) * stride_out + o_n[None, :]
    acc += tl.load(bias + o_n, mask=o_n < bias_width, other=0.0).to(tl.float32)[None, :]
    if PAIRS.HEAD is not None:
        acc = _rotated(acc, rope, i_n, o_m, M, PAIRS)
    if SAVE:
        tl.store(z + o_out, tl.where(m_padding, 0.0, acc).to(z.dtype.element_ty), mask=m_tile)
    if gelu:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if residual is not None:
        p_residual = residual + o_m[:, None].to(tl.int64) * stride_residual + o_n[None, :]
        acc += tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)
    if PAIRS.HALVES:
        _store_halves(acc, out, stride_out, rope.heads, i_n, o_m, M, N, PAIRS)
    else:
        tl.store(out + o_out, tl.where(m_padding, 0.0, acc).to(out.dtype.element_ty), mask=m_tile)


@triton.jit
def _tile_of_result(
    x, weight, finish, rope, partial, i_m, i_n, i_part, inputs_per_part,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, SAVE: tl.constexpr, PAIRS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, K = x.rows, weight.rows, x.columns
    o_m, o_n = i_m + tl.arange(0, TILE_M), _columns_of_tile(i_n, N, rope.heads, TILE_N, PAIRS)
    if partial is None:
        acc = _product_tile(
            x, weight, i_m, i_n, o_n, 0, K, TILE_M=TILE_M, TILE_N=TILE_N, BLOCK_K=BLOCK_K, TAIL_K=TAIL_K,
            TRANSPOSED=TRANSPOSED, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
        if PAIRS.SWIGLU:
            _store_swiglu(acc, finish, i_n, o_m, o_n, M, N // 2)
        else:
            _store_result(acc, finish, rope, i_n, o_m, o_n, M, N, SAVE, PAIRS)
    else:
        begin = i_part * (inputs_per_part // BLOCK_K * BLOCK_K)
        end = tl.minimum(begin + inputs_per_part, K)
        acc = _product_tile(
            x, weight, i_m, i_n, o_n, begin, end,
            TILE_M=TILE_M, TILE_N=TILE_N, BLOCK_K=BLOCK_K, TAIL_K=TAIL_K,
            TRANSPOSED=TRANSPOSED, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
        row = i_part.to(tl.int64) * M + o_m[:, None]
        m_tile = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)
        tl.store(partial + row * finish.stride_out + o_n[None, :], acc, mask=m_tile)


@triton.jit(
    do_not_specialize=[
        "M", "N", "K", "bias_width", "stride_x", "stride_w", "stride_residual", "stride_out", "gelu",
        "rows", "columns", "border", "bottom_columns", "inputs_per_part",
        "heads", "tokens", "prefix_tokens", "table_rows",
    ]
)  # fmt: skip
def _compact_linear_fwd_kernel(
    x, weight, x_tiles, w_tiles, bias, residual, z, out, partial, table,
    M, N, K, bias_width, stride_x, stride_w, stride_residual, stride_out, gelu,
    rows, columns, border, bottom_columns, inputs_per_part, heads, tokens, prefix_tokens, table_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr,
    BORDER_N: tl.constexpr, BOTTOM_M: tl.constexpr, BOTTOM_N: tl.constexpr,
    SAVE: tl.constexpr, SWIGLU: tl.constexpr, HEAD: tl.constexpr, HALVES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the result: of the interior, of the right border or of the bottom one (see `TileGrid`).

    x_tiles and w_tiles are descriptors of tiles of the interior, the borders load by pointer. With `partial`
    the tile is a sum over `inputs_per_part` inputs, for `_compact_linear_parts_kernel`. SWIGLU, HEAD and
    HALVES, with table and the four sizes behind the tiles': epilogues of pairs, see `_Pairs` and `Rotation`.
    """
    stride_x, stride_w = stride_x // 8 * 8, stride_w // 8 * 8  # tells the compiler that rows are padded
    stride_residual, stride_out = stride_residual // 8 * 8, stride_out // 8 * 8
    x, weight = _Operand(x, x_tiles, M, K, stride_x), _Operand(weight, w_tiles, N, K, stride_w)
    finish = _Epilogue(bias, bias_width, gelu, residual, stride_residual, z, out, stride_out)
    rope = _Rope(table, heads, tokens, prefix_tokens, table_rows)
    PAIRS: tl.constexpr = _Pairs(SWIGLU, HEAD, HALVES)
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    interior = rows * columns
    if i_tile < interior:
        i_m, i_n = grouped_tile(i_tile, rows, columns, 8)
        _tile_of_result(
            x, weight, finish, rope, partial, i_m * BLOCK_M, i_n * BLOCK_N, i_part, inputs_per_part,
            TILE_M=BLOCK_M, TILE_N=BLOCK_N, BLOCK_K=BLOCK_K, TAIL_K=TAIL_K,
            TRANSPOSED=False, SAVE=SAVE, PAIRS=PAIRS, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    elif i_tile < interior + rows * border:
        i_m, i_n = grouped_tile(i_tile - interior, rows, border, 8)
        i_m, i_n = i_m * BLOCK_M, columns * BLOCK_N + i_n * BORDER_N
        _tile_of_result(
            x, weight, finish, rope, partial, i_m, i_n, i_part, inputs_per_part,
            TILE_M=BLOCK_M, TILE_N=BORDER_N, BLOCK_K=BLOCK_K, TAIL_K=TAIL_K,
            TRANSPOSED=False, SAVE=SAVE, PAIRS=PAIRS, DESCRIPTORS=False, PRECISION=PRECISION,
        )  # fmt: skip
    else:
        i_tile -= interior + rows * border
        i_m = rows * BLOCK_M + i_tile // bottom_columns * BOTTOM_M
        i_n = i_tile % bottom_columns * BOTTOM_N
        _tile_of_result(
            x, weight, finish, rope, partial, i_m, i_n, i_part, inputs_per_part,
            TILE_M=BOTTOM_M, TILE_N=BOTTOM_N, BLOCK_K=BLOCK_K, TAIL_K=TAIL_K,
            TRANSPOSED=True, SAVE=SAVE, PAIRS=PAIRS, DESCRIPTORS=False, PRECISION=PRECISION,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["parts", "M", "N", "bias_width", "stride_residual", "stride_out", "gelu"]
)  # fmt: skip
def _compact_linear_parts_kernel(
    partial, bias, residual, z, out, parts, M, N, bias_width, stride_residual, stride_out, gelu,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """The sum of `parts` products in float32, in order, with bias, GELU and residual as in one piece."""
    stride_residual, stride_out = stride_residual // 8 * 8, stride_out // 8 * 8
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(parts):
        row = tl.cast(part, tl.int64) * M + o_m[:, None]
        acc += tl.load(partial + row * stride_out + o_n[None, :], mask=m_tile, other=0.0)
    finish = _Epilogue(bias, bias_width, gelu, residual, stride_residual, z, out, stride_out)
    NO_PAIRS: tl.constexpr = _Pairs(False, None, False)
    _store_result(acc, finish, None, None, o_m, o_n, M, N, SAVE, NO_PAIRS)


@triton.jit(do_not_specialize=["M", "hidden", "stride_z", "stride_h"])
def _swiglu_fwd_kernel(
    z, h, M, hidden, stride_z, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, HALVES_ALIGNED: tl.constexpr,
):  # fmt: skip
    """h = silu(gate) * value of z [M, 2 hidden], 0 in the padding of its rows.

    HALVES_ALIGNED: hidden is a multiple of 8, so that values start at 16 bytes as gates do.
    """
    stride_z, stride_h = stride_z // 8 * 8, stride_h // 8 * 8
    if HALVES_ALIGNED:
        hidden = hidden // 8 * 8
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    b_gate, b_value = load_gate_and_value(z, o_row, o_h, M, hidden, stride_z)
    b_h = _swiglu(b_gate, b_value)
    m_h = (o_row < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)
    tl.store(h + o_row * stride_h + o_h[None, :], b_h.to(h.dtype.element_ty), mask=m_h)


@triton.jit(do_not_specialize=["M", "N", "rows_per_program", "stride_dy", "stride_z", "stride_dz"])
def _compact_linear_dz_kernel(
    dy, z, dz, partial, M, N, rows_per_program, stride_dy, stride_z, stride_dz,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GELU: tl.constexpr, INPUT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dz = dY gelu'(z), or dY without GELU, in the dtype of dz; partial: sums of each program's rows of it.

    gelu'(z) = Phi(z) + z phi(z), with Phi and phi the distribution and the density of a standard normal.
    """
    stride_dy, stride_z, stride_dz = stride_dy // 8 * 8, stride_z // 8 * 8, stride_dz // 8 * 8
    width = (N + 7) // 8 * 8
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = tl.program_id(0) * rows_per_program
    for m in range(first, tl.minimum(M, first + rows_per_program), BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        m_tile = (o_m[:, None] < M) & (o_n[None, :] < width)
        p_dy = dy + o_m[:, None].to(tl.int64) * stride_dy + o_n[None, :]
        b_dz = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)
        if GELU:
            p_z = z + o_m[:, None].to(tl.int64) * stride_z + o_n[None, :]
            b_z = tl.load(p_z, mask=m_tile, other=0.0).to(tl.float32)
            density = 0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)
            b_dz *= 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476)) + b_z * density
        b_dz = tl.where(o_n[None, :] < N, b_dz, 0.0)
        if INPUT_GRADIENT:
            p_dz = dz + o_m[:, None].to(tl.int64) * stride_dz + o_n[None, :]
            tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_tile)
        if BIAS_GRADIENT:
            b_db += tl.sum(b_dz, axis=0)
    if BIAS_GRADIENT:
        tl.store(partial + tl.program_id(0).to(tl.int64) * width + o_n, b_db, mask=o_n < width)


@triton.jit(do_not_specialize=["rows", "N"])
def _compact_linear_db_kernel(partial, db, rows, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Second stage: db = sum of the `rows` partial sums."""
    width = (N + 7) // 8 * 8
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for row in range(0, rows, BLOCK_R):
        o_r = row + tl.arange(0, BLOCK_R)
        p_partial = partial + o_r[:, None].to(tl.int64) * width + o_n[None, :]
        acc += tl.load(p_partial, mask=(o_r[:, None] < rows) & (o_n[None, :] < width), other=0.0)
    tl.store(db + o_n, tl.sum(acc, axis=0).to(db.dtype.element_ty), mask=o_n < N)


# --------------------------------------------------------------------------------------------------- tables


# Sizes of the borders, the same for all operands:
# - TAIL_K: a matrix product of 16-bit numbers takes 16 inputs at least.
# - BORDER_N: tiles of the border load x again. For half a tile, as there is on average, borders of 32 load as
#   much from L2 as one padded tile (2 times 64 + 32 rows of inputs, and 64 + 128); borders of 16 load 1.7
#   times as much, to save 1 % of the multiplications at N = 768.
# - BOTTOM_M, BOTTOM_N: W x^T on NVIDIA's tensor cores takes 8 rows of x; AMD's take 16.
_BORDERS = dict(TAIL_K=16, BORDER_N=32, BOTTOM_M=8, BOTTOM_N=64)
# Warps, stages and tiles of the interior, by operands: 16-bit, float32 on tensor cores (TF32), float32
# without (IEEE).
TILES = {
    "16": Config.of(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, **_BORDERS),
    "tf32": Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, **_BORDERS),
    "ieee": Config.of(4, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32, **_BORDERS),
}
_PARTS = Config.of(4, 1, BLOCK_M=4, BLOCK_N=128)
_SWIGLU_FWD = Config.of(4, 1, BLOCK_M=16, BLOCK_H=128)
_DZ = Config.of(4, 1, BLOCK_M=16, BLOCK_N=128)
_DZ_ROWS = 128  # of dY per program: one partial sum of a column for each
_DB = Config.of(4, 1, BLOCK_R=16, BLOCK_N=64)

# The bottom border is for as many rows, and only where padding them to a full tile would be more than this
# part of M. Predicted, not measured: a tile of it loads 8 + 64 rows of inputs for 8 x 64 results, so that two
# rows of such tiles load 1.5 times as much as one padded row of tiles (64 + 128 for 64 x 128) and multiply a
# quarter; with more of them loads from L2, which bound these tiles, would outweigh what is saved.
_BOTTOM_ROWS = 16
_BOTTOM_PART = 0.02

# Inputs are split where tiles leave multiprocessors idle (132 of an H100), but into parts of 2,048 at least.
# So up to 4,095 hidden units (a whole DeiT-B has 3,072) a block has seven launches at any batch size; where
# 4,096 are kept, in an uncut ViT-L and in a ViT-H (5,120) of which at most a fifth is cut, an image or two
# take an eighth. Predicted, not measured: a step of 64 inputs takes about 0.3 us where latency bounds it, so
# that 2,048 less save 9.6 us; the second launch, which reads the parts from L2, takes 2 to 3 us, and in eager
# mode some of the host's time. The 4.8 us that parts of 1,024 would save are too near to that.
_FULL_GPU = 132
_LEAST_INPUTS = 2048

# Rows of x from which a product is the vendor's, with GELU and residual in passes of their own. Measured on
# an H200 at the widths of a compact DeiT-B and 25,216 rows (bench/results/gpu-h200.json), qkv, proj, fc1 with
# GELU and fc2 with its residual: the vendor's takes 101, 69, 150 and 128 us if widths are multiples of 16 and
# 467, 69, 523 and 644 as they are (those of proj are even), the kernel 161, 70, 202 and 269. That it is so
# from 1,024 rows on is a guess.
_VENDOR_ROWS = 1024

# What `launching.forced_path` can force: a product in the op's own kernel or in the vendor's GEMM, and
# inputs in one piece or split, into parts of as few as one block.
_PRODUCT = choice("compact_linear", "kernel", "vendor")
_INPUTS = choice("compact_linear", "whole", "split")
# And SwiGLU in the epilogue of a product in the op's own kernel, or in a pass behind it.
_SWIGLU = choice("swiglu", "epilogue", "pass")


@dataclass(frozen=True)
class TileGrid:
    """The tiles that a result is made of.

    Each of `rows` rows of tiles has `columns` in the interior and `border` in the right border; below them
    the bottom border has `bottom_rows` times `bottom_columns`.
    """

    rows: int
    columns: int
    border: int
    bottom_rows: int
    bottom_columns: int

    @property
    def tiles(self) -> int:
        """How many there are in all."""
        return self.rows * (self.columns + self.border) + self.bottom_rows * self.bottom_columns


def tile_grid(M: int, N: int, config: Config) -> TileGrid:
    """The tiles of a result [M, N] of `_compact_linear_fwd_kernel` with this configuration."""
    block = config.blocks
    bottom = M % block["BLOCK_M"]
    if bottom > _BOTTOM_ROWS or block["BLOCK_M"] - bottom <= _BOTTOM_PART * M:
        bottom = 0
    return TileGrid(
        rows=cdiv(M - bottom, block["BLOCK_M"]),
        columns=N // block["BLOCK_N"],
        border=cdiv(N % block["BLOCK_N"], block["BORDER_N"]),
        bottom_rows=cdiv(bottom, block["BOTTOM_M"]),
        bottom_columns=cdiv(N, block["BOTTOM_N"]),
    )


def tiled_flops(M: int, N: int, K: int, config: Config) -> int:
    """FLOPs of `_compact_linear_fwd_kernel` for these sizes, those on the padding of its tiles included."""
    grid, block = tile_grid(M, N, config), config.blocks
    columns = grid.columns * block["BLOCK_N"] + grid.border * block["BORDER_N"]
    results = grid.rows * block["BLOCK_M"] * columns
    results += grid.bottom_rows * block["BOTTOM_M"] * grid.bottom_columns * block["BOTTOM_N"]
    full = K // block["BLOCK_K"] * block["BLOCK_K"]
    return 2 * results * (full + cdiv(K - full, block["TAIL_K"]) * block["TAIL_K"])


def _inputs_per_part(tiles: int, K: int, config: Config) -> int:
    """K, or where the inputs are split how many each part has but the last, which may have fewer."""
    block = config.blocks["BLOCK_K"]
    least = block if _INPUTS.forced == "split" else _LEAST_INPUTS
    parts = min(_FULL_GPU // tiles, K // least)
    if parts < 2 or _INPUTS.forced == "whole":
        return K
    return cdiv(cdiv(K, block), parts) * block


# ------------------------------------------------------------------------------------------------- launchers


def _empty_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`empty_rows`, and the same memory as [M, width] with the stride of a row even if M is 1."""
    out = empty_rows(*shape, dtype=dtype, device=device)
    return out, out.as_strided((shape[:-1].numel(), shape[-1]), (padded_width(shape[-1]), 1))


def _tiles(x: Tensor) -> Config:
    config = TILES[launching.operands(x.dtype)]
    if is_amd(x.device):
        return dataclasses.replace(config, blocks={**config.blocks, "BOTTOM_M": 16})
    return config


def _epilogue(
    bias: Tensor | None, gelu: bool, residual: Tensor | None, z: Tensor | None, out: Tensor, unread: Tensor
) -> dict:
    """Arguments of the kernels that finish a result. `unread` stands for a bias that there is not: its width
    is 0, so that a bias is no constexpr."""
    if bias is not None:
        bias = bias.contiguous()
        bias = bias if bias.data_ptr() % 16 == 0 else bias.clone()
    return dict(
        bias=unread if bias is None else bias, residual=residual, z=z, out=out,
        bias_width=0 if bias is None else len(bias), gelu=int(gelu),
        stride_residual=0 if residual is None else residual.stride(0), stride_out=out.stride(0),
    )  # fmt: skip


class Rotation(NamedTuple):
    """Rotary embedding as the epilogue of a product that makes queries, keys and values.

    table: as rope of `rotate_heads`, contiguous and from 16 bytes on. heads: of each of queries and keys.
    tokens: those of an image, whose rows are side by side. prefix_tokens, rotate_half: as there.
    """

    table: Tensor
    heads: int
    tokens: int
    prefix_tokens: int
    rotate_half: bool


def _launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None, out: Tensor,
    z: Tensor | None, swiglu: bool = False, rotation: Rotation | None = None,
) -> None:  # fmt: skip
    """Fill out [M, N], with swiglu [M, N / 2], and z [M, N] if it is given; all in padded rows, z in those of
    out. Epilogues of pairs go with no other, and their inputs are in one piece."""
    (M, K), N = x.shape, weight.shape[0]
    config = _tiles(x)
    block = config.blocks
    grid = tile_grid(M, N, config)
    operands = launching.operands(x.dtype)
    inputs = K if swiglu or rotation is not None else _inputs_per_part(grid.tiles, K, config)
    parts = cdiv(K, inputs)
    finish = _epilogue(bias, gelu, residual, z, out, weight)
    partial = None
    if parts > 1:
        shape = parts, M, out.stride(0)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        unfinished = finish | dict(bias=None, residual=None, z=None, out=None, bias_width=0, gelu=0)
    elif rotation is not None or (swiglu and operands == "ieee") or (z is not None and operands == "16"):
        # With 4 a few registers spill: for two results on sm_120, of pairs on sm_80. SwiGLU of other
        # operands spills some with 8, on sm_80 and sm_100.
        config = dataclasses.replace(config, num_warps=8)
    halves = rotation is not None and rotation.rotate_half
    descriptors = launching.has_descriptors(x.device)
    launch(
        _compact_linear_fwd_kernel,
        (grid.tiles, parts),
        dict(
            x=x, weight=weight, partial=partial,
            x_tiles=_descriptor(x, block["BLOCK_M"], block["BLOCK_K"]) if descriptors else None,
            # Rows of W in another order than that in memory are no tile.
            w_tiles=_descriptor(weight, block["BLOCK_N"], block["BLOCK_K"])
            if descriptors and not (swiglu or halves) else None,
            M=M, N=N, K=K, stride_x=x.stride(0), stride_w=weight.stride(0), rows=grid.rows,
            columns=grid.columns, border=grid.border, bottom_columns=grid.bottom_columns,
            inputs_per_part=inputs, **(finish if partial is None else unfinished), **_rope(rotation),
        ),
        config,
        SAVE=z is not None and partial is None,
        SWIGLU=swiglu,
        HEAD=None if rotation is None else rotation.table.shape[-1] // 2,
        HALVES=halves,
        DESCRIPTORS=descriptors,
        PRECISION=launching.dot_precision(x.dtype),
    )  # fmt: skip
    if partial is not None:
        _launch_parts(partial, M, N, finish)


def _rope(rotation: Rotation | None) -> dict:
    """Arguments of the kernel that say what is rotated."""
    if rotation is None:
        return dict(table=None, heads=0, tokens=0, prefix_tokens=0, table_rows=0)
    table, heads, tokens, prefix_tokens, _ = rotation
    own = table.shape[1] if table.ndim == 3 else 0
    return dict(table=table, heads=heads, tokens=tokens, prefix_tokens=prefix_tokens, table_rows=own)


def _descriptor(source: Tensor, rows: int, columns: int):
    return TensorDescriptor.from_tensor(source, [rows, columns])


def _launch_parts(partial: Tensor, M: int, N: int, finish: dict) -> None:
    grid = cdiv(M, _PARTS.blocks["BLOCK_M"]), cdiv(N, _PARTS.blocks["BLOCK_N"])
    arguments = dict(partial=partial, parts=len(partial), M=M, N=N, **finish)
    launch(_compact_linear_parts_kernel, grid, arguments, _PARTS, SAVE=finish["z"] is not None)


def launch_swiglu(z: Tensor) -> Tensor:
    """silu(gate) * value, [M, hidden], of z [M, 2 hidden] with padded rows."""
    M, hidden = len(z), z.shape[1] // 2
    block_m, block_h = _SWIGLU_FWD.blocks.values()
    h = empty_rows(M, hidden, dtype=z.dtype, device=z.device)
    launch(
        _swiglu_fwd_kernel,
        (cdiv(M, block_m), cdiv(hidden, block_h)),
        dict(z=z, h=h, M=M, hidden=hidden, stride_z=z.stride(0), stride_h=h.stride(0)),
        _SWIGLU_FWD,
        HALVES_ALIGNED=hidden % 8 == 0,
    )
    return h


def _launch_dz(
    dy: Tensor, z: Tensor | None, dtype: torch.dtype, need_dz: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz [M, N] in `dtype`, and sums [programs, N rounded up to 8] of its columns; either may be None."""
    M, N = dy.shape
    programs = cdiv(M, _DZ_ROWS)
    dz = empty_rows(M, N, dtype=dtype, device=dy.device) if need_dz else None
    partial = None
    if need_db:
        partial = torch.empty((programs, padded_width(N)), dtype=torch.float32, device=dy.device)
    launch(
        _compact_linear_dz_kernel,
        (programs, cdiv(N, _DZ.blocks["BLOCK_N"])),
        dict(
            dy=dy, z=z, dz=dz, partial=partial, M=M, N=N, rows_per_program=_DZ_ROWS,
            stride_dy=dy.stride(0), stride_z=0 if z is None else z.stride(0),
            stride_dz=0 if dz is None else dz.stride(0),
        ),
        _DZ,
        GELU=z is not None,
        INPUT_GRADIENT=need_dz,
        BIAS_GRADIENT=need_db,
    )  # fmt: skip
    return dz, partial


def _launch_db(partial: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    db = torch.empty(N, dtype=dtype, device=partial.device)
    arguments = dict(partial=partial, db=db, rows=len(partial), N=N)
    launch(_compact_linear_db_kernel, (cdiv(N, _DB.blocks["BLOCK_N"]),), arguments, _DB)
    return db


def _vendor(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None, save: bool,
    shape: torch.Size,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward pass by the vendor's GEMM, with what follows a product in passes of their own."""
    out, rows = _empty_rows(shape, x.dtype, x.device)
    # Results with their padding, which lie in one piece: passes over them load 16 bytes at a time.
    whole, weight, z = whole_rows(rows), zero_padded(weight, rows=True), x.new_empty(0)
    if bias is not None and len(bias) < len(weight):
        bias = F.pad(bias, (0, len(weight) - len(bias)))
    _multiply(zero_padded(x), weight.t(), bias, whole)
    if save:
        z = out
        out, rows = _empty_rows(shape, x.dtype, x.device)
        torch.ops.aten.gelu.out(whole, out=whole_rows(rows))
    elif gelu:
        torch.ops.aten.gelu_(whole)
    if residual is None:
        return out, z
    if residual.dtype == x.dtype and residual.shape[1] == whole.shape[1]:
        return torch.add(residual, rows, out=rows).view(shape), z
    total, total_rows = _empty_rows(shape, residual.dtype, x.device)
    clear_padding(total_rows)
    torch.add(residual, rows, out=total_rows)
    return total, z


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def takes_own_product(rows: int) -> bool:
    """Whether a product of so many rows of x is made by the kernel of this op, which can have an epilogue."""
    return not _PRODUCT.takes("vendor", rows >= _VENDOR_ROWS)


def _forward_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None, save: bool,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N = len(weight)
    if 0 in (x.numel(), N) or x.dtype == torch.float64:
        return _forward_plain(x, weight, bias, gelu, residual, save, swiglu)
    shape = torch.Size((*x.shape[:-1], N))
    x, weight = with_padded_rows(x), with_padded_rows(weight)
    residual = None if residual is None else with_padded_rows(residual)
    own = takes_own_product(len(x))
    if swiglu:
        return _swiglu_triton(x, weight, bias, own, shape), x.new_empty(0)
    if not own:
        return _vendor(x, weight, bias, gelu, residual, save, shape)
    out, out_rows = _empty_rows(shape, x.dtype if residual is None else residual.dtype, x.device)
    z, z_rows = _empty_rows(shape, x.dtype, x.device) if save else (x.new_empty(0), None)
    _launch_fwd(x, weight, bias, gelu, residual, out_rows, z_rows)
    return out, z


def _swiglu_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, own: bool, shape: torch.Size
) -> Tensor:  # fmt: skip
    """silu(gate) * value of z = x W^T + b, which is of this shape; x and W with padded rows."""
    if own and _SWIGLU.takes("epilogue", True):
        half = torch.Size((*shape[:-1], shape[-1] // 2))
        out, rows = _empty_rows(half, x.dtype, x.device)
        _launch_fwd(x, weight, bias, False, None, rows, None, swiglu=True)
        return out
    z, _ = _forward_triton(x, weight, bias, False, None, False)
    out = launch_swiglu(with_padded_rows(z))
    return out.view(*shape[:-1], out.shape[1])


def rotated_product(x: Tensor, weight: Tensor, bias: Tensor | None, rotation: Rotation) -> Tensor:
    """`x W^T + b` [..., N] in padded rows, its queries and keys rotated by the epilogue of the kernel.

    The rotation is of the float32 sums. x [..., K] and weight [N, K] have elements, and are not float64.
    """
    out, rows = _empty_rows(torch.Size((*x.shape[:-1], len(weight))), x.dtype, x.device)
    x, weight = with_padded_rows(x), with_padded_rows(weight)
    _launch_fwd(x, weight, bias, False, None, rows, None, rotation=rotation)
    return out


def _add_triton(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    """residual += x W^T."""
    N = len(weight)
    if 0 in (x.numel(), N) or x.dtype == torch.float64:
        return _add_plain(residual, x, weight)
    rows = residual.view(-1, N) if residual.is_contiguous() else None
    if rows is None or not is_aligned(rows):  # what lies behind the end of a row may be somebody else's
        residual.copy_(_forward_triton(x, weight, None, False, residual, False)[0])
        return None
    x, weight = with_padded_rows(x), with_padded_rows(weight)
    if takes_own_product(len(x)):  # each program reads what it overwrites, and nobody else does
        _launch_fwd(x, weight, None, False, rows, rows, None)
    else:
        rows.addmm_(zero_padded(x), zero_padded(weight).t())
    return None


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if 0 in (x.numel(), dy.numel()) or x.dtype == torch.float64:
        return _backward_plain(dy, x, weight, z, need_x, need_weight, need_bias)
    (N, K), shape = weight.shape, x.shape
    dz, x = with_padded_rows(dy), with_padded_rows(x)
    need_dz = (need_x or need_weight) and (z is not None or dy.dtype != x.dtype)
    dx = dw = db = made = None
    if need_dz or need_bias:
        z_rows = None if z is None else with_padded_rows(z)
        made, partial = _launch_dz(dz, z_rows, x.dtype, need_dz, need_bias)
        dz = dz if made is None else made
        db = None if partial is None else _launch_db(partial, N, x.dtype)
    if need_x:
        dx, rows = _empty_rows(shape, x.dtype, x.device)
        # What lies behind the width of dY may be anything; in dz it is 0.
        _multiply(
            zero_padded(dz) if made is None else whole_rows(dz), zero_padded(weight, rows=True), None,
            whole_rows(rows),
        )  # fmt: skip
    if need_weight:  # what lies behind the widths makes rows and columns that are cut off
        dw = (whole_rows(dz).t() @ whole_rows(x))[:N, :K]
    return library.empty_for_none(x, dx, dw, db)


def variants(target: str) -> Iterator[Variant]:
    """Every compilation that `compact_linear` can ask for on `target`, a key of `launching.TARGETS`."""
    cases = [(dtype, "highest") for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    cases += [(torch.float32, "high")]
    with launching.recording("compact_linear", target) as found:
        for dtype, precision in cases:
            with launching.matmul_precision(precision):
                for inputs in (768, 2 * _LEAST_INPUTS):  # in one piece, and with inputs split
                    _record(dtype, inputs)
    yield from found.values()


# By the dtype of x those of rope and the widths of heads that usual models have: 64, and 128 in the largest.
# Others are the same kernel with another value of one constant.
_ROTATED = {
    torch.bfloat16: [(torch.float32, 64), (torch.float32, 128), (torch.bfloat16, 64)],
    torch.float16: [(torch.float32, 64)],
    torch.float32: [(torch.float32, 64)],
}


def _record(dtype: torch.dtype, inputs: int) -> None:
    """Ask for all that x of this dtype can lead to, at so few rows that none goes to the vendor's GEMM."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias, y = empty(64, inputs), empty(768, inputs), empty(768), empty(64, 768)
    of_results = {dtype: y, torch.float32: empty(64, 768, dtype=torch.float32)}.values()
    for residual in (None, *of_results):
        _forward_triton(x, weight, bias, True, residual, False)
    _forward_triton(x, weight, bias, True, None, True)
    for hidden in (
        64,
        61,
    ):  # in the epilogue, which takes any width, and where values start at 16 bytes or not
        _forward_triton(x, weight[: 2 * hidden], None, False, None, False, True)
        launch_swiglu(empty(64, 2 * hidden))
    for table, head in _ROTATED.get(dtype, ()):
        for rotate_half in (False, True):
            rope = empty(19, 2 * head, dtype=table)
            rotated_product(x, weight, bias, Rotation(rope, 2, 20, 1, rotate_half))
    for need_weight, need_bias in ((True, True), (True, False), (False, True)):
        _backward_triton(y, x, weight, y, False, need_weight, need_bias)
        for dy in of_results:
            _backward_triton(dy, x, weight, None, False, need_weight, need_bias)


# ---------------------------------------------------------------------------------- plain PyTorch, any device


def _forward_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None, save: bool,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = F.linear(x, weight, bias)
    out = F.gelu(z) if gelu else z
    if swiglu:
        gate, value = z.chunk(2, dim=-1)
        out = F.silu(gate) * value
    if residual is not None:
        out = out + residual
    return in_padded_rows(out), in_padded_rows(z) if save else x.new_empty(0)


def _add_plain(residual: Tensor, x: Tensor, weight: Tensor) -> None:
    residual.add_(F.linear(x, weight))


def _backward_plain(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None,
    need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    N, K = weight.shape
    dz = dy if z is None else torch.ops.aten.gelu_backward(dy, z.to(dy.dtype))
    dz = dz.to(x.dtype)
    rows = dz.reshape(math.prod(dz.shape[:-1]), N)
    dx = in_padded_rows(dz @ weight) if need_x else None
    dw = in_padded_rows(rows.t() @ x.reshape(len(rows), K)) if need_weight else None
    return library.empty_for_none(x, dx, dw, rows.sum(0) if need_bias else None)


# ---------------------------------------------------------------------------------------------- registration


def _forward_fake(x, weight, bias, gelu, residual, save, swiglu=False):
    shape = (*x.shape[:-1], weight.shape[0] // 2 if swiglu else weight.shape[0])
    out = empty_rows_like(x, *shape, dtype=None if residual is None else residual.dtype)
    return out, empty_rows_like(x, *shape) if save else x.new_empty(0)


def _backward_fake(dy, x, weight, z, need_x, need_weight, need_bias):
    dx = empty_rows_like(x, *x.shape) if need_x else None
    dw = empty_rows_like(x, *weight.shape) if need_weight else None
    return library.empty_for_none(x, dx, dw, x.new_empty(weight.shape[0]) if need_bias else None)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.gelu, _, save, ctx.swiglu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1] if ctx.gelu and save else None)


def _backward(ctx, dy, _):
    need_x, need_weight, need_bias, _, need_residual, *others = ctx.needs_input_grad
    others = (None,) * len(others)  # an argument that has its default is not among them
    if dy is None:  # the result has no part in what is differentiated
        return *(None,) * 5, *others
    needs = (need_x, need_weight, need_bias)
    dx = dw = db = None
    if any(needs):
        if ctx.swiglu or (ctx.gelu and ctx.saved_tensors[2] is None):
            raise RuntimeError("compact_linear: called with save=False, which has no gradient through GELU")
        gradients = torch.ops.vtp.compact_linear_backward(dy, *ctx.saved_tensors, *needs)
        dx, dw, db = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return dx, dw, db, None, dy if need_residual else None, *others


define(
    "compact_linear(Tensor x, Tensor weight, Tensor? bias, bool gelu, Tensor? residual, bool save,"
    " bool swiglu=False) -> (Tensor, Tensor)",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "add_linear_(Tensor(a!) residual, Tensor x, Tensor weight) -> ()",
    plain=_add_plain,
    triton=_add_triton,
    fake=lambda *_: None,
)
define(
    "compact_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? z,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define_gradient(
    "compact_linear", by="compact_linear_backward", backward=_backward, setup_context=_setup_context
)


@register_flop_formula(torch.ops.vtp.compact_linear)
def _forward_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.vtp.compact_linear_backward)
def _backward_flops(
    dy_shape, x_shape, weight_shape, z_shape, need_x, need_weight, need_bias, out_shape=None, **_
) -> int:
    return (int(need_x) + int(need_weight)) * 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.vtp.add_linear_)
def _add_flops(residual_shape, x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


# ------------------------------------------------------------------------------------------ public functions


def compact_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear projection with activation and residual: `act(x @ weight.T + bias) + residual`.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides, rows that are padded to a multiple of
            8 elements are read without a copy. Under autocast x, weight and bias are cast to its dtype, as
            `torch.nn.functional.linear` casts them.
        weight: [N, K], in the dtype of x.
        bias: [N], in the dtype of x, or None.
        activation: None; "gelu" for `z / 2 * (1 + erf(z / sqrt(2)))`; or "swiglu" for `silu(gate) * value`,
            of the two halves of z, where N is even and the result has N / 2 columns.
        residual: [..., N], in the dtype of x, or float32 beside a 16-bit x, or None. Autocast leaves it. With
            "swiglu" there is none.

    Returns:
        [..., N], or with "swiglu" [..., N / 2], in the dtype of the residual if there is one, else of x; the
        rows lie in memory a multiple of 8 elements apart. Gradients have the dtypes of their inputs. There is
        no second derivative.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes or devices do not go together, the activation is not known, or "swiglu" has an odd
            number of rows of weight, or a residual.
    """
    x, weight, bias = _arguments.as_autocast_casts(x, weight, bias)
    _validate(x, weight, bias, activation, residual)
    gelu = activation == "gelu"
    operands = [t for t in (x, weight, bias) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    if activation == "swiglu":
        if differentiated:  # `compact_mlp` has kernels for it
            z, _ = torch.ops.vtp.compact_linear(x, weight, bias, False, None, False)
            return in_padded_rows(activated(z, activation))
        return torch.ops.vtp.compact_linear(x, weight, bias, False, None, False, True)[0]
    save = gelu and differentiated
    if save and residual is not None:  # in no model: not worth compilations that store three results
        return residual + compact_linear(x, weight, bias, activation=activation)
    out, _ = torch.ops.vtp.compact_linear(x, weight, bias, gelu, residual, save)
    return out


def add_linear_(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`residual += x @ weight.T` in place, for inference.

    Args:
        residual: [..., N], in the dtype of x, no two of its elements at one address. Where it is contiguous,
            starts at 16 bytes and N is a multiple of 8, nothing is copied; else the sum is written back.
        x: [..., K], float32, bfloat16, float16 or float64; any strides. Autocast leaves all three.
        weight: [N, K], in the dtype of x.

    Returns:
        residual itself. `torch.compile` and `torch.export` know that it is written.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes or devices do not go together, elements of residual share an address, or it shares
            memory with x or weight.
        RuntimeError: a gradient is asked for; take `compact_linear`.
    """
    _validate(x, weight, None, None, residual)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: got {residual.dtype}, expected {x.dtype}, that of x")
    _arguments.check_written("residual", residual, x=x, weight=weight)
    for name, tensor in (("residual", residual), ("x", x), ("weight", weight)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{name}: needs a gradient, and add_linear_ has none: use compact_linear")
    torch.ops.vtp.add_linear_(residual, x, weight)
    _arguments.note_written(residual)
    return residual


def _validate(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
    optional = {"bias": bias, "residual": residual}
    tensors = _arguments.check_tensors({"x": x, "weight": weight}, optional)
    _arguments.check_dtypes(tensors, or_float32=("residual",))
    _arguments.check_inputs(x, weight)
    N = weight.shape[0]
    if bias is not None:
        _arguments.check_shape("bias", bias, (N,))
    if activation not in (None, "gelu", "swiglu"):
        raise ValueError(f"activation: got {activation!r}, expected None, 'gelu' or 'swiglu'")
    if activation == "swiglu":
        if N % 2:
            shape = tuple(weight.shape)
            raise ValueError(f"weight: got shape {shape}, expected [2 * hidden, K], a gate and a value each")
        if residual is not None:
            raise ValueError("residual: got a tensor, expected None beside the activation 'swiglu'")
    if residual is not None and residual.shape != (expected := (*x.shape[:-1], N)):
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)}, expected {expected}, that of the result"
        )
