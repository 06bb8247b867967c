"""Each defect planted in a kernel of gated_linear is caught, by the proof that its id names.

The proofs are those of test_gated_linear_kernels.py.
"""

import functools

import pytest

from tests.support.kernel_proofs import (
    KINDS,
    assert_defect_is_caught,
    assert_defects_of_every_kind,
    in_kernel,
)
from tests.vtp_kernels.test_gated_linear_kernels import (
    CHECKS,
    Case,
    check_fold,
    check_fold_gates,
    check_gate_gradient,
    check_unfold,
    check_unfold_gates,
    gated_linear,
    prove,
)

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
# Several tiles along most axes, and tails on all.
SMALL = Case(37, 61, 45, "f32")
SMALL16 = Case(37, 61, 45, "bf16")
MIXED16 = Case(37, 61, 45, "bf16-f32")
FOUR = Case(1, 136, 37, "bf16-f32")  # two tiles of columns for the fold, five for the unfold


def options(case=SMALL, **kwargs):
    return tuple({"case": case, **kwargs}.items())


OTHER_ROWS = "& (o_column[None, :] < readable), other=0.0)"
OTHER_COLUMNS = "& (o_row[:, None] >= 0), other=0.0)"
GROUPED = "return first + within % height, within // height"
LOAD_GATE = "b_g = tl.load(gate + o_k, mask=o_k < K, other=0.0)"
FWD_TAIL_X = "b_x = load_matrix_tile(x, i_m, r_m, k, o_k, False, TAIL, DESCRIPTORS)"
FWD_FOLD = "(b_w.to(tl.float32) * b_g.to(tl.float32)[None, :])"
FWD_STORE = "tl.store(p_y, acc.to(y.dtype.element_ty), mask=m_y)"
DX_LOAD_W = "b_w = load_matrix_tile(weight, n, o_n, i_k, o_k, TAIL, True, DESCRIPTORS)"
DX_LOAD_X = "b_x = load_tile(x, o_m, o_k, M, K, stride_x, True, True).to(tl.float32)"
DX_PARTIAL = "tl.store(partial + t_m.to(tl.int64) * K + o_k, tl.sum(acc * b_x, axis=0), mask=o_k < K)"
DX_STORE = "tl.store(p_dx, (acc * b_g[None, :]).to(dx.dtype.element_ty), mask=m_tile)"
DX_GATE = f"    {LOAD_GATE}.to(tl.float32)\n    p_dx"
DW_LOAD_DY = "b_dy = load_matrix_tile(dy, m, o_m, i_n, o_n, TAIL, True, DESCRIPTORS)"
DW_LOAD_X = "b_x = load_matrix_tile(x, m, o_m, i_k, o_k, TAIL, True, DESCRIPTORS)"
DW_STORE = "tl.store(p_dw, (acc * b_g[None, :]).to(dw.dtype.element_ty), mask=m_dw)"
LOAD_W = "b_w = load_tile(weight, o_n, o_k, N, K, stride_w, True, True).to(tl.float32)"
DW_LOAD_W = f"{LOAD_W}\n        tl.store(partial + t_n"
FOLD_LOAD_W = f"{LOAD_W}\n    b_g ="
FOLD_STORE = "tl.store(p_folded, (b_w * b_g[None, :]).to(folded.dtype.element_ty), mask=m_folded)"
UNFOLD_LOAD = "b_product = tl.load(product + o_tile, mask=m_tile, other=0.0).to(tl.float32)"
UNFOLD_LOAD_W = "            else:\n                b_w = tl.load(p_w, mask=m_tile, other=0.0)"
UNFOLD_LOAD_FOLDED = "b_w = tl.load(folded + o_tile, mask=m_tile, other=0.0)"
LOAD_BIAS = "b_bias = tl.load(bias + o_bias, mask=m_bias, other=0.0)"
CAST_STORE = "tl.store(cast + o_bias, b_bias.to(cast.dtype.element_ty), mask=m_bias)"
FOUR_LOAD_W = "b_weight = load_tile(weight, o_n, o_k, N, K, K, True, True).to(tl.float32)"
FOUR_LOAD_GATE = "b_gate = tl.load(gate + o_k, mask=m_k, other=0.0)"
FOUR_STORE_DG = "tl.store(dg + o_k, tl.sum(acc, axis=0), mask=m_k)"
DIVIDE = "        if FOLDED:  # noqa: SIM102 (known when compiling; `divide` is not)\n            if divide:"
DIVIDE_ALWAYS = "        if True:\n            if True:"
UNFOLD_STORE = "tl.store(dw + o_tile, (b_product * b_g[None, :]).to(dw.dtype.element_ty), mask=m_tile)"
GATE_LOAD = "load_tile(partial, o_r, o_k, rows, K, K, True, True)"
GATE_LOAD_GATE = "b_g = tl.load(gate + o_k, mask=m_k, other=0.0).to(tl.float32)\n    sign"
GATE_STORE = "tl.store(dg + o_k, (tl.sum(acc, axis=0) + l1 * sign).to(dg.dtype.element_ty), mask=m_k)"

# Each: kind, what is wrong, the proof, old and new text, and what is run; the argument that is overrun.
# fmt: off
DEFECTS = [
    *in_kernel(
        "fwd", options(),
        (READ, "row-clamp-of-x-removed", "guard-page", "tl.minimum(o_m, M - 1), tl", "o_m, tl", options(),
         "x"),
        (READ, "row-clamp-of-weight-removed", "guard-page", "1), tl.minimum(o_n, N - 1)", "1), o_n",
         options(), "weight"),
        (MASK, "no-mask-on-tail-of-x", "guard-page", FWD_TAIL_X, FWD_TAIL_X.replace("TAIL", "False"),
         options(), "x"),
        (MASK, "no-mask-on-bias", "guard-page", "tl.load(bias + o_n, mask=o_n < N, other=0.0)",
         "tl.load(bias + o_n)", options(), "bias"),
        (WRITE, "row-mask-of-store-removed", "guard-page", "m_y = (o_m[:, None] < M)",
         "m_y = (o_m[:, None] >= 0)", options(), "y"),
        (OTHER, "no-other-on-tail", "poison", OTHER_COLUMNS, "& (o_row[:, None] >= 0))"),
        (UNWRITTEN, "last-column-not-stored", "poison", FWD_STORE,
         FWD_STORE.replace("m_y)", "m_y & (o_n[None, :] < N - 1))")),
        (UNWRITTEN, "last-rows-of-tiles-not-launched", "poison",
         "(cdiv(M, block_m) * cdiv(N, block_n),)", "(M // block_m * cdiv(N, block_n),)"),
        (RACE, "column-mask-of-store-removed", "race-detection",
         "m_y = (o_m[:, None] < M) & (o_n[None, :] < N)", "m_y = (o_m[:, None] < M) & (o_n[None, :] >= 0)"),
        (RACE, "groups-of-tiles-all-from-the-first", "race-detection", GROUPED,
         GROUPED.replace("first + ", ""), options(Case(521, 8, 17, "bf16"))),
        (RAW, "gate-times-weight-in-bfloat16", "bfloat16-check", FWD_FOLD,
         "(b_w * b_g.to(b_w.dtype)[None, :])", options(SMALL16)),
        (VALUE, "tail-of-reduction-dropped", "error-rule", "if full < K:", "if full < 0:"),
        (VALUE, "first-block-of-reduction-dropped", "error-rule", "for k in range(0, full, BLOCK_K)",
         "for k in range(BLOCK_K, full, BLOCK_K)"),
        (VALUE, "gate-applied-twice", "error-rule", FWD_FOLD,
         FWD_FOLD[:-1] + " * b_g.to(tl.float32)[None, :])"),
        (VALUE, "gate-not-applied", "error-rule", FWD_FOLD, "b_w.to(tl.float32)"),
        (VALUE, "bias-not-added", "error-rule", "    if HAS_BIAS:\n        acc",
         "    if False:\n        acc"),
        (VALUE, "tf32-in-ieee", "error-rule", "tl.trans(b_folded), acc, input_precision=PRECISION",
         'tl.trans(b_folded), acc, input_precision="tf32"'),
        (VALUE, "sums-in-bfloat16", "error-rule", "tl.trans(b_folded), acc, input_precision=PRECISION)",
         "tl.trans(b_folded), acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         options(Case(37, 1021, 45, "bf16"))),
        (VALUE, "outputs-cut-to-a-multiple-of-eight", "poison", "_layout(x, weight, y)", "_layout(x, weight)",
         options(Case(37, 72, 45, "bf16", "aligned"))),
    ),
    *in_kernel(
        "dx", options(),
        (READ, "row-clamp-removed", "guard-page", "r_m = tl.minimum(o_m, M - 1)\n", "r_m = o_m\n", options(),
         "dy"),
        (READ, "column-mask-of-weight-removed", "guard-page", DX_LOAD_W,
         DX_LOAD_W.replace("TAIL, True", "TAIL, False"), options(), "weight"),
        (READ, "row-mask-of-x-removed", "guard-page", DX_LOAD_X,
         DX_LOAD_X.replace("True, True", "False, True"), options(), "x"),
        (MASK, "no-mask-on-gate", "guard-page", DX_GATE, DX_GATE.replace(", mask=o_k < K, other=0.0", ""),
         options(), "gate"),
        (WRITE, "row-mask-of-store-removed", "guard-page", "m_tile = (o_m[:, None] < M)",
         "m_tile = (o_m[:, None] >= 0)", options(), "dx"),
        (OTHER, "no-other-on-tail-of-weight", "poison", OTHER_ROWS, "& (o_column[None, :] < readable))"),
        (OTHER, "no-other-on-tail-of-dy", "poison", OTHER_COLUMNS, "& (o_row[:, None] >= 0))"),
        (UNWRITTEN, "last-column-not-stored", "poison", DX_STORE,
         DX_STORE.replace("m_tile)", "m_tile & (o_k[None, :] < K - 1))")),
        (UNWRITTEN, "last-partial-sum-not-stored", "poison", DX_PARTIAL,
         DX_PARTIAL.replace("o_k < K)", "o_k < K - 1)")),
        (RACE, "partial-sums-all-in-row-0", "race-detection", "partial + t_m.to(tl.int64) * K + o_k",
         "partial + o_k", options(Case(130, 61, 45, "bf16"))),
        (RACE, "groups-of-tiles-all-from-the-first", "race-detection", GROUPED,
         GROUPED.replace("first + ", ""), options(Case(521, 8, 17, "bf16"))),
        (RAW, "product-with-x-in-bfloat16", "bfloat16-check", "tl.sum(acc * b_x, axis=0), mask",
         "tl.sum(acc.to(tl.bfloat16) * b_x.to(tl.bfloat16), axis=0), mask", options(SMALL16)),
        (VALUE, "tail-of-reduction-dropped", "error-rule", "if full < N:", "if full < 0:"),
        (VALUE, "gate-applied-twice", "error-rule", "(acc * b_g[None, :]).to(dx.",
         "(acc * b_g[None, :] * b_g[None, :]).to(dx."),
        (VALUE, "gate-not-applied", "error-rule", "(acc * b_g[None, :]).to(dx.", "acc.to(dx."),
        (VALUE, "last-row-repeated-in-the-gate-gradient", "error-rule", DX_LOAD_X,
         DX_LOAD_X.replace("o_m", "r_m"), options(gates=(True,))),
        (VALUE, "last-row-repeated-in-the-gate-gradient-of-bfloat16", "error-rule", DX_LOAD_X,
         DX_LOAD_X.replace("o_m", "r_m"), options(SMALL16, gates=(True,))),
        (VALUE, "gate-in-its-own-gradient", "error-rule", "tl.sum(acc * b_x, axis=0), mask",
         "tl.sum(acc * b_x * tl.load(gate + o_k, mask=o_k < K, other=0.0)[None, :], axis=0), mask",
         options(gates=(True,))),
        (VALUE, "tf32-in-ieee", "error-rule", "b_w.to(b_dy.dtype), acc, input_precision=PRECISION",
         'b_w.to(b_dy.dtype), acc, input_precision="tf32"'),
    ),
    *in_kernel(
        "dw", options(),
        (READ, "tail-mask-of-dy-removed", "guard-page", DW_LOAD_DY,
         DW_LOAD_DY.replace("TAIL, True", "False, True"), options(), "dy"),
        (READ, "column-mask-of-x-removed", "guard-page", DW_LOAD_X,
         DW_LOAD_X.replace("TAIL, True", "TAIL, False"), options(), "x"),
        (MASK, "no-mask-on-gate", "guard-page", f"        {LOAD_GATE}.to(tl.float32)\n        p_dw",
         "        b_g = tl.load(gate + o_k).to(tl.float32)\n        p_dw",
         options(wanted=((True, False),)), "gate"),
        (MASK, "no-mask-on-weight", "guard-page", DW_LOAD_W, DW_LOAD_W.replace("True, True", "False, False"),
         options(wanted=((False, True),)), "weight"),
        (WRITE, "row-mask-of-store-removed", "guard-page",
         "m_dw = (o_n[:, None] < N) & (o_k", "m_dw = (o_n[:, None] >= 0) & (o_k", options(), "dw"),
        (OTHER, "no-other-on-tail", "poison", OTHER_ROWS, "& (o_column[None, :] < readable))",
         options(wanted=((True, False),))),
        (UNWRITTEN, "last-column-not-stored", "poison", DW_STORE,
         DW_STORE.replace("m_dw)", "m_dw & (o_k[None, :] < K - 1))")),
        (RACE, "partial-sums-all-in-row-0", "race-detection", "partial + t_n.to(tl.int64) * K + o_k",
         "partial + o_k", options(wanted=((False, True),))),
        (RACE, "groups-of-tiles-all-from-the-first", "race-detection", GROUPED,
         GROUPED.replace("first + ", ""), options(Case(17, 8, 585, "bf16"))),
        (RAW, "product-with-weight-in-bfloat16", "bfloat16-check", "tl.sum(acc * b_w, axis=0)",
         "tl.sum(acc.to(tl.bfloat16) * b_w.to(tl.bfloat16), axis=0)", options(SMALL16)),
        (VALUE, "tail-of-reduction-dropped", "error-rule", "if full < M:", "if full < 0:"),
        (VALUE, "gate-applied-twice", "error-rule", "(acc * b_g[None, :]).to(dw.",
         "(acc * b_g[None, :] * b_g[None, :]).to(dw."),
        (VALUE, "gate-not-applied", "error-rule", "(acc * b_g[None, :]).to(dw.", "acc.to(dw."),
        (VALUE, "tf32-in-ieee", "error-rule", "tl.trans(b_dy), b_x, acc, input_precision=PRECISION",
         'tl.trans(b_dy), b_x, acc, input_precision="tf32"'),
    ),
    *in_kernel(
        "fold", options(),
        (READ, "row-mask-removed", "guard-page", FOLD_LOAD_W,
         FOLD_LOAD_W.replace("True, True", "False, True"), options(), "weight"),
        (MASK, "no-mask-on-weight", "guard-page", FOLD_LOAD_W,
         FOLD_LOAD_W.replace("True, True", "False, False"), options(), "weight"),
        (MASK, "no-mask-on-gate", "guard-page", f"    {LOAD_GATE}.to(tl.float32)\n    p_folded",
         "    b_g = tl.load(gate + o_k).to(tl.float32)\n    p_folded", options(), "gate"),
        (WRITE, "row-mask-of-store-removed", "guard-page", "m_folded = (o_n[:, None] < N)",
         "m_folded = (o_n[:, None] >= 0)", options(), "folded"),
        (UNWRITTEN, "last-column-not-stored", "poison", FOLD_STORE,
         FOLD_STORE.replace("m_folded)", "m_folded & (o_k[None, :] < K - 1))")),
        (RACE, "programs-overlap-by-a-row", "race-detection", "i_n, i_k = tl.program_id(0) * BLOCK_N,",
         "i_n, i_k = tl.program_id(0) * (BLOCK_N - 1),"),
        (RAW, "gate-times-weight-in-bfloat16", "bfloat16-check", FOLD_STORE,
         FOLD_STORE.replace("b_w * b_g[", "b_w.to(tl.bfloat16) * b_g.to(tl.bfloat16)["),
         options(SMALL16)),
        (VALUE, "gate-applied-twice", "error-rule", FOLD_STORE,
         FOLD_STORE.replace("b_g[None, :]", "b_g[None, :] * b_g[None, :]")),
        (VALUE, "gate-not-applied", "error-rule", FOLD_STORE, FOLD_STORE.replace(" * b_g[None, :]", "")),
    ),
    *in_kernel(
        "unfold", options(),
        (READ, "row-mask-removed", "guard-page", "m_tile = (o_n[:, None] < N) & m_k[None, :]",
         "m_tile = (o_n[:, None] >= 0) & m_k[None, :]", options(), "product"),
        (MASK, "no-mask-on-weight", "guard-page", UNFOLD_LOAD_W,
         UNFOLD_LOAD_W.replace(", mask=m_tile, other=0.0", ""),
         options(wanted=((False, True),)), "weight"),
        (MASK, "no-mask-on-folded", "guard-page", UNFOLD_LOAD_FOLDED, "b_w = tl.load(folded + o_tile)",
         options(MIXED16, is_folded=True, wanted=((False, True),)), "folded"),
        (WRITE, "row-mask-of-store-removed", "guard-page", UNFOLD_STORE,
         UNFOLD_STORE.replace("=m_tile", "=(o_n[:, None] >= 0) & m_k[None, :]"), options(), "dw"),
        (OTHER, "no-other-on-product", "poison", UNFOLD_LOAD, UNFOLD_LOAD.replace(", other=0.0", "")),
        (OTHER, "no-other-on-folded", "poison", UNFOLD_LOAD_FOLDED,
         UNFOLD_LOAD_FOLDED.replace(", other=0.0", ""), options(MIXED16, is_folded=True)),
        (UNWRITTEN, "last-column-not-stored", "poison", UNFOLD_STORE,
         UNFOLD_STORE.replace("m_tile)", "m_tile & (o_k[None, :] < K - 1))")),
        (UNWRITTEN, "last-partial-sum-not-stored", "poison", "b_dg, mask=m_k)", "b_dg, mask=o_k < K - 1)"),
        (RACE, "partial-sums-all-in-row-0", "race-detection", "partial + i_n * K + o_k", "partial + o_k",
         options(Case(1, 17, 141, "f32"), wanted=((False, True),))),
        (RAW, "product-with-weight-in-bfloat16", "bfloat16-check", "tl.sum(b_product * b_w, axis=0)",
         "tl.sum(b_product.to(tl.bfloat16) * b_w.to(tl.bfloat16), axis=0)",
         options(SMALL16, product16=True)),
        (VALUE, "last-rows-dropped", "error-rule", "b_dg += tl.sum(b_product * b_w, axis=0)",
         "b_dg += tl.where(n + BLOCK_N < N, 1.0, 0.0) * tl.sum(b_product * b_w, axis=0)",
         options(wanted=((False, True),))),
        (VALUE, "gate-not-divided-out", "error-rule", "b_dg = b_dg / tl.where(m_k, b_g, 1.0)",
         "b_dg = b_dg * 1.0", options(MIXED16, is_folded=True)),
        (VALUE, "divided-by-a-gate-of-zero", "poison", "1.0)) > smallest", "1.0)) >= 0.0",
         options(MIXED16, is_folded=True, gates="zero")),
        (VALUE, "sign-of-the-gate-lost", "error-rule", "b_dg = b_dg / tl.where(m_k, b_g, 1.0)",
         "b_dg = b_dg / tl.where(m_k, tl.abs(b_g), 1.0)", options(MIXED16, is_folded=True)),
        (VALUE, "divided-though-not-folded", "error-rule", DIVIDE, DIVIDE_ALWAYS),
        (VALUE, "gate-applied-twice", "error-rule", "(b_product * b_g[None, :])",
         "(b_product * b_g[None, :] * b_g[None, :])"),
        (VALUE, "gate-not-applied", "error-rule", "(b_product * b_g[None, :])", "b_product"),
    ),
    *in_kernel(
        "fold_gates", options(FOUR),
        (READ, "row-mask-removed", "guard-page", FOLD_LOAD_W,
         FOLD_LOAD_W.replace("N, K, ", "N + 1, K, "), options(FOUR), "weight_0"),
        (MASK, "no-mask-on-bias", "guard-page", LOAD_BIAS, "b_bias = tl.load(bias + o_bias)",
         options(FOUR), "bias_0"),
        (WRITE, "bias-stored-past-its-end", "guard-page", CAST_STORE,
         CAST_STORE.replace("m_bias)", "i_k == 0)"), options(FOUR), "cast_0"),
        (UNWRITTEN, "last-of-the-bias-not-stored", "poison", CAST_STORE,
         CAST_STORE.replace("m_bias)", "m_bias & (o_bias < N - 1))")),
        (RACE, "every-column-of-tiles-stores-the-bias", "race-detection", "& (i_k == 0)", "& (i_k >= 0)"),
        (RAW, "gate-times-weight-in-bfloat16", "bfloat16-check", FOLD_STORE,
         FOLD_STORE.replace("b_w * b_g[", "b_w.to(tl.bfloat16) * b_g.to(tl.bfloat16)[")),
        (VALUE, "gate-of-another-linear", "error-rule",
         "weight_1, gate_1, bias_1, folded_1, cast_1, N_1, K_1, i",
         "weight_1, gate_0, bias_1, folded_1, cast_1, N_1, K_1, i"),
        (VALUE, "gate-not-applied", "error-rule", FOLD_STORE, FOLD_STORE.replace(" * b_g[None, :]", "")),
    ),
    *in_kernel(
        "unfold_gates", options(FOUR),
        (READ, "row-mask-removed", "guard-page", FOUR_LOAD_W,
         FOUR_LOAD_W.replace("N, K, K", "N + 1, K, K"), options(FOUR), "weight_0"),
        (MASK, "no-mask-on-gate", "guard-page", FOUR_LOAD_GATE, "b_gate = tl.load(gate + o_k)",
         options(FOUR), "gate_0"),
        (WRITE, "row-mask-of-store-removed", "guard-page", "m_dw = (o_n[:, None] < N) & m_k[None, :]",
         "m_dw = (o_n[:, None] < N + 1) & m_k[None, :]", options(FOUR), "dw_0"),
        (OTHER, "no-other-on-the-columns", "poison", OTHER_ROWS, "& (o_column[None, :] < readable))"),
        (UNWRITTEN, "last-gradient-of-a-gate-not-stored", "poison", FOUR_STORE_DG,
         FOUR_STORE_DG.replace("m_k", "o_k < K - 1")),
        (RACE, "programs-overlap", "race-detection", "o_k = i * BLOCK_K +", "o_k = i * (BLOCK_K // 2) +"),
        (RAW, "product-with-weight-in-bfloat16", "bfloat16-check", "acc += b_dfolded * b_weight",
         "acc += b_dfolded.to(tl.bfloat16) * b_weight.to(tl.bfloat16)"),
        (VALUE, "last-rows-dropped", "error-rule", "acc += b_dfolded * b_weight",
         "acc += tl.where(n + BLOCK_N < N, 1.0, 0.0) * b_dfolded * b_weight"),
        (VALUE, "gate-not-applied", "error-rule", "(b_dfolded * b_gate[None, :])", "b_dfolded"),
        (VALUE, "weight-of-another-linear", "error-rule",
         "product_1, weight_1, gate_1, db_1, dw_1, dg_1, dbias_1, N_1, K_1, i",
         "product_1, weight_0, gate_1, db_1, dw_1, dg_1, dbias_1, N_1, K_1, i"),
        (VALUE, "sign-of-the-bias-gradient", "error-rule", "tl.store(dbias + o_n, b_db",
         "tl.store(dbias + o_n, -b_db"),
    ),
    *in_kernel(
        "gate_gradient", options(),
        (READ, "row-mask-removed", "guard-page", GATE_LOAD, GATE_LOAD.replace("True, True", "False, True"),
         options(), "partial"),
        (MASK, "no-mask-on-gate", "guard-page", GATE_LOAD_GATE,
         GATE_LOAD_GATE.replace(", mask=m_k, other=0.0", ""), options(), "gate"),
        (WRITE, "mask-of-store-removed", "guard-page", GATE_STORE, GATE_STORE.replace(", mask=m_k", ""),
         options(Case(1, 45, 1, "f32")), "dg"),
        (OTHER, "no-other-on-partial-sums", "poison", OTHER_ROWS, "& (o_column[None, :] < readable))"),
        (UNWRITTEN, "last-column-not-stored", "poison", GATE_STORE,
         GATE_STORE.replace("=m_k", "=o_k < K - 1")),
        (RACE, "programs-overlap", "race-detection", "o_k = tl.program_id(0) * BLOCK_K +",
         "o_k = tl.program_id(0) * (BLOCK_K // 2) +", options(Case(1, 115, 1, "f32"))),
        (RAW, "square-of-a-bfloat16-gate", "bfloat16-check", GATE_LOAD_GATE,
         GATE_LOAD_GATE.replace(".to(tl.float32)", " * tl.load(gate + o_k, mask=m_k, other=0.0)"),
         options(Case(1, 61, 1, "bf16", gate16=True))),
        (VALUE, "tail-of-rows-dropped", "error-rule", "range(0, rows, BLOCK_R)",
         "range(0, rows // BLOCK_R * BLOCK_R, BLOCK_R)"),
        (VALUE, "sign-of-penalty-wrong", "error-rule", "+ l1 * sign", "- l1 * sign"),
        (VALUE, "penalty-forgotten", "error-rule", "+ l1 * sign)", ")"),
        (VALUE, "penalty-at-a-gate-of-zero", "error-rule", "b_g < 0, 1.0", "b_g <= 0, 1.0"),
    ),
]
# fmt: on
PLANTED_IN = {
    **CHECKS,
    "fold": check_fold,
    "unfold": check_unfold,
    "fold_gates": check_fold_gates,
    "unfold_gates": check_unfold_gates,
    "gate_gradient": functools.partial(check_gate_gradient, rows=37, l1=0.25),
}


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, PLANTED_IN[defect.kernel], defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    # A fold is elementwise: what it makes of a masked lane is masked again where it is stored.
    folds = [("fold", OTHER), ("fold_gates", OTHER)]
    assert_defects_of_every_kind(DEFECTS, gated_linear, KINDS, but_for=folds)


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
