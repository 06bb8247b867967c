"""`gated_linear` on a GPU: values, gradients, layouts, streams, graphs and PyTorch's transforms."""

import importlib
import itertools
import warnings

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F

from tests.support.gated_linear_cases import DTYPES, L1, NAMES, inputs, reference, references
from tests.support.numerics import FEWEST, assert_close_to_float64
from tests.support.op_checks import leaves
from tests.vtp_kernels.test_gated_linear import SHAPES, check, run, with_layout
from vtp_kernels import gated_linear, launching, library

# The package's attribute of this name is the function.
module = importlib.import_module("vtp_kernels.gated_linear")

# What a GPU takes differently: several tiles, rows shared among programs, rows beyond the table's bound.
LARGER_SHAPES = [
    (394, 768, 2304),
    (1576, 384, 384),
    (4096, 64, 72),
    (4097, 61, 37),
    (3200, 192, 576),
]
BELOW_AND_ABOVE = pytest.mark.parametrize("M", [9, 700], ids=["activation-side", "weight-side"])
pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # of the fixture `poisoned`


def gated(*tensors):
    return gated_linear(*tensors, l1=L1)


def on_gpu(device, M, *arguments, **keywords):
    """`inputs(...)`, on the GPU."""
    given = inputs(M, *arguments, **keywords)
    if (
        M >= FEWEST
    ):  # the column of dX whose gate is 0 would be all that the error rule compares small ones with
        gate = given[2]
        gate[gate == 0] = 1.0
    return [t.to(device) for t in given]


def assert_right(results, given, what="", tf32=False):
    """By the error rule, `results` (y and gradients, None for those not asked for) are those of `given`."""
    exact, same_dtype = references(*given)
    for name, out, ref64, torchs in zip(
        NAMES, results, exact, in_tf32(*given) if tf32 else same_dtype, strict=True
    ):
        if out is not None:
            assert_close_to_float64(out.to(given[0].dtype), ref64, torchs, f"{what} {name}")


def in_tf32(x, weight, gate, bias, dy):
    """What a GPU may make of float32 that goes through tensor cores: operands cut off after 10 bits.

    PyTorch on the same GPU is no yardstick for this: cuBLAS is free to compute some shapes more exactly.
    """
    x, weight, dy = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight, dy))
    return [t.float() for t in reference(x, weight, gate, bias, dy, torch.float64)]


def assert_same_bits(results, expected):
    for name, out, other in zip(NAMES, results, expected, strict=True):
        assert torch.equal(out, other), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [*SHAPES, *LARGER_SHAPES], ids=str)
def test_values_and_all_gradients_are_within_the_error_rule(device, path, M, K, N, dtypes):
    check(gated, *on_gpu(device, M, K, N, *DTYPES[dtypes]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(37, 1021, 15), (394, 768, 2304), (4097, 61, 37)], ids=str)
def test_without_gradients_values_are_within_the_error_rule(device, path, M, K, N, dtypes):
    given = on_gpu(device, M, K, N, *DTYPES[dtypes])
    with torch.no_grad():
        y = gated(*given[:4])
    assert_right([y, None, None, None, None], given)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("widths", [(21, 34), (64, 96)], ids=["odd", "aligned"])
@BELOW_AND_ABOVE
def test_every_subset_of_gradients_is_what_all_of_them_give(device, path, M, widths, dtypes):
    given = on_gpu(device, M, *widths, *DTYPES[dtypes])
    for needs in itertools.product((False, True), repeat=4):
        if any(needs):
            results = run(gated, leaves(given[:4], needs), given[4])
            assert tuple(out is not None for out in results[1:]) == needs
            assert_right(results, given, f"{needs}")


@pytest.mark.parametrize("kind", ["transposed", "strided-rows", "misaligned", "every-other-column"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("widths", [(21, 34), (64, 96)], ids=["odd", "aligned"])
@BELOW_AND_ABOVE
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(device, path, M, widths, dtypes, kind):
    given = on_gpu(device, M, *widths, *DTYPES[dtypes])
    x, weight, gate, bias, dy = given
    tensors = [with_layout(kind, t).detach().requires_grad_() for t in (x, weight)]
    tensors += leaves((gate, bias), (True, True))
    assert_right(run(gated, tensors, with_layout(kind, dy)), given)


def test_a_gradient_that_is_one_number_expanded_is_understood(device, path):
    x, weight, gate, bias, dy = on_gpu(device, 9, 21, 34, torch.float32, torch.float32)
    got = run(gated, leaves((x, weight, gate, bias)), torch.ones((), device=device).expand(9, 34))
    assert_right(got, (x, weight, gate, bias, torch.ones_like(dy)))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_any_leading_shape_even_an_empty_one(device, path, shape, dtypes):
    _, weight, gate, bias, _ = on_gpu(device, 1, 5, 7, *DTYPES[dtypes])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(device, DTYPES[dtypes][0])
    dy = torch.randn((*shape[:-1], 7), generator=generator).to(x)
    results = run(gated, leaves((x, weight, gate, bias)), dy)
    assert results[0].shape == dy.shape
    assert_right(results, (x, weight, gate, bias, dy))


@pytest.mark.parametrize(("K", "N"), [(0, 7), (5, 0), (0, 0)])
def test_widths_of_zero(device, path, K, N):
    tensors = leaves([torch.ones(s, device=device) for s in ((3, K), (N, K), (K,), (N,))])
    y = gated(*tensors)
    y.sum().backward()
    assert torch.equal(y, torch.ones(3, N, device=device))
    assert torch.equal(tensors[2].grad, torch.full((K,), L1, device=device))


@pytest.mark.parametrize("M", [5, 40])
def test_float64_runs_on_plain_operators(device, path, M):
    x, weight, gate, bias, dy = on_gpu(device, M, 21, 34, torch.float64, torch.float64)
    results = run(gated, leaves((x, weight, gate.double(), bias)), dy)
    expected = reference(x, weight, gate, bias, dy, torch.float64)
    for name, out, ref in zip(NAMES, results, expected, strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("M", [6, 700])
def test_infinities_and_nan_go_through_as_in_a_plain_linear(device, path, M):
    x, weight, gate, bias, _ = on_gpu(device, M, 5, 9, torch.float32, torch.float32)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    gate[2] = 1.5
    expected = F.linear(x * gate, weight, bias)
    assert torch.equal(gated_linear(x, weight, gate, bias).isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(37, 461, 115), (394, 768, 2304), (4097, 61, 37)], ids=str)
def test_a_second_run_gives_the_same_bits(device, path, M, K, N, dtypes):
    given = on_gpu(device, M, K, N, *DTYPES[dtypes])
    first, second = (run(gated, leaves(given[:4]), given[4]) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_more_than_two_billion_elements_are_addressed(device, odd):
    if torch.cuda.mem_get_info(device)[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    K, N = (1031, 17) if odd else (1032, 16)
    # All rows but the last are 0, so that gradients of the whole are those of the last rows.
    tail = on_gpu(device, 64, K, N, torch.bfloat16, torch.bfloat16)
    M = 2**31 // K + 100
    x = torch.zeros((M, K), dtype=torch.bfloat16, device=device)
    dy = torch.zeros((M, N), dtype=torch.bfloat16, device=device)
    x[-64:], dy[-64:] = tail[0], tail[4]
    tensors = [x.requires_grad_(), *leaves(tail[1:4], (True,) * 3)]
    with launching.forced_path("gated_linear", "fused"):
        y, dx, *others = run(gated, tensors, dy)
    assert_right([y[-64:], dx[-64:], *others], tail)
    assert not dx[:-64].any()


# Dtypes of x and W that read each group of the tables.
OPERANDS = {
    "16": (torch.bfloat16, torch.bfloat16),
    "16/32": (torch.bfloat16, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "ieee": (torch.float32, torch.float32),
}


@pytest.fixture
def launches(monkeypatch):
    """(kernel's name, its configuration) of each launch."""
    seen, real = [], module.launch

    def launch(kernel, grid, arguments, config, **constants):
        seen.append((kernel.__name__, config))
        real(kernel, grid, arguments, config, **constants)

    monkeypatch.setattr(module, "launch", launch)
    return seen


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("widths", [(251, 197), (256, 192)], ids=["odd", "aligned"])
@pytest.mark.parametrize(("kernel", "operands"), list(module.TILES), ids=lambda v: v.replace("/", "-"))
def test_each_entry_of_the_tables_computes_within_the_error_rule(device, launches, kernel, operands, widths):
    torch.set_float32_matmul_precision("high" if operands == "tf32" else "highest")
    for M in (70, 700):
        given = on_gpu(device, M, *widths, *OPERANDS[operands])
        x, weight, gate, bias, dy = given
        y = dx = dw = dg = None
        if kernel == "fwd":
            y = module._launch_fwd(x, weight, gate, bias)
        else:
            if kernel == "dx":
                dx, partial = module._launch_dx(dy, weight, gate, x)
            else:
                dw, partial = module._launch_dw(dy, x, weight, gate, True, True)
            dg = module._launch_gate_gradient(partial, gate, L1)
        assert_right([y, dx, dw, dg, None], given, f"M = {M}", tf32=operands == "tf32")
    table = module.TILES if widths[0] % 8 == 0 else module.UNALIGNED_TILES
    used = [config for name, config in launches if name == f"_gated_linear_{kernel}_kernel"]
    assert used == [table[kernel, operands]] * 2


def test_a_forced_path_is_the_one_that_runs(device, path, launches):
    """All other tests of paths, and the benchmark's figures for them, rest on this."""
    given = on_gpu(device, 700, 64, 96, torch.bfloat16, torch.bfloat16)
    run(gated, leaves(given[:4]), given[4])
    kernels = {name for name, _ in launches} - {"_gate_gradient_kernel", "_unfold_kernel"}
    fused = {f"_gated_linear_{kernel}_kernel" for kernel in ("fwd", "dx", "dw")}
    assert kernels == ({"_fold_kernel"} if path == "vendor" else fused)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
    @BELOW_AND_ABOVE
    def test_computes_in_its_dtype_and_keeps_those_of_parameters(self, device, path, M, dtype):
        x, weight, gate, bias, dy = on_gpu(device, M, 64, 96, torch.float32, torch.float32)
        tensors = leaves((x, weight, gate, bias))
        with torch.autocast("cuda", dtype):
            y = gated(*tensors)
        assert y.dtype == dtype
        y.backward(dy.to(dtype))
        assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
        x = x.to(dtype)
        assert_right([y, *(t.grad for t in tensors)], (x, weight, gate, bias, dy.to(dtype)))
        expected = run(gated, leaves((x, weight, gate, bias)), dy.to(dtype))
        assert_same_bits([y, tensors[0].grad.to(dtype), *(t.grad for t in tensors[1:])], expected)

    def test_during_the_backward_pass_it_changes_no_bits(self, device, path):
        x, weight, gate, bias, dy = on_gpu(device, 40, 21, 34, torch.float32, torch.float32)
        expected = run(gated, leaves((x, weight, gate, bias)), dy)
        tensors = leaves((x, weight, gate, bias))
        y = gated(*tensors)
        with torch.autocast("cuda", torch.bfloat16):
            y.backward(dy)
        assert_same_bits([y, *(t.grad for t in tensors)], expected)


class TestTransforms:
    @pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
    def test_opcheck(self, device, path, dtypes, bias):
        x, weight, gate, b, _ = on_gpu(device, 6, 5, 9, *DTYPES[dtypes])
        b = leaves((b,), (True,))[0] if bias else None
        torch.library.opcheck(torch.ops.vtp.gated_linear, (*leaves((x, weight, gate), (True,) * 3), b, L1))

    def test_opcheck_of_the_backward(self, device, path):
        x, weight, gate, bias, dy = on_gpu(device, 6, 5, 9, torch.float32, torch.float32)
        for needs in itertools.product((False, True), repeat=3):
            arguments = (dy, x, weight, gate, bias.dtype, L1, *needs)
            torch.library.opcheck(torch.ops.vtp.gated_linear_backward, arguments)

    def test_opcheck_of_the_folded_weight(self, device):
        _, weight, gate, _, _ = on_gpu(device, 6, 5, 9, *DTYPES["bf16-f32"])
        weight, gate = leaves((weight, gate), (True, True))
        torch.library.opcheck(torch.ops.vtp.fold_gate, (weight, gate, torch.bfloat16, L1))
        folded = (weight * gate).bfloat16().detach()
        for needs in itertools.product((False, True), repeat=2):
            arguments = (folded, weight.detach(), folded, gate.detach(), L1, *needs)
            torch.library.opcheck(torch.ops.vtp.unfold_gate, arguments)

    @pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, device, path, autocast):
        torch.compiler.reset()
        compiled = torch.compile(gated, fullgraph=True, dynamic=True)
        for batch in (2, 5, 8):
            x, weight, gate, bias, _ = on_gpu(device, batch * 7, 24, 40, torch.float32, torch.float32)
            results = []
            for function in (compiled, gated):
                tensors = leaves((x.view(batch, 7, 24), weight, gate, bias))
                with (
                    torch.autocast("cuda", torch.bfloat16, enabled=autocast),
                    torch._dynamo.config.patch(error_on_recompile=True),
                ):
                    y = function(*tensors)
                y.backward(torch.ones_like(y))
                results.append((y, *(t.grad for t in tensors)))
            assert_same_bits(*results)

    @pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
    def test_forward_and_backward_are_captured_in_a_cuda_graph(self, device, path, dtypes):
        *given, dy = on_gpu(device, 394, 192, 576, *DTYPES[dtypes])
        tensors = leaves(given)

        def step():
            for tensor in tensors:
                tensor.grad = None  # so that the graph owns the gradients and each replay overwrites them
            y = gated(*tensors)
            y.backward(dy)
            return y

        side = torch.cuda.Stream(device)  # what compiles and allocates once has to happen before the capture
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()

        other = on_gpu(device, 394, 192, 576, *DTYPES[dtypes], seed=1)
        with torch.no_grad():
            for tensor, new in zip((*tensors, dy), other, strict=True):
                tensor.copy_(new)
        graph.replay()
        first = [t.detach().clone() for t in (y, *(t.grad for t in tensors))]
        assert_right(first, other)
        graph.replay()
        assert_same_bits([y, *(t.grad for t in tensors)], first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: this needs two")
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_tensors_on_another_device_than_the_current_one(device, path, dtypes):
    index = next(i for i in range(torch.cuda.device_count()) if i != device.index)
    other = torch.device("cuda", index)
    check(gated, *on_gpu(other, 394, 192, 576, *DTYPES[dtypes]))
    assert torch.cuda.current_device() == device.index


def test_where_triton_cannot_run_plain_operators_do_and_say_so_once(device, monkeypatch):
    monkeypatch.setattr(library, "triton_unsupported_reason", lambda _: "a reason that no other test gives")
    given = on_gpu(device, 40, 21, 34, torch.float32, torch.float32)
    with pytest.warns(UserWarning, match="a reason that no other test gives"):
        y = gated(*leaves(given[:4]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vtp_kernels")
        y.backward(given[4])
    check(gated, *given)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("widths", [(61, 45), (64, 48)], ids=["odd", "aligned"])
def test_few_small_shapes_that_run_every_kernel(device, path, widths, dtypes):
    """For compute-sanitizer, under which a launch takes seconds."""
    for M in (37, 700):
        given = on_gpu(device, M, *widths, *DTYPES[dtypes])
        check(gated, *given)
        with torch.no_grad():
            y = gated(*given[:4])
        assert_right([y, None, None, None, None], given)
