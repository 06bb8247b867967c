"""The op `compact_linear` as users call it: values, gradients, layouts, and PyTorch's transforms."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.gated_linear_cases import DTYPES
from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import check_compilation, check_export, leaves, saved_by, with_layout
from vtp_kernels.compact_linear import add_linear_, compact_linear, compact_linear_ref

NAMES = ("out", "dx", "dweight", "dbias", "dresidual")
# Rows, inputs, outputs: the odd widths of a pruned model on every axis.
SHAPES = [(1, 1, 1), (15, 17, 37), (61, 115, 197), (197, 461, 64), (37, 1021, 15), (17, 64, 461)]
EPILOGUES = {"none": (None, False), "gelu": ("gelu", False), "residual": (None, True), "both": ("gelu", True)}


def inputs(M, K, N, x_dtype, residual_dtype, seed=0):
    """x, weight, bias, residual, dy, all of a size near 1. Only the residual may be of another dtype."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((M, K), (N, K), (N,), (M, N), (M, N))
    x, weight, bias, residual, dy = (torch.randn(s, generator=g) for s in shapes)
    weight = weight / K**0.5
    return *(t.to(x_dtype) for t in (x, weight, bias)), residual.to(residual_dtype), dy


def run(function, tensors, dy, activation):
    """The result and the gradients of x, weight, bias, residual, None where none is needed."""
    x, weight, bias, residual = tensors
    out = function(x, weight, bias, activation=activation, residual=residual)
    if any(t is not None and t.requires_grad for t in tensors):
        out.backward(dy.to(out.dtype))
    return out.detach(), *(None if t is None else t.grad for t in tensors)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES, ids=lambda v: str(v))
def test_values_and_all_gradients_are_within_the_error_rule(M, K, N, dtypes, epilogue):
    activation, has_residual = EPILOGUES[epilogue]
    *tensors, dy = inputs(M, K, N, *DTYPES[dtypes])
    tensors[3] = tensors[3] if has_residual else None
    dy = dy.to(tensors[0].dtype)
    results = run(compact_linear, leaves(tensors), dy, activation)
    exact = run(
        compact_linear_ref, leaves([None if t is None else t.double() for t in tensors]), dy, activation
    )
    same_dtype = run(compact_linear_ref, leaves(tensors), dy, activation)
    for name, out, ref64, torchs in zip(NAMES, results, exact, same_dtype, strict=True):
        assert (out is None) == (torchs is None), name
        if out is not None:
            assert_close_to_float64(out, ref64, torchs, name)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradients_are_those_of_finite_differences(epilogue):
    activation, has_residual = EPILOGUES[epilogue]
    *tensors, _ = inputs(5, 4, 9, torch.float64, torch.float64)
    tensors = leaves(tensors[: 4 if has_residual else 3])

    def function(x, weight, bias, residual=None):
        return compact_linear(x, weight, bias, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_every_subset_of_gradients_is_what_all_of_them_give(activation):
    *tensors, dy = inputs(6, 11, 17, *DTYPES["bf16-f32"])
    expected = run(compact_linear, leaves(tensors), dy, activation)
    for needs in itertools.product((False, True), repeat=4):
        results = run(compact_linear, leaves(tensors, needs), dy, activation)
        for name, need, out, wanted in zip(NAMES[1:], needs, results[1:], expected[1:], strict=True):
            assert (out is not None) == need, (needs, name)
            assert not need or torch.equal(out, wanted), (needs, name)


def test_only_the_products_that_are_needed_are_made():
    M, K, N = 64, 32, 48
    for needs, expected in {
        (True, True, True, True): 3,
        (False, True, True, True): 2,
        (True, False, False, False): 2,
        (False, False, True, True): 1,
    }.items():
        tensors = leaves(inputs(M, K, N, *DTYPES["f32"])[:4], needs)
        with FlopCounterMode(display=False) as counter:
            run(compact_linear, tensors, torch.ones(M, N), "gelu")
        assert counter.get_total_flops() == expected * 2 * M * K * N, needs


def saved_numbers(activation):
    x, weight, bias = leaves(inputs(64, 32, 48, *DTYPES["f32"])[:3])
    saved = saved_by(lambda *t: compact_linear(*t, activation=activation), x, weight, bias)
    return sum(t.numel() for t in saved.values())


def test_nothing_is_saved_but_x_and_weight_and_with_gelu_what_it_is_taken_of():
    assert saved_numbers(None) == 64 * 32 + 48 * 32
    assert saved_numbers("gelu") == 64 * 32 + 48 * 32 + 64 * 48


@pytest.mark.parametrize("kind", ["transposed", "padded-rows", "misaligned", "every-other-column"])
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(kind):
    *tensors, dy = inputs(9, 21, 34, *DTYPES["f32"])
    expected = run(compact_linear, leaves(tensors), dy, "gelu")
    x, weight, residual = (
        with_layout(kind, tensors[i], spare=8).detach().requires_grad_() for i in (0, 1, 3)
    )
    bias = tensors[2].clone().requires_grad_()
    got = run(compact_linear, [x, weight, bias, residual], with_layout(kind, dy, spare=8), "gelu")
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("N", [1, 7, 8, 17])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_any_leading_shape_even_an_empty_one_and_rows_that_are_padded(shape, N):
    *tensors, _ = inputs(1, 5, N, torch.float64, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, weight, bias = leaves((x, *tensors[1:3]))
    residual = torch.ones(*shape[:-1], N, dtype=torch.float64)
    out = compact_linear(x, weight, bias, activation="gelu", residual=residual)
    torch.testing.assert_close(out, compact_linear_ref(x, weight, bias, "gelu", residual))
    out = compact_linear(x.detach(), weight.detach(), bias.detach())
    assert out.stride() == torch.empty(*shape[:-1], -(-N // 8) * 8)[..., :N].stride()
    compact_linear(x, weight, bias).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("K", "N"), [(0, 7), (5, 0), (0, 0)])
def test_widths_of_zero(K, N):
    x, weight, bias = leaves((torch.ones(3, K), torch.ones(N, K), torch.ones(N)))
    out = compact_linear(x, weight, bias)
    out.sum().backward()
    assert torch.equal(out, torch.ones(3, N))
    assert [tuple(t.grad.shape) for t in (x, weight, bias)] == [(3, K), (N, K), (N,)]


def test_results_share_no_memory_with_what_they_are_made_of():
    x, weight, bias, residual, _ = inputs(8, 8, 8, *DTYPES["f32"])
    before = residual.clone()
    out = compact_linear(x, weight, bias, residual=residual).fill_(0.0)
    assert torch.equal(residual, before) and out.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_there_is_no_second_derivative_and_it_says_so(activation):
    tensors = leaves(inputs(4, 5, 3, *DTYPES["f32"])[:4])
    out = compact_linear(*tensors[:3], activation=activation)
    (dx,) = torch.autograd.grad(out.sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


class TestSwiglu:
    """The activation "swiglu": silu(gate) * value of the two halves of what the product makes."""

    @pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
    @pytest.mark.parametrize(("M", "K", "hidden"), SHAPES, ids=lambda v: str(v))
    def test_values_and_all_gradients_are_within_the_error_rule(self, M, K, hidden, dtypes):
        *tensors, _, dy = inputs(M, K, 2 * hidden, *DTYPES[dtypes])
        dy, tensors = dy[:, :hidden], [*tensors, None]
        with torch.no_grad():
            inference = compact_linear(*tensors[:3], activation="swiglu")
        result, *gradients = run(compact_linear, leaves(tensors), dy, "swiglu")
        doubles = [None if t is None else t.double() for t in tensors]
        exact, same_dtype = (run(compact_linear_ref, leaves(t), dy, "swiglu") for t in (doubles, tensors))
        for name, out, ref64, torchs in zip(
            ("out", *NAMES[:4]), (inference, result, *gradients[:3]), (exact[0], *exact[:4]),
            (same_dtype[0], *same_dtype[:4]), strict=True,
        ):  # fmt: skip
            assert_close_to_float64(out, ref64, torchs, name)
        rows = torch.empty(M, -(-hidden // 8) * 8)[:, :hidden].stride()
        assert inference.stride() == result.stride() == rows

    @pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5), (2, 0, 5), (3, 0)], ids=str)
    def test_any_leading_shape_even_an_empty_one(self, shape):
        x, weight = torch.ones(shape), torch.ones(14, shape[-1])
        out = compact_linear(x, weight, None, activation="swiglu")
        torch.testing.assert_close(out, compact_linear_ref(x, weight, None, "swiglu"))

    def test_without_units(self):
        assert compact_linear(torch.ones(3, 5), torch.ones(0, 5), activation="swiglu").shape == (3, 0)

    def test_opcheck(self):
        x, weight, bias, *_ = inputs(6, 5, 18, *DTYPES["f32"])
        torch.library.opcheck(torch.ops.vtp.compact_linear, (x, weight, bias, False, None, False, True))

    def test_the_op_itself_has_no_gradient_and_says_so(self):
        x, weight, bias = leaves(inputs(6, 5, 18, *DTYPES["f32"])[:3])
        out, _ = torch.ops.vtp.compact_linear(x, weight, bias, False, None, False, True)
        with pytest.raises(RuntimeError, match="no gradient through"):
            out.sum().backward()

    @torch.no_grad()
    def test_exports_with_a_dynamic_batch(self):
        class Layer(nn.Linear):
            def forward(self, x):
                return compact_linear(x, self.weight, self.bias, activation="swiglu")

        check_export(Layer(6, 14).eval(), (3, 6))

    def test_its_products_are_counted(self):
        with FlopCounterMode(display=False) as counter:
            compact_linear(torch.ones(64, 32), torch.ones(96, 32), activation="swiglu")
        assert counter.get_total_flops() == 2 * 64 * 32 * 96

    def test_bad_input_is_refused_by_name(self):
        x = torch.ones(3, 5)
        with pytest.raises(ValueError, match=r"weight: got shape \(7, 5\), expected \[2 \* hidden, K\]"):
            compact_linear(x, torch.ones(7, 5), activation="swiglu")
        with pytest.raises(ValueError, match="residual: got a tensor, expected None"):
            compact_linear(x, torch.ones(8, 5), activation="swiglu", residual=torch.ones(3, 4))


class TestTransforms:
    """Autocast, compilation, export."""

    @pytest.mark.parametrize("gelu", [False, True], ids=["none", "gelu"])
    @pytest.mark.parametrize("optional", [True, False], ids=["bias-residual", "neither"])
    def test_opcheck(self, optional, gelu):
        *tensors, _ = inputs(6, 5, 9, *DTYPES["bf16-f32"])
        x, weight, bias, residual = leaves(tensors)
        optional = (bias, residual) if optional else (None, None)
        arguments = (x, weight, optional[0], gelu, optional[1], gelu)
        torch.library.opcheck(torch.ops.vtp.compact_linear, arguments)

    def test_opcheck_of_the_backward(self):
        x, weight, _, _, dy = inputs(6, 5, 9, *DTYPES["f32"])
        for needs in itertools.product((False, True), repeat=3):
            for z in (None, dy):
                torch.library.opcheck(torch.ops.vtp.compact_linear_backward, (dy, x, weight, z, *needs))

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    def test_autocast_computes_in_its_dtype_and_keeps_that_of_the_residual(self, epilogue):
        activation, has_residual = EPILOGUES[epilogue]
        *tensors, dy = inputs(12, 21, 34, *DTYPES["f32"])
        tensors[3] = tensors[3] if has_residual else None
        with torch.autocast("cpu", torch.bfloat16):
            got = run(compact_linear, leaves(tensors), dy, activation)
        assert got[0].dtype == (torch.float32 if has_residual else torch.bfloat16)
        assert all(g is None or g.dtype == torch.float32 for g in got[1:])
        tensors[:3] = [t.bfloat16() for t in tensors[:3]]
        expected = run(compact_linear, leaves(tensors), dy, activation)
        for name, a, b in zip(NAMES, got, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b.to(a.dtype)), name

    @pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, autocast):
        def function(x, weight, bias, residual):
            hidden = compact_linear(x, weight, bias, activation="gelu")
            return compact_linear(hidden, weight.t(), residual=residual)

        def results(f, batch):
            x, weight, bias, _, _ = inputs(batch * 7, 21, 34, *DTYPES["f32"])
            x = x.view(batch, 7, 21)
            tensors = leaves((x, weight, bias, x))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = f(*tensors)
            out.backward(torch.ones_like(out))
            return out, *(t.grad for t in tensors)

        check_compilation(function, results)

    def test_exports_with_a_dynamic_batch(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(6, 6)

            def forward(self, x):
                return compact_linear(x, self.linear.weight, self.linear.bias, activation="gelu", residual=x)

        with torch.no_grad():
            check_export(Layer().eval(), (3, 6))


BAD = {
    "x-not-a-tensor": (dict(x=[1.0]), TypeError, r"x: got list, expected a tensor"),
    "x-integers": (dict(x=torch.ones(3, 5).int()), TypeError, r"x: got torch.int32"),
    "x-width": (dict(x=torch.ones(3, 4)), ValueError, r"x: got shape \(3, 4\), expected \[\.\.\., 5\]"),
    "x-scalar": (dict(x=torch.ones(())), ValueError, r"x: got shape \(\)"),
    "x-device": (dict(x=torch.ones(3, 5, device="meta")), ValueError, r"weight: on cpu, expected meta"),
    "weight-rank": (dict(weight=torch.ones(5)), ValueError, r"weight: got shape \(5,\)"),
    "weight-dtype": (dict(weight=torch.ones(7, 5).half()), TypeError, r"weight: got torch.float16"),
    "bias-shape": (dict(bias=torch.ones(5)), ValueError, r"bias: got shape \(5,\), expected \[7\]"),
    "bias-dtype": (dict(bias=torch.ones(7).half()), TypeError, r"bias: got torch.float16"),
    "residual-shape": (
        dict(residual=torch.ones(7)),
        ValueError,
        r"residual: got shape \(7,\), expected \(3, 7\)",
    ),
    "residual-dtype": (dict(residual=torch.ones(3, 7).half()), TypeError, r"residual: got torch.float16"),
    "activation": (dict(activation="relu"), ValueError, r"activation: got 'relu', expected None, 'gelu' or"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD[case]
    arguments = dict(x=torch.ones(3, 5), weight=torch.ones(7, 5), bias=torch.ones(7)) | change
    with pytest.raises(error, match=message):
        compact_linear(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


class TestInPlace:
    """`add_linear_`."""

    @pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
    @pytest.mark.parametrize(("M", "K", "N"), SHAPES, ids=lambda v: str(v))
    def test_it_is_the_sum_and_returns_what_it_was_given(self, M, K, N, dtype):
        x, weight, _, residual, _ = inputs(M, K, N, *DTYPES[dtype])
        exact = residual.double() + x.double() @ weight.double().T
        same_dtype = residual + x @ weight.T
        assert add_linear_(residual, x, weight) is residual
        assert_close_to_float64(residual, exact, same_dtype, "residual")

    @pytest.mark.parametrize("kind", ["transposed", "padded-rows", "misaligned", "every-other-column"])
    def test_in_any_layout_and_what_lies_between_is_left(self, kind):
        x, weight, _, residual, _ = inputs(9, 21, 34, *DTYPES["f32"])
        expected = residual + x @ weight.T
        given = with_layout(kind, residual)
        between = given.untyped_storage().nbytes() // 4 - given.numel()
        add_linear_(given, with_layout(kind, x), with_layout(kind, weight))
        torch.testing.assert_close(given, expected)
        assert given.new_empty(0).set_(given.untyped_storage()).isnan().sum() == between

    @pytest.mark.parametrize("M, K, N", [(0, 3, 8), (3, 0, 8), (3, 8, 0)])
    def test_without_elements(self, M, K, N):
        residual = torch.ones(M, N)
        assert torch.equal(add_linear_(residual, torch.ones(M, K), torch.ones(N, K)), torch.ones(M, N))

    def test_a_gradient_is_refused_by_name(self):
        x, weight, _, residual, _ = inputs(3, 5, 7, *DTYPES["f32"])
        for name, which in (("residual", 0), ("x", 1), ("weight", 2)):
            given = [t.clone() for t in (residual, x, weight)]
            given[which].requires_grad_()
            with pytest.raises(RuntimeError, match=f"{name}: needs a gradient"):
                add_linear_(*given)

    def test_who_has_saved_it_for_a_backward_pass_notices(self):
        x, weight, _, residual, _ = inputs(3, 5, 7, *DTYPES["f32"])
        product = (residual * torch.ones((), requires_grad=True)).sum()  # saves residual
        add_linear_(residual, x, weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    @pytest.mark.parametrize(
        ("residual", "error", "says"),
        [
            ([1.0], TypeError, "residual: got list, expected a tensor"),
            (torch.ones(3, 7).bfloat16(), TypeError, "residual: got torch.bfloat16, expected torch.float32"),
            (torch.ones(3, 8), ValueError, r"residual: got shape \(3, 8\), expected \(3, 7\)"),
            (torch.ones(7).expand(3, 7), ValueError, r"residual: got strides \(0, 1\)"),
        ],
    )
    def test_a_bad_residual_is_refused(self, residual, error, says):
        x, weight, *_ = inputs(3, 5, 7, *DTYPES["f32"])
        with pytest.raises(error, match=says):
            add_linear_(residual, x, weight)

    def test_operands_in_its_memory_are_refused(self):
        x = torch.ones(3, 3)
        with pytest.raises(ValueError, match="residual: shares memory with x"):
            add_linear_(x, x, torch.eye(3))

    def test_opcheck(self):
        x, weight, _, residual, _ = inputs(3, 5, 7, *DTYPES["f32"])
        torch.library.opcheck(torch.ops.vtp.add_linear_, (residual, x, weight))

    def test_compiles_without_breaks_and_is_written(self):
        def function(residual, x, weight):
            add_linear_(residual, x, weight)
            return residual + 1

        def results(f, batch):
            x, weight, _, residual, _ = inputs(batch, 5, 7, *DTYPES["f32"])
            return f(residual, x, weight), residual

        check_compilation(function, results)
