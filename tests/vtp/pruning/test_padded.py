"""Training on padded widths: outputs, gradients, parameters as without, products of multiples of 8 alone."""

import contextlib
import copy
import dataclasses
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import vtp
from tests.support.engine_cases import (
    NotedOperators,
    with_dead_parts,
    with_narrow_keys,
)
from tests.support.guarded_memory import replaced
from tests.support.models import AXIAL, MIXED, TINY, build, gated, image, relative_error
from tests.support.numerics import FACTOR
from vtp.pruning import padded
from vtp.pruning.compact import CompactAttention, CompactMlp
from vtp.pruning.padded import Sections, filled_up
from vtp_kernels import launching

# Inputs of qkv, of fc1 and of fc2, and values of each head, block by block.
WIDTHS = (
    (1, 15, 115, (1, 15, 16)),
    (37, 17, 61, (3, 0, 7)),
    (48, 1, 1, (8, 8, 8)),
)
WIDE = dataclasses.replace(TINY, embed_dim=48, depth=len(WIDTHS), mlp_hidden=120, num_classes=8)
KINDS = {
    "plain": {},
    "no-biases-and-layer-scale": {"qkv_bias": False, "proj_bias": False, "init_values": 0.1},
    "another-activation": {"act_layer": "quick_gelu"},
    "swiglu": {"glu": True},
    "qk-norm": {"qk_norm": True},
    "norms-before-proj-and-fc2": {"scale_attn_norm": True, "scale_mlp_norm": True, "mlp_hidden": 123},
    "rotary": {"eva": AXIAL, "pos_embed": "none", "reg_tokens": 2, "glu": True},
    "rotary-with-own-angles": {"eva": MIXED},
    "drop-path-and-attention-dropout": {"drop_path_rate": 0.3, "attn_drop_rate": 0.2},
}


@functools.cache
def _model(changes):
    """A model of odd widths, one head dead, its keys narrower than its values were where that can be."""
    whole = gated(build(dataclasses.replace(WIDE, **dict(changes))))
    plan = vtp.make_plan(whole, rate=0.0)
    kept = dict(plan.kept)
    for i, (qkv, fc1, fc2, heads) in enumerate(WIDTHS):
        for site, width in (("attn.qkv", qkv), ("mlp.fc1", fc1), ("mlp.fc2", fc2)):
            first = len(kept[f"blocks.{i}.{site}"]) - width
            kept[f"blocks.{i}.{site}"] = kept[f"blocks.{i}.{site}"][first:]
        values = [16 * head + j for head, width in enumerate(heads) for j in range(width)]
        kept[f"blocks.{i}.attn.proj"] = tuple(values)
    small = vtp.compact(whole, dataclasses.replace(plan, kept=kept))
    whole_keys = plan.architecture.whole_keys or plan.architecture.scale_attn_norm
    return small if whole_keys else with_narrow_keys(small)


def model(**changes):
    return copy.deepcopy(_model(frozenset(changes.items())))


@pytest.fixture(autouse=True)
def one_thread():
    """Toys gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def on_padded_widths(heads="padded", training="padded"):
    """As on a GPU, and padded in any dtype, or by the rule alone where `training` is None."""
    module = importlib.import_module("vtp.pruning.compact")
    with (
        replaced([(module, "_on_kernels", lambda x: True)]),
        launching.forced_path("compact_training", *filter(None, [training])),
        launching.forced_path("packed_attention", heads),
    ):
        yield


def step(small, x, **arguments):
    """Logits, and the gradient of every parameter, of a training step that begins with the same seed."""
    small = copy.deepcopy(small).train()
    torch.manual_seed(0)
    out = small(x, **arguments)
    out.float().square().mean().backward()
    return {"logits": out.detach()} | {name: p.grad for name, p in small.named_parameters()}


def assert_equal_to_1e_12(got, expected):
    largest = max(value.abs().max() for value in expected.values())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # The gradient of a bias that shifts all scores alike is 0, and what is computed is rounding.
        allowed = 1e-12 * value.abs().max() + 1e-15 * largest
        assert (got[name] - value).abs().max() <= allowed, name


def fused(names):
    """How often PyTorch's fused attention was called."""
    return sum("scaled_dot_product" in name and "backward" not in name for name in names)


@pytest.mark.parametrize("heads", ["padded", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_narrow_widths(kind, heads):
    small = model(**KINDS[kind])
    x = image(small)
    expected = step(small, x)
    with on_padded_widths(heads), NotedOperators() as noted:
        got = step(small, x)
    assert_equal_to_1e_12(got, expected)
    assert not {"vtp::compact_linear", "vtp::compact_mlp"} & set(noted.names)
    dropout = "attn_drop_rate" in KINDS[kind]  # on a CPU PyTorch's attention then is several operators
    ragged = heads == "ragged" and not dropout
    assert noted.names.count("vtp::ragged_attention") == len(WIDTHS) * ragged
    assert fused(noted.names) == len(WIDTHS) * (not ragged and not dropout)


def relative_errors(exact, *others):
    """Of all gradients together, each scaled to like size: through so many layers those of single numbers are
    luck. What finds a wrong one is equality to 1e-12."""
    scale = {name: value.double().square().mean().sqrt().clamp(min=1e-30) for name, value in exact.items()}
    pooled = [
        torch.cat([(t[name].double() / scale[name]).flatten() for name in exact]) for t in (exact, *others)
    ]
    return [float((other - pooled[0]).norm() / pooled[0].norm()) for other in pooled[1:]]


@pytest.mark.parametrize("kind", ["plain", "swiglu", "norms-before-proj-and-fc2"])
def test_in_bfloat16_it_is_as_close_to_float64_as_pytorchs_operators_are(kind):
    small = model(**KINDS[kind])
    x = image(small, 8)
    exact = step(small, x)
    small.float()
    with torch.autocast("cpu", torch.bfloat16):
        same_dtype = step(small, x.float())
        with on_padded_widths():
            got = step(small, x.float())
    error, torchs = relative_errors(exact, got, same_dtype)
    assert 0 < error <= FACTOR * torchs


def test_without_autocast_the_dtype_is_that_of_the_parameters():
    small = model().bfloat16()
    x = image(small)
    exact, same_dtype = step(copy.deepcopy(small).double(), x.double()), step(small, x)
    with on_padded_widths(training=None), NotedOperators() as noted:
        got = step(small, x)
    assert fused(noted.names) == len(WIDTHS)
    assert {value.dtype for value in got.values()} == {torch.bfloat16}
    error, torchs = relative_errors(exact, got, same_dtype)
    assert 0 < error <= FACTOR * torchs


@pytest.mark.parametrize(
    "mask",
    [
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)},
        {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)},
    ],
    ids=["causal", "boolean", "additive"],
)
def test_masks_go_to_the_fused_attention(mask):
    small = model()
    expected = step(small, image(small), **mask)
    with on_padded_widths("ragged"), NotedOperators() as noted:
        got = step(small, image(small), **mask)
    assert_equal_to_1e_12(got, expected)
    assert fused(noted.names) == len(WIDTHS)


def test_dead_heads_and_branches():
    dead = ("0.attn.qkv", "1.attn.proj.1", "1.mlp.fc1", "2.attn.proj.0", "2.attn.proj.2")
    small = with_dead_parts(dead, torch.float64, depth=3, init_values=0.1, embed_dim=24)
    expected = step(small, image(small))
    with on_padded_widths(), NotedOperators() as noted:
        got = step(small, image(small))
    assert_equal_to_1e_12(got, expected)
    assert fused(noted.names) == 2


# -- What a GPU is given ------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes the operands of every matrix product and fused attention whose widths or rows are not aligned."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.calls, self.wrong = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.NAMES[:4] or self.NAMES[4] in name:
            self.calls.append(name)
            results = out if isinstance(out, tuple) else (out,)
            for t in (*args, *results):
                if isinstance(t, torch.Tensor) and t.ndim >= 2 and not self.is_aligned(t, name):
                    self.wrong.append((name, tuple(t.shape), t.stride()))
        return out

    def is_aligned(self, t, name):
        """Rows, or columns of a transposed matrix, of multiples of 8 numbers that begin at such."""
        if self.NAMES[4] in name and t.dtype != torch.bfloat16:
            return True  # statistics
        inner = t.stride().index(1) if 1 in t.stride() else None
        widths = t.shape[-1:] if self.NAMES[4] in name else t.shape  # tokens are what they are
        others = [step for i, step in enumerate(t.stride()) if i != inner and t.shape[i] > 1]
        return inner is not None and not any(n % 8 for n in (*widths, *others, t.storage_offset()))


def step_of_blocks(small, tokens=5, batch=8):
    """Forward and backward pass of the blocks under autocast; their products, noted."""
    x = torch.randn(batch, tokens, small.embed_dim, requires_grad=True)
    rope = torch.randn(tokens - small.num_prefix_tokens, 2 * 16) if small.plan.architecture.rotary else None
    angles = {} if rope is None else {"rope": rope}
    with Products() as noted:
        with torch.autocast("cpu", torch.bfloat16):
            out = x
            for block in small.blocks:
                out = block(out, **angles)
        out.square().mean().backward()
    return noted


@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind not in ("rotary-with-own-angles", "drop-path-and-attention-dropout")],
)
def test_every_product_of_a_step_has_widths_and_rows_of_multiples_of_8(kind):
    small = model(**KINDS[kind]).float().train()
    with on_padded_widths():
        noted = step_of_blocks(small)
    assert not noted.wrong
    assert noted.calls.count("addmm") + noted.calls.count("mm") == 3 * 4 * len(WIDTHS)
    assert sum("backward" in name for name in noted.calls) == len(WIDTHS)


def test_what_is_looked_for_is_found_without_padding():
    noted = step_of_blocks(model().float().train())
    assert {name for name, *_ in noted.wrong} >= {"mm", "addmm", "bmm"}


def test_the_padding_of_activations_and_of_their_gradients_is_0():
    small = model().float().train()
    seen = []
    linear = F.linear

    def noting(x, weight, bias=None):
        out = linear(x, weight, bias)
        for t in (x, out):
            t.retain_grad()
        seen.append((x, weight, out))
        return out

    with on_padded_widths(), replaced([(F, "linear", noting)]), torch.autocast("cpu", torch.bfloat16):
        out = small.blocks(torch.randn(8, 5, 48))
    out.float().square().mean().backward()
    assert len(seen) == 4 * len(WIDTHS)
    zeros = 0
    for x, weight, out in seen:
        for t, dead in ((x, ~weight.any(0)), (out, ~weight.any(1))):
            assert not t[..., dead].any() and not t.grad[..., dead].any()
            zeros += int(dead.sum())
    assert zeros > 100


# -- Everything around it -----------------------------------------------------------------------------------


def test_parameters_files_optimizers_and_averages_are_as_without():
    small, x = model(), image(model())
    trained, averaged, optimizers = {}, {}, {}
    for path in ("narrow", "padded"):
        own = copy.deepcopy(small).train()
        optimizers[path] = torch.optim.AdamW(own.parameters(), lr=1e-3)
        average = AveragedModel(own)
        for _ in range(3):
            optimizers[path].zero_grad()
            with on_padded_widths() if path == "padded" else contextlib.nullcontext():
                own(x).square().mean().backward()
            optimizers[path].step()
            average.update_parameters(own)
        trained[path], averaged[path] = own.state_dict(), average.module.state_dict()
    for states in (trained, averaged):
        assert [(n, t.shape, t.dtype) for n, t in states["padded"].items()] == [
            (n, t.shape, t.dtype) for n, t in small.state_dict().items()
        ]
        for name, value in states["narrow"].items():
            # AdamW divides by the size of a gradient, so that one which is all rounding is not comparable.
            assert torch.allclose(states["padded"][name], value, rtol=1e-7, atol=3.1e-3), name
            if not name.endswith("qkv.bias"):
                assert torch.allclose(states["padded"][name], value, rtol=1e-7, atol=1e-9), name
    for parameter in optimizers["padded"].param_groups[0]["params"]:
        assert parameter.grad.shape == parameter.shape and parameter.grad.is_contiguous()


def test_checkpointed_gradients_are_the_same():
    small, x = model(**KINDS["drop-path-and-attention-dropout"]), image(model())
    with on_padded_widths():
        expected = step(small, x)
        small.set_grad_checkpointing(True)
        got = step(small, x)
    assert_equal_to_1e_12(got, expected)


@pytest.mark.parametrize(
    ("heads", "backend"),
    [
        ("padded", "aot_eager"),
        pytest.param("ragged", "aot_eager", marks=pytest.mark.thorough),
        pytest.param("padded", "inductor", marks=pytest.mark.thorough),
    ],
)
def test_it_compiles_without_graph_breaks(heads, backend):
    # PyTorch 2.11's inductor takes the statistics of attention in float64 for float32.
    dtype = torch.float32 if backend == "inductor" else torch.float64
    block, x = model().blocks[1].to(dtype).train(), torch.randn(2, 5, 48, dtype=dtype)
    expected = step(block, x)
    torch._dynamo.reset()
    with on_padded_widths(heads):
        out = torch.compile(block, fullgraph=True, backend=backend)(x)
        out.float().square().mean().backward()
    got = {"logits": out.detach()} | {name: p.grad for name, p in block.named_parameters()}
    if backend == "inductor":
        assert relative_errors(expected, got)[0] <= 1e-5
    else:
        assert_equal_to_1e_12(got, expected)


class WithoutWeight(torch.nn.Module):
    """Stands for a quantized layer."""

    def __init__(self, linear):
        super().__init__()
        self.call = linear

    def forward(self, x):
        return self.call(x)


def test_a_layer_without_a_weight_keeps_its_forward():
    small, plain = model(), model()
    small.blocks[0].attn.qkv = WithoutWeight(small.blocks[0].attn.qkv)
    with on_padded_widths():
        assert relative_error(small(image(small)), plain(image(plain))) <= 1e-12


class Doubled(torch.nn.Linear):
    """Stands for an adapter: more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_module_in_the_place_of_a_linear_keeps_its_forward(name):
    small = model()
    small.blocks[0].get_submodule(name).__class__ = Doubled
    expected = step(small, image(small))
    with on_padded_widths():
        got = step(small, image(small))
    assert_equal_to_1e_12(got, expected)


class Wrapped(torch.nn.Module):
    """Stands for what looks at the input of a branch, which has to be as wide as is kept."""

    def __init__(self, branch, width):
        super().__init__()
        self.branch, self.width = branch, width

    def forward(self, x, **arguments):
        assert x.shape[-1] == self.width
        return self.branch(x, **arguments)


def test_a_branch_in_another_module_is_given_what_is_kept():
    small, plain = model(), model()
    for block, (qkv, fc1, *_) in zip(small.blocks, WIDTHS, strict=True):
        block.attn, block.mlp = Wrapped(block.attn, qkv), Wrapped(block.mlp, fc1)
    expected = step(plain, image(plain))
    with on_padded_widths(), NotedOperators() as noted:
        got = step(small, image(small))
    assert_equal_to_1e_12({name.replace("branch.", ""): value for name, value in got.items()}, expected)
    assert fused(noted.names) == len(WIDTHS)


def test_subclasses_that_were_swapped_in_are_given_what_is_kept():
    small = model()

    class Noting(CompactMlp):
        def forward(self, x):
            assert x.shape[-1] == self.fc1.in_features
            return super().forward(x)

    small.blocks[0].mlp.__class__ = Noting
    expected = step(small, image(small))
    with on_padded_widths():
        got = step(small, image(small))
    assert_equal_to_1e_12(got, expected)


@pytest.mark.parametrize("training", ["padded", "narrow"])
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_hooks_on_a_layer_are_called(layer, training):
    small, calls = model(), []
    small.blocks[0].get_submodule(layer).register_forward_hook(lambda *_: calls.append(layer))
    with on_padded_widths(training=training):
        small(image(small))
        assert calls == [layer]
        small.blocks[0].get_submodule(layer).register_forward_hook(lambda *of: 2 * of[2])
        got = small(image(small))
    assert (got - small(image(small))).abs().max() <= 1e-12 * got.abs().max()


def test_a_call_in_inference_mode_does_not_spoil_later_steps(monkeypatch):
    monkeypatch.setattr(importlib.import_module("vtp.pruning.padded"), "_known_places", {})
    small = model()
    with on_padded_widths():
        with torch.inference_mode(), torch.enable_grad(), contextlib.suppress(RuntimeError):
            small(image(small))
        step(small, image(small))


def test_without_gradients_and_in_float32_nothing_is_padded():
    small, x = model().float(), image(model()).float()
    module = importlib.import_module("vtp.pruning.compact")
    with replaced([(module, "_on_kernels", lambda x: True)]), NotedOperators() as noted:
        step(small, x)
        assert noted.names.count("vtp::compact_mlp_backward") == len(WIDTHS)
        del noted.names[:]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            small(x)
        assert noted.names.count("vtp::compact_mlp") == len(WIDTHS)


def test_float64_is_left_alone_by_autocast_and_so_is_not_padded():
    small = model()
    expected = step(small, image(small))
    with on_padded_widths(training=None), torch.autocast("cpu", torch.bfloat16):
        assert small.blocks[0].attn.trains_padded(torch.zeros(1, 5, 48, dtype=torch.float64)) is False
    with on_padded_widths(), torch.autocast("cpu", torch.bfloat16):
        assert_equal_to_1e_12(step(small, image(small)), expected)


def test_where_the_stream_or_heads_do_not_fit_nothing_is_padded():
    whole = gated(build(TINY))  # 12 wide
    small = vtp.compact(whole, vtp.make_plan(whole, rate=0.4))
    normed = dataclasses.replace(TINY, embed_dim=24, num_heads=2, qk_norm=True)
    attention = CompactAttention(normed, 5, (12, 12), (3, 4))
    with on_padded_widths(), NotedOperators() as noted:
        assert relative_error(small(image(small)), small.eval()(image(small))) <= 1e-12
        assert "vtp::compact_linear" in noted.names
        assert not attention.trains_padded(torch.zeros(1, 5, 24))


@pytest.mark.parametrize(
    ("widths", "expected"), [((7, 5, 9), (7, 8, 9)), ((8,), (8,)), ((1, 1), (7, 1)), ((16, 3), (16, 8))]
)
def test_the_narrowest_head_makes_up_for_what_is_missing(widths, expected):
    assert filled_up(widths) == expected


def test_heads_wider_than_the_op_takes_go_to_pytorchs_attention():
    wide = dataclasses.replace(WIDE, embed_dim=528, num_heads=2)
    torch.manual_seed(0)
    attention = CompactAttention(wide, 9, (3, 5), (257, 1)).double()
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    expected = attention(x)
    with on_padded_widths("ragged"):
        assert relative_error(attention(x), expected) <= 1e-12


def test_places_that_are_only_pretended_are_not_kept():
    sections, cpu = Sections((3, 5), (8, 16)), torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(padded._places(sections, cpu), FakeTensor)
    assert padded._places(sections, cpu).tolist() == [0, 1, 2, 8, 9, 10, 11, 12]
    assert padded._places(sections, cpu) is padded._places(sections, cpu)
