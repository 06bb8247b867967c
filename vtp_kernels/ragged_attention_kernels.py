"""The Triton kernels of `ragged_attention`, forward and backward; how its operands lie is told there.

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

A forward kernel may rotate queries and keys as it loads them (`rotated_attention`, see `rotary.py`). A score
is q_1 k_1 + q_2 k_2, with the first numbers of all pairs and the second: two products over d / 2, so that no
number has to change places between its load and its product, whichever columns make a pair.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vtp_kernels._tiles import Matrix, Pairs, load_pairs, load_sines, load_tile, rotate_pairs
from vtp_kernels.launching import tl, triton


class _Head(NamedTuple):
    """Constants of queries and keys in device code, as one constexpr."""

    DIM: Any  # their width in every head; None: each head has its own, and they are taken in blocks
    BLOCK: Any  # DIM rounded up to a power of two, 16 at least; or columns of a block
    BLOCKS: Any  # of the widest head, where blocks are held
    ALIGNED: Any  # in blocks: whether keys and values start at 16 bytes where a row does
    PRECISION: Any
    PAIRS: Any = None  # "halves" or "neighbours", where queries and keys are rotated as they are loaded


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


class _Rope(NamedTuple):
    """What `load_sines` takes in device code, where HEAD.PAIRS says which columns are pairs."""

    table: Any
    prefix_tokens: Any
    table_rows: Any


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
def _load_factors(matrix, o_row, head, rope, HEAD: tl.constexpr, MASK: tl.constexpr):
    """Queries or keys of one head, as a tuple whose products with one another scores are the sums of.

    One tile; or, rotated, the first numbers of all pairs and the second, rounded as by `rotate_heads`.
    """
    if HEAD.PAIRS is None:
        return (_load_head(matrix, o_row, HEAD, MASK),)
    else:
        PAIRS: tl.constexpr = Pairs(HEAD.DIM // 2, HEAD.BLOCK // 2, HEAD.PAIRS == "halves")
        m_row = o_row[:, None] < matrix.rows
        m_rotated = m_row & (o_row[:, None] >= rope.prefix_tokens)
        pairs = load_pairs(matrix.source + o_row[:, None].to(tl.int64) * matrix.stride, m_row, PAIRS)
        sines = load_sines(rope.table, head, o_row, m_rotated, rope.prefix_tokens, rope.table_rows, PAIRS)
        b_first, b_second = rotate_pairs(pairs, sines, m_rotated, False)
        return b_first.to(matrix.source.dtype.element_ty), b_second.to(matrix.source.dtype.element_ty)


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
def _scores(b_q, queries, keys, o_m, o_n, unit, rope, HEAD: tl.constexpr, MASK: tl.constexpr):
    """Queries at o_m by keys at o_n, [rows, keys], not scaled.

    b_q: what `_load_factors` gives of the queries, None if HEAD has no DIM.
    """
    if HEAD.DIM is None:
        zeros = tl.zeros((o_m.shape[0], o_n.shape[0]), dtype=tl.float32)
        begin, end = unit.key_begin, unit.key_end
        return _multiply_chunks(zeros, queries, o_m, keys, o_n, begin, end, MASK, HEAD.BLOCK, HEAD.PRECISION)
    else:
        b_k = _load_factors(keys, o_n, unit.head, rope, HEAD, MASK)
        acc = tl.dot(b_q[0], tl.trans(b_k[0]), input_precision=HEAD.PRECISION)
        if HEAD.PAIRS is not None:
            acc = tl.dot(b_q[1], tl.trans(b_k[1]), acc, input_precision=HEAD.PRECISION)
        return acc


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
    qkv, out, lse, unit, rope, first, sizes, factor,
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
    b_q = None if HEAD.DIM is None else _load_factors(queries, r_m, unit.head, rope, HEAD, False)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    scores = ()
    for i in tl.static_range(5):
        if KEYS & (256 >> i):
            o_n = _keys_of_piece(KEYS, 256 >> i)
            b_s = _scores(b_q, queries, keys, r_m, o_n, unit, rope, HEAD, KEYS % (256 >> i) == 0) * factor
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


@triton.jit(
    do_not_specialize=["B", "N", "H", "V", "K", "prefix_tokens", "table_rows", "stride_qkv", "stride_out"]
)
def _ragged_attention_fwd_kernel(
    qkv, table, out, lse, rope, B, N, H, V, K, prefix_tokens, table_rows, stride_qkv, stride_out, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_ALIGNED: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr,
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
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, None, KEYS_ALIGNED, PRECISION, PAIRS)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit, sizes = _Unit(head, begin, end, None, None, key_begin, key_end), _Sizes(N, H, V, K)
    rope = _Rope(rope, prefix_tokens, table_rows)
    if is_full:
        _attend(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, KEYS, BLOCK_M)
    else:
        _attend(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, KEYS, 16)


@triton.jit
def _online_step(
    b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, rope, factor,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the accumulators, the highest scores and the sums of weights that follow.

    queries, keys, values: each a `Matrix` with a row for each token and the columns that may be loaded.
    """
    N, readable, stride_qkv = values.rows, values.columns, values.stride
    o_n = n + tl.arange(0, BLOCK_N)
    b_s = _scores(b_q, queries, keys, r_m, o_n, unit, rope, HEAD, MASK) * factor
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
    qkv, out, lse, unit, rope, first, sizes, factor,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of WIDE + NARROW columns of one head, over tiles of BLOCK_N keys and at the end of 16."""
    N, V, begin, end = sizes.N, sizes.V, unit.begin, unit.end
    o_m = first + tl.arange(0, BLOCK_M)
    r_m = tl.minimum(o_m, N - 1)
    queries, keys = _queries(qkv, unit, sizes, HEAD), _keys(qkv, unit, sizes, HEAD)
    b_q = None if HEAD.DIM is None else _load_factors(queries, r_m, unit.head, rope, HEAD, False)
    p_values, column = qkv.p + _before_values(sizes, HEAD), begin // 8 * 8
    values = Matrix(p_values, N, _readable(V, HEAD), qkv.stride)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_wide = tl.zeros((BLOCK_M, WIDE), dtype=tl.float32)
    acc_narrow = tl.zeros((BLOCK_M, 16), dtype=tl.float32)
    full = N // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc_wide, acc_narrow, highest, total = _online_step(
            b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, rope,
            factor, HEAD=HEAD, BLOCK_N=BLOCK_N, MASK=False, WIDE=WIDE, NARROW=NARROW,
        )  # fmt: skip
    for n in range(full, N, 16):
        acc_wide, acc_narrow, highest, total = _online_step(
            b_q, acc_wide, acc_narrow, highest, total, queries, keys, values, r_m, n, column, unit, rope,
            factor, HEAD=HEAD, BLOCK_N=16, MASK=True, WIDE=WIDE, NARROW=NARROW,
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


@triton.jit(
    do_not_specialize=["B", "N", "H", "V", "K", "prefix_tokens", "table_rows", "stride_qkv", "stride_out"]
)
def _ragged_attention_online_kernel(
    qkv, table, out, lse, rope, B, N, H, V, K, prefix_tokens, table_rows, stride_qkv, stride_out, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr,
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
    HEAD: tl.constexpr = _Head(HEAD_DIM, BLOCK_D, None, KEYS_ALIGNED, PRECISION, PAIRS)
    key_begin, key_end = _key_columns(p_unit, HEAD)
    unit, sizes = _Unit(head, begin, end, head_begin, None, key_begin, key_end), _Sizes(N, H, V, K)
    rope = _Rope(rope, prefix_tokens, table_rows)
    if is_full:
        if width <= 32:
            _attend_online(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 32, 0)
        elif width <= 48:
            _attend_online(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 32, 16)
        elif width <= 64:
            _attend_online(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 64, 0)
        else:
            _attend_online(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, BLOCK_M, BLOCK_N, 64, 16)
    else:
        _attend_online(qkv, out, lse, unit, rope, first, sizes, factor, HEAD, 16, BLOCK_N, 64, 16)


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
