"""The feed-forward branch of a compact block: `residual + (act(x W1^T + b1) W2^T + b2)`, act GELU or SwiGLU.

x [..., K], W1 [hidden, K], b1 [hidden], W2 [N, hidden], b2 [N], residual [..., N]; M is the number of rows of
x. K, hidden and N are any integers, as pruning leaves them. GELU is the exact one, by erf. For SwiGLU W1 is
[2 hidden, K] and b1 [2 hidden]: the rows of the gate, then those of the value.

With z = x W1^T + b1, h = gelu(z) = z Phi(z), Phi and phi the distribution function and the density of the
standard normal distribution, and dy the gradient of the branch:

    dh = dy W2    dz = dh (Phi(z) + z phi(z))    dx = dz W1    dW1 = dz^T x    db1 = sum_m dz
    dW2 = dy^T h    db2 = sum_m dy

Where a row of outputs fits on chip (N of at most 256) and there are rows enough, one kernel makes it all:
a program keeps [BLOCK_M, N] sums in registers and passes over `hidden` in tiles, each of which it makes, puts
through GELU and multiplies by its columns of W2. The [M, hidden] activation is then never in memory. Else two
launches of `compact_linear`.

With SwiGLU z = x W1^T + b1 has two halves, z_g and z_v, and with s the logistic function

    h = z_g s(z_g) z_v    dz_g = dh z_v s(z_g) (1 + z_g (1 - s(z_g)))    dz_v = dh z_g s(z_g)

That is two launches of `compact_linear`, the first with SwiGLU as its epilogue, so that z is never in memory.
Where z is kept, or the first product is the vendor's, from 1,024 rows on, there is a pass over z between
them, which reads 2 M hidden numbers and writes half as many. Nor is there one kernel for it all: of the
models that have SwiGLU only the smallest, EVA-02-Ti, is as narrow as 256. Where hidden is no multiple of 8,
values do not start at 16 bytes and are loaded by a pass, and their gradient is stored, one by one.

Saved for backward: x, z, W1 and W2; h is made again from z, by the kernel that makes dz, in one pass over
both. The products are the vendor's, of operands padded with zeros to multiples of 8.

Numbers: products and sums are float32; h is rounded once, to the dtype of x. Where z is kept for backward, h
is made of the rounded z, in both passes the same.

Deterministic: sums over rows are made in two stages of fixed order; there are no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _arguments, launching, library
from vtp_kernels._tiles import Matrix, load_gate_and_value, load_matrix_tile
from vtp_kernels.compact_linear import activated, compact_linear, launch_swiglu
from vtp_kernels.launching import Config, TensorDescriptor, Variant, cdiv, choice, launch, tl, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.rows import (
    empty_rows,
    empty_rows_like,
    in_padded_rows,
    padded_width,
    whole_rows,
    with_padded_rows,
    zero_padded,
)

# ------------------------------------------------------------------------------------------------ reference


def compact_mlp_ref(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """The definition of `compact_mlp` in plain PyTorch, for autograd to differentiate."""
    h = activated(F.linear(x, fc1_weight, fc1_bias), activation)
    out = F.linear(h, fc2_weight, fc2_bias)
    return out if residual is None else residual + out


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _fc1_step(
    b_z, x, fc1_weight, i_m, r_m, i_h, r_h, k,
    BLOCK_K: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_k = k + tl.arange(0, BLOCK_K)
    b_x = load_matrix_tile(x, i_m, r_m, k, o_k, False, TAIL, DESCRIPTORS, PADDED=True)
    b_w = load_matrix_tile(fc1_weight, i_h, r_h, k, o_k, False, TAIL, DESCRIPTORS, PADDED=True)
    return tl.dot(b_x, tl.trans(b_w), b_z, input_precision=PRECISION)


@triton.jit
def _normal_cdf(b_z):
    return 0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476)


@triton.jit
def _fc2_step(
    acc, b_h, fc2_weight, i_n, o_n, i_h,
    BLOCK_H: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_h = i_h + tl.arange(0, BLOCK_H)
    r_n = tl.minimum(o_n, fc2_weight.rows - 1)
    b_w = load_matrix_tile(fc2_weight, i_n, r_n, i_h, o_h, False, TAIL, DESCRIPTORS, PADDED=True)
    return tl.dot(b_h, tl.trans(b_w), acc, input_precision=PRECISION)


@triton.jit
def _hidden_step(
    acc, acc_more, x, fc1_weight, fc1_bias, fc2_weight, fc2_more, z, i_m, o_m, i_h,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MORE: tl.constexpr,
    KEEP_Z: tl.constexpr, TAIL: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += gelu(x W1^T + b1) W2^T over one tile of hidden columns; x, z and both weights are `Matrix`."""
    M, K, hidden = x.rows, x.columns, fc1_weight.rows
    o_h = i_h + tl.arange(0, BLOCK_H)
    # Rows beyond the end read the last row again: those of h and z are dropped, of W1 set to 0 below.
    r_m, r_h = tl.minimum(o_m, M - 1), tl.minimum(o_h, hidden - 1)
    b_z = tl.zeros((o_m.shape[0], BLOCK_H), dtype=tl.float32)
    full = tl.cdiv(K, BLOCK_K) * BLOCK_K if DESCRIPTORS else K // BLOCK_K * BLOCK_K
    for k in range(0, full, BLOCK_K):
        b_z = _fc1_step(b_z, x, fc1_weight, i_m, r_m, i_h, r_h, k, BLOCK_K, False, DESCRIPTORS, PRECISION)
    if full < K:
        b_z = _fc1_step(b_z, x, fc1_weight, i_m, r_m, i_h, r_h, full, BLOCK_K, True, DESCRIPTORS, PRECISION)
    b_z += tl.load(fc1_bias + o_h, mask=o_h < hidden, other=0.0).to(tl.float32)[None, :]
    if TAIL:
        b_z = tl.where(o_h[None, :] < hidden, b_z, 0.0)
    if KEEP_Z:
        b_kept = b_z.to(z.source.dtype.element_ty)
        p_z = z.source + o_m[:, None].to(tl.int64) * z.stride + o_h[None, :]
        tl.store(p_z, b_kept, mask=(o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8))
        b_z = b_kept.to(tl.float32)
    b_h = (b_z * _normal_cdf(b_z)).to(fc1_bias.dtype.element_ty)
    o_n = tl.arange(0, BLOCK_N)
    acc = _fc2_step(acc, b_h, fc2_weight, 0, o_n, i_h, BLOCK_H, TAIL, DESCRIPTORS, PRECISION)
    if BLOCK_MORE:
        o_n = BLOCK_N + tl.arange(0, BLOCK_MORE)
        acc_more = _fc2_step(
            acc_more, b_h, fc2_more, BLOCK_N, o_n, i_h, BLOCK_H, TAIL, DESCRIPTORS, PRECISION
        )
    return acc, acc_more


@triton.jit
def _finish(
    acc, fc2_bias, residual, out, o_m, o_n, M, N, stride_residual, stride_out, HAS_RESIDUAL: tl.constexpr
):
    """out[o_m, o_n] = acc + b2 + residual, and 0 in the padding of the rows."""
    acc += tl.load(fc2_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    m_out = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)
    if HAS_RESIDUAL:
        p_residual = residual + o_m[:, None].to(tl.int64) * stride_residual + o_n[None, :]
        acc += tl.load(p_residual, mask=m_out, other=0.0).to(tl.float32)
    b_out = tl.where(o_n[None, :] < N, acc, 0.0).to(out.dtype.element_ty)
    tl.store(out + o_m[:, None].to(tl.int64) * stride_out + o_n[None, :], b_out, mask=m_out)


@triton.jit(
    do_not_specialize=[
        "M", "K", "hidden", "N", "stride_x", "stride_w1", "stride_w2", "stride_residual", "stride_z",
        "stride_out",
    ]
)  # fmt: skip
def _compact_mlp_fwd_kernel(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_more, fc2_bias, residual, z, out, M, K, hidden, N,
    stride_x, stride_w1, stride_w2, stride_residual, stride_z, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_MORE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP_Z: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows of out, N <= BLOCK_N + BLOCK_MORE.

    BLOCK_MORE is 0, or the columns of a second accumulator: the width of a tile is a power of two, and 192
    columns must not cost those of 256. fc2_more: fc2_weight once more, or its descriptor for these columns.
    """
    stride_x, stride_w1, stride_w2 = stride_x // 8 * 8, stride_w1 // 8 * 8, stride_w2 // 8 * 8
    stride_residual, stride_z, stride_out = stride_residual // 8 * 8, stride_z // 8 * 8, stride_out // 8 * 8
    x, fc1_weight = Matrix(x, M, K, stride_x), Matrix(fc1_weight, hidden, K, stride_w1)
    fc2_weight, fc2_more = Matrix(fc2_weight, N, hidden, stride_w2), Matrix(fc2_more, N, hidden, stride_w2)
    z = Matrix(z, M, hidden, stride_z)
    i_m = tl.program_id(0) * BLOCK_M
    o_m = i_m + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_more = tl.zeros((BLOCK_M, BLOCK_MORE if BLOCK_MORE else 1), dtype=tl.float32)
    full = tl.cdiv(hidden, BLOCK_H) * BLOCK_H if DESCRIPTORS else hidden // BLOCK_H * BLOCK_H
    for i_h in range(0, full, BLOCK_H):
        acc, acc_more = _hidden_step(
            acc, acc_more, x, fc1_weight, fc1_bias, fc2_weight, fc2_more, z, i_m, o_m, i_h,
            BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, BLOCK_N=BLOCK_N, BLOCK_MORE=BLOCK_MORE,
            KEEP_Z=KEEP_Z, TAIL=False, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    if full < hidden:
        acc, acc_more = _hidden_step(
            acc, acc_more, x, fc1_weight, fc1_bias, fc2_weight, fc2_more, z, i_m, o_m, full,
            BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, BLOCK_N=BLOCK_N, BLOCK_MORE=BLOCK_MORE,
            KEEP_Z=KEEP_Z, TAIL=True, DESCRIPTORS=DESCRIPTORS, PRECISION=PRECISION,
        )  # fmt: skip
    _finish(acc, fc2_bias, residual, out, o_m, tl.arange(0, BLOCK_N), M, N,
            stride_residual, stride_out, HAS_RESIDUAL)  # fmt: skip
    if BLOCK_MORE:
        _finish(acc_more, fc2_bias, residual, out, o_m, BLOCK_N + tl.arange(0, BLOCK_MORE), M, N,
                stride_residual, stride_out, HAS_RESIDUAL)  # fmt: skip


@triton.jit(do_not_specialize=["M", "hidden", "rows_per_program", "stride_dh", "stride_z", "stride_out"])
def _gelu_bwd_kernel(
    dh, z, dz, h, partial, M, hidden, rows_per_program, stride_dh, stride_z, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dz = dh gelu'(z) and h = gelu(z), 0 in the padding of their rows; partial [programs, hidden]: this
    program's sum of dz over its `rows_per_program` rows, a multiple of BLOCK_M."""
    stride_dh, stride_z, stride_out = stride_dh // 8 * 8, stride_z // 8 * 8, stride_out // 8 * 8
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b_sum = tl.zeros((BLOCK_H,), dtype=tl.float32)
    first = tl.program_id(0) * rows_per_program
    for row in range(first, tl.minimum(M, first + rows_per_program), BLOCK_M):
        o_m = row + tl.arange(0, BLOCK_M)
        # Whole 16 bytes are loaded at the end of a row; what lies behind its width may be anything.
        m_tile = (o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)
        o_row = o_m[:, None].to(tl.int64)
        b_z = tl.load(z + o_row * stride_z + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_dh = tl.load(dh + o_row * stride_dh + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_z, b_dh = tl.where(o_h[None, :] < hidden, b_z, 0.0), tl.where(o_h[None, :] < hidden, b_dh, 0.0)
        b_cdf = _normal_cdf(b_z)
        b_dz = b_dh * (b_cdf + b_z * (0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)))
        b_sum += tl.sum(b_dz, axis=0)
        o_out = o_row * stride_out + o_h[None, :]
        tl.store(dz + o_out, b_dz.to(dz.dtype.element_ty), mask=m_tile)
        tl.store(h + o_out, (b_z * b_cdf).to(h.dtype.element_ty), mask=m_tile)
    tl.store(partial + tl.program_id(0).to(tl.int64) * hidden + o_h, b_sum, mask=o_h < hidden)


@triton.jit(
    do_not_specialize=["M", "hidden", "rows_per_program", "stride_dh", "stride_z", "stride_dz", "stride_h"]
)
def _swiglu_bwd_kernel(
    dh, z, dz, h, partial, M, hidden, rows_per_program, stride_dh, stride_z, stride_dz, stride_h,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, HALVES_ALIGNED: tl.constexpr,
):  # fmt: skip
    """dz [M, 2 hidden] and h = silu(gate) * value, 0 in the padding of their rows.

    partial [programs, 2 hidden]: this program's sum of dz over its `rows_per_program` rows, a multiple of
    BLOCK_M.
    """
    stride_dh, stride_z = stride_dh // 8 * 8, stride_z // 8 * 8
    stride_dz, stride_h = stride_dz // 8 * 8, stride_h // 8 * 8
    if HALVES_ALIGNED:
        hidden = hidden // 8 * 8
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_own = o_h[None, :] < hidden
    m_padded = o_h[None, :] < (hidden + 7) // 8 * 8
    m_end = o_h[None, :] < (2 * hidden + 7) // 8 * 8 - hidden  # of values, and the padding of dz
    b_sum_gate = tl.zeros((BLOCK_H,), dtype=tl.float32)
    b_sum_value = tl.zeros((BLOCK_H,), dtype=tl.float32)
    begin = tl.program_id(0) * rows_per_program
    for row in range(begin, tl.minimum(M, begin + rows_per_program), BLOCK_M):
        o_row = (row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
        m_row = o_row < M
        b_gate, b_value = load_gate_and_value(z, o_row, o_h, M, hidden, stride_z)
        p_dh = dh + o_row * stride_dh + o_h[None, :]
        b_dh = tl.load(p_dh, mask=m_row & m_padded, other=0.0).to(tl.float32)
        b_dh = tl.where(m_own, b_dh, 0.0)
        b_s = 1.0 / (1.0 + tl.exp(-b_gate))
        b_silu = b_gate * b_s
        b_dgate = b_dh * b_value * (b_s * (1.0 + b_gate * (1.0 - b_s)))
        b_dvalue = b_dh * b_silu
        b_sum_gate += tl.sum(b_dgate, axis=0)
        b_sum_value += tl.sum(b_dvalue, axis=0)
        p_dz = dz + o_row * stride_dz + o_h[None, :]
        tl.store(p_dz, b_dgate.to(dz.dtype.element_ty), mask=m_row & m_own)
        tl.store(p_dz + hidden, b_dvalue.to(dz.dtype.element_ty), mask=m_row & m_end)
        p_h = h + o_row * stride_h + o_h[None, :]
        tl.store(p_h, (b_silu * b_value).to(h.dtype.element_ty), mask=m_row & m_padded)
    p_partial = partial + tl.program_id(0).to(tl.int64) * 2 * hidden + o_h
    tl.store(p_partial, b_sum_gate, mask=o_h < hidden)
    tl.store(p_partial + hidden, b_sum_value, mask=o_h < hidden)


# --------------------------------------------------------------------------------------------------- tables


# By the bytes of a number and the largest output width of a bucket. Float32 runs on tensor cores (TF32) here:
# without them (IEEE) the products take five times as long as reading and writing the hidden activation,
# nothing is won by keeping it on chip, and it is two launches. Two accumulators of it spill on sm_80 and
# sm_100, so there 192 columns do cost those of 256.
FWD_TILES = {
    2: {
        128: Config.of(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_MORE=0, BLOCK_H=64, BLOCK_K=64),
        192: Config.of(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_MORE=64, BLOCK_H=32, BLOCK_K=64),
        256: Config.of(8, 2, BLOCK_M=64, BLOCK_N=256, BLOCK_MORE=0, BLOCK_H=64, BLOCK_K=64),
    },
    4: {
        128: Config.of(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_MORE=0, BLOCK_H=32, BLOCK_K=32),
        256: Config.of(8, 2, BLOCK_M=64, BLOCK_N=256, BLOCK_MORE=0, BLOCK_H=32, BLOCK_K=32),
    },
}
WIDEST_FUSED = 256  # outputs of the kernel that makes the whole branch
# Rows of x from which the fused kernel is taken. Predicted, not measured: it writes and reads 2 M hidden
# numbers less, for DeiT-tiny (K = N = 192) 4 bytes for 768 FLOP, 1.2 ns and 0.8 ns per 1,000 hidden numbers
# on an H100 (3.35 TB/s, 989 TFLOP/s), so half of the time and more. But it has only one program for 64 rows,
# where two launches share the columns of a result among programs too: with fewer than half of the 132
# multiprocessors at work that half is lost again.
_FUSED_ROWS = 64 * 66
_LAUNCHES = choice("compact_mlp", "fused", "two_launches")  # what `launching.forced_path` can force

_GELU_BWD = Config.of(4, 1, BLOCK_M=16, BLOCK_H=128)
_BWD_ROWS = 128  # per program: one partial sum of a column for each
# By whether both halves of z are aligned. With 4 warps some registers spill on sm_80. Where values are loaded
# one by one, so many addresses take registers that only one block of 16 rows fits on sm_100.
_SWIGLU_BWD = {
    True: Config.of(8, 1, BLOCK_M=16, BLOCK_H=128),
    False: Config.of(8, 1, BLOCK_M=8, BLOCK_H=128),
}


def _is_fused(dtype: torch.dtype, M: int, N: int, swiglu: bool = False) -> bool:
    """Whether one kernel makes the whole branch."""
    can_be = N <= WIDEST_FUSED and launching.operands(dtype) != "ieee" and not swiglu
    return can_be and _LAUNCHES.takes("fused", M >= _FUSED_ROWS)


# ------------------------------------------------------------------------------------------------- launchers


def _launch_fwd(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor,
    residual: Tensor | None, keep_z: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out [M, N] and z [M, hidden] or None; all matrices with padded rows."""
    (M, K), (N, hidden) = x.shape, fc2_weight.shape
    table = FWD_TILES[x.element_size()]
    config = table[next(width for width in table if width >= N)]
    block_m, block_n, block_more, block_h, block_k = config.blocks.values()
    dtype = x.dtype if residual is None else residual.dtype
    out = empty_rows(M, N, dtype=dtype, device=x.device)
    z = empty_rows(M, hidden, dtype=x.dtype, device=x.device) if keep_z else None
    descriptors = launching.has_descriptors(x.device)

    def tiles_of(source: Tensor, rows: int, columns: int):
        """What a kernel loads tiles from: a descriptor, or the pointer."""
        return TensorDescriptor.from_tensor(source, [rows, columns]) if descriptors else source

    launch(
        _compact_mlp_fwd_kernel,
        (cdiv(M, block_m),),
        dict(
            x=tiles_of(x, block_m, block_k), fc1_weight=tiles_of(fc1_weight, block_h, block_k),
            fc1_bias=fc1_bias, fc2_weight=tiles_of(fc2_weight, block_n, block_h),
            fc2_more=tiles_of(fc2_weight, block_more, block_h) if block_more else None,
            fc2_bias=fc2_bias, residual=residual, z=z, out=out, M=M, K=K, hidden=hidden, N=N,
            stride_x=x.stride(0), stride_w1=fc1_weight.stride(0), stride_w2=fc2_weight.stride(0),
            stride_residual=0 if residual is None else residual.stride(0),
            stride_z=0 if z is None else z.stride(0), stride_out=out.stride(0),
        ),
        config,
        HAS_RESIDUAL=residual is not None,
        KEEP_Z=keep_z,
        DESCRIPTORS=descriptors,
        PRECISION=launching.dot_precision(x.dtype),
    )  # fmt: skip
    return out, z


def _launch_gelu_bwd(dh: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz and h [M, hidden], partial [programs, hidden]; dh and z with padded rows."""
    M, hidden = z.shape
    block_h = _GELU_BWD.blocks["BLOCK_H"]
    programs = cdiv(M, _BWD_ROWS)
    dz, h = (empty_rows(M, hidden, dtype=z.dtype, device=z.device) for _ in range(2))
    partial = torch.empty((programs, hidden), dtype=torch.float32, device=z.device)
    launch(
        _gelu_bwd_kernel,
        (programs, cdiv(hidden, block_h)),
        dict(
            dh=dh, z=z, dz=dz, h=h, partial=partial, M=M, hidden=hidden, rows_per_program=_BWD_ROWS,
            stride_dh=dh.stride(0), stride_z=z.stride(0), stride_out=dz.stride(0),
        ),
        _GELU_BWD,
    )  # fmt: skip
    return dz, h, partial


def _launch_swiglu_bwd(dh: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dz [M, 2 hidden], h [M, hidden], partial [programs, 2 hidden]; dh and z with padded rows."""
    M, hidden = dh.shape
    # Of programs: the padding of h, and that of dz behind its values, reach further than hidden.
    columns = max(padded_width(hidden), padded_width(2 * hidden) - hidden)
    programs, aligned = cdiv(M, _BWD_ROWS), hidden % 8 == 0
    dz, h = (empty_rows(M, width, dtype=z.dtype, device=z.device) for width in (2 * hidden, hidden))
    partial = torch.empty((programs, 2 * hidden), dtype=torch.float32, device=z.device)
    launch(
        _swiglu_bwd_kernel,
        (programs, cdiv(columns, _SWIGLU_BWD[aligned].blocks["BLOCK_H"])),
        dict(
            dh=dh, z=z, dz=dz, h=h, partial=partial, M=M, hidden=hidden, rows_per_program=_BWD_ROWS,
            stride_dh=dh.stride(0), stride_z=z.stride(0), stride_dz=dz.stride(0), stride_h=h.stride(0),
        ),
        _SWIGLU_BWD[aligned],
        HALVES_ALIGNED=aligned,
    )  # fmt: skip
    return dz, h, partial


def _forward_triton(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    residual: Tensor | None, keep_z: bool, swiglu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (hidden, K), N, lead = fc1_weight.shape, len(fc2_weight), x.shape[:-1]
    M = math.prod(lead)
    if 0 in (M, K, hidden, N) or x.dtype == torch.float64:
        return _forward_plain(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, keep_z, swiglu)
    if not _is_fused(x.dtype, M, N, swiglu):
        return _two_launches(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, keep_z, swiglu)
    # A bias that is not there is not worth a compilation.
    fc1_bias = x.new_zeros(hidden) if fc1_bias is None else fc1_bias.contiguous()
    fc2_bias = x.new_zeros(N) if fc2_bias is None else fc2_bias.contiguous()
    residual = None if residual is None else with_padded_rows(residual)
    rows, fc1_weight, fc2_weight = map(with_padded_rows, (x, fc1_weight, fc2_weight))
    out, z = _launch_fwd(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, keep_z)
    return out.view(*lead, N), x.new_empty(0) if z is None else z.view(*lead, hidden)


def _two_launches(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    residual: Tensor | None, keep_z: bool, swiglu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """And where z is kept a pass between them."""
    activation = "swiglu" if swiglu else "gelu"
    with torch.no_grad():  # so that compact_linear keeps nothing
        made = compact_linear(x, fc1_weight, fc1_bias, activation=None if keep_z else activation)
        # With its padding, which is 0, so that its width is one that every GEMM takes.
        if not keep_z:
            h = whole_rows(made)
        elif swiglu:
            h = whole_rows(launch_swiglu(with_padded_rows(made)))
            h = h.view(*x.shape[:-1], h.shape[1])
        else:
            h = F.gelu(whole_rows(made))
        out = compact_linear(h, zero_padded(fc2_weight), fc2_bias, residual=residual)
        return out, made if keep_z else x.new_empty(0)


def _backward_triton(
    dy: Tensor, x: Tensor, z: Tensor, fc1_weight: Tensor, fc2_weight: Tensor,
    need_x: bool, need_fc1: bool, need_fc1_bias: bool, need_fc2: bool, need_fc2_bias: bool,
    swiglu: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    (units, K), (N, hidden), M = fc1_weight.shape, fc2_weight.shape, math.prod(x.shape[:-1])
    needs = need_x, need_fc1, need_fc1_bias, need_fc2, need_fc2_bias
    if 0 in (M, K, hidden, N) or x.dtype == torch.float64:
        return _backward_plain(dy, x, z, fc1_weight, fc2_weight, *needs, swiglu)
    dx = dw1 = db1 = dw2 = None
    dy = dy.reshape(M, N)
    db2 = dy.sum(0, dtype=torch.float32).to(x.dtype) if need_fc2_bias else None
    if any(needs[:4]):
        dy = zero_padded(dy.to(x.dtype))
        dh = (dy @ zero_padded(fc2_weight, rows=True))[:, :hidden]
        launch_bwd = _launch_swiglu_bwd if swiglu else _launch_gelu_bwd
        dz, h, partial = launch_bwd(dh, with_padded_rows(z))
        dz, h = whole_rows(dz), whole_rows(h)
        if need_fc2:
            dw2 = (dy.t() @ h)[:N, :hidden]
        if need_fc1_bias:
            db1 = partial.sum(0).to(x.dtype)
        if need_x:
            dx = (dz @ zero_padded(fc1_weight, rows=True))[:, :K].view(x.shape)
        if need_fc1:  # what lies behind the width of x makes columns that are cut off
            dw1 = (dz.t() @ whole_rows(with_padded_rows(x)))[:units, :K]
    return library.empty_for_none(x, dx, dw1, db1, dw2, db2)


def variants(target: str) -> Iterator[Variant]:
    """Every compilation that `compact_mlp` can ask for on `target`, a key of `launching.TARGETS`.

    What it launches of `compact_linear` is among the variants of that.
    """
    with launching.recording("compact_mlp", target) as found, launching.matmul_precision("high"):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            _record(dtype)
    yield from found.values()


def _record(dtype: torch.dtype) -> None:
    """Ask for all that an x of this dtype can lead to in the fused kernel, and in the backward pass."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    M, K, hidden = _FUSED_ROWS, 64, 128
    for N in FWD_TILES[dtype.itemsize]:
        weights = empty(hidden, K), empty(hidden), empty(N, hidden), empty(N)
        for residual in (None, empty(M, N), empty(M, N, dtype=torch.float32)):
            for keep_z in (False, True):
                _forward_triton(empty(M, K), *weights, residual, keep_z)
        _backward_triton(empty(M, N), empty(M, K), empty(M, hidden), weights[0], weights[2], *(True,) * 5)
    for hidden in (128, 125):  # where values start at 16 bytes, and where they do not
        x, z, fc1_weight, fc2_weight = map(empty, (M, M, 2 * hidden, K), (K, 2 * hidden, K, hidden))
        _backward_triton(x, x, z, fc1_weight, fc2_weight, *(True,) * 5, True)


# ---------------------------------------------------------------------------------- plain PyTorch, any device


def _forward_plain(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    residual: Tensor | None, keep_z: bool, swiglu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = F.linear(x, fc1_weight, fc1_bias)
    out = F.linear(activated(z, "swiglu" if swiglu else "gelu"), fc2_weight, fc2_bias)
    if residual is not None:
        out = residual + out
    return in_padded_rows(out), in_padded_rows(z) if keep_z else x.new_empty(0)


def _backward_plain(
    dy: Tensor, x: Tensor, z: Tensor, fc1_weight: Tensor, fc2_weight: Tensor,
    need_x: bool, need_fc1: bool, need_fc1_bias: bool, need_fc2: bool, need_fc2_bias: bool,
    swiglu: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    (units, K), N, M = fc1_weight.shape, len(fc2_weight), math.prod(x.shape[:-1])
    dx = dw1 = db1 = dw2 = None
    dy = dy.reshape(M, N)
    db2 = dy.sum(0).to(x.dtype) if need_fc2_bias else None
    dy, z = dy.to(x.dtype), z.reshape(M, units)
    if need_fc2:
        dw2 = in_padded_rows(dy.t() @ activated(z, "swiglu" if swiglu else "gelu"))
    if need_x or need_fc1 or need_fc1_bias:
        dz = _activation_backward(dy @ fc2_weight, z, swiglu)
        db1 = dz.sum(0) if need_fc1_bias else None
        dx = in_padded_rows((dz @ fc1_weight).view(x.shape)) if need_x else None
        dw1 = in_padded_rows(dz.t() @ x.reshape(M, K)) if need_fc1 else None
    return library.empty_for_none(x, dx, dw1, db1, dw2, db2)


def _activation_backward(dh: Tensor, z: Tensor, swiglu: bool) -> Tensor:
    if not swiglu:
        return torch.ops.aten.gelu_backward(dh, z)
    gate, value = z.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(dh * value, gate), dh * F.silu(gate)], dim=-1)


# ---------------------------------------------------------------------------------------------- registration


def _forward_fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, keep_z, swiglu=False):
    lead, dtype = x.shape[:-1], None if residual is None else residual.dtype
    out = empty_rows_like(x, *lead, fc2_weight.shape[0], dtype=dtype)
    return out, empty_rows_like(x, *lead, fc1_weight.shape[0]) if keep_z else x.new_empty(0)


def _backward_fake(
    dy, x, z, fc1_weight, fc2_weight, need_x, need_fc1, need_fc1_bias, need_fc2, need_fc2_bias, swiglu=False
):
    return library.empty_for_none(
        x,
        empty_rows_like(x, *x.shape) if need_x else None,
        empty_rows_like(x, *fc1_weight.shape) if need_fc1 else None,
        x.new_empty(fc1_weight.shape[0]) if need_fc1_bias else None,
        empty_rows_like(x, *fc2_weight.shape) if need_fc2 else None,
        x.new_empty(fc2_weight.shape[0]) if need_fc2_bias else None,
    )


def _setup_context(ctx, inputs, output):
    x, fc1_weight, _, fc2_weight, _, _, ctx.keep_z, ctx.swiglu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], fc1_weight, fc2_weight)


def _backward(ctx, dy, _):
    *needs, need_residual = ctx.needs_input_grad[:6]
    others = (None,) * len(ctx.needs_input_grad[6:])  # an argument that has its default is not among them
    gradients = (None,) * 5
    if dy is not None and any(needs):
        if not ctx.keep_z:
            raise ValueError("keep_z: got False, expected True where the branch is to be differentiated")
        gradients = torch.ops.vtp.compact_mlp_backward(dy, *ctx.saved_tensors, *needs, ctx.swiglu)
        gradients = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return *gradients, dy if need_residual else None, *others


define(
    "compact_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias,"
    " Tensor? residual, bool keep_z, bool swiglu=False) -> (Tensor, Tensor)",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "compact_mlp_backward(Tensor dy, Tensor x, Tensor z, Tensor fc1_weight, Tensor fc2_weight, bool need_x,"
    " bool need_fc1, bool need_fc1_bias, bool need_fc2, bool need_fc2_bias, bool swiglu=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define_gradient("compact_mlp", by="compact_mlp_backward", backward=_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vtp.compact_mlp)
def _forward_flops(x_shape, fc1_shape, fc1_bias_shape, fc2_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape[:-1]) * (math.prod(fc1_shape) + math.prod(fc2_shape))


@register_flop_formula(torch.ops.vtp.compact_mlp_backward)
def _backward_flops(
    dy_shape, x_shape, z_shape, fc1_shape, fc2_shape, need_x, need_fc1, need_fc1_bias, need_fc2, *_,
    out_shape=None, **__,
) -> int:  # fmt: skip
    fc1_products = int(need_x) + int(need_fc1)
    fc2_products = int(need_fc2) + int(need_x or need_fc1 or need_fc1_bias)
    return (
        2
        * math.prod(x_shape[:-1])
        * (fc1_products * math.prod(fc1_shape) + fc2_products * math.prod(fc2_shape))
    )


# ------------------------------------------------------------------------------------------- public function


def compact_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """Feed-forward branch: `residual + (act(x @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias)`.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; any strides, rows that are padded to a multiple of
            8 elements are read without a copy. Under autocast x, weights and biases are cast to its dtype, as
            `torch.nn.functional.linear` casts them.
        fc1_weight: [hidden, K], in the dtype of x; with "swiglu" [2 * hidden, K], the rows of the gate and
            then those of the value.
        fc1_bias: [hidden], or with "swiglu" [2 * hidden], in the dtype of x, or None.
        fc2_weight: [N, hidden], in the dtype of x.
        fc2_bias: [N], in the dtype of x, or None.
        residual: [..., N], in the dtype of x, or float32 beside a 16-bit x, or None. Autocast leaves it.
        activation: "gelu", the exact one, by erf; or "swiglu", `silu(gate) * value`.

    Returns:
        [..., N] in the dtype of the residual if there is one, else of x; the rows lie in memory a multiple of
        8 elements apart. Gradients have the dtypes of their inputs. There is no second derivative.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes or devices do not go together, or the activation is not known.
    """
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = _arguments.as_autocast_casts(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    _validate(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, activation)
    operands = [t for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias) if t is not None]
    keep_z = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    weights = fc1_weight, fc1_bias, fc2_weight, fc2_bias
    out, _ = torch.ops.vtp.compact_mlp(x, *weights, residual, keep_z, activation == "swiglu")
    return out


def _validate(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> None:  # fmt: skip
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation: got {activation!r}, expected 'gelu' or 'swiglu'")
    required = {"x": x, "fc1_weight": fc1_weight, "fc2_weight": fc2_weight}
    optional = {"fc1_bias": fc1_bias, "fc2_bias": fc2_bias, "residual": residual}
    tensors = _arguments.check_tensors(required, optional)
    _arguments.check_dtypes(tensors, or_float32=("residual",))
    swiglu = activation == "swiglu"
    _arguments.check_inputs(x, fc1_weight, "fc1_weight", "[2 * hidden, K]" if swiglu else "[hidden, K]")
    units, K = fc1_weight.shape
    if swiglu and units % 2:
        raise ValueError(
            f"fc1_weight: got shape {tuple(fc1_weight.shape)}, expected [2 * hidden, K]: a gate and a value"
            " for each hidden unit"
        )
    hidden = units // 2 if swiglu else units
    if fc2_weight.ndim != 2:
        raise ValueError(f"fc2_weight: got shape {tuple(fc2_weight.shape)}, expected [N, hidden]")
    if fc2_weight.shape[1] != hidden:
        expected = f"[N, {hidden}], as fc1_weight is [{units}, {K}]"
        raise ValueError(f"fc2_weight: got shape {tuple(fc2_weight.shape)}, expected {expected}")
    N = fc2_weight.shape[0]
    for name, shape in {"fc1_bias": (units,), "fc2_bias": (N,), "residual": (*x.shape[:-1], N)}.items():
        if name in tensors:
            _arguments.check_shape(name, tensors[name], shape)
