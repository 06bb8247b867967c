"""Linear projection whose input dimensions are scaled by a learned gate: `y = (x * g) W^T + b`.

x [..., K], W [N, K], g [K], b [N]; M is the number of rows of x (Zhu, Tang, Han, arXiv 2104.08500).

The gate stands on the weight side, `(x * g) W^T = x (W diag g)^T`. With `G = dY^T X`, the weight gradient
that a plain linear computes anyway:

    dX = dY (W diag g)    dW = G diag g    dg[k] = sum_n G[n, k] W[n, k] + l1 sign(g[k])    db = sum_m dY[m]

so the gate costs no pass over an M x K activation. The penalty `l1 * sum |g|` enters as its subgradient.
Two cases are cheaper on the activation side, where `E = dY W` gives `dX = E diag g` and
`dg[k] = sum_m E[m, k] X[m, k] + l1 sign(g[k])`: fewer rows than outputs (M < N, one image), and a frozen
weight, which then needs no G at all.

Numbers: products are accumulated in float32; `W diag g` is formed in float32 and rounded once, to the dtype
of x. Saved for backward: x, W and g. In mixed precision, x 16-bit and W float32, a plain linear makes, saves
and differentiates a cast copy of W; there the folded weight takes its place, in an op of its own,
`fold_gate`, around the vendor's linear, so that memory and its peak are a plain linear's. `fold_gates` does
so for the four linears of a block at once, in eager mode, where a step waits for launches. Where the dtypes
are equal the folded weight would be memory that a plain linear does not hold; what needs it makes it again.

Deterministic: every sum over rows or columns is made in two stages of fixed order, or by one program; there
are no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import launching, library
from vtp_kernels._arguments import as_autocast_casts, check_dtypes, check_inputs, check_shape, check_tensors
from vtp_kernels._tiles import Matrix, grouped_tile, load_matrix_tile, load_tile
from vtp_kernels.launching import Config, TensorDescriptor, Variant, cdiv, choice, launch, tl, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.rows import is_aligned

Tensors = Sequence[Tensor]

# ------------------------------------------------------------------------------------------------ reference


def gated_linear_ref(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `gated_linear` in plain PyTorch: `(x * gate) @ weight.T + bias`, all of one dtype."""
    return F.linear(x * gate, weight, bias)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _fwd_step(
    acc, x, weight, gate, i_m, r_m, i_n, r_n, k,
    BLOCK_K: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_k = k + tl.arange(0, BLOCK_K)
    b_x = load_matrix_tile(x, i_m, r_m, k, o_k, False, TAIL, DESCRIPTORS)
    b_w = load_matrix_tile(weight, i_n, r_n, k, o_k, False, TAIL, DESCRIPTORS)
    m_k = o_k < x.columns
    b_g = tl.load(gate + o_k, mask=m_k, other=0.0) if TAIL or DESCRIPTORS else tl.load(gate + o_k)
    b_folded = (b_w.to(tl.float32) * b_g.to(tl.float32)[None, :]).to(b_x.dtype)
    return tl.dot(b_x, tl.trans(b_folded), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_x", "stride_w"])
def _gated_linear_fwd_kernel(
    x, weight, gate, bias, y, M, N, K, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x (W diag g)^T + b, one [BLOCK_M, BLOCK_N] tile; the W tile is scaled on chip."""
    if ALIGNED:  # tells the compiler that rows start at 16 bytes: `multiple_of` has no effect on arguments
        N, K, stride_x, stride_w = N // 8 * 8, K // 8 * 8, stride_x // 8 * 8, stride_w // 8 * 8
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    i_m, i_n = i_m * BLOCK_M, i_n * BLOCK_N
    o_m, o_n = i_m + tl.arange(0, BLOCK_M), i_n + tl.arange(0, BLOCK_N)
    # Rows beyond the end read the last row again and are dropped at the store: no mask in the loop.
    r_m, r_n = tl.minimum(o_m, M - 1), tl.minimum(o_n, N - 1)
    x, weight = Matrix(x, M, K, stride_x), Matrix(weight, N, K, stride_w)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    full = tl.cdiv(K, BLOCK_K) * BLOCK_K if DESCRIPTORS else K // BLOCK_K * BLOCK_K
    for k in range(0, full, BLOCK_K):
        acc = _fwd_step(
            acc, x, weight, gate, i_m, r_m, i_n, r_n, k,
            BLOCK_K=BLOCK_K, TAIL=False, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if full < K:
        acc = _fwd_step(
            acc, x, weight, gate, i_m, r_m, i_n, r_n, full,
            BLOCK_K=BLOCK_K, TAIL=True, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m[:, None] < M) & (o_n[None, :] < N)
    p_y = y + o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def _dx_step(
    acc, dy, weight, i_m, r_m, i_k, o_k, n,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_n = n + tl.arange(0, BLOCK_N)
    b_dy = load_matrix_tile(dy, i_m, r_m, n, o_n, False, TAIL, DESCRIPTORS)
    b_w = load_matrix_tile(weight, n, o_n, i_k, o_k, TAIL, True, DESCRIPTORS)
    return tl.dot(b_dy, b_w.to(b_dy.dtype), acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_dy", "stride_w", "stride_x"])
def _gated_linear_dx_kernel(
    dy, weight, gate, x, dx, partial, M, N, K, stride_dy, stride_w, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """E = dY W, one [BLOCK_M, BLOCK_K] tile; dX = E diag g and, if asked, this tile's sum_m E[m, k] X[m, k].

    The gate scales columns of the result, so it is applied once, to the accumulator, not to every W tile.
    """
    if ALIGNED:
        N, K = N // 8 * 8, K // 8 * 8
        stride_dy, stride_w, stride_x = stride_dy // 8 * 8, stride_w // 8 * 8, stride_x // 8 * 8
    t_m, i_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), 8)
    i_m, i_k = t_m * BLOCK_M, i_k * BLOCK_K
    o_m, o_k = i_m + tl.arange(0, BLOCK_M), i_k + tl.arange(0, BLOCK_K)
    r_m = tl.minimum(o_m, M - 1)
    dy, weight = Matrix(dy, M, N, stride_dy), Matrix(weight, N, K, stride_w)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    full = tl.cdiv(N, BLOCK_N) * BLOCK_N if DESCRIPTORS else N // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc = _dx_step(
            acc, dy, weight, i_m, r_m, i_k, o_k, n,
            BLOCK_N=BLOCK_N, TAIL=False, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if full < N:
        acc = _dx_step(
            acc, dy, weight, i_m, r_m, i_k, o_k, full,
            BLOCK_N=BLOCK_N, TAIL=True, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    m_tile = (o_m[:, None] < M) & (o_k[None, :] < K)
    if GATE_GRADIENT:
        # x is 0 beyond the last row, so the repeated rows of the accumulator add nothing.
        b_x = load_tile(x, o_m, o_k, M, K, stride_x, True, True).to(tl.float32)
        tl.store(partial + t_m.to(tl.int64) * K + o_k, tl.sum(acc * b_x, axis=0), mask=o_k < K)
    b_g = tl.load(gate + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    p_dx = dx + o_m[:, None].to(tl.int64) * K + o_k[None, :]
    tl.store(p_dx, (acc * b_g[None, :]).to(dx.dtype.element_ty), mask=m_tile)


@triton.jit
def _dw_step(
    acc, dy, x, i_n, o_n, i_k, o_k, m,
    BLOCK_M: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_m = m + tl.arange(0, BLOCK_M)
    b_dy = load_matrix_tile(dy, m, o_m, i_n, o_n, TAIL, True, DESCRIPTORS)
    b_x = load_matrix_tile(x, m, o_m, i_k, o_k, TAIL, True, DESCRIPTORS)
    return tl.dot(tl.trans(b_dy), b_x, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_dy", "stride_x", "stride_w"])
def _gated_linear_dw_kernel(
    dy, x, weight, gate, dw, partial, M, N, K, stride_dy, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, GATE_GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G = dY^T X, one [BLOCK_N, BLOCK_K] tile; dW = G diag g and this tile's sum_n G[n, k] W[n, k]."""
    if ALIGNED:
        N, K = N // 8 * 8, K // 8 * 8
        stride_dy, stride_x, stride_w = stride_dy // 8 * 8, stride_x // 8 * 8, stride_w // 8 * 8
    t_n, i_k = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), 8)
    i_n, i_k = t_n * BLOCK_N, i_k * BLOCK_K
    o_n, o_k = i_n + tl.arange(0, BLOCK_N), i_k + tl.arange(0, BLOCK_K)
    dy, x = Matrix(dy, M, N, stride_dy), Matrix(x, M, K, stride_x)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    full = M if DESCRIPTORS else M // BLOCK_M * BLOCK_M
    for m in range(0, full, BLOCK_M):
        acc = _dw_step(
            acc, dy, x, i_n, o_n, i_k, o_k, m,
            BLOCK_M=BLOCK_M, TAIL=False, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if full < M:
        acc = _dw_step(
            acc, dy, x, i_n, o_n, i_k, o_k, full,
            BLOCK_M=BLOCK_M, TAIL=True, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if GATE_GRADIENT:
        b_w = load_tile(weight, o_n, o_k, N, K, stride_w, True, True).to(tl.float32)
        tl.store(partial + t_n.to(tl.int64) * K + o_k, tl.sum(acc * b_w, axis=0), mask=o_k < K)
    if WEIGHT_GRADIENT:
        b_g = tl.load(gate + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        p_dw = dw + o_n[:, None].to(tl.int64) * K + o_k[None, :]
        m_dw = (o_n[:, None] < N) & (o_k[None, :] < K)
        tl.store(p_dw, (acc * b_g[None, :]).to(dw.dtype.element_ty), mask=m_dw)


@triton.jit
def _fold_tile(
    weight, gate, folded, N, K, stride_w, i_n, i_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    o_n, o_k = i_n + tl.arange(0, BLOCK_N), i_k + tl.arange(0, BLOCK_K)
    b_w = load_tile(weight, o_n, o_k, N, K, stride_w, True, True).to(tl.float32)
    b_g = tl.load(gate + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    p_folded = folded + o_n[:, None].to(tl.int64) * K + o_k[None, :]
    m_folded = (o_n[:, None] < N) & (o_k[None, :] < K)
    tl.store(p_folded, (b_w * b_g[None, :]).to(folded.dtype.element_ty), mask=m_folded)


@triton.jit(do_not_specialize=["N", "K", "stride_w"])
def _fold_kernel(
    weight, gate, folded, N, K, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """folded = W diag g in the dtype of the activations: the cast that mixed precision makes anyway."""
    if ALIGNED:
        K, stride_w = K // 8 * 8, stride_w // 8 * 8
    i_n, i_k = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    _fold_tile(weight, gate, folded, N, K, stride_w, i_n, i_k, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)


@triton.jit
def _fold_numbered(
    weight, gate, bias, folded, cast, N, K, i,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Tile i of W diag g, counted along its rows, and its rows of the bias.

    W [N, K] is contiguous, and its rows start at 16 bytes.
    """
    K = K // 8 * 8
    columns = tl.cdiv(K, BLOCK_K)
    i_n, i_k = i // columns * BLOCK_N, i % columns * BLOCK_K
    _fold_tile(weight, gate, folded, N, K, K, i_n, i_k, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    if HAS_BIAS:
        o_bias = i_n + tl.arange(0, BLOCK_N)
        m_bias = (o_bias < N) & (i_k == 0)
        b_bias = tl.load(bias + o_bias, mask=m_bias, other=0.0)
        tl.store(cast + o_bias, b_bias.to(cast.dtype.element_ty), mask=m_bias)


@triton.jit(do_not_specialize=["N_0", "K_0", "N_1", "K_1", "N_2", "K_2", "N_3", "K_3"])
def _fold_gates_kernel(
    weight_0, gate_0, bias_0, folded_0, cast_0, N_0, K_0,
    weight_1, gate_1, bias_1, folded_1, cast_1, N_1, K_1,
    weight_2, gate_2, bias_2, folded_2, cast_2, N_2, K_2,
    weight_3, gate_3, bias_3, folded_3, cast_3, N_3, K_3,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """W diag g and the bias of four linears in the dtype of the activations: one launch for a block."""
    i = tl.program_id(0)
    end_0 = tl.cdiv(N_0, BLOCK_N) * tl.cdiv(K_0, BLOCK_K)
    end_1 = end_0 + tl.cdiv(N_1, BLOCK_N) * tl.cdiv(K_1, BLOCK_K)
    end_2 = end_1 + tl.cdiv(N_2, BLOCK_N) * tl.cdiv(K_2, BLOCK_K)
    if i < end_0:
        _fold_numbered(
            weight_0, gate_0, bias_0, folded_0, cast_0, N_0, K_0, i,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    elif i < end_1:
        _fold_numbered(
            weight_1, gate_1, bias_1, folded_1, cast_1, N_1, K_1, i - end_0,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    elif i < end_2:
        _fold_numbered(
            weight_2, gate_2, bias_2, folded_2, cast_2, N_2, K_2, i - end_1,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    else:
        _fold_numbered(
            weight_3, gate_3, bias_3, folded_3, cast_3, N_3, K_3, i - end_2,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip


@triton.jit
def _unfold_columns(
    product, weight, gate, db, dw, dg, dbias, N, K, i,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """From G, of the i-th BLOCK_K columns, all rows in turn: dW = G diag g and dg[k] = sum_n G[n, k] W[n, k].

    The program of the first columns also brings the bias' gradient into the dtype of the bias.
    """
    K = K // 8 * 8
    o_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_gate = tl.load(gate + o_k, mask=m_k, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_dfolded = load_tile(product, o_n, o_k, N, K, K, True, True).to(tl.float32)
        b_weight = load_tile(weight, o_n, o_k, N, K, K, True, True).to(tl.float32)
        acc += b_dfolded * b_weight
        p_dw = dw + o_n[:, None].to(tl.int64) * K + o_k[None, :]
        m_dw = (o_n[:, None] < N) & m_k[None, :]
        tl.store(p_dw, (b_dfolded * b_gate[None, :]).to(dw.dtype.element_ty), mask=m_dw)
        if HAS_BIAS:
            m_db = (o_n < N) & (i == 0)
            b_db = tl.load(db + o_n, mask=m_db, other=0.0)
            tl.store(dbias + o_n, b_db.to(dbias.dtype.element_ty), mask=m_db)
    tl.store(dg + o_k, tl.sum(acc, axis=0), mask=m_k)


@triton.jit(do_not_specialize=["N_0", "K_0", "N_1", "K_1", "N_2", "K_2", "N_3", "K_3"])
def _unfold_gates_kernel(
    product_0, weight_0, gate_0, db_0, dw_0, dg_0, dbias_0, N_0, K_0,
    product_1, weight_1, gate_1, db_1, dw_1, dg_1, dbias_1, N_1, K_1,
    product_2, weight_2, gate_2, db_2, dw_2, dg_2, dbias_2, N_2, K_2,
    product_3, weight_3, gate_3, db_3, dw_3, dg_3, dbias_3, N_3, K_3,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dW, the whole dg and db of the four linears of `_fold_gates_kernel`, without partial sums."""
    i = tl.program_id(0)
    end_0 = tl.cdiv(K_0, BLOCK_K)
    end_1 = end_0 + tl.cdiv(K_1, BLOCK_K)
    end_2 = end_1 + tl.cdiv(K_2, BLOCK_K)
    if i < end_0:
        _unfold_columns(
            product_0, weight_0, gate_0, db_0, dw_0, dg_0, dbias_0, N_0, K_0, i,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    elif i < end_1:
        _unfold_columns(
            product_1, weight_1, gate_1, db_1, dw_1, dg_1, dbias_1, N_1, K_1, i - end_0,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    elif i < end_2:
        _unfold_columns(
            product_2, weight_2, gate_2, db_2, dw_2, dg_2, dbias_2, N_2, K_2, i - end_1,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip
    else:
        _unfold_columns(
            product_3, weight_3, gate_3, db_3, dw_3, dg_3, dbias_3, N_3, K_3, i - end_2,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, HAS_BIAS=HAS_BIAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "rows_per_program", "stride_w"])
def _unfold_kernel(
    product, weight, folded, gate, dw, partial, N, K, rows_per_program, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FOLDED: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, GATE_GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """From G: dW = G diag g and each program's sum_n G[n, k] W[n, k].

    With FOLDED the 16-bit `W diag g` of the forward pass is read in place of the float32 W, half the bytes,
    and divided by g at the end; a program with a gate that is 0, or so small that products in float16 lose
    digits, reads W itself.
    """
    if ALIGNED:
        K, stride_w = K // 8 * 8, stride_w // 8 * 8
    i_n, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K
    o_k = i_k + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_g = tl.load(gate + o_k, mask=m_k, other=0.0).to(tl.float32)
    if FOLDED:
        smallest = 0.015625 if folded.dtype.element_ty == tl.float16 else 1e-12
        divide = tl.min(tl.where(m_k, tl.abs(b_g), 1.0)) > smallest
    b_dg = tl.zeros((BLOCK_K,), dtype=tl.float32)
    first = tl.program_id(0) * rows_per_program
    for n in range(first, tl.minimum(N, first + rows_per_program), BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_tile = (o_n[:, None] < N) & m_k[None, :]
        o_tile = o_n[:, None].to(tl.int64) * K + o_k[None, :]
        b_product = tl.load(product + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        if GATE_GRADIENT:
            p_w = weight + o_n[:, None].to(tl.int64) * stride_w + o_k[None, :]
            if FOLDED:
                if divide:
                    b_w = tl.load(folded + o_tile, mask=m_tile, other=0.0).to(tl.float32)
                else:
                    b_w = tl.load(p_w, mask=m_tile, other=0.0).to(tl.float32)
            else:
                b_w = tl.load(p_w, mask=m_tile, other=0.0).to(tl.float32)
            b_dg += tl.sum(b_product * b_w, axis=0)
        if WEIGHT_GRADIENT:
            tl.store(dw + o_tile, (b_product * b_g[None, :]).to(dw.dtype.element_ty), mask=m_tile)
    if GATE_GRADIENT:
        if FOLDED:  # noqa: SIM102 (known when compiling; `divide` is not)
            if divide:
                b_dg = b_dg / tl.where(m_k, b_g, 1.0)
        tl.store(partial + i_n * K + o_k, b_dg, mask=m_k)


@triton.jit(do_not_specialize=["rows", "K", "l1"])
def _gate_gradient_kernel(partial, gate, dg, rows, K, l1, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Second stage: dg = sum of the `rows` partial sums + l1 sign(g)."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for row in range(0, rows, BLOCK_R):
        o_r = row + tl.arange(0, BLOCK_R)
        acc += load_tile(partial, o_r, o_k, rows, K, K, True, True)
    b_g = tl.load(gate + o_k, mask=m_k, other=0.0).to(tl.float32)
    sign = tl.where(b_g > 0, 1.0, 0.0) - tl.where(b_g < 0, 1.0, 0.0)
    tl.store(dg + o_k, (tl.sum(acc, axis=0) + l1 * sign).to(dg.dtype.element_ty), mask=m_k)


# --------------------------------------------------------------------------------------------------- tables


# Warps, stages and tiles, by kernel and by its operands: 16-bit, 16-bit with a float32 weight, float32 on
# tensor cores (TF32), float32 without (IEEE). The batch size does not enter.
TILES = {
    ("fwd", "16"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
    ("fwd", "16/32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
    ("fwd", "tf32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    ("fwd", "ieee"): Config.of(4, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=32),
    ("dx", "16"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=128),
    ("dx", "16/32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=128),
    ("dx", "tf32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
    ("dx", "ieee"): Config.of(4, 3, BLOCK_M=32, BLOCK_N=16, BLOCK_K=64),
    ("dw", "16"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=128),
    ("dw", "16/32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=128),
    ("dw", "tf32"): Config.of(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    ("dw", "ieee"): Config.of(4, 3, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64),
}
# Rows that do not start at 16 bytes are loaded element by element; smaller tiles keep addresses in registers.
UNALIGNED_TILES = {
    ("fwd", "16"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    ("fwd", "16/32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    ("fwd", "tf32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
    ("fwd", "ieee"): Config.of(4, 3, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
    ("dx", "16"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
    ("dx", "16/32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
    ("dx", "tf32"): Config.of(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
    ("dx", "ieee"): Config.of(4, 3, BLOCK_M=32, BLOCK_N=16, BLOCK_K=32),
    ("dw", "16"): Config.of(8, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
    ("dw", "16/32"): Config.of(8, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
    ("dw", "tf32"): Config.of(4, 3, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
    ("dw", "ieee"): Config.of(4, 3, BLOCK_M=16, BLOCK_N=32, BLOCK_K=64),
}
_FOLD = Config.of(4, 1, BLOCK_N=16, BLOCK_K=128)
_UNFOLD = {  # by whether rows start at 16 bytes
    True: Config.of(4, 1, BLOCK_N=16, BLOCK_K=128),
    False: Config.of(8, 1, BLOCK_N=16, BLOCK_K=128),
}
# A program has all rows of a few columns: many rows at a time, as what it waits for is memory.
_UNFOLD_GATES = Config.of(16, 1, BLOCK_N=256, BLOCK_K=32)
_UNFOLD_ROWS = 128  # of W per program: one partial sum of a column for each
_GATE_GRADIENT = Config.of(4, 1, BLOCK_R=16, BLOCK_K=64)

# Rows of x up to which a product runs in the fused kernel; with more, it is the vendor's GEMM with N x K
# kernels around it. Predicted, not measured: those kernels move about 4 bytes per weight and product in 16
# bits and 8 in float32 (`proofs.gating_roofline`); the fused GEMM takes perhaps a fifth more time for its 2 M
# flop per weight. The two are then equal at M = 2,950 on an H100 (990 TFLOP/s, 3.35 TB/s) and 1,530 on an
# A100 (312, 2.0) in 16 bits, at 400 and 190 in float32 without tensor cores.
FUSED_ROWS = {2: 2048, 4: 256}

# Tiles of dW from which the fused kernel fills a large GPU (132 multiprocessors of an H100). With fewer, the
# vendor's GEMM, which can share the rows among programs, is taken.
_FULL_GPU = 132

# What `launching.forced_path` can force: products in the op's own kernels or in the vendor's GEMM; dW, which
# is also the vendor's where its tiles are few; and the product from which the gate's gradient is made.
_PRODUCTS = choice("gated_linear", "fused", "vendor")
_DW_PRODUCT = choice("gated_linear", "fused_dw", "vendor_dw")
_GATE_SIDE = choice("gated_linear", "activation_side", "weight_side")
# Whether the gates of a block are folded at once (`fold_gates`): it saves launches, for which a step waits in
# eager mixed precision on a GPU (docs/speed-gpu.md). By default where that is what runs.
_FOLDS = choice("gated_linear", "together", "apart")


def _on_activation_side(M: int, N: int, need_x: bool, need_weight: bool, need_gate: bool) -> bool:
    """Whether the gate's gradient comes from `dY W` (M x K) rather than from `dY^T X` (N x K)."""
    cheaper = not need_weight or M < N
    return need_gate and need_x and _GATE_SIDE.takes("activation_side", cheaper)


def _is_fused(M: int, element_size: int) -> bool:
    """Whether products of M rows, of numbers of `element_size` bytes, run in the fused kernels."""
    return _PRODUCTS.takes("fused", FUSED_ROWS[element_size] >= M)


# ------------------------------------------------------------------------------------------------- launchers


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with contiguous rows that do not overlap; a copy only where it must be."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(math.prod(x.shape[:-1]), 0)
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _layout(*operands: Tensor) -> dict[str, Any]:
    """The constexprs that follow from where the operands lie and from their dtype."""
    aligned = is_aligned(*operands)
    ieee = operands[0].dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "ALIGNED": aligned,
        "DESCRIPTORS": aligned and launching.has_descriptors(operands[0].device),
        "PRECISION": "ieee" if ieee else "tf32",
    }


def _tiles(kernel: str, activation: Tensor, weight: Tensor, layout: dict) -> Config:
    if activation.element_size() == 2:
        operands = "16" if weight.element_size() == 2 else "16/32"
    else:
        operands = layout["PRECISION"]
    return (TILES if layout["ALIGNED"] else UNALIGNED_TILES)[kernel, operands]


def _tile(source: Tensor, rows: int, columns: int, layout: dict):
    """What a kernel loads tiles from: a descriptor, or the pointer."""
    return TensorDescriptor.from_tensor(source, [rows, columns]) if layout["DESCRIPTORS"] else source


def _launch_fwd(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    layout = _layout(x, weight, y)  # rows of y too must start at 16 bytes
    config = _tiles("fwd", x, weight, layout)
    block_m, block_n, block_k = config.blocks.values()
    launch(
        _gated_linear_fwd_kernel,
        (cdiv(M, block_m) * cdiv(N, block_n),),
        dict(
            x=_tile(x, block_m, block_k, layout), weight=_tile(weight, block_n, block_k, layout),
            gate=gate, bias=bias, y=y, M=M, N=N, K=K, stride_x=x.stride(0), stride_w=weight.stride(0),
        ),
        config,
        HAS_BIAS=bias is not None,
        **layout,
    )  # fmt: skip
    return y


def _launch_dx(dy: Tensor, weight: Tensor, gate: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dX [M, K], and from x the partial sums [tiles, K] of the gate's gradient."""
    (M, N), K = dy.shape, weight.shape[1]
    layout = _layout(dy, weight, *(() if x is None else (x,)))
    config = _tiles("dx", dy, weight, layout)
    block_m, block_n, block_k = config.blocks.values()
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device)
    tiles = cdiv(M, block_m)
    partial = None if x is None else torch.empty((tiles, K), dtype=torch.float32, device=dy.device)
    launch(
        _gated_linear_dx_kernel,
        (tiles * cdiv(K, block_k),),
        dict(
            dy=_tile(dy, block_m, block_n, layout), weight=_tile(weight, block_n, block_k, layout),
            gate=gate, x=x, dx=dx, partial=partial, M=M, N=N, K=K,
            stride_dy=dy.stride(0), stride_w=weight.stride(0), stride_x=0 if x is None else x.stride(0),
        ),
        config,
        GATE_GRADIENT=x is not None,
        **layout,
    )  # fmt: skip
    return dx, partial


def _launch_dw(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor, need_weight: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dW [N, K] in the dtype of W, and partial sums [tiles, K] of the gate's gradient; either may be None."""
    (M, N), K = dy.shape, x.shape[1]
    layout = _layout(dy, x, weight)
    config = _tiles("dw", dy, weight, layout)
    block_m, block_n, block_k = config.blocks.values()
    tiles = cdiv(N, block_n)
    dw = torch.empty((N, K), dtype=weight.dtype, device=dy.device) if need_weight else None
    partial = torch.empty((tiles, K), dtype=torch.float32, device=dy.device) if need_gate else None
    launch(
        _gated_linear_dw_kernel,
        (tiles * cdiv(K, block_k),),
        dict(
            dy=_tile(dy, block_m, block_n, layout), x=_tile(x, block_m, block_k, layout),
            weight=weight, gate=gate, dw=dw, partial=partial, M=M, N=N, K=K,
            stride_dy=dy.stride(0), stride_x=x.stride(0), stride_w=weight.stride(0),
        ),
        config,
        WEIGHT_GRADIENT=need_weight,
        GATE_GRADIENT=need_gate,
        **layout,
    )  # fmt: skip
    return dw, partial


def _launch_fold(weight: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    N, K = weight.shape
    folded = torch.empty((N, K), dtype=dtype, device=weight.device)
    grid = (cdiv(N, _FOLD.blocks["BLOCK_N"]), cdiv(K, _FOLD.blocks["BLOCK_K"]))
    arguments = dict(weight=weight, gate=gate, folded=folded, N=N, K=K, stride_w=weight.stride(0))
    launch(_fold_kernel, grid, arguments, _FOLD, ALIGNED=is_aligned(weight))
    return folded


def _launch_unfold(
    product: Tensor, weight: Tensor, folded: Tensor | None, gate: Tensor, need_weight: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From `product` [N, K], contiguous, dY^T X: dW and partial sums as `_launch_dw` returns them."""
    N, K = product.shape
    programs = cdiv(N, _UNFOLD_ROWS)
    aligned = is_aligned(weight)
    config = _UNFOLD[aligned]
    device = product.device
    dw = torch.empty((N, K), dtype=weight.dtype, device=device) if need_weight else None
    partial = torch.empty((programs, K), dtype=torch.float32, device=device) if need_gate else None
    launch(
        _unfold_kernel,
        (programs, cdiv(K, config.blocks["BLOCK_K"])),
        dict(
            product=product, weight=weight, folded=folded, gate=gate, dw=dw, partial=partial,
            N=N, K=K, rows_per_program=_UNFOLD_ROWS, stride_w=weight.stride(0),
        ),
        config,
        FOLDED=folded is not None,
        WEIGHT_GRADIENT=need_weight,
        GATE_GRADIENT=need_gate,
        ALIGNED=aligned,
    )  # fmt: skip
    return dw, partial


# Arguments of the two kernels that take four linears, by linear.
_FOLD_NAMES, _UNFOLD_NAMES = (
    [f"{name}_{i}" for i in range(4) for name in names.split()]
    for names in ("weight gate bias folded cast N K", "product weight gate db dw dg dbias N K")
)
_NO_BIAS = (None,) * 4


def _launch_fold_gates(
    weights: Tensors, gates: Tensors, biases: Tensors | None, dtype: torch.dtype
) -> Tensors:
    """W diag g [N, K] of four linears, then their biases [N] if there are any, in `dtype`.

    Each W is contiguous, its rows start at 16 bytes, and so do gates and biases.
    """
    folded = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    casts = [] if biases is None else [torch.empty_like(bias, dtype=dtype) for bias in biases]
    block_n, block_k = _FOLD.blocks.values()
    arguments: list = []
    programs = 0
    for weight, gate, bias, out, cast in zip(
        weights, gates, biases or _NO_BIAS, folded, casts or _NO_BIAS, strict=True
    ):
        N, K = weight.shape
        arguments += (weight, gate, bias, out, cast, N, K)
        programs += cdiv(N, block_n) * cdiv(K, block_k)
    named = dict(zip(_FOLD_NAMES, arguments, strict=True))
    has_bias = biases is not None
    launch(_fold_gates_kernel, (programs,), named, _FOLD, kinds=(dtype, has_bias), HAS_BIAS=has_bias)
    return folded + casts


def _launch_unfold_gates(products: Tensors, dbs: Tensors | None, weights: Tensors, gates: Tensors) -> Tensors:
    """The dW [N, K] of four linears, their dg [K], and db [N] if there are any.

    From `products` [N, K], dY^T X, and `dbs` [N], sums of dY, in the dtype of dY; outputs are float32.
    """
    products = [_at_16_bytes(product) for product in products]
    dws, dgs = [torch.empty_like(w) for w in weights], [torch.empty_like(g) for g in gates]
    dbiases = []
    if dbs is not None:
        dbs = [_at_16_bytes(db) for db in dbs]
        dbiases = [torch.empty_like(db, dtype=torch.float32) for db in dbs]
    block_k = _UNFOLD_GATES.blocks["BLOCK_K"]
    arguments: list = []
    programs = 0
    for product, weight, gate, db, dw, dg, dbias in zip(
        products, weights, gates, dbs or _NO_BIAS, dws, dgs, dbiases or _NO_BIAS, strict=True
    ):
        N, K = weight.shape
        arguments += (product, weight, gate, db, dw, dg, dbias, N, K)
        programs += cdiv(K, block_k)
    named = dict(zip(_UNFOLD_NAMES, arguments, strict=True))
    kinds = (products[0].dtype, dbs is not None)
    launch(_unfold_gates_kernel, (programs,), named, _UNFOLD_GATES, kinds=kinds, HAS_BIAS=dbs is not None)
    return dws + dgs + dbiases


def _at_16_bytes(t: Tensor) -> Tensor:
    """t, contiguous and starting at 16 bytes; a copy only where it is not."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _launch_gate_gradient(partial: Tensor, gate: Tensor, l1: float) -> Tensor:
    rows, K = partial.shape
    dg = torch.empty_like(gate)
    grid = (cdiv(K, _GATE_GRADIENT.blocks["BLOCK_K"]),)
    arguments = dict(partial=partial, gate=gate, dg=dg, rows=rows, K=K, l1=float(l1))
    launch(_gate_gradient_kernel, grid, arguments, _GATE_GRADIENT)
    return dg


def _float32(gate: Tensor) -> Tensor:
    """The gate as the kernels take it: K numbers are not worth a compilation for each of their dtypes."""
    return gate.to(torch.float32).contiguous()


def _fills_a_gpu(weight: Tensor) -> bool:
    """Whether dW has a tile, 64 x 128, for every multiprocessor."""
    return cdiv(weight.shape[0], 64) * cdiv(weight.shape[1], 128) >= _FULL_GPU


def _forward_triton(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, l1: float) -> Tensor:
    N, K = weight.shape
    rows, weight = _rows(x), _rows(weight)
    if 0 in (len(rows), N, K) or x.dtype == torch.float64:
        return _forward_plain(x, weight, gate, bias, l1)
    if _is_fused(len(rows), x.element_size()):
        bias = None if bias is None else bias.to(weight.dtype).contiguous()
        y = _launch_fwd(rows, weight, _float32(gate), bias)
    else:
        folded = _launch_fold(weight, _float32(gate), x.dtype)
        y = F.linear(rows, folded, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], N)


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor, bias_dtype: torch.dtype | None, l1: float,
    need_x: bool, need_weight: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    N, K = weight.shape
    if 0 in (dy.numel(), K) or x.dtype == torch.float64:
        return _backward_plain(dy, x, weight, gate, bias_dtype, l1, need_x, need_weight, need_gate)
    shape, gate_dtype = x.shape, gate.dtype
    dy, x, weight, gate = _rows(dy), _rows(x), _rows(weight), _float32(gate)
    M = len(dy)
    is_fused = _is_fused(M, x.element_size())
    dx = dw = dg = partial = None
    if _on_activation_side(M, N, need_x, need_weight, need_gate):
        dx, partial = _launch_dx(dy, weight, gate, x)
        need_gate = False
    elif need_x and is_fused:
        dx, _ = _launch_dx(dy, weight, gate, None)
    elif need_x:
        dx = dy @ _launch_fold(weight, gate, dy.dtype)
    if (need_weight or need_gate) and _DW_PRODUCT.takes("fused_dw", is_fused and _fills_a_gpu(weight)):
        dw, from_weight = _launch_dw(dy, x, weight, gate, need_weight, need_gate)
    elif need_weight or need_gate:
        dw, from_weight = _launch_unfold(dy.t() @ x, weight, None, gate, need_weight, need_gate)
    if need_gate:
        partial = from_weight
    if partial is not None:
        dg = _launch_gate_gradient(partial, gate, l1).to(gate_dtype)
    db = None if bias_dtype is None else dy.sum(0, dtype=torch.float32).to(bias_dtype)
    return library.empty_for_none(x, _shaped(dx, shape), dw, dg, db)


def _fold_triton(weight: Tensor, gate: Tensor, dtype: torch.dtype, l1: float) -> Tensor:
    if weight.numel() == 0:
        return _fold_plain(weight, gate, dtype, l1)
    return _launch_fold(_rows(weight), _float32(gate), dtype)


def _unfold_triton(
    product: Tensor, weight: Tensor, folded: Tensor, gate: Tensor, l1: float,
    need_weight: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if weight.numel() == 0:
        return _unfold_plain(product, weight, folded, gate, l1, need_weight, need_gate)
    gate32 = _float32(gate)
    dw, partial = _launch_unfold(product.contiguous(), _rows(weight), folded, gate32, need_weight, need_gate)
    dg = None if partial is None else _launch_gate_gradient(partial, gate32, l1).to(gate.dtype)
    return library.empty_for_none(product, dw, dg)


def _shaped(dx: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if dx is None else dx.view(shape)


def variants(target: str) -> Iterator[Variant]:
    """Every compilation that `gated_linear` can ask for on `target`, a key of `launching.TARGETS`.

    A view that starts off a 16-byte boundary is compiled when it is met; all other cases are here.
    """
    half = [(x, w) for x in (torch.bfloat16, torch.float16) for w in (x, torch.float32)]
    cases = [(*pair, "highest") for pair in half]
    cases += [(torch.float32, torch.float32, precision) for precision in ("highest", "high")]
    before = torch.get_float32_matmul_precision()
    try:
        with launching.recording("gated_linear", target) as found:
            for x_dtype, weight_dtype, precision in cases:
                torch.set_float32_matmul_precision(precision)
                for width in (1536, 1411):  # aligned and not, both wide enough for the fused dW
                    _record(x_dtype, weight_dtype, width)
    finally:
        torch.set_float32_matmul_precision(before)
    yield from found.values()


def _record(x_dtype: torch.dtype, weight_dtype: torch.dtype, width: int) -> None:
    """Ask for all that x and W of these dtypes can lead to, at few and at many rows."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight, gate = empty(width, width, dtype=weight_dtype), empty(width, dtype=torch.float32)
    for M in (64, FUSED_ROWS[x_dtype.itemsize], 65536):  # one program a tile, several, the vendor's GEMM
        x = empty(M, width, dtype=x_dtype)
        for bias in (None, gate.to(weight_dtype)):
            _forward_triton(x, weight, gate, bias, 0.0)
        for needs in [(n & 1, n & 2, n & 4) for n in range(1, 8)]:
            _backward_triton(x, x, weight, gate, None, 0.0, *map(bool, needs))
    if x_dtype != weight_dtype:
        folded = _fold_triton(weight, gate, x_dtype, 0.0)
        for need_weight, need_gate in [(False, True), (True, False), (True, True)]:
            _unfold_triton(folded, weight, folded, gate, 0.0, need_weight, need_gate)
        if width % 8 == 0:
            for biases, dbs in ((None, None), ([gate] * 4, [folded[0]] * 4)):
                _launch_fold_gates([weight] * 4, [gate] * 4, biases, x_dtype)
                _launch_unfold_gates([folded] * 4, dbs, [weight] * 4, [gate] * 4)


# ---------------------------------------------------------------------------------- plain PyTorch, any device


# Numbers formed at once, 1 MB: all of them would raise the peak of memory above that without gates.
_CHUNK = 2**18


def _chunks(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of each [N, K] matrix, `_CHUNK` numbers at a time."""
    if matrices[0].numel() <= _CHUNK:
        return (matrices,)
    rows = max(1, _CHUNK // max(1, matrices[0].shape[1]))
    return zip(*(m.split(rows) for m in matrices), strict=True)


def _scaled(matrix: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """`matrix * gate` rounded once, into `out` (which may be `matrix`)."""
    if out.dtype != matrix.dtype and library.cpp_supports(out, matrix, gate):  # else PyTorch's is as fast
        torch.ops.vtp.cpu_fold_gate(matrix, gate, out)
        return out
    if matrix.dtype == out.dtype == gate.dtype:
        return torch.mul(matrix, gate, out=out)
    for source, target in _chunks(matrix, out):
        target.copy_(source * gate)
    return out


def _column_products(a: Tensor, b: Tensor) -> Tensor:
    """`sum_i a[i, k] b[i, k]`, [K], in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    total, *others = ((a_rows.to(dtype) * b_rows.to(dtype)).sum(0) for a_rows, b_rows in _chunks(a, b))
    for products in others:
        total.add_(products)
    return total


def _fold_plain(weight: Tensor, gate: Tensor, dtype: torch.dtype, l1: float = 0.0) -> Tensor:
    return _scaled(weight, gate, torch.empty(weight.shape, dtype=dtype, device=weight.device))


def _unfold_plain(
    product: Tensor, weight: Tensor, folded: Tensor, gate: Tensor, l1: float,
    need_weight: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dw, total = _unfolded(product, weight, gate, None, need_weight, need_gate)
    return library.empty_for_none(product, dw, None if total is None else _gate_gradient(total, gate, l1))


def _fold_gates_plain(
    weights: Tensors, gates: Tensors, biases: Tensors | None, dtype: torch.dtype
) -> Tensors:
    folded = [_fold_plain(weight, gate, dtype) for weight, gate in zip(weights, gates, strict=True)]
    return folded + [bias.to(dtype) for bias in biases or ()]


def _unfold_gates_plain(products: Tensors, dbs: Tensors | None, weights: Tensors, gates: Tensors) -> Tensors:
    pairs = [
        _unfold_plain(product, weight, weight, gate, 0.0, True, True)
        for product, weight, gate in zip(products, weights, gates, strict=True)
    ]
    return [dw for dw, _ in pairs] + [dg for _, dg in pairs] + [db.float() for db in dbs or ()]


def _unfolded(
    product: Tensor, weight: Tensor, gate: Tensor, out: Tensor | None, need_weight: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, the gate's gradient without l1), those that are needed; dW goes into `out` if there is one."""
    if need_gate and library.cpp_supports(product, weight, gate):  # both in one pass, 2 to 4 times as fast
        dw = (torch.empty_like(weight) if out is None else out) if need_weight else None
        return dw, torch.ops.vtp.cpu_unfold_gate(product, weight, gate, dw)
    total = _column_products(product, weight) if need_gate else None
    if not need_weight:
        return None, total
    return _scaled(product, gate, out) if out is not None else _weight_gradient(
        product, gate, weight.dtype
    ), total


def _weight_gradient(product: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    return _scaled(product, gate, torch.empty(product.shape, dtype=dtype, device=product.device))


def _gate_gradient(total: Tensor, gate: Tensor, l1: float) -> Tensor:
    return total.add_(gate.sign(), alpha=l1).to(gate.dtype)


def _forward_plain(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, l1: float) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if math.prod(x.shape[:-1]) < len(weight) and x.dtype == weight.dtype:
        return F.linear((x * gate).to(x.dtype), weight, bias).contiguous()
    return F.linear(x, _fold_plain(weight, gate, x.dtype), bias).contiguous()


def _backward_plain(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor, bias_dtype: torch.dtype | None, l1: float,
    need_x: bool, need_weight: bool, need_gate: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = x.shape
    dy, x = _rows(dy), _rows(x)
    dx = dw = total = None
    # dX first: its folded weight is gone before dW is made, so the peak of memory is a plain linear's.
    if _on_activation_side(len(dy), len(weight), need_x, need_weight, need_gate):
        dx = dy @ weight.to(dy.dtype)
        total, need_gate = _column_products(dx, x), False
        _scaled(dx, gate, out=dx)
    elif need_x:
        dx = dy @ _fold_plain(weight, gate, dy.dtype)
    if need_weight or need_gate:
        product = dy.t() @ x
        out = product if product.dtype == weight.dtype else None
        dw, unfolded = _unfolded(product, weight, gate, out, need_weight, need_gate)
        total = unfolded if need_gate else total
    dg = None if total is None else _gate_gradient(total, gate, l1)
    # `sum(dtype=)` would copy all of dY to that dtype; without it the sum is still made in float32.
    db = None if bias_dtype is None else dy.sum(0).to(bias_dtype)
    return library.empty_for_none(x, _shaped(dx, shape), dw, dg, db)


# ---------------------------------------------------------------------------------------------- registration


def _forward_fake(x, weight, gate, bias, l1):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_fake(dy, x, weight, gate, bias_dtype, l1, need_x, need_weight, need_gate):
    db = None if bias_dtype is None else x.new_empty(weight.shape[0], dtype=bias_dtype)
    dw = weight.new_empty(weight.shape) if need_weight else None
    dg = gate.new_empty(gate.shape) if need_gate else None
    return library.empty_for_none(x, x.new_empty(x.shape) if need_x else None, dw, dg, db)


def _fold_fake(weight, gate, dtype, l1):
    return weight.new_empty(weight.shape, dtype=dtype)


def _unfold_fake(product, weight, folded, gate, l1, need_weight, need_gate):
    dw = weight.new_empty(weight.shape) if need_weight else None
    return library.empty_for_none(product, dw, gate.new_empty(gate.shape) if need_gate else None)


def _setup_context(ctx, inputs, output):
    x, weight, gate, bias, ctx.l1 = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy, backward=None):
    needs = ctx.needs_input_grad[:4]
    bias_dtype = ctx.bias_dtype if needs[3] else None
    backward = backward or torch.ops.vtp.gated_linear_backward
    gradients = backward(dy, *ctx.saved_tensors, bias_dtype, ctx.l1, *needs[:3])
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None


def _fold_setup_context(ctx, inputs, output):
    weight, gate, _, ctx.l1 = inputs
    ctx.save_for_backward(weight, output, gate)


def _fold_backward(ctx, product, unfold=None):
    needs = ctx.needs_input_grad[:2]
    gradients = (unfold or torch.ops.vtp.unfold_gate)(product, *ctx.saved_tensors, ctx.l1, *needs)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None, None


define(
    "gated_linear(Tensor x, Tensor weight, Tensor gate, Tensor? bias, float l1) -> Tensor",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "gated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor gate, ScalarType? bias_dtype, float l1,"
    " bool need_x, bool need_weight, bool need_gate) -> (Tensor, Tensor, Tensor, Tensor)",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define(
    "fold_gate(Tensor weight, Tensor gate, ScalarType dtype, float l1) -> Tensor",
    plain=_fold_plain,
    triton=_fold_triton,
    fake=_fold_fake,
)
define(
    "unfold_gate(Tensor product, Tensor weight, Tensor folded, Tensor gate, float l1,"
    " bool need_weight, bool need_gate) -> (Tensor, Tensor)",
    plain=_unfold_plain,
    triton=_unfold_triton,
    fake=_unfold_fake,
)
define_gradient("gated_linear", by="gated_linear_backward", backward=_backward, setup_context=_setup_context)
define_gradient(
    "fold_gate",
    by="unfold_gate",
    backward=_fold_backward,
    setup_context=_fold_setup_context,
    public_name="gated_linear",
)


@register_flop_formula(torch.ops.vtp.gated_linear)
def _forward_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.vtp.gated_linear_backward)
def _backward_flops(
    dy_shape, x_shape, weight_shape, gate_shape, bias_dtype, l1, need_x, need_weight, need_gate,
    out_shape=None, **_,
) -> int:  # fmt: skip
    activation_side = _on_activation_side(
        math.prod(x_shape[:-1]), weight_shape[0], need_x, need_weight, need_gate
    )
    products = int(need_x) + int(need_weight or (need_gate and not activation_side))
    return products * 2 * math.prod(x_shape) * weight_shape[0]


class _GatedLinear(torch.autograd.Function):
    """`gated_linear` for eager calls, without the dispatcher; `setup_context` would cost as much again."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return library.direct("gated_linear", inputs[0])(*inputs)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph=True
            library.refuse_second_derivative("gated_linear")
        return _backward(ctx, dy, library.direct("gated_linear_backward", dy))


class _FoldGate(torch.autograd.Function):
    """`fold_gate` for eager calls, without the dispatcher, as `_GatedLinear`."""

    @staticmethod
    def forward(ctx, *inputs):
        folded = library.direct("fold_gate", inputs[0])(*inputs)
        _fold_setup_context(ctx, inputs, folded)
        return folded

    @staticmethod
    def backward(ctx, product):
        if torch.is_grad_enabled():
            library.refuse_second_derivative("gated_linear")
        return _fold_backward(ctx, product, library.direct("unfold_gate", product))


class _FoldGates(torch.autograd.Function):
    """`fold_gates` in a dtype, of four weights, four gates and perhaps four biases, in a row."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.save_for_backward(*tensors[:8])
        fold = _launch_fold_gates if tensors[0].is_cuda else _fold_gates_plain
        return tuple(fold(tensors[:4], tensors[4:8], tensors[8:] or None, dtype))

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            library.refuse_second_derivative("gated_linear")
        tensors = ctx.saved_tensors
        unfold = _launch_unfold_gates if tensors[0].is_cuda else _unfold_gates_plain
        return None, *unfold(gradients[:4], gradients[4:] or None, tensors[:4], tensors[4:])


# ------------------------------------------------------------------------------------------ public functions


def gated_linear(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None, *, l1: float = 0.0
) -> Tensor:
    """`y = (x * gate) @ weight.T + bias` at the cost of a plain linear, forward and backward.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides. Under autocast it is cast to the
            dtype of autocast, as `torch.nn.functional.linear` casts it.
        weight: [N, K], in the dtype of x, or float32 beside a 16-bit x.
        gate: [K], float32 or the dtype of the weight.
        bias: [N], in the dtype of x or of the weight, or None.
        l1: factor of the penalty `l1 * sum |gate|`, >= 0: its subgradient, `l1 * sign(gate)`, is added to
            the gate's gradient. Every call adds it: give it to one call for each gate and step. A loss scaler
            does not scale it; with one, add `vtp.l1_penalty` to the loss instead.

    Returns:
        [..., N] in the dtype of x (under autocast: autocast's). Gradients have the dtypes of their inputs.
        There is no second derivative, and of the transforms of `torch.func` only `functional_call` works.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes or devices do not go together, or l1 is negative or not finite.

    Zhu, Tang, Han, "Vision Transformer Pruning", arXiv 2104.08500.
    """
    (x,) = as_autocast_casts(x)
    _validate(x, weight, gate, bias, l1)
    l1 = float(l1)
    direct = library.takes_direct_calls(x)
    if x.dtype != weight.dtype and torch.is_grad_enabled() and x.requires_grad and weight.requires_grad:
        fold = _FoldGate.apply if direct else torch.ops.vtp.fold_gate
        folded = fold(weight, gate, x.dtype, l1)
        return F.linear(x, folded, None if bias is None else bias.to(x.dtype))
    return (_GatedLinear.apply if direct else torch.ops.vtp.gated_linear)(x, weight, gate, bias, l1)


def fold_gates(
    x: Tensor, weights: Tensors, gates: Tensors, biases: Sequence[Tensor | None]
) -> tuple[Tensors, Sequence[Tensor | None]] | None:
    """`W diag g` and the bias of the four gated linears of a block, cast for autocast in one launch.

    For eager mixed precision on a GPU, where a step waits for the host: `F.linear(x, folded, bias)` under
    autocast is then `gated_linear(x, weight, gate, bias)`. A block has two launches for its gates, forward
    and backward, instead of twelve, and none of the sixteen casts of a block without gates. The gradients of
    weights, gates and biases are there when all four linears have had theirs; those of a linear that takes no
    part in the loss are then 0, not None.

    Args:
        x: what the block is given, of any shape; its device counts, and the dtype of autocast there.
        weights: four of [N, K].
        gates: four of [K], in the same order.
        biases: four of [N], any of which may be None: then they are returned as they are.

    Returns:
        the four [N, K] and the four [N] in autocast's dtype; None where each linear does better with
        `gated_linear`: on a CPU, without autocast or gradients, while compiling, or with tensors that are
        frozen, not float32, not contiguous, or of a K that is no multiple of 8.
    """
    if not (torch.is_grad_enabled() and library.takes_direct_calls(x) and library.autocast_is_on(x.device)):
        return None
    dtype = torch.get_autocast_dtype(x.device.type)
    on_gpu = x.is_cuda and library.triton_unsupported_reason(x.device) is None
    if dtype.itemsize != 2 or len(weights) != 4 or not _FOLDS.takes("together", on_gpu):
        return None
    casts_biases = not any(bias is None for bias in biases)
    tensors: tuple[Any, ...] = (*weights, *gates, *(biases if casts_biases else ()))
    device = x.get_device()
    for t in tensors:
        if not (t.requires_grad and t.dtype == torch.float32 and t.get_device() == device):
            return None
        if not (t.is_contiguous() and t.data_ptr() % 16 == 0 and t.numel()):
            return None
    if any(gate.shape[0] % 8 for gate in gates):
        return None
    made = _FoldGates.apply(dtype, *tensors)
    return made[:4], made[4:] or biases


def _validate(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, l1: float) -> None:
    tensors = check_tensors({"x": x, "weight": weight, "gate": gate}, {"bias": bias})
    check_dtypes({"x": x, "weight": weight}, or_float32=["weight"])
    for name, allowed in (("gate", {weight.dtype, torch.float32}), ("bias", {x.dtype, weight.dtype})):
        if name in tensors and tensors[name].dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name}: got {tensors[name].dtype}, expected {expected} beside x of {x.dtype}")
    check_inputs(x, weight)
    check_shape("gate", gate, weight.shape[1:])
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
    if not 0.0 <= l1 < math.inf:
        raise ValueError(f"l1: got {l1}, expected a finite number >= 0")
