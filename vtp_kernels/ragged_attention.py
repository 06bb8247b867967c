"""Self-attention whose heads have key and value widths of their own, straight from the packed buffer of qkv.

qkv [B, N, 2 K + V]: the queries of all H heads side by side, key_widths[h] wide, K in sum; their keys, as
wide; then their values, value_widths[h] wide, V in sum. out [B, N, V]. For each head, with the scale of the
dense model for all:

    S = scale Q K^T    P = softmax(S)    out = P V

With `delta = sum_c dout[n, c] out[n, c]` the gradients are

    dP = dout V^T    dS = P (dP - delta)    dV = P^T dout    dQ = scale dS K    dK = scale dS^T Q

(Dao et al., "FlashAttention", arXiv 2205.14135). Saved for backward: qkv, out and the base-2 logarithm of
sum_n exp(S[m, n]), [B, H, N], with which the kernels, which take powers of 2, make P again. Statistics are
float32; P is rounded to the dtype of qkv before it meets V, and the rows of out are divided by their sum,
which is not rounded, at the end.

Up to 256 tokens of 16-bit numbers in heads of up to 64 take one pass, with whole rows of scores on chip. All
else, for which rows have no room beside the products, goes over tiles of keys with running statistics
("online").

Deterministic: each number is written by one program, in one order; there are no atomics.

The kernels, and how they keep near to what is kept of the widths, are in `ragged_attention_kernels.py`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _arguments, launching
from vtp_kernels.launching import Config, Variant, choice, launch, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.ragged_attention_kernels import (
    _ragged_attention_dkdv_kernel,
    _ragged_attention_dq_kernel,
    _ragged_attention_fwd_kernel,
    _ragged_attention_online_kernel,
)
from vtp_kernels.rows import clear_padding, empty_rows_like, with_padded_rows

# ------------------------------------------------------------------------------------------------ reference


def ragged_attention_ref(
    qkv: Tensor, key_widths: int | Sequence[int], value_widths: Sequence[int], scale: float
) -> Tensor:
    """The definition of `ragged_attention` in plain PyTorch, for autograd to differentiate."""
    heads = zip(*_split(qkv, _each(key_widths, value_widths), value_widths), strict=True)
    weights = (((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v for q, k, v in heads)
    return torch.cat(list(weights), dim=-1)


# --------------------------------------------------------------------------------------------------- tables


# Tiles by what a product multiplies: 16-bit numbers, float32 on tensor cores (TF32), float32 without (IEEE).
# BLOCK_M: rows that a program writes. BLOCK_N: rows that it takes at a time, where not all are on chip.
ONE_PASS_TILES = Config.of(4, 2, BLOCK_M=64)
ONLINE_TILES = {
    "16": Config.of(4, 2, BLOCK_M=64, BLOCK_N=64),
    "tf32": Config.of(8, 2, BLOCK_M=64, BLOCK_N=32),
    "ieee": Config.of(4, 2, BLOCK_M=32, BLOCK_N=32),
    "ieee in blocks": Config.of(4, 1, BLOCK_M=32, BLOCK_N=32),  # heads with keys of their own; 2 stages spill
}
# Not without tensor cores: their operands would be spilled. That backward pass is PyTorch's, head by head.
DQ_TILES = {
    "16": Config.of(4, 2, BLOCK_M=32, BLOCK_N=32),
    "tf32": Config.of(8, 2, BLOCK_M=64, BLOCK_N=16),
}
DKDV_TILES = {
    "16": Config.of(8, 1, BLOCK_M=32, BLOCK_N=16),
    "tf32": Config.of(8, 2, BLOCK_M=32, BLOCK_N=16),
}
# Where queries and keys are rotated as they are loaded, in heads of up to `WIDEST_ROTATED`: keys pass through
# registers then, beside their sines and cosines, six numbers of float32 for each pair. Beside whole rows of
# scores some would spill if there were not twice the warps; over tiles, in heads of 128, beside 64 keys.
ONE_PASS_ROTATED_TILES = Config.of(8, 2, BLOCK_M=64)
ONLINE_ROTATED_TILES = {
    "16": Config.of(4, 2, BLOCK_M=64, BLOCK_N=64),
    "16, wide": Config.of(4, 2, BLOCK_M=64, BLOCK_N=32),  # heads of more than 64
    "tf32": Config.of(8, 1, BLOCK_M=64, BLOCK_N=32),
    "ieee": Config.of(8, 2, BLOCK_M=32, BLOCK_N=32),
}
WIDEST_ROTATED = 128
# Columns of values that a head may have.
_MOST_VALUES = 256
# Tokens up to which a row of scores is on chip at once.
_MOST_KEYS = 256
_KEYS = choice("ragged_attention", "one_pass", "online")  # what `launching.forced_path` can force
# Columns of values for which a program has accumulators: 64 that start at any element take 71, that is 80.
_GROUP = 80


def _units(
    key_widths: Sequence[int], value_widths: Sequence[int], grouped: bool, padded: int
) -> list[tuple[int, ...]]:
    """What programs work on, the most work first: head, columns of values, all of the head, those of its key.

    Of columns the first and the last + 1. A unit is a head, or if `grouped` up to `_GROUP` columns of its
    values, counted from a multiple of 8. The last head is taken to `padded`, where the row ends: a last unit
    may have no columns but padding.
    """
    units: list[tuple[int, ...]] = []
    V, begin, key_begin = sum(value_widths), 0, 0
    for head, (key_width, width) in enumerate(zip(key_widths, value_widths, strict=True)):
        end, key_end = begin + width, key_begin + key_width
        starts = range(begin // 8 * 8, padded if end == V else end, _GROUP) if grouped else [begin]
        for first, following in itertools.pairwise([begin, *starts[1:], end]):
            units.append((head, first, min(following, end), begin, end, key_begin, key_end))
        begin, key_begin = end, key_end
    # With the first columns of a head the kernel of dK and dV has its key, too.
    return sorted(units, key=lambda u: (u[1] == u[3], u[2] - u[1] + u[6] - u[5]), reverse=True)


@functools.cache
def _table(
    key_widths: tuple[int, ...], value_widths: tuple[int, ...], grouped: bool, padded: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """`_units` as int32 on the device, copied there once: a captured graph must not copy from the host."""
    units = _units(key_widths, value_widths, grouped, padded)
    return torch.tensor(units, dtype=torch.int32, device=device)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_tiles(N: int, block: int) -> list[int]:
    """How many of N tokens each tile of rows has: `block`, and 16 in those for what is left at the end."""
    full, rest = divmod(_round_up(N, 16), block)
    return [block] * full + [16] * (rest // 16)


# ------------------------------------------------------------------------------------------------- launchers


def _constants(key_widths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a forward kernel. Where heads have keys of their own there is one set for all widths.

    Sixteen columns at a time, as many as the smallest product of tensor cores: a head costs what it has.
    """
    constants = {"PRECISION": launching.dot_precision(dtype)}
    if _are_equal(key_widths):
        block = max(16, triton.next_power_of_2(key_widths[0]))
        return {"HEAD_DIM": key_widths[0], "BLOCK_D": block, "KEYS_ALIGNED": None, **constants}
    return {"HEAD_DIM": None, "BLOCK_D": 16, "KEYS_ALIGNED": sum(key_widths) % 8 == 0, **constants}


def _held_constants(key_widths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a backward kernel, which holds a head's queries and keys, at most five blocks of them.

    Blocks that a head does not have cost registers, but no product: two numbers of them do for all widths.
    """
    constants = _constants(key_widths, dtype)
    if _are_equal(key_widths):
        return {"KEY_BLOCKS": None, **constants}
    widest = max(end - begin // 8 * 8 for *_, begin, end in _units(key_widths, key_widths, False, 0))
    block = max(16, triton.next_power_of_2(-(-widest // 5)))
    return {**constants, "BLOCK_D": block, "KEY_BLOCKS": 2 if widest <= 32 else 5}


def _has_room_on_amd(constants: dict[str, Any]) -> bool:
    """Whether a backward kernel has scalar registers for the masks of its blocks of keys, or spills some."""
    if constants["HEAD_DIM"] is not None:
        return True
    return constants["KEY_BLOCKS"] == 2 and constants["KEYS_ALIGNED"]


def _are_equal(widths: Sequence[int]) -> bool:
    return len(set(widths)) == 1


def key_columns(key_widths: Sequence[int]) -> list[int]:
    """The columns of each head's query and key that a forward launch multiplies, padding included."""
    if _are_equal(key_widths):
        return [max(16, triton.next_power_of_2(key_widths[0]))] * len(key_widths)
    ends = itertools.accumulate(key_widths)
    return [_round_up(end - (end - w) // 8 * 8, 16) for w, end in zip(key_widths, ends, strict=True)]


def _choice(
    N: int, key_widths: Sequence[int], dtype: torch.dtype, rotated: bool = False
) -> tuple[object, Config, bool]:
    """The forward kernel for N tokens, its configuration, and whether it takes them in one pass.

    Rows of scores have no room beside float32 weights, nor beside queries and keys wider than 64.
    """
    has_room = N <= _MOST_KEYS and max(key_widths) <= 64 and dtype.itemsize == 2
    if has_room and _KEYS.takes("one_pass", True):
        return _ragged_attention_fwd_kernel, ONE_PASS_ROTATED_TILES if rotated else ONE_PASS_TILES, True
    products = launching.operands(dtype)
    if rotated:
        products = "16, wide" if products == "16" and max(key_widths) > 64 else products
        return _ragged_attention_online_kernel, ONLINE_ROTATED_TILES[products], False
    if products == "ieee" and not _are_equal(key_widths):
        products = "ieee in blocks"
    return _ragged_attention_online_kernel, ONLINE_TILES[products], False


def _forward_triton(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, need_lse: bool
) -> tuple[Tensor, Tensor]:
    if not qkv.numel() or qkv.dtype == torch.float64:
        return _forward_plain(qkv, key_widths, value_widths, scale, need_lse)
    return attend(qkv, key_widths, value_widths, scale, need_lse)


def attend(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, need_lse: bool,
    rope: Tensor | None = None, prefix_tokens: int = 0, rotate_half: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse by a forward kernel, with rope of queries and keys rotated as `rotate_heads` takes it.

    qkv has elements and is not float64. rope is contiguous, from 16 bytes on; with it keys are all as wide as
    one another, of an even width of `WIDEST_ROTATED` at most.
    """
    (B, N, _), V, rows = qkv.shape, sum(value_widths), with_padded_rows(qkv)
    out, lse = _results(qkv, value_widths, need_lse)
    constants = {**_constants(key_widths, qkv.dtype), "PAIRS": None}
    rotation: dict[str, Any] = dict(rope=rope, prefix_tokens=None, table_rows=None)
    if rope is not None:
        rotation |= dict(prefix_tokens=prefix_tokens, table_rows=rope.shape[1] if rope.ndim == 3 else 0)
        constants["PAIRS"] = "halves" if rotate_half else "neighbours"
        constants["BLOCK_D"] = max(32, constants["BLOCK_D"])  # each half is a product of 16 at least
    kernel, config, one_pass = _choice(N, key_widths, qkv.dtype, rope is not None)
    if one_pass:
        constants["KEYS"] = _round_up(N, 16)
    table = _table(tuple(key_widths), tuple(value_widths), not one_pass, _round_up(V, 8), qkv.device)
    launch(
        kernel,
        (len(table) * B * len(row_tiles(N, config.blocks["BLOCK_M"])),),
        dict(
            qkv=rows, table=table, out=out, lse=lse if need_lse else None, B=B, N=N, H=len(value_widths),
            V=V, K=sum(key_widths), stride_qkv=rows.stride(0), stride_out=out.stride(1), **rotation,
            factor=scale * math.log2(math.e),
        ),
        config,
        **constants,
    )  # fmt: skip
    return out, lse


def _backward_triton(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, key_widths: Sequence[int],
    value_widths: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    products, constants = launching.operands(qkv.dtype), _held_constants(key_widths, qkv.dtype)
    has_room = products in DQ_TILES and (not launching.is_amd(qkv.device) or _has_room_on_amd(constants))
    if not qkv.numel() or qkv.dtype == torch.float64 or not has_room:
        return _backward_plain(dout, qkv, out, lse, key_widths, value_widths, scale)
    (B, N, width), H, V = qkv.shape, len(value_widths), sum(value_widths)
    padded = _round_up(width, 8) - 2 * sum(key_widths)
    widths = tuple(key_widths), tuple(value_widths)
    dqkv = empty_rows_like(qkv, *qkv.shape)
    delta = torch.empty_like(lse)
    dout_rows, qkv_rows, out_rows = map(with_padded_rows, (dout, qkv, out))
    common = dict(
        lse=lse, delta=delta, dqkv=dqkv, B=B, N=N, H=H, V=V, K=sum(key_widths),
        stride_dout=dout_rows.stride(0), stride_qkv=qkv_rows.stride(0), stride_dqkv=dqkv.stride(1),
        scale=scale, factor=scale * math.log2(math.e),
    )  # fmt: skip
    for kernel, configs, grouped, own in (
        (_ragged_attention_dq_kernel, DQ_TILES, False, dict(out=out_rows, stride_out=out_rows.stride(0))),
        (_ragged_attention_dkdv_kernel, DKDV_TILES, True, {}),
    ):
        config, table = configs[products], _table(*widths, grouped, padded, qkv.device)
        launch(
            kernel,
            (len(table) * B * len(row_tiles(N, config.blocks["BLOCK_M"])),),
            dict(dout=dout_rows, qkv=qkv_rows, table=table, **own, **common),
            config,
            **constants,
        )
    return dqkv


def tiled_flops(
    B: int,
    N: int,
    key_widths: Sequence[int],
    value_widths: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """FLOPs of a forward launch, those on the padding of its rows, keys and columns included."""
    _, config, one_pass = _choice(N, key_widths, dtype)
    keys, V, of_heads = _round_up(N, 16), sum(value_widths), key_columns(key_widths)
    flops = 0
    for head, begin, end, *_ in _units(key_widths, value_widths, not one_pass, _round_up(V, 8)):
        last = _round_up(V, 8) if end == V else end
        columns = _round_up(last - begin // 8 * 8, 32 if one_pass else 16)
        for rows in row_tiles(N, config.blocks["BLOCK_M"]):
            # The small tiles of the online kernel have accumulators for a whole group.
            kept = columns if one_pass else max(columns, 32)
            kept = kept if one_pass or rows == config.blocks["BLOCK_M"] else _GROUP
            flops += 2 * B * rows * keys * (of_heads[head] + kept)
    return flops


def variants(target: str) -> Iterator[Variant]:
    """The compilations that `ragged_attention` asks for on `target` in usual models: those of `_COMPILED`.

    And those that `rotated_attention` asks for: of `_ROTATED`.

    Others are the same kernels with other values of a few constants: the key width, where all heads have the
    same, and the tokens rounded up to 16 where they are 256 or fewer.
    """
    with launching.recording("ragged_attention", target) as found:
        for dtype, precision, key_widths, N in _COMPILED:
            with launching.matmul_precision(precision):
                _record(dtype, key_widths, N)
        for dtype, precision, table, d, N, rotate_half in _ROTATED:
            with launching.matmul_precision(precision):
                _record_rotated(dtype, table, d, N, rotate_half)
    yield from found.values()


# Heads of 64 with 197 and 577 tokens (224 and 384 pixels in patches of 16), and wider ones. Heads with keys
# of their own: of a half and less, of odd widths, and of more than 64.
_COMPILED = [
    (torch.bfloat16, "highest", (64, 64), 197),
    (torch.bfloat16, "highest", (64, 64), 577),
    (torch.bfloat16, "highest", (80, 80), 257),
    (torch.bfloat16, "highest", (128, 128), 197),  # as any number of tokens
    (torch.float16, "highest", (64, 64), 197),
    (torch.float32, "high", (64, 64), 197),
    (torch.float32, "highest", (64, 64), 197),
    (torch.bfloat16, "highest", (16, 32), 197),
    (torch.bfloat16, "highest", (64, 40), 577),
    (torch.bfloat16, "highest", (37, 16), 197),
    (torch.bfloat16, "highest", (104, 16), 577),
    (torch.float16, "highest", (64, 40), 197),
    (torch.float32, "high", (64, 40), 197),
    (torch.float32, "highest", (64, 40), 197),
]


def _record(dtype: torch.dtype, key_widths: tuple[int, int], N: int) -> None:
    """Ask for what qkv of this dtype, these key widths and N can lead to."""
    columns = 2 * sum(key_widths) + 237
    qkv = torch.empty((2, N, _round_up(columns, 8)), dtype=dtype, device="meta")[..., :columns]
    arguments = key_widths, (37, 200), key_widths[0] ** -0.5
    for need_lse in (False, True):
        out, lse = _forward_triton(qkv, *arguments, need_lse)
    _backward_triton(out, qkv, out, lse, *arguments)


# Of rotated heads: of 64 as above and wider, whose pairs are halves, with a table of float32 (DINOv3), or
# neighbours, with one in the dtype of the model (EVA-02, learned angles).
_ROTATED = [
    (torch.bfloat16, "highest", torch.float32, 64, 197, True),
    (torch.bfloat16, "highest", torch.float32, 64, 577, True),
    (torch.bfloat16, "highest", torch.bfloat16, 64, 197, False),
    (torch.bfloat16, "highest", torch.float32, 128, 577, True),
    (torch.float16, "highest", torch.float32, 64, 197, True),
    (torch.float32, "high", torch.float32, 64, 197, True),
    (torch.float32, "highest", torch.float32, 64, 197, False),
]


def _record_rotated(dtype: torch.dtype, table: torch.dtype, d: int, N: int, rotate_half: bool) -> None:
    """The same of two rotated heads of d and a table of this dtype."""
    columns = 4 * d + 237
    qkv = torch.empty((2, N, _round_up(columns, 8)), dtype=dtype, device="meta")[..., :columns]
    rope = torch.empty((N - 1, 2 * d), dtype=table, device="meta")
    attend(qkv, (d, d), (37, 200), d**-0.5, False, rope, 1, rotate_half)


# ---------------------------------------------------------------------------------- plain PyTorch, any device


def _each(key_widths: int | Sequence[int], value_widths: Sequence[int]) -> Sequence[int]:
    """The key width of each head: one integer stands for all."""
    return (key_widths,) * len(value_widths) if isinstance(key_widths, int) else key_widths


def _split(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views of qkv: the queries, the keys and the values [B, N, own width] of each head."""
    H, parts = len(value_widths), qkv.split((*key_widths, *key_widths, *value_widths), dim=-1)
    return parts[:H], parts[H : 2 * H], parts[2 * H :]


def _stacked(qkv: Tensor, H: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of qkv whose heads have equal key widths: queries and keys [B, H, N, head_dim]."""
    query, key = qkv[..., : 2 * H * head_dim].unflatten(-1, (2, H, head_dim)).permute(2, 0, 3, 1, 4)
    return query, key


def _forward_plain(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, need_lse: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _results(qkv, value_widths, need_lse)
    if not out.numel():
        return out, lse
    clear_padding(out)
    queries, keys, values = _split(qkv, key_widths, value_widths)
    if len(set(key_widths)) > 1:
        parts = zip(queries, keys, values, out.split(tuple(value_widths), dim=-1), strict=True)
        for head, (query, key, value, columns) in enumerate(parts):
            scores = (query @ key.transpose(-2, -1)).mul_(scale)
            if need_lse:
                lse[:, head] = scores.to(lse.dtype).logsumexp(dim=-1).mul_(math.log2(math.e))
            columns.copy_(scores.softmax(dim=-1) @ value)
        return out, lse
    query, key = _stacked(qkv, len(value_widths), key_widths[0])
    if len(set(value_widths)) == 1 and not need_lse:
        value = torch.stack(values, dim=1)
        heads = F.scaled_dot_product_attention(query, key, value, scale=scale)
        out.unflatten(-1, (len(values), -1)).copy_(heads.transpose(1, 2))
        return out, lse
    scores = (query @ key.transpose(-2, -1)).mul_(scale)
    if need_lse:
        torch.logsumexp(scores.to(lse.dtype), dim=-1, out=lse).mul_(math.log2(math.e))
    weights = scores.softmax(dim=-1)
    for head, columns in enumerate(out.split(tuple(value_widths), dim=-1)):
        columns.copy_(weights[:, head] @ values[head])
    return out, lse


def _backward_plain(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, key_widths: Sequence[int],
    value_widths: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    dqkv = empty_rows_like(qkv, *qkv.shape)
    if not dqkv.numel():
        return dqkv
    heads = zip(*_split(qkv, key_widths, value_widths), strict=True)
    gradients = zip(*_split(dqkv, key_widths, value_widths), strict=True)
    douts = dout.split(tuple(value_widths), dim=-1)
    for (q, k, v), (dq, dk, dv), do in zip(heads, gradients, douts, strict=True):
        scores = (q @ k.transpose(-2, -1)).mul_(scale)
        weights = scores.softmax(dim=-1)
        dv.copy_(weights.transpose(-2, -1) @ do)
        weights, dweights = (t.to(lse.dtype) for t in (weights, do @ v.transpose(-2, -1)))
        delta = (weights * dweights).sum(-1, keepdim=True)
        dscores = (weights * (dweights - delta)).to(qkv.dtype)
        dq.copy_((dscores @ k).mul_(scale))
        dk.copy_((dscores.transpose(-2, -1) @ q).mul_(scale))
    return dqkv


# ---------------------------------------------------------------------------------------------- registration


def _results(qkv: Tensor, value_widths: Sequence[int], need_lse: bool) -> tuple[Tensor, Tensor]:
    """out [B, N, sum(value_widths)] and lse [B, H, N], uninitialized; an empty lse if it is not needed."""
    (B, N, _), H = qkv.shape, len(value_widths)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    lse = qkv.new_empty((B, H, N) if need_lse else 0, dtype=dtype)
    return empty_rows_like(qkv, B, N, sum(value_widths)), lse


def _forward_fake(qkv, key_widths, value_widths, scale, need_lse):
    return _results(qkv, value_widths, need_lse)


def _backward_fake(dout, qkv, out, lse, key_widths, value_widths, scale):
    return empty_rows_like(qkv, *qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, ctx.key_widths, ctx.value_widths, ctx.scale, need_lse = inputs
    if need_lse:
        ctx.save_for_backward(qkv, *output)
    ctx.need_lse = need_lse
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    if not ctx.need_lse:
        raise RuntimeError("need_lse: got False, expected True where a gradient is needed")
    arguments = *ctx.saved_tensors, ctx.key_widths, ctx.value_widths, ctx.scale
    return torch.ops.vtp.ragged_attention_backward(dout, *arguments), None, None, None, None


define(
    "ragged_attention(Tensor qkv, int[] key_widths, int[] value_widths, float scale, bool need_lse)"
    " -> (Tensor, Tensor)",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "ragged_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int[] key_widths,"
    " int[] value_widths, float scale) -> Tensor",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define_gradient(
    "ragged_attention", by="ragged_attention_backward", backward=_backward, setup_context=_setup_context
)


@register_flop_formula(torch.ops.vtp.ragged_attention)
def _forward_flops(qkv_shape, key_widths, value_widths, *_, out_shape=None, **__) -> int:
    return forward_flops(qkv_shape, key_widths, value_widths)


def forward_flops(qkv_shape: Sequence[int], key_widths: Sequence[int], value_widths: Sequence[int]) -> int:
    """FLOPs of both products of attention, as the counter of PyTorch counts."""
    B, N, _ = qkv_shape
    return 2 * B * N * N * (sum(key_widths) + sum(value_widths))


@register_flop_formula(torch.ops.vtp.ragged_attention_backward)
def _backward_flops(
    dout_shape, qkv_shape, out_shape_, lse_shape, key_widths, value_widths, scale, out_shape=None, **_
) -> int:
    """Five products: scores again, gradients of the weights, of values, of queries and of keys."""
    B, N, _ = qkv_shape
    return 2 * B * N * N * (3 * sum(key_widths) + 2 * sum(value_widths))


# ------------------------------------------------------------------------------------------- public function


def ragged_attention(
    qkv: Tensor, key_widths: int | Sequence[int], value_widths: Sequence[int], scale: float
) -> Tensor:
    """`softmax(scale * q k^T) v` for each head, with key and value widths of its own, from packed qkv.

    Args:
        qkv: [B, N, 2 * sum(key_widths) + sum(value_widths)]: the queries of all heads side by side, their
            keys, then their values. float32, bfloat16, float16 or float64; any strides. Rows that start at 16
            bytes, with room up to a multiple of 8 elements, are read where they are, others are copied first.
            Under autocast it is cast to the dtype of autocast, as the attention of PyTorch casts its inputs.
        key_widths: width of each head's query and of its key, H positive integers; one integer stands for H
            equal ones.
        value_widths: width of each head's values, H integers from 1 to 256.
        scale: factor of the scores; that of the dense model, whatever is left of keys and values.

    Returns:
        [B, N, sum(value_widths)] in the dtype of qkv; its rows are padded to a multiple of 8 elements. There
        is no second derivative.

    Raises:
        TypeError: qkv is not a tensor, or not of a dtype above; a width is not an integer.
        ValueError: the shape of qkv is not that of the widths, there are not as many key widths as value
            widths, one is not positive or a value width above 256, or scale is not finite.
    """
    (qkv,) = _arguments.as_autocast_casts(qkv)
    key_widths = check_attention(qkv, key_widths, value_widths, scale)
    need_lse = torch.is_grad_enabled() and qkv.requires_grad
    out, _ = torch.ops.vtp.ragged_attention(qkv, key_widths, value_widths, float(scale), need_lse)
    return out


def check_attention(
    qkv: Tensor, key_widths: int | Sequence[int], value_widths: Sequence[int], scale: float
) -> Sequence[int]:
    """The key width of each head, once all arguments are found to be good."""
    _arguments.check_tensors({"qkv": qkv})
    _check_integers("value_widths", value_widths, "a tuple of integers")
    if not value_widths or not all(1 <= w <= _MOST_VALUES for w in value_widths):
        raise ValueError(
            f"value_widths: got {tuple(value_widths)}, expected a number from 1 to {_MOST_VALUES} a head"
        )
    given, key_widths = key_widths, _each(key_widths, value_widths)
    _check_integers("key_widths", key_widths, "an integer or a tuple of integers")
    if len(key_widths) != len(value_widths) or min(key_widths) < 1:
        raise ValueError(
            f"key_widths: got {given}, expected a positive number for each of {len(value_widths)} heads"
        )
    width = 2 * sum(key_widths) + sum(value_widths)
    if qkv.ndim != 3 or qkv.shape[-1] != width:
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}, expected [B, N, {width}] for {len(value_widths)} heads with "
            f"{sum(key_widths)} columns of queries, as many of keys and {sum(value_widths)} of values"
        )
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return key_widths


def _check_integers(name: str, widths: Sequence[int], expected: str) -> None:
    if not isinstance(widths, (tuple, list)) or not all(isinstance(w, int) for w in widths):
        raise TypeError(f"{name}: got {widths!r}, expected {expected}")
