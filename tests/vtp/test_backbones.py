"""Backbones without a head: what is inside of compact and packed models is what the gated model has."""

import copy
import dataclasses
import functools

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import vtp
from tests.support.engine_cases import compact_model, with_dead_parts
from tests.support.models import AXIAL, FAMILIES, MIXED, build, gated, image, relative_error, with_zeros
from tests.support.numerics import assert_close_to_float64
from vtp.runtime.export import export_pt2
from vtp.runtime.optimize import pack_for_ops
from vtp_kernels.library import cpp_unsupported_reason

EXACT, CLOSE = 1e-12, 1e-5  # float64, and what the C++ engine does in float32
needs_cpp = pytest.mark.skipif(cpp_unsupported_reason() is not None, reason="the C++ operators are not built")

DEEP = dataclasses.replace(FAMILIES["features"], depth=3)
HEADLESS = {
    "class-token": DEEP,
    "average": dataclasses.replace(DEEP, global_pool="avg"),
    "all-tokens": dataclasses.replace(DEEP, global_pool=""),
    "fc-norm": dataclasses.replace(DEEP, global_pool="avg", fc_norm=True),
    "registers": dataclasses.replace(DEEP, reg_tokens=2, init_values=0.1),
    "distilled": dataclasses.replace(DEEP, distilled=True),
    "any-size": dataclasses.replace(DEEP, dynamic_img_size=True),
    "rotary": dataclasses.replace(FAMILIES["rotary"], num_classes=0, depth=3),
    "rotary-mixed": dataclasses.replace(FAMILIES["rotary-mixed"], num_classes=0, depth=3),
    "inner-norms": dataclasses.replace(FAMILIES["rotary-inner-norms"], num_classes=0, depth=3),
}
# Arguments of timm's `forward_intermediates`.
ASKED = {
    "all": {},
    "last": {"indices": 1},
    "some, normed": {"indices": [0, -1], "norm": True},
    "sequences with prefix": {"indices": [1], "output_fmt": "NLC", "return_prefix_tokens": True},
    "early": {"indices": [0, 1], "stop_early": True, "intermediates_only": True},
    "dictionary": {"indices": 2, "output_dict": True, "return_prefix_tokens": True},
}


@functools.cache
def cut(kind: str) -> tuple[nn.Module, nn.Module]:
    """The gated model with zeros at the removed gates, and the compact one, in float64."""
    model = gated(build(HEADLESS[kind]))
    plan = vtp.make_plan(model, rate=0.3)
    return with_zeros(model, plan), vtp.compact(model, plan)


def tensors(nested) -> list[Tensor]:
    """What is in nested lists, tuples and dictionaries, in order."""
    if isinstance(nested, Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested
    return [tensor for value in values for tensor in tensors(value)]


def assert_same(got, expected, bound: float) -> None:
    assert type(got) is type(expected)
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a.double(), b.double()) < bound


def packings(small: nn.Module) -> list[tuple[nn.Module, float]]:
    """Packed models, and how far each may be off."""
    made = [(pack_for_ops(small, features=True), EXACT)]
    if cpp_unsupported_reason() is None:
        made.append((vtp.optimize(copy.deepcopy(small).float(), features=True), CLOSE))
    return made


@pytest.mark.parametrize("kind", HEADLESS)
def test_features_are_those_of_the_gated_model(kind):
    expected, small = cut(kind)
    images = image(small, batch=3)
    for model, bound in [(small, EXACT), *packings(small)]:
        x = images.to(next(iter(model.state_dict().values())).dtype)
        features = model.forward_features(x)
        assert_same(features, expected.forward_features(images), bound)
        assert_same(model.forward_head(features, pre_logits=True), expected(images), bound)
        assert_same(model(x), expected(images), bound)


INTERMEDIATES = [
    (kind, asked)
    for kind in ("class-token", "registers", "distilled", "rotary", "rotary-mixed")
    for asked in ASKED
    if asked != "dictionary" or not kind.startswith("rotary")  # which timm's Eva does not give
]


@pytest.mark.parametrize(("kind", "asked"), INTERMEDIATES)
def test_intermediates_are_those_of_the_gated_model(kind, asked):
    expected, small = cut(kind)
    images = image(small, batch=3)
    want = expected.forward_intermediates(images, **ASKED[asked])
    for model, bound in [(small, EXACT), *packings(small)]:
        x = images.to(next(iter(model.state_dict().values())).dtype)
        assert_same(model.forward_intermediates(x, **ASKED[asked]), want, bound)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["class-token", "registers", "rotary"])
def test_timms_feature_getter_takes_compact_and_packed_models(kind, norm):
    expected, small = cut(kind)
    images = image(small, batch=3)
    want = expected.forward_intermediates(images, indices=[0, 1], norm=norm, intermediates_only=True)
    for model, bound in [(copy.deepcopy(small), EXACT), *packings(small)]:
        x = images.to(next(iter(model.state_dict().values())).dtype)
        net = FeatureGetterNet(model, out_indices=(0, -2), norm=norm)  # drops the last block
        assert net.feature_info.channels() == [12, 12]
        assert net.feature_info.reduction() == [4, 4]
        assert_same(net(x), want, bound)
        assert len(getattr(model, "vit", model).blocks) == 2


def test_features_only_opens_a_folder_and_what_it_gives_can_be_packed(tmp_path):
    expected, small = cut("class-token")
    small, images = copy.deepcopy(small).float(), image(small, batch=3)
    vtp.save_pretrained(small, tmp_path)
    folder = f"local-dir:{tmp_path}"
    net = timm.create_model(folder, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    want = expected.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    assert_same(net(images.float()), want, CLOSE)
    with pytest.raises(
        TypeError, match=r"got FeatureGetterNet, expected a compact model; .* pass that, model\.model"
    ):
        vtp.optimize(net)
    fast = vtp.optimize(net.model, features=True)
    if cpp_unsupported_reason() is None:
        assert fast.engine.startswith("C++")
    assert_same(
        fast.forward_intermediates(images.float(), indices=[0, 1], intermediates_only=True), want, CLOSE
    )
    with pytest.raises(
        vtp.UnsupportedModelError, match=r"blocks\.2.* is missing.*a file could not bring back"
    ):
        vtp.save(net.model, tmp_path / "cut-off.safetensors")


DEAD = ("0.attn.qkv", "1.attn.proj", "1.mlp.fc1")


@pytest.mark.parametrize(
    "changes", [{}, {"eva": AXIAL}, {"eva": MIXED}], ids=["plain", "rotary", "rotary-mixed"]
)
def test_blocks_put_out_what_they_should_where_branches_are_constants(changes):
    small = with_dead_parts(DEAD, torch.float64, depth=3, **changes)
    images = image(small)
    want = small.forward_intermediates(images)
    for fast, bound in packings(small):
        assert_same(fast.forward_intermediates(images.to(fast.dtype)), want, bound)


DEAD_ATTENTION = ("0.attn.qkv", "1.attn.qkv", "2.attn.qkv")


@pytest.mark.parametrize(
    ("dead", "reason"),
    [((), "its blocks write what they read"), (DEAD_ATTENTION, "cut to constants may lie in earlier blocks")],
    ids=["in-place", "constants"],
)
def test_what_is_packed_without_features_says_why_it_shows_none_between_its_blocks(dead, reason):
    small = with_dead_parts(dead, torch.float64, depth=3)
    images, fast = image(small), pack_for_ops(small)
    assert relative_error(fast.forward_features(images), small.forward_features(images)) < EXACT
    for call in (
        lambda: fast.forward_intermediates(images),
        lambda: fast.prune_intermediate_layers([0]),
        lambda: FeatureGetterNet(fast, out_indices=(0,)),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*; .*features=True"):
            call()


@needs_cpp
@pytest.mark.parametrize("name", ["deit-tiny", "dinov2-registers"])
def test_the_cpp_engine_is_as_exact_between_blocks_as_pytorch_in_bfloat16(name):
    small = compact_model(name)
    images = image(small, batch=3)
    exact = copy.deepcopy(small).double().forward_intermediates(images.double(), intermediates_only=True)
    same = copy.deepcopy(small).bfloat16().forward_intermediates(images.bfloat16(), intermediates_only=True)
    got = vtp.optimize(small, torch.bfloat16, features=True).forward_intermediates(
        images, intermediates_only=True
    )
    for i, (a, b, c) in enumerate(zip(got, exact, same, strict=True)):
        assert_close_to_float64(a, b, c, f"block {i}")


@needs_cpp
def test_the_weights_lie_in_memory_once_however_many_calls_there_are():
    fast = vtp.optimize(compact_model("deit-tiny"), torch.bfloat16, features=True)
    for blocks in (fast.vit.blocks[0], copy.deepcopy(fast).vit.blocks[0]):
        assert len(blocks.single) == 4
        assert {block.weights.data_ptr() for block in blocks.single} == {blocks.weights.data_ptr()}


# Each with a trait of another kind alone, or of two of them.
ALIKE = ("average", "any-size", "rotary")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.thorough if kind in ALIKE else ()) for kind in HEADLESS]
)
def test_a_backbone_is_calibrated_cut_counted_saved_and_exported(kind, tmp_path):
    model = build(HEADLESS[kind], torch.float32)
    images = image(model, batch=16)
    statistics = vtp.calibrate(model, images)
    assert statistics.change == "relative error"
    plan = vtp.make_plan(model, macs=0.6 * vtp.count(model).macs, statistics=statistics, scope="optimal")
    small = vtp.compact(model, plan, images=images)
    assert vtp.count(small) == plan.cost
    vtp.save(small, tmp_path / "small.safetensors")
    assert torch.equal(vtp.load(tmp_path / "small.safetensors")(images), small(images))
    vtp.save_pretrained(small, tmp_path / "folder")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert again.num_classes == 0
    assert torch.equal(again(images), small(images))
    expanded = vtp.expand(small)
    assert relative_error(expanded(images), small(images)) < CLOSE
    if kind == "all-tokens":
        export_pt2(small, tmp_path / "small.pt2")


@pytest.mark.parametrize("kind", ["class-token", "all-tokens"])
def test_a_change_is_measured_on_what_the_backbone_puts_out(kind):
    """The class token, or with global_pool="" every token, as detection and segmentation want it."""
    model = build(HEADLESS[kind])
    images = image(model, batch=8)  # all of which changes are measured on
    width, change = vtp.calibrate(model, images).tensors["blocks.2.mlp.fc2.changes"][0].tolist()
    assert width == 0
    outputs = []
    handle = model.blocks[2].mlp.register_forward_hook(lambda *call: outputs.append(call[2]))
    dense = model(images)
    handle.remove()
    constant = outputs[0].mean((0, 1))
    handle = model.blocks[2].mlp.register_forward_hook(lambda *call: constant.expand_as(call[2]))
    cut_alone = model(images)
    handle.remove()
    assert dense.ndim == (3 if kind == "all-tokens" else 2)
    error = (cut_alone - dense).square().mean() / (dense - dense.mean(0)).square().mean()
    assert change == pytest.approx(error.item(), rel=1e-9)
