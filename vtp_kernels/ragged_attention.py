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

What is computed is near what is kept. Rows and keys are rounded up to 16: 197 tokens are 208, in row tiles of
64 + 64 + 64 + 16 and pieces of 128 + 64 + 16 keys. A tile of 16 rows for the last 5 tokens costs less than
tiles of 16 throughout, which would load all keys and values 13 times instead of 4. Values are taken in 32
columns at a time, and over tiles of keys with a rest of 16. They are loaded 16 bytes at a time, from the
last multiple of 8 elements before a head's first column; what comes along of the neighbour is dropped at the
store, or masked where columns are summed.

Keys that are all as wide as one another are one product, of a width known to the compiler. Else queries and
keys are taken like values, 16 columns at a time: heads of 16, 16 and 8 cost three blocks, not three times the
power of two that the widest fills. One launch does all heads, as there may be few programs; and one
compilation all widths. The backward kernels hold a head's queries and keys, in up to five blocks, and skip
the products of those that it does not have. Queries start at 16 bytes, keys and values do if K is a multiple
of 8; where it is not, these are loaded element by element.

Deterministic: each number is written by one program, in one order; there are no atomics.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vtp_kernels import _arguments, launching
from vtp_kernels._tiles import Matrix, load_tile
from vtp_kernels.launching import Config, Variant, choice, launch, tl, triton
from vtp_kernels.library import define, define_gradient
from vtp_kernels.rows import clear_padding, empty_rows_like, with_padded_rows

# ------------------------------------------------------------------------------------------------ reference


def ragged_attention_ref(
    qkv: Tensor, key_widths: int | Sequence[int], value_widths: Sequence[int], scale: float
) -> Tensor:
    """The definition of `ragged_attention` in plain PyTorch, for autograd to differentiate."""
    heads = zip(*_split(qkv, _each(key_widths, value_widths), value_widths), strict=True)
    weights = (((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1) @ v for q, k, v in heads)
    return torch.cat(list(weights), dim=-1)


# -------------------------------------------------------------------------------------------------- kernels


class _Head(NamedTuple):
    """Constants of queries and keys in device code, as one constexpr."""

    DIM: Any  # their width in every head; None: each head has its own, and they are taken in blocks
    BLOCK: Any  # DIM rounded up to a power of two, 16 at least; or columns of a block
    BLOCKS: Any  # of the widest head, where blocks are held
    ALIGNED: Any  # in blocks: whether keys and values start at 16 bytes where a row does
    PRECISION: Any


class _Sizes(NamedTuple):
    """Tokens, heads, columns of values and columns of queries of one image in device code."""

    N: Any
    H: Any
    V: Any
    K: Any


class _Rows(NamedTuple):
    """The rows of one image in device code: their pointer, and how far they are apart."""

    p: Any
    stride: Any


class _Unit(NamedTuple):
    """What a program works on in device code: columns [begin, end) of values, out of those of one head.

    key_begin, key_end: the columns of its query and key among all, unread where HEAD.DIM says it.
    """

    head: Any
    begin: Any
    end: Any
    head_begin: Any
    head_end: Any
    key_begin: Any
    key_end: Any


@triton.jit
def _program(table, B, N, BLOCK_M: tl.constexpr):
    """What a program does: its row of the table, its image, its first token, and if it has BLOCK_M of them.

    Tokens that fill no tile of BLOCK_M are shared out in tiles of 16. The rows of the table are the slowest
    index: the heads with the most work start first.
    """
    rows = tl.cdiv(N, 16) * 16
    full = rows // BLOCK_M
    tiles = full + rows % BLOCK_M // 16
    i_program = tl.program_id(0)
    i_tile = i_program % tiles
    first = tl.minimum(i_tile, full) * BLOCK_M + tl.maximum(i_tile - full, 0) * 16
    return table + i_program // (tiles * B) * 7, (i_program // tiles % B).to(tl.int64), first, i_tile < full


@triton.jit
def _key_columns(p_unit, HEAD: tl.constexpr):
    """Where the query and key of the head of a unit begin and end, if its row of the table has to say it.

    Else 0, which nobody reads: Triton 3.6 returns no None.
    """
    if HEAD.DIM is None:
        return tl.load(p_unit + 5), tl.load(p_unit + 6)
    else:
        return 0, 0


@triton.jit
def _queries(qkv, unit, sizes, HEAD: tl.constexpr):
    """The queries of one head as a matrix; in blocks, of all heads, with the columns that may be loaded."""
    if HEAD.DIM is None:
        return Matrix(qkv.p, sizes.N, (unit.key_end + 7) // 8 * 8, qkv.stride)
    else:
        return Matrix(qkv.p + unit.head * HEAD.DIM, sizes.N, HEAD.DIM, qkv.stride)


@triton.jit
def _keys(qkv, unit, sizes, HEAD: tl.constexpr):
    """The same of keys."""
    if HEAD.DIM is None:
        return Matrix(qkv.p + sizes.K, sizes.N, _readable(unit.key_end, HEAD), qkv.stride)
    else:
        return Matrix(qkv.p + (sizes.H + unit.head) * HEAD.DIM, sizes.N, HEAD.DIM, qkv.stride)


@triton.jit
def _before_values(sizes, HEAD: tl.constexpr):
    """Columns of queries and keys."""
    if HEAD.DIM is None:
        return 2 * sizes.K
    else:
        return 2 * sizes.H * HEAD.DIM


@triton.jit
def _load_head(matrix, o_row, HEAD: tl.constexpr, MASK: tl.constexpr):
    """Queries or keys [rows, HEAD.BLOCK] of one head, 0 beyond HEAD.DIM and, if MASK, the last token."""
    o_d = tl.arange(0, HEAD.BLOCK)
    return load_tile(
        matrix.source, o_row, o_d, matrix.rows, HEAD.DIM, matrix.stride, MASK, HEAD.DIM < HEAD.BLOCK
    )


@triton.jit
def _load_own(matrix, o_row, o_column, begin, end, MASK: tl.constexpr):
    """Columns [begin, end) only of what lies in whole 16 bytes around them, 0 elsewhere."""
    b_tile = load_tile(matrix.source, o_row, o_column, matrix.rows, matrix.columns, matrix.stride, MASK, True)
    own = (o_column[None, :] - begin).to(tl.uint32) < (end - begin)
    return tl.where(own, b_tile, tl.zeros_like(b_tile))


@triton.jit
def _readable(end, HEAD: tl.constexpr):
    """The columns of keys or values that may be loaded: whole 16 bytes, where a row of them starts so."""
    if HEAD.DIM is None:
        return (end + 7) // 8 * 8 if HEAD.ALIGNED else end
    else:
        return (end + 7) // 8 * 8 if HEAD.DIM % 4 == 0 else end


@triton.jit
def _store_rows(target, acc, o_row, o_column, begin, end, N, V, padded, stride):
    """acc to columns [begin, end) of rows below N; the head that ends the row writes 0 up to `padded`.

    The columns in whole 16 bytes of the head's own are stored 16 bytes at a time, as the compiler sees that
    their bounds are multiples of 8; those in 16 bytes that two heads share, one by one.
    """
    last = tl.where(end == V, padded, end)
    own = (o_column[None, :] >= begin) & (o_column[None, :] < last)
    whole = (o_column[None, :] >= (begin + 7) // 8 * 8) & (o_column[None, :] < last // 8 * 8)
    acc = tl.where(o_column[None, :] < V, acc, 0.0).to(target.dtype.element_ty)
    p_tile = target + o_row[:, None].to(tl.int64) * stride + o_column[None, :]
    m_row = o_row[:, None] < N
    tl.store(p_tile, acc, mask=m_row & whole)
    tl.store(p_tile, acc, mask=m_row & (own & (whole == 0)))


@triton.jit
def _load_blocks(matrix, o_row, unit, HEAD: tl.constexpr, MASK: tl.constexpr):
    """The queries or keys of one head to be held, as a tuple: of one tile, or of HEAD.BLOCKS blocks.

    What a narrow head lacks of blocks is 0 and not loaded.
    """
    if HEAD.DIM is None:
        b_blocks = ()
        for i in tl.static_range(HEAD.BLOCKS):
            o_c = unit.key_begin // 8 * 8 + i * HEAD.BLOCK + tl.arange(0, HEAD.BLOCK)
            b_block = _load_own(matrix, o_row, o_c, unit.key_begin, unit.key_end, MASK)
            b_blocks = b_blocks + (b_block,)  # noqa: RUF005 (Triton knows no starred tuple)
        return b_blocks
    else:
        return (_load_head(matrix, o_row, HEAD, MASK),)


@triton.jit
def _zero_blocks(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """Accumulators of the gradient of blocks that are held."""
    accs = (tl.zeros((ROWS, HEAD.BLOCK), dtype=tl.float32),)
    if HEAD.DIM is None:
        for _ in tl.static_range(1, HEAD.BLOCKS):
            accs = accs + (tl.zeros((ROWS, HEAD.BLOCK), dtype=tl.float32),)  # noqa: RUF005
    return accs


@triton.jit
def _block_end(i, unit, HEAD: tl.constexpr):
    """End of a loop from i * HEAD.BLOCK in steps of HEAD.BLOCK: once if the head has a block i, else never.

    It is a condition around a product. Triton 3.6 does not compile one that is written `if`.
    """
    return tl.minimum(unit.key_end - unit.key_begin // 8 * 8, (i + 1) * HEAD.BLOCK)


@triton.jit
def _multiply_blocks(b_rows, b_others, unit, HEAD: tl.constexpr):
    """The product of queries and keys that are held, or of keys and queries: [rows, others]."""
    acc = tl.dot(b_rows[0], tl.trans(b_others[0]), input_precision=HEAD.PRECISION)
    if HEAD.DIM is None:
        for i in tl.static_range(1, HEAD.BLOCKS):
            for _ in range(i * HEAD.BLOCK, _block_end(i, unit, HEAD), HEAD.BLOCK):
                acc = tl.dot(b_rows[i], tl.trans(b_others[i]), acc, input_precision=HEAD.PRECISION)
    return acc


@triton.jit
def _add_blocks(accs, b_ds, b_others, unit, HEAD: tl.constexpr):
    """accs + the product of a gradient of scores with the keys or queries that are held, block by block."""
    sums = (tl.dot(b_ds, b_others[0], accs[0], input_precision=HEAD.PRECISION),)
    if HEAD.DIM is None:
        for i in tl.static_range(1, HEAD.BLOCKS):
            acc = accs[i]
            for _ in range(i * HEAD.BLOCK, _block_end(i, unit, HEAD), HEAD.BLOCK):
                acc = tl.dot(b_ds, b_others[i], acc, input_precision=HEAD.PRECISION)
            sums = sums + (acc,)  # noqa: RUF005
    return sums


@triton.jit
def _store_blocks(target, accs, scale, o_row, unit, HEAD: tl.constexpr):
    """The gradient of queries or keys, scaled, to the columns of one head in the rows of a matrix."""
    if HEAD.DIM is None:
        for i in tl.static_range(HEAD.BLOCKS):
            o_c = unit.key_begin // 8 * 8 + i * HEAD.BLOCK + tl.arange(0, HEAD.BLOCK)
            p_tile = target.source + o_row[:, None].to(tl.int64) * target.stride + o_c[None, :]
            own = (o_c[None, :] >= unit.key_begin) & (o_c[None, :] < unit.key_end)
            b_tile = (accs[i] * scale).to(target.source.dtype.element_ty)
            tl.store(p_tile, b_tile, mask=(o_row[:, None] < target.rows) & own)
    else:
        o_d = tl.arange(0, HEAD.BLOCK)
        p_tile = target.source + o_row[:, None].to(tl.int64) * target.stride + o_d[None, :]
        m_tile = (o_row[:, None] < target.rows) & (o_d[None, :] < HEAD.DIM)
        tl.store(p_tile, (accs[0] * scale).to(target.source.dtype.element_ty), mask=m_tile)


@triton.jit
def _multiply_chunks(
    acc, rows, o_row, others, o_other, begin, end,
    MASK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + the product of columns [begin, end) of two matrices, `rows` and `others`, CHUNK at a time.

    For what is not held: heads with keys of their own in the forward pass, values that are too wide. With
    MASK tokens of `others` may be beyond the last.
    """
    for c in range(begin // 8 * 8, end, CHUNK):
        o_c = c + tl.arange(0, CHUNK)
        b_row = _load_own(rows, o_row, o_c, begin, end, False)
        b_other = _load_own(others, o_other, o_c, begin, end, MASK)
        acc = tl.dot(b_row, tl.trans(b_other), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _scores(b_q, queries, keys, o_m, o_n, unit, HEAD: tl.constexpr, MASK: tl.constexpr):
    """Queries at o_m by keys at o_n, [rows, keys], not scaled. b_q: the queries, None if HEAD has no DIM."""
    if HEAD.DIM is None:
        zeros = tl.zeros((o_m.shape[0], o_n.shape[0]), dtype=tl.float32)
        begin, end = unit.key_begin, unit.key_end
        return _multiply_chunks(zeros, queries, o_m, keys, o_n, begin, end, MASK, HEAD.BLOCK, HEAD.PRECISION)
    else:
        b_k = _load_head(keys, o_n, HEAD, MASK)
        return tl.dot(b_q, tl.trans(b_k), input_precision=HEAD.PRECISION)


@triton.jit
def _keys_of_piece(KEYS: tl.constexpr, SIZE: tl.constexpr):
    """The keys of the piece of this size: KEYS is a sum of powers of two, and larger ones come first."""
    return KEYS // (2 * SIZE) * (2 * SIZE) + tl.arange(0, SIZE)


@triton.jit
def _value_columns(
    weights, total, values, out, o_m, column, unit, sizes,
    HEAD: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of out from `column` on, from weights whose rows sum to `total`."""
    N, V, readable = sizes.N, sizes.V, _readable(sizes.V, HEAD)
    o_column = column + tl.arange(0, COLUMNS)
    acc = tl.zeros((o_m.shape[0], COLUMNS), dtype=tl.float32)
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            o_n = _keys_of_piece(KEYS, 256 >> i)
            b_v = load_tile(values.p, o_n, o_column, N, readable, values.stride, KEYS % (256 >> i) == 0, True)
            acc = tl.dot(weights[i], b_v, acc, input_precision=HEAD.PRECISION)
    acc = acc / total[:, None]
    _store_rows(out.p, acc, o_m, o_column, unit.begin, unit.end, N, V, (V + 7) // 8 * 8, out.stride)


@triton.jit
def _attend(
    qkv, out, lse, unit, first, sizes, factor,
    HEAD: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head, in one pass: the scores of all keys are on chip at once.

    They are pieces of power-of-two sizes, 256 >> i for the bits of KEYS. Only the last has keys beyond N.
    """
    N, V, begin, end = sizes.N, sizes.V, unit.begin, unit.end
    o_m = first + tl.arange(0, BLOCK_M)
    # Rows beyond the end read the last row again and are dropped at the store.
    r_m = tl.minimum(o_m, N - 1)
    queries, keys = _queries(qkv, unit, sizes, HEAD), _keys(qkv, unit, sizes, HEAD)
    b_q = None if HEAD.DIM is None else _load_head(queries, r_m, HEAD, False)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    scores = ()
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            o_n = _keys_of_piece(KEYS, 256 >> i)
            b_s = _scores(b_q, queries, keys, r_m, o_n, unit, HEAD, KEYS % (256 >> i) == 0) * factor
            if KEYS % (256 >> i) == 0:
                b_s = tl.where(o_n[None, :] < N, b_s, float("-inf"))
            highest = tl.maximum(highest, tl.max(b_s, axis=1))
            scores = scores + (b_s,)  # noqa: RUF005 (Triton knows no starred tuple)
        else:
            scores = scores + (0,)  # noqa: RUF005
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weights = ()
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            b_p = tl.exp2(scores[i] - highest[:, None])
            total += tl.sum(b_p, axis=1)
            weights = weights + (b_p.to(qkv.p.dtype.element_ty),)  # noqa: RUF005
        else:
            weights = weights + (0,)  # noqa: RUF005
    if lse is not None:
        tl.store(lse + o_m, highest + tl.log2(total), mask=o_m < N)
    column = begin // 8 * 8
    last = tl.where(end == V, (V + 7) // 8 * 8, end)
    values = _Rows(qkv.p + _before_values(sizes, HEAD), qkv.stride)
    for c in range(column, last, 32):
        _value_columns(weights, total, values, out, o_m, c, unit, sizes, HEAD, KEYS, 32)


@triton.jit(do_not_specialize=["B", "N", "H", "V", "K", "stride_qkv", "stride_out"])
def _ragged_attention_fwd_kernel(
    qkv, table, out, lse, B, N, H, V, K, stride_qkv, stride_out, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_ALIGNED: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one head with N <= KEYS <= 256; `factor` is the scale times log2(e)."""
    # Tells the compiler that rows start at 16 bytes: `multiple_of` has no effect on arguments.
    stride_qkv, stride_out = stride_qkv // 8 * 8, stride_out // 8 * 8
    K = K // 8 * 8 if KEYS_ALIGNED else K
    p_unit, i_batch, first, is_full = _program(table, B, N, BLOCK_M)
    head, begin, end = tl.load(p_unit), tl.load(p_unit + 1), tl.load(p_unit + 2)
    qkv += i_batch * N * stride_qkv
    out += i_batch * N * stride_out
    if lse is not None:
        lse += (i_batch * H + head) * N
    qkv, out = _Rows(qkv, stride_qkv), _Rows(out, stride_out)
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, None, KEYS_ALIGNED, PRECISION)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit, sizes = _Unit(head, begin, end, None, None, key_begin, key_end), _Sizes(N, H, V, K)
    if is_full:
        _attend(qkv, out, lse, unit, first, sizes, factor, HEAD, KEYS, BLOCK_M)
    else:
        _attend(qkv, out, lse, unit, first, sizes, factor, HEAD, KEYS, 16)


@triton.jit
def _online_step(
    b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, factor,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the accumulators, the highest scores and the sums of weights that follow.

    queries, keys, values: each a `Matrix` with a row for each token and the columns that may be loaded.
    """
    N, readable, stride_qkv = values.rows, values.columns, values.stride
    o_n = n + tl.arange(0, BLOCK_N)
    b_s = _scores(b_q, queries, keys, r_m, o_n, unit, HEAD, MASK) * factor
    if MASK:
        b_s = tl.where(o_n[None, :] < N, b_s, float("-inf"))
    higher = tl.maximum(highest, tl.max(b_s, axis=1))
    # As long as all scores are -inf they are not subtracted from themselves: a later key may be finite.
    reference = tl.where(higher == float("-inf"), 0.0, higher)
    b_p = tl.exp2(b_s - reference[:, None])
    shrink = tl.exp2(highest - reference)
    total = total * shrink + tl.sum(b_p, axis=1)
    b_p = b_p.to(values.source.dtype.element_ty)
    o_wide = column + tl.arange(0, WIDE)
    b_v = load_tile(values.source, o_n, o_wide, N, readable, stride_qkv, MASK, True)
    acc_wide = tl.dot(b_p, b_v, acc_wide * shrink[:, None], input_precision=HEAD.PRECISION)
    if NARROW:
        o_narrow = column + WIDE + tl.arange(0, NARROW)
        b_v = load_tile(values.source, o_n, o_narrow, N, readable, stride_qkv, MASK, True)
        acc_narrow = tl.dot(b_p, b_v, acc_narrow * shrink[:, None], input_precision=HEAD.PRECISION)
    return acc_wide, acc_narrow, higher, total


@triton.jit
def _attend_online(
    qkv, out, lse, unit, first, sizes, factor,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of WIDE + NARROW columns of one head, over tiles of BLOCK_N keys and at the end of 16."""
    N, V, begin, end = sizes.N, sizes.V, unit.begin, unit.end
    o_m = first + tl.arange(0, BLOCK_M)
    r_m = tl.minimum(o_m, N - 1)
    queries, keys = _queries(qkv, unit, sizes, HEAD), _keys(qkv, unit, sizes, HEAD)
    b_q = None if HEAD.DIM is None else _load_head(queries, r_m, HEAD, False)
    p_values, column = qkv.p + _before_values(sizes, HEAD), begin // 8 * 8
    values = Matrix(p_values, N, _readable(V, HEAD), qkv.stride)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_wide = tl.zeros((BLOCK_M, WIDE), dtype=tl.float32)
    acc_narrow = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    full = N // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc_wide, acc_narrow, highest, total = _online_step(
            b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, factor,
            HEAD=HEAD, BLOCK_N=BLOCK_N, MASK=False, WIDE=WIDE, NARROW=NARROW,
        )  # fmt: skip
    for n in range(full, N, 16):
        acc_wide, acc_narrow, highest, total = _online_step(
            b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, factor,
            HEAD=HEAD, BLOCK_N=16, MASK=True, WIDE=WIDE, NARROW=NARROW,
        )  # fmt: skip
    if lse is not None:
        m_lse = o_m < tl.where(begin == unit.head_begin, N, 0)  # written once, by the first group
        tl.store(lse + o_m, highest + tl.log2(total), mask=m_lse)
    padded = (V + 7) // 8 * 8
    o_wide = column + tl.arange(0, WIDE)
    _store_rows(out.p, acc_wide / total[:, None], o_m, o_wide, begin, end, N, V, padded, out.stride)
    if NARROW:
        o_narrow = column + WIDE + tl.arange(0, NARROW)
        _store_rows(out.p, acc_narrow / total[:, None], o_m, o_narrow, begin, end, N, V, padded, out.stride)


@triton.jit(do_not_specialize=["B", "N", "H", "V", "K", "stride_qkv", "stride_out"])
def _ragged_attention_online_kernel(
    qkv, table, out, lse, B, N, H, V, K, stride_qkv, stride_out, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a group of up to 80 columns of one head, for any N, with accumulators for what is kept."""
    stride_qkv, stride_out = stride_qkv // 8 * 8, stride_out // 8 * 8
    K = K // 8 * 8 if KEYS_ALIGNED else K
    p_unit, i_batch, first, is_full = _program(table, B, N, BLOCK_M)
    head, begin, end, head_begin = (
        tl.load(p_unit), tl.load(p_unit + 1), tl.load(p_unit + 2), tl.load(p_unit + 3)
    )  # fmt: skip
    qkv += i_batch * N * stride_qkv
    out += i_batch * N * stride_out
    if lse is not None:
        lse += (i_batch * H + head) * N
    last = tl.where(end == V, (V + 7) // 8 * 8, end)
    width = last - begin // 8 * 8
    qkv, out = _Rows(qkv, stride_qkv), _Rows(out, stride_out)
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, None, KEYS_ALIGNED, PRECISION)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit, sizes = _Unit(head, begin, end, head_begin, None, key_begin, key_end), _Sizes(N, H, V, K)
    if is_full:
        if width <= 32:
            _attend_online(qkv, out, lse, unit, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 32, 0)
        elif width <= 48:
            _attend_online(qkv, out, lse, unit, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 32, 16)
        elif width <= 64:
            _attend_online(qkv, out, lse, unit, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 64, 0)
        else:
            _attend_online(qkv, out, lse, unit, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 64, 16)
    else:
        _attend_online(qkv, out, lse, unit, first, sizes, factor, HEAD, 16, BLOCK_N, 64, 16)


@triton.jit
def _dq_step(
    dq, b_q, b_do, b_lse, b_delta, keys, values, dout, r_m, n, unit, factor,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dq + its part from one tile of keys. With WHOLE b_do has the wide and the narrow columns of dout."""
    N, begin, end = values.rows, unit.begin, unit.end
    o_n = n + tl.arange(0, BLOCK_N)
    o_wide = begin // 8 * 8 + tl.arange(0, WIDE)
    o_narrow = begin // 8 * 8 + WIDE + tl.arange(0, 16)
    b_k = _load_blocks(keys, o_n, unit, HEAD, MASK)
    b_p = tl.exp2(_multiply_blocks(b_q, b_k, unit, HEAD) * factor - b_lse[:, None])
    if WHOLE:
        b_v = _load_own(values, o_n, o_wide, begin, end, MASK)
        b_dp = tl.dot(b_do[0], tl.trans(b_v), input_precision=HEAD.PRECISION)
        b_v = _load_own(values, o_n, o_narrow, begin, end, MASK)
        b_dp = tl.dot(b_do[1], tl.trans(b_v), b_dp, input_precision=HEAD.PRECISION)
    else:
        b_dp = tl.zeros((r_m.shape[0], BLOCK_N), dtype=tl.float32)
        b_dp = _multiply_chunks(b_dp, dout, r_m, values, o_n, begin, end, MASK, 32, HEAD.PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASK:
        b_ds = tl.where(o_n[None, :] < N, b_ds, 0.0)
    return _add_blocks(dq, b_ds.to(values.source.dtype.element_ty), b_k, unit, HEAD)


@triton.jit
def _dq_rows(
    dout, qkv, out, lse, delta, dqkv, unit, first, sizes, scale, factor,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dQ and delta of BLOCK_M rows of one head, whose values WIDE + 16 columns hold, or not: not WHOLE."""
    N, V, begin, end = sizes.N, sizes.V, unit.begin, unit.end
    o_m = first + tl.arange(0, BLOCK_M)
    r_m = tl.minimum(o_m, N - 1)
    columns = (V + 7) // 8 * 8
    dout, out = Matrix(dout.p, N, columns, dout.stride), Matrix(out.p, N, columns, out.stride)
    o_wide = begin // 8 * 8 + tl.arange(0, WIDE)
    o_narrow = begin // 8 * 8 + WIDE + tl.arange(0, 16)
    b_do = None, None
    if WHOLE:
        b_do_wide = _load_own(dout, r_m, o_wide, begin, end, False)
        b_o = _load_own(out, r_m, o_wide, begin, end, False)
        b_delta = tl.sum(b_do_wide.to(tl.float32) * b_o.to(tl.float32), axis=1)
        b_do_narrow = _load_own(dout, r_m, o_narrow, begin, end, False)
        b_o = _load_own(out, r_m, o_narrow, begin, end, False)
        b_delta += tl.sum(b_do_narrow.to(tl.float32) * b_o.to(tl.float32), axis=1)
        b_do = b_do_wide, b_do_narrow
    else:
        b_delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for c in range(begin // 8 * 8, end, 32):
            o_c = c + tl.arange(0, 32)
            b_chunk = _load_own(dout, r_m, o_c, begin, end, False)
            b_o = _load_own(out, r_m, o_c, begin, end, False)
            b_delta += tl.sum(b_chunk.to(tl.float32) * b_o.to(tl.float32), axis=1)
    b_q = _load_blocks(_queries(qkv, unit, sizes, HEAD), r_m, unit, HEAD, False)
    b_lse = tl.load(lse + r_m)
    keys = _keys(qkv, unit, sizes, HEAD)
    values = Matrix(qkv.p + _before_values(sizes, HEAD), N, _readable(V, HEAD), qkv.stride)
    dq = _zero_blocks(BLOCK_M, HEAD)
    full = N // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        dq = _dq_step(
            dq, b_q, b_do, b_lse, b_delta, keys, values, dout, r_m, n, unit, factor,
            HEAD=HEAD, BLOCK_N=BLOCK_N, MASK=False, WIDE=WIDE, WHOLE=WHOLE,
        )  # fmt: skip
    for n in range(full, N, 16):
        dq = _dq_step(
            dq, b_q, b_do, b_lse, b_delta, keys, values, dout, r_m, n, unit, factor,
            HEAD=HEAD, BLOCK_N=16, MASK=True, WIDE=WIDE, WHOLE=WHOLE,
        )  # fmt: skip
    # Not before the loops: Triton 3.6 would spill two registers on sm_90.
    tl.store(delta + o_m, b_delta, mask=o_m < N)
    _store_blocks(_queries(dqkv, unit, sizes, HEAD), dq, scale, o_m, unit, HEAD)


@triton.jit(
    do_not_specialize=["B", "N", "H", "V", "K", "stride_dout", "stride_qkv", "stride_out", "stride_dqkv"]
)
def _ragged_attention_dq_kernel(
    dout, qkv, out, table, lse, delta, dqkv, B, N, H, V, K, stride_dout, stride_qkv, stride_out, stride_dqkv,
    scale, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEY_BLOCKS: tl.constexpr, KEYS_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of rows of one head, for any N and any width, and their delta for the kernel that comes next."""
    stride_dout, stride_qkv = stride_dout // 8 * 8, stride_qkv // 8 * 8
    stride_out, stride_dqkv = stride_out // 8 * 8, stride_dqkv // 8 * 8
    K = K // 8 * 8 if KEYS_ALIGNED else K
    p_unit, i_batch, first, is_full = _program(table, B, N, BLOCK_M)
    head, begin, end = tl.load(p_unit), tl.load(p_unit + 1), tl.load(p_unit + 2)
    dout += i_batch * N * stride_dout
    qkv += i_batch * N * stride_qkv
    out += i_batch * N * stride_out
    dqkv += i_batch * N * stride_dqkv
    lse += (i_batch * H + head) * N
    delta += (i_batch * H + head) * N
    width = end - begin // 8 * 8
    dout, qkv = _Rows(dout, stride_dout), _Rows(qkv, stride_qkv)
    out, dqkv = _Rows(out, stride_out), _Rows(dqkv, stride_dqkv)
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, KEY_BLOCKS, KEYS_ALIGNED, PRECISION)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit, sizes = _Unit(head, begin, end, None, None, key_begin, key_end), _Sizes(N, H, V, K)
    if is_full:
        if width <= 48:
            _dq_rows(dout, qkv, out, lse, delta, dqkv, unit, first, sizes, scale, factor,
                     HEAD, BLOCK_M, BLOCK_N, WIDE=32, WHOLE=True)  # fmt: skip
        elif width <= 80:
            _dq_rows(dout, qkv, out, lse, delta, dqkv, unit, first, sizes, scale, factor,
                     HEAD, BLOCK_M, BLOCK_N, WIDE=64, WHOLE=True)  # fmt: skip
        else:
            _dq_rows(dout, qkv, out, lse, delta, dqkv, unit, first, sizes, scale, factor,
                     HEAD, BLOCK_M, BLOCK_N, WIDE=64, WHOLE=False)  # fmt: skip
    else:
        _dq_rows(dout, qkv, out, lse, delta, dqkv, unit, first, sizes, scale, factor,
                 HEAD, 16, BLOCK_N, WIDE=64, WHOLE=False)  # fmt: skip


@triton.jit
def _dkdv_step(
    dk, dv_wide, dv_narrow, b_k, b_v, queries, values, dout, lse, delta, r_n, m, unit, sizes, factor,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk, dv_wide and dv_narrow + their parts from one tile of queries; b_v: wide and narrow columns."""
    N, begin, end = sizes.N, unit.begin, unit.end
    o_m = m + tl.arange(0, BLOCK_N)
    dout = Matrix(dout.p, N, (sizes.V + 7) // 8 * 8, dout.stride)
    o_wide = begin // 8 * 8 + tl.arange(0, WIDE)
    o_narrow = begin // 8 * 8 + WIDE + tl.arange(0, 16)
    b_q = _load_blocks(queries, o_m, unit, HEAD, MASK)
    b_lse = tl.load(lse + o_m, mask=o_m < N, other=0.0) if MASK else tl.load(lse + o_m)
    b_s = _multiply_blocks(b_k, b_q, unit, HEAD) * factor
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASK:
        b_p = tl.where(o_m[None, :] < N, b_p, 0.0)
    b_do_wide = _load_own(dout, o_m, o_wide, begin, end, MASK)
    b_do_narrow = _load_own(dout, o_m, o_narrow, begin, end, MASK)
    dv_wide = tl.dot(
        b_p.to(values.source.dtype.element_ty), b_do_wide, dv_wide, input_precision=HEAD.PRECISION
    )
    b_dv = b_p.to(values.source.dtype.element_ty)
    dv_narrow = tl.dot(b_dv, b_do_narrow, dv_narrow, input_precision=HEAD.PRECISION)
    if KEYS:
        if WHOLE:
            b_dp = tl.dot(b_v[0], tl.trans(b_do_wide), input_precision=HEAD.PRECISION)
            b_dp = tl.dot(b_v[1], tl.trans(b_do_narrow), b_dp, input_precision=HEAD.PRECISION)
        else:
            b_dp, end = tl.zeros((r_n.shape[0], BLOCK_N), dtype=tl.float32), unit.head_end
            b_dp = _multiply_chunks(b_dp, values, r_n, dout, o_m, begin, end, MASK, 32, HEAD.PRECISION)
        b_delta = tl.load(delta + o_m, mask=o_m < N, other=0.0) if MASK else tl.load(delta + o_m)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if MASK:
            b_ds = tl.where(o_m[None, :] < N, b_ds, 0.0)
        dk = _add_blocks(dk, b_ds.to(values.source.dtype.element_ty), b_q, unit, HEAD)
    return dk, dv_wide, dv_narrow


@triton.jit
def _dkdv_rows(
    dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dV of BLOCK_M keys and WIDE + 16 columns of one head, and with KEYS dK; WHOLE as above."""
    N, V, begin, end = sizes.N, sizes.V, unit.begin, unit.end
    o_n = first + tl.arange(0, BLOCK_M)
    r_n = tl.minimum(o_n, N - 1)
    o_wide = begin // 8 * 8 + tl.arange(0, WIDE)
    o_narrow = begin // 8 * 8 + WIDE + tl.arange(0, 16)
    values = Matrix(qkv.p + _before_values(sizes, HEAD), N, _readable(V, HEAD), qkv.stride)
    b_k = _load_blocks(_keys(qkv, unit, sizes, HEAD), r_n, unit, HEAD, False)
    b_v = None, None
    if KEYS and WHOLE:
        b_v_wide = _load_own(values, r_n, o_wide, begin, end, False)
        b_v = b_v_wide, _load_own(values, r_n, o_narrow, begin, end, False)
    dk = _zero_blocks(BLOCK_M, HEAD)
    dv_wide = tl.zeros((BLOCK_M, WIDE), dtype=tl.float32)
    dv_narrow = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    queries = _queries(qkv, unit, sizes, HEAD)
    full = N // BLOCK_N * BLOCK_N
    for m in range(0, full, BLOCK_N):
        dk, dv_wide, dv_narrow = _dkdv_step(
            dk, dv_wide, dv_narrow, b_k, b_v, queries, values, dout, lse, delta, r_n, m, unit, sizes, factor,
            HEAD=HEAD, BLOCK_N=BLOCK_N, MASK=False, KEYS=KEYS, WIDE=WIDE, WHOLE=WHOLE,
        )  # fmt: skip
    for m in range(full, N, 16):
        dk, dv_wide, dv_narrow = _dkdv_step(
            dk, dv_wide, dv_narrow, b_k, b_v, queries, values, dout, lse, delta, r_n, m, unit, sizes, factor,
            HEAD=HEAD, BLOCK_N=16, MASK=True, KEYS=KEYS, WIDE=WIDE, WHOLE=WHOLE,
        )  # fmt: skip
    if KEYS:
        _store_blocks(_keys(dqkv, unit, sizes, HEAD), dk, scale, o_n, unit, HEAD)
    before = _before_values(sizes, HEAD)
    dvalues = dqkv.p + before
    padded = (before + V + 7) // 8 * 8 - before
    _store_rows(dvalues, dv_wide, o_n, o_wide, begin, end, N, V, padded, dqkv.stride)
    _store_rows(dvalues, dv_narrow, o_n, o_narrow, begin, end, N, V, padded, dqkv.stride)


@triton.jit(do_not_specialize=["B", "N", "H", "V", "K", "stride_dout", "stride_qkv", "stride_dqkv"])
def _ragged_attention_dkdv_kernel(
    dout, qkv, table, lse, delta, dqkv, B, N, H, V, K, stride_dout, stride_qkv, stride_dqkv, scale, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEY_BLOCKS: tl.constexpr, KEYS_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV of keys of one head and up to 80 of its columns; with the first of these, dK. For any N."""
    stride_dout, stride_qkv, stride_dqkv = stride_dout // 8 * 8, stride_qkv // 8 * 8, stride_dqkv // 8 * 8
    K = K // 8 * 8 if KEYS_ALIGNED else K
    p_unit, i_batch, first, is_full = _program(table, B, N, BLOCK_M)
    head, begin, end, head_begin, head_end = (
        tl.load(p_unit), tl.load(p_unit + 1), tl.load(p_unit + 2), tl.load(p_unit + 3), tl.load(p_unit + 4)
    )  # fmt: skip
    dout += i_batch * N * stride_dout
    qkv += i_batch * N * stride_qkv
    dqkv += i_batch * N * stride_dqkv
    lse += (i_batch * H + head) * N
    delta += (i_batch * H + head) * N
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, KEY_BLOCKS, KEYS_ALIGNED, PRECISION)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit = _Unit(head, begin, end, head_begin, head_end, key_begin, key_end)
    sizes = _Sizes(N, H, V, K)
    before = _before_values(sizes, HEAD)
    padded = (before + V + 7) // 8 * 8 - before
    width = tl.where(head_end == V, padded, head_end) - begin // 8 * 8
    dout, qkv, dqkv = _Rows(dout, stride_dout), _Rows(qkv, stride_qkv), _Rows(dqkv, stride_dqkv)
    if is_full:
        if begin > head_begin:
            _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                       HEAD, BLOCK_M, BLOCK_N, KEYS=False, WIDE=64, WHOLE=False)  # fmt: skip
        elif width <= 48:
            _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                       HEAD, BLOCK_M, BLOCK_N, KEYS=True, WIDE=32, WHOLE=True)  # fmt: skip
        elif width <= 80:
            _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                       HEAD, BLOCK_M, BLOCK_N, KEYS=True, WIDE=64, WHOLE=True)  # fmt: skip
        else:
            _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                       HEAD, BLOCK_M, BLOCK_N, KEYS=True, WIDE=64, WHOLE=False)  # fmt: skip
    elif begin > head_begin:
        _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                   HEAD, 16, BLOCK_N, KEYS=False, WIDE=64, WHOLE=False)  # fmt: skip
    else:
        _dkdv_rows(dout, qkv, lse, delta, dqkv, unit, first, sizes, scale, factor,
                   HEAD, 16, BLOCK_N, KEYS=True, WIDE=64, WHOLE=False)  # fmt: skip


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


def _choice(N: int, key_widths: Sequence[int], dtype: torch.dtype) -> tuple[object, Config, bool]:
    """The forward kernel for N tokens, its configuration, and whether it takes them in one pass.

    Rows of scores have no room beside float32 weights, nor beside queries and keys wider than 64.
    """
    has_room = N <= _MOST_KEYS and max(key_widths) <= 64 and dtype.itemsize == 2
    if has_room and _KEYS.takes("one_pass", True):
        return _ragged_attention_fwd_kernel, ONE_PASS_TILES, True
    products = launching.operands(dtype)
    if products == "ieee" and not _are_equal(key_widths):
        products = "ieee in blocks"
    return _ragged_attention_online_kernel, ONLINE_TILES[products], False


def _forward_triton(
    qkv: Tensor, key_widths: Sequence[int], value_widths: Sequence[int], scale: float, need_lse: bool
) -> tuple[Tensor, Tensor]:
    if not qkv.numel() or qkv.dtype == torch.float64:
        return _forward_plain(qkv, key_widths, value_widths, scale, need_lse)
    (B, N, _), V, rows = qkv.shape, sum(value_widths), with_padded_rows(qkv)
    out, lse = _results(qkv, value_widths, need_lse)
    constants = _constants(key_widths, qkv.dtype)
    kernel, config, one_pass = _choice(N, key_widths, qkv.dtype)
    if one_pass:
        constants["KEYS"] = _round_up(N, 16)
    table = _table(tuple(key_widths), tuple(value_widths), not one_pass, _round_up(V, 8), qkv.device)
    launch(
        kernel,
        (len(table) * B * len(row_tiles(N, config.blocks["BLOCK_M"])),),
        dict(
            qkv=rows, table=table, out=out, lse=lse if need_lse else None, B=B, N=N, H=len(value_widths),
            V=V, K=sum(key_widths), stride_qkv=rows.stride(0), stride_out=out.stride(1),
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

    Others are the same kernels with other values of a few constants: the key width, where all heads have the
    same, and the tokens rounded up to 16 where they are 256 or fewer.
    """
    with launching.recording("ragged_attention", target) as found:
        for dtype, precision, key_widths, N in _COMPILED:
            with launching.matmul_precision(precision):
                _record(dtype, key_widths, N)
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
    key_widths = _validated(qkv, key_widths, value_widths, scale)
    need_lse = torch.is_grad_enabled() and qkv.requires_grad
    out, _ = torch.ops.vtp.ragged_attention(qkv, key_widths, value_widths, float(scale), need_lse)
    return out


def _validated(
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
