"""What the Triton kernels of gated_linear compute, proved in the interpreter.

The kernels run, through their launchers and through both whole passes, next to protected pages and with
poisoned outputs, and are compared with float64. That these proofs bite is in
test_gated_linear_kernel_defects.py.
"""

import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch

from tests.support.gated_linear_cases import DTYPES, L1, inputs, references
from tests.support.guarded_memory import guarded
from tests.support.kernel_proofs import assert_compiled_ahead_of_time, assert_like, loaded, run_check, to_tf32
from tests.support.numerics import assert_close_to_float64

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


def place_unpadded(tensor, layout, side):
    """`tensor` in guarded memory, nothing but poison between its rows, since this op needs no padding there.

    Rows start at 16 bytes in "aligned" and "padded" only.
    """
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
            else place_unpadded(self.tensors[name], self.case.layout, self.case.side)
            for name in names
        ]
        return found if len(found) > 1 else found[0]

    def compare(self, name, out):
        """The error rule; a float32 gradient beside a 16-bit x cannot be nearer than its 16-bit operands."""
        exact, same_dtype = self.expected[name]
        assert_close_to_float64(out.to(same_dtype.dtype), exact, same_dtype, name)

    def compare_partial(self, name, partial):
        self.compare(name, partial.sum(0) + L1 * self.tensors["gate"].float().sign())


def prove(check, case, *args, replacements=(), **conditions):
    """`check(op, data, ...)` under the case's conditions; keys of the variants that it launched."""
    op = loaded(MODULE, replacements)
    return run_check(check, op, Data(case), *args, tf32=case.dtypes == "tf32", **conditions)


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
    folded = place_unpadded((weight * gate).to(x.dtype), "tight", case.side) if is_folded else None
    for need_weight, need_gate in wanted:
        dw, partial = op._launch_unfold(
            place_unpadded(product, "tight", case.side), data.placed("weight"), folded,
            place_unpadded(gate, "tight", case.side), need_weight, need_gate,
        )  # fmt: skip
        assert (dw is not None, partial is not None) == (need_weight, need_gate)
        if need_weight:
            assert_close_to_float64(dw, total64 * gate.double(), (total * gate).to(dw.dtype), "dw")
        if need_gate:
            exact = (total64 * weight.double()).sum(0)
            assert_close_to_float64(partial.sum(0), exact, (total * seen).sum(0), "dg")


def four_linears(data):
    """Weights [N, K], gates [K] and biases [N] of four linears; K is a multiple of 8.

    The first has the sizes of the case and one gate of 0; of the others N fills whole tiles.
    """
    case, generator = data.case, torch.Generator().manual_seed(2)
    found = [], [], []
    for N, K in ((case.N, case.K), (16, case.K), (32, case.K + 8), (48, 16)):
        gate = torch.empty(K).uniform_(0.5, 1.5, generator=generator)
        gate *= torch.randn(K, generator=generator).sign()
        tensors = torch.randn(N, K, generator=generator), gate, torch.randn(N, generator=generator)
        for tensors_so_far, tensor in zip(found, tensors, strict=True):
            tensors_so_far.append(tensor)
    found[1][0][-1] = 0.0
    return found


def at_the_page(tensors, case):
    return [place_unpadded(t, "aligned", case.side) for t in tensors]


def check_fold_gates(op, data, has_bias=True):
    weights, gates, biases = four_linears(data)
    dtype = data.tensors["x"].dtype
    weights_there, gates_there, biases_there = (at_the_page(t, data.case) for t in (weights, gates, biases))
    made = op._launch_fold_gates(weights_there, gates_there, biases_there if has_bias else None, dtype)
    assert len(made) == (8 if has_bias else 4)
    for weight, gate, folded in zip(weights, gates, made[:4], strict=True):
        exact = weight.double() * gate.double()
        assert_close_to_float64(folded, exact, (weight * gate).to(dtype), "folded")
    for bias, cast in zip(biases, made[4:], strict=False):
        assert_close_to_float64(cast, bias.double(), bias.to(dtype), "bias")


def check_unfold_gates(op, data, has_bias=True):
    weights, gates, _ = four_linears(data)
    dtype, generator = data.tensors["x"].dtype, torch.Generator().manual_seed(3)
    products = [torch.randn(w.shape, generator=generator).to(dtype) for w in weights]
    dbs = [torch.randn(len(w), generator=generator).to(dtype) for w in weights] if has_bias else None
    made = op._launch_unfold_gates(
        at_the_page(products, data.case),
        at_the_page(dbs, data.case) if has_bias else None,
        at_the_page(weights, data.case),
        at_the_page(gates, data.case),
    )
    assert len(made) == (12 if has_bias else 8) and all(t.dtype == torch.float32 for t in made)
    for product, weight, gate, dw, dg in zip(products, weights, gates, made[:4], made[4:8], strict=True):
        assert_close_to_float64(dw, product.double() * gate.double(), product.float() * gate, "dw")
        exact = (product.double() * weight.double()).sum(0)
        assert_close_to_float64(dg, exact, (product.float() * weight).sum(0), "dg")
    for db, dbias in zip(dbs or (), made[8:], strict=True):
        assert_close_to_float64(dbias, db.double(), db.float(), "db")


def check_gate_gradient(op, data, rows, l1):
    gate = data.tensors["gate"].clone()
    gate[0] = 0.0
    partial = torch.randn(rows, len(gate), generator=torch.Generator().manual_seed(1))
    dg = op._launch_gate_gradient(*(place_unpadded(t, "tight", data.case.side) for t in (partial, gate)), l1)
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
        in_form(form, name, place_unpadded(t, data.case.layout, data.case.side))
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


def check_expanded_gradient(op, data):
    """dy is one row for all: `y.mean(0).backward(row)` gives such a gradient, with a row stride of 0."""
    x, weight, gate = data.placed("x", "weight", "gate")
    row = place_unpadded(data.tensors["dy"][:1], "tight", data.case.side)
    for dy in (row.expand(data.case.M, -1), row[0, 0].expand(data.case.M, data.case.N)):
        got, expected = (
            op._backward_triton(d, x, weight, gate, None, L1, True, True, True) for d in (dy, dy.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# -- Correct kernels pass -----------------------------------------------------------------------------------


def run(interpreter, check, case, *args, descriptors=False, **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time.

    (But for bases off a 16-byte boundary, which Triton specializes by itself and no list names.)
    """
    launched = interpreter.run(prove, check, case, *args, descriptors=descriptors, **kwargs)
    assert_compiled_ahead_of_time(launched, MODULE, "sm_90" if descriptors else "sm_80")
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


@pytest.mark.covering(1, by=lambda kernel, case: ((kernel, case.dtypes), case.side, (case.M, case.K, case.N)))
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("kernel", CHECKS)
def test_product_at_odd_widths(interpreter, kernel, case):
    run(interpreter, CHECKS[kernel], case)


def table_entries():
    """(kernel, operands, aligned, descriptors) of all entries of the tile tables; aligned ones both ways."""
    for aligned, table in ((True, gated_linear.TILES), (False, gated_linear.UNALIGNED_TILES)):
        for kernel, operands in table:
            for descriptors in (False, True) if aligned else (False,):
                name = f"{kernel}-{operands.replace('/', '.')}-{'aligned' if aligned else 'unaligned'}"
                entry = (kernel, operands, aligned, descriptors)
                yield pytest.param(*entry, id=name + "-descriptors" * descriptors)


@pytest.mark.covering(
    by=lambda kernel, operands, aligned, descriptors: (kernel, operands, (aligned, descriptors))
)
@pytest.mark.parametrize(("kernel", "operands", "aligned", "descriptors"), list(table_entries()))
def test_every_entry_of_the_tile_tables(interpreter, kernel, operands, aligned, descriptors):
    """More than eight rows of tiles, two columns and a tail of the reduction; no size fills its tiles."""
    config = (gated_linear.TILES if aligned else gated_linear.UNALIGNED_TILES)[kernel, operands]
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


# Each product in the fused kernel, or in the vendor's.
PATHS = {"fused": ("gated_linear", "fused", "fused_dw"), "vendor": ("gated_linear", "vendor")}


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
    run(interpreter, check_passes, case, forced=PATHS[rows])


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


FOUR = [
    Case(1, 8, 1, "bf16-f32"),
    Case(1, 136, 37, "f16-f32", side="begin"),
    Case(1, 40, 271, "bf16-f32"),
    Case(1, 264, 115, "f16-f32", side="begin"),
]


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_gates_at_once(interpreter, case, has_bias):
    run(interpreter, check_fold_gates, case, has_bias)
    run(interpreter, check_unfold_gates, case, has_bias)


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
    run(interpreter, check_passes, case, forced=PATHS[rows])


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize("form", ["images", "strided", "transposed"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_both_passes_of_tensors_that_are_no_contiguous_matrix(interpreter, dtypes, form, rows):
    run(interpreter, check_passes, Case(36, 37, 61, dtypes), form, forced=PATHS[rows])


@pytest.mark.parametrize("form", ["matrix", "strided", "transposed"])
@pytest.mark.parametrize("layout", ["tight", "padded", "odd"])
@pytest.mark.parametrize("dtypes", ["bf16-f32", "f16-f32"])
def test_fold_and_its_gradient_in_mixed_precision(interpreter, dtypes, layout, form):
    run(interpreter, check_mixed_precision, Case(36, 136, 61, dtypes, layout), form)


@pytest.mark.parametrize("rows", PATHS)
@pytest.mark.parametrize("M", [36, 63], ids=["activation-side", "weight-side"])
def test_gradient_of_y_that_is_one_row_or_one_number_expanded(interpreter, M, rows):
    run(interpreter, check_expanded_gradient, Case(M, 40, 48, "bf16"), forced=PATHS[rows])
