"""What the kernels of layer_norm_gather compute, proved in the interpreter, and proof that the proofs bite.

The first half runs the kernels, through their launchers and through both whole passes, next to protected
pages, with poisoned outputs and NaN in the padding of every input, and compares with float64. The second half
plants defects and expects each to be caught by the proof that its id names.
"""

import importlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.support.guarded_memory import guarded
from tests.support.kernel_proofs import (
    KINDS,
    PAD_IN,
    PAD_OUT,
    Defect,
    assert_compiled_ahead_of_time,
    assert_defect_is_caught,
    assert_defects_of_every_kind,
    assert_like,
    assert_padding_is_zero,
    loaded,
    place,
    run_check,
)
from tests.support.numerics import assert_close_to_float64
from tests.vtp_kernels.test_layer_norm_gather import DTYPES, EPS, NAMES, inputs, references

MODULE = "vtp_kernels.layer_norm_gather"
op_module = importlib.import_module(MODULE)

# Under autocast x stays float32.
AUTOCAST = {"f32-to-bf16": torch.bfloat16, "f32-to-f16": torch.float16}


@dataclass(frozen=True)
class Case:
    """x [M, D], of which `kept` columns are put out; dtypes, layout, and which end of it is at the page."""

    M: int
    D: int
    kept: int
    dtypes: str = "f32"
    layout: str = "padded"
    side: str = "end"
    affine: bool = True
    shift: bool = False
    mean: float = 0.0
    programs: int = op_module._BWD_PROGRAMS

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded") + ["no-affine"] * (not self.affine)
        flags += ["shift"] * self.shift
        return "-".join([f"M{self.M}-D{self.D}-kept{self.kept}-{self.dtypes}-{self.side}", *flags])


# -- In the worker ------------------------------------------------------------------------------------------


class Data:
    """The tensors of a case, and what the kernels should make of them."""

    def __init__(self, case):
        self.case = case
        dtypes = DTYPES.get(case.dtypes, DTYPES["f32"])
        x, weight, bias, index, dout = inputs(case.M, case.D, case.kept, *dtypes)
        x = x + case.mean
        self.out_dtype = AUTOCAST.get(case.dtypes, x.dtype)
        dout = dout.to(self.out_dtype)
        if not case.affine:
            weight = bias = None
        shift = torch.linspace(-2, 3, case.D).to(x.dtype) if case.shift else None
        self.tensors = dict(x=x, weight=weight, bias=bias, index=index, dout=dout, shift=shift)
        exact, same_dtype = references(x, weight, bias, index, dout, shift)
        self.expected = dict(zip(NAMES, zip(exact, same_dtype, strict=True), strict=True))

    def placed(self, *names):
        return [place(self.tensors[name], self.case.layout, self.case.side) for name in names]

    def compare(self, name, out):
        """The error rule; a float32 gradient beside a 16-bit x cannot be nearer than its 16-bit operands."""
        exact, same_dtype = self.expected[name]
        dtype = self.out_dtype if name == "out" else same_dtype.dtype
        assert_close_to_float64(out.reshape(exact.shape).to(dtype), exact, same_dtype.to(dtype), name)


def prove(check, case, replacements=(), **kwargs):
    """`check(op, data)` with the case's number of programs; keys of the variants that it launched."""
    op = loaded(MODULE, replacements)
    position = op._position
    attributes = {
        "_BWD_PROGRAMS": case.programs,
        "_position": lambda *arguments: guarded(position(*arguments), case.side),
    }
    return run_check(check, op, Data(case), attributes=attributes, **kwargs)


def check_fwd(op, data):
    x, weight, bias, index, shift = data.placed("x", "weight", "bias", "index", "shift")
    weight, bias = (None if t is None else op._float32(t) for t in (weight, bias))
    out = op._launch_fwd(x, weight, bias, index, EPS, data.out_dtype, shift)
    assert out.dtype == data.out_dtype
    data.compare("out", out)
    assert_padding_is_zero("out", out)


def check_bwd(op, data):
    dout, x, weight, index = data.placed("dout", "x", "weight", "index")
    dx, partial = op._launch_bwd(dout, x, op._float32(weight), index, EPS)
    assert dx.dtype == x.dtype and partial.dtype == torch.float32
    data.compare("dx", dx)
    assert_padding_is_zero("dx", dx)
    data.compare("dweight", partial[:, 0].sum(0))
    data.compare("dbias", partial[:, 1].sum(0))


def check_passes(op, data):
    """Both whole passes."""
    x, weight, bias, index, dout = data.placed("x", "weight", "bias", "index", "dout")
    arguments = x, weight, bias, index, EPS, data.out_dtype
    out = op._forward_triton(*arguments)
    assert_like([out], [op._forward_fake(*arguments)])
    data.compare("out", out)
    padded = op._forward_triton(*arguments, padded=True)
    assert_like([padded], [op._forward_fake(*arguments, padded=True)])
    assert torch.equal(padded[..., : out.shape[-1]], out) and not padded[..., out.shape[-1] :].any()
    arguments = dout, x, weight, index, EPS
    dx, of_vectors = op._backward_triton(*arguments)
    assert_like((dx, of_vectors), op._backward_fake(*arguments))
    gradients = dx, *(of_vectors if of_vectors.numel() else (of_vectors, of_vectors))
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        if weight is None and name != "dx":
            assert not gradient.numel()
        else:
            data.compare(name, gradient)


def check_that_a_second_run_is_equal(op, data):
    """Bit for bit: sums are made in a fixed order."""
    dout, x, weight, index = data.placed("dout", "x", "weight", "index")
    first, second = (op._backward_triton(dout, x, weight, index, EPS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- Correct kernels pass -----------------------------------------------------------------------------------


def run(interpreter, check, case, **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time."""
    launched = interpreter.run(prove, check, case, **kwargs)
    assert_compiled_ahead_of_time(launched, MODULE, "sm_80")
    return launched


# Widths of pruned models, on both axes; every dtype meets both sides of memory.
ODD = [(1, 17, 1), (37, 61, 15), (9, 115, 115), (61, 197, 37), (5, 461, 115), (17, 15, 15), (3, 1021, 461)]
_NAMES = [*DTYPES, *AUTOCAST]
ODD_CASES = [
    Case(*shape, _NAMES[(i + turn) % len(_NAMES)], side=side)
    for i, shape in enumerate(ODD)
    for turn, side in ((0, "end"), (3, "begin"))
]
CHECKS = {"fwd": check_fwd, "bwd": check_bwd}


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("kernel", CHECKS)
def test_kernel_at_odd_widths(interpreter, kernel, case):
    run(interpreter, CHECKS[kernel], case)


@pytest.mark.parametrize("kept", ["all", "some"])
@pytest.mark.parametrize("D", op_module.FWD_TILES)
@pytest.mark.parametrize("kernel", CHECKS)
def test_every_entry_of_the_tables(interpreter, kernel, D, kept):
    """No power of two of columns or rows, and more than one block of kept columns where they are gathered."""
    table = {"fwd": op_module.FWD_TILES, "bwd": op_module.BWD_TILES}[kernel]
    case = Case(2 * table[D].blocks["ROWS"] + 1, D - 3, D - 3 if kept == "all" else D - 11, "bf16-f32")
    launched = run(interpreter, CHECKS[kernel], case)
    assert {dict(key[2])["BLOCK_D"] for key in launched} == {D}


@pytest.mark.parametrize("layout", ["wide", "far"])
@pytest.mark.parametrize(("kept", "dtypes"), [(15, "bf16"), (61, "f32")], ids=["gathered", "all-columns"])
@pytest.mark.parametrize("kernel", CHECKS)
def test_strided_rows_and_rows_beyond_32_bits(interpreter, kernel, kept, dtypes, layout):
    run(interpreter, CHECKS[kernel], Case(9, 61, kept, dtypes, layout))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kept", [15, 61], ids=["gathered", "all-columns"])
def test_forward_without_weight_and_bias(interpreter, kept, dtypes):
    run(interpreter, check_fwd, Case(9, 61, kept, dtypes, affine=False))


@pytest.mark.parametrize("side", ["begin", "end"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kept", [15, 61], ids=["gathered", "all-columns"])
def test_forward_of_shifted_rows(interpreter, kept, dtypes, side):
    run(interpreter, check_fwd, Case(9, 61, kept, dtypes, side=side, affine=False, shift=True))


@pytest.mark.parametrize("kernel", CHECKS)
def test_variance_does_not_cancel_where_the_mean_is_large(interpreter, kernel):
    run(interpreter, CHECKS[kernel], Case(9, 197, 61, mean=1000.0))


@pytest.mark.parametrize("layout", ["padded", "tight", "misaligned", "transposed", "images"])
@pytest.mark.parametrize(
    ("kept", "dtypes", "affine"),
    [(21, "f32", True), (61, "bf16-f32", True), (24, "f16", True), (21, "bf16", False), (61, "f32", False)],
)
def test_both_passes_in_every_layout(interpreter, kept, dtypes, affine, layout):
    run(interpreter, check_passes, Case(36, 61, kept, dtypes, layout, affine=affine))


def test_a_program_passes_over_several_tiles_of_rows(interpreter):
    """As there are for more rows than the interpreter takes in a second."""
    run(interpreter, check_bwd, Case(61, 61, 15, programs=3))


def test_a_second_run_is_equal_bit_for_bit(interpreter):
    run(interpreter, check_that_a_second_run_is_equal, Case(37, 61, 15, "bf16"))


def test_layers_of_any_widths_and_batches_of_any_size_share_two_compilations():
    with op_module.launching.recording("layer_norm_gather", "sm_90") as found:
        for M, kept in ((1, 37), (197, 115), (25216, 461), (100001, 760)):
            x, weight = torch.empty(M, 768, device="meta"), torch.empty(kept, device="meta")
            index = torch.empty(kept, dtype=torch.int64, device="meta")
            out = op_module._forward_triton(x, weight, weight, index, EPS, torch.bfloat16)
            op_module._backward_triton(out, x, weight, index, EPS)
    assert len(found) == 2


def test_rows_wider_than_the_kernels_take_are_left_to_pytorch():
    """And so are float64 and tensors without elements; nothing is launched, or it would fail here."""
    for x in (torch.randn(3, 4097), torch.randn(3, 5).double(), torch.empty(0, 5)):
        out = op_module._forward_triton(x, None, None, None, EPS, x.dtype)
        assert torch.equal(out, F.layer_norm(x, x.shape[-1:], eps=EPS))


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
SMALL = Case(37, 61, 15)
ALL = Case(37, 61, 61)  # no index
HALF = Case(37, 61, 15, "bf16")
BEFORE = Case(37, 61, 15, side="begin")
SHIFTED = Case(37, 61, 15, affine=False, shift=True)


def planted(kernel, kind, what, proof, old, new, case=SMALL, argument=""):
    return Defect(kernel, kind, what, proof, old, new, (("case", case),), argument)


# In the helper that loads whole rows.
LOAD = "tl.load(p_tile, mask=(o_row[:, None] < rows) & (o_column[None, :] < readable), other=0.0)"
LOAD_WIDTH = "(columns + 7) // 8 * 8"
CLEAR = "b_tile = tl.where(o_column[None, :] < columns, b_tile, tl.zeros_like(b_tile))"
ANY_ROW = "(o_m[:, None] >= 0)"
FWD_INDEX = "tl.load(index + o_j, mask=o_j < kept, other=0)"
FWD_WEIGHT = "tl.load(weight + o_j, mask=o_j < kept, other=0.0)"
FWD_BIAS = "tl.load(bias + o_j, mask=o_j < kept, other=0.0)"
FWD_SHIFT = "tl.load(shift + o_d, mask=o_d < D, other=0.0)"
FWD_KEPT = "m_kept = (o_m[:, None] < M) & (o_j[None, :] < kept)"
FWD_STORE = "mask=(o_m[:, None] < M) & (o_j[None, :] < (kept + 7) // 8 * 8)"
BWD_POSITION = "tl.load(position + o_d, mask=o_d < D, other=-1)"
BWD_WEIGHT = "tl.load(weight + o_j, mask=m_j, other=0.0)"
BWD_DY = "tl.load(p_dy, mask=m_dy, other=0.0)"
BWD_STORE = "tl.store(p_dx, b_dx, mask=(o_m[:, None] < M) & (o_d[None, :] < (D + 7) // 8 * 8))"
BWD_DBIAS = "tl.store(p_partial + kept, tl.sum(b_dbias, axis=0), mask=m_j)"

# Each: kernel, kind, what is wrong, the proof, old and new text; what is run; the argument that is overrun.
# fmt: off
DEFECTS = [planted(*row) for row in (
    ("fwd", READ, "row-mask-of-x-removed", "guard-page", LOAD, LOAD.replace("< rows", ">= 0"), ALL, "x"),
    ("fwd", READ, "row-mask-of-kept-removed", "guard-page", FWD_KEPT,
     FWD_KEPT.replace("(o_m[:, None] < M)", ANY_ROW), SMALL, "x"),
    ("fwd", READ, "columns-of-a-whole-block-loaded", "guard-page", LOAD_WIDTH, "columns + 64", ALL, "x"),
    ("fwd", MASK, "no-mask-on-index", "guard-page", FWD_INDEX, "tl.load(index + o_j)", SMALL,
     "index"),
    ("fwd", MASK, "no-mask-on-weight", "guard-page", FWD_WEIGHT, "tl.load(weight + o_j)", SMALL,
     "weight"),
    ("fwd", MASK, "no-mask-on-bias", "guard-page", FWD_BIAS, "tl.load(bias + o_j)", ALL, "bias"),
    ("fwd", WRITE, "row-mask-of-store-removed", "guard-page", FWD_STORE,
     FWD_STORE.replace("(o_m[:, None] < M)", ANY_ROW), SMALL, "out"),
    ("fwd", WRITE, "column-mask-of-store-removed", "guard-page", FWD_STORE,
     "mask=(o_m[:, None] < M) & (o_j[None, :] >= 0)", Case(5, 61, 15), "out"),
    ("fwd", RACE, "programs-overlap", "race-detection", "tl.program_id(0) * ROWS +",
     "tl.program_id(0) * (ROWS - 1) +"),
    ("fwd", UNWRITTEN, "last-columns-not-stored", "poison", FWD_STORE,
     FWD_STORE.replace("(kept + 7) // 8", "kept // 8")),
    ("fwd", UNWRITTEN, "last-rows-not-launched", "poison", '(cdiv(M, config.blocks["ROWS"]),)',
     '(M // config.blocks["ROWS"],)'),
    ("fwd", RAW, "deviation-in-bfloat16", "bfloat16-check", "(b_kept - b_mean[:, None])",
     "(b_kept.to(tl.bfloat16) - b_mean[:, None].to(tl.bfloat16))", HALF),
    ("fwd", PAD_IN, "padding-of-x-enters-the-statistics", "poison", CLEAR, "pass"),
    ("fwd", PAD_OUT, "padding-of-out-not-zeroed", "padding", "tl.where(o_j[None, :] < kept, b_xhat, 0.0)",
     "b_xhat", Case(37, 61, 15, affine=False)),
    ("fwd", VALUE, "columns-not-gathered", "error-rule", "+ b_index[None, :]", "+ o_j[None, :]"),
    ("fwd", VALUE, "variance-from-the-mean-of-squares", "error-rule",
     "1.0 / tl.sqrt(tl.sum(b_deviation * b_deviation, axis=1) / D + eps)",
     "1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D - b_mean * b_mean + eps)", Case(37, 61, 15, mean=100.0)),
    ("fwd", VALUE, "statistics-of-a-whole-block", "error-rule",
     "b_deviation = tl.where(o_d[None, :] < D, b_x - b_mean[:, None], 0.0)",
     "b_deviation = b_x - b_mean[:, None]"),
    ("fwd", VALUE, "one-column-too-few-counted", "error-rule",
     "tl.sum(b_deviation * b_deviation, axis=1) / D", "tl.sum(b_deviation * b_deviation, axis=1) / (D - 1)"),
    ("fwd", VALUE, "mean-not-subtracted", "error-rule", "(b_kept - b_mean[:, None])", "b_kept", HALF),
    ("fwd", VALUE, "rounded-before-the-weight", "error-rule", "b_xhat = b_xhat * b_weight[None, :]",
     "b_xhat = b_xhat.to(tl.bfloat16).to(tl.float32) * b_weight[None, :]"),
    ("fwd", VALUE, "bias-not-added", "error-rule", " + b_bias[None, :]", ""),
    ("fwd", MASK, "no-mask-on-shift", "guard-page", FWD_SHIFT, "tl.load(shift + o_d)", SHIFTED, "shift"),
    ("fwd", VALUE, "shift-not-gathered", "error-rule", "shift + b_index", "shift + o_j", SHIFTED),
    ("fwd", VALUE, "shift-not-in-the-statistics", "error-rule", f"b_x += {FWD_SHIFT}",
     f"b_x += 0.0 * {FWD_SHIFT}", SHIFTED),
    ("bwd", READ, "row-mask-of-x-removed", "guard-page", LOAD, LOAD.replace("< rows", ">= 0"), SMALL, "x"),
    ("bwd", READ, "row-mask-of-dy-removed", "guard-page", "m_dy = (o_m[:, None] < M)", f"m_dy = {ANY_ROW}",
     SMALL, "dy"),
    ("bwd", MASK, "no-mask-on-position", "guard-page", BWD_POSITION, "tl.load(position + o_d)",
     SMALL, "position"),
    ("bwd", MASK, "no-mask-on-weight", "guard-page", BWD_WEIGHT, "tl.load(weight + o_j)", ALL, "weight"),
    ("bwd", MASK, "removed-columns-not-masked-in-dy", "guard-page", "(o_m[:, None] < M) & m_j[None, :]",
     "(o_m[:, None] < M) & (o_j[None, :] > -2)", BEFORE, "dy"),
    ("bwd", WRITE, "row-mask-of-store-removed", "guard-page", BWD_STORE,
     BWD_STORE.replace("(o_m[:, None] < M)", ANY_ROW), SMALL, "dx"),
    ("bwd", WRITE, "mask-of-partial-sums-removed", "guard-page", BWD_DBIAS,
     BWD_DBIAS.replace(", mask=m_j", ""), Case(5, 61, 61), "partial"),
    ("bwd", OTHER, "no-other-on-x", "poison", LOAD, LOAD.replace(", other=0.0", "")),
    ("bwd", OTHER, "no-other-on-dy", "poison", BWD_DY, BWD_DY.replace(", other=0.0", "")),
    ("bwd", RACE, "partial-sums-all-in-one-row", "race-detection",
     "partial + tl.program_id(0).to(tl.int64) * 2 * kept", "partial"),
    ("bwd", RACE, "programs-overlap", "race-detection", "first = tl.program_id(0) * rows_per_program",
     "first = tl.program_id(0) * (rows_per_program - 1)"),
    ("bwd", UNWRITTEN, "last-columns-not-stored", "poison", BWD_STORE,
     BWD_STORE.replace("(D + 7) // 8", "D // 8")),
    ("bwd", UNWRITTEN, "last-partial-sum-not-stored", "poison", BWD_DBIAS,
     BWD_DBIAS.replace("m_j", "m_j & (o_j < kept - 1)")),
    ("bwd", RAW, "product-in-bfloat16", "bfloat16-check", "b_dweight += b_dy * b_xhat",
     "b_dweight += (b_dy.to(tl.bfloat16) * b_xhat.to(tl.bfloat16)).to(tl.float32)", HALF),
    ("bwd", PAD_IN, "padding-of-x-enters-the-statistics", "poison", CLEAR, "pass"),
    ("bwd", PAD_OUT, "padding-of-dx-not-zeroed", "padding", "tl.where(o_d[None, :] < D, b_dx, 0.0)", "b_dx"),
    ("bwd", VALUE, "removed-columns-without-gradient", "error-rule",
     "b_dx = tl.where(o_d[None, :] < D, b_dx, 0.0)", "b_dx = tl.where(m_j[None, :], b_dx, 0.0)"),
    ("bwd", VALUE, "gradient-of-the-mean-forgotten", "error-rule", "b_g - b_mean_g[:, None] - ", "b_g - ",
     HALF),
    ("bwd", VALUE, "gradient-of-the-variance-forgotten", "error-rule", " - b_xhat * b_mean_gx[:, None]", "",
     HALF),
    ("bwd", VALUE, "weight-not-applied", "error-rule", "b_g = b_dy * b_weight[None, :]", "b_g = b_dy", HALF),
    ("bwd", VALUE, "tiles-after-the-first-dropped", "error-rule", "b_dweight += b_dy * b_xhat",
     "b_dweight = b_dy * b_xhat", Case(61, 61, 15, programs=3)),
    ("bwd", VALUE, "sums-in-bfloat16", "error-rule", "b_dbias += b_dy",
     "b_dbias = (b_dbias + b_dy).to(tl.bfloat16).to(tl.float32)"),
)]
# fmt: on


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, CHECKS[defect.kernel], defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    # The forward pass is row by row: what it makes of a masked row or column is masked again where it is
    # stored.
    assert_defects_of_every_kind(DEFECTS, op_module, (*KINDS, PAD_IN, PAD_OUT), but_for=[("fwd", OTHER)])


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
