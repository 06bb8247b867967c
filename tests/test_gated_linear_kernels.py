"""What the Triton kernels of gated_linear compute, proved in the interpreter, and proof that the proofs bite.

The first half runs the kernels, through their launchers and through both whole passes, next to protected
pages and with poisoned outputs, and compares with float64. The second half plants defects and expects each
to be caught by the proof that its id names.
"""

import contextlib
import functools
import importlib
import itertools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gated_linear_cases import DTYPES, L1, inputs, references
from guarded_memory import replaced
from launches import crash_report
from numerics import assert_close_to_float64
from triton_harness import (
    RaceError,
    RawBfloat16Error,
    check_canaries,
    guarded,
    guarded_outputs,
    mutated,
)

triton = pytest.importorskip("triton")

MODULE = "vtp_kernels.gated_linear"
gated_linear = importlib.import_module(MODULE)

DTYPES = {**DTYPES, "tf32": DTYPES["f32"]}
SUBSETS = [needs for needs in itertools.product((False, True), repeat=3) if any(needs)]


@dataclass(frozen=True)
class Case:
    """x [M, K], W [N, K]: their dtypes, how they lie in memory, and which end of it is at the page."""

    M: int
    K: int
    N: int
    dtypes: str
    layout: str = "tight"
    side: str = "end"
    bias: bool = True
    gate16: bool = False
    bias16: bool = False

    def __str__(self):
        flags = ["nobias"] * (not self.bias) + ["gate16"] * self.gate16 + ["bias16"] * self.bias16
        return "-".join([f"M{self.M}-K{self.K}-N{self.N}-{self.dtypes}-{self.layout}-{self.side}", *flags])


# -- In the worker ------------------------------------------------------------------------------------------


def place(tensor, layout, side):
    """`tensor` in guarded memory; rows start at 16 bytes in "aligned" and "padded" only."""
    width = tensor.shape[-1]
    if layout == "misaligned":
        return guarded(tensor, side, offset_elements=1)
    if tensor.dim() == 1 or layout == "tight":
        return guarded(tensor, side)
    row_stride = {"aligned": width, "padded": -(-width // 8) * 8 + 8, "odd": width + 3}[layout]
    return guarded(tensor, side, align=None if layout == "odd" else 16, row_stride=row_stride)


class Data:
    """The tensors of a case, and what the kernels should make of them."""

    def __init__(self, case):
        self.case = case
        x, weight, gate, bias, dy = inputs(case.M, case.K, case.N, *DTYPES[case.dtypes])
        gate = gate.to(weight.dtype) if case.gate16 else gate
        bias = bias if case.bias else torch.zeros_like(bias)
        bias = bias.to(x.dtype) if case.bias16 else bias
        self.tensors = dict(x=x, weight=weight, gate=gate, bias=bias, dy=dy)
        exact, same_dtype = references(x, weight, gate, bias, dy)
        if case.dtypes == "tf32":
            _, same_dtype = references(*(self.operand(t) for t in (x, weight)), gate, bias, self.operand(dy))
        self.expected = dict(
            zip(("y", "dx", "dw", "dg", "db"), zip(exact, same_dtype, strict=True), strict=True)
        )
        # Partial sums stay in float32, so PyTorch's must too: it multiplies what the kernels multiply.
        penalty = L1 * gate.float().sign()
        from_x = (self.operand(dy) @ self.operand(weight) * x.float()).sum(0) + penalty
        from_weight = (self.operand(dy).T @ self.operand(x) * weight.float()).sum(0) + penalty
        self.expected |= {"dg from x": (exact[3], from_x), "dg from weight": (exact[3], from_weight)}

    def operand(self, t):
        """What a matrix product reads of `t`, in float32."""
        t = t.to(self.tensors["x"].dtype).float()
        return to_tf32(t) if self.case.dtypes == "tf32" else t

    def placed(self, *names):
        """Guarded copies; None for a bias that the case does not have."""
        found = [
            None
            if name == "bias" and not self.case.bias
            else place(self.tensors[name], self.case.layout, self.case.side)
            for name in names
        ]
        return found if len(found) > 1 else found[0]

    def compare(self, name, out):
        """The error rule; a float32 gradient beside a 16-bit x cannot be nearer than its 16-bit operands."""
        exact, same_dtype = self.expected[name]
        assert_close_to_float64(out.to(same_dtype.dtype), exact, same_dtype, name)

    def compare_partial(self, name, partial):
        self.compare(name, partial.sum(0) + L1 * self.tensors["gate"].float().sign())


def to_tf32(t):
    """Rounded to nearest even at 10 bits of mantissa."""
    bits = t.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def prove(check, case, *args, replacements=(), descriptors=False, attributes=(), **kwargs):
    """`check(op, data, ...)` under the case's conditions; returns keys of the variants that it launched.

    op: the module, or a copy with `replacements`. attributes: names and values to set in it meanwhile.
    """
    op = mutated(MODULE, replacements) if replacements else gated_linear
    data = Data(case)
    recorder = op._triton._Recording("gated_linear", "")
    launch = op.launch

    def recorded_launch(kernel, grid, arguments, config, **constants):
        recorder.add(kernel, arguments, config, constants)
        launch(kernel, grid, arguments, config, **constants)

    patches = [(op, "launch", recorded_launch), (op._triton, "has_descriptors", lambda device: descriptors)]
    patches += [(op, name, value) for name, value in dict(attributes).items()]
    with replaced(patches), precision("high" if case.dtypes == "tf32" else "highest"):
        with guarded_outputs(case.side):
            check(op, data, *args, **kwargs)
        check_canaries()
    return set(recorder.variants)


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_fwd(op, data):
    data.compare("y", op._launch_fwd(*data.placed("x", "weight", "gate", "bias")))


def check_dx(op, data, gates=(False, True)):
    for gate_gradient in gates:
        dy, weight, gate, x = data.placed("dy", "weight", "gate", "x")
        dx, partial = op._launch_dx(dy, weight, gate, x if gate_gradient else None)
        assert (partial is not None) == gate_gradient
        data.compare("dx", dx)
        if gate_gradient:
            data.compare_partial("dg from x", partial)


WANTED = ((True, True), (True, False), (False, True))


def check_dw(op, data, wanted=WANTED):
    for need_weight, need_gate in wanted:
        dw, partial = op._launch_dw(*data.placed("dy", "x", "weight", "gate"), need_weight, need_gate)
        assert (dw is not None, partial is not None) == (need_weight, need_gate)
        if need_weight:
            assert dw.dtype == data.tensors["weight"].dtype
            data.compare("dw", dw)
        if need_gate:
            data.compare_partial("dg from weight", partial)


def check_fold(op, data):
    x, weight, gate = (data.tensors[name] for name in ("x", "weight", "gate"))
    folded = op._launch_fold(*data.placed("weight", "gate"), x.dtype)
    assert_close_to_float64(folded, weight.double() * gate.double(), (weight * gate).to(x.dtype), "folded")


# Gates of the last column; those of the others are between 0.5 and 1.5 in size, of both signs.
LAST_GATES = {
    "large": 0.75,
    "just-above": -0.0157,
    "threshold": 0.015625,
    "small": -0.003,
    "tiny": -1e-30,
    "zero": 0.0,
}


def check_unfold(op, data, gates="large", is_folded=False, product16=False, wanted=WANTED):
    case, x, weight = data.case, data.tensors["x"], data.tensors["weight"]
    generator = torch.Generator().manual_seed(1)
    product = torch.randn(case.N, case.K, generator=generator).to(x.dtype if product16 else torch.float32)
    gate = data.tensors["gate"].where(data.tensors["gate"] != 0, 1.0)
    gate[-1] = LAST_GATES[gates]
    total64, total = product.double(), product.float()
    seen = weight.to(x.dtype if is_folded else weight.dtype).float()
    folded = place((weight * gate).to(x.dtype), "tight", case.side) if is_folded else None
    for need_weight, need_gate in wanted:
        dw, partial = op._launch_unfold(
            place(product, "tight", case.side), data.placed("weight"), folded,
            place(gate, "tight", case.side), need_weight, need_gate,
        )  # fmt: skip
        assert (dw is not None, partial is not None) == (need_weight, need_gate)
        if need_weight:
            assert_close_to_float64(dw, total64 * gate.double(), (total * gate).to(dw.dtype), "dw")
        if need_gate:
            exact = (total64 * weight.double()).sum(0)
            assert_close_to_float64(partial.sum(0), exact, (total * seen).sum(0), "dg")


def check_gate_gradient(op, data, rows, l1):
    gate = data.tensors["gate"].clone()
    gate[0] = 0.0
    partial = torch.randn(rows, len(gate), generator=torch.Generator().manual_seed(1))
    dg = op._launch_gate_gradient(*(place(t, "tight", data.case.side) for t in (partial, gate)), l1)
    exact = partial.double().sum(0) + l1 * gate.double().sign()
    same_dtype = (partial.sum(0) + l1 * gate.float().sign()).to(gate.dtype)
    assert_close_to_float64(dg, exact, same_dtype, "dg")


def check_passes(op, data, form="matrix"):
    """Both whole passes, the backward one for every subset of the gradients."""
    x, weight, gate, bias, dy = (
        in_form(form, name, t) for name, t in zip(data.tensors, data.placed(*data.tensors), strict=True)
    )
    y = op._forward_triton(x, weight, gate, bias, L1)
    assert_like([y], [op._forward_fake(x, weight, gate, bias, L1)])
    data.compare("y", y.reshape(-1, y.shape[-1]))
    names = ("dx", "dw", "dg", "db")
    bias_dtypes = itertools.cycle((None, data.tensors["bias"].dtype))
    for needs, bias_dtype in zip(SUBSETS, bias_dtypes, strict=False):
        arguments = dy, x, weight, gate, bias_dtype, L1, *needs
        found = op._backward_triton(*arguments)
        assert_like(found, op._backward_fake(*arguments))
        for name, out, need in zip(names, found, (*needs, bias_dtype is not None), strict=True):
            if need:
                data.compare(name, out.reshape(-1, out.shape[-1]) if name == "dx" else out)


def check_mixed_precision(op, data, form="matrix"):
    """`W diag g` by itself, as where W is cast for a plain linear, and what its gradient becomes."""
    x, weight, gate, _, dy = data.tensors.values()
    product = dy.T @ x
    dw64, dg64 = product.double() * gate.double(), (product.double() * weight.double()).sum(0)
    total = product.float()
    dg = ((total * weight.to(x.dtype).float()).sum(0) + L1 * gate.sign()).to(gate.dtype)
    weight, gate, product = (
        in_form(form, name, place(t, data.case.layout, data.case.side))
        for name, t in (("weight", weight), ("gate", gate), ("product", product))
    )
    folded = op._fold_triton(weight, gate, x.dtype, L1)
    assert_like([folded], [op._fold_fake(weight, gate, x.dtype, L1)])
    assert_close_to_float64(folded, weight.double() * gate.double(), (weight * gate).to(x.dtype), "folded")
    for needs in WANTED:
        found = op._unfold_triton(product, weight, folded, gate, L1, *needs)
        assert_like(found, op._unfold_fake(product, weight, folded, gate, L1, *needs))
        if needs[0]:
            assert_close_to_float64(found[0], dw64, (total * gate).to(weight.dtype), "dw")
        if needs[1]:
            assert_close_to_float64(found[1], dg64 + L1 * gate.double().sign(), dg, "dg")


def in_form(form, name, t):
    """The same values in another shape or other strides."""
    if t is None or form == "matrix":
        return t
    if form == "images":
        return t.unflatten(0, (3, -1)) if name in ("x", "dy") else t
    if form == "strided":  # every tensor, the gate and the bias among them
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]
    assert form == "transposed"
    return t.T.contiguous().T if t.dim() == 2 else t


def assert_like(found, fake):
    for i, (a, b) in enumerate(zip(found, fake, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"result {i}"


def check_expanded_gradient(op, data):
    """dy is one row for all: `y.mean(0).backward(row)` gives such a gradient, with a row stride of 0."""
    x, weight, gate = data.placed("x", "weight", "gate")
    row = place(data.tensors["dy"][:1], "tight", data.case.side)
    for dy in (row.expand(data.case.M, -1), row[0, 0].expand(data.case.M, data.case.N)):
        got, expected = (
            op._backward_triton(d, x, weight, gate, None, L1, True, True, True) for d in (dy, dy.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# -- Correct kernels pass -----------------------------------------------------------------------------------


@functools.cache
def compiled_ahead_of_time(target):
    return {variant.key() for variant in gated_linear.variants(target)}


def run(interpreter, check, case, *args, descriptors=False, **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time.

    (But for bases off a 16-byte boundary, which Triton specializes by itself and no list names.)
    """
    launched = interpreter.run(prove, check, case, *args, descriptors=descriptors, **kwargs)
    missing = launched - compiled_ahead_of_time("sm_90" if descriptors else "sm_80")
    assert not missing, f"launched, but not compiled ahead of time: {missing}"
    return launched


def constant(launched, name):
    """The values of a constexpr in what was launched."""
    return {value for key in launched for other, value in key[2] if other == name}


# Each width of pruned models, and those around tiles, on every axis.
ODD = [
    (1, 461, 197),
    (15, 17, 1021),
    (17, 1021, 37),
    (37, 197, 61),
    (61, 115, 115),
    (115, 61, 461),
    (197, 37, 15),
    (461, 15, 1),
    (1021, 1, 17),
]
_NAMES = ["f32", "tf32", "bf16", "f16", "bf16-f32", "f16-f32"]
# Every dtype takes a third of the shapes and meets both sides of memory.
ODD_CASES = [
    Case(*shape, _NAMES[(i + 3 * turn) % 6], side=side)
    for i, shape in enumerate(ODD)
    for turn, side in enumerate(("end", "begin"))
]
CHECKS = {"fwd": check_fwd, "dx": check_dx, "dw": check_dw}


def test_the_odd_widths_are_on_every_axis():
    widths = [1, 15, 17, 37, 61, 115, 197, 461, 1021]
    assert all(sorted(axis) == widths for axis in zip(*ODD, strict=True))


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("kernel", CHECKS)
def test_product_at_odd_widths(interpreter, kernel, case):
    run(interpreter, CHECKS[kernel], case)


def table_entries():
    """(kernel, operands, aligned, descriptors) of all entries of the tile tables; aligned ones both ways."""
    for aligned, table in ((True, gated_linear._TILES), (False, gated_linear._UNALIGNED_TILES)):
        for kernel, operands in table:
            for descriptors in (False, True) if aligned else (False,):
                name = f"{kernel}-{operands.replace('/', '.')}-{'aligned' if aligned else 'unaligned'}"
                entry = (kernel, operands, aligned, descriptors)
                yield pytest.param(*entry, id=name + "-descriptors" * descriptors)


@pytest.mark.parametrize(("kernel", "operands", "aligned", "descriptors"), list(table_entries()))
def test_every_entry_of_the_tile_tables(interpreter, kernel, operands, aligned, descriptors):
    """More than eight rows of tiles, two columns and a tail of the reduction; no size fills its tiles."""
    config = (gated_linear._TILES if aligned else gated_linear._UNALIGNED_TILES)[kernel, operands]
    rows, columns, reduction = {"fwd": "MNK", "dx": "MKN", "dw": "NKM"}[kernel]
    sizes = {
        rows: 8 * config.blocks[f"BLOCK_{rows}"] + 8,
        columns: config.blocks[f"BLOCK_{columns}"] + 8,
        reduction: config.blocks[f"BLOCK_{reduction}"] + 8,
    }
    sizes = {axis: size - (0 if aligned and axis != "M" else 3) for axis, size in sizes.items()}
    x16 = "bf16" if aligned else "f16"
    dtypes = {"16": x16, "16/32": f"{x16}-f32", "tf32": "tf32", "ieee": "f32"}[operands]
    case = Case(**sizes, dtypes=dtypes, layout="aligned" if aligned else "tight")
    everything = {"fwd": {}, "dx": dict(gates=(True,)), "dw": dict(wanted=((True, True),))}[kernel]
    launched = run(interpreter, CHECKS[kernel], case, descriptors=descriptors, **everything)
    expected = (aligned, descriptors, *config.blocks.values())
    names = ("ALIGNED", "DESCRIPTORS", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    assert expected in {tuple(dict(key[2]).get(name) for name in names) for key in launched}


# Rows that start at 16 bytes though they are strided, and what must not be loaded by descriptor.
LAYOUTS = {"padded": True, "odd": False, "misaligned": False}


@pytest.mark.parametrize(
    ("dtypes", "side"), [("f32", "end"), ("bf16", "begin"), ("bf16", "end"), ("f16-f32", "begin")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", CHECKS)
def test_strided_and_misaligned_rows_where_there_are_descriptors(interpreter, kernel, layout, dtypes, side):
    case = Case(37, 72, 136, dtypes, layout, side, bias=False)
    launched = run(interpreter, CHECKS[kernel], case, descriptors=True)
    assert constant(launched, "DESCRIPTORS") == {LAYOUTS[layout]}


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "case",
    [
        Case(37, 72, 61, "bf16", "aligned"),
        Case(37, 61, 72, "bf16", "aligned"),
        Case(37, 8, 1, "f32", "aligned"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", CHECKS)
def test_one_width_is_a_multiple_of_eight_and_the_other_is_not(interpreter, kernel, case, descriptors):
    run(interpreter, CHECKS[kernel], case, descriptors=descriptors)


# What `_FUSED_ROWS` and `_FULL_GPU` decide: each product in the fused kernel, or in the vendor's.
PATHS = {
    "fused": {"_FUSED_ROWS": {2: 10**6, 4: 10**6}, "_FULL_GPU": 0},
    "vendor": {"_FUSED_ROWS": {2: 0, 4: 0}},
}


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize(
    "case",
    [
        Case(36, 37, 61, "bf16", gate16=True),
        Case(36, 40, 64, "f16", gate16=True),
        Case(36, 37, 61, "bf16-f32", bias16=True),
    ],
    ids=str,
)
def test_a_gate_or_bias_of_16_bits_needs_no_compilation_of_its_own(interpreter, case, rows):
    run(interpreter, check_passes, case, attributes=PATHS[rows])


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_fold_at_odd_widths(interpreter, case):
    run(interpreter, check_fold, case)


@pytest.mark.parametrize("dtypes", _NAMES)
@pytest.mark.parametrize("layout", ["aligned", *LAYOUTS])
def test_fold_of_other_layouts(interpreter, layout, dtypes):
    run(interpreter, check_fold, Case(1, 200, 37, dtypes, layout))


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_unfold_at_odd_widths(interpreter, case):
    mixed = "-" in case.dtypes
    is_16_bit = DTYPES[case.dtypes][0] != torch.float32
    run(interpreter, check_unfold, case, is_folded=mixed, product16=is_16_bit)


@pytest.mark.parametrize("gates", LAST_GATES)
@pytest.mark.parametrize(("dtypes", "layout"), [("bf16-f32", "aligned"), ("f16-f32", "odd")])
def test_unfold_reads_the_folded_weight_where_it_can_divide_by_the_gate(interpreter, dtypes, layout, gates):
    # Two tiles of columns, of which one has the small gate; two programs of rows.
    case = Case(1, 200, 141, dtypes, layout)
    run(interpreter, check_unfold, case, gates=gates, is_folded=True, product16=True)


@pytest.mark.parametrize("layout", ["aligned", *LAYOUTS])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
def test_unfold_of_other_layouts(interpreter, dtypes, layout):
    case = Case(1, 200, 37, dtypes, layout, "begin")
    run(interpreter, check_unfold, case, is_folded="-" in dtypes, product16=dtypes != "f32")


@pytest.mark.parametrize("l1", [0.0, 0.25])
@pytest.mark.parametrize(
    ("rows", "K"),
    [
        (1, 1021),
        (15, 461),
        (16, 64),
        (17, 197),
        (37, 115),
        (61, 61),
        (115, 37),
        (197, 17),
        (461, 15),
        (1021, 1),
    ],
)
def test_gate_gradient(interpreter, rows, K, l1):
    run(interpreter, check_gate_gradient, Case(1, K, 1, "f32", side="begin" if K % 2 else "end"), rows, l1)


PASSES = [
    Case(36, 37, 61, "f32"),
    Case(63, 61, 37, "f32", side="begin"),
    Case(36, 40, 64, "bf16"),
    Case(63, 61, 37, "f16"),
    Case(36, 37, 61, "bf16-f32", bias=False),
    Case(63, 64, 40, "f16-f32", side="begin"),
    Case(63, 64, 40, "bf16-f32"),
]


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize("case", PASSES, ids=str)
def test_both_passes_for_every_subset_of_gradients(interpreter, case, rows):
    run(interpreter, check_passes, case, attributes=PATHS[rows])


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize("form", ["images", "strided", "transposed"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_both_passes_of_tensors_that_are_no_contiguous_matrix(interpreter, dtypes, form, rows):
    run(interpreter, check_passes, Case(36, 37, 61, dtypes), form, attributes=PATHS[rows])


@pytest.mark.parametrize("form", ["matrix", "strided", "transposed"])
@pytest.mark.parametrize("layout", ["tight", "padded", "odd"])
@pytest.mark.parametrize("dtypes", ["bf16-f32", "f16-f32"])
def test_fold_and_its_gradient_in_mixed_precision(interpreter, dtypes, layout, form):
    run(interpreter, check_mixed_precision, Case(36, 136, 61, dtypes, layout), form)


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize("M", [36, 63], ids=["activation-side", "weight-side"])
def test_gradient_of_y_that_is_one_row_or_one_number_expanded(interpreter, M, rows):
    run(interpreter, check_expanded_gradient, Case(M, 40, 48, "bf16"), attributes=PATHS[rows])


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

# Besides "guard-page", where a process dies.
PROOFS = {
    "poison": (AssertionError, "are NaN"),
    "race-detection": (RaceError, "in the same launch"),
    "bfloat16-check": (RawBfloat16Error, "bfloat16"),
    "error-rule": (AssertionError, "further from float64|root mean square"),
}


@dataclass(frozen=True)
class Defect:
    """`old` becomes `new` in the source of a kernel: of which kind that is, and the proof that finds it."""

    kernel: str
    kind: str
    what: str
    proof: str
    old: str
    new: str
    options: tuple = ()
    # The argument whose memory is overrun, where a page is touched.
    argument: str = ""

    def __str__(self):
        return f"{self.kernel}-{self.what}-{self.proof}"


READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS = (
    "read past the end",
    "write past the end",
    "missing mask",
    "missing other",
    "race",
    "unwritten",
    "raw bfloat16",
    "wrong value",
)
# Several tiles along most axes, and tails on all.
SMALL = Case(37, 61, 45, "f32")
SMALL16 = Case(37, 61, 45, "bf16")
MIXED16 = Case(37, 61, 45, "bf16-f32")


def options(case=SMALL, descriptors=False, **kwargs):
    return tuple({"case": case, "descriptors": descriptors, **kwargs}.items())


def in_kernel(kernel, *rows):
    return [
        Defect(kernel, kind, what, proof, old, new, extra[0] if extra else options(), *extra[1:])
        for kind, what, proof, old, new, *extra in rows
    ]


OTHER_ROWS = "& (o_column[None, :] < columns), other=0.0)"
OTHER_COLUMNS = "& (o_row[:, None] >= 0), other=0.0)"
GROUPED = "return first + within % height, within // height"
LOAD_GATE = "b_g = tl.load(gate + o_k, mask=o_k < K, other=0.0)"
FWD_TAIL_X = "b_x = _load_tile(x, o_m, o_k, M, K, stride_x, False, TAIL)"
FWD_FOLD = "(b_w.to(tl.float32) * b_g.to(tl.float32)[None, :])"
FWD_STORE = "tl.store(p_y, acc.to(y.dtype.element_ty), mask=m_y)"
DX_LOAD_X = "b_x = _load_tile(x, o_m, o_k, M, K, stride_x, True, True).to(tl.float32)"
DX_PARTIAL = "tl.store(partial + t_m.to(tl.int64) * K + o_k, tl.sum(acc * b_x, axis=0), mask=o_k < K)"
DX_STORE = "tl.store(p_dx, (acc * b_g[None, :]).to(dx.dtype.element_ty), mask=m_tile)"
DX_GATE = f"    {LOAD_GATE}.to(tl.float32)\n    p_dx"
DW_LOAD_DY = "b_dy = _load_tile(dy, o_m, o_n, M, N, stride_dy, TAIL, True)"
DW_LOAD_X = "b_x = _load_tile(x, o_m, o_k, M, K, stride_x, TAIL, True)"
DW_STORE = "tl.store(p_dw, (acc * b_g[None, :]).to(dw.dtype.element_ty), mask=m_dw)"
LOAD_W = "b_w = _load_tile(weight, o_n, o_k, N, K, stride_w, True, True).to(tl.float32)"
DW_LOAD_W = f"{LOAD_W}\n        tl.store(partial + t_n"
FOLD_LOAD_W = f"{LOAD_W}\n    b_g ="
FOLD_STORE = "tl.store(p_folded, (b_w * b_g[None, :]).to(folded.dtype.element_ty), mask=m_folded)"
UNFOLD_LOAD = "b_product = tl.load(product + o_tile, mask=m_tile, other=0.0).to(tl.float32)"
UNFOLD_LOAD_W = "            else:\n                b_w = tl.load(p_w, mask=m_tile, other=0.0)"
UNFOLD_LOAD_FOLDED = "b_w = tl.load(folded + o_tile, mask=m_tile, other=0.0)"
DIVIDE = "        if FOLDED:  # noqa: SIM102 (known when compiling; `divide` is not)\n            if divide:"
DIVIDE_ALWAYS = "        if True:\n            if True:"
UNFOLD_STORE = "tl.store(dw + o_tile, (b_product * b_g[None, :]).to(dw.dtype.element_ty), mask=m_tile)"
GATE_LOAD = "_load_tile(partial, o_r, o_k, rows, K, K, True, True)"
GATE_LOAD_GATE = "b_g = tl.load(gate + o_k, mask=m_k, other=0.0).to(tl.float32)\n    sign"
GATE_STORE = "tl.store(dg + o_k, (tl.sum(acc, axis=0) + l1 * sign).to(dg.dtype.element_ty), mask=m_k)"

# Each: kind, what is wrong, the proof, old and new text, and what is run; the argument that is overrun.
# fmt: off
DEFECTS = [
    *in_kernel(
        "fwd",
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
         "(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)", "(M // block_m * triton.cdiv(N, block_n),)"),
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
        (VALUE, "bias-not-added", "error-rule", "    if HAS_BIAS:", "    if False:"),
        (VALUE, "tf32-in-ieee", "error-rule", "tl.trans(b_folded), acc, input_precision=PRECISION",
         'tl.trans(b_folded), acc, input_precision="tf32"'),
        (VALUE, "sums-in-bfloat16", "error-rule", "tl.trans(b_folded), acc, input_precision=PRECISION)",
         "tl.trans(b_folded), acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
         options(Case(37, 1021, 45, "bf16"))),
        (VALUE, "outputs-cut-to-a-multiple-of-eight", "poison", "_layout(x, weight, y)", "_layout(x, weight)",
         options(Case(37, 72, 45, "bf16", "aligned"))),
    ),
    *in_kernel(
        "dx",
        (READ, "row-clamp-removed", "guard-page", "r_m = tl.minimum(o_m, M - 1)\n", "r_m = o_m\n", options(),
         "dy"),
        (READ, "column-mask-of-weight-removed", "guard-page", "stride_w, TAIL, True)",
         "stride_w, TAIL, False)", options(), "weight"),
        (READ, "row-mask-of-x-removed", "guard-page", DX_LOAD_X,
         DX_LOAD_X.replace("True, True", "False, True"), options(), "x"),
        (MASK, "no-mask-on-gate", "guard-page", DX_GATE, DX_GATE.replace(", mask=o_k < K, other=0.0", ""),
         options(), "gate"),
        (WRITE, "row-mask-of-store-removed", "guard-page", "m_tile = (o_m[:, None] < M)",
         "m_tile = (o_m[:, None] >= 0)", options(), "dx"),
        (OTHER, "no-other-on-tail-of-weight", "poison", OTHER_ROWS, "& (o_column[None, :] < columns))"),
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
        "dw",
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
         "m_dw = (o_n[:, None] < N)", "m_dw = (o_n[:, None] >= 0)", options(), "dw"),
        (OTHER, "no-other-on-tail", "poison", OTHER_ROWS, "& (o_column[None, :] < columns))",
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
        "fold",
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
        (RACE, "programs-overlap-by-a-row", "race-detection", "o_n = tl.program_id(0) * BLOCK_N +",
         "o_n = tl.program_id(0) * (BLOCK_N - 1) +"),
        (RAW, "gate-times-weight-in-bfloat16", "bfloat16-check", FOLD_STORE,
         FOLD_STORE.replace("b_w * b_g[", "b_w.to(tl.bfloat16) * b_g.to(tl.bfloat16)["),
         options(SMALL16)),
        (VALUE, "gate-applied-twice", "error-rule", FOLD_STORE,
         FOLD_STORE.replace("b_g[None, :]", "b_g[None, :] * b_g[None, :]")),
        (VALUE, "gate-not-applied", "error-rule", FOLD_STORE, FOLD_STORE.replace(" * b_g[None, :]", "")),
    ),
    *in_kernel(
        "unfold",
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
        "gate_gradient",
        (READ, "row-mask-removed", "guard-page", GATE_LOAD, GATE_LOAD.replace("True, True", "False, True"),
         options(), "partial"),
        (MASK, "no-mask-on-gate", "guard-page", GATE_LOAD_GATE,
         GATE_LOAD_GATE.replace(", mask=m_k, other=0.0", ""), options(), "gate"),
        (WRITE, "mask-of-store-removed", "guard-page", GATE_STORE, GATE_STORE.replace(", mask=m_k", ""),
         options(Case(1, 45, 1, "f32")), "dg"),
        (OTHER, "no-other-on-partial-sums", "poison", OTHER_ROWS, "& (o_column[None, :] < columns))"),
        (UNWRITTEN, "last-column-not-stored", "poison", GATE_STORE,
         GATE_STORE.replace("=m_k", "=o_k < K - 1")),
        (RACE, "programs-overlap", "race-detection", "o_k = tl.program_id(0) * BLOCK_K +",
         "o_k = tl.program_id(0) * (BLOCK_K // 2) +", options(Case(1, 115, 1, "f32"))),
        (RAW, "sign-of-a-bfloat16-gate", "bfloat16-check", GATE_LOAD_GATE,
         GATE_LOAD_GATE.replace(".to(tl.float32)", ""), options(Case(1, 61, 1, "bf16", gate16=True))),
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
    "gate_gradient": functools.partial(check_gate_gradient, rows=37, l1=0.25),
}


def plant(defect):
    """The check passes without the defect, so that it is the defect which is found."""
    check = PLANTED_IN[defect.kernel]
    prove(check, **dict(defect.options))
    planted = functools.partial(prove, check, **dict(defect.options), replacements=[(defect.old, defect.new)])
    return crash_of(planted) if defect.proof == "guard-page" else planted()


def crash_of(function):
    """The report of the crash in which `function` ends a fork of the worker: a new worker takes seconds."""
    child = os.fork()
    if not child:
        try:
            function()
            crash_report.note("no crash")
        except BaseException as error:
            crash_report.note(repr(error))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no signal"
    return f"{how}\n{crash_report.read(Path(crash_report.file.name))}"


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    if defect.proof == "guard-page":
        report = interpreter.run(plant, defect)
        where = f"past the end of the memory of `{defect.argument}`"
        assert report.startswith("SIGSEGV") and where in report and "_kernel" in report, report
        return
    error, says = PROOFS[defect.proof]
    with pytest.raises(error, match=says) as caught:
        interpreter.run(plant, defect)
    assert type(caught.value) is error


def test_every_kernel_has_planted_defects_of_every_kind():
    kernels = {
        name.strip("_").removeprefix("gated_linear_").removesuffix("_kernel")
        for name, value in vars(gated_linear).items()
        if isinstance(value, triton.runtime.jit.KernelInterface) and name.endswith("_kernel")
    }
    wanted = {(kernel, kind) for kernel in kernels for kind in KINDS}
    # It is elementwise: what it makes of a masked lane is masked again where it is stored.
    wanted.remove(("fold", OTHER))
    assert {(defect.kernel, defect.kind) for defect in DEFECTS} == wanted


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
