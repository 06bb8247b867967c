"""LayerNorm over all columns that puts out the kept ones: `(x[index] - mean) * rstd * weight + bias`.

x [..., D], index [kept], weight and bias [kept]: `out[..., j] = (x[..., index[j]] - mean) * rstd * weight[j]
+ bias[j]`, with the statistics of all D columns (Zhu, Tang, Han, arXiv 2104.08500, gate the output of
LayerNorm; the residual stream that it reads keeps its width). With xhat = (x - mean) * rstd, and g [..., D]
that is `dy * weight` at the kept columns and 0 at the removed ones,

    dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd    dweight = sum_m dy * xhat[index]    dbias = sum_m dy

so removed columns have a gradient too: that of the statistics. For a matrix product behind it, `padded` puts
out zeros up to a multiple of 8 columns, which are in memory anyway; of their gradient nothing is read. For
inference a vector `shift` [D] may be added to every row of x first: what a residual stream would have
received that its writers left out.

Bytes: x is read from DRAM once and the kept columns are written once. A program holds whole rows, makes the
statistics of them in registers (mean first, then squared deviations), and then loads x[row, index[j]]: lines
that it has just loaded, so this second load is served by the L1 or L2 cache. The backward pass works on the
columns of x instead, and loads dy[row, position of the column]; dy is read once.

Numbers: statistics and sums are float32. Saved for backward: x, weight and index. The statistics are never
written: the backward pass holds the same rows in registers and makes the same statistics again.

The values of `index` are never looked at on the host (that would wait for the GPU): they must be distinct
and from 0 to D - 1, as those of a `PruningPlan` are.

Deterministic: sums over rows are made in two stages of fixed order; there are no atomics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_kernels import _arguments, launching, library
from vtp_kernels._tiles import load_tile
from vtp_kernels.launching import Config, Variant, cdiv, launch, tl, triton
from vtp_kernels.library import autocast_is_on, define, define_gradient
from vtp_kernels.rows import (
    empty_rows,
    empty_rows_like,
    in_padded_rows,
    padded_width,
    whole_rows,
    with_padded_rows,
)

# ------------------------------------------------------------------------------------------------ reference


def layer_norm_gather_ref(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    eps: float,
    shift: Tensor | None = None,
) -> Tensor:
    """The definition of `layer_norm_gather` in plain PyTorch; all tensors of one dtype but index, int64."""
    x = x if shift is None else x + shift
    out = F.layer_norm(x, x.shape[-1:], None, None, eps)
    if index is not None:
        out = out.index_select(-1, index)
    return out if weight is None or bias is None else out * weight + bias


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _statistics(b_x, o_d, D, eps):
    """Mean and reciprocal standard deviation of rows b_x, which are 0 from D on."""
    b_mean = tl.sum(b_x, axis=1) / D
    b_deviation = tl.where(o_d[None, :] < D, b_x - b_mean[:, None], 0.0)
    return b_mean, 1.0 / tl.sqrt(tl.sum(b_deviation * b_deviation, axis=1) / D + eps)


@triton.jit
def _scale_and_store(b_xhat, weight, bias, out, o_m, o_j, M, kept, stride_out, AFFINE: tl.constexpr):
    """out[o_m, o_j] = xhat * weight + bias, and 0 in the padding of the rows."""
    if AFFINE:
        b_weight = tl.load(weight + o_j, mask=o_j < kept, other=0.0)
        b_bias = tl.load(bias + o_j, mask=o_j < kept, other=0.0)
        b_xhat = b_xhat * b_weight[None, :] + b_bias[None, :]
    b_out = tl.where(o_j[None, :] < kept, b_xhat, 0.0).to(out.dtype.element_ty)
    p_out = out + o_m[:, None].to(tl.int64) * stride_out + o_j[None, :]
    tl.store(p_out, b_out, mask=(o_m[:, None] < M) & (o_j[None, :] < (kept + 7) // 8 * 8))


@triton.jit(do_not_specialize=["M", "D", "kept", "stride_x", "stride_out", "eps"])
def _layer_norm_gather_fwd_kernel(
    x, shift, weight, bias, index, out, M, D, kept, stride_x, stride_out, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_J: tl.constexpr,
    AFFINE: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """ROWS rows of out; x [M, D], D <= BLOCK_D, and the kept columns BLOCK_J at a time."""
    stride_x, stride_out = stride_x // 8 * 8, stride_out // 8 * 8  # tells the compiler that they are
    o_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    b_x = load_tile(x, o_m, o_d, M, D, stride_x, True, True, PADDED=True).to(tl.float32)
    if shift is not None:
        b_x += tl.load(shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_mean, b_rstd = _statistics(b_x, o_d, D, eps)
    if GATHER:
        for j in range(0, kept, BLOCK_J):
            o_j = j + tl.arange(0, BLOCK_J)
            b_index = tl.load(index + o_j, mask=o_j < kept, other=0)
            p_kept = x + o_m[:, None].to(tl.int64) * stride_x + b_index[None, :]
            m_kept = (o_m[:, None] < M) & (o_j[None, :] < kept)
            b_kept = tl.load(p_kept, mask=m_kept, other=0.0).to(tl.float32)
            if shift is not None:
                b_shift = tl.load(shift + b_index, mask=o_j < kept, other=0.0)
                b_kept += b_shift.to(tl.float32)[None, :]
            b_xhat = (b_kept - b_mean[:, None]) * b_rstd[:, None]
            _scale_and_store(b_xhat, weight, bias, out, o_m, o_j, M, kept, stride_out, AFFINE)
    else:
        b_xhat = (b_x - b_mean[:, None]) * b_rstd[:, None]
        _scale_and_store(b_xhat, weight, bias, out, o_m, o_d, M, kept, stride_out, AFFINE)


@triton.jit(
    do_not_specialize=["M", "D", "kept", "rows_per_program", "stride_dy", "stride_x", "stride_dx", "eps"]
)
def _layer_norm_gather_bwd_kernel(
    dy, x, weight, position, dx, partial, M, D, kept, rows_per_program, stride_dy, stride_x, stride_dx, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """dx of `rows_per_program` rows, a multiple of ROWS, and their sums of dy * xhat and of dy.

    Everything stands at the columns of x; position [D] says which column of dy that is, -1 for none.
    partial [programs, 2, kept]: the sums for dweight, then those for dbias.
    """
    stride_dy, stride_x, stride_dx = stride_dy // 8 * 8, stride_x // 8 * 8, stride_dx // 8 * 8
    o_d = tl.arange(0, BLOCK_D)
    o_j = tl.load(position + o_d, mask=o_d < D, other=-1) if GATHER else o_d
    m_j = o_j >= 0 if GATHER else o_j < D
    b_weight = tl.load(weight + o_j, mask=m_j, other=0.0)
    b_dweight = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    b_dbias = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    first = tl.program_id(0) * rows_per_program
    for row in range(first, tl.minimum(M, first + rows_per_program), ROWS):
        o_m = row + tl.arange(0, ROWS)
        b_x = load_tile(x, o_m, o_d, M, D, stride_x, True, True, PADDED=True).to(tl.float32)
        if GATHER:
            p_dy = dy + o_m[:, None].to(tl.int64) * stride_dy + o_j[None, :]
            m_dy = (o_m[:, None] < M) & m_j[None, :]
            b_dy = tl.load(p_dy, mask=m_dy, other=0.0).to(tl.float32)
        else:
            b_dy = load_tile(dy, o_m, o_d, M, D, stride_dy, True, True, PADDED=True).to(tl.float32)
        b_mean, b_rstd = _statistics(b_x, o_d, D, eps)
        b_xhat = tl.where(o_d[None, :] < D, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_dweight += b_dy * b_xhat
        b_dbias += b_dy
        b_g = b_dy * b_weight[None, :]
        b_mean_g, b_mean_gx = tl.sum(b_g, axis=1) / D, tl.sum(b_g * b_xhat, axis=1) / D
        b_dx = (b_g - b_mean_g[:, None] - b_xhat * b_mean_gx[:, None]) * b_rstd[:, None]
        b_dx = tl.where(o_d[None, :] < D, b_dx, 0.0).to(dx.dtype.element_ty)
        p_dx = dx + o_m[:, None].to(tl.int64) * stride_dx + o_d[None, :]
        tl.store(p_dx, b_dx, mask=(o_m[:, None] < M) & (o_d[None, :] < (D + 7) // 8 * 8))
    p_partial = partial + tl.program_id(0).to(tl.int64) * 2 * kept + o_j
    tl.store(p_partial, tl.sum(b_dweight, axis=0), mask=m_j)
    tl.store(p_partial + kept, tl.sum(b_dbias, axis=0), mask=m_j)


# --------------------------------------------------------------------------------------------------- tables


# By the largest D of a bucket. Rows in registers, 8 to 32 numbers of each a thread: small ones share a
# program, for which then one load of the index does.
FWD_TILES = {
    256: Config.of(4, 1, ROWS=8, BLOCK_D=256, BLOCK_J=128),
    512: Config.of(4, 1, ROWS=4, BLOCK_D=512, BLOCK_J=128),
    1024: Config.of(4, 1, ROWS=4, BLOCK_D=1024, BLOCK_J=256),
    2048: Config.of(4, 1, ROWS=2, BLOCK_D=2048, BLOCK_J=512),
    4096: Config.of(8, 1, ROWS=1, BLOCK_D=4096, BLOCK_J=1024),
}
BWD_TILES = {
    256: Config.of(4, 1, ROWS=4, BLOCK_D=256),
    512: Config.of(4, 1, ROWS=4, BLOCK_D=512),
    1024: Config.of(8, 1, ROWS=2, BLOCK_D=1024),
    2048: Config.of(8, 1, ROWS=1, BLOCK_D=2048),
    4096: Config.of(8, 1, ROWS=1, BLOCK_D=4096),
}
# With an index, 8 warps of so wide a row spill where Triton 3.6 compiles for sm_90.
BWD_GATHER_TILES = BWD_TILES | {2048: Config.of(16, 1, ROWS=1, BLOCK_D=2048)}
_WIDEST = max(FWD_TILES)
# Programs of the backward pass: four for each multiprocessor of a large GPU (132 of an H100). Each writes one
# pair of partial sums a column: 3 MB for 768 columns.
_BWD_PROGRAMS = 528


def _bucket(table: dict[int, Config], D: int) -> Config:
    return table[next(width for width in table if width >= D)]


# ------------------------------------------------------------------------------------------------- launchers


def _launch_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None, eps: float,
    dtype: torch.dtype, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [M, D] with padded rows; weight and bias float32; shift contiguous."""
    (M, D), kept = x.shape, x.shape[1] if index is None else len(index)
    out = empty_rows(M, kept, dtype=dtype, device=x.device)
    config = _bucket(FWD_TILES, D)
    if shift is not None and config is FWD_TILES[256]:  # of 4 warps some registers spill on sm_100
        config = dataclasses.replace(config, num_warps=8)
    launch(
        _layer_norm_gather_fwd_kernel,
        (cdiv(M, config.blocks["ROWS"]),),
        dict(
            x=x, shift=shift, weight=weight, bias=bias, index=index, out=out, M=M, D=D, kept=kept,
            stride_x=x.stride(0), stride_out=out.stride(0), eps=eps,
        ),
        config,
        AFFINE=weight is not None,
        GATHER=index is not None,
    )  # fmt: skip
    return out


def _launch_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """dx [M, D] and partial [programs, 2, kept]; dy and x with padded rows, weight float32."""
    (M, D), kept = x.shape, len(weight)
    config = _bucket(BWD_TILES if index is None else BWD_GATHER_TILES, D)
    rows = config.blocks["ROWS"]
    rows_per_program = cdiv(M, _BWD_PROGRAMS * rows) * rows
    programs = cdiv(M, rows_per_program)
    dx = empty_rows(M, D, dtype=x.dtype, device=x.device)
    partial = torch.empty((programs, 2, kept), dtype=torch.float32, device=x.device)
    launch(
        _layer_norm_gather_bwd_kernel,
        (programs,),
        dict(
            dy=dy, x=x, weight=weight, position=None if index is None else _position(index, D), dx=dx,
            partial=partial, M=M, D=D, kept=kept, rows_per_program=rows_per_program,
            stride_dy=dy.stride(0), stride_x=x.stride(0), stride_dx=dx.stride(0), eps=eps,
        ),
        config,
        GATHER=index is not None,
    )  # fmt: skip
    return dx, partial


def _position(index: Tensor, D: int) -> Tensor:
    """The inverse of index: [D] int32, where in the output each column of x stands, -1 for nowhere."""
    position = torch.full((D,), -1, dtype=torch.int32, device=index.device)
    return position.index_copy_(0, index, torch.arange(len(index), dtype=torch.int32, device=index.device))


def _float32(vector: Tensor) -> Tensor:
    """The vector as the kernels take it: it is not worth a compilation for each of its dtypes."""
    return vector.to(torch.float32).contiguous()


def _kept(x: Tensor, index: Tensor | None) -> int:
    return x.shape[-1] if index is None else len(index)


def _is_for_kernels(x: Tensor, kept: int) -> bool:
    return x.dtype != torch.float64 and x.numel() > 0 and kept > 0 and x.shape[-1] <= _WIDEST


def _forward_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None, eps: float,
    dtype: torch.dtype, shift: Tensor | None = None, padded: bool = False,
) -> Tensor:  # fmt: skip
    kept = _kept(x, index)
    if not _is_for_kernels(x, kept):
        return _forward_plain(x, weight, bias, index, eps, dtype, shift, padded)
    rows = with_padded_rows(x)
    shift = None if shift is None else shift.contiguous()
    index = None if index is None else index.contiguous()
    weight = None if weight is None else _float32(weight)
    bias = None if bias is None else _float32(bias)
    out = _launch_fwd(rows, weight, bias, index, eps, dtype, shift)
    if padded:
        out, kept = whole_rows(out), padded_width(kept)
    return out.view(*x.shape[:-1], kept)


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor | None, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """dx, and dweight and dbias as one tensor [2, kept], empty without weight."""
    kept = _kept(x, index)
    if not _is_for_kernels(x, kept):
        return _backward_plain(dy, x, weight, index, eps)
    rows, dy = with_padded_rows(x), with_padded_rows(dy[..., :kept])
    # Without weight (folded into the next linear for inference) no kernel is compiled for a gradient alone.
    weight32 = torch.ones(kept, device=x.device) if weight is None else _float32(weight)
    dx, partial = _launch_bwd(dy, rows, weight32, index, eps)
    return dx.view(x.shape), x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def variants(target: str) -> Iterator[Variant]:
    """Every compilation that `layer_norm_gather` can ask for on `target`, a key of `launching.TARGETS`.

    A 16-bit x under an autocast to the other 16-bit dtype is compiled when it is met; all else is here.
    """
    dtypes = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    dtypes += [(torch.float32, dtype) for dtype in (torch.bfloat16, torch.float16)]  # under autocast
    with launching.recording("layer_norm_gather", target) as found:
        for x_dtype, dtype in dtypes:
            for D in FWD_TILES:
                x = torch.empty((64, D), dtype=x_dtype, device="meta")
                weight = torch.empty(D, device="meta")
                for index in (None, torch.empty(D, dtype=torch.int64, device="meta")):
                    for vector in (None, weight):
                        _forward_triton(x, vector, vector, index, 1e-6, dtype)
                    if x_dtype is dtype:  # of packed models, whose norms are folded
                        _forward_triton(x, None, None, index, 1e-6, dtype, x[0])
                    _backward_triton(x.to(dtype), x, weight, index, 1e-6)
    yield from found.values()


# ---------------------------------------------------------------------------------- plain PyTorch, any device


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are made in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _at_all_columns(kept: Tensor, index: Tensor | None, D: int) -> Tensor:
    """kept [..., kept] at its columns of [..., D], 0 at the others."""
    if index is None:
        return kept
    return kept.new_zeros(*kept.shape[:-1], D).index_copy_(-1, index, kept)


def _forward_plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None, eps: float,
    dtype: torch.dtype, shift: Tensor | None = None, padded: bool = False,
) -> Tensor:  # fmt: skip
    D = x.shape[-1]
    x = x if shift is None else x.to(_wide(x.dtype)) + shift
    if weight is not None and bias is not None:
        weight, bias = (_at_all_columns(t.to(_wide(x.dtype)), index, D) for t in (weight, bias))
    out = F.layer_norm(x.to(_wide(x.dtype)), (D,), weight, bias, eps)
    if index is not None:
        out = out.index_select(-1, index)
    out = in_padded_rows(out.to(dtype))
    return whole_rows(out) if padded else out


def _backward_plain(
    dy: Tensor, x: Tensor, weight: Tensor | None, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    D, wide = x.shape[-1], _wide(x.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), D).to(wide)
    dy = dy[..., : _kept(x, index)]  # without a padding
    dy = _at_all_columns(dy.reshape(len(rows), dy.shape[-1]).to(wide), index, D)
    scale = None if weight is None else _at_all_columns(weight.to(wide), index, D)
    _, mean, rstd = torch.native_layer_norm(rows, (D,), None, None, eps)
    needs = [True, weight is not None, weight is not None]
    dx, *gradients = torch.ops.aten.native_layer_norm_backward(
        dy, rows, (D,), mean, rstd, scale, scale, needs
    )
    dx = in_padded_rows(dx.to(x.dtype).view(x.shape))
    if weight is None:
        return dx, x.new_empty(0)
    of_vectors = torch.stack(gradients)
    return dx, (of_vectors if index is None else of_vectors.index_select(1, index)).to(weight.dtype)


# ---------------------------------------------------------------------------------------------- registration


def _forward_fake(x, weight, bias, index, eps, dtype, shift=None, padded=False):
    kept = x.shape[-1] if index is None else index.shape[0]
    kept = padded_width(kept) if padded else kept
    return empty_rows(*x.shape[:-1], kept, dtype=dtype, device=x.device)


def _backward_fake(dy, x, weight, index, eps):
    of_vectors = x.new_empty(0) if weight is None else weight.new_empty((2, weight.shape[0]))
    return empty_rows_like(x, *x.shape), of_vectors


def _setup_context(ctx, inputs, output):
    x, weight, _, index, ctx.eps, *_ = inputs
    ctx.save_for_backward(x, weight, index)


def _backward(ctx, dy, backward=None):
    x, weight, index = ctx.saved_tensors
    dx, of_vectors = (backward or torch.ops.vtp.layer_norm_gather_backward)(dy, x, weight, index, ctx.eps)
    gradients = dx, *((None, None) if weight is None else of_vectors.unbind())
    needs, others = ctx.needs_input_grad[:3], len(ctx.needs_input_grad[3:])  # without those of their defaults
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *(None,) * others


define(
    "layer_norm_gather(Tensor x, Tensor? weight, Tensor? bias, Tensor? index, float eps, ScalarType dtype,"
    " Tensor? shift=None, bool padded=False) -> Tensor",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "layer_norm_gather_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? index, float eps)"
    " -> (Tensor, Tensor)",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define_gradient(
    "layer_norm_gather", by="layer_norm_gather_backward", backward=_backward, setup_context=_setup_context
)


def _calls_directly(x: Tensor) -> bool:
    """Whether a call goes without the dispatcher: on a GPU, which may be waiting for it."""
    return x.is_cuda and library.takes_direct_calls(x)


class _LayerNormGather(torch.autograd.Function):
    """`layer_norm_gather` for eager calls, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return library.direct("layer_norm_gather", inputs[0])(*inputs)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph=True
            library.refuse_second_derivative("layer_norm_gather")
        return _backward(ctx, dy, library.direct("layer_norm_gather_backward", dy))


# ------------------------------------------------------------------------------------------- public function


def layer_norm_gather(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    eps: float,
    *,
    shift: Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """LayerNorm over all columns of x that returns only those of `index`.

    Args:
        x: [..., D], float32, bfloat16, float16 or float64; any strides.
        weight, bias: [kept], both of the dtype of x or both float32; or both None, where they are folded into
            the linear that follows.
        index: [kept], int64: the columns that are kept, distinct and from 0 to D - 1. Its values are not
            checked: that would wait for the GPU. None keeps all D in order.
        eps: what is added to the variance, >= 0.
        shift: [D], in the dtype of x: added to every row of x before all else, in float32 at least. For
            inference: it has no gradient. None adds nothing.
        padded: put out zeros behind the kept columns, up to a multiple of 8, for a matrix product; of the
            gradient there nothing is read.

    Returns:
        [..., kept], with `padded` [..., kept rounded up to 8], in the dtype of x, or under autocast in
        autocast's, though x is read as it is. Rows start at multiples of 8 elements. There is no second
        derivative.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not one of those above.
        ValueError: shapes or devices do not go together, only one of weight and bias is given, or eps is
            negative or not finite.
        RuntimeError: a gradient is asked for beside a shift; add that to x instead.

    Zhu, Tang, Han, "Vision Transformer Pruning", arXiv 2104.08500.
    """
    _validate(x, weight, bias, index, eps)
    if shift is not None:
        _check_shift(shift, x, weight, bias)
    dtype = x.dtype
    if autocast_is_on(x.device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    call = _LayerNormGather.apply if _calls_directly(x) else torch.ops.vtp.layer_norm_gather
    return call(x, weight, bias, index, float(eps), dtype, shift, padded)


def _check_shift(shift: Tensor, x: Tensor, *others: Tensor | None) -> None:
    _arguments.check_tensors({"x": x}, {"shift": shift})
    _arguments.check_dtypes({"x": x, "shift": shift})
    _arguments.check_shape("shift", shift, (x.shape[-1],))
    tensors = [t for t in (shift, x, *others) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("shift: has no gradient, and one is asked for: add it to x instead")


def _validate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor | None, eps: float
) -> None:
    _arguments.check_tensors({"x": x}, {"weight": weight, "bias": bias, "index": index})
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., D] with D of at least 1")
    kept = D = x.shape[-1]
    if index is not None:
        if index.dtype != torch.int64:
            raise TypeError(f"index: got {index.dtype}, expected int64")
        if index.ndim != 1 or index.shape[0] > D:
            raise ValueError(f"index: got shape {tuple(index.shape)}, expected [kept], at most [{D}]")
        kept = index.shape[0]
    if (weight is None) != (bias is None):
        given, missing = ("bias", "weight") if weight is None else ("weight", "bias")
        raise ValueError(f"{missing}: got None beside a {given}, expected both or none")
    if weight is not None and bias is not None:
        _arguments.check_dtypes({"x": x, "weight": weight}, or_float32=("weight",))
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias: got {bias.dtype}, expected {weight.dtype}, that of weight")
        _arguments.check_shape("weight", weight, (kept,))
        _arguments.check_shape("bias", bias, (kept,))
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a finite number >= 0")
