"""What the kernels of attention compute where they rotate queries and keys, proved in the interpreter.

The proofs are those of test_ragged_attention_kernels.py; the second half plants defects in what rotates.
"""

import dataclasses
import importlib

import pytest
import torch

from tests.support.guarded_memory import guarded
from tests.support.kernel_proofs import (
    KINDS,
    OFFSET,
    Defect,
    assert_compiled_ahead_of_time,
    assert_defect_is_caught,
    assert_like,
    place,
)
from tests.vtp_kernels import test_ragged_attention_kernels as attention
from vtp_kernels import launching
from vtp_kernels.library import TritonSides
from vtp_kernels.rotary import rotate_heads_ref

rotary = importlib.import_module("vtp_kernels.rotary")


@dataclasses.dataclass(frozen=True)
class Case(attention.Case):
    """The same, with heads of one even width; table: the dtype of rope, float32 or that of qkv."""

    prefix: int = 0
    rotate_half: bool = False
    own_tables: bool = False
    table: str = "f32"

    def __str__(self):
        flags = ["halves"] * self.rotate_half + ["own-tables"] * self.own_tables + [f"table-{self.table}"]
        return "-".join([super().__str__(), f"P{self.prefix}", *flags])


# -- In the worker ------------------------------------------------------------------------------------------


class Data(attention.Data):
    """The same, of heads whose queries and keys are rotated: for `exact` in float64, else in the dtype of the
    case, which rounds them as the pass does."""

    def __init__(self, case):
        heads, tokens = (len(case.widths),) * case.own_tables, case.N - case.prefix
        generator = torch.Generator().manual_seed(1)
        # Any numbers, but as large as sines and cosines: scores then are those of `ragged_attention`'s tests.
        rope = torch.randn(*heads, tokens, 2 * case.head_dim, generator=generator) * 0.5**0.5
        self.rope = rope.to(attention.DTYPES[case.table])
        super().__init__(case)

    def placed(self):
        """qkv and rope as they lie in memory."""
        case = self.case
        rows = place(self.qkv.flatten(0, 1), case.layout, case.side)
        return rows.unflatten(0, (case.B, case.N)), guarded(self.rope, case.side, align=16)

    def heads(self, dtype):
        wide = torch.promote_types(dtype, self.rope.dtype)
        rotation = self.rope.to(wide), self.case.keys, self.case.prefix, self.case.rotate_half
        qkv = self.operand(rotate_heads_ref(self.qkv.to(dtype), *rotation))
        parts = attention.ragged_attention._split(qkv, self.case.keys, self.case.widths)
        return zip(*parts, self.dout.to(dtype).split(self.case.widths, dim=-1), strict=True)


def check_rotated(op, data):
    case = data.case
    qkv, rope = data.placed()
    arguments = case.keys, case.widths, case.scale, False, rope, case.prefix, case.rotate_half
    out, _ = op.attend(qkv, *arguments)
    data.compare(out=out)
    attention.assert_padded_rows("out", out)


def check_op(op, data):
    """As `rotated_attention` runs it."""
    case = data.case
    qkv, rope = data.placed()
    arguments = case.keys, case.widths, case.scale, rope, case.prefix, case.rotate_half
    out = rotary._attention_triton(qkv, *arguments)
    assert_like([out], [rotary._attention_fake(qkv, *arguments)])
    data.compare(out=out)


def check_that_a_second_run_is_equal(op, data):
    case = data.case
    arguments = case.keys, case.widths, case.scale, False, data.rope, case.prefix, case.rotate_half
    (first, _), (second, _) = (op.attend(data.qkv, *arguments) for _ in range(2))
    assert torch.equal(first, second)


def prove(check, case, replacements=(), **kwargs):
    return attention.prove(check, case, replacements, make=Data, **kwargs)


# -- Correct kernels pass -----------------------------------------------------------------------------------

# Tokens around the tiles; none that is rotated, and prefix tokens alone in the first tile; pairs around the
# blocks of 16; values of any width; in one pass and online, as float32 and heads of more than 64 always are.
SHAPES = [
    Case(1, (37, 1), "bf16", head_dim=2, B=3),
    Case(5, (7,), "f32", head_dim=2, B=2, prefix=5),
    Case(15, (16, 48, 3), "f16", head_dim=16, prefix=1),
    Case(17, (61, 3), "tf32", head_dim=32, B=2, prefix=5),
    Case(37, (37, 1, 64), "bf16", head_dim=64, prefix=1, table="bf16"),
    Case(37, (9, 4), "bf16", head_dim=128, prefix=17, B=2),
    Case(77, (13, 75), "f32", head_dim=30, prefix=1),
    Case(81, (13, 5), "tf32", head_dim=80, prefix=1),
    Case(197, (9, 5), "bf16", head_dim=64, prefix=5),
    Case(197, (200, 7), "f16", head_dim=48, prefix=1, table="f16"),
    Case(257, (5, 3), "bf16", head_dim=64, prefix=1),
]
# Every shape meets both layouts of pairs, tables and ends of memory.
CASES = [
    dataclasses.replace(
        case, rotate_half=bool(turn), own_tables=bool((i // 2 + turn) % 2), side=("end", "begin")[turn]
    )
    for i, case in enumerate(SHAPES)
    for turn in (i % 2, 1 - i % 2)  # the quick lane takes the first
]


def traits(case):
    return case.dtype, case.rotate_half, case.own_tables, case.N > 256, case.head_dim > 64


@pytest.mark.covering(1, by=lambda case: (*traits(case), (case.N, case.head_dim)))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotated_attention_at_odd_shapes(interpreter, case):
    interpreter.run(prove, check_rotated, case)


@pytest.mark.parametrize("rotate_half", [False, True], ids=["neighbours", "halves"])
def test_over_tiles_of_keys_in_16_bits_with_a_table_for_each_head(interpreter, rotate_half):
    case = Case(81, (13, 75), "bf16", head_dim=32, B=2, prefix=1, rotate_half=rotate_half, own_tables=True)
    interpreter.run(prove, check_rotated, case, forced=("ragged_attention", "online"))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["tight", "misaligned", "wide", "far", "transposed"])
@pytest.mark.parametrize(("dtype", "rotate_half"), [("f32", True), ("bf16", False)])
def test_in_every_layout(interpreter, dtype, rotate_half, layout):
    N = 3 if layout == "far" else 21
    case = Case(N, (37, 15), dtype, head_dim=18, B=3, layout=layout, prefix=1, rotate_half=rotate_half)
    interpreter.run(prove, check_op, case)


def test_a_second_run_is_equal_bit_for_bit(interpreter):
    interpreter.run(prove, check_that_a_second_run_is_equal, Case(37, (9, 4), "bf16", head_dim=32, prefix=1))


# -- On the meta device -------------------------------------------------------------------------------------


def recorded(dtype, table, N, d, rotate_half, precision="highest", B=1, widths=(5,), prefix=1):
    """The variants that `rotated_attention` launches for such tensors."""
    heads = len(widths)
    qkv = torch.empty(B, N, 2 * heads * d + sum(widths), dtype=dtype, device="meta")
    rope = torch.empty(N - prefix, 2 * d, dtype=table, device="meta")
    with (
        launching.matmul_precision(precision),
        launching.recording("ragged_attention", "sm_90") as found,
        TritonSides(),
    ):
        out = rotary.rotated_attention(qkv, (d,) * heads, widths, 0.1, rope, prefix, rotate_half)
    assert out.shape == (B, N, sum(widths)) and out.dtype == dtype
    return set(found)


@pytest.mark.parametrize("case", attention.ragged_attention._ROTATED, ids=str)
def test_what_is_launched_is_compiled_ahead_of_time(case):
    dtype, precision, table, d, N, rotate_half = case
    launched = recorded(dtype, table, N, d, rotate_half, precision)
    assert len(launched) == 1
    assert_compiled_ahead_of_time(launched, attention.MODULE, "sm_90")


def test_batches_and_models_of_any_size_share_one_compilation():
    bf16 = torch.bfloat16
    shapes = ((1, 577, (5,), 1), (8, 1025, (64,) * 12, 5), (128, 261, (61, 7), 0))
    found = [recorded(bf16, torch.float32, N, 64, True, "highest", B, v, P) for B, N, v, P in shapes]
    assert len(set.union(*found)) == 1


@pytest.mark.parametrize("d", [2, 16, 30, 80])
def test_each_half_of_a_head_is_a_product_of_16_columns_at_least(d):
    """Fewer are no product of tensor cores, which the interpreter does not mind."""
    (key,) = recorded(torch.bfloat16, torch.float32, 21, d, True)
    assert dict(key[2])["BLOCK_D"] // 2 >= max(16, d // 2)


@pytest.mark.parametrize(
    ("dtype", "N", "d", "prefix"),
    [(torch.float64, 9, 6, 1), (torch.float32, 3, 6, 3), (torch.float32, 0, 6, 0)],
    ids=["float64", "nothing-to-rotate", "no-tokens"],
)
def test_what_the_kernels_do_not_take_is_left_to_the_ops_apart(dtype, N, d, prefix):
    """On a CPU, where these are PyTorch's; were a kernel launched, it would fail here."""
    qkv, rope = torch.randn(2, N, 4 * d + 12).to(dtype), torch.randn(N - prefix, 2 * d).to(dtype)
    arguments = (d, d), (5, 7), 0.3, rope, prefix, True
    out = rotary._attention_triton(qkv, *arguments)
    torch.testing.assert_close(out, rotary.rotated_attention_ref(qkv, *arguments))


def test_heads_too_wide_for_it_are_rotated_in_a_pass():
    launched = {key[0] for key in recorded(torch.bfloat16, torch.float32, 21, 160, True)}
    assert launched == {"_rotate_heads_kernel", "_ragged_attention_online_kernel"}


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

READ, _, MASK, _, _, _, RAW, VALUE = KINDS
NEIGHBOURS = Case(37, (13, 5), "bf16", head_dim=16, prefix=3)
HALVES = dataclasses.replace(NEIGHBOURS, rotate_half=True)
OWN = dataclasses.replace(NEIGHBOURS, own_tables=True)
BEFORE = dataclasses.replace(NEIGHBOURS, side="begin")
ONLINE = dataclasses.replace(HALVES, N=53, dtype="f32")
FAR_APART = dataclasses.replace(NEIGHBOURS, N=9, layout="far")

KEYS = "b_k = _load_factors(keys, o_n, unit.head, rope, HEAD, MASK)"
QUERIES = "_load_factors(queries, r_m, unit.head, rope, HEAD, False)"
UNROTATED = "_Rope(rope.table, keys.rows, rope.table_rows)"
ROWS = "m_row = o_row[:, None] < matrix.rows"
ROTATED = "m_rotated = m_row & (o_row[:, None] >= rope.prefix_tokens)"
TABLE_ROW = "(o_n[:, None] - prefix_tokens)"
SINES = "return b_sin_first, b_sin_second, b_cos_first, b_cos_second"
OUT_FIRST = "b_out_first = b_first * b_cos_first - b_second * b_sin_first"
OUT_SECOND = "b_out_second = b_second * b_cos_second + b_first * b_sin_second"
SECOND = "tl.dot(b_q[1], tl.trans(b_k[1]), acc, input_precision=HEAD.PRECISION)"
ROUNDED = "return b_first.to(matrix.source.dtype.element_ty), b_second"
OWN_TABLE = "load_sines(rope.table, head, o_row"


def planted(case, *rows, **extra):
    """Defects in what both forward kernels do to rotate, in the one that the case takes."""
    kernel = "fwd" if case.dtype == "bf16" else "online"
    return [Defect(kernel, *row[:5], (("case", row[5] if row[5:] else case),), *row[6:]) for row in rows]


# fmt: off
DEFECTS = [
    *planted(
        NEIGHBOURS,
        (READ, "rows-not-masked", "guard-page", ROWS, ROWS.replace("<", ">= 0 *"), NEIGHBOURS, "qkv"),
        (READ, "prefix-rows-of-the-table-read", "guard-page", ROTATED, "m_rotated = m_row", BEFORE, "rope"),
        (MASK, "columns-of-pairs-not-masked", "guard-page", "(o_d < 2 * PAIRS.COUNT), other",
         "(o_d >= 0), other", NEIGHBOURS, "rope"),
        (RAW, "rotated-in-bfloat16", "bfloat16-check", OUT_FIRST,
         OUT_FIRST.replace("b_first * b_cos", "b_first.to(tl.bfloat16) * b_first.to(tl.bfloat16) * b_cos")),
        (OFFSET, "rows-in-32-bits", "overflow-check", "o_row[:, None].to(tl.int64) * matrix.stride, m_row",
         "o_row[:, None] * matrix.stride.to(tl.int32), m_row", FAR_APART),
        (VALUE, "keys-not-rotated", "error-rule", KEYS, KEYS.replace("rope,", f"{UNROTATED},")),
        (VALUE, "queries-not-rotated", "error-rule", QUERIES, QUERIES.replace("rope,", f"{UNROTATED},"),
         NEIGHBOURS, "", 2),
        (VALUE, "last-prefix-token-rotated", "poison", ROTATED,
         ROTATED.replace("tokens)", "tokens - 1)"), OWN),
        (VALUE, "first-token-behind-the-prefix-left-out", "error-rule", ROTATED, ROTATED.replace(">=", ">")),
        (VALUE, "table-of-the-token-before", "error-rule", TABLE_ROW,
         "tl.maximum(o_n[:, None] - 1 - prefix_tokens, 0)"),
        (VALUE, "table-of-the-first-head", "error-rule", OWN_TABLE, OWN_TABLE.replace("head", "0"), OWN),
        (VALUE, "sine-of-the-other-of-a-pair", "error-rule", SINES,
         SINES.replace("sin_first, b_sin_second", "sin_second, b_sin_first")),
        (VALUE, "sign-of-the-second", "error-rule", OUT_SECOND, OUT_SECOND.replace(" + ", " - "), HALVES),
        (VALUE, "second-numbers-left-out", "error-rule", f"acc = {SECOND}", "pass"),
        (VALUE, "second-numbers-by-the-first", "error-rule", SECOND, SECOND.replace("b_q[1]", "b_q[0]")),
        (VALUE, "rounded-before-the-rotation", "error-rule", "b_first, b_second = rotate_pairs(pairs,",
         "b_first, b_second = rotate_pairs((pairs[0].to(tl.float8e5).to(tl.float32), pairs[1]),"),
        (VALUE, "pairs-of-the-other-layout", "error-rule", '"halves" if rotate_half',
         '"halves" if not rotate_half'),
    ),
    *planted(
        ONLINE,
        (VALUE, "keys-not-rotated", "error-rule", KEYS, KEYS.replace("rope,", f"{UNROTATED},")),
        (VALUE, "table-of-the-token-before", "error-rule", TABLE_ROW,
         "tl.maximum(o_n[:, None] - 1 - prefix_tokens, 0)"),
        (VALUE, "second-numbers-left-out", "error-rule", f"acc = {SECOND}", "pass"),
    ),
]
# fmt: on


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, check_rotated, defect)


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
