"""Each defect planted in a kernel of rotate_heads is caught, by the proof that its id names.

The proofs are those of test_rotary_kernels.py.
"""

import pytest

from tests.support.kernel_proofs import (
    KINDS,
    OFFSET,
    PAD_IN,
    PAD_OUT,
    assert_defect_is_caught,
    assert_defects_of_every_kind,
    in_kernel,
)
from tests.vtp_kernels.test_rotary_kernels import CHECKS, Case, op_module, prove

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
SMALL = Case(2, 9, 1, 3, 6, 5)
HALVES = Case(2, 9, 1, 3, 6, 5, rotate_half=True)
OWN = Case(2, 9, 1, 3, 6, 5, own_tables=True)
HALF_OWN = Case(2, 9, 1, 3, 6, 5, own_tables=True, rotate_half=True)
LONG = Case(1, 70, 1, 2, 6, 5)  # two tiles of tokens
BEFORE = Case(2, 9, 1, 3, 6, 5, side="begin")
FAR_APART = Case(3, 3, 1, 2, 6, 5, layout="far")
SIXTEEN = Case(2, 9, 1, 3, 6, 5, "bf16")


def options(case=SMALL, check="copy"):
    return tuple({"case": case, "check_name": check}.items())


def prove_by_name(check, case, check_name, **conditions):
    """In the worker: one kernel has several checks."""
    return prove(CHECKS[check_name], case, **conditions)


IN_PLACE, ADJOINT = (
    lambda case=SMALL, check=check: options(case, check) for check in ("in_place", "adjoint")
)
VALUES_LOAD = "tl.load(p_row + o_c, mask=m_tile, other=0.0)"
VALUES_STORE = "tl.store(p_target + o_c, b_tile, mask=m_tile)"
VALUES_MASK = "m_tile = m_row & (o_c < (width + 7) // 8 * 8)"
ROTATED = "m_rotated = m_row & (o_n[:, None] >= prefix_tokens)"
TABLE_ROW = "row = tl.cast(head, tl.int64) * table_rows + (o_n[:, None] - prefix_tokens)"
OUT_FIRST = "b_out_first = b_first * b_cos_first - b_second * b_sin_first"
OUT_SECOND = "b_out_second = b_second * b_cos_second + b_first * b_sin_second"
DX_FIRST = "b_out_first = b_first * b_cos_first + b_second * b_sin_second"
DX_SECOND = "b_out_second = b_second * b_cos_second - b_first * b_sin_first"
COLUMN_OF_PAIRS = "mask=m_row & (o_d < 2 * PAIRS.COUNT)"
LOAD_COLUMNS, STORE_COLUMNS = f"{COLUMN_OF_PAIRS}, other", f"{COLUMN_OF_PAIRS})"
ANY_COLUMN = "mask=m_row & (o_d >= 0)"
VALUES_CLEAR = "b_tile = tl.where(o_c < width, b_tile, tl.zeros_like(b_tile))"
LOAD_OWN_TABLE = "load_sines(rope, i, o_n"
ROW = "row = (i_image.to(tl.int64) * N + o_n)[:, None]"
DROPE_ROWS = "m_row = o_n[:, None] < N\n    b_sin_first"
DROPE_COS = "_store_pairs(p_row + d, m_row, (b_cos_first, b_cos_second), PAIRS)"
DROPE_SIN = "b_sin_first -= b_g_first * b_second"
LONG_DROPE = Case(1, 70, 1, 2, 6, 5)

# fmt: off
DEFECTS = [
    *in_kernel(
        "rotate_heads", options(),
        (READ, "rows-of-the-table-not-masked", "guard-page", ROTATED,
         "m_rotated = o_n[:, None] >= prefix_tokens", options(), "rope"),
        (READ, "prefix-rows-of-the-table-read", "guard-page", "table = load_sines(rope, i, o_n, m_rotated,",
         "table = load_sines(rope, i, o_n, m_row,", options(BEFORE), "rope"),
        (READ, "rows-of-queries-not-masked", "guard-page",
         "load_pairs(p_query, m_row, PAIRS)", "load_pairs(p_query, m_row | (row >= 0), PAIRS)", options(),
         "source"),
        (MASK, "no-mask-on-values", "guard-page", VALUES_LOAD,
         "tl.load(p_row + o_c)", options(), "source"),
        (MASK, "no-mask-on-columns-of-the-table", "guard-page", LOAD_COLUMNS, f"{ANY_COLUMN}, other",
         options(), "rope"),
        (WRITE, "no-mask-on-stored-values", "guard-page", VALUES_STORE,
         VALUES_STORE.replace(", mask=m_tile", ""), options(Case(1, 1, 0, 1, 2, 1)), "target"),
        (WRITE, "rows-of-queries-not-masked-in-place", "guard-page",
         "_store_pairs(p_query, m_row, query", "_store_pairs(p_query, m_row | (row >= 0), query",
         IN_PLACE(), "source"),
        (RACE, "columns-of-the-next-head-stored", "race-detection", STORE_COLUMNS, f"{ANY_COLUMN})"),
        (RACE, "tiles-of-tokens-overlap", "race-detection", "first + i_tile * BLOCK_M + ",
         "first + i_tile * (BLOCK_M - 1) + ", options(LONG)),
        (RACE, "groups-of-heads-overlap", "race-detection", "tl.minimum(i_unit * HEADS + HEADS, H)):",
         "tl.minimum(i_unit * HEADS + HEADS + 1, H)):", IN_PLACE()),
        (UNWRITTEN, "last-columns-of-values-not-stored", "poison", VALUES_MASK,
         VALUES_MASK.replace("(width + 7) // 8", "width // 8")),
        (UNWRITTEN, "keys-not-stored", "poison", "_store_pairs(p_key, m_row, key, PAIRS)", "pass"),
        (UNWRITTEN, "last-tile-not-launched", "poison", 'cdiv(N - first, config.blocks["BLOCK_M"]) * units',
         '((N - first) // config.blocks["BLOCK_M"]) * units', options(LONG)),
        (RAW, "product-in-bfloat16", "bfloat16-check", OUT_FIRST,
         OUT_FIRST.replace("b_first * b_cos", "b_first.to(tl.bfloat16) * b_first.to(tl.bfloat16) * b_cos"),
         options(SIXTEEN)),
        (PAD_IN, "padding-of-values-copied", "padding", VALUES_CLEAR, "pass"),
        (PAD_OUT, "padding-not-written", "padding", VALUES_STORE,
         VALUES_STORE.replace("m_tile", "m_tile & (o_c < width)")),
        (OFFSET, "rows-in-32-bits", "overflow-check", ROW, ROW.replace("i_image.to(tl.int64)", "i_image"),
         options(FAR_APART)),
        (VALUE, "sign-of-the-first-sine", "error-rule", OUT_FIRST, OUT_FIRST.replace(" - ", " + ")),
        (VALUE, "sign-of-the-second-sine", "error-rule", OUT_SECOND, OUT_SECOND.replace(" + ", " - "),
         options(HALVES)),
        (VALUE, "one-sine-for-both-of-a-pair", "error-rule", OUT_SECOND,
         OUT_SECOND.replace("b_sin_second", "b_sin_first")),
        (VALUE, "one-cosine-for-both-of-a-pair", "error-rule", OUT_SECOND,
         OUT_SECOND.replace("b_cos_second", "b_cos_first"), options(HALVES)),
        (VALUE, "sines-and-cosines-swapped", "error-rule",
         "return b_sin_first, b_sin_second, b_cos_first, b_cos_second",
         "return b_cos_first, b_cos_second, b_sin_first, b_sin_second"),
        (VALUE, "the-adjoint-not-taken", "error-rule", "    if ADJOINT:", "    if False:", ADJOINT()),
        (VALUE, "sine-of-the-other-in-the-adjoint", "error-rule", DX_FIRST,
         DX_FIRST.replace("b_sin_second", "b_sin_first"), ADJOINT(HALVES)),
        (VALUE, "sign-in-the-adjoint", "error-rule", DX_SECOND, DX_SECOND.replace(" - ", " + "), ADJOINT()),
        (VALUE, "first-token-behind-the-prefix-left-out", "error-rule", ROTATED, ROTATED.replace(">=", ">")),
        (VALUE, "last-prefix-token-rotated", "poison", ROTATED,
         ROTATED.replace("prefix_tokens)", "prefix_tokens - 1)"), options(OWN)),
        (VALUE, "table-of-the-token-before", "error-rule", TABLE_ROW,
         TABLE_ROW.replace("(o_n[:, None]", "tl.maximum(o_n[:, None] - 1").replace("tokens)", "tokens, 0)")),
        (VALUE, "table-of-the-first-head", "error-rule", LOAD_OWN_TABLE, "load_sines(rope, 0, o_n",
         options(HALF_OWN)),
        (VALUE, "table-of-the-head-before-in-place", "error-rule", LOAD_OWN_TABLE,
         "load_sines(rope, tl.maximum(i - 1, 0), o_n", IN_PLACE(OWN)),
        (VALUE, "pairs-of-the-other-layout", "error-rule", "HALVES=rotate_half,\n        ADJOINT",
         "HALVES=not rotate_half,\n        ADJOINT"),
        (VALUE, "keys-not-rotated-in-place", "error-rule", "_store_pairs(p_key, m_row, key, PAIRS)", "pass",
         IN_PLACE()),
    ),
    *in_kernel(
        "rotate_heads_drope", options(SMALL, "drope"),
        (READ, "rows-not-masked", "guard-page", DROPE_ROWS, DROPE_ROWS.replace("< N", ">= 0"),
         options(SMALL, "drope"), "dout"),
        (MASK, "no-mask-on-columns", "guard-page", LOAD_COLUMNS, f"{ANY_COLUMN}, other",
         options(Case(2, 9, 1, 3, 6, 0), "drope"), "dout"),
        (MASK, "no-mask-on-columns-of-halves", "guard-page",
         "o_pair < PAIRS.COUNT)\n        b_first", "o_pair >= 0)\n        b_first",
         options(Case(2, 9, 1, 3, 6, 0, rotate_half=True), "drope"), "dout"),
        (WRITE, "rows-of-cosines-not-masked", "guard-page", DROPE_COS,
         DROPE_COS.replace("m_row", "o_n[:, None] >= 0"), options(SMALL, "drope"), "drope"),
        (RACE, "tiles-of-tokens-overlap", "race-detection", "prefix_tokens + i_tile * BLOCK_M",
         "prefix_tokens + i_tile * (BLOCK_M - 1)", options(LONG_DROPE, "drope")),
        (RACE, "all-heads-in-one-row", "race-detection", "head.to(tl.int64) * tokens + (o_n", "(o_n"),
        (UNWRITTEN, "last-token-not-stored", "poison", DROPE_COS,
         DROPE_COS.replace("m_row", "m_row & (o_n[:, None] < N - 1)")),
        (RAW, "product-in-bfloat16", "bfloat16-check", DROPE_SIN,
         "b_sin_first -= b_g_first.to(tl.bfloat16) * b_second.to(tl.bfloat16)", options(SIXTEEN, "drope")),
        (OFFSET, "rows-in-32-bits", "overflow-check", "tl.cast(i // 2, tl.int64) * N", "i // 2 * N",
         options(FAR_APART, "drope")),
        (VALUE, "sign-of-the-first-sine", "error-rule", DROPE_SIN, DROPE_SIN.replace("-=", "+=")),
        (VALUE, "keys-forgotten", "error-rule", "column = (i % 2 * H + head) * d", "column = head * d"),
        (VALUE, "last-image-forgotten", "error-rule", "for i in range(2 * B):", "for i in range(2 * B - 2):",
         options(HALVES, "drope")),
        (VALUE, "only-the-last-image", "error-rule", "b_cos_second += ", "b_cos_second = "),
        (VALUE, "sums-in-bfloat16", "error-rule", "b_cos_first += b_g_first * b_first",
         "b_cos_first = (b_cos_first + b_g_first * b_first).to(tl.bfloat16).to(tl.float32)"),
        (VALUE, "gradient-of-the-first-head", "error-rule", "column = (i % 2 * H + head) * d",
         "column = i % 2 * H * d", options(OWN, "drope")),
    ),
]
# fmt: on


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove_by_name, None, defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    # What is masked is never used, but masked again where it is stored. drope has no padding.
    without = [("rotate_heads", OTHER), *(("rotate_heads_drope", kind) for kind in (OTHER, PAD_IN, PAD_OUT))]
    assert_defects_of_every_kind(DEFECTS, op_module, (*KINDS, PAD_IN, PAD_OUT, OFFSET), but_for=without)


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
