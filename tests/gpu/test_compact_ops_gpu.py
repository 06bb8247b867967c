"""The ops of the compact model on a GPU: values, gradients, layouts, whole models, graphs, compilations."""

import copy
import functools
import importlib

import pytest
import torch

import vtp
from tests.support.engine_cases import MODELS, compact_model
from tests.support.models import image
from tests.support.numerics import assert_close_to_float64
from vtp_kernels.compact_linear import add_linear_, compact_linear, compact_linear_ref
from vtp_kernels.compact_mlp import compact_mlp, compact_mlp_ref
from vtp_kernels.layer_norm_gather import layer_norm_gather, layer_norm_gather_ref
from vtp_kernels.ragged_attention import ragged_attention, ragged_attention_ref
from vtp_kernels.rotary import (
    rotate_heads,
    rotate_heads_,
    rotate_heads_ref,
    rotated_attention,
    rotated_attention_ref,
    rotated_linear,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # of that fixture
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def check(device, dtype, function, reference, *given):
    """Values and gradients of `function` by the error rule; a gradient for each of `given`, float64."""
    leaves = [t.to(device, dtype) for t in given]

    def run(function, wanted):
        tensors = [t.to(wanted).requires_grad_() for t in leaves]
        out = function(*tensors)
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(device, dtype).to(wanted)
        return out, *torch.autograd.grad(out, tensors, dy)

    results = run(function, dtype), run(reference, torch.float64), run(reference, dtype)
    for i, (out, exact, torchs) in enumerate(zip(*results, strict=True)):
        assert_close_to_float64(out, exact, torchs, f"result {i}")


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@DTYPES
@pytest.mark.parametrize(("M", "D", "kept"), [(1, 192, 115), (197, 384, 383), (1576, 768, 461), (50, 61, 1)])
def test_layer_norm_gather(device, dtype, M, D, kept):
    index = torch.randperm(D, generator=torch.Generator().manual_seed(1))[:kept].sort().values.to(device)

    def op(function):
        return lambda x, weight, bias: function(x, weight, bias, index, 1e-6)

    given = normal(M, D), 1 + normal(kept, seed=1, scale=0.3), normal(kept, seed=2)
    check(device, dtype, op(layer_norm_gather), op(layer_norm_gather_ref), *given)


@DTYPES
@pytest.mark.parametrize(("M", "D", "kept"), [(1, 192, 115), (1576, 768, 461), (50, 61, 61)])
def test_layer_norm_gather_with_padding(device, dtype, M, D, kept):
    index = torch.randperm(D, generator=torch.Generator().manual_seed(1))[:kept].sort().values.to(device)
    given = (normal(M, D), 1 + normal(kept, seed=1, scale=0.3), normal(kept, seed=2))
    results = []
    for padded in (False, True):
        leaves = [t.to(device, dtype).requires_grad_() for t in given]
        out = layer_norm_gather(*leaves, index, 1e-6, padded=padded)
        dy = torch.full_like(out, float("nan"))  # but for what is kept
        dy[:, :kept] = normal(M, kept, seed=3).to(device, dtype)
        assert not out[:, kept:].any()
        results.append((out[:, :kept], *torch.autograd.grad(out, leaves, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DTYPES
@pytest.mark.parametrize(("M", "D", "kept"), [(197, 384, 383), (1576, 768, 461), (50, 61, 61)])
def test_layer_norm_gather_of_shifted_rows(device, dtype, M, D, kept):
    index = torch.randperm(D, generator=torch.Generator().manual_seed(1))[:kept].sort().values.to(device)
    x, shift = (t.to(device, dtype) for t in (normal(M, D), normal(D, seed=1)))
    out = layer_norm_gather(x, None, None, index, 1e-6, shift=shift)
    exact, torchs = (
        layer_norm_gather_ref(x.to(wanted), None, None, index, 1e-6, shift.to(wanted))
        for wanted in (torch.float64, dtype)
    )
    assert_close_to_float64(out, exact, torchs, "out")


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 61, 40), (197, 461, 768), (1576, 1021, 768), (64, 4096, 192), (197, 61, 37)]
)
def test_add_linear_in_place(device, dtype, M, K, N):
    residual, x, weight = (
        t.to(device, dtype) for t in (normal(M, N), normal(M, K, seed=1), normal(N, K, seed=2, scale=K**-0.5))
    )
    exact, torchs = (
        compact_linear_ref(x.to(d), weight.to(d), residual=residual.to(d)) for d in (torch.float64, dtype)
    )
    assert add_linear_(residual, x, weight) is residual
    assert_close_to_float64(residual, exact, torchs, "residual")


@DTYPES
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("M", "K", "N"), [(1, 61, 37), (197, 461, 1411), (1576, 1021, 768), (64, 4096, 115), (5000, 115, 61)]
)
def test_compact_linear(device, dtype, activation, M, K, N):
    given = normal(M, K), normal(N, K, seed=1, scale=K**-0.5), normal(N, seed=2), normal(M, N, seed=3)
    check(
        device, dtype,
        lambda x, weight, bias, residual: compact_linear(
            x, weight, bias, activation=activation, residual=residual
        ),
        lambda x, weight, bias, residual: compact_linear_ref(x, weight, bias, activation, residual),
        *given,
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "hidden", "N"), [(37, 115, 461, 192), (4300, 115, 197, 192), (64, 61, 37, 15)]
)
def test_compact_mlp(device, dtype, M, K, hidden, N):
    given = (
        normal(M, K), normal(hidden, K, seed=1, scale=K**-0.5), normal(hidden, seed=2),
        normal(N, hidden, seed=3, scale=hidden**-0.5), normal(N, seed=4), normal(M, N, seed=5),
    )  # fmt: skip
    check(device, dtype, compact_mlp, compact_mlp_ref, *given)


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "hidden", "N"), [(37, 115, 461, 192), (4300, 61, 64, 192), (64, 61, 1, 15)]
)
def test_compact_mlp_with_swiglu(device, dtype, M, K, hidden, N):
    given = (
        normal(M, K), normal(2 * hidden, K, seed=1, scale=K**-0.5), normal(2 * hidden, seed=2),
        normal(N, hidden, seed=3, scale=hidden**-0.5), normal(N, seed=4), normal(M, N, seed=5),
    )  # fmt: skip
    ours, reference = (functools.partial(f, activation="swiglu") for f in (compact_mlp, compact_mlp_ref))
    check(device, dtype, ours, reference, *given)


@DTYPES
@pytest.mark.parametrize(
    ("M", "K", "hidden"), [(1, 61, 37), (201, 384, 1536), (577, 461, 705), (8, 64, 61), (1200, 61, 64)]
)
def test_swiglu_in_inference(device, dtype, M, K, hidden):
    x, weight, bias = (
        t.to(device, dtype)
        for t in (normal(M, K), normal(2 * hidden, K, seed=1, scale=K**-0.5), normal(2 * hidden, seed=2))
    )
    out = compact_linear(x, weight, bias, activation="swiglu")
    exact, torchs = (
        compact_linear_ref(x.to(d), weight.to(d), bias.to(d), "swiglu") for d in (torch.float64, dtype)
    )
    assert_close_to_float64(out, exact, torchs, "out")


ROTATIONS = pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])


@DTYPES
@ROTATIONS
@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
@pytest.mark.parametrize(("N", "prefix", "d"), [(2, 1, 2), (201, 5, 64), (17, 0, 30), (197, 1, 80)])
def test_rotate_heads(device, dtype, N, prefix, d, own_tables, rotate_half):
    given = normal(3, N, 6 * d + 61), normal(*(3,) * own_tables, N - prefix, 2 * d, seed=1)
    arguments = (d,) * 3, prefix, rotate_half
    check(
        device, dtype, lambda qkv, rope: rotate_heads(qkv, rope, *arguments),
        lambda qkv, rope: rotate_heads_ref(qkv, rope, *arguments), *given,
    )  # fmt: skip


@DTYPES
@ROTATIONS
@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
@pytest.mark.parametrize(
    ("B", "N", "prefix", "H", "d", "V"),
    [(1, 201, 5, 6, 64, 301), (3, 197, 1, 3, 30, 61), (9, 201, 5, 3, 64, 64)],
)
def test_rotated_linear(device, dtype, B, N, prefix, H, d, V, own_tables, rotate_half):
    outputs = 2 * H * d + V
    x, weight, bias, rope = (
        t.to(device, dtype)
        for t in (
            normal(B, N, 115), normal(outputs, 115, seed=1, scale=115**-0.5), normal(outputs, seed=2),
            normal(*(H,) * own_tables, N - prefix, 2 * d, seed=3),
        )
    )  # fmt: skip
    arguments = (d,) * H, prefix, rotate_half
    out = rotated_linear(x, weight, bias, rope, *arguments)
    exact, torchs = (
        rotate_heads_ref(compact_linear_ref(x.to(t), weight.to(t), bias.to(t)), rope.to(t), *arguments)
        for t in (torch.float64, dtype)
    )
    assert_close_to_float64(out, exact, torchs, "out")


@DTYPES
@ROTATIONS
@pytest.mark.parametrize("V", [61, 64])
def test_rotate_heads_in_place_with_a_table_of_float32(device, dtype, V, rotate_half):
    qkv, rope = normal(2, 201, 256 + V).to(device, dtype), normal(196, 128, seed=1).to(device).float()
    arguments = (64, 64), 5, rotate_half
    exact = rotate_heads_ref(qkv.double(), rope.double(), *arguments)
    torchs = rotate_heads_ref(qkv, rope.to(dtype), *arguments)
    expected = rotate_heads(qkv, rope, *arguments)
    assert_close_to_float64(expected, exact, torchs)
    assert rotate_heads_(qkv, rope, *arguments) is qkv
    assert torch.equal(qkv, expected)


@DTYPES
@pytest.mark.parametrize("N", [1, 17, 197, 257, 577])
@pytest.mark.parametrize("widths", [(37, 1, 64, 15), (61, 48)], ids=str)
@pytest.mark.parametrize("keys", [(64, 64), (64, 40)], ids=str)
def test_ragged_attention(device, dtype, N, widths, keys):
    keys = keys * (len(widths) // 2)
    qkv = normal(2, N, 2 * sum(keys) + sum(widths))
    arguments = keys, widths, 64**-0.5
    check(
        device, dtype, lambda qkv: ragged_attention(qkv, *arguments),
        lambda qkv: ragged_attention_ref(qkv, *arguments), qkv,
    )  # fmt: skip


def check_rotated_attention(device, dtype, N, prefix, d, rotate_half, own_tables):
    """By the error rule, with a table of float32; the other two ways in one op."""
    qkv = normal(2, N, 4 * d + 109).to(device, dtype)
    rope = normal(*(2,) * own_tables, N - prefix, 2 * d, seed=1, scale=0.5**0.5).to(device).float()
    arguments = (d, d), (61, 48), d**-0.5
    out = rotated_attention(qkv, *arguments, rope, prefix, rotate_half)
    exact = rotated_attention_ref(qkv.double(), *arguments, rope.double(), prefix, rotate_half)
    torchs = rotated_attention_ref(qkv, *arguments, rope, prefix, rotate_half)
    assert_close_to_float64(out, exact, torchs, "out")


@DTYPES
@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
@pytest.mark.parametrize(
    ("N", "prefix", "d", "rotate_half"),
    [(201, 5, 64, True), (201, 1, 64, False), (17, 0, 30, True), (577, 1, 64, False)],
)
def test_rotated_attention(device, dtype, N, prefix, d, rotate_half, own_tables):
    check_rotated_attention(device, dtype, N, prefix, d, rotate_half, own_tables)


@pytest.mark.parametrize("name", MODELS)
@DTYPES
def test_the_optimized_model_equals_the_compact_one(device, name, dtype):
    small = compact_model(name).to(device)
    given = image(small).float().to(device)
    exact = copy.deepcopy(small).double()(given.double())
    torchs = copy.deepcopy(small).cpu().to(dtype)(given.cpu().to(dtype))  # on PyTorch's own operators
    out = vtp.optimize(small, dtype)(given.to(dtype))
    assert_close_to_float64(out, exact, torchs, name)


def test_a_captured_graph_gives_what_a_call_gives_and_compiles_nothing(device, monkeypatch):
    small = compact_model("deit-tiny").to(device)
    fast = vtp.optimize(small, torch.bfloat16)
    given = image(small).float().to(device, torch.bfloat16)
    fast.warmup([len(given)])
    import triton

    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **_: pytest.fail("compiled after warmup")
    )
    expected = fast(given)
    graph = torch.cuda.CUDAGraph()
    static = given.clone()
    with torch.cuda.graph(graph):
        out = fast(static)
    static.copy_(given)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_takes_any_batch_size(device, mode):
    small = compact_model("deit-tiny").to(device)
    fast = vtp.optimize(small, torch.bfloat16)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, mode=mode)
    given = image(small).float().to(device, torch.bfloat16)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch in (1, 2, 5):
            several = given[:1].repeat(batch, 1, 1, 1)
            torch.testing.assert_close(compiled(several), fast(several), rtol=2e-2, atol=2e-2)


def test_fine_tuning_runs_on_the_ops(device, monkeypatch):
    small = compact_model("deit-tiny").to(device).train()
    called = []
    for op in ("layer_norm_gather", "compact_linear", "ragged_attention", "compact_mlp"):
        module = importlib.import_module(f"vtp_kernels.{op}")
        launch = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *a, launch=launch, **k: (called.append(kernel), launch(kernel, *a, **k)),
        )
    given = image(small).float().to(device)
    with torch.autocast("cuda", torch.bfloat16):
        loss = small(given).float().square().mean()
    loss.backward()
    assert len({kernel.__name__ for kernel in called}) >= 6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_small_shapes_that_run_every_kernel(device, dtype):
    """For compute-sanitizer, under which a launch takes seconds."""
    index = torch.arange(0, 61, 2, device=device)
    norm = normal(37, 61), 1 + normal(31, seed=1, scale=0.3), normal(31, seed=2)
    check(
        device, dtype, lambda *t: layer_norm_gather(*t, index, 1e-6),
        lambda *t: layer_norm_gather_ref(*t, index, 1e-6), *norm,
    )  # fmt: skip
    linear = normal(37, 61), normal(45, 61, seed=1, scale=0.1), normal(45, seed=2)
    check(
        device, dtype, lambda *t: compact_linear(*t, activation="gelu"),
        lambda *t: compact_linear_ref(*t, "gelu", None), *linear,
    )  # fmt: skip
    for keys in ((64, 64), (64, 40)):
        qkv, arguments = normal(2, 17, 2 * sum(keys) + 28), (keys, (15, 13), 64**-0.5)
        check(
            device, dtype, lambda qkv, given=arguments: ragged_attention(qkv, *given),
            lambda qkv, given=arguments: ragged_attention_ref(qkv, *given), qkv,
        )  # fmt: skip
    fc1 = normal(61, 37, seed=1, scale=0.1), normal(61, seed=2)
    fc2 = normal(45, 61, seed=3, scale=0.1), normal(45, seed=4)
    check(device, dtype, compact_mlp, compact_mlp_ref, normal(70, 37), *fc1, *fc2, normal(70, 45, seed=5))
    for hidden in (61, 64):
        fc1 = normal(2 * hidden, 37, seed=1, scale=0.1), normal(2 * hidden, seed=2)
        fc2 = normal(45, hidden, seed=3, scale=0.1), normal(45, seed=4)
        swiglu = [functools.partial(f, activation="swiglu") for f in (compact_mlp, compact_mlp_ref)]
        check(device, dtype, *swiglu, normal(70, 37), *fc1, *fc2, normal(70, 45, seed=5))
    for own_tables, rotate_half in ((False, False), (True, True)):
        qkv, rope = normal(2, 37, 6 * 30 + 13), normal(*(3,) * own_tables, 36, 60, seed=1)
        arguments = (30,) * 3, 1, rotate_half
        check(
            device, dtype, lambda *t, given=arguments: rotate_heads(*t, *given),
            lambda *t, given=arguments: rotate_heads_ref(*t, *given), qkv, rope,
        )  # fmt: skip
        in_place = qkv.to(device, dtype), rope.to(device, dtype)
        expected = rotate_heads(*in_place, *arguments)
        assert torch.equal(rotate_heads_(*in_place, *arguments), expected)
        check_rotated_attention(device, dtype, 17, 0, 30, True, own_tables)
