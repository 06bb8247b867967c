"""The op `layer_norm_gather` as users call it: values, gradients, layouts, and PyTorch's transforms."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.gated_linear_cases import DTYPES
from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import LAYOUTS, check_compilation, check_export, leaves, saved_by, with_layout
from vtp_kernels.layer_norm_gather import layer_norm_gather, layer_norm_gather_ref

EPS = 1e-6
NAMES = ("out", "dx", "dweight", "dbias")
# Rows, columns, kept columns; with as many kept as there are, there is no index.
SHAPES = [
    (1, 17, 1),
    (37, 61, 15),
    (15, 115, 115),
    (61, 197, 37),
    (5, 461, 461),
    (17, 1021, 461),
    (3, 5000, 4097),
]


def inputs(M, D, kept, x_dtype, weight_dtype, seed=0):
    """x, weight, bias, index, dout; rows of x have a mean of their own, which the statistics must remove."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=g) + 3 * torch.randn(M, 1, generator=g)
    weight, bias = 0.5 + torch.rand(kept, generator=g), torch.randn(kept, generator=g)
    index = torch.randperm(D, generator=g)[:kept].sort().values if kept < D else None
    dout = torch.randn(M, kept, generator=g)
    return x.to(x_dtype), weight.to(weight_dtype), bias.to(weight_dtype), index, dout.to(x_dtype)


def run(function, x, weight, bias, index, dout):
    """out and the gradients of x, weight and bias; None for a missing weight's and bias'."""
    tensors = leaves((x, weight, bias))
    out = function(*tensors, index, EPS)
    out.backward(dout)
    return out.detach(), *(None if t is None else t.grad for t in tensors)


def references(x, weight, bias, index, dout, shift=None):
    """The definition in float64 and in the dtype of x."""
    for dtype in (torch.float64, x.dtype):
        function = functools.partial(layer_norm_gather_ref, shift=None if shift is None else shift.to(dtype))
        yield run(
            function, *(None if t is None else t.to(dtype) for t in (x, weight, bias)), index, dout.to(dtype),
        )  # fmt: skip


def check(x, weight, bias, index, dout):
    results = run(layer_norm_gather, x, weight, bias, index, dout)
    expected, same_dtype = references(x, weight, bias, index, dout)
    sources = (x, x, weight, bias)
    for name, out, source, ref64, torchs in zip(NAMES, results, sources, expected, same_dtype, strict=True):
        assert (out is None) == (source is None), name
        if out is not None:
            assert out.dtype == source.dtype, name
            # A float32 gradient beside a 16-bit x cannot be nearer than its 16-bit operands.
            assert_close_to_float64(out.to(x.dtype), ref64, torchs, name)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "D", "kept"), SHAPES, ids=lambda v: str(v))
def test_values_and_all_gradients_are_within_the_error_rule(M, D, kept, dtypes):
    check(*inputs(M, D, kept, *DTYPES[dtypes]))


@pytest.mark.parametrize("kept", [15, 61], ids=["gathered", "all-columns"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_without_weight_and_bias_it_is_the_normalized_input(kept, dtypes):
    x, _, _, index, dout = inputs(37, 61, kept, *DTYPES[dtypes])
    check(x, None, None, index, dout)


@pytest.mark.parametrize("kept", [3, 7], ids=["gathered", "all-columns"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradients_are_those_of_finite_differences(kept, affine):
    x, weight, bias, index, _ = inputs(4, 7, kept, torch.float64, torch.float64)
    weight, bias = (weight, bias) if affine else (None, None)
    tensors = leaves((x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: layer_norm_gather(*t, index, EPS), tensors)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kept", [15, 61], ids=["gathered", "all-columns"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
def test_a_shift_is_added_to_every_row_first(dtypes, kept, affine):
    x, weight, bias, index, dout = inputs(37, 61, kept, *DTYPES[dtypes])
    weight, bias = (weight, bias) if affine else (None, None)
    shift = torch.linspace(-2, 3, 61).to(x.dtype)
    out = layer_norm_gather(x, weight, bias, index, EPS, shift=shift)
    (exact, *_), (same_dtype, *_) = references(x, weight, bias, index, dout, shift)
    assert_close_to_float64(out, exact, same_dtype, "out")


def test_a_gradient_beside_a_shift_is_refused():
    x, weight, bias, index, _ = inputs(3, 7, 5, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="shift: has no gradient"):
        layer_norm_gather(x.requires_grad_(), weight, bias, index, EPS, shift=torch.zeros(7))
    with torch.no_grad():
        layer_norm_gather(x, weight, bias, index, EPS, shift=torch.zeros(7))


@pytest.mark.parametrize(
    ("shift", "error", "says"),
    [
        ([0.0] * 7, TypeError, "shift: got list, expected a tensor"),
        (torch.zeros(7).double(), TypeError, "shift: got torch.float64, expected torch.float32"),
        (torch.zeros(5), ValueError, r"shift: got shape \(5,\), expected \[7\]"),
        (torch.zeros(7, device="meta"), ValueError, "shift: on meta, expected cpu"),
    ],
)
def test_a_bad_shift_is_refused(shift, error, says):
    x, weight, bias, index, _ = inputs(3, 7, 5, torch.float32, torch.float32)
    with pytest.raises(error, match=says):
        layer_norm_gather(x, weight, bias, index, EPS, shift=shift)


def test_removed_columns_have_the_gradient_of_the_statistics():
    x, weight, bias, index, dout = inputs(9, 61, 15, torch.float32, torch.float32)
    _, dx, _, _ = run(layer_norm_gather, x, weight, bias, index, dout)
    removed = torch.ones(61, dtype=torch.bool).index_fill(0, index, False)
    assert dx[:, removed].abs().min() > 0


def test_an_index_out_of_order_is_followed():
    x, weight, bias, index, dout = inputs(9, 61, 15, torch.float32, torch.float32)
    check(x, weight, bias, index.flip(0), dout)


def test_variance_does_not_cancel_where_the_mean_is_large():
    x, weight, bias, index, dout = inputs(37, 197, 61, torch.float32, torch.float32)
    check(x + 1000, weight, bias, index, dout)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(kind):
    x, weight, bias, index, dout = inputs(9, 61, 21, torch.float32, torch.float32)
    expected = run(layer_norm_gather, x, weight, bias, index, dout)
    x = with_layout(kind, x).detach().requires_grad_()
    weight, bias = leaves((weight, bias))
    out = layer_norm_gather(x, weight, bias, index, EPS)
    out.backward(with_layout(kind, dout))
    for name, a, b in zip(NAMES, (out, x.grad, weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kept", [5, 8, 11])
def test_rows_of_results_start_at_multiples_of_eight(kept):
    x, weight, bias, index, dout = inputs(6, 11, kept, torch.float32, torch.float32)
    out = layer_norm_gather(x.view(2, 3, 11), weight, bias, index, EPS)
    assert out.stride() == (3 * (kept + 7 & ~7), kept + 7 & ~7, 1)
    dx, _ = torch.ops.vtp.layer_norm_gather_backward(dout, x, weight, index, EPS)
    assert dx.stride() == (16, 1)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kept", [1, 8, 15, 61], ids=lambda kept: f"kept{kept}")
def test_padding_is_zeros_of_whose_gradient_nothing_is_read(kept, affine):
    x, weight, bias, index, dout = inputs(9, 61, kept, torch.float32, torch.float32)
    weight, bias = (weight, bias) if affine else (None, None)
    expected = run(layer_norm_gather, x, weight, bias, index, dout)

    def padded(*arguments):
        return layer_norm_gather(*arguments, padded=True)

    missing = -kept % 8
    poisoned = F.pad(dout, (0, missing), value=float("nan"))
    out, *gradients = run(padded, x, weight, bias, index, poisoned)
    assert out.shape == (9, kept + missing) and out.is_contiguous()
    assert torch.equal(out, F.pad(expected[0], (0, missing)))
    for a, b in zip(gradients, expected[1:], strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("kept", [3, 5], ids=["gathered", "all-columns"])
def test_any_leading_shape_even_an_empty_one(shape, kept):
    _, weight, bias, index, _ = inputs(1, 5, kept, torch.float64, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dout = torch.ones(*shape[:-1], kept, dtype=torch.float64)
    got = run(layer_norm_gather, x, weight, bias, index, dout)
    expected = run(layer_norm_gather_ref, x, weight, bias, index, dout)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_no_column_kept():
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.ones(0, requires_grad=True)
    out = layer_norm_gather(x, weight, weight, torch.empty(0, dtype=torch.int64), EPS)
    out.sum().backward()
    assert out.shape == (3, 0)
    assert torch.equal(x.grad, torch.zeros(3, 5))


def test_nothing_is_saved_but_the_inputs():
    x, weight, bias, index, _ = inputs(37, 61, 15, torch.bfloat16, torch.float32)
    x, weight, bias = leaves((x, weight, bias))
    saved = saved_by(layer_norm_gather, x, weight, bias, index, EPS)
    assert set(saved) == {x.data_ptr(), weight.data_ptr(), index.data_ptr()}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_calls_without_the_dispatcher_give_the_same(affine, monkeypatch):
    x, weight, bias, index, dout = inputs(9, 61, 15, torch.bfloat16, torch.float32)
    weight, bias = (weight, bias) if affine else (None, None)
    expected = run(layer_norm_gather, x, weight, bias, index, dout)
    monkeypatch.setitem(layer_norm_gather.__globals__, "_calls_directly", lambda x: True)
    got = run(layer_norm_gather, x, weight, bias, index, dout)
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or torch.equal(a, b)
    x, weight, bias = leaves((x, weight, bias))
    out = layer_norm_gather(x, weight, bias, index, EPS)
    assert type(out.grad_fn).__name__ == "_LayerNormGatherBackward"
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_there_is_no_second_derivative_and_it_says_so():
    x, weight, bias, index, _ = inputs(4, 7, 3, torch.float32, torch.float32)
    (x,) = leaves((x,))
    (dx,) = torch.autograd.grad(layer_norm_gather(x, weight, bias, index, EPS).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


class Norm(nn.Module):
    def __init__(self, D, kept):
        super().__init__()
        _, weight, bias, index, _ = inputs(1, D, kept, torch.float32, torch.float32)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("index", index)

    def forward(self, x):
        return layer_norm_gather(x, self.weight, self.bias, self.index, EPS)


class TestTransforms:
    """opcheck, autocast, compilation, export."""

    @pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
    @pytest.mark.parametrize("kept", [5, 11], ids=["gathered", "all-columns"])
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    def test_opcheck(self, affine, kept, dtypes):
        x, weight, bias, index, _ = inputs(6, 11, kept, *DTYPES[dtypes])
        x, weight, bias = leaves((x, *((weight, bias) if affine else (None, None))))
        torch.library.opcheck(torch.ops.vtp.layer_norm_gather, (x, weight, bias, index, EPS, x.dtype))

    @pytest.mark.parametrize("kept", [5, 11], ids=["gathered", "all-columns"])
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    def test_opcheck_of_the_backward(self, affine, kept):
        x, weight, _, index, dout = inputs(6, 11, kept, *DTYPES["bf16-f32"])
        arguments = (dout, x, weight if affine else None, index, EPS)
        torch.library.opcheck(torch.ops.vtp.layer_norm_gather_backward, arguments)

    @pytest.mark.parametrize("kept", [5, 11], ids=["gathered", "all-columns"])
    def test_opcheck_with_padding(self, kept):
        x, weight, bias, index, _ = inputs(6, 11, kept, *DTYPES["bf16-f32"])
        x, weight, bias = leaves((x, weight, bias))
        arguments = (x, weight, bias, index, EPS, torch.float32, None, True)
        torch.library.opcheck(torch.ops.vtp.layer_norm_gather, arguments)
        dout = torch.randn(6, kept + -kept % 8)
        arguments = (dout, x.detach(), weight.detach(), index, EPS)
        torch.library.opcheck(torch.ops.vtp.layer_norm_gather_backward, arguments)

    def test_autocast_puts_out_its_dtype_and_reads_x_as_it_is(self):
        x, weight, bias, index, dout = inputs(12, 61, 15, torch.float32, torch.float32)
        tensors = leaves((x, weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            out = layer_norm_gather(*tensors, index, EPS)
        assert out.dtype == torch.bfloat16
        out.backward(dout.bfloat16())
        expected = run(layer_norm_gather, x, weight, bias, index, dout.bfloat16().float())
        assert torch.equal(out, expected[0].bfloat16())
        for t, e in zip(tensors, expected[1:], strict=True):
            assert t.grad.dtype == torch.float32
            torch.testing.assert_close(t.grad, e)

    def test_autocast_leaves_float64(self):
        x, weight, bias, index, _ = inputs(12, 61, 15, torch.float64, torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer_norm_gather(x, weight, bias, index, EPS).dtype == torch.float64

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
    @pytest.mark.parametrize("kept", [15, 61], ids=["gathered", "all-columns"])
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, kept, autocast):
        def results(f, batch):
            x, weight, bias, index, dout = inputs(batch * 7, 61, kept, torch.float32, torch.float32)
            x, dout = x.view(batch, 7, 61), dout.view(batch, 7, kept)
            dout = dout.bfloat16() if autocast else dout
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return run(f, x, weight, bias, index, dout)

        check_compilation(layer_norm_gather, results)

    def test_exports_with_a_dynamic_batch(self):
        check_export(Norm(61, 15), (3, 61))

    def test_a_copy_of_a_module_computes_the_same(self):
        layer, x = Norm(61, 15), torch.randn(4, 61)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


BAD = {
    "x-not-a-tensor": (dict(x=[1.0]), TypeError, r"x: got list, expected a tensor"),
    "x-integers": (dict(x=torch.ones(3, 5).int()), TypeError, r"x: got torch.int32"),
    "x-scalar": (dict(x=torch.ones(())), ValueError, r"x: got shape \(\)"),
    "x-device": (dict(x=torch.ones(3, 5, device="meta")), ValueError, r"weight: on cpu, expected meta"),
    "weight-alone": (dict(bias=None), ValueError, r"bias: got None beside a weight"),
    "bias-alone": (dict(weight=None), ValueError, r"weight: got None beside a bias"),
    "weight-shape": (dict(weight=torch.ones(5)), ValueError, r"weight: got shape \(5,\), expected \[2\]"),
    "weight-dtype": (dict(weight=torch.ones(2).half()), TypeError, r"weight: got torch.float16"),
    "bias-shape": (dict(bias=torch.ones(5)), ValueError, r"bias: got shape \(5,\), expected \[2\]"),
    "bias-dtype": (dict(bias=torch.ones(2).double()), TypeError, r"bias: got torch.float64"),
    "index-list": (dict(index=[0, 2]), TypeError, r"index: got list, expected a tensor"),
    "index-dtype": (dict(index=torch.tensor([0, 2]).int()), TypeError, r"index: got torch.int32"),
    "index-rank": (dict(index=torch.zeros(1, 2).long()), ValueError, r"index: got shape \(1, 2\)"),
    "index-long": (dict(index=torch.zeros(6).long()), ValueError, r"index: got shape \(6,\)"),
    "eps-negative": (dict(eps=-1.0), ValueError, r"eps: got -1.0"),
    "eps-nan": (dict(eps=float("nan")), ValueError, r"eps: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD[case]
    good = dict(
        x=torch.ones(3, 5), weight=torch.ones(2), bias=torch.ones(2), index=torch.tensor([0, 2]), eps=EPS
    )
    with pytest.raises(error, match=message):
        layer_norm_gather(**good | change)
