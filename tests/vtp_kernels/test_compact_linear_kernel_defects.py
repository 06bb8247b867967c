"""Each defect planted in a kernel of compact_linear is caught, by the proof that its id names.

The proofs are those of test_compact_linear_kernels.py.
"""

import functools

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
from tests.vtp_kernels.test_compact_linear_kernels import (
    Case,
    Rotated,
    check_db,
    check_dz,
    check_far,
    check_forward,
    check_parts,
    check_rotated,
    check_swiglu,
    check_swiglu_fwd,
    op_module,
    prove,
)

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
# A tile of each kind, two of the right border, a full block of inputs and a tail; no width a multiple of 8.
SMALL = Case(37, 37, 101, "f32")
SMALL16 = Case(69, 77, 141, "bf16")
WIDE = Case(37, 165, 101, "f32")  # of several blocks of inputs
BOTH, RESIDUAL, NO_BIAS = (
    Case(37, 37, 101, "f32", epilogue, bias=epilogue != "none") for epilogue in ("both", "residual", "none")
)
FAR_APART = Case(5, 17, 15, "f32", "both", "far")


def options(case=SMALL, **kwargs):
    return tuple({"case": case, **kwargs}.items())


SPLIT_UP = options(WIDE, path="split")
GELU_LINES = "    if gelu:\n        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))\n"
ADD_BIAS = "    acc += tl.load(bias + o_n, mask=o_n < bias_width, other=0.0).to(tl.float32)[None, :]\n"
ADD_RESIDUAL = "        acc += tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)\n"
TILE_MASK = "m_tile = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)\n"
RESULT_MASK, PARTIAL_MASK = f"    {TILE_MASK}    m_padding", f"        {TILE_MASK}        tl.store(partial"
STORE_OUT = "tl.store(out + o_out, tl.where(m_padding, 0.0, acc).to(out.dtype.element_ty), mask=m_tile)"
STORE_Z = "tl.store(z + o_out, tl.where(m_padding, 0.0, acc).to(z.dtype.element_ty), mask=m_tile)"
TAIL_MASK = "mask=(o_column[None, :] < readable) & (o_row[:, None] >= 0), other=0.0"
TAIL_CLEAR = "b_tile = tl.where(o_column[None, :] < columns, b_tile, tl.zeros_like(b_tile))"
PRODUCT = "return tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)"
TRANSPOSED = "return tl.dot(b_w, tl.trans(b_x), acc, input_precision=PRECISION)"
PART_ROW = "row = i_part.to(tl.int64) * M + o_m[:, None]"
LOAD_PART = "acc += tl.load(partial + row * stride_out + o_n[None, :], mask=m_tile, other=0.0)"
PARTS_COLUMNS = f"o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)\n    {TILE_MASK}    acc"
DZ_LOAD = "b_dz = tl.load(p_dy, mask=m_tile, other=0.0)"
DZ_MASK = "m_tile = (o_m[:, None] < M) & (o_n[None, :] < width)"
DZ_PADDING = "        b_dz = tl.where(o_n[None, :] < N, b_dz, 0.0)\n"
DZ_STORE = "tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_tile)"
DZ_PARTIAL = "partial + tl.program_id(0).to(tl.int64) * width + o_n, b_db, mask=o_n < width"
DB_MASK = "mask=(o_r[:, None] < rows) & (o_n[None, :] < width), other=0.0"
DB_STORE = "tl.store(db + o_n, tl.sum(acc, axis=0).to(db.dtype.element_ty), mask=o_n < N)"
GATE_MASK = "m_gate = (o_row < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)"
GATE_CLEAR = "return tl.where(o_h[None, :] < hidden, b_gate, 0.0), b_value"
VALUE_LOAD = "tl.load(p_z + hidden, mask=(o_row < M) & (o_h[None, :] < hidden), other=0.0)"
SWIGLU_H = "return b_gate / (1.0 + tl.exp(-b_gate)) * b_value"
H_MASK = "m_h = (o_row < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)"
SWIGLU_ROW = "o_row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)"
SWIGLU = Case(37, 37, 90, "f32", "swiglu")
SWIGLU16 = Case(37, 37, 90, "bf16", "swiglu")
SWIGLU_ORDER = "o_n = o_n // 2 + o_n % 2 * (N // 2)"
SWIGLU_BIAS = (
    "    acc += tl.load(finish.bias + o_z, mask=o_z < finish.bias_width, other=0.0).to(tl.float32)[None, :]\n"
)
SWIGLU_MASK = "m_tile = (o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)"
SWIGLU_CLEAR = "b_h = tl.where(o_h[None, :] < hidden, _swiglu(b_gate, b_value), 0.0)"
SWIGLU_COLUMNS = "o_h = tl.multiple_of(i_n // 2, TILE_H) + tl.arange(0, TILE_H)"
# Images that begin within a tile of rows, heads of no power of two, values that begin within a tile.
ROTATED = Rotated(3, 15, 2, 2, 6, 21, 37)
HALVES = Rotated(3, 15, 2, 2, 6, 21, 37, rotate_half=True)
OWN, HALF_OWN = (Rotated(3, 15, 2, 2, 6, 21, 37, own_tables=True, rotate_half=half) for half in (False, True))
ROTATED_BEFORE, HALVES_BEFORE = (Rotated(3, 15, 2, 2, 6, 21, 37, rotate_half=half, side="begin")
                                 for half in (False, True))  # fmt: skip
TOKEN = "o_token = o_m % tokens - prefix_tokens"
M_TOKEN = "m_token = ((o_m < M) & (o_token >= 0))[:, None]"
ROTATE = "        acc = _rotated(acc, rope, i_n, o_m, M, PAIRS)\n"
M_ROTATED = "m_rotated = m_token & (o_n[None, :] < 2 * heads * HEAD)"
ROW_OF_HALVES = "row = (o_pair // HALF % heads).to(tl.int64)[None, :] * table_rows"
ROW_OF_NEIGHBOURS = "row = (o_n // HEAD % heads).to(tl.int64)[None, :] * table_rows"
HALVES_ORDER = "o_half = o_d // 2 + o_d % 2 * (PAIRS.HEAD // 2)"
M_PAIR = "m_pair = m_row & (o_pair[None, :] < 2 * heads * HALF)"
M_VALUES = "m_values = m_row & (o_n[None, :] >= 2 * heads * PAIRS.HEAD) & (o_n[None, :] < (N + 7) // 8 * 8)"
STORE_SECOND = "tl.store(p_pair + HALF, b_second.to(out.dtype.element_ty), mask=m_pair)"
TURNED = "b_own * b_cos + b_other * b_sin"
ONLY_DB = (("wanted", ((True, False, True),)),)
ROWS_OF_DZ = Case(261, 1, 37, "f32")

# fmt: off
DEFECTS = [
    *in_kernel(
        "fwd", options(),
        (READ, "row-clamp-of-x-removed", "guard-page", "tl.minimum(i_m + tl.arange(0, TILE_M), x.rows - 1)",
         "i_m + tl.arange(0, TILE_M)", options(), "x"),
        (READ, "row-clamp-of-weight-removed", "guard-page",
         "tl.minimum(o_n, weight.rows - 1)", "o_n", options(), "weight"),
        (READ, "no-mask-on-the-tail", "guard-page", f", {TAIL_MASK}", "", options(), "weight"),
        (READ, "no-mask-on-bias", "guard-page", "bias + o_n, mask=o_n < bias_width, other=0.0", "bias + o_n",
         options(), "bias"),
        (READ, "no-mask-on-residual", "guard-page", "p_residual, mask=m_tile, other=0.0", "p_residual",
         options(RESIDUAL), "residual"),
        (WRITE, "row-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("< M", ">= 0"), options(), "out"),
        (WRITE, "column-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("(o_n[None, :] < (N + 7) // 8 * 8)", "(o_n[None, :] >= 0)"), options(), "out"),
        (WRITE, "row-mask-of-parts-removed", "guard-page", PARTIAL_MASK, PARTIAL_MASK.replace("< M", ">= 0"),
         SPLIT_UP, "partial"),
        (PAD_IN, "padding-of-inputs-multiplied", "poison", TAIL_CLEAR, "pass"),
        (PAD_IN, "padding-of-one-inputs-multiplied", "poison", TAIL_CLEAR,
         TAIL_CLEAR.replace("< columns", "<= columns")),
        (PAD_OUT, "columns-behind-the-width-kept", "zero-padding", STORE_OUT,
         STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc")),
        (PAD_OUT, "columns-behind-the-width-of-z-kept", "zero-padding", STORE_Z,
         STORE_Z.replace("tl.where(m_padding, 0.0, acc)", "acc"), options(BOTH, save=True)),
        (PAD_OUT, "columns-behind-the-width-not-written", "zero-padding", STORE_OUT,
         STORE_OUT.replace("=m_tile", "=m_tile & (o_n[None, :] < N)")),
        (OTHER, "no-other-on-a-bias-that-there-is-not", "poison", "mask=o_n < bias_width, other=0.0",
         "mask=o_n < bias_width", options(NO_BIAS)),
        (RACE, "tiles-of-the-border-all-the-first", "race-detection",
         "columns * BLOCK_N + i_n * BORDER_N", "columns * BLOCK_N + i_n * 0"),
        (RACE, "border-begins-inside-the-interior", "race-detection",
         "columns * BLOCK_N + i_n * BORDER_N", "columns * BLOCK_N - 8 + i_n * BORDER_N"),
        (RACE, "bottom-begins-inside-the-interior", "race-detection",
         "rows * BLOCK_M + i_tile // bottom", "rows * BLOCK_M - 4 + i_tile // bottom"),
        (RACE, "tiles-of-the-bottom-all-the-first", "race-detection", "i_tile % bottom_columns * BOTTOM_N",
         "i_tile % bottom_columns * 0"),
        (RACE, "parts-all-in-one-place", "race-detection", PART_ROW, "row = o_m[:, None].to(tl.int64)",
         SPLIT_UP),
        (UNWRITTEN, "last-tile-of-the-border-missed", "poison",
         'cdiv(N % block["BLOCK_N"], block["BORDER_N"])', 'N % block["BLOCK_N"] // block["BORDER_N"]'),
        (UNWRITTEN, "bottom-border-missed", "poison", 'cdiv(bottom, block["BOTTOM_M"])',
         'bottom // block["BOTTOM_M"]'),
        (UNWRITTEN, "last-column-of-the-bottom-missed", "poison", 'cdiv(N, block["BOTTOM_N"])',
         'N // block["BOTTOM_N"]'),
        (UNWRITTEN, "last-tile-not-launched", "poison", "(grid.tiles, parts)", "(grid.tiles - 1, parts)"),
        (UNWRITTEN, "last-part-not-launched", "poison", "(grid.tiles, parts)", "(grid.tiles, 1)",
         SPLIT_UP),
        (OFFSET, "rows-of-inputs", "overflow-check", "o_row[:, None].to(tl.int64) * stride",
         "o_row[:, None] * stride", options(FAR_APART)),
        (OFFSET, "rows-of-the-residual", "overflow-check", "o_m[:, None].to(tl.int64) * stride_residual",
         "o_m[:, None] * stride_residual", options(FAR_APART)),
        (OFFSET, "rows-of-the-result", "overflow-check", "o_m[:, None].to(tl.int64) * stride_out",
         "o_m[:, None] * stride_out", options(FAR_APART)),
        (RAW, "residual-added-in-bfloat16", "bfloat16-check", ADD_RESIDUAL,
         "        acc = (acc.to(tl.bfloat16) + tl.load(p_residual, mask=m_tile, other=0.0)).to(tl.float32)\n",
         options(Case(5, 17, 15, "bf16", "residual"))),
        (VALUE, "tail-of-inputs-dropped", "error-rule", "range(full, end, TAIL_K)",
         "range(end, end, TAIL_K)"),
        (VALUE, "first-block-of-inputs-dropped", "error-rule", "range(begin, full, BLOCK_K)",
         "range(begin + BLOCK_K, full, BLOCK_K)"),
        (VALUE, "bias-not-added", "error-rule", ADD_BIAS, ""),
        (VALUE, "gelu-not-applied", "error-rule", GELU_LINES, "", options(BOTH)),
        (VALUE, "gelu-by-tanh", "error-rule", "tl.erf(acc * 0.7071067811865476)",
         "2 * tl.sigmoid(1.5957691216 * (acc + 0.044715 * acc * acc * acc)) - 1", options(BOTH)),
        (VALUE, "gelu-before-bias", "error-rule", (GELU_LINES, ADD_BIAS), ("", GELU_LINES + ADD_BIAS),
         options(BOTH)),
        (VALUE, "residual-before-gelu", "error-rule", (GELU_LINES, ADD_RESIDUAL),
         ("", ADD_RESIDUAL + GELU_LINES), options(BOTH)),
        (VALUE, "residual-not-added", "error-rule", ADD_RESIDUAL, "        acc += 0.0\n", options(RESIDUAL)),
        (VALUE, "z-without-bias", "error-rule", (ADD_BIAS, "    if SAVE:\n        " + STORE_Z + "\n"),
         ("", "    if SAVE:\n        " + STORE_Z + "\n" + ADD_BIAS), options(BOTH, save=True)),
        (VALUE, "parts-overlap", "error-rule", "end = tl.minimum(begin + inputs_per_part, K)", "end = K",
         SPLIT_UP),
        (VALUE, "parts-in-the-wrong-rows", "error-rule", PART_ROW,
         "row = i_part.to(tl.int64) * M + (M - 1 - o_m)[:, None]", SPLIT_UP),
        (VALUE, "tiles-by-descriptor-all-of-the-first-inputs", "error-rule", "weight.tiles.load([i_n, k])",
         "weight.tiles.load([i_n, 0])", options(WIDE, descriptors=True)),
        (VALUE, "tf32-in-ieee", "error-rule", PRODUCT, PRODUCT.replace("=PRECISION", '="tf32"')),
        (VALUE, "tf32-in-ieee-in-the-bottom-border", "error-rule", TRANSPOSED,
         TRANSPOSED.replace("=PRECISION", '="tf32"'), options(Case(5, 101, 101, "f32"))),
        (VALUE, "sums-in-bfloat16", "error-rule", PRODUCT, PRODUCT + ".to(tl.bfloat16).to(tl.float32)",
         options(Case(64, 525, 45, "bf16"))),
    ),
    *in_kernel(
        "fwd", options(SWIGLU),
        (READ, "order-of-halves-and-no-clamp", "guard-page", "tl.minimum(o_n, weight.rows - 1)", "o_n",
         options(SWIGLU), "weight"),
        (READ, "no-mask-on-bias-of-swiglu", "guard-page",
         "finish.bias + o_z, mask=o_z < finish.bias_width, other=0.0", "finish.bias + o_z",
         options(SWIGLU), "bias"),
        (WRITE, "rows-of-swiglu-not-masked", "guard-page", SWIGLU_MASK, SWIGLU_MASK.replace("< M", ">= 0"),
         options(SWIGLU), "out"),
        (UNWRITTEN, "last-columns-of-swiglu-not-stored", "poison", SWIGLU_MASK,
         SWIGLU_MASK.replace("(hidden + 7) // 8", "hidden // 8")),
        (PAD_OUT, "padding-of-swiglu-not-written", "zero-padding", SWIGLU_MASK,
         SWIGLU_MASK.replace("(hidden + 7) // 8 * 8", "hidden")),
        (PAD_OUT, "columns-behind-swiglu-kept", "zero-padding", SWIGLU_CLEAR,
         "b_h = _swiglu(b_gate, b_value)"),
        (RACE, "tiles-of-swiglu-overlap", "race-detection", SWIGLU_COLUMNS,
         SWIGLU_COLUMNS.replace("i_n // 2, TILE_H)", "i_n // 4, 1)"),
         options(Case(37, 37, 170, "f32", "swiglu"))),
        (RAW, "product-of-swiglu-in-bfloat16", "bfloat16-check", SWIGLU_H,
         "return b_gate.to(tl.bfloat16) * b_value.to(tl.bfloat16)", options(SWIGLU16)),
        (VALUE, "halves-of-swiglu-swapped", "error-rule", "_swiglu(b_gate, b_value), 0.0",
         "_swiglu(b_value, b_gate), 0.0"),
        (VALUE, "rows-of-w-in-their-own-order", "error-rule", SWIGLU_ORDER, "o_n += 0"),
        (VALUE, "rows-of-w-by-descriptor-in-their-own-order", "error-rule",
         "if descriptors and not (swiglu or halves) else None", "if descriptors else None",
         options(Case(64, 37, 180, "f32", "swiglu"), descriptors=True)),
        (VALUE, "bias-of-swiglu-not-added", "error-rule", SWIGLU_BIAS, ""),
    ),
    *in_kernel(
        "fwd", options(ROTATED),
        (READ, "prefix-rows-of-the-table-read", "guard-page", M_TOKEN,
         "m_token = (o_m < M)[:, None]", options(ROTATED_BEFORE), "table"),
        (READ, "prefix-rows-of-the-table-of-halves-read", "guard-page", M_TOKEN,
         "m_token = (o_m < M)[:, None]", options(HALVES_BEFORE), "table"),
        (WRITE, "rows-of-halves-not-masked", "guard-page", M_PAIR,
         M_PAIR.replace("m_row", "(o_m[:, None] >= 0)"), options(HALVES), "out"),
        (WRITE, "values-beside-halves-not-masked", "guard-page", M_VALUES,
         M_VALUES.replace("m_row", "(o_m[:, None] >= 0)"), options(HALVES), "out"),
        (VALUE, "values-beside-halves-stored-from-the-first-column-on", "error-rule", M_VALUES,
         M_VALUES.replace(">= 2 * heads * PAIRS.HEAD", ">= 0"), options(HALVES)),
        (UNWRITTEN, "second-half-not-stored", "poison", STORE_SECOND, "pass", options(HALVES)),
        (PAD_OUT, "padding-beside-halves-not-written", "zero-padding", M_VALUES,
         M_VALUES.replace("(N + 7) // 8 * 8", "N"), options(HALVES)),
        (OFFSET, "rows-of-halves-in-32-bits", "overflow-check",
         "p_row = out + o_m.to(tl.int64)[:, None] * stride_out", "p_row = out + o_m[:, None] * stride_out",
         options(Rotated(1, 5, 1, 1, 2, 3, 5, rotate_half=True, layout="far"))),
        (VALUE, "sign-of-the-first-sine", "error-rule", "join_pairs(-b_second", "join_pairs(b_second"),
        (VALUE, "sign-of-the-first-sine-of-halves", "error-rule", "_turned(b_first, -b_second",
         "_turned(b_first, b_second", options(HALVES)),
        (VALUE, "table-of-the-first-half", "error-rule", "p_sin + HALF, m_rotated", "p_sin, m_rotated",
         options(HALVES)),
        (VALUE, "sines-and-cosines-swapped", "error-rule", TURNED, "b_own * b_sin + b_other * b_cos"),
        (RAW, "rotated-in-bfloat16", "bfloat16-check", TURNED,
         "(b_own.to(tl.bfloat16) * b_cos.to(tl.bfloat16)).to(tl.float32) + b_other * b_sin",
         options(Rotated(3, 15, 2, 2, 6, 21, 37, "bf16"))),
        (VALUE, "rotated-before-bias", "error-rule", (ADD_BIAS, ROTATE), ("", ROTATE + ADD_BIAS)),
        (VALUE, "values-rotated", "error-rule", M_ROTATED, "m_rotated = m_token & (o_n[None, :] >= 0)"),
        (VALUE, "tokens-of-the-first-image-for-all", "error-rule", TOKEN,
         "o_token = tl.minimum(o_m, tokens - 1) - prefix_tokens"),
        (VALUE, "prefix-tokens-rotated-as-the-first-behind-them", "error-rule", TOKEN,
         "o_token = tl.maximum(o_m % tokens - prefix_tokens, 0)", options(HALVES)),
        (VALUE, "table-of-the-first-head", "error-rule", ROW_OF_NEIGHBOURS,
         ROW_OF_NEIGHBOURS.replace("% heads", "* 0"), options(OWN)),
        (VALUE, "table-of-the-first-head-of-halves", "error-rule", ROW_OF_HALVES,
         ROW_OF_HALVES.replace("% heads", "* 0"), options(HALF_OWN)),
        (VALUE, "pairs-of-halves-in-their-own-order", "error-rule", HALVES_ORDER, "o_half = o_d",
         options(HALVES)),
        (VALUE, "halves-by-descriptor-in-their-own-order", "error-rule",
         "if descriptors and not (swiglu or halves) else None", "if descriptors else None",
         options(Rotated(2, 37, 2, 8, 8, 21, 70, rotate_half=True), descriptors=True)),
    ),
    *in_kernel(
        "swiglu_fwd", options(SWIGLU),
        (READ, "row-mask-removed", "guard-page", GATE_MASK,
         GATE_MASK.replace("(o_row < M)", "(o_row >= 0)"), options(SWIGLU), "z"),
        (READ, "no-mask-on-values", "guard-page", VALUE_LOAD, "tl.load(p_z + hidden)", options(SWIGLU), "z"),
        (WRITE, "row-mask-of-store-removed", "guard-page", H_MASK,
         H_MASK.replace("(o_row < M)", "(o_row >= 0)"), options(SWIGLU), "h"),
        (RACE, "programs-overlap", "race-detection", SWIGLU_ROW,
         SWIGLU_ROW.replace("* BLOCK_M", "* (BLOCK_M - 1)")),
        (UNWRITTEN, "last-columns-not-stored", "poison", H_MASK,
         H_MASK.replace("(hidden + 7) // 8", "hidden // 8")),
        (UNWRITTEN, "last-rows-not-launched", "poison", "(cdiv(M, block_m), cdiv(hidden, block_h))",
         "(M // block_m, cdiv(hidden, block_h))"),
        (OTHER, "no-other-on-values", "zero-padding", VALUE_LOAD, VALUE_LOAD.replace(", other=0.0", "")),
        (RAW, "product-in-bfloat16", "bfloat16-check", SWIGLU_H,
         "return b_gate.to(tl.bfloat16) * b_value.to(tl.bfloat16)", options(SWIGLU16)),
        (PAD_IN, "padding-of-values-used", "zero-padding", VALUE_LOAD,
         VALUE_LOAD.replace("< hidden)", "< (hidden + 7) // 8 * 8)")),
        (PAD_IN, "padding-of-gates-used", "zero-padding", GATE_CLEAR, "return b_gate, b_value",
         options(Case(37, 1, 2, "f32"))),
        (PAD_OUT, "padding-not-written", "zero-padding", H_MASK,
         H_MASK.replace("(hidden + 7) // 8 * 8", "hidden")),
        (OFFSET, "rows-in-32-bits", "overflow-check", SWIGLU_ROW,
         SWIGLU_ROW.replace(".to(tl.int64)", ""), options(Case(9, 1, 90, "bf16", layout="far"))),
        (VALUE, "halves-swapped", "error-rule", SWIGLU_H,
         "return b_value / (1.0 + tl.exp(-b_value)) * b_gate"),
        (VALUE, "sign-of-the-exponent", "error-rule", SWIGLU_H, SWIGLU_H.replace("-b_gate", "b_gate")),
        (VALUE, "gate-not-multiplied", "error-rule", SWIGLU_H, SWIGLU_H.replace("b_gate / (", "1.0 / (")),
        (VALUE, "silu-rounded-to-bfloat16", "error-rule", SWIGLU_H,
         "return (b_gate / (1.0 + tl.exp(-b_gate))).to(tl.bfloat16).to(tl.float32) * b_value"),
        (VALUE, "odd-widths-taken-for-aligned", "poison", "HALVES_ALIGNED=hidden % 8 == 0",
         "HALVES_ALIGNED=True"),
    ),
    *in_kernel(
        "parts", options(),
        (READ, "mask-of-parts-removed", "guard-page", LOAD_PART,
         LOAD_PART.replace(", mask=m_tile, other=0.0", ""), options(), "partial"),
        (WRITE, "row-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("< M", ">= 0"), options(), "z"),
        (PAD_OUT, "columns-behind-the-width-kept", "zero-padding", STORE_OUT,
         STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc")),
        (OTHER, "no-other-on-bias", "zero-padding",
         ("mask=o_n < bias_width, other=0.0", STORE_OUT),
         ("mask=o_n < bias_width", STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc"))),
        (RACE, "columns-all-the-first", "race-detection", PARTS_COLUMNS,
         PARTS_COLUMNS.replace("tl.program_id(1) * BLOCK_N", "tl.program_id(1) * 8"),
         options(Case(5, 1, 141, "f32"))),
        (UNWRITTEN, "last-rows-not-launched", "poison", 'cdiv(M, _PARTS.blocks["BLOCK_M"])',
         'M // _PARTS.blocks["BLOCK_M"]'),
        (OFFSET, "rows-of-the-residual", "overflow-check", "o_m[:, None].to(tl.int64) * stride_residual",
         "o_m[:, None] * stride_residual", options(Case(5, 1, 15, "f32", "both", "far"))),
        (RAW, "residual-added-in-bfloat16", "bfloat16-check", ADD_RESIDUAL,
         "        acc = (acc.to(tl.bfloat16) + tl.load(p_residual, mask=m_tile, other=0.0)).to(tl.float32)\n",
         options(Case(5, 1, 15, "bf16", "residual"))),
        (VALUE, "first-part-dropped", "error-rule", "range(parts)", "range(1, parts)"),
        (VALUE, "last-part-dropped", "error-rule", "range(parts)", "range(parts - 1)"),
        (VALUE, "bias-added-with-every-part", "error-rule", LOAD_PART, f"{LOAD_PART}\n    {ADD_BIAS}"),
        (VALUE, "parts-summed-in-bfloat16", "error-rule", LOAD_PART,
         f"{LOAD_PART}\n        acc = acc.to(tl.bfloat16).to(tl.float32)", options(SMALL16)),
    ),
    *in_kernel(
        "dz", options(),
        (READ, "row-mask-removed", "guard-page", DZ_MASK, DZ_MASK.replace("< M", ">= 0"), options(), "dy"),
        (READ, "no-mask-on-z", "guard-page", "b_z = tl.load(p_z, mask=m_tile, other=0.0)",
         "b_z = tl.load(p_z)", options(), "z"),
        (WRITE, "mask-of-store-removed", "guard-page", DZ_STORE, DZ_STORE.replace(", mask=m_tile", ""),
         options(), "dz"),
        (PAD_OUT, "columns-behind-the-width-kept", "zero-padding", DZ_PADDING, ""),
        (OTHER, "no-other-on-dy", "poison", DZ_LOAD, DZ_LOAD.replace(", other=0.0", ""),
         options(SMALL, **dict(ONLY_DB))),
        (RACE, "partial-sums-all-in-row-0", "race-detection", DZ_PARTIAL,
         "partial + o_n, b_db, mask=o_n < width", options(ROWS_OF_DZ, **dict(ONLY_DB))),
        (UNWRITTEN, "last-columns-not-launched", "poison", 'cdiv(N, _DZ.blocks["BLOCK_N"])',
         'max(1, N // _DZ.blocks["BLOCK_N"])', options(Case(5, 1, 141, "f32"))),
        (OFFSET, "rows-of-dy", "overflow-check", "o_m[:, None].to(tl.int64) * stride_dy",
         "o_m[:, None] * stride_dy", options(Case(5, 1, 15, "f32", layout="far"))),
        (OFFSET, "rows-of-z", "overflow-check", "o_m[:, None].to(tl.int64) * stride_z",
         "o_m[:, None] * stride_z", options(Case(5, 1, 15, "f32", layout="far"))),
        (RAW, "dy-in-bfloat16", "bfloat16-check", f"{DZ_LOAD}.to(tl.float32)", DZ_LOAD,
         options(Case(5, 1, 15, "bf16"))),
        (VALUE, "density-forgotten", "error-rule", " + b_z * density", ""),
        (VALUE, "distribution-of-z-halved", "error-rule", "tl.erf(b_z * 0.7071067811865476)",
         "tl.erf(b_z * 0.5)"),
        (VALUE, "gelu-forgotten", "error-rule", "        if GELU:\n", "        if False:\n"),
        (VALUE, "sums-of-the-last-rows-alone", "error-rule", "b_db += tl.sum", "b_db = tl.sum",
         options(ROWS_OF_DZ, **dict(ONLY_DB))),
        (VALUE, "sums-of-rows-of-the-next-program", "error-rule", "tl.minimum(M, first + rows_per_program)",
         "M", options(ROWS_OF_DZ, wanted=((True, False, True),))),
    ),
    *in_kernel(
        "db", options(),
        (READ, "row-mask-removed", "guard-page", DB_MASK, DB_MASK.replace("< rows", ">= 0"), options(),
         "partial"),
        (WRITE, "mask-of-store-removed", "guard-page", DB_STORE, DB_STORE.replace(", mask=o_n < N", ""),
         options(), "db"),
        (OTHER, "no-other-on-partial-sums", "poison", DB_MASK, DB_MASK.replace(", other=0.0", "")),
        (RACE, "programs-overlap", "race-detection", "o_n = tl.program_id(0) * BLOCK_N",
         "o_n = tl.program_id(0) * (BLOCK_N // 2)"),
        (UNWRITTEN, "last-columns-not-launched", "poison", 'cdiv(N, _DB.blocks["BLOCK_N"])',
         'N // _DB.blocks["BLOCK_N"]'),
        (VALUE, "tail-of-rows-dropped", "error-rule", "range(0, rows, BLOCK_R)",
         "range(0, rows // BLOCK_R * BLOCK_R, BLOCK_R)"),
    ),
]
# fmt: on
PLANTED_IN = {
    "fwd": check_forward,
    "swiglu_fwd": check_swiglu_fwd,
    "parts": check_parts,
    "dz": check_dz,
    "db": functools.partial(check_db, rows=37),
}


def check_for(defect):
    case = dict(defect.options)["case"]
    if isinstance(case, Rotated):
        return check_rotated
    if defect.kernel == "fwd" and case.epilogue == "swiglu":
        return check_swiglu
    return check_far if defect.kernel == "fwd" and case.layout == "far" else PLANTED_IN[defect.kernel]


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, check_for(defect), defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    # A missing mask is here of the kind of what it lets through.
    kinds = {*KINDS, PAD_IN, PAD_OUT, OFFSET} - {MASK}
    # Sums keep columns apart, and what lies behind the width is dropped where they are stored; what is
    # 64-bit in these two follows from sizes that no test can have; `db` is 1-D and reads float32 alone.
    but_for = [
        ("parts", PAD_IN), ("dz", PAD_IN), ("db", PAD_IN), ("db", PAD_OUT), ("db", OFFSET), ("db", RAW)
    ]  # fmt: skip
    assert_defects_of_every_kind(DEFECTS, op_module, kinds, but_for)


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
