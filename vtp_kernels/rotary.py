"""Rotary embedding of queries and keys in the packed buffer of qkv: `x * cos + rot(x) * sin` for each head.

qkv [..., N, 2 H d + V]: the queries of all H heads side by side, d wide each, d even; their keys, as wide;
then V columns of values, as `ragged_attention` takes them. rope [N - P, 2 d], or [H, N - P, 2 d] with a table
for each head, is what timm's `Eva` hands to its blocks: for each token behind the P prefix tokens d sines and
then d cosines. With x_1 and x_2 the numbers of a pair, at columns 2 i and 2 i + 1 of a head, or with
`rotate_half` at i and i + d / 2,

    out_1 = x_1 cos_1 - x_2 sin_1    out_2 = x_2 cos_2 + x_1 sin_2

Sines and cosines may be any numbers: those of one column are not taken for those of the other. With g the
gradient of out, the gradients are

    dx_1 = g_1 cos_1 + g_2 sin_2    dcos_1 = sum g_1 x_1    dsin_1 = -sum g_1 x_2
    dx_2 = g_2 cos_2 - g_1 sin_1    dcos_2 = sum g_2 x_2    dsin_2 = sum g_2 x_1

with sums over images, over query and key, and over heads where these share a table. Prefix tokens and values
are left, or copied, bit for bit. Saved for backward: rope, and qkv if rope needs a gradient.

Where nothing needs a gradient there are three ways. `rotated_linear` makes qkv and rotates it in the epilogue
of that product, which costs no byte but those of the table: with few rows, of one to four images, where a
launch is what costs. A tile of 64 rows and 128 columns then loads, at its end, 32 KB of float32 sines and as
many cosines, half of it a second time from L1 where heads share a table, beside the 147 KB of operands of 384
inputs (of a ViT-S; 295 KB of a ViT-B). From 1,024 rows on the product is the vendor's, which has no such
epilogue, and `rotate_heads_` is a pass of its own, in place: in 16 bits it moves 8 H d bytes a token, queries
and keys in and out; for a ViT-B with 201 tokens 1.2 MB an image and layer, 0.37 us of an H100's bandwidth. In
training, where the input must stay, the pass writes a copy, values with it: 4 H d + 2 V bytes a token in and
as many out, forward and backward.

The third is `rotated_attention`, which rotates queries and keys as attention loads them and saves the pass.
It is the default nowhere: packed models take it where `forced_path("rotated_linear", "attention")` says so.
Pairs are no obstacle: a score is the sum of that of the first numbers and that of the second, q_1 k_1 + q_2
k_2, so that each half is loaded, rotated and multiplied apart, and no number has to change places. But each
of its programs, one for 64 queries of a head, rotates all keys again: 4 times for 201 tokens, 10 times for
577. The arithmetic is little, 3 d FLOPs a key beside 256 d of the products. The table is not: 8 d bytes of
float32 a key, beside the 4 d bytes of key and value, so that a program loads three times as much; with 128
images of a ViT-B that is 820 MB more from L2 a layer, those beside queries included, against 160 MB that the
pass moves; with one image 6.4 MB, against 1.2 MB in the epilogue. (A table in 16 bits would be half of that,
but angles rounded a second time. One that is in the dtype of qkv already is read as it is.) Keys, which go to
shared memory as they are, have to pass through registers beside the table: with whole rows of scores on chip
that takes eight warps instead of four, in heads of more than 64 tiles of 32 keys instead of 64. In both
kernels of the backward pass, which have no registers to spare, it would be the same, so training keeps the
pass. And where heads are padded for PyTorch's fused attention, in 16 bits most of them, there is no attention
of ours to rotate in. So by its bytes it is the slowest of the three. That is predicted; which is the fastest,
and of how many rows, waits for a figure (`bench/gpu/models.py` times all three).

Rotation has no matrix products, so nothing for PyTorch's FLOP counter but the product of `rotated_linear` and
those of `rotated_attention`.

Numbers: float32, rounded once; in the epilogue the product is not rounded before it is rotated, so that
results are at least as exact as those of the pass. In attention queries and keys are rounded behind their
rotation as the pass rounds them, since in 16 bits tensor cores take no more; the sums of scores are made in
another order. Deterministic: a sum is made by one program in one order; no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _arguments, launching, library
from vtp_kernels._tiles import Pairs, join_pairs, load_pairs, load_sines, rotate_pairs
from vtp_kernels.compact_linear import Rotation, rotated_product, takes_own_product
from vtp_kernels.launching import Config, Variant, cdiv, choice, launch, tl, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.ragged_attention import (
    WIDEST_ROTATED,
    attend,
    check_attention,
    forward_flops,
    ragged_attention_ref,
)
from vtp_kernels.rows import clear_padding, empty_rows_like, padded_width, with_padded_rows

# ------------------------------------------------------------------------------------------------ reference


def rotate_heads_ref(
    qkv: Tensor, rope: Tensor, key_widths: Sequence[int], prefix_tokens: int, rotate_half: bool
) -> Tensor:
    """The definition of `rotate_heads` in plain PyTorch, for autograd to differentiate."""
    H, d = len(key_widths), key_widths[0]
    sin, cos = rope.chunk(2, dim=-1)
    heads = qkv[..., : 2 * H * d].unflatten(-1, (2, H, d)).movedim(-4, -2)  # [..., 2, H, N, d]
    x = heads[..., prefix_tokens:, :]
    rotated = (x * cos + _turned(x, rotate_half) * sin).to(qkv.dtype)
    heads = torch.cat([heads[..., :prefix_tokens, :], rotated], dim=-2).movedim(-2, -4)
    return torch.cat([heads.flatten(-3), qkv[..., 2 * H * d :]], dim=-1)


def rotated_attention_ref(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, rope: Tensor,
    prefix_tokens: int, rotate_half: bool,
) -> Tensor:  # fmt: skip
    """The definition of `rotated_attention` in plain PyTorch."""
    rotated = rotate_heads_ref(qkv, rope, key_widths, prefix_tokens, rotate_half)
    return ragged_attention_ref(rotated, key_widths, value_widths, scale)


def _turned(x: Tensor, rotate_half: bool) -> Tensor:
    """x [..., d] with -x_2 in place of the first number of each pair and x_1 in place of the second."""
    if rotate_half:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


# -------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _store_pairs(p_row, m_row, pairs, PAIRS: tl.constexpr):
    """What `load_pairs` loads."""
    b_first, b_second = pairs
    if PAIRS.HALVES:
        o_pair = tl.arange(0, PAIRS.BLOCK)[None, :]
        m_tile = m_row & (o_pair < PAIRS.COUNT)
        tl.store(p_row + o_pair, b_first.to(p_row.dtype.element_ty), mask=m_tile)
        tl.store(p_row + PAIRS.COUNT + o_pair, b_second.to(p_row.dtype.element_ty), mask=m_tile)
    else:
        o_d = tl.arange(0, 2 * PAIRS.BLOCK)[None, :]
        b_tile = join_pairs(b_first, b_second)
        tl.store(p_row + o_d, b_tile.to(p_row.dtype.element_ty), mask=m_row & (o_d < 2 * PAIRS.COUNT))


@triton.jit(
    do_not_specialize=[
        "N", "H", "width", "prefix_tokens", "first", "table_rows", "stride_source", "stride_target",
    ]
)  # fmt: skip
def _rotate_heads_kernel(
    source, rope, target, N, H, width, prefix_tokens, first, table_rows, stride_source, stride_target,
    COUNT: tl.constexpr, HALVES: tl.constexpr, ADJOINT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Queries and keys of HEADS heads, or the next COLUMNS columns of values, of BLOCK_M tokens.

    Without target queries and keys are rotated where they are: a program loads what it overwrites, and nobody
    else does. first: the token with which tiles begin, without target the first that is rotated.
    table_rows: how many rows of rope a head has to itself, 0 where all share one table.
    """
    stride_source, stride_target = stride_source // 8 * 8, stride_target // 8 * 8  # rows are padded
    COPY: tl.constexpr = target is not None
    PAIRS: tl.constexpr = Pairs(COUNT, BLOCK_P, HALVES)
    d: tl.constexpr = 2 * COUNT
    groups = tl.cdiv(H, HEADS)
    units = groups
    if COPY:
        units += tl.cdiv((width + 7) // 8 * 8 - 2 * H * d, COLUMNS)
    tiles = tl.cdiv(N - first, BLOCK_M)
    i_program = tl.program_id(0)
    i_unit, i_tile, i_image = i_program % units, i_program // units % tiles, i_program // units // tiles
    o_n = first + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (i_image.to(tl.int64) * N + o_n)[:, None]
    m_row = o_n[:, None] < N
    m_rotated = m_row & (o_n[:, None] >= prefix_tokens)
    p_row = source + row * stride_source
    if COPY:
        p_target = target + row * stride_target
    if i_unit < groups:
        for i in range(i_unit * HEADS, tl.minimum(i_unit * HEADS + HEADS, H)):
            # Both loads stand before a store, as the compiler moves none past another to the same memory.
            p_query, p_key = p_row + i * d, p_row + (H + i) * d
            query, key = load_pairs(p_query, m_row, PAIRS), load_pairs(p_key, m_row, PAIRS)
            table = load_sines(rope, i, o_n, m_rotated, prefix_tokens, table_rows, PAIRS)
            query = rotate_pairs(query, table, m_rotated, ADJOINT)
            key = rotate_pairs(key, table, m_rotated, ADJOINT)
            if COPY:
                p_query, p_key = p_target + i * d, p_target + (H + i) * d
            _store_pairs(p_query, m_row, query, PAIRS)
            _store_pairs(p_key, m_row, key, PAIRS)
    elif COPY:
        o_c = 2 * H * d + (i_unit - groups) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        m_tile = m_row & (o_c < (width + 7) // 8 * 8)
        b_tile = tl.load(p_row + o_c, mask=m_tile, other=0.0)
        b_tile = tl.where(o_c < width, b_tile, tl.zeros_like(b_tile))
        tl.store(p_target + o_c, b_tile, mask=m_tile)


@triton.jit(do_not_specialize=["B", "N", "H", "prefix_tokens", "stride_dout", "stride_qkv"])
def _rotate_heads_drope_kernel(
    dout, qkv, drope, B, N, H, prefix_tokens, stride_dout, stride_qkv,
    COUNT: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """drope [H, N - prefix_tokens, 2 d]: BLOCK_M tokens of one head, summed over images, query and key."""
    stride_dout, stride_qkv = stride_dout // 8 * 8, stride_qkv // 8 * 8
    PAIRS: tl.constexpr = Pairs(COUNT, BLOCK_P, HALVES)
    d: tl.constexpr = 2 * COUNT
    tokens = N - prefix_tokens
    tiles = tl.cdiv(tokens, BLOCK_M)
    head, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_n = prefix_tokens + i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_n[:, None] < N
    b_sin_first = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    b_sin_second = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    b_cos_first = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    b_cos_second = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    for i in range(2 * B):  # of each image the query, then the key
        row = (tl.cast(i // 2, tl.int64) * N + o_n)[:, None]
        column = (i % 2 * H + head) * d
        b_g_first, b_g_second = load_pairs(dout + row * stride_dout + column, m_row, PAIRS)
        b_first, b_second = load_pairs(qkv + row * stride_qkv + column, m_row, PAIRS)
        b_sin_first -= b_g_first * b_second
        b_sin_second += b_g_second * b_first
        b_cos_first += b_g_first * b_first
        b_cos_second += b_g_second * b_second
    row = (head.to(tl.int64) * tokens + (o_n - prefix_tokens))[:, None]
    p_row = drope + row * (2 * d)
    _store_pairs(p_row, m_row, (b_sin_first, b_sin_second), PAIRS)
    _store_pairs(p_row + d, m_row, (b_cos_first, b_cos_second), PAIRS)


# --------------------------------------------------------------------------------------------------- tables


# By the pairs of a head, rounded up to a power of two: four a thread, in 16 bits whole 16 bytes where pairs
# are neighbours, and two times 8 bytes where they are in halves. With eight some registers spill on sm_100,
# with four those of the narrowest heads.
# Two heads a program, which find a table that they share in L1 the second time; more would leave too few
# programs for one image.
TILES = {
    8: Config.of(4, 1, BLOCK_M=32, BLOCK_P=8, HEADS=2, COLUMNS=64),
    16: Config.of(4, 1, BLOCK_M=32, BLOCK_P=16, HEADS=2, COLUMNS=64),
    32: Config.of(4, 1, BLOCK_M=16, BLOCK_P=32, HEADS=2, COLUMNS=128),
    64: Config.of(4, 1, BLOCK_M=8, BLOCK_P=64, HEADS=2, COLUMNS=256),
    128: Config.of(4, 1, BLOCK_M=4, BLOCK_P=128, HEADS=2, COLUMNS=512),
}
DROPE_TILES = {block: Config.of(4, 1, BLOCK_M=512 // block, BLOCK_P=block) for block in TILES}
# What `launching.forced_path` can force: in `rotated_linear`, where its product has an epilogue; and whether
# attention is to rotate, for those who may leave it to `rotated_attention`.
_ROTATION = choice("rotated_linear", "epilogue", "pass", "attention")


# ------------------------------------------------------------------------------------------------- launchers


def _config(table: dict[int, Config], rope: Tensor) -> tuple[Config, int]:
    """The entry for the heads of rope, and how many pairs they have."""
    pairs = rope.shape[-1] // 4
    return table[next(block for block in table if block >= pairs)], pairs


def _launch_rotation(
    source: Tensor, rope: Tensor, target: Tensor | None, N: int, heads: int, prefix_tokens: int,
    rotate_half: bool, adjoint: bool = False,
) -> None:  # fmt: skip
    """Fill target [B * N, columns] with source, as wide, rotated; or without it rotate source where it is.

    Both have padded rows; rope is contiguous.
    """
    config, pairs = _config(TILES, rope)
    in_place, width = target is None, source.shape[1]
    first = prefix_tokens if in_place else 0
    units = cdiv(heads, config.blocks["HEADS"])
    if not in_place:
        units += cdiv(padded_width(width) - 4 * heads * pairs, config.blocks["COLUMNS"])
    launch(
        _rotate_heads_kernel,
        (len(source) // N * cdiv(N - first, config.blocks["BLOCK_M"]) * units,),
        dict(
            source=source, rope=rope, target=target, N=N, H=heads, width=width, prefix_tokens=prefix_tokens,
            first=first, table_rows=rope.shape[1] if rope.ndim == 3 else 0,
            stride_source=source.stride(0), stride_target=0 if target is None else target.stride(0),
        ),
        config,
        COUNT=pairs,
        HALVES=rotate_half,
        ADJOINT=adjoint,
    )  # fmt: skip


def _launch_drope(
    dout: Tensor, qkv: Tensor, rope: Tensor, N: int, heads: int, prefix_tokens: int, rotate_half: bool
) -> Tensor:
    """drope of each head, float32 [heads, N - prefix_tokens, 2 d]; dout and qkv have padded rows."""
    config, pairs = _config(DROPE_TILES, rope)
    tokens = N - prefix_tokens
    drope = torch.empty((heads, tokens, 4 * pairs), dtype=torch.float32, device=dout.device)
    launch(
        _rotate_heads_drope_kernel,
        (heads * cdiv(tokens, config.blocks["BLOCK_M"]),),
        dict(
            dout=dout, qkv=qkv, drope=drope, B=len(qkv) // N, N=N, H=heads, prefix_tokens=prefix_tokens,
            stride_dout=dout.stride(0), stride_qkv=qkv.stride(0),
        ),
        config,
        COUNT=pairs,
        HALVES=rotate_half,
    )  # fmt: skip
    return drope


def _table(rope: Tensor, qkv: Tensor) -> Tensor:
    """rope as the kernels take it: contiguous, from 16 bytes on, in the dtype of qkv or float32."""
    rope = (rope if rope.dtype == qkv.dtype else rope.to(torch.float32)).contiguous()
    return rope if rope.data_ptr() % 16 == 0 else rope.clone()


def _is_for_kernels(qkv: Tensor, rope: Tensor) -> bool:
    has_room = rope.shape[-1] <= 4 * max(TILES)
    return qkv.dtype != torch.float64 and has_room and 0 not in (qkv.numel(), rope.numel())


def _rotated_copy(
    source: Tensor, rope: Tensor, heads: int, prefix_tokens: int, rotate_half: bool, adjoint: bool = False
) -> Tensor:
    out, rows, rope = empty_rows_like(source, *source.shape), with_padded_rows(source), _table(rope, source)
    target = out.as_strided(rows.shape, (out.stride(-2), 1))
    _launch_rotation(rows, rope, target, source.shape[-2], heads, prefix_tokens, rotate_half, adjoint)
    return out


def _forward_triton(qkv: Tensor, rope: Tensor, heads: int, prefix_tokens: int, rotate_half: bool) -> Tensor:
    if not _is_for_kernels(qkv, rope):
        return _forward_plain(qkv, rope, heads, prefix_tokens, rotate_half)
    return _rotated_copy(qkv, rope, heads, prefix_tokens, rotate_half)


def _rotate_triton(qkv: Tensor, rope: Tensor, heads: int, prefix_tokens: int, rotate_half: bool) -> None:
    if not _is_for_kernels(qkv, rope):
        return _rotate_plain(qkv, rope, heads, prefix_tokens, rotate_half)
    rope, rows = _table(rope, qkv), with_padded_rows(qkv)
    keys = rows[:, : heads * rope.shape[-1]]  # and queries: values are not touched
    _launch_rotation(keys, rope, None, qkv.shape[-2], heads, prefix_tokens, rotate_half)
    if rows.data_ptr() != qkv.data_ptr():
        qkv.copy_(rows.view(qkv.shape))


def _linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, rope: Tensor, heads: int, prefix_tokens: int,
    rotate_half: bool,
) -> Tensor:  # fmt: skip
    rows, tokens = math.prod(x.shape[:-1]), x.shape[-2]
    is_for_kernels = x.dtype != torch.float64 and 0 not in (x.numel(), rope.numel())
    if is_for_kernels and takes_own_product(rows) and _ROTATION.takes("epilogue", True):
        rotation = Rotation(_table(rope, x), heads, tokens, prefix_tokens, rotate_half)
        return rotated_product(x, weight, bias, rotation)
    qkv, _ = torch.ops.vtp.compact_linear(x, weight, bias, False, None, False)
    _rotate_triton(qkv, rope, heads, prefix_tokens, rotate_half)
    return qkv


def _attention_triton(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, rope: Tensor,
    prefix_tokens: int, rotate_half: bool,
) -> Tensor:  # fmt: skip
    if not _is_for_kernels(qkv, rope) or key_widths[0] > WIDEST_ROTATED:
        return _attention_plain(qkv, key_widths, value_widths, scale, rope, prefix_tokens, rotate_half)
    table = _table(rope, qkv)
    out, _ = attend(qkv, key_widths, value_widths, scale, False, table, prefix_tokens, rotate_half)
    return out


def rotates_in_attention() -> bool:
    """Whether whoever has the choice is to leave rotation to `rotated_attention`: only as `forced_path` says.

    It is predicted to be slower, and not measured.
    """
    return _ROTATION.takes("attention", False)


def _backward_triton(
    dout: Tensor, rope: Tensor, qkv: Tensor | None, heads: int, prefix_tokens: int, rotate_half: bool,
    need_qkv: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if not _is_for_kernels(dout, rope):
        return _backward_plain(dout, rope, qkv, heads, prefix_tokens, rotate_half, need_qkv)
    dqkv = drope = None
    if need_qkv:
        dqkv = _rotated_copy(dout, rope, heads, prefix_tokens, rotate_half, adjoint=True)
    if qkv is not None:
        g, x = with_padded_rows(dout), with_padded_rows(qkv)
        drope = _launch_drope(g, x, rope, dout.shape[-2], heads, prefix_tokens, rotate_half)
        drope = (drope.sum(0) if rope.ndim == 2 else drope).to(rope.dtype)
    return library.empty_for_none(dout, dqkv, drope)


def variants(target: str) -> Iterator[Variant]:
    """The compilations that `rotate_heads` asks for on `target` in usual models: those of `_COMPILED`.

    Others are the same kernels with another value of one constant, the pairs of a head.
    """
    with launching.recording("rotary", target) as found:
        for dtype, table, d in _COMPILED:
            _record(dtype, table, d)
    yield from found.values()


# Dtypes of qkv and of rope, and the width of a head: 64 in most models, 128 in the largest.
_COMPILED = [
    (torch.bfloat16, torch.float32, 64),
    (torch.bfloat16, torch.float32, 128),
    (torch.bfloat16, torch.bfloat16, 64),
    (torch.float16, torch.float32, 64),
    (torch.float32, torch.float32, 64),
]


def _record(dtype: torch.dtype, table: torch.dtype, d: int) -> None:
    """Ask for all that qkv and rope of these dtypes and heads of d can lead to."""
    qkv, rope = (torch.empty(shape, device="meta") for shape in ((2, 20, 4 * d + 64), (19, 2 * d)))
    qkv, rope = qkv.to(dtype), rope.to(table)
    for rotate_half in (False, True):
        _forward_triton(qkv, rope, 2, 1, rotate_half)
        _rotate_triton(qkv, rope, 2, 1, rotate_half)
        _backward_triton(qkv, rope, qkv, 2, 1, rotate_half, True)


# ---------------------------------------------------------------------------------- plain PyTorch, any device


def _heads(qkv: Tensor, rope: Tensor, heads: int, prefix_tokens: int) -> Tensor:
    """The queries and keys that are rotated, as a view [..., N - P, 2, H, d] of qkv."""
    d = rope.shape[-1] // 2
    return qkv[..., prefix_tokens:, : 2 * heads * d].unflatten(-1, (2, heads, d))


def _tables(rope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sines and cosines [N - P, 1, H or 1, d], in `dtype` or a wider one, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(dtype, torch.float32), rope.dtype)
    table = rope.unsqueeze(-2) if rope.ndim == 2 else rope.movedim(0, -2)
    sin, cos = table.unsqueeze(-3).to(wide).chunk(2, dim=-1)
    return sin, cos


def _rotate_plain(qkv: Tensor, rope: Tensor, heads: int, prefix_tokens: int, rotate_half: bool) -> None:
    """Rotate queries and keys where they are."""
    sin, cos = _tables(rope, qkv.dtype)
    x = _heads(qkv, rope, heads, prefix_tokens)
    wide = x.to(sin.dtype)
    x.copy_(wide * cos + _turned(wide, rotate_half) * sin)


def _copied(qkv: Tensor) -> Tensor:
    """qkv in padded rows of its own."""
    out = empty_rows_like(qkv, *qkv.shape)
    clear_padding(out)
    return out.copy_(qkv)


def _forward_plain(qkv: Tensor, rope: Tensor, heads: int, prefix_tokens: int, rotate_half: bool) -> Tensor:
    out = _copied(qkv)
    _rotate_plain(out, rope, heads, prefix_tokens, rotate_half)
    return out


def _linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, rope: Tensor, heads: int, prefix_tokens: int,
    rotate_half: bool,
) -> Tensor:  # fmt: skip
    qkv, _ = torch.ops.vtp.compact_linear(x, weight, bias, False, None, False)
    _rotate_plain(qkv, rope, heads, prefix_tokens, rotate_half)
    return qkv


def _attention_plain(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, rope: Tensor,
    prefix_tokens: int, rotate_half: bool,
) -> Tensor:  # fmt: skip
    qkv = torch.ops.vtp.rotate_heads(qkv, rope, len(key_widths), prefix_tokens, rotate_half)
    out, _ = torch.ops.vtp.ragged_attention(qkv, key_widths, value_widths, scale, False)
    return out


def _backward_plain(
    dout: Tensor, rope: Tensor, qkv: Tensor | None, heads: int, prefix_tokens: int, rotate_half: bool,
    need_qkv: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sin, cos = _tables(rope, dout.dtype)
    g = _heads(dout, rope, heads, prefix_tokens).to(sin.dtype)
    dqkv = drope = None
    if need_qkv:
        dqkv = _copied(dout)
        _heads(dqkv, rope, heads, prefix_tokens).copy_(g * cos - _turned(g * sin, rotate_half))
    if qkv is not None:
        x = _heads(qkv, rope, heads, prefix_tokens).to(sin.dtype)
        drope = torch.cat([g * _turned(x, rotate_half), g * x], dim=-1)  # [..., N - P, 2, H, 2 d]
        drope = drope.sum(dim=(*range(drope.ndim - 4), -3)).movedim(-2, 0)
        drope = (drope.sum(0) if rope.ndim == 2 else drope).to(rope.dtype).contiguous()
    return library.empty_for_none(dout, dqkv, drope)


# ---------------------------------------------------------------------------------------------- registration


def _forward_fake(qkv, rope, heads, prefix_tokens, rotate_half):
    return empty_rows_like(qkv, *qkv.shape)


def _linear_fake(x, weight, bias, rope, heads, prefix_tokens, rotate_half):
    return empty_rows_like(x, *x.shape[:-1], weight.shape[0])


def _attention_fake(qkv, key_widths, value_widths, scale, rope, prefix_tokens, rotate_half):
    return empty_rows_like(qkv, *qkv.shape[:-1], sum(value_widths))


def _backward_fake(dout, rope, qkv, heads, prefix_tokens, rotate_half, need_qkv):
    dqkv = empty_rows_like(dout, *dout.shape) if need_qkv else None
    return library.empty_for_none(dout, dqkv, None if qkv is None else rope.new_empty(rope.shape))


def _setup_context(ctx, inputs, output):
    qkv, rope, *ctx.arguments = inputs
    ctx.save_for_backward(rope, qkv if ctx.needs_input_grad[1] else None)


def _backward(ctx, dout):
    need_qkv, need_rope, *_ = ctx.needs_input_grad
    dqkv, drope = torch.ops.vtp.rotate_heads_backward(dout, *ctx.saved_tensors, *ctx.arguments, need_qkv)
    return dqkv if need_qkv else None, drope if need_rope else None, None, None, None


define(
    "rotate_heads(Tensor qkv, Tensor rope, int heads, int prefix_tokens, bool rotate_half) -> Tensor",
    plain=_forward_plain,
    triton=_forward_triton,
    fake=_forward_fake,
)
define(
    "rotate_heads_(Tensor(a!) qkv, Tensor rope, int heads, int prefix_tokens, bool rotate_half) -> ()",
    plain=_rotate_plain,
    triton=_rotate_triton,
    fake=lambda *_: None,
)
define(
    "rotated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor rope, int heads, int prefix_tokens,"
    " bool rotate_half) -> Tensor",
    plain=_linear_plain,
    triton=_linear_triton,
    fake=_linear_fake,
)
define(
    "rotated_attention(Tensor qkv, int[] key_widths, int[] value_widths, float scale, Tensor rope,"
    " int prefix_tokens, bool rotate_half) -> Tensor",
    plain=_attention_plain,
    triton=_attention_triton,
    fake=_attention_fake,
)
define(
    "rotate_heads_backward(Tensor dout, Tensor rope, Tensor? qkv, int heads, int prefix_tokens,"
    " bool rotate_half, bool need_qkv) -> (Tensor, Tensor)",
    plain=_backward_plain,
    triton=_backward_triton,
    fake=_backward_fake,
)
define_gradient("rotate_heads", by="rotate_heads_backward", backward=_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.vtp.rotated_linear)
def _linear_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.vtp.rotated_attention)
def _attention_flops(qkv_shape, key_widths, value_widths, *_, out_shape=None, **__) -> int:
    return forward_flops(qkv_shape, key_widths, value_widths)


# ------------------------------------------------------------------------------------------ public functions


def rotate_heads(
    qkv: Tensor, rope: Tensor, key_widths: Sequence[int], prefix_tokens: int, rotate_half: bool
) -> Tensor:
    """Queries and keys with rotary embedding, `x * cos + rot(x) * sin`, in a copy of packed qkv.

    Args:
        qkv: [..., N, 2 * sum(key_widths) + V]: the queries of all heads side by side, their keys, then V
            columns of values, 0 or more. float32, bfloat16, float16 or float64; any strides. Rows that start
            at 16 bytes, with room up to a multiple of 8 elements, are read where they are, others are copied
            first. Autocast leaves it.
        rope: [N - prefix_tokens, 2 * d] or, with a table for each head, [H, N - prefix_tokens, 2 * d]: d
            sines and then d cosines, any numbers, in one of the dtypes above, as timm's `Eva` hands them to
            its blocks.
        key_widths: width of each head's query and of its key, H integers, all the same even d of 2 or more.
        prefix_tokens: how many tokens in front, class token and registers, are left as they are.
        rotate_half: whether pairs are columns i and i + d / 2 of a head, not 2 * i and 2 * i + 1.

    Returns:
        The shape and dtype of qkv; its rows are padded to a multiple of 8 elements. There are gradients with
        respect to qkv and rope, and no second derivative.

    Raises:
        TypeError: an argument is not of the type, or a tensor not of a dtype above.
        ValueError: the shapes are not those of key_widths and prefix_tokens, key widths differ or are odd, or
            the tensors are on two devices.
    """
    _validate(qkv, rope, key_widths, prefix_tokens, rotate_half)
    return torch.ops.vtp.rotate_heads(qkv, rope, len(key_widths), prefix_tokens, rotate_half)


def rotate_heads_(
    qkv: Tensor, rope: Tensor, key_widths: Sequence[int], prefix_tokens: int, rotate_half: bool
) -> Tensor:
    """`rotate_heads` in place, for inference: only queries and keys are read and written, values are not.

    Args:
        qkv: as `rotate_heads` takes it, but no two of its elements at one address. Rows that start at 16
            bytes, with room up to a multiple of 8 elements, are rotated where they are, others in a copy that
            is written back.
        rope, key_widths, prefix_tokens, rotate_half: as `rotate_heads` takes them.

    Returns:
        qkv itself. `torch.compile` and `torch.export` know that it is written.

    Raises:
        TypeError, ValueError: as `rotate_heads`, and where elements of qkv share an address.
        RuntimeError: a gradient is asked for; take `rotate_heads`.
    """
    _validate(qkv, rope, key_widths, prefix_tokens, rotate_half)
    _arguments.check_written("qkv", qkv)
    for name, tensor in (("qkv", qkv), ("rope", rope)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(f"{name}: needs a gradient, and rotate_heads_ has none: use rotate_heads")
    torch.ops.vtp.rotate_heads_(qkv, rope, len(key_widths), prefix_tokens, rotate_half)
    _arguments.note_written(qkv)
    return qkv


def rotated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rope: Tensor, key_widths: Sequence[int],
    prefix_tokens: int, rotate_half: bool,
) -> Tensor:  # fmt: skip
    """Queries and keys with rotary embedding, and values, for inference: `rotate_heads(x @ weight.T + bias)`.

    Args:
        x: [..., N, K], float32, bfloat16, float16 or float64; any strides. Under autocast x, weight and bias
            are cast to its dtype, as `torch.nn.functional.linear` casts them.
        weight: [2 * sum(key_widths) + V, K], in the dtype of x.
        bias: as many as weight has rows, in the dtype of x, or None.
        rope, key_widths, prefix_tokens, rotate_half: as `rotate_heads` takes them.

    Returns:
        [..., N, 2 * sum(key_widths) + V] in the dtype of x; its rows are padded to a multiple of 8 elements.
        With few rows of x the float32 sums of the product are rotated and then rounded, with many their
        roundings.

    Raises:
        TypeError: an argument is not of the type, or a tensor not of a dtype above.
        ValueError: the shapes do not go together, key widths differ or are odd, or the tensors are on two
            devices.
        RuntimeError: a gradient is asked for; take `compact_linear` and `rotate_heads`.
    """
    x, weight, bias = _arguments.as_autocast_casts(x, weight, bias)
    tensors = _arguments.check_tensors({"x": x, "weight": weight}, {"bias": bias})
    _arguments.check_dtypes(tensors)
    _arguments.check_inputs(x, weight)
    if x.ndim < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., N, {weight.shape[1]}]")
    if bias is not None:
        _arguments.check_shape("bias", bias, (len(weight),))
    _arguments.check_tensors({"x": x, "rope": rope})
    _validate_rotation(
        (*x.shape[:-1], len(weight)), "x @ weight.T", rope, key_widths, prefix_tokens, rotate_half
    )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("rope", rope)):
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: needs a gradient, and rotated_linear has none: use compact_linear and rotate_heads"
            )
    return torch.ops.vtp.rotated_linear(x, weight, bias, rope, len(key_widths), prefix_tokens, rotate_half)


def rotated_attention(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, rope: Tensor,
    prefix_tokens: int, rotate_half: bool,
) -> Tensor:  # fmt: skip
    """`ragged_attention(rotate_heads(qkv))` for inference, rotated as attention loads queries and keys.

    Args:
        qkv, value_widths, scale: as `ragged_attention` takes them. Under autocast qkv is cast to its dtype.
        key_widths, rope, prefix_tokens, rotate_half: as `rotate_heads` takes them.

    Returns:
        [B, N, sum(value_widths)] in the dtype of qkv; its rows are padded to a multiple of 8 elements.
        Queries and keys are rounded to that dtype once, behind their rotation in float32, as `rotate_heads`
        rounds them. Heads wider than 128 are rotated by that op.

    Raises:
        TypeError: an argument is not of the type, or a tensor not of a dtype that these ops take.
        ValueError: the shapes do not go together, key widths differ or are odd, a value width is not from 1
            to 256, scale is not finite, or the tensors are on two devices.
        RuntimeError: a gradient is asked for; take `rotate_heads` and `ragged_attention`.
    """
    (qkv,) = _arguments.as_autocast_casts(qkv)
    _validate(qkv, rope, key_widths, prefix_tokens, rotate_half)
    check_attention(qkv, key_widths, value_widths, scale)
    for name, tensor in (("qkv", qkv), ("rope", rope)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: needs a gradient, and rotated_attention has none: use rotate_heads and"
                " ragged_attention"
            )
    return torch.ops.vtp.rotated_attention(
        qkv, key_widths, value_widths, float(scale), rope, prefix_tokens, rotate_half
    )


def _validate(
    qkv: Tensor, rope: Tensor, key_widths: Sequence[int], prefix_tokens: int, rotate_half: bool
) -> None:
    _arguments.check_tensors({"qkv": qkv, "rope": rope})
    _validate_rotation(qkv.shape, "qkv", rope, key_widths, prefix_tokens, rotate_half)


def _validate_rotation(
    shape: Sequence[int], name: str, rope: Tensor, key_widths: Sequence[int], prefix_tokens: int,
    rotate_half: bool,
) -> None:  # fmt: skip
    """Check what is to be rotated of a qkv of this shape, which comes from the argument `name`."""
    _arguments.check_tensors({"rope": rope})  # its dtype
    if not isinstance(key_widths, (tuple, list)) or not all(isinstance(w, int) for w in key_widths):
        raise TypeError(f"key_widths: got {key_widths!r}, expected a tuple of integers")
    if len(set(key_widths)) != 1 or key_widths[0] < 2 or key_widths[0] % 2:
        raise ValueError(
            f"key_widths: got {tuple(key_widths)}, expected one even width for all heads: they are rotated in"
            " pairs, by one embedding"
        )
    for argument, value, kind in (("prefix_tokens", prefix_tokens, int), ("rotate_half", rotate_half, bool)):
        if not isinstance(value, kind):
            article = "an" if kind is int else "a"
            raise TypeError(f"{argument}: got {value!r}, expected {article} {kind.__name__}")
    H, d = len(key_widths), key_widths[0]
    if len(shape) < 2 or shape[-1] < 2 * H * d:
        raise ValueError(
            f"{name}: got shape {tuple(shape)}, expected [..., N, columns] with {H * d} columns of queries,"
            f" as many of keys, and those of values behind them"
        )
    tokens = shape[-2] - prefix_tokens
    if not 0 <= prefix_tokens <= shape[-2]:
        raise ValueError(
            f"prefix_tokens: got {prefix_tokens}, expected 0 to {shape[-2]}, the tokens of {name}"
        )
    if rope.ndim not in (2, 3) or rope.shape != (*(H,) * (rope.ndim - 2), tokens, 2 * d):
        raise ValueError(
            f"rope: got shape {tuple(rope.shape)}, expected [{tokens}, {2 * d}], or [{H}, {tokens}, {2 * d}]"
            f" with a table for each head: sines and cosines for the tokens behind {prefix_tokens} in front"
        )
