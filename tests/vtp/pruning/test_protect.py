"""Protected parts: never cut, whatever ranks the dimensions and whatever the budget is of."""

import dataclasses
import json
import re

import pytest
import torch

import vtp
from tests.support.models import TINY, build, gated, image
from tests.vtp.pruning.test_latency_table import made_up
from vtp.choices import SCOPES
from vtp.pruning.plan import PlanError, PruningPlan

DEEP = dataclasses.replace(TINY, depth=3)
PARTS = {
    "attn": lambda name: ".attn." in name,
    "mlp.fc2": lambda name: name.endswith("mlp.fc2"),
    "blocks.0": lambda name: name.startswith("blocks.0."),
    "blocks.1.attn": lambda name: name.startswith("blocks.1.attn."),
    "blocks.2.mlp.fc1": lambda name: name == "blocks.2.mlp.fc1",
}


@pytest.fixture(scope="module")
def model():
    return gated(build(DEEP))


@pytest.fixture(scope="module")
def calibrated(model):
    return vtp.calibrate(model, image(model, batch=16))


def budgets(model):
    dense = vtp.make_plan(model, rate=0.0).dense_cost
    table = made_up(DEEP)
    whole = table.predict(vtp.make_plan(model, rate=0.0))
    return {
        "rate": {"rate": 0.3},
        "macs": {"macs": 0.75 * dense.macs},
        "params": {"params": 0.75 * dense.params},
        "latency_ms": {"latency_ms": 0.8 * whole, "latency_table": table},
    }


def is_whole(plan, name):
    own_block = int(name.split(".")[1])
    keys = plan.keys[f"blocks.{own_block}.attn"]
    whole = len(plan.kept[name]) == plan.widths[name]
    return whole and (not name.endswith("attn.qkv") or set(keys) == {plan.head_dim})


@pytest.mark.parametrize("kind", ["rate", "macs", "params", "latency_ms"])
@pytest.mark.parametrize("scope", [*SCOPES, "optimal"])
@pytest.mark.parametrize("part", PARTS)
def test_a_protected_part_stays_whole_and_the_rest_meets_the_budget(model, calibrated, part, scope, kind):
    budget = budgets(model)[kind]
    settings = {"statistics": calibrated} if scope == "optimal" else {}
    plan = vtp.make_plan(model, scope=scope, protect=[part], **budget, **settings)
    for name in plan.widths:
        if PARTS[part](name):
            assert is_whole(plan, name), name
    if kind == "latency_ms":
        assert budget["latency_table"].predict(plan) <= budget["latency_ms"]
    elif kind == "rate":
        assert plan.rate >= 0.3 - 1e-9
    else:
        assert getattr(plan.cost, kind) <= budget[kind]
    assert plan.protect == (part,)
    assert plan.rate > 0


@pytest.mark.parametrize("scope", ["global", "optimal"])
def test_a_budget_that_protection_forbids_is_refused_with_the_least_possible(model, calibrated, scope):
    settings = {"statistics": calibrated} if scope == "optimal" else {}
    options = {"scope": scope, "protect": ["attn"], "min_keep": 0, **settings}
    with pytest.raises(PlanError, match="all is removed but min_keep and protected parts") as refused:
        vtp.make_plan(model, macs=1.0, **options)
    least = int(re.search(r"met: ([\d,]+) MACs remain", str(refused.value))[1].replace(",", ""))
    plan = vtp.make_plan(model, macs=least, **options)
    assert plan.cost.macs == least
    with pytest.raises(PlanError, match="all is removed but min_keep and protected parts"):
        vtp.make_plan(model, macs=least - 1, **options)


def test_narrow_keys_leave_protected_attention_alone(model):
    plan = vtp.make_plan(model, rate=0.1, key_width=2, protect=["blocks.1"])
    assert [plan.keys[f"blocks.{i}.attn"] for i in range(3)] == [(2, 2, 2), (4, 4, 4), (2, 2, 2)]


def test_without_a_floor_a_protected_site_keeps_what_it_works_through(model):
    plan = vtp.make_plan(model, rate=0.53, min_keep=0, protect=["attn.qkv", "mlp.fc1"])
    for i in range(3):
        assert len(plan.kept[f"blocks.{i}.attn.proj"]) >= 1
        assert len(plan.kept[f"blocks.{i}.mlp.fc2"]) >= 1


def test_one_part_may_be_given_as_a_word(model):
    assert vtp.make_plan(model, rate=0.2, protect="attn") == vtp.make_plan(model, rate=0.2, protect=["attn"])


@pytest.mark.parametrize("part", ["head", "blocks.7", "block", "", "attn.", 3, "blocks.0.attn.qkv.weight"])
def test_a_part_that_is_no_site_is_refused_by_name(model, part):
    with pytest.raises(PlanError, match=r"^protect: got .*expected a part of the name of a site"):
        vtp.make_plan(model, rate=0.2, protect=[part])


def test_what_is_no_list_of_parts_is_refused_by_name(model):
    with pytest.raises(PlanError, match=r"^protect: got 3, expected names of parts"):
        vtp.make_plan(model, rate=0.2, protect=3)


def test_pareto_protects_too(model, calibrated):
    for point in vtp.pareto(model, calibrated, points=4, protect="mlp"):
        assert all(is_whole(point.plan, name) for name in point.plan.widths if ".mlp." in name)


def test_a_cut_with_a_protected_part_is_exact_and_the_plan_remembers_it(model, tmp_path):
    plan = vtp.make_plan(model, rate=0.3, protect=["blocks.0"])
    small = vtp.compact(model, plan)
    assert vtp.count(small) == plan.cost
    assert torch.equal(small.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.folded_weight())
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert "not to be cut: blocks.0" in str(plan)
    fields = json.loads((tmp_path / "plan.json").read_text())
    del fields["protect"]  # as files had it before
    assert PruningPlan.from_dict(fields).protect == ()
