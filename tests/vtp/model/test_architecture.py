"""vtp.model.architecture: a model that computes more than its modules say is refused by name, everywhere."""

import dataclasses
import types
import warnings

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image
from vtp.model.architecture import UnsupportedModelError, describe, on_meta


class Adapted(nn.Module):
    """As PEFT wraps a model that it has put adapters into."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def merge_and_unload(self):
        return self.base_model


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class OwnForward(VisionTransformer):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(VisionTransformer):
    """A subclass that computes what timm's class does."""


class MaskedAutoencoderViT(VisionTransformer):
    """As the code of MAE (arXiv 2111.06377) writes its classifier: mean over patches, then a norm."""

    def __init__(self, global_pool=False, **kwargs):
        super().__init__(**kwargs)
        self.global_pool = global_pool
        if global_pool:
            self.fc_norm = nn.LayerNorm(kwargs["embed_dim"], eps=1e-6)
            del self.norm

    def forward_features(self, x, **_):
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:].mean(1))

    def forward_head(self, x, pre_logits=False):
        return self.head(x)


def own_class(cls, **kwargs):
    torch.manual_seed(0)
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return cls(**arguments, in_chans=1, num_classes=10, **kwargs).double().eval()


def patched_forward(model):
    attn = model.blocks[1].attn
    plain = attn.forward
    attn.forward = types.MethodType(lambda self, x, **kwargs: 2 * plain(x, **kwargs), attn)


def patched_method(model):
    plain = model.forward_features
    model.forward_features = lambda x, **kwargs: 2 * plain(x, **kwargs)


def doubling_hook(model):
    model.blocks[1].mlp.register_forward_hook(lambda module, arguments, out: 2 * out)


def doubling_pre_hook(model):
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))


def outer_hook(model):
    model.register_forward_hook(lambda module, arguments, out: 2 * out)


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.blocks[0].mlp.fc1)


def scaled_attention(model):
    model.blocks[1].attn.scale = 1.0


CHANGES = {
    "forward": (patched_forward, r"blocks\.1\.attn\.forward was replaced"),
    "method": (patched_method, r"model\.forward_features was replaced"),
    "hook": (doubling_hook, r"blocks\.1\.mlp: it has a forward hook, .*doubling_hook.*handle\.remove\(\)"),
    "pre-hook": (doubling_pre_hook, r"blocks\.0\.attn\.qkv: it has a forward pre-hook"),
    "outer-hook": (outer_hook, r"model: it has a forward hook"),
    "parametrised": (
        lambda model: parametrize.register_parametrization(model.blocks[0].attn.proj, "weight", Doubled()),
        r"blocks\.0\.attn\.proj\.weight is parametrised by Doubled.*remove_parametrizations",
    ),
    "parametrised-head": (
        lambda model: parametrizations.weight_norm(model.head),
        r"head\.weight is parametrised by _WeightNorm",
    ),
    "weight-norm": (old_weight_norm, r"blocks\.0\.mlp\.fc1: .*WeightNorm"),
    "masked": (
        lambda model: prune.l1_unstructured(model.blocks[0].mlp.fc2, "weight", amount=0.5),
        r"blocks\.0\.mlp\.fc2: .*L1Unstructured.*torch\.nn\.utils\.prune\.remove",
    ),
    "scale": (scaled_attention, r"blocks\.1\.attn\.scale: 1\.0 is not supported here, expected 0\.5"),
    "heads": (
        lambda model: setattr(model.blocks[1].attn, "num_heads", 4),
        r"blocks\.1\.attn\.num_heads: 4 is not supported here, expected 3",
    ),
}
ENTRANCES = {
    "gates": lambda model, dense: vtp.insert_gates(model),
    "calibrate": lambda model, dense: vtp.calibrate(model, image(dense)),
    "compact": lambda model, dense: vtp.compact(model, vtp.make_plan(gated(dense), rate=0.3)),
    "save": lambda model, dense: vtp.save(model, "never-written.safetensors"),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_cut_would_forget_is_refused_by_name(change, entrance, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, (alter, message) = build(), CHANGES[change]
    alter(model)
    with pytest.raises(UnsupportedModelError, match=message):
        ENTRANCES[entrance](model, build())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["forward", "hook", "parametrised-head", "masked"])
def test_a_changed_gated_model_is_refused_too(change):
    model, (alter, message) = gated(build()), CHANGES[change]
    plan = vtp.make_plan(model, rate=0.3)
    alter(model)
    for call in (lambda: vtp.make_plan(model, rate=0.3), lambda: vtp.compact(model, plan)):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


@pytest.mark.parametrize("change", ["forward", "hook", "method"])
def test_a_changed_compact_model_is_neither_saved_nor_packed(change, tmp_path):
    model = gated(build())
    small = vtp.compact(model, vtp.make_plan(model, rate=0.3))
    alter, message = CHANGES[change]
    alter(small)
    with pytest.raises(UnsupportedModelError, match=message):
        vtp.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedModelError, match=message):
        vtp.optimize(small)


def test_a_method_bound_again_and_backward_hooks_change_nothing():
    model = build()
    model.forward = types.MethodType(type(model).forward, model)  # as Accelerate leaves it behind
    model.blocks[0].register_full_backward_hook(lambda *_: None)
    model.compile(backend="eager")
    assert vtp.describe(model) == TINY


def test_a_class_patched_as_a_whole_is_refused(monkeypatch):
    plain = timm.layers.Attention.forward

    def doubled(self, x, **kwargs):
        return 2 * plain(self, x, **kwargs)

    monkeypatch.setattr(timm.layers.Attention, "forward", doubled)
    with pytest.raises(UnsupportedModelError, match=r"timm\.layers\.attention\.Attention\.forward was repl"):
        vtp.insert_gates(build())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: own_class(Renamed), r"Renamed, a subclass .* overrides nothing.*load_state_dict"),
        (lambda: own_class(OwnForward), r"OwnForward, .* overrides forward.*load_state_dict"),
        (
            lambda: own_class(MaskedAutoencoderViT, global_pool=True),
            r"MaskedAutoencoderViT, .* overrides forward_features, forward_head.*global_pool='avg'",
        ),
    ],
    ids=["trivial", "own-forward", "mae"],
)
def test_a_subclass_is_told_how_to_convert(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vtp.insert_gates(model())


@pytest.mark.parametrize(
    ("cls", "kwargs"), [(Renamed, {}), (MaskedAutoencoderViT, {"global_pool": True})], ids=["trivial", "mae"]
)
def test_the_conversion_that_is_told_works(cls, kwargs):
    model = own_class(cls, **kwargs)
    pool = {"global_pool": "avg"} if kwargs else {}
    plain = own_class(VisionTransformer, **pool)
    plain.load_state_dict(model.state_dict())
    images = image(plain)
    torch.testing.assert_close(vtp.insert_gates(plain)(images), model(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.compile(model), r"OptimizedModule.*torch\.compile.*model\._orig_mod"),
        (lambda model: nn.DataParallel(model), r"DataParallel.*model\.module"),
        (lambda model: Adapted(model), r"Adapted.*model\.merge_and_unload\(\)"),
        (lambda model: nn.Sequential(model), r"Sequential, expected timm's VisionTransformer"),
    ],
    ids=["compiled", "data-parallel", "adapted", "sequential"],
)
def test_a_wrapper_is_told_what_to_pass_instead(wrap, message, tmp_path):
    model = gated(build())
    small = vtp.compact(model, vtp.make_plan(model, rate=0.3))
    for call in (
        lambda: vtp.insert_gates(wrap(build())),
        lambda: vtp.calibrate(wrap(build()), image(small)),
        lambda: vtp.make_plan(wrap(model), rate=0.3),
        lambda: vtp.compact(wrap(model), small.plan),
        lambda: vtp.count(wrap(small)),
        lambda: vtp.save(wrap(small), tmp_path / "small.safetensors"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            call()
    with pytest.raises(TypeError, match=message.replace("timm's VisionTransformer", "a compact model")):
        vtp.optimize(wrap(small))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_storage_is_the_same_but_for_its_values_which_others_have(family):
    built, other = FAMILIES[family].build("meta"), FAMILIES[family].build()
    assert repr(built) == repr(other)
    state = built.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
        n: (t.shape, t.dtype) for n, t in other.state_dict().items()
    }


def test_initial_values_are_made_again_after_an_error():
    with pytest.raises(RuntimeError, match="as it was"), on_meta():
        assert nn.Linear(3, 2).weight.is_meta
        raise RuntimeError("as it was")
    weight = nn.Linear(300, 200).weight
    assert not weight.is_meta and 0 < weight.abs().max() <= 300**-0.5


def test_a_model_is_compared_with_one_of_its_own_arguments_whatever_was_described_before():
    """Equal numbers of two types are printed otherwise, and what models print is compared."""
    for rate in (0.5, 1, 1.0, 1):
        model = build(dataclasses.replace(TINY, proj_drop_rate=rate))
        assert repr(describe(model).proj_drop_rate) == repr(rate)
    model.blocks[1].mlp.act = nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="Tanh"):
        describe(model)
