"""What the kernels of compact_mlp compute, proved in the interpreter, and proof that the proofs bite.

The first half runs the kernels, through their launchers and through both whole passes, next to protected
pages, with poisoned outputs and NaN in the padding of every input, and compares with float64. The second half
plants defects and expects each to be caught by the proof that its id names.
"""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

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
    to_tf32,
)
from tests.support.numerics import assert_close_to_float64
from tests.vtp_kernels.test_compact_mlp import ARGUMENTS, inputs, references

MODULE = "vtp_kernels.compact_mlp"
op_module = importlib.import_module(MODULE)

NAMES = ("out", *("d" + name for name in ARGUMENTS))
# Small problems can take either way.
FUSED, TWO_LAUNCHES = ("compact_mlp", "fused"), ("compact_mlp", "two_launches")


@dataclass(frozen=True)
class Case:
    """x [M, K], W1 [hidden, K], for SwiGLU twice as high, W2 [N, hidden]; layout, the end at the page."""

    M: int
    K: int
    hidden: int
    N: int
    dtypes: str = "bf16"
    layout: str = "padded"
    side: str = "end"
    residual: bool = True
    biases: bool = True
    activation: str = "gelu"

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded") + [self.activation] * (self.activation != "gelu")
        flags += ["no-residual"] * (not self.residual) + ["no-biases"] * (not self.biases)
        sizes = f"M{self.M}-K{self.K}-hidden{self.hidden}-N{self.N}"
        return "-".join([sizes, self.dtypes, self.side, *flags])


# -- In the worker ------------------------------------------------------------------------------------------


class Data:
    """The tensors of a case, and what the kernels should make of them."""

    def __init__(self, case):
        self.case, is_tf32 = case, case.dtypes == "tf32"
        dtypes = "f32" if is_tf32 else case.dtypes
        sizes, activation = (case.M, case.K, case.hidden, case.N), case.activation
        *tensors, dout = inputs(*sizes, dtypes, activation=activation)
        missing = ("fc1_bias", "fc2_bias") * (not case.biases) + ("residual",) * (not case.residual)
        tensors = [None if name in missing else t for name, t in zip(ARGUMENTS, tensors, strict=True)]
        if not case.residual:
            dout = dout.to(tensors[0].dtype)
        exact, same_dtype = references(*tensors, dout, activation=activation)
        x, w1, b1, w2, b2, residual = tensors
        z64 = F.linear(*(None if t is None else t.double() for t in (x, w1, b1)))
        if is_tf32:  # PyTorch on the CPU has none: what it would multiply
            x, w1, w2 = map(to_tf32, (x, w1, w2))
            _, same_dtype = references(x, w1, b1, w2, b2, residual, dout, activation=activation)
        self.expected = dict(zip(NAMES, zip(exact, same_dtype, strict=True), strict=True))
        self.tensors = dict(zip((*ARGUMENTS, "dout"), (*tensors, dout), strict=True))
        if is_tf32:
            h = op_module.activated(F.linear(x, w1, b1), activation)
            out = F.linear(to_tf32(h), w2, b2)
            self.expected["out"] = exact[0], out if residual is None else residual + out
        self.expected["z"] = z64, F.linear(x, w1, b1)

    def placed(self, *names):
        layout, side = self.case.layout, self.case.side
        of_weights = {"images": "tight", "far": "padded"}.get(layout, layout)
        places = dict.fromkeys(("x", "residual", "dout"), layout)
        return [place(self.tensors[name], places.get(name, of_weights), side) for name in names]

    def compare(self, name, out):
        exact, same_dtype = self.expected[name]
        assert_close_to_float64(out.reshape(exact.shape), exact, same_dtype, name)


def prove(check, case, replacements=(), **conditions):
    """`check(op, data)` under the case's conditions; keys of the variants that it launched."""
    op = loaded(MODULE, replacements)
    return run_check(check, op, Data(case), tf32=case.dtypes == "tf32", **conditions)


def check_fwd(op, data, keep=(False, True)):
    for keep_z in keep:
        tensors = data.placed(*ARGUMENTS)
        out, z = op._launch_fwd(*tensors, keep_z)
        data.compare("out", out)
        assert_padding_is_zero("out", out)
        assert (z is not None) == keep_z
        if keep_z:
            data.compare("z", z)
            assert_padding_is_zero("z", z)


def check_gelu_bwd(op, data):
    """On M rows of `hidden` numbers, which here need not come from any product."""
    case, x_dtype = data.case, data.tensors["x"].dtype
    g = torch.Generator().manual_seed(1)
    dh, z = (torch.randn(case.M, case.hidden, generator=g).to(x_dtype) for _ in range(2))
    dz, h, partial = op._launch_gelu_bwd(*(place(t, case.layout, case.side) for t in (dh, z)))
    gelu_backward = torch.ops.aten.gelu_backward
    dz64 = gelu_backward(dh.double(), z.double())
    assert_close_to_float64(dz, dz64, gelu_backward(dh, z), "dz")
    assert_close_to_float64(h, F.gelu(z.double()), F.gelu(z), "h")
    sums = gelu_backward(dh.float(), z.float()).sum(0)
    assert_close_to_float64(partial.sum(0), dz64.sum(0), sums, "db1")
    assert_padding_is_zero("dz", dz)
    assert_padding_is_zero("h", h)


def _halves_of_z(data):
    """z [M, 2 hidden] and dh, which here need not come from any product, in the dtype of x.

    Values and dh are of like size: silu' has a zero, where what PyTorch rounds depends on whether it was
    compiled to fused multiply-adds, and their product must not be far larger there than elsewhere.
    """
    case, dtype = data.case, data.tensors["x"].dtype
    g = torch.Generator().manual_seed(1)
    gate, value, dh = torch.randn(3, case.M, case.hidden, generator=g)
    value, dh = (t.sign() * (0.5 + torch.rand(t.shape, generator=g)) for t in (value, dh))
    return torch.cat([gate, value], dim=-1).to(dtype), dh.to(dtype)


def check_swiglu_bwd(op, data):
    z, dh = _halves_of_z(data)
    dz, h, partial = op._launch_swiglu_bwd(*(place(t, data.case.layout, data.case.side) for t in (dh, z)))
    gradient, activated = op_module._activation_backward, op_module.activated
    dz64 = gradient(dh.double(), z.double(), True)
    assert_close_to_float64(dz, dz64, gradient(dh, z, True), "dz")
    assert_close_to_float64(h, activated(z.double(), "swiglu"), activated(z, "swiglu"), "h")
    sums = gradient(dh.float(), z.float(), True).sum(0)
    assert_close_to_float64(partial.sum(0), dz64.sum(0), sums, "db1")
    assert_padding_is_zero("dz", dz)
    assert_padding_is_zero("h", h)


NEEDS = [(True,) * 5, (False, True, True, True, True), (True, False, False, False, False),
         (False, False, False, True, False), (False, False, True, False, True)]  # fmt: skip


def check_passes(op, data):
    """Both whole passes, the backward one for several subsets of the gradients."""
    tensors, swiglu = data.placed(*ARGUMENTS), data.case.activation == "swiglu"
    for keep_z in (False, True):
        out, z = op._forward_triton(*tensors, keep_z, swiglu)
        assert_like((out, z), op._forward_fake(*tensors, keep_z, swiglu))
        data.compare("out", out)
    x, w1, _, w2, _, _ = tensors
    (dout,) = data.placed("dout")
    for needs in NEEDS:
        arguments = dout, x, z, w1, w2, *needs, swiglu
        gradients = op._backward_triton(*arguments)
        assert_like(gradients, op._backward_fake(*arguments))
        for name, gradient, need in zip(NAMES[1:6], gradients, needs, strict=True):
            assert bool(gradient.numel()) == need
            if need and data.expected[name][0] is not None:
                data.compare(name, gradient)


def check_that_a_second_run_is_equal(op, data):
    """Bit for bit: sums are made in a fixed order."""
    x, w1, b1, w2, b2, residual, dout = data.placed(*ARGUMENTS, "dout")
    swiglu = data.case.activation == "swiglu"
    first, second = (op._forward_triton(x, w1, b1, w2, b2, residual, True, swiglu) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    arguments = dout, x, first[1], w1, w2, *(True,) * 5, swiglu
    first, second = (op._backward_triton(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- Correct kernels pass -----------------------------------------------------------------------------------


def run(interpreter, check, case, descriptors=False, **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time."""
    launched = interpreter.run(prove, check, case, descriptors=descriptors, **kwargs)
    assert_compiled_ahead_of_time(launched, MODULE, "sm_90" if descriptors else "sm_80")
    return launched


# Widths of pruned models on every axis; every dtype meets both sides of memory.
ODD = [
    (1, 17, 1, 15),
    (37, 61, 115, 61),
    (65, 115, 37, 197),
    (15, 15, 197, 115),
    (5, 197, 61, 37),
    (17, 1, 15, 1),
]
_NAMES = ["bf16", "f16", "tf32", "bf16-f32", "f16-f32"]
ODD_CASES = [
    Case(*shape, _NAMES[(i + turn) % 5], side=side, residual=(i + turn) % 3 > 0)
    for i, shape in enumerate(ODD)
    for turn, side in ((0, "end"), (2, "begin"))
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_fused_kernel_at_odd_widths(interpreter, case, descriptors):
    run(interpreter, check_fwd, case, descriptors)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    ("dtypes", "width"),
    [(name, w) for size, name in ((2, "bf16"), (4, "tf32")) for w in op_module.FWD_TILES[size]],
)
def test_every_entry_of_the_table(interpreter, dtypes, width, descriptors):
    """Two programs, and a tail of every loop."""
    blocks = op_module.FWD_TILES[2 if dtypes == "bf16" else 4][width].blocks
    case = Case(65, blocks["BLOCK_K"] + 5, 2 * blocks["BLOCK_H"] + 5, width - 3, dtypes)
    (launched,) = run(interpreter, check_fwd, case, descriptors, keep=(True,))
    assert dict(launched[2]).items() >= {**blocks, "DESCRIPTORS": descriptors}.items()


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("sizes", [(9, 64, 61, 16), (9, 61, 128, 15), (9, 64, 128, 192)], ids=str)
def test_widths_that_are_whole_tiles(interpreter, sizes, descriptors):
    run(interpreter, check_fwd, Case(*sizes), descriptors)


@pytest.mark.parametrize("layout", ["wide", "far"])
@pytest.mark.parametrize("dtypes", ["bf16", "tf32"])
def test_strided_rows_and_rows_beyond_32_bits(interpreter, dtypes, layout):
    run(interpreter, check_fwd, Case(9, 37, 61, 15, dtypes, layout))
    run(interpreter, check_gelu_bwd, Case(9, 1, 61, 1, dtypes, layout))


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_gelu_backward_at_odd_widths(interpreter, case):
    run(interpreter, check_gelu_bwd, case)


def test_gelu_backward_of_several_programs_each_way(interpreter):
    run(interpreter, check_gelu_bwd, Case(261, 1, 135, 1))


# The gate and the value of a row as they can lie: one of each, values that start at 16 bytes and that do not,
# several blocks of columns, and padding behind the values that needs a block of its own (127 units).
SWIGLU_CASES = [
    Case(M, 1, hidden, 1, _NAMES[i % 5], side=side, activation="swiglu")
    for i, (M, hidden, side) in enumerate(
        (
            (1, 1, "end"),
            (37, 61, "begin"),
            (17, 64, "end"),
            (15, 197, "end"),
            (11, 37, "end"),
            (5, 127, "begin"),
            (3, 15, "end"),
            (9, 461, "begin"),
            (33, 115, "end"),
            (61, 17, "begin"),
            (21, 136, "end"),
        )
    )
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", SWIGLU_CASES, ids=str)
def test_swiglu_backward_at_odd_widths(interpreter, case):
    run(interpreter, check_swiglu_bwd, case)


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["wide", "far"])
@pytest.mark.parametrize("hidden", [61, 64])
def test_swiglu_backward_in_strided_rows_and_rows_beyond_32_bits(interpreter, hidden, layout):
    run(interpreter, check_swiglu_bwd, Case(9, 1, hidden, 1, "bf16", layout, activation="swiglu"))


def test_swiglu_backward_of_several_programs_each_way(interpreter):
    run(interpreter, check_swiglu_bwd, Case(261, 1, 135, 1, activation="swiglu"))


@pytest.mark.parametrize(
    "case",
    [
        Case(36, 37, 61, 21, "bf16"),
        Case(36, 37, 61, 21, "f32", "tight"),
        Case(36, 40, 64, 24, "f16-f32", "misaligned"),
        Case(36, 21, 61, 45, "bf16-f32", "images"),
        Case(36, 37, 61, 21, "f16", "transposed", residual=False),
        Case(36, 37, 61, 21, "bf16", biases=False, residual=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [FUSED, ("compact_linear", "vendor")], ids=["kernel", "vendor"])
def test_both_passes_of_swiglu_in_every_layout(interpreter, case, path):
    """There is no fused kernel for it; its products, and what makes h of z, are those of compact_linear, or
    from 1,024 rows on the vendor's and a pass of compact_linear."""
    case = replace(case, activation="swiglu")
    launched = run(interpreter, check_passes, case, forced=path)
    assert {key[0] for key in launched} == {"_swiglu_bwd_kernel"}


def test_the_passes_of_swiglu_are_equal_bit_for_bit_in_a_second_run(interpreter):
    run(interpreter, check_that_a_second_run_is_equal, Case(37, 61, 45, 21, activation="swiglu"))


def test_swiglu_layers_of_any_odd_widths_and_batches_of_any_size_share_a_compilation_each_way():
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with op_module.launching.recording("compact_mlp", "sm_90") as found:
        for M, K, hidden in ((5000, 37, 461), (8192, 115, 61), (100000, 192, 767), (5001, 1, 1)):
            x, w1, w2 = empty(M, K), empty(2 * hidden, K), empty(192, hidden)
            out, z = op_module._forward_triton(x, w1, None, w2, None, None, True, True)
            op_module._backward_triton(out, x, z, w1, w2, *(True,) * 5, True)
    assert len(found) == 2


@pytest.mark.parametrize("path", [FUSED, TWO_LAUNCHES], ids=["fused", "two-launches"])
@pytest.mark.parametrize(
    "case",
    [
        Case(36, 37, 61, 21, "bf16"),
        Case(36, 37, 61, 21, "tf32", "tight"),
        Case(36, 40, 64, 24, "f16-f32", "misaligned"),
        Case(36, 21, 61, 45, "bf16-f32", "images"),
        Case(36, 37, 61, 21, "f16", "transposed", residual=False),
        Case(36, 37, 61, 21, "bf16", biases=False, residual=False),
    ],
    ids=str,
)
def test_both_passes_in_every_layout(interpreter, case, path):
    launched = run(interpreter, check_passes, case, forced=path)
    assert ("_compact_mlp_fwd_kernel" in {key[0] for key in launched}) == (path is FUSED)


def test_float32_without_tensor_cores_is_two_launches_and_its_gradient_the_kernels(interpreter):
    launched = run(interpreter, check_passes, Case(36, 37, 61, 21, "f32"), forced=FUSED)
    assert {key[0] for key in launched} == {"_gelu_bwd_kernel"}


def test_a_second_run_is_equal_bit_for_bit(interpreter):
    run(interpreter, check_that_a_second_run_is_equal, Case(37, 61, 45, 21), forced=FUSED)


def test_layers_of_any_widths_and_batches_of_any_size_share_two_compilations():
    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with op_module.launching.recording("compact_mlp", "sm_90") as found:
        for M, K, hidden in ((5000, 37, 461), (8192, 115, 61), (100000, 192, 768), (5001, 1, 1)):
            x, w1, w2, residual = empty(M, K), empty(hidden, K), empty(192, hidden), empty(M, 192)
            _, z = op_module._forward_triton(x, w1, None, w2, None, residual, True)
            op_module._backward_triton(residual, x, z, w1, w2, *(True,) * 5)
    assert len(found) == 2


def test_few_rows_wide_outputs_and_float32_without_tensor_cores_are_two_launches():
    rows, is_fused = op_module._FUSED_ROWS, op_module._is_fused
    assert is_fused(torch.bfloat16, rows, 256)
    assert not is_fused(torch.bfloat16, rows - 1, 256)
    assert not is_fused(torch.bfloat16, rows, 257)
    assert not is_fused(torch.bfloat16, rows, 256, swiglu=True)
    with op_module.launching.matmul_precision("high"):
        assert is_fused(torch.float32, rows, 256)
    with op_module.launching.matmul_precision("highest"):
        assert not is_fused(torch.float32, rows, 256)


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
SMALL = Case(37, 61, 45, 21)  # tails only
LONG = Case(70, 69, 141, 21)  # several tiles along every axis but that of the outputs, and tails
TF32 = Case(70, 37, 45, 21, "tf32")
TALL = Case(150, 1, 45, 1)  # of a backward kernel: two programs of rows
ALIGNED = Case(37, 1, 48, 1)  # of SwiGLU: values start at 16 bytes
FAR_APART = Case(9, 1, 45, 1, layout="far")


def planted(kernel, kind, what, proof, old, new, case=SMALL, argument="", descriptors=False):
    options = {"case": case, "descriptors": descriptors}
    if kernel == "fwd":  # with z only where the defect is there
        options["keep"] = ("z" in what.split("-"),)
    return Defect(kernel, kind, what, proof, old, new, tuple(options.items()), argument)


CLAMPS = "r_m, r_h = tl.minimum(o_m, M - 1), tl.minimum(o_h, hidden - 1)"
TILE_MASK = "(o_column[None, :] < readable) & (o_row[:, None] >= 0)"
TILE_CLEAR = "b_tile = tl.where(o_column[None, :] < columns, b_tile, tl.zeros_like(b_tile))"
FC1_BIAS = "tl.load(fc1_bias + o_h, mask=o_h < hidden, other=0.0)"
FC2_BIAS = "tl.load(fc2_bias + o_n, mask=o_n < N, other=0.0)"
RESIDUAL = "tl.load(p_residual, mask=m_out, other=0.0)"
OUT_MASK = "m_out = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)"
Z_MASK = "mask=(o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8))"
HIDDEN = "(b_z * _normal_cdf(b_z)).to(fc1_bias.dtype.element_ty)"
FC2_DOT = "return tl.dot(b_h, tl.trans(b_w), acc, input_precision=PRECISION)"
BWD_MASK = "m_tile = (o_m[:, None] < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)"
BWD_Z = "tl.load(z + o_row * stride_z + o_h[None, :], mask=m_tile, other=0.0)"
BWD_DH = "tl.load(dh + o_row * stride_dh + o_h[None, :], mask=m_tile, other=0.0)"
BWD_DZ = "tl.store(dz + o_out, b_dz.to(dz.dtype.element_ty), mask=m_tile)"
BWD_H = "tl.store(h + o_out, (b_z * b_cdf).to(h.dtype.element_ty), mask=m_tile)"
GATE_CLEAR = "return tl.where(o_h[None, :] < hidden, b_gate, 0.0), b_value"
GATE_MASK = "m_gate = (o_row < M) & (o_h[None, :] < (hidden + 7) // 8 * 8)"
GATE = "tl.load(p_z, mask=m_gate, other=0.0)"
DH = "tl.load(p_dh, mask=m_row & m_padded, other=0.0)"
DH_CLEAR = "b_dh = tl.where(m_own, b_dh, 0.0)"
DGATE = "b_dgate = b_dh * b_value * (b_s * (1.0 + b_gate * (1.0 - b_s)))"
STORE_DGATE = "tl.store(p_dz, b_dgate.to(dz.dtype.element_ty), mask=m_row & m_own)"
STORE_DVALUE = "tl.store(p_dz + hidden, b_dvalue.to(dz.dtype.element_ty), mask=m_row & m_end)"
STORE_H = "tl.store(p_h, (b_silu * b_value).to(h.dtype.element_ty), mask=m_row & m_padded)"
STORE_SUM_VALUE = "tl.store(p_partial + hidden, b_sum_value, mask=o_h < hidden)"
SWIGLU_BWD_ROW = "o_row = (row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)"
BWD_PARTIAL = "tl.store(partial + tl.program_id(0).to(tl.int64) * hidden + o_h, b_sum, mask=o_h < hidden)"

# Each: kernel, kind, what is wrong, the proof, old and new text; what is run; the argument that is overrun.
# fmt: off
DEFECTS = [planted(*row) for row in (
    ("fwd", READ, "row-clamp-of-x-removed", "guard-page", CLAMPS,
     CLAMPS.replace("tl.minimum(o_m, M - 1)", "o_m"),
     SMALL, "x"),
    ("fwd", READ, "row-clamp-of-fc1-removed", "guard-page", CLAMPS,
     CLAMPS.replace("tl.minimum(o_h, hidden - 1)", "o_h"), SMALL, "fc1_weight"),
    ("fwd", READ, "row-clamp-of-fc2-removed", "guard-page", "tl.minimum(o_n, fc2_weight.rows - 1)", "o_n",
     Case(37, 61, 45, 120), "fc2_weight"),
    ("fwd", READ, "tail-mask-removed", "guard-page", TILE_MASK,
     "(o_column[None, :] >= 0) & (o_row[:, None] >= 0)", Case(37, 5, 45, 21), "x"),
    ("fwd", MASK, "no-mask-on-fc1-bias", "guard-page", FC1_BIAS, "tl.load(fc1_bias + o_h)", SMALL,
     "fc1_bias"),
    ("fwd", MASK, "no-mask-on-fc2-bias", "guard-page", FC2_BIAS, "tl.load(fc2_bias + o_n)", SMALL,
     "fc2_bias"),
    ("fwd", MASK, "no-mask-on-residual", "guard-page", RESIDUAL, "tl.load(p_residual)", SMALL, "residual"),
    ("fwd", WRITE, "row-mask-of-store-removed", "guard-page", OUT_MASK,
     OUT_MASK.replace("(o_m[:, None] < M)", "(o_m[:, None] >= 0)"), Case(37, 61, 45, 21, residual=False),
     "out"),
    ("fwd", WRITE, "row-mask-of-z-removed", "guard-page", Z_MASK,
     Z_MASK.replace("(o_m[:, None] < M)", "(o_m[:, None] >= 0)"), SMALL, "z"),
    ("fwd", OTHER, "no-other-on-fc1-bias", "poison", FC1_BIAS, FC1_BIAS.replace(", other=0.0", ""), SMALL,
     "", True),
    ("fwd", RACE, "programs-overlap", "race-detection", "tl.program_id(0) * BLOCK_M\n",
     "tl.program_id(0) * (BLOCK_M - 1)\n", LONG),
    ("fwd", UNWRITTEN, "last-columns-not-stored", "poison", OUT_MASK,
     OUT_MASK.replace("(N + 7) // 8", "N // 8")),
    ("fwd", UNWRITTEN, "last-rows-not-launched", "poison", "(cdiv(M, block_m),)", "(M // block_m,)",
     LONG),
    ("fwd", UNWRITTEN, "last-columns-of-z-not-stored", "poison", Z_MASK,
     Z_MASK.replace("(hidden + 7) // 8", "hidden // 8")),
    ("fwd", RAW, "gelu-in-bfloat16", "bfloat16-check", HIDDEN,
     "(b_z.to(tl.bfloat16) * _normal_cdf(b_z).to(tl.bfloat16))"),
    ("fwd", PAD_IN, "padding-enters-the-products", "poison", TILE_CLEAR, "pass"),
    ("fwd", PAD_OUT, "padding-of-out-not-zeroed", "padding", "tl.where(o_n[None, :] < N, acc, 0.0)", "acc"),
    ("fwd", PAD_OUT, "padding-of-z-not-zeroed", "padding",
     "b_z = tl.where(o_h[None, :] < hidden, b_z, 0.0)\n    if",
     "b_z = b_z\n    if"),
    ("fwd", VALUE, "tail-of-hidden-dropped", "error-rule", "if full < hidden:", "if full < 0:", LONG),
    ("fwd", VALUE, "tail-of-inputs-dropped", "error-rule", "if full < K:", "if full < 0:", LONG),
    ("fwd", VALUE, "first-tile-of-hidden-dropped", "error-rule", "for i_h in range(0, full, BLOCK_H)",
     "for i_h in range(BLOCK_H, full, BLOCK_H)", LONG),
    ("fwd", VALUE, "residual-not-added", "error-rule", "    if HAS_RESIDUAL:", "    if False:"),
    ("fwd", VALUE, "gelu-by-a-sigmoid", "error-rule", "return 0.5 + 0.5 * tl.erf(b_z * 0.7071067811865476)",
     "return 1.0 / (1.0 + tl.exp(-1.702 * b_z))", TF32),
    ("fwd", VALUE, "no-gelu", "error-rule", HIDDEN, HIDDEN.replace("_normal_cdf(b_z)", "1.0")),
    ("fwd", VALUE, "hidden-rounded-to-bfloat16", "error-rule", HIDDEN,
     HIDDEN.replace("fc1_bias.dtype.element_ty", "tl.bfloat16") + ".to(tl.float32)", TF32),
    ("fwd", VALUE, "sums-in-bfloat16", "error-rule", FC2_DOT, f"{FC2_DOT}.to(tl.bfloat16).to(tl.float32)",
     TF32),
    ("fwd", VALUE, "second-accumulator-of-the-first-columns", "error-rule",
     "o_n = BLOCK_N + tl.arange(0, BLOCK_MORE)\n", "o_n = tl.arange(0, BLOCK_MORE)\n", Case(9, 17, 45, 150)),
    ("fwd", VALUE, "second-descriptor-of-the-first-columns", "error-rule",
     "acc_more, b_h, fc2_more, BLOCK_N, o_n,",
     "acc_more, b_h, fc2_more, 0, o_n,", Case(9, 17, 45, 150), "", True),
    ("gelu_bwd", READ, "row-mask-removed", "guard-page", BWD_MASK,
     BWD_MASK.replace("(o_m[:, None] < M)", "(o_m[:, None] >= 0)"), SMALL, "z"),
    ("gelu_bwd", MASK, "no-mask-on-dh", "guard-page", BWD_DH, BWD_DH.replace(", mask=m_tile, other=0.0", ""),
     SMALL,
     "dh"),
    ("gelu_bwd", WRITE, "mask-of-dz-removed", "guard-page", BWD_DZ, BWD_DZ.replace(", mask=m_tile", ""),
     Case(5, 1, 45, 1), "dz"),
    ("gelu_bwd", WRITE, "mask-of-partial-sums-removed", "guard-page", BWD_PARTIAL,
     BWD_PARTIAL.replace(", mask=o_h < hidden", ""), SMALL, "partial"),
    ("gelu_bwd", OTHER, "no-other-on-z", "poison", BWD_Z, BWD_Z.replace(", other=0.0", "")),
    ("gelu_bwd", OTHER, "no-other-on-dh", "poison", BWD_DH, BWD_DH.replace(", other=0.0", "")),
    ("gelu_bwd", RACE, "partial-sums-all-in-one-row", "race-detection",
     "partial + tl.program_id(0).to(tl.int64) * hidden + o_h", "partial + o_h", TALL),
    ("gelu_bwd", RACE, "programs-overlap", "race-detection", "first = tl.program_id(0) * rows_per_program",
     "first = tl.program_id(0) * (rows_per_program - 1)", TALL),
    ("gelu_bwd", UNWRITTEN, "last-partial-sum-not-stored", "poison", BWD_PARTIAL,
     BWD_PARTIAL.replace("< hidden)", "< hidden - 1)")),
    ("gelu_bwd", UNWRITTEN, "last-column-of-h-not-stored", "poison", BWD_H,
     BWD_H.replace("m_tile", "m_tile & (o_h[None, :] < hidden - 1)")),
    ("gelu_bwd", RAW, "product-in-bfloat16", "bfloat16-check", "b_dz = b_dh * (",
     "b_dz = b_dh.to(tl.bfloat16) * tl.full((1, 1), 1.0, tl.bfloat16) * ("),
    ("gelu_bwd", PAD_IN, "padding-of-inputs-used", "padding",
     "b_z, b_dh = tl.where(o_h[None, :] < hidden, b_z, 0.0), tl.where(o_h[None, :] < hidden, b_dh, 0.0)",
     "b_z = b_z"),
    ("gelu_bwd", PAD_OUT, "padding-not-written", "padding", BWD_DZ,
     BWD_DZ.replace("m_tile", "m_tile & (o_h[None, :] < hidden)")),
    ("gelu_bwd", VALUE, "density-forgotten", "error-rule",
     "(b_cdf + b_z * (0.3989422804014327 * tl.exp(-0.5 * b_z * b_z)))", "b_cdf"),
    ("gelu_bwd", VALUE, "rows-after-the-first-tile-dropped", "error-rule", "b_sum += tl.sum",
     "b_sum = tl.sum"),
    ("gelu_bwd", VALUE, "sums-in-bfloat16", "error-rule", "b_sum += tl.sum(b_dz, axis=0)",
     "b_sum = (b_sum + tl.sum(b_dz, axis=0)).to(tl.bfloat16).to(tl.float32)", TALL),
    ("swiglu_bwd", READ, "row-mask-of-z-removed", "guard-page", GATE_MASK,
     GATE_MASK.replace("(o_row < M)", "(o_row >= 0)"), SMALL, "z"),
    ("swiglu_bwd", MASK, "no-mask-on-dh", "guard-page", DH, "tl.load(p_dh)", SMALL, "dh"),
    ("swiglu_bwd", WRITE, "mask-of-h-removed", "guard-page", STORE_H,
     STORE_H.replace(", mask=m_row & m_padded", ""), Case(5, 1, 45, 1), "h"),
    ("swiglu_bwd", WRITE, "row-mask-of-dz-removed", "guard-page", STORE_DVALUE,
     STORE_DVALUE.replace("m_row & m_end", "m_row | m_end"), SMALL, "dz"),
    ("swiglu_bwd", WRITE, "mask-of-partial-sums-removed", "guard-page", STORE_SUM_VALUE,
     STORE_SUM_VALUE.replace(", mask=o_h < hidden", ""), SMALL, "partial"),
    ("swiglu_bwd", OTHER, "no-other-on-dh", "poison", DH, DH.replace(", other=0.0", "")),
    ("swiglu_bwd", OTHER, "no-other-on-the-gate", "poison", GATE, GATE.replace(", other=0.0", "")),
    ("swiglu_bwd", RACE, "partial-sums-all-in-one-row", "race-detection",
     "tl.program_id(0).to(tl.int64) * 2 * hidden + o_h", "o_h", TALL),
    ("swiglu_bwd", RACE, "programs-overlap", "race-detection", "begin = tl.program_id(0) * rows_per_program",
     "begin = tl.program_id(0) * (rows_per_program - 1)", TALL),
    ("swiglu_bwd", RACE, "gradient-of-the-gate-stored-as-far-as-values", "race-detection", STORE_DGATE,
     STORE_DGATE.replace("m_own", "(o_h[None, :] < 2 * hidden)"), Case(5, 1, 200, 1)),
    ("swiglu_bwd", UNWRITTEN, "last-partial-sum-not-stored", "poison", STORE_SUM_VALUE,
     STORE_SUM_VALUE.replace("< hidden)", "< hidden - 1)")),
    ("swiglu_bwd", UNWRITTEN, "last-column-of-the-gate-not-stored", "poison", STORE_DGATE,
     STORE_DGATE.replace("m_own", "(o_h[None, :] < hidden - 1)")),
    ("swiglu_bwd", RAW, "product-in-bfloat16", "bfloat16-check", "b_dvalue = b_dh * b_silu",
     "b_dvalue = (b_dh.to(tl.bfloat16) * b_silu.to(tl.bfloat16)).to(tl.float32)"),
    ("swiglu_bwd", PAD_IN, "padding-of-dh-used", "padding", DH_CLEAR, "pass", SMALL),
    ("swiglu_bwd", PAD_OUT, "padding-of-dz-not-written", "padding", STORE_DVALUE,
     STORE_DVALUE.replace("m_end", "m_own")),
    ("swiglu_bwd", PAD_OUT, "no-program-for-the-last-padding", "padding",
     "columns = max(padded_width(hidden), padded_width(2 * hidden) - hidden)", "columns = hidden",
     Case(5, 1, 127, 1)),
    ("swiglu_bwd", VALUE, "rows-in-32-bits", "overflow-check", SWIGLU_BWD_ROW,
     SWIGLU_BWD_ROW.replace(".to(tl.int64)", ""), FAR_APART),
    ("swiglu_bwd", VALUE, "halves-swapped", "error-rule", GATE_CLEAR, "return b_value, b_gate", ALIGNED),
    ("swiglu_bwd", VALUE, "gradients-of-halves-swapped", "error-rule",
     (STORE_DGATE, STORE_DVALUE),
     (STORE_DGATE.replace("b_dgate", "b_dvalue"), STORE_DVALUE.replace("b_dvalue", "b_dgate")), ALIGNED),
    ("swiglu_bwd", VALUE, "derivative-of-the-logistic-function", "error-rule", DGATE,
     DGATE.replace("(b_s * (1.0 + b_gate * (1.0 - b_s)))", "(b_s * (1.0 - b_s))")),
    ("swiglu_bwd", VALUE, "derivative-without-its-second-term", "error-rule", DGATE,
     DGATE.replace("(b_s * (1.0 + b_gate * (1.0 - b_s)))", "b_s"), ALIGNED),
    ("swiglu_bwd", VALUE, "gradient-of-the-gate-without-the-value", "error-rule", DGATE,
     DGATE.replace("b_dh * b_value", "b_dh")),
    ("swiglu_bwd", VALUE, "rows-after-the-first-tile-dropped", "error-rule", "b_sum_value += tl.sum",
     "b_sum_value = tl.sum"),
    ("swiglu_bwd", VALUE, "sums-in-bfloat16", "error-rule", "b_sum_gate += tl.sum(b_dgate, axis=0)",
     "b_sum_gate = (b_sum_gate + tl.sum(b_dgate, axis=0)).to(tl.bfloat16).to(tl.float32)", TALL),
)]
# fmt: on
CHECKS = {
    "fwd": check_fwd,
    "gelu_bwd": check_gelu_bwd,
    "swiglu_bwd": check_swiglu_bwd,
}


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, CHECKS[defect.kernel], defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    assert_defects_of_every_kind(DEFECTS, op_module, (*KINDS, PAD_IN, PAD_OUT))


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
