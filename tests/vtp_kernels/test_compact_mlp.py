"""The op `compact_mlp` as users call it: values, gradients, layouts, and PyTorch's transforms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.gated_linear_cases import DTYPES
from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import LAYOUTS, check_compilation, check_export, leaves, saved_by, with_layout
from vtp_kernels.compact_mlp import compact_mlp, compact_mlp_ref

ARGUMENTS = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "residual")
# Rows, inputs, hidden, outputs: the odd widths of a pruned model on every axis.
SHAPES = [(1, 1, 1, 1), (15, 17, 37, 61), (61, 115, 197, 115), (197, 37, 461, 64), (37, 461, 15, 17)]
ACTIVATION = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


def inputs(M, K, hidden, N, dtypes="f32", seed=0, activation="gelu"):
    """x, weights and biases, residual and dout, of like size. Only the last two may be of another dtype."""
    g = torch.Generator().manual_seed(seed)
    x_dtype, residual_dtype = DTYPES[dtypes]
    units = 2 * hidden if activation == "swiglu" else hidden
    shapes = (M, K), (units, K), (units,), (N, hidden), (N,), (M, N), (M, N)
    x, w1, b1, w2, b2, residual, dout = (torch.randn(shape, generator=g) for shape in shapes)
    w1, w2 = w1 / K**0.5, w2 / hidden**0.5
    operands = [t.to(x_dtype) for t in (x, w1, b1, w2, b2)]
    return *operands, residual.to(residual_dtype), dout.to(residual_dtype)


def run(function, *tensors, activation="gelu"):
    """out and the gradient of each input, None for a missing one; the last tensor is that of out."""
    *tensors, dout = tensors
    tensors = leaves(tensors)
    out = function(*tensors, activation)
    out.backward(dout)
    return out.detach(), *(None if t is None else t.grad for t in tensors)


def references(*tensors, activation="gelu"):
    """The definition in float64 and in the dtypes given."""
    yield run(compact_mlp_ref, *(None if t is None else t.double() for t in tensors), activation=activation)
    yield run(compact_mlp_ref, *tensors, activation=activation)


def check(*tensors, activation="gelu"):
    results = run(compact_mlp, *tensors, activation=activation)
    names, expected = (
        ("out", *("d" + name for name in ARGUMENTS)),
        references(*tensors, activation=activation),
    )
    for name, out, ref64, torchs in zip(names, results, *expected, strict=True):
        assert (out is None) == (ref64 is None), name
        if out is not None:
            assert out.dtype == torchs.dtype, name
            assert_close_to_float64(out, ref64, torchs, name)


@ACTIVATION
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "hidden", "N"), SHAPES, ids=lambda v: str(v))
def test_values_and_all_gradients_are_within_the_error_rule(M, K, hidden, N, dtypes, activation):
    check(*inputs(M, K, hidden, N, dtypes, activation=activation), activation=activation)


def test_swiglu_is_what_timm_computes():
    mlp = SwiGLUPacked(11, 42, 7).double()
    x, *_ = (t.double() for t in inputs(6, 11, 21, 7))
    weights = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    torch.testing.assert_close(compact_mlp(x, *weights, None, activation="swiglu"), mlp(x))


@pytest.mark.parametrize(
    "missing", [("fc1_bias",), ("fc2_bias",), ("fc1_bias", "fc2_bias", "residual")], ids=str
)
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
@ACTIVATION
def test_without_biases_or_residual(missing, dtypes, activation):
    *tensors, dout = inputs(15, 17, 37, 61, dtypes, activation=activation)
    tensors = [None if name in missing else t for name, t in zip(ARGUMENTS, tensors, strict=True)]
    check(*tensors, dout, activation=activation)


@ACTIVATION
def test_gradients_are_those_of_finite_differences(activation):
    *tensors, _ = (t.double() for t in inputs(4, 3, 5, 2, activation=activation))
    assert torch.autograd.gradcheck(lambda *t: compact_mlp(*t, activation), leaves(tensors))


@ACTIVATION
def test_every_subset_of_gradients_is_what_all_of_them_give(activation):
    *tensors, dout = inputs(9, 11, 13, 7, activation=activation)
    expected = run(compact_mlp, *tensors, dout, activation=activation)[1:]
    for needs in itertools.product((False, True), repeat=6):
        if not any(needs):
            continue
        given = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        compact_mlp(*given, activation).backward(dout)
        for name, t, need, gradient in zip(ARGUMENTS, given, needs, expected, strict=True):
            assert (t.grad is not None) == need, (needs, name)
            assert not need or torch.equal(t.grad, gradient), (needs, name)


def products(needs, K=32, hidden=32, activation="gelu"):
    """The matrix products, forward and backward, in units of one of K x hidden."""
    *tensors, _ = inputs(64, K, hidden, K, activation=activation)
    given = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    with FlopCounterMode(display=False) as counter:
        compact_mlp(*given, activation).sum().backward()
    return counter.get_total_flops() / (2 * 64 * K * hidden)


def test_only_the_products_that_are_needed_are_counted():
    assert products((True,) * 6) == 6
    assert products((False, True, True, True, True, False)) == 5
    assert products((True, False, False, False, False, False)) == 4
    assert products((False, False, False, True, False, False)) == 3
    assert products((False, False, True, False, False, False)) == 3
    assert products((False, False, False, False, True, True)) == 2


def test_the_first_product_of_swiglu_is_twice_as_large():
    assert products((True,) * 6, activation="swiglu") == 9
    assert products((True, False, False, False, False, False), activation="swiglu") == 6
    assert products((False, False, False, True, False, False), activation="swiglu") == 4


@ACTIVATION
def test_x_and_what_enters_the_activation_are_saved_and_nothing_else_of_their_size(activation):
    *tensors, _ = inputs(30, 11, 45, 7, "bf16", activation=activation)
    tensors = leaves(tensors)
    saved = saved_by(compact_mlp, *tensors, activation)
    for name, t in zip(ARGUMENTS, tensors, strict=True):
        assert (saved.pop(t.data_ptr(), None) is not None) == (name in ("x", "fc1_weight", "fc2_weight"))
    assert [t.shape for t in saved.values()] == [(30, len(tensors[1]))]


def test_nothing_is_kept_without_gradients():
    *tensors, _ = inputs(3, 5, 7, 2)
    _, z = torch.ops.vtp.compact_mlp(*tensors, False)
    assert not z.numel()
    with torch.no_grad():
        assert compact_mlp(*leaves(tensors)).grad_fn is None


def test_a_branch_that_kept_nothing_refuses_to_be_differentiated():
    *tensors, _ = inputs(3, 5, 7, 2)
    out, _ = torch.ops.vtp.compact_mlp(*leaves(tensors), False)
    with pytest.raises(ValueError, match="keep_z: got False"):
        out.sum().backward()


@pytest.mark.parametrize("kind", LAYOUTS)
@ACTIVATION
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(kind, activation):
    x, w1, b1, w2, b2, residual, dout = inputs(9, 21, 35, 13, activation=activation)
    expected = run(compact_mlp, x, w1, b1, w2, b2, residual, dout, activation=activation)
    x, w1, w2, residual = (with_layout(kind, t).detach().requires_grad_() for t in (x, w1, w2, residual))
    tensors = x, w1, *leaves([b1]), w2, *leaves([b2]), residual
    out = compact_mlp(*tensors, activation)
    out.backward(with_layout(kind, dout))
    for name, a, b in zip(("out", *ARGUMENTS), (out, *(t.grad for t in tensors)), expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-5, msg=name)


def test_a_gradient_that_is_one_number_expanded_is_understood():
    *tensors, dout = inputs(9, 21, 35, 13)
    expected = run(compact_mlp, *tensors, torch.ones_like(dout))
    got = run(compact_mlp, *tensors, torch.ones(()).expand(9, 13))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("N", [5, 8, 11])
def test_rows_of_results_start_at_multiples_of_eight(N):
    x, *tensors, residual, _ = inputs(6, 13, 21, N)
    out, z = torch.ops.vtp.compact_mlp(x.view(2, 3, 13), *tensors, residual.view(2, 3, N), True)
    assert out.stride() == (3 * (N + 7 & ~7), N + 7 & ~7, 1)
    assert z.stride() == (72, 24, 1)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@ACTIVATION
def test_any_leading_shape_even_an_empty_one(shape, activation):
    _, *weights, _, _ = (t.double() for t in inputs(1, 5, 9, 7, activation=activation))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, generator=g)
    residual, dout = torch.randn((2, *shape[:-1], 7), dtype=torch.float64, generator=g)
    got, expected = (
        run(f, x, *weights, residual, dout, activation=activation) for f in (compact_mlp, compact_mlp_ref)
    )
    for name, a, b in zip(("out", *ARGUMENTS), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(("K", "hidden", "N"), [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
@ACTIVATION
def test_widths_of_zero(K, hidden, N, activation):
    tensors = [torch.ones_like(t) for t in inputs(3, K, hidden, N, activation=activation)]
    got, expected = (run(f, *tensors, activation=activation) for f in (compact_mlp, compact_mlp_ref))
    for name, a, b in zip(("out", *ARGUMENTS), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_there_is_no_second_derivative_and_it_says_so():
    *tensors, _ = inputs(4, 7, 9, 3)
    tensors = leaves(tensors)
    (dx,) = torch.autograd.grad(compact_mlp(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


class Mlp(nn.Module):
    def __init__(self, K, hidden, N):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(K, hidden), nn.Linear(hidden, N)

    def forward(self, x, residual):
        return compact_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, residual)


class TestTransforms:
    """opcheck, autocast, compilation, export."""

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
    @pytest.mark.parametrize("full", [True, False], ids=["full", "no-biases-no-residual"])
    @ACTIVATION
    def test_opcheck(self, full, dtypes, activation):
        x, w1, b1, w2, b2, residual, _ = inputs(6, 5, 9, 7, dtypes, activation=activation)
        b1, b2, residual = (b1, b2, residual) if full else (None, None, None)
        swiglu = activation == "swiglu"
        given = *leaves((x, w1, b1, w2, b2, residual)), True, swiglu
        torch.library.opcheck(torch.ops.vtp.compact_mlp, given)
        torch.library.opcheck(torch.ops.vtp.compact_mlp, (x, w1, b1, w2, b2, residual, False, swiglu))

    @pytest.mark.parametrize("needs", [(True,) * 5, (False,) * 5, (True, False, False, False, True)], ids=str)
    @ACTIVATION
    def test_opcheck_of_the_backward(self, needs, activation):
        x, w1, _, w2, _, _, dout = inputs(6, 5, 9, 7, "bf16-f32", activation=activation)
        given = dout, x, F.linear(x, w1), w1, w2, *needs, activation == "swiglu"
        torch.library.opcheck(torch.ops.vtp.compact_mlp_backward, given)

    def test_a_program_that_was_exported_before_there_was_swiglu_still_calls_it(self):
        x, w1, b1, w2, b2, residual, dout = inputs(6, 5, 9, 7)
        x.requires_grad_()
        out, z = torch.ops.vtp.compact_mlp(x, w1, b1, w2, b2, residual, True)
        torch.testing.assert_close(out, compact_mlp_ref(x, w1, b1, w2, b2, residual))
        (dx,) = torch.autograd.grad(out, x, dout)
        given = dout, x.detach(), z.detach(), w1, w2, *(True,) * 5
        assert torch.equal(torch.ops.vtp.compact_mlp_backward(*given)[0], dx)

    def test_autocast_computes_in_its_dtype_and_keeps_the_residuals(self):
        *tensors, dout = inputs(12, 21, 35, 13)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(compact_mlp, *tensors, dout)
        assert all(t.dtype == torch.float32 for t in got)
        cast = [t.bfloat16() for t in tensors[:5]]
        expected = run(compact_mlp, *cast, tensors[5], dout)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            assert compact_mlp(*tensors[:5], None).dtype == torch.bfloat16

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
    @ACTIVATION
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, autocast, activation):
        def results(f, batch):
            x, *weights, residual, dout = inputs(batch * 7, 21, 35, 13, activation=activation)
            x, residual, dout = (t.view(batch, 7, -1) for t in (x, residual, dout))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return run(f, x, *weights, residual, dout, activation=activation)

        check_compilation(compact_mlp, results)

    def test_exports_with_a_dynamic_batch(self):
        check_export(Mlp(21, 35, 13), (3, 21), (3, 13))


BAD = {
    "x-not-a-tensor": (dict(x=[1.0]), TypeError, r"x: got list, expected a tensor"),
    "x-integers": (dict(x=torch.ones(3, 5).int()), TypeError, r"x: got torch.int32"),
    "x-width": (dict(x=torch.ones(3, 4)), ValueError, r"x: got shape \(3, 4\), expected \[\.\.\., 5\]"),
    "x-scalar": (dict(x=torch.ones(())), ValueError, r"x: got shape \(\)"),
    "x-device": (dict(x=torch.ones(3, 5, device="meta")), ValueError, r"fc1_weight: on cpu, expected meta"),
    "fc1-rank": (dict(fc1_weight=torch.ones(5)), ValueError, r"fc1_weight: got shape \(5,\)"),
    "fc1-dtype": (dict(fc1_weight=torch.ones(7, 5).half()), TypeError, r"fc1_weight: got torch.float16"),
    "fc1-none": (dict(fc1_weight=None), TypeError, r"fc1_weight: got NoneType"),
    "fc1-bias-shape": (
        dict(fc1_bias=torch.ones(5)), ValueError,
        r"fc1_bias: got shape \(5,\), expected \[7\]",
    ),
    "fc1-bias-dtype": (dict(fc1_bias=torch.ones(7).half()), TypeError, r"fc1_bias: got torch.float16"),
    "fc2-rank": (dict(fc2_weight=torch.ones(5)), ValueError, r"fc2_weight: got shape \(5,\)"),
    "fc2-width": (dict(fc2_weight=torch.ones(2, 6)), ValueError, r"fc2_weight: got shape \(2, 6\)"),
    "fc2-bias-shape": (
        dict(fc2_bias=torch.ones(5)), ValueError,
        r"fc2_bias: got shape \(5,\), expected \[2\]",
    ),
    "residual-shape": (
        dict(residual=torch.ones(2)), ValueError,
        r"residual: got shape \(2,\), expected \[3, 2\]",
    ),
    "residual-dtype": (dict(residual=torch.ones(3, 2).half()), TypeError, r"residual: got torch.float16"),
    "activation": (dict(activation="relu"), ValueError, r"activation: got .relu., expected .gelu. or"),
    "swiglu-odd": (
        dict(activation="swiglu"), ValueError,
        r"fc1_weight: got shape \(7, 5\), expected \[2 \* hidden, K\]",
    ),
    "swiglu-fc2": (
        dict(activation="swiglu", fc1_weight=torch.ones(8, 5)), ValueError,
        r"fc2_weight: got shape \(2, 7\), expected \[N, 4\], as fc1_weight is \[8, 5\]",
    ),
    "swiglu-bias": (
        dict(activation="swiglu", fc1_weight=torch.ones(14, 5)), ValueError,
        r"fc1_bias: got shape \(7,\), expected \[14\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD[case]
    good = dict(
        x=torch.ones(3, 5), fc1_weight=torch.ones(7, 5), fc1_bias=torch.ones(7),
        fc2_weight=torch.ones(2, 7), fc2_bias=torch.ones(2), residual=torch.ones(3, 2),
    )  # fmt: skip
    with pytest.raises(error, match=message):
        compact_mlp(**good | change)
