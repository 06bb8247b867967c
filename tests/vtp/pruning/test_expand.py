"""vtp.expand: a compact model as a dense one with zeros, gated, trained, calibrated and cut again."""

import dataclasses
import functools

import pytest
import torch

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image, randomize, relative_error, with_zeros
from vtp.model.architecture import UnsupportedModelError
from vtp.pruning.removed import removed_before

EXACT = 1e-12


@functools.cache
def cut(family="plain", rate=0.5, seed=1):
    """A compact model that was trained since the cut: every number in it is another."""
    model = gated(build(FAMILIES[family]), seed=seed)
    small = vtp.compact(model, vtp.make_plan(model, rate=rate, min_keep=0))
    randomize(small)
    return small


def without(architecture, *dead):
    """A compact model of which these branches, "0.attn" say, are constants."""
    model = gated(build(architecture))
    plan = vtp.make_plan(model, rate=0.2)
    kept = {name: () if any(f"blocks.{d}." in name for d in dead) else k for name, k in plan.kept.items()}
    return vtp.compact(model, dataclasses.replace(plan, kept=kept))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=pytest.mark.thorough), 0.5, 0.85])
def test_the_dense_model_computes_what_the_compact_one_does(family, rate):
    small = cut(family, rate)
    if family == "no-biases":
        small = without(FAMILIES[family], "0.attn") if rate == 0.85 else small
    dense = vtp.expand(small)
    assert vtp.describe(dense) == FAMILIES[family]
    assert relative_error(dense(image(small)), small(image(small))) < EXACT
    assert not dense.training


@pytest.mark.parametrize("dead", [("0.attn",), ("1.mlp",), ("0.attn", "0.mlp", "1.attn", "1.mlp")])
@pytest.mark.parametrize("family", ["plain", "layer-scale", "qk-norm", "inner-norms"])
def test_constants_come_back_too(family, dead):
    small = without(FAMILIES[family], *dead)
    randomize(small)
    assert relative_error(vtp.expand(small)(image(small)), small(image(small))) < EXACT


def test_a_constant_without_an_output_bias_is_put_out_by_a_value():
    small = without(dataclasses.replace(TINY, proj_bias=False), "1.attn")
    randomize(small)
    assert relative_error(vtp.expand(small)(image(small)), small(image(small))) < EXACT


@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_a_constant_without_an_output_bias_is_put_out_by_a_norm(site):
    normed = {"scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False, "proj_bias": False}
    small = without(dataclasses.replace(TINY, **normed), f"1.{site}")
    randomize(small)
    assert relative_error(vtp.expand(small)(image(small)), small(image(small))) < EXACT


def test_a_constant_that_no_dense_model_has_is_refused():
    small = without(FAMILIES["no-biases"], "1.mlp")
    randomize(small)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mlp: it is a constant that was trained"):
        vtp.expand(small)


def test_memory_mode_dtype_and_configuration_are_its_own():
    small = cut().float().train()
    small.pretrained_cfg = {"mean": (0.5,)}
    dense = vtp.expand(small)
    assert dense.training
    assert dense.pretrained_cfg == small.pretrained_cfg
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    before = small.head.weight.clone()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(1)
    assert torch.equal(small.head.weight, before)
    cut.cache_clear()


@pytest.mark.parametrize("family", ["plain", "rotary-inner-norms"])
def test_what_an_earlier_cut_removed_is_found_and_no_more(family):
    small = cut(family)
    found = removed_before(vtp.expand(small))
    for name, width in small.plan.widths.items():
        gone = torch.tensor(sorted(set(range(width)) - set(small.plan.kept[name])), dtype=torch.int64)
        alive_branch = len(small.plan.kept[name]) > 0
        assert not alive_branch or found[name].nonzero()[0].tolist() == gone.tolist(), name
    whole = removed_before(build(FAMILIES[family]))
    assert not any(mask.any() for name, mask in whole.items() if name in small.plan.widths)


@pytest.mark.parametrize("settings", [{}, {"min_keep": 0}, {"per_mac": True}, {"round_to": 2}])
@pytest.mark.parametrize("scope", ["global", "per_site", "per_layer"])
@pytest.mark.parametrize("family", ["plain", "rotary-inner-norms"])
def test_a_second_cut_is_exact_never_wider_and_within_its_budget(family, scope, settings):
    small = cut(family)
    again = gated(vtp.expand(small), seed=3)
    budget = 0.8 * vtp.count(small).macs
    plan = vtp.make_plan(again, macs=budget, scope=scope, **settings)
    smaller = vtp.compact(again, plan)
    assert vtp.count(smaller) == plan.cost
    assert vtp.count(smaller).macs <= budget
    assert relative_error(smaller(image(small)), with_zeros(again, plan)(image(small))) < EXACT
    if "round_to" not in settings:
        assert all(set(plan.kept[name]) <= set(small.plan.kept[name]) for name in plan.kept)


@pytest.mark.parametrize("family", ["plain", "rotary-inner-norms"])
def test_a_budget_that_is_met_already_brings_back_the_compact_model(family):
    small = cut(family)
    again = vtp.insert_gates(vtp.expand(small))
    for plan in (vtp.make_plan(again, rate=0.0), vtp.make_plan(again, macs=vtp.count(small).macs)):
        same = vtp.compact(again, plan)
        assert vtp.count(same) == vtp.count(small)
        assert relative_error(same(image(small)), small(image(small))) < EXACT


def test_min_keep_brings_nothing_back():
    small = cut()
    again = vtp.insert_gates(vtp.expand(small))
    plan = vtp.make_plan(again, macs=vtp.count(small).macs, min_keep=0.9)
    assert vtp.count(vtp.compact(again, plan)) == vtp.count(small)


@pytest.mark.parametrize("family", ["plain", "rotary-inner-norms"])
def test_training_with_gates_revives_nothing(family):
    small = cut(family).float()
    cut.cache_clear()
    again = vtp.insert_gates(vtp.expand(small)).train()
    before = removed_before(again)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2, weight_decay=0.05)
    images, labels = image(small, batch=8).float(), torch.arange(8)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(again(images), labels) + 1e-3 * vtp.l1_penalty(again)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = removed_before(again)
    assert all((before[name] == after[name]).all() for name in before)
    plan = vtp.make_plan(again, rate=0.9, min_keep=0)
    assert all(set(plan.kept[name]) <= set(small.plan.kept[name]) for name in plan.kept)


@pytest.mark.parametrize(
    "family", ["plain", "qk-norm", pytest.param("layer-scale", marks=pytest.mark.thorough), "inner-norms"]
)
def test_calibrated_again_the_best_widths_are_within_those_that_are_left(family):
    small = cut(family, 0.3)
    dense, images = vtp.expand(small), image(small, batch=24)
    statistics = vtp.calibrate(dense, images)
    same = vtp.make_plan(dense, macs=vtp.count(small).macs, scope="optimal", statistics=statistics)
    assert same.predicted_change < 1e-9
    assert relative_error(vtp.compact(dense, same, images=images)(images), small(images)) < 1e-6
    plan = vtp.make_plan(dense, macs=0.8 * vtp.count(small).macs, scope="optimal", statistics=statistics)
    assert plan.cost.macs <= 0.8 * vtp.count(small).macs
    for i in range(2):
        ours, left = plan.block_widths(i), small.plan.block_widths(i)
        assert all(a <= b for a, b in zip(ours.values, left.values, strict=True))
        assert (ours.qkv <= left.qkv, ours.fc1 <= left.fc1, ours.fc2 <= left.fc2) == (True,) * 3
    smaller = vtp.compact(dense, plan, images=images)
    assert vtp.count(smaller) == plan.cost
    assert smaller(images).isfinite().all()


def test_narrow_queries_and_keys_are_cut_again_without_images():
    dense = build()
    images = image(dense, batch=24)
    plan = vtp.make_plan(gated(dense), rate=0.2, key_width=2)
    small = vtp.compact(gated(dense), plan, images=images)
    again = vtp.expand(small)
    assert relative_error(again(images), small(images)) < EXACT
    regated = vtp.insert_gates(again)
    narrow = vtp.make_plan(regated, macs=0.9 * plan.cost.macs)
    assert {key for i in range(2) for key in narrow.key_widths(i)} <= {0, 2}
    smaller = vtp.compact(regated, narrow)
    assert relative_error(smaller(images), with_zeros(regated, narrow)(images)) < EXACT


def test_other_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="expected a compact model"):
        vtp.expand(build())
    small = cut()
    with pytest.raises(UnsupportedModelError, match=r"cut already.*vtp\.expand\(model\)"):
        vtp.insert_gates(small)
    with pytest.raises(UnsupportedModelError, match=r"cut already.*vtp\.expand\(model\)"):
        vtp.calibrate(small, image(small))
