"""Compact models in the hands of tools written for timm's: found, hooked, traced; or they fail loudly."""

import copy

import pytest
import torch
from timm.layers import create_feature_extractor as timm_extractor
from timm.layers import get_graph_node_names
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention, Block, Mlp
from timm.utils import AttentionExtract
from torchvision.models.feature_extraction import create_feature_extractor

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image, relative_error
from vtp.pruning.compact import ConstantBranch, plain_operators

EXACT = 1e-12


def cut(family="plain", rate=0.3, **settings):
    model = gated(build(FAMILIES[family]))
    return vtp.compact(model, vtp.make_plan(model, rate=rate, **settings))


def equal_heads():
    """Half of each head's values, of which timm's attention could be made."""
    model = build()
    plan = vtp.make_plan(gated(model), rate=0.0)
    kept = {
        n: tuple(i for i in k if i % 4 < 2) if n.endswith("attn.proj") else k for n, k in plan.kept.items()
    }
    return vtp.compact(gated(model), vtp.PruningPlan.from_dict({**plan.to_dict(), "kept": kept}))


def narrow_keys():
    model = build()
    plan = vtp.make_plan(gated(model), rate=0.2)
    keys = {"blocks.0.attn": (2, 3, 4), "blocks.1.attn": (1, 1, 1)}
    plan = vtp.PruningPlan.from_dict({**plan.to_dict(), "keys": keys})
    return vtp.compact(gated(model), plan, images=image(model, batch=8))


MODELS = {
    "ragged": cut,
    "equal": equal_heads,
    "narrow-keys": narrow_keys,
    "qk-norm": lambda: cut("qk-norm"),
    "dead": lambda: cut(rate=0.85, min_keep=0),
    "distilled": lambda: cut("distilled"),
}


def reference_maps(small, images):
    """Attention of each block from its definition."""
    maps, x = [], small.norm_pre(small._pos_embed(small.patch_embed(images)))
    for block in small.blocks:
        attn = block.attn
        if not isinstance(attn, ConstantBranch):
            width = sum(attn.key_widths)
            qkv = attn.qkv(block.norm1(x))
            queries, keys = (qkv[..., i * width : (i + 1) * width].split(attn.key_widths, -1) for i in (0, 1))
            heads = [
                (attn.q_norm(q) @ attn.k_norm(k).mT * attn.head_dim**-0.5).softmax(-1)
                for q, k in zip(queries, keys, strict=True)
            ]
            maps.append(torch.stack(heads, 1))
        x = block(x)
    return maps


@pytest.mark.parametrize("kind", MODELS)
def test_attention_maps_come_from_a_hook_on_attn_drop(kind):
    small = MODELS[kind]()
    images, maps = image(small), []
    expected = small(images)
    for module in small.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda _, arguments, out: maps.append(out))
    assert relative_error(small(images), expected) < EXACT
    wanted = reference_maps(small, images)
    assert len(maps) >= len(wanted) > 0
    maps = maps[: len(wanted)]
    for got, want in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timms_own_attention_extractor_works(method):
    small = MODELS["equal"]()
    for block in small.blocks:
        block.attn.fused_attn = False
    found = AttentionExtract(copy.deepcopy(small), method=method)(image(small))
    maps = [m for m in found.values() if m.ndim == 4]
    assert len(maps) == 2
    for got, want in zip(maps, reference_maps(small, image(small)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_attention_is_fused_unless_it_is_asked_not_to_be():
    small, calls = MODELS["equal"](), []
    small.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: calls.append(1))
    small(image(small))
    assert not calls


def test_tools_find_blocks_attention_and_feed_forward_by_timms_classes():
    small = MODELS["dead"]()
    assert [m for m in small.modules() if isinstance(m, Block)] == list(small.blocks)
    alive = [b.attn for b in small.blocks if not isinstance(b.attn, ConstantBranch)]
    assert [m for m in small.modules() if isinstance(m, Attention)] == alive
    assert sum(isinstance(m, Mlp) for m in small.modules()) == sum(
        not isinstance(b.mlp, ConstantBranch) for b in small.blocks
    )


class MergingBlock(Block):
    """As ToMe's patch for timm has it: attention gives a metric, too."""

    def forward(self, x):
        out, metric = self.attn(self.norm1(x))
        self.info.append(metric.shape)
        x = x + self.drop_path1(self.ls1(out))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MergingAttention(Attention):
    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x), k.mean(1)


@pytest.mark.parametrize("kind", ["ragged", "equal", "narrow-keys", "dead"])
def test_a_patch_that_swaps_classes_fails_loudly_where_it_does_not_fit(kind):
    small = MODELS[kind]()
    for module in small.modules():
        if isinstance(module, Block):
            module.__class__, module.info = MergingBlock, []
        elif isinstance(module, Attention):
            module.__class__ = MergingAttention
    with pytest.raises((RuntimeError, ValueError)):
        small(image(small, batch=3))


def test_a_patch_that_swaps_classes_works_where_nothing_was_cut():
    model = build()
    small = vtp.compact(vtp.insert_gates(model), vtp.make_plan(vtp.insert_gates(model), rate=0.0))
    for module in small.modules():
        if isinstance(module, Block):
            module.__class__, module.info = MergingBlock, []
        elif isinstance(module, Attention):
            module.__class__ = MergingAttention
    assert relative_error(small(image(small)), model(image(small))) < EXACT
    assert [block.info for block in small.blocks] == [[(2, 5, 4)]] * 2


@pytest.mark.parametrize("extractor", [timm_extractor, create_feature_extractor], ids=["timm", "torchvision"])
@pytest.mark.parametrize("kind", MODELS)
def test_features_are_traced(kind, extractor):
    small = MODELS[kind]()
    wanted = {}
    handles = [
        block.register_forward_hook(lambda _, arguments, out, i=i: wanted.__setitem__(f"blocks.{i}", out))
        for i, block in enumerate(small.blocks)
    ]
    images = image(small)
    small(images)
    for handle in handles:
        handle.remove()
    nodes = [n for n in get_graph_node_names(small)[1] if n.startswith("blocks.")]
    last = {f"blocks.{i}": [n for n in nodes if n.startswith(f"blocks.{i}.")][-1] for i in range(2)}
    traced = extractor(small, {node: name for name, node in last.items()})
    found = traced(images)
    for name, out in wanted.items():
        assert relative_error(found[name], out) < EXACT, name
    other = image(small, batch=5)  # the batch is not a part of the graph
    assert traced(other)["blocks.1"].shape[0] == 5


def test_a_traced_graph_takes_masks():
    small = MODELS["ragged"]()
    graph = torch.fx.symbolic_trace(small)
    images = image(small)
    assert relative_error(graph(images), small(images)) < EXACT
    mask = torch.zeros(5, 5, dtype=images.dtype).masked_fill(torch.rand(5, 5) < 0.3, -1.0)
    assert relative_error(graph(images, mask), small(images, mask)) < EXACT
    assert relative_error(graph(images, None, True), small(images, is_causal=True)) < EXACT


def test_timms_feature_wrappers_take_a_compact_model():
    small = MODELS["ragged"]()
    images = image(small)
    final, maps = small.forward_intermediates(images)
    assert relative_error(final, small.forward_features(images)) < EXACT
    features = FeatureGetterNet(copy.deepcopy(small), out_indices=(0, 1))(images)
    for got, want in zip(features, maps, strict=True):
        assert relative_error(got, want) < EXACT


def test_the_gated_model_is_traced_too():
    model = gated(build(TINY))
    graph = torch.fx.symbolic_trace(model)
    with plain_operators():
        assert relative_error(graph(image(model)), model(image(model))) < EXACT
