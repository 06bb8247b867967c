import collections
import contextlib
import copy
import dataclasses
import importlib
import pickle

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import PretrainedCfg

import vtp
from tests.support.engine_cases import NotedOperators, assert_gradients_close_to_float64
from tests.support.guarded_memory import replaced
from tests.support.models import FAMILIES, TINY, build, gated, image, randomize, relative_error, with_zeros
from vtp.model.architecture import Architecture
from vtp.pruning.compact import CompactAttention, ConstantBranch
from vtp.pruning.streams import plain_copy

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def random_plan(model, seed, *, removed=0.5, dead_sites=0.0):
    """A plan from random scores; `dead_sites` is the chance that a site, or a head, keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layer in vtp.sites(model).items():
        score = torch.rand(layer.in_features, generator=generator)
        parts = model.blocks[0].attn.num_heads if name.endswith("proj") else 1
        dead = torch.rand(parts, generator=generator) < dead_sites
        score[dead.repeat_interleave(layer.in_features // parts)] -= 2
        scores[name] = score
    # At least everything dead goes, so that a random draw of dead sites is always carried out.
    lost = sum((score < 0).sum().item() for score in scores.values())
    total = sum(map(len, scores.values()))
    rate = max(removed, min(lost / total, 1 - 1e-6))
    return vtp.make_plan(model, rate=rate, score=scores, min_keep=0)


@st.composite
def architectures(draw) -> Architecture:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    class_token = draw(st.booleans())
    pools = ["avg", "max", "avgmax", "map"] + (["token", "token"] if class_token else [])
    pool = draw(st.sampled_from(pools))
    final_norm = draw(st.booleans())
    return dataclasses.replace(
        TINY,
        img_size=(8, draw(st.sampled_from([8, 12]))),
        in_chans=draw(st.sampled_from([1, 3])),
        num_classes=draw(st.sampled_from([1, 5])),
        embed_dim=heads * head_dim,
        num_heads=heads,
        depth=draw(st.integers(1, 3)),
        mlp_hidden=draw(st.integers(1, 23)),
        class_token=class_token,
        global_pool=pool,
        final_norm=final_norm,
        fc_norm=final_norm and draw(st.booleans()),
        reg_tokens=draw(st.integers(0, 2)),
        qkv_bias=draw(st.booleans()),
        proj_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        init_values=draw(st.sampled_from([None, 0.1])),
        pos_embed=draw(st.sampled_from(["learn", "learn", "none"])) if class_token else "learn",
        no_embed_class=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        dynamic_img_size=False,
        act_layer=draw(st.sampled_from([None, "gelu", "quick_gelu", "relu", "silu", "gelu_tanh"])),
        scale_attn_norm=draw(st.sampled_from([False, False, True])),
        scale_mlp_norm=draw(st.sampled_from([False, False, True])),
    )


@pytest.mark.parametrize("examples", [20, pytest.param(60, marks=pytest.mark.thorough)])
def test_compact_is_exact_for_any_architecture_and_plan(examples):
    limits = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
    drawn = given(
        architectures(), st.integers(0, 10**6), st.floats(0, 0.99), st.sampled_from([0.0, 0.2, 0.7, 1.0])
    )
    settings(max_examples=examples, **limits)(drawn(check_any_cut))()


def check_any_cut(architecture, seed, removed, dead_sites):
    model = gated(build(architecture, seed=seed), seed=seed)
    plan = random_plan(model, seed, removed=removed, dead_sites=dead_sites)
    small, x = vtp.compact(model, plan), image(model)
    expected = with_zeros(model, plan)(x)
    # Head-sized widths of 1 normalise to 0 and leave nothing but bias: compare absolutely there.
    assert (small(x) - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)
    assert vtp.count(small) == plan.cost


def test_plan_that_keeps_nothing_leaves_constants():
    model = gated(build())
    plan = random_plan(model, 0, dead_sites=1.0)
    plan = dataclasses.replace(plan, kept=dict.fromkeys(plan.kept, ()))
    small, x = vtp.compact(model, plan), image(model)
    assert all(isinstance(b.attn, ConstantBranch) and isinstance(b.mlp, ConstantBranch) for b in small.blocks)
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12
    assert vtp.count(small) == plan.cost


def test_dead_head_goes_with_its_query_and_key():
    model = gated(build())
    scores = {name: torch.ones(layer.in_features) for name, layer in vtp.sites(model).items()}
    scores["blocks.0.attn.proj"][4:8] = 0  # the second of three heads of width 4
    plan = vtp.make_plan(model, rate=4 / sum(map(len, scores.values())), score=scores, min_keep=0)
    small, x = vtp.compact(model, plan), image(model)
    assert plan.value_widths(0) == (4, 0, 4)
    assert small.blocks[0].attn.qkv.out_features == 2 * 4 + 2 * 4 + 8
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12


def test_norms_before_proj_and_fc2_are_over_what_the_dense_model_has():
    """So heads, and hidden dimensions, stay where the layer behind the norm reads none of them."""
    model = gated(build(FAMILIES["rotary-inner-norms"]))
    kept = {name: tuple(range(layer.in_features)) for name, layer in vtp.sites(model).items()}
    plan = vtp.make_plan(model, rate=0.0)
    kept |= {"blocks.0.attn.proj": (1, 2, 9), "blocks.0.mlp.fc2": (0, 19), "blocks.1.attn.proj": ()}
    plan = dataclasses.replace(plan, kept=kept)
    assert plan.value_widths(0) == (2, 0, 1) and plan.key_widths(0) == (4, 4, 4)
    assert plan.key_widths(1) == (0, 0, 0)
    small, x = vtp.compact(model, plan), image(model)
    attn, mlp = small.blocks[0].attn, small.blocks[0].mlp
    assert attn.value_widths == (4, 4, 4) and attn.norm.index.tolist() == [1, 2, 9]
    assert (attn.qkv.out_features, attn.proj.in_features) == (36, 3)
    assert mlp.norm.index.tolist() == [0, 19]
    assert (mlp.fc1.out_features, mlp.fc2.in_features) == (40, 2)
    assert isinstance(small.blocks[1].attn, ConstantBranch)
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12
    assert vtp.count(small) == plan.cost


def test_keeping_everything_is_the_gated_model_bit_for_bit_in_float32():
    model = vtp.insert_gates(build(dtype=torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.0))
    assert torch.equal(small(image(model)), model(image(model)))


def test_float32_cut_is_as_close_to_float64_as_float32_itself():
    reference = gated(build())
    plan = random_plan(reference, 3)
    single = copy.deepcopy(reference).float()
    x = image(reference)
    expected = with_zeros(reference, plan)(x)
    own_error = (with_zeros(single, plan)(x.float()) - expected).abs().max()
    assert (vtp.compact(single, plan)(x.float()) - expected).abs().max() <= 2 * own_error + 1e-7


@pytest.mark.parametrize("mask", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("seed", [0, 5])
def test_attention_masks_act_as_in_timm(mask, seed):
    model = gated(build())
    plan = random_plan(model, seed)
    small, x = vtp.compact(model, plan), image(model)
    tokens = model.pos_embed.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril(1)
    arguments = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": allowed},
        "additive": {"attn_mask": torch.randn(tokens, tokens, dtype=torch.float64)},
    }[mask]
    expected = with_zeros(model, plan)(x, **arguments)
    assert relative_error(small(x, **arguments), expected) <= 1e-12
    assert relative_error(small(x), expected) > 1e-3


def test_unfused_attention_of_timm_gives_the_same_cut():
    model = build()
    for block in model.blocks:
        block.attn.fused_attn = False
    model = gated(model)
    plan = random_plan(model, 1)
    assert (
        relative_error(vtp.compact(model, plan)(image(model)), with_zeros(model, plan)(image(model))) <= 1e-12
    )


@pytest.fixture(scope="module")
def small():
    model = gated(build(dtype=torch.float32))
    return vtp.compact(model, random_plan(model, 7, dead_sites=0.2))


def test_every_parameter_gets_a_gradient(small):
    model = copy.deepcopy(small).train()
    model(image(model)).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike, which softmax ignores; it is part of qkv.bias.
    assert missing == []


def test_compact_shares_no_memory_with_the_gated_model():
    model = gated(build())
    plan = random_plan(model, 1)
    cut = vtp.compact(model, plan)
    x, expected = image(model), cut(image(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(cut(x), expected)


@pytest.mark.parametrize(
    "round_trip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same(small, round_trip):
    again = round_trip(small)
    assert torch.equal(again(image(small)), small(image(small)))
    assert again.plan == small.plan


def test_state_dict_goes_into_a_new_model_of_the_same_plan(small):
    again = vtp.CompactViT(small.plan).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(image(small)), small(image(small)))


def test_compiles_without_graph_breaks(small):
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image(small)), small(image(small)))


def test_exports(small):
    x = image(small)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    larger = image(small, batch=5)
    torch.testing.assert_close(program.module()(larger), small(larger))


def test_timm_interface_works(small):
    model, x = copy.deepcopy(small), image(small)
    features = model.forward_features(x)
    assert features.shape == (2, 5, 12)
    torch.testing.assert_close(model.forward_head(features), small(x))
    final, intermediates = model.forward_intermediates(x, indices=2)
    torch.testing.assert_close(final, features)
    assert [y.shape for y in intermediates] == [(2, 12, 2, 2)] * 2
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model.train()(x), small(x))
    model.eval().reset_classifier(7)
    assert model(x).shape == (2, 7)


def test_distilled_model_returns_both_heads_in_distilled_training():
    model = build(dataclasses.replace(TINY, distilled=True))
    model.set_distilled_training(True)
    cut = vtp.compact(gated(model), random_plan(gated(model), 3)).train()
    assert isinstance(cut, vtp.CompactViT)
    assert [out.shape for out in cut(image(model))] == [(2, 10), (2, 10)]


def test_other_image_size_with_dynamic_img_size():
    model = gated(build(dataclasses.replace(TINY, dynamic_img_size=True)))
    plan = random_plan(model, 2)
    x = torch.randn(1, 1, 16, 12, dtype=torch.float64)
    assert relative_error(vtp.compact(model, plan)(x), with_zeros(model, plan)(x)) <= 1e-12


def test_training_settings_of_the_dense_model_carry_over():
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "pos_drop_rate": 0.4}
    model = gated(build(dataclasses.replace(TINY, **rates))).train()
    cut = vtp.compact(model, random_plan(model, 0))
    assert cut.training
    assert cut.blocks[1].attn.attn_drop.p == 0.2
    assert cut.blocks[1].attn.proj_drop.p == cut.blocks[1].mlp.drop1.p == 0.1
    assert cut.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)  # timm spaces the rates in float32
    assert cut.pos_drop.p == 0.4


def test_plan_of_another_model_is_refused():
    plan = random_plan(gated(build()), 0)
    other = gated(build(dataclasses.replace(TINY, depth=3)))
    with pytest.raises(vtp.PlanError, match="2 blocks of width 12, got a model with 3 blocks"):
        vtp.compact(other, plan)


def test_empty_batch_gives_empty_logits():
    model = gated(build())
    for plan in (vtp.make_plan(model, rate=0.0), random_plan(model, 0)):
        assert vtp.compact(model, plan)(image(model, batch=0)).shape == (0, 10)


# -- On a GPU the modules run on ops, whose plain PyTorch sides stand for the kernels here ------------------


@contextlib.contextmanager
def as_on_a_gpu():
    """Modules take the ops; operators are noted."""
    module = importlib.import_module("vtp.pruning.compact")
    with replaced([(module, "_on_kernels", lambda x: True)]), NotedOperators() as noted:
        yield noted.names


def calls_of_ops(names):
    """How often each op of the namespace vtp was called."""
    return collections.Counter(name.removeprefix("vtp::") for name in names if name.startswith("vtp::"))


def output_and_gradients(model, x, **arguments):
    """Logits, and the gradient of every parameter."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    out = model(x, **arguments)
    out.float().square().mean().backward()
    return {"logits": out.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_equal_to_1e_12(got, expected):
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        # The gradient of a bias that shifts all scores alike is 0, and what is computed is rounding.
        allowed = 1e-12 * value.abs().max() + 1e-15 * largest
        assert (got[name] - value).abs().max() <= allowed, name


# Changes to the architecture, and the calls of a forward and backward pass of two blocks.
ON_OPS = {
    "plain": ({}, {"layer_norm_gather": 4, "compact_linear": 4, "ragged_attention": 2, "compact_mlp": 2}),
    "qk-norm": (
        {"qk_norm": True},
        {"layer_norm_gather": 4, "compact_linear": 4, "ragged_attention": 2, "compact_mlp": 2},
    ),
    "another-activation": (
        {"act_layer": "quick_gelu"},
        {"layer_norm_gather": 4, "compact_linear": 8, "ragged_attention": 2},
    ),
    "dropout": (
        {"attn_drop_rate": 0.2, "proj_drop_rate": 0.3},
        {"layer_norm_gather": 4, "compact_linear": 8},
    ),
    "layer-scale-and-drop-path": (
        {"init_values": 0.1, "drop_path_rate": 0.2, "qkv_bias": False, "proj_bias": False},
        {"layer_norm_gather": 4, "compact_linear": 4, "ragged_attention": 2, "compact_mlp": 2},
    ),
    "norms-before-proj-and-fc2": (
        {"scale_attn_norm": True, "scale_mlp_norm": True, "glu": True},
        {"layer_norm_gather": 8, "compact_linear": 8, "ragged_attention": 2},
    ),
}


@pytest.mark.parametrize("case", ON_OPS)
def test_training_on_the_ops_is_exact(case):
    changes, expected_calls = ON_OPS[case]
    model = gated(build(dataclasses.replace(TINY, **changes)))
    small, x = vtp.compact(model, random_plan(model, 4)).train(), image(model)
    expected = output_and_gradients(small, x)
    with as_on_a_gpu() as names:
        got = output_and_gradients(small, x)
    calls = calls_of_ops(names)
    assert {name: n for name, n in calls.items() if not name.endswith("_backward")} == expected_calls
    assert {name: calls[f"{name}_backward"] for name in expected_calls} == expected_calls
    assert_equal_to_1e_12(got, expected)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_training_on_the_ops_is_as_close_to_float64_as_on_pytorchs_operators(small, precision):
    model = copy.deepcopy(small).train()
    x = image(model)
    exact = output_and_gradients(model.double(), x.double())
    model.float()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with autocast:
        same_dtype = output_and_gradients(model, x)
    with as_on_a_gpu() as names, autocast:
        got = output_and_gradients(model, x)
    calls = calls_of_ops(names)
    assert calls["layer_norm_gather_backward"] == calls["layer_norm_gather"] > 0
    assert_gradients_close_to_float64(got, exact, same_dtype)


@pytest.mark.parametrize(
    "mask", [{"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)}]
)
def test_masked_attention_stays_on_pytorchs_operators(mask):
    model = gated(build())
    small, x = vtp.compact(model, random_plan(model, 4)), image(model)
    expected = output_and_gradients(small, x, **mask)
    with as_on_a_gpu() as names:
        got = output_and_gradients(small, x, **mask)
    assert "ragged_attention" not in calls_of_ops(names)
    assert_equal_to_1e_12(got, expected)


NARROW = dataclasses.replace(TINY, embed_dim=48)


def narrow_and_zeroed(key_widths=(16, 3, 7), value_widths=(5, 1, 9)):
    """An attention of heads with these key widths, and one of full keys that are 0 beyond them."""
    torch.manual_seed(0)
    wide = CompactAttention(NARROW, 11, (16,) * 3, value_widths).double()
    narrow = CompactAttention(NARROW, 11, key_widths, value_widths).double()
    randomize(wide)
    kept = torch.cat([16 * head + torch.arange(width) for head, width in enumerate(key_widths)])
    lost = torch.tensor(sorted(set(range(48)) - set(kept.tolist())), dtype=torch.int64)
    rows = torch.cat([kept, 48 + kept, torch.arange(96, wide.qkv.out_features)])
    with torch.no_grad():
        for parameter in (wide.qkv.weight, wide.qkv.bias):
            parameter[torch.cat([lost, 48 + lost])] = 0
    state = wide.state_dict()
    state |= {name: t[rows] for name, t in state.items() if name.startswith("qkv.")}
    narrow.load_state_dict(state)
    return narrow, wide


@pytest.mark.parametrize("key_widths", [(16, 3, 7), (1, 16, 15), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("value_widths", [(5, 1, 9), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_narrow_keys_are_those_of_the_dense_head_with_zeros(key_widths, value_widths, mask, monkeypatch):
    narrow, wide = narrow_and_zeroed(key_widths, value_widths)
    masks = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)},
        "additive": {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
    }
    x = torch.randn(2, 5, 11, dtype=torch.float64)
    expected = wide(x, **masks[mask])
    assert relative_error(narrow(x, **masks[mask]), expected) <= 1e-12
    with as_on_a_gpu() as names:
        got = narrow(x, **masks[mask])
    assert relative_error(got, expected) <= 1e-12
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert relative_error(narrow(x, **masks[mask]), expected) <= 1e-12
    assert calls_of_ops(names)["ragged_attention"] == (mask == "none")


def test_attention_dropout_of_narrow_keys_drops_weights():
    narrow, _ = narrow_and_zeroed()
    narrow.attn_drop.p = 0.5
    x = torch.randn(2, 5, 11, dtype=torch.float64)
    assert torch.equal(narrow.eval()(x), narrow(x))
    narrow.train()
    assert not torch.equal(narrow(x), narrow(x))


def test_equal_keys_take_the_fused_attention_of_pytorch(monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(args[0].shape) or attend(*args, **kwargs),
    )
    for keys in ((5, 5, 5), (5, 5, 6)):
        narrow_and_zeroed(keys, (4, 4, 4))[0](torch.randn(2, 7, 11, dtype=torch.float64))
    assert calls == [(2, 3, 7, 5)]


@pytest.mark.parametrize(
    ("changes", "key_widths", "says"),
    [
        ({}, (16, 16), "expected one for each of 3 heads"),
        ({"qk_norm": True}, (16, 16, 8), "expected 16 each: norms of queries and keys"),
    ],
    ids=["too-few", "with-norms"],
)
def test_key_widths_that_cannot_be_are_refused(changes, key_widths, says):
    with pytest.raises(ValueError, match=f"key_widths: got .*{says}"):
        CompactAttention(dataclasses.replace(NARROW, **changes), 11, key_widths, (5, 1, 9))


class Doubled(torch.nn.Linear):
    """Stands for an adapter: more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_module_in_the_place_of_a_linear_keeps_its_forward_on_a_gpu(name):
    model = gated(build())
    small, x = vtp.compact(model, random_plan(model, 4)), image(model)
    small.blocks[0].get_submodule(name).__class__ = Doubled
    with as_on_a_gpu():
        got = small(x)
    assert relative_error(got, small(x)) <= 1e-12


def test_on_a_cpu_and_in_an_exported_program_there_are_no_ops(small):
    with NotedOperators() as noted:
        output_and_gradients(small, image(small))
    assert not calls_of_ops(noted.names)
    program = torch.export.export(small, (image(small),))
    assert not [node for node in program.graph.nodes if "vtp" in str(node.target)]


def test_plan_of_other_weights_is_followed_and_both_are_named():
    model, other = build(), build(seed=1)
    plan = vtp.make_plan(vtp.insert_gates(model), rate=0.3)
    own = vtp.make_plan(vtp.insert_gates(other), rate=0.3).parent
    for trained_further in (vtp.insert_gates(other), other):
        with pytest.warns(UserWarning, match=rf"fingerprint {plan.parent[:16]}, the model's have") as said:
            vtp.compact(trained_further, plan)
        assert said[0].filename == __file__
    with pytest.warns(UserWarning, match=f"the model's have {own[:16]}"):
        vtp.compact(vtp.insert_gates(other), plan)


def test_plan_of_the_same_numbers_in_another_dtype_is_no_other_one(recwarn):
    half = build(dtype=torch.bfloat16)
    plans = {each: vtp.make_plan(vtp.insert_gates(copy.deepcopy(half).to(each)), rate=0.3) for each in DTYPES}
    assert len({plan.parent for plan in plans.values()}) == len(DTYPES)
    for plan in plans.values():
        for dtype in DTYPES:
            vtp.compact(copy.deepcopy(half).to(dtype), plan)
    assert not recwarn.list
    full = build(dtype=torch.float32)
    with pytest.warns(UserWarning, match="rounded by a cast"):
        vtp.compact(copy.deepcopy(full).bfloat16(), vtp.make_plan(vtp.insert_gates(full), rate=0.3))


def test_cut_model_does_not_say_that_the_dense_models_weights_are_its_own():
    dense = build(dtype=torch.float32)
    about = {"architecture": "deit_tiny_patch16_224", "tag": "fb_in1k", "mean": (0.5,), "std": (0.2,)}
    source = {"url": "https://host/dense.pth", "file": "dense.pth", "hf_hub_id": "timm/dense",
              "hf_hub_filename": "dense.bin", "source": "hf-hub", "state_dict": dense.state_dict(),
              "custom_load": True}  # fmt: skip
    dense.pretrained_cfg = dense.default_cfg = about | source
    small = vtp.compact(dense, vtp.make_plan(vtp.insert_gates(dense), rate=0.3))
    again = vtp.expand(small)
    assert small.pretrained_cfg == small.default_cfg == again.pretrained_cfg == again.default_cfg == about
    assert dense.pretrained_cfg == about | source
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.models.load_pretrained(small)
    dense.pretrained_cfg = PretrainedCfg(url=source["url"], architecture=about["architecture"])
    small = vtp.compact(dense, vtp.make_plan(vtp.insert_gates(dense), rate=0.3))
    assert small.pretrained_cfg["architecture"] == about["architecture"]
    assert "url" not in small.pretrained_cfg


def test_plan_of_the_same_model_with_gates_without_or_folded_is_no_other_one(recwarn):
    dense = build(dtype=torch.float32)
    statistics = vtp.calibrate(dense, image(dense, batch=12))
    learnt = gated(dense)
    folded = plain_copy(learnt)
    plans = {
        "gated": (vtp.make_plan(vtp.insert_gates(dense), rate=0.3), dense),
        "dense": (vtp.make_plan(dense, rate=0.3, statistics=statistics, score="obs"), dense),
        "folded": (vtp.make_plan(vtp.insert_gates(folded), rate=0.0), vtp.insert_gates(folded)),
        "learnt": (vtp.make_plan(learnt, rate=0.3), learnt),
        "of no weights": (dataclasses.replace(vtp.make_plan(learnt, rate=0.3), parent=""), dense),
    }
    for plan, model in plans.values():
        vtp.compact(model, plan)
    assert not recwarn.list
