"""The op `gated_linear` as users call it: values, gradients, layouts, and PyTorch's transforms."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vtp
from tests.support.gated_linear_cases import DTYPES, L1, NAMES, inputs, reference, references
from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import check_compilation, check_export, leaves, saved_by, with_layout
from tests.support.processes import forks
from vtp_kernels import gated_linear, library
from vtp_kernels.gated_linear import gated_linear_ref

# Rows, inputs, outputs: the odd widths of a pruned model on every axis, fewer rows than outputs and more.
SHAPES = [
    (1, 1, 1),
    (15, 17, 37),
    (61, 115, 197),
    (197, 461, 64),
    (37, 1021, 15),
    (394, 115, 576),
    (17, 64, 461),
]


def run(function, tensors, dy):
    """y and the gradients of x, weight, gate, bias, None where none is needed."""
    y = function(*tensors)
    y.backward(dy)
    return y.detach(), *(t.grad for t in tensors)


def check(function, x, weight, gate, bias, dy):
    tensors = leaves((x, weight, gate, bias))
    results = run(function, tensors, dy)
    expected, same_dtype = references(x, weight, gate, bias, dy)
    for name, out, source, ref64, torchs in zip(
        NAMES, results, (x, *tensors), expected, same_dtype, strict=True
    ):
        assert out.dtype == source.dtype and out.shape == ref64.shape, name
        # A float32 gradient beside a 16-bit x cannot be nearer than its 16-bit operands.
        assert_close_to_float64(out.to(x.dtype), ref64, torchs, name)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES, ids=lambda v: str(v))
def test_values_and_all_gradients_are_within_the_error_rule(M, K, N, dtypes):
    check(lambda *t: gated_linear(*t, l1=L1), *inputs(M, K, N, *DTYPES[dtypes]))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("N", [1, 31, 33, 461])
def test_without_the_cpp_operators_they_are_within_it_too(N, dtypes, monkeypatch):
    monkeypatch.setattr(library, "_NO_CPP_REASON", "switched off")
    check(lambda *t: gated_linear(*t, l1=L1), *inputs(512, 115, N, *DTYPES[dtypes]))


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (31, 17), (33, 61), (100, 461)])
def test_the_cpp_fold_and_unfold_are_those_of_pytorch(N, K, product_dtype):
    if not library.cpp_supports(torch.empty(1)):
        pytest.skip(f"no C++ operators: {library._NO_CPP_REASON}")
    product, weight, gate = torch.randn(N, K).to(product_dtype), torch.randn(N, K), torch.randn(K)
    dw = torch.full((N, K), float("nan"))
    total = torch.ops.vtp.cpu_unfold_gate(product, weight, gate, dw)
    assert torch.equal(dw, product * gate)
    exact = (product.double() * weight.double()).sum(0)
    assert_close_to_float64(total, exact, (product.float() * weight).sum(0), "sums")
    assert torch.equal(torch.ops.vtp.cpu_unfold_gate(product, weight, gate, None), total)
    folded = torch.full((N, K), float("nan")).to(product_dtype)
    torch.ops.vtp.cpu_fold_gate(weight, gate, folded)
    assert torch.equal(folded, (weight * gate).to(product_dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(torch.ops.vtp.cpu_unfold_gate(product, weight, gate, None), total)
    torch.set_num_threads(before)


@pytest.mark.parametrize("argument", ["product", "weight", "gate", "out"])
def test_the_cpp_unfold_refuses_what_does_not_fit(argument):
    if not library.cpp_supports(torch.empty(1)):
        pytest.skip(f"no C++ operators: {library._NO_CPP_REASON}")
    good = {
        "product": torch.ones(3, 5),
        "weight": torch.ones(3, 5),
        "gate": torch.ones(5),
        "out": torch.ones(3, 5),
    }
    bad = {"dtype": good[argument].double(), "shape": torch.ones(4), "strides": torch.ones(6, 10)[::2, ::2]}
    for tensor in bad.values():
        with pytest.raises(RuntimeError, match=argument if argument != "weight" else "weight|product"):
            torch.ops.vtp.cpu_unfold_gate(*{**good, argument: tensor}.values())


@pytest.mark.parametrize(("M", "N"), [(5, 9), (9, 5)], ids=["activation-side", "weight-side"])
def test_gradients_are_those_of_finite_differences(M, N):
    x, weight, gate, bias, _ = inputs(M, 4, N, torch.float64, torch.float64)
    gate = gate.double().add(3.0)
    assert torch.autograd.gradcheck(gated_linear, leaves((x, weight, gate, bias)))


@pytest.mark.parametrize("M", [6, 40], ids=["activation-side", "weight-side"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_every_subset_of_gradients_is_what_all_of_them_give(M, dtypes):
    x, weight, gate, bias, dy = inputs(M, 11, 17, *DTYPES[dtypes])
    tensors = (x, weight, gate, bias)
    wanted, same_dtype = references(*tensors, dy)
    for needs in itertools.product((False, True), repeat=4):
        if not any(needs):
            continue
        results = run(lambda *t: gated_linear(*t, l1=L1), leaves(tensors, needs), dy)
        for name, need, out, ref64, torchs in zip(
            NAMES[1:], needs, results[1:], wanted[1:], same_dtype[1:], strict=True
        ):
            assert (out is not None) == need, (needs, name)
            if need:
                assert_close_to_float64(out.to(x.dtype), ref64, torchs, f"{needs} {name}")


def products(needs, M=64, K=32, N=48):
    """The matrix products, forward and backward, in units of one."""
    tensors = leaves(inputs(M, K, N, torch.float32, torch.float32)[:4], needs)
    with FlopCounterMode(display=False) as counter:
        gated_linear(*tensors).sum().backward()
    return counter.get_total_flops() / (2 * M * K * N)


def test_only_the_products_that_are_needed_are_made():
    assert products((True, True, True, True)) == 3
    assert products((False, True, True, True)) == 2
    assert products((True, True, False, True)) == 3
    assert products((True, False, True, False)) == 2, "a frozen weight needs no product of its own"
    assert products((True, False, False, False)) == 2
    assert products((False, False, True, False)) == 2
    assert products((False, False, False, True)) == 1


def saved_bytes(dtypes, M=64, K=32, N=48):
    tensors = leaves(inputs(M, K, N, *DTYPES[dtypes])[:4])
    saved = saved_by(gated_linear, *tensors)
    return sum(t.nbytes for t in saved.values()) - sum(t.nbytes for t in tensors[:3])


def test_nothing_is_saved_but_the_inputs_and_in_mixed_precision_the_cast_weight():
    assert saved_bytes("f32") == 0
    assert saved_bytes("bf16") == 0
    assert saved_bytes("bf16-f32") == 2 * 32 * 48


@pytest.mark.parametrize("kind", ["transposed", "strided-rows", "misaligned", "every-other-column"])
@pytest.mark.parametrize("M", [9, 50], ids=["activation-side", "weight-side"])
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(kind, M):
    x, weight, gate, bias, dy = inputs(M, 21, 34, torch.float32, torch.float32)
    expected = run(lambda *t: gated_linear(*t, l1=L1), leaves((x, weight, gate, bias)), dy)
    tensors = [with_layout(kind, t).detach().requires_grad_() for t in (x, weight)]
    tensors += leaves((gate, bias), (True, True))
    got = run(lambda *t: gated_linear(*t, l1=L1), tensors, with_layout(kind, dy))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_a_gradient_that_is_one_number_expanded_is_understood():
    x, weight, gate, bias, dy = inputs(9, 21, 34, torch.float32, torch.float32)
    expected = run(gated_linear, leaves((x, weight, gate, bias)), torch.ones_like(dy))
    got = run(gated_linear, leaves((x, weight, gate, bias)), torch.ones(()).expand(9, 34))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_any_leading_shape_even_an_empty_one(shape):
    _, weight, gate, bias, _ = inputs(1, 5, 7, torch.float64, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tensors = leaves((x, weight, gate.double(), bias))
    y = gated_linear(*tensors, l1=L1)
    assert y.shape == (*shape[:-1], 7)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = reference(x, weight, gate.double(), bias, dy, torch.float64)
    for name, out, ref in zip(NAMES, (y, *(t.grad for t in tensors)), expected, strict=True):
        torch.testing.assert_close(out.detach(), ref, msg=name)


@pytest.mark.parametrize(("K", "N"), [(0, 7), (5, 0), (0, 0)])
def test_widths_of_zero(K, N):
    x, weight, gate, bias = (torch.ones(s) for s in ((3, K), (N, K), (K,), (N,)))
    tensors = leaves((x, weight, gate, bias))
    y = gated_linear(*tensors, l1=L1)
    y.sum().backward()
    assert torch.equal(y, torch.ones(3, N))
    assert [tuple(t.grad.shape) for t in tensors] == [(3, K), (N, K), (K,), (N,)]
    assert torch.equal(tensors[2].grad, torch.full((K,), L1))


def test_at_gate_one_it_is_the_plain_linear_bit_for_bit():
    for M in (8, 80):
        x, weight, _, bias, _ = inputs(M, 33, 41, torch.float32, torch.float32)
        assert torch.equal(gated_linear(x, weight, torch.ones(33), bias), F.linear(x, weight, bias))


def test_a_gate_used_twice_collects_both_gradients_and_each_call_its_penalty():
    x, weight, gate, bias, dy = inputs(9, 21, 34, torch.float32, torch.float32)
    gate.requires_grad_()
    (gated_linear(x, weight, gate, bias, l1=L1) * dy).sum().backward()
    once = gate.grad.clone()
    gate.grad = None
    first, second = (gated_linear(x, weight, gate, bias, l1=l1) for l1 in (L1, 0.0))
    ((first + second) * dy).sum().backward()
    torch.testing.assert_close(gate.grad, 2 * once - L1 * gate.detach().sign())


def test_infinities_and_nan_go_through_as_in_a_plain_linear():
    x, weight, gate, bias, _ = inputs(6, 5, 9, torch.float32, torch.float32)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    gate[2] = 1.5
    got, expected = gated_linear(x, weight, gate, bias), gated_linear_ref(x, weight, gate, bias)
    assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_there_is_no_second_derivative_and_it_says_so(dtypes):
    tensors = leaves(inputs(4, 5, 3, *DTYPES[dtypes])[:4])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(gated_linear(*tensors).sum(), tensors[:2], create_graph=True)
    y = torch.ops.vtp.gated_linear(*tensors, 0.0)
    (dx,) = torch.autograd.grad(y.sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


class TestTransforms:
    """Autocast, compilation, export, functional calls, data parallelism."""

    @pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_opcheck(self, dtypes, bias):
        x, weight, gate, b, _ = inputs(6, 5, 9, *DTYPES[dtypes])
        b = leaves((b,), (True,))[0] if bias else None
        torch.library.opcheck(torch.ops.vtp.gated_linear, (*leaves((x, weight, gate), (True,) * 3), b, L1))

    def test_opcheck_of_the_backward(self):
        x, weight, gate, bias, dy = inputs(6, 5, 9, torch.float32, torch.float32)
        for needs in itertools.product((False, True), repeat=3):
            arguments = (dy, x, weight, gate, bias.dtype, L1, *needs)
            torch.library.opcheck(torch.ops.vtp.gated_linear_backward, arguments)

    def test_opcheck_of_the_folded_weight(self):
        _, weight, gate, _, _ = inputs(6, 5, 9, *DTYPES["bf16-f32"])
        weight, gate = leaves((weight, gate), (True, True))
        torch.library.opcheck(torch.ops.vtp.fold_gate, (weight, gate, torch.bfloat16, L1))
        folded = (weight * gate).bfloat16().detach()
        for needs in itertools.product((False, True), repeat=2):
            arguments = (folded, weight.detach(), folded, gate.detach(), L1, *needs)
            torch.library.opcheck(torch.ops.vtp.unfold_gate, arguments)

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
    def test_autocast_computes_in_its_dtype_and_keeps_those_of_parameters(self, weight_dtype):
        x, weight, gate, bias, dy = inputs(12, 21, 34, torch.float32, weight_dtype)
        tensors = leaves((x, weight, gate, bias))
        with torch.autocast("cpu", torch.bfloat16):
            y = gated_linear(*tensors)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
        expected = run(gated_linear, leaves((x.bfloat16(), weight, gate, bias)), dy.bfloat16())
        assert torch.equal(y, expected[0])
        assert torch.equal(tensors[1].grad, expected[2])

    def test_autocast_during_the_backward_pass_changes_no_bits(self):
        x, weight, gate, bias, dy = inputs(40, 21, 34, torch.float32, torch.float32)
        expected = run(gated_linear, leaves((x, weight, gate, bias)), dy)
        tensors = leaves((x, weight, gate, bias))
        y = gated_linear(*tensors)
        with torch.autocast("cpu", torch.bfloat16):
            y.backward(dy)
        assert all(torch.equal(t.grad, e) for t, e in zip(tensors, expected[1:], strict=True))

    @pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, autocast):
        def function(*tensors):
            return gated_linear(*tensors, l1=L1)

        def results(f, batch):
            x, weight, gate, bias, _ = inputs(batch * 7, 21, 34, torch.float32, torch.float32)
            tensors = leaves((x.view(batch, 7, 21), weight, gate, bias))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = f(*tensors)
            y.backward(torch.ones_like(y))
            return y, *(t.grad for t in tensors)

        check_compilation(function, results)

    def test_exports_with_a_dynamic_batch(self):
        check_export(vtp.GatedLinear.from_linear(nn.Linear(6, 5)).eval(), (3, 6))

    def test_functional_call_with_gradients_of_the_given_parameters(self):
        layer = vtp.GatedLinear.from_linear(nn.Linear(6, 5))
        other = copy.deepcopy(layer)
        nn.init.normal_(other.gate)
        parameters = dict(other.named_parameters())
        x = torch.randn(7, 6)
        torch.func.functional_call(layer, parameters, (x,)).sum().backward()
        assert layer.gate.grad is None
        gradient, other.gate.grad = other.gate.grad, None
        other(x).sum().backward()
        assert torch.equal(gradient, other.gate.grad)

    def test_data_parallel_ranks_agree_on_the_gradients_bit_for_bit(self, tmp_path):
        forks()  # of which these are two
        torch.multiprocessing.start_processes(_rank, (tmp_path,), nprocs=2, start_method="forkserver")
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
        alone = [_gradients(_gated_model(), rank) for rank in range(2)]
        for name, gradient in first.items():
            assert torch.equal(gradient, second[name]), name
            # And they are the mean of what each rank's own images give.
            mean = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6, msg=name)


def _gated_model():
    torch.manual_seed(0)
    return nn.Sequential(
        vtp.GatedLinear.from_linear(nn.Linear(24, 40)),
        nn.GELU(),
        vtp.GatedLinear.from_linear(nn.Linear(40, 8)),
    )


def _gradients(model, rank):
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(rank))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = nn.parallel.DistributedDataParallel(_gated_model())
    torch.save(_gradients(model, rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


BAD = {
    "x-not-a-tensor": (lambda a: a.update(x=[1.0]), TypeError, r"x: got list, expected a tensor"),
    "x-integers": (lambda a: a.update(x=a["x"].int()), TypeError, r"x: got torch.int32"),
    "x-width": (
        lambda a: a.update(x=torch.ones(3, 4)),
        ValueError,
        r"x: got shape \(3, 4\), expected \[\.\.\., 5\]",
    ),
    "x-scalar": (lambda a: a.update(x=torch.ones(())), ValueError, r"x: got shape \(\)"),
    "x-device": (lambda a: a.update(x=a["x"].to("meta")), ValueError, r"weight: on cpu, expected meta"),
    "weight-rank": (lambda a: a.update(weight=torch.ones(5)), ValueError, r"weight: got shape \(5,\)"),
    "weight-dtype": (lambda a: a.update(weight=a["weight"].half()), TypeError, r"weight: got torch.float16"),
    "gate-shape": (
        lambda a: a.update(gate=torch.ones(7)),
        ValueError,
        r"gate: got shape \(7,\), expected \[5\]",
    ),
    "gate-dtype": (lambda a: a.update(gate=torch.ones(5).double()), TypeError, r"gate: got torch.float64"),
    "gate-none": (lambda a: a.update(gate=None), TypeError, r"gate: got NoneType"),
    "bias-shape": (
        lambda a: a.update(bias=torch.ones(5)),
        ValueError,
        r"bias: got shape \(5,\), expected \[7\]",
    ),
    "bias-dtype": (lambda a: a.update(bias=torch.ones(7).half()), TypeError, r"bias: got torch.float16"),
    "l1-negative": (lambda a: a.update(l1=-1.0), ValueError, r"l1: got -1.0"),
    "l1-nan": (lambda a: a.update(l1=float("nan")), ValueError, r"l1: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD[case]
    arguments = dict(
        x=torch.ones(3, 5), weight=torch.ones(7, 5), gate=torch.ones(5), bias=torch.ones(7), l1=0.0
    )
    change(arguments)
    l1 = arguments.pop("l1")
    with pytest.raises(error, match=message):
        gated_linear(**arguments, l1=l1)
