"""Plans: what a rate, a budget, a scope and a floor mean, what is refused, and what a file of it holds."""

import copy
import dataclasses
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch

import vtp
from tests.support.models import TINY, build, gated
from vtp.model.widths import SITES
from vtp.pruning.scores import SCOPES
from vtp.zoo import fashion_deit_architecture

DEIT_TINY = dataclasses.replace(
    fashion_deit_architecture(), img_size=(224, 224), patch_size=(16, 16), in_chans=3, num_classes=1000,
    embed_dim=192, depth=12, num_heads=3, mlp_hidden=768,
)  # fmt: skip
ROOMY = {
    "fashion-deit": fashion_deit_architecture(),
    "deit-tiny": dataclasses.replace(DEIT_TINY, depth=6),
    "layer-scale-registers": dataclasses.replace(
        fashion_deit_architecture(), init_values=0.1, reg_tokens=2, qk_norm=True, num_heads=6
    ),
    "no-biases-distilled": dataclasses.replace(
        fashion_deit_architecture(), qkv_bias=False, proj_bias=False, distilled=True, num_heads=2
    ),
}


def prepared(architecture, seed=0):
    """A gated model with random gates and Taylor statistics; the weights do not matter to a plan."""
    torch.manual_seed(seed)
    model = gated(architecture.build(), seed=seed)
    for layer in vtp.sites(model).values():
        layer.taylor.copy_(torch.rand(layer.in_features).square() * 7)
        layer.taylor_steps.fill_(7)
    return model


def with_gates_one(model):
    model = copy.deepcopy(model)
    for layer in vtp.sites(model).values():
        layer.gate.data.fill_(1)
    return model


def scores_of(model):
    return {name: layer.gate.detach().abs().double().numpy() for name, layer in vtp.sites(model).items()}


def number_kept(plan):
    return sum(map(len, plan.kept.values()))


def budget_error(plan):
    """How far below the budget the plan stays, relative; negative if the budget is exceeded."""
    ((kind, value),) = plan.budget.items()
    return 1 - getattr(plan.cost, kind) / value


@pytest.fixture(scope="module")
def tiny():
    return prepared(TINY)


@pytest.fixture(scope="module")
def fashion():
    return prepared(ROOMY["fashion-deit"])


@pytest.fixture(scope="module", params=ROOMY)
def roomy(request):
    return prepared(ROOMY[request.param], seed=3)


@pytest.fixture(scope="module")
def plan(tiny):
    return vtp.make_plan(tiny, rate=0.4)


# ---------------------------------------------------------------------------------------------------- rate


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 1 / 3, 0.4, 0.5, 0.77, 0.9, 0.999])
@pytest.mark.parametrize("scope", SCOPES)
def test_rate_removes_exactly_its_share_of_all_gates(fashion, rate, scope):
    plan = vtp.make_plan(fashion, rate=rate, scope=scope, min_keep=0)
    total = sum(plan.widths.values())
    assert total - number_kept(plan) == math.ceil(round(rate * total, 6))
    assert rate - 1e-12 <= plan.rate < rate + 1 / total + 1e-12


def test_top_scores_of_the_whole_model_are_kept_and_the_threshold_is_the_largest_removed(fashion):
    plan, scores = vtp.make_plan(fashion, rate=0.4, min_keep=0), scores_of(fashion)
    kept = np.concatenate([scores[name][list(plan.kept[name])] for name in scores])
    removed = np.concatenate([np.delete(scores[name], plan.kept[name]) for name in scores])
    assert removed.max() < kept.min()
    assert plan.threshold == pytest.approx(removed.max(), rel=1e-5)


@pytest.mark.parametrize(
    ("scope", "family_of"), [("per_site", lambda n: n.split(".", 2)[2]), ("per_layer", str)]
)
def test_scope_removes_the_same_share_and_keeps_the_top_scores_of_each_family(fashion, scope, family_of):
    plan, scores = vtp.make_plan(fashion, rate=0.4, scope=scope, min_keep=0), scores_of(fashion)
    for family in map(family_of, scores):
        members = [name for name in scores if family_of(name) == family]
        kept = np.concatenate([scores[name][list(plan.kept[name])] for name in members])
        removed = np.concatenate([np.delete(scores[name], plan.kept[name]) for name in members])
        assert removed.max() < kept.min()
        assert abs(len(removed) - 0.4 * (len(kept) + len(removed))) <= 1
    assert plan.threshold is None


def test_everything_above_the_threshold_of_a_budget_is_kept(fashion):
    plan, scores = vtp.make_plan(fashion, macs=4e6, min_keep=0), scores_of(fashion)
    for name, values in scores.items():
        assert set(np.flatnonzero(values > plan.threshold * (1 + 1e-5))) <= set(plan.kept[name])


def test_sign_of_a_gate_does_not_matter(tiny):
    flipped = copy.deepcopy(tiny)
    for layer in vtp.sites(flipped).values():
        layer.gate.data.neg_()
    assert vtp.make_plan(flipped, rate=0.4).kept == vtp.make_plan(tiny, rate=0.4).kept


def test_higher_rate_removes_a_superset(fashion):
    plans = [vtp.make_plan(fashion, rate=rate) for rate in (0.1, 0.3, 0.5, 0.7)]
    for weaker, stronger in itertools.pairwise(plans):
        assert all(set(stronger.kept[name]) <= set(weaker.kept[name]) for name in stronger.kept)


def test_one_sparse_model_is_cut_at_any_rate_without_being_changed(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    random_state = torch.get_rng_state()
    first = vtp.make_plan(tiny, rate=0.6)
    vtp.make_plan(tiny, rate=0.2)
    assert vtp.make_plan(tiny, rate=0.6) == first
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_what_a_budget_gives_back_to_a_vector_is_its_best_group_never_a_small_one_that_fits(tiny, kind):
    scores = scores_of(tiny)
    dense = getattr(vtp.make_plan(tiny, rate=0.0).cost, kind)
    for share in np.linspace(0.5, 0.99, 50):
        plan = vtp.make_plan(tiny, **{kind: share * dense}, round_to=6, min_keep=0)  # of 20: 6, 6, 6 and 2
        for name in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
            for block in range(2):
                site = f"blocks.{block}.{name}"
                best_first = np.argsort(-scores[site])
                kept = plan.kept[site]
                assert set(kept) == set(best_first[: len(kept)].tolist()), (share, site)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_value_widths_have_every_head_also_those_that_are_gone(tiny, gone):
    plan = vtp.make_plan(tiny, rate=0.0)
    width = plan.head_dim
    kept = {"blocks.0.attn.proj": tuple(i for i in range(3 * width) if i // width != gone)}
    plan = dataclasses.replace(plan, kept={**plan.kept, **kept})
    assert plan.value_widths(0) == tuple(0 if head == gone else width for head in range(3))


def test_same_gates_in_another_model_object_give_the_same_plan(tiny):
    assert vtp.make_plan(copy.deepcopy(tiny), macs=12_000) == vtp.make_plan(tiny, macs=12_000)


def test_parent_changes_with_the_weights(tiny):
    other = copy.deepcopy(tiny)
    other.head.bias.data[0] += 1
    assert vtp.make_plan(other, rate=0.4).parent != vtp.make_plan(tiny, rate=0.4).parent


# ------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["gate", "taylor"])
def test_budget_is_met_within_half_a_percent_and_never_exceeded(roomy, kind, scope, score):
    dense = getattr(vtp.make_plan(roomy, rate=0).dense_cost, kind)
    for (per_mac, round_to), share in zip(
        itertools.product((False, True), (1, 8)), (0.8, 0.45, 0.3, 0.6), strict=True
    ):
        settings = {"scope": scope, "score": score, "per_mac": per_mac, "round_to": round_to}
        plan = vtp.make_plan(roomy, **{kind: share * dense}, **settings)
        assert 0 <= budget_error(plan) <= 0.005, settings


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("round_to", [16, 24])
def test_budget_is_used_up_where_one_group_is_more_than_half_a_percent(fashion, kind, scope, round_to):
    dense = getattr(vtp.make_plan(fashion, rate=0).dense_cost, kind)
    plan = vtp.make_plan(fashion, **{kind: 0.3 * dense}, scope=scope, round_to=round_to)
    left = 0.3 * dense - getattr(plan.cost, kind)
    assert left >= 0
    for name, width in plan.widths.items():
        for head_scores in _removed_by_head(plan, name):
            best = head_scores[: round_to if width > round_to else width]
            if best:
                wider = {**plan.kept, name: tuple(sorted(plan.kept[name] + tuple(best)))}
                extra = getattr(dataclasses.replace(plan, kept=wider).cost, kind) - getattr(plan.cost, kind)
                assert extra > left, f"{name} could have kept {len(best)} more"


def _removed_by_head(plan, name):
    """Removed indices of a gate vector, best first, apart for each head."""
    removed = sorted(
        set(range(plan.widths[name])) - set(plan.kept[name]), key=lambda i: -plan.scores[name][i]
    )
    if not name.endswith("attn.proj"):
        return [removed]
    heads = range(plan.architecture.num_heads)
    return [[i for i in removed if i // plan.head_dim == head] for head in heads]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "settings", [{}, {"round_to": 4}, {"scope": "per_layer", "min_keep": 0}, {"per_mac": True}]
)
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_predicted_cost_is_that_of_the_compact_model(tiny, kind, share, settings):
    dense = getattr(vtp.make_plan(tiny, rate=0).dense_cost, kind)
    least = getattr(vtp.make_plan(tiny, rate=0.999, min_keep=0).cost, kind)
    value = least + share * (dense - least)
    if settings.get("min_keep") != 0:
        value = max(value, 0.5 * dense)
    plan = vtp.make_plan(tiny, **{kind: value}, **settings)
    assert plan.cost == vtp.count(vtp.compact(tiny, plan))
    assert getattr(plan.cost, kind) <= value


def test_dense_cost_is_that_of_the_dense_model(roomy):
    dense = vtp.describe(roomy).build("meta", weight_init="skip")
    assert vtp.make_plan(roomy, rate=0.4).dense_cost == vtp.count(dense)


def test_budget_above_the_dense_cost_removes_nothing(tiny):
    plan = vtp.make_plan(tiny, macs=1e12)
    assert plan.rate == 0
    assert plan.cost == plan.dense_cost
    assert plan.threshold is None


def test_budget_below_the_least_possible_names_the_least_possible(tiny):
    with pytest.raises(vtp.PlanError, match=r"macs: 1 cannot be met: ([\d,]+) macs remain") as refusal:
        vtp.make_plan(tiny, macs=1)
    least = int(str(refusal.value).split("met: ")[1].split(" ")[0].replace(",", ""))
    assert vtp.make_plan(tiny, macs=least).cost.macs == least
    with pytest.raises(vtp.PlanError, match=f"{least:,} macs"):
        vtp.make_plan(tiny, macs=least - 1)


def test_per_mac_spends_a_budget_on_more_dimensions(fashion):
    plain = vtp.make_plan(fashion, macs=4e6, min_keep=0)
    by_cost = vtp.make_plan(fashion, macs=4e6, per_mac=True, min_keep=0)
    assert number_kept(by_cost) > number_kept(plain)


# ------------------------------------------------------------------------------------ rounding, floors, ties


@pytest.mark.parametrize(
    "budget", [{"rate": 0.4}, {"macs": 5e6}, {"params": 350_000}], ids=lambda b: next(iter(b))
)
@pytest.mark.parametrize("round_to", [4, 8, 16])
@pytest.mark.parametrize("scope", SCOPES)
def test_rounded_widths_are_multiples_and_whole_widths_may_stay(fashion, budget, round_to, scope):
    plan = vtp.make_plan(fashion, **budget, round_to=round_to, scope=scope, min_keep=0)
    for name, kept in plan.kept.items():
        if not name.endswith("proj"):
            assert len(kept) % round_to == 0 or len(kept) == plan.widths[name]
    for block in range(6):
        assert all(width % round_to == 0 for width in plan.value_widths(block))
    if "rate" in budget:
        assert 0 <= plan.rate - 0.4 <= round_to / sum(plan.widths.values())


def test_rounding_keeps_the_best_dimensions_of_each_vector(fashion):
    plan, scores = vtp.make_plan(fashion, rate=0.4, round_to=8), scores_of(fashion)
    for name, values in scores.items():
        heads = 3 if name.endswith("proj") else 1
        inside = np.isin(np.arange(len(values)), plan.kept[name]).reshape(heads, -1)
        for kept, score in zip(inside, values.reshape(heads, -1), strict=True):
            assert not kept.any() or kept.all() or score[kept].min() > score[~kept].max()


@pytest.mark.parametrize("round_to", [1000, 2**63])
def test_rounding_to_more_than_a_width_removes_all_of_it_or_nothing(fashion, round_to):
    plan = vtp.make_plan(fashion, rate=0.4, round_to=round_to, min_keep=0)
    assert all(len(kept) in (0, 96, 384) for name, kept in plan.kept.items() if not name.endswith("proj"))
    assert all(width in (0, 32) for block in range(6) for width in plan.value_widths(block))


@pytest.mark.parametrize("min_keep", [0.05, 0.3, 1, 7, 16])
@pytest.mark.parametrize("round_to", [1, 8])
def test_min_keep_protects_the_best_dimensions_of_each_vector(fashion, min_keep, round_to):
    scores = scores_of(fashion)
    floors = {n: min_keep if min_keep >= 1 else math.ceil(min_keep * len(v)) for n, v in scores.items()}
    with pytest.raises(vtp.PlanError, match="min_keep") as refusal:
        vtp.make_plan(fashion, rate=0.9999, min_keep=min_keep, round_to=round_to)
    remaining = int(str(refusal.value).split("met: ")[1].split(" ")[0].replace(",", ""))
    total = sum(map(len, scores.values()))
    plan = vtp.make_plan(fashion, rate=1 - remaining / total, min_keep=min_keep, round_to=round_to)
    assert number_kept(plan) == remaining
    for name, values in scores.items():
        best = np.argsort(-values)[: floors[name]]
        assert set(best) <= set(plan.kept[name])
    if round_to == 1:
        assert remaining == sum(floors.values())


def test_without_a_floor_everything_can_go(tiny):
    plan = vtp.make_plan(tiny, rate=0.9999, min_keep=0)
    assert number_kept(plan) == 0
    assert plan.cost == vtp.count(vtp.compact(tiny, plan))


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0.4}, {"rate": 0.8}, {"macs": 5e6}, {"params": 3e5}, {"rate": 0.4, "round_to": 8}],
    ids=str,
)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["all-one", "all-zero"])
def test_ties_are_spread_evenly_so_that_no_head_or_layer_dies(fashion, settings, scope, score):
    model, step = with_gates_one(fashion), settings.get("round_to", 1)
    if score == "all-zero":
        for layer in vtp.sites(model).values():
            layer.gate.data.zero_()
    plan = vtp.make_plan(model, **settings, scope=scope, min_keep=0)
    for name, width in plan.widths.items():
        parts = (
            plan.value_widths(int(name.split(".")[1])) if name.endswith("proj") else (len(plan.kept[name]),)
        )
        for part in parts:
            assert part > 0
            # Narrow heads can only lose whole dimensions, and the other vectors make up for it.
            assert abs(part - (1 - plan.rate) * width / len(parts)) <= step + 0.01 * width


def test_ties_between_gates_that_are_exactly_zero_are_spread_over_the_layers(fashion):
    model = with_gates_one(fashion)
    for layer in vtp.sites(model).values():
        layer.gate.data[::2] = 0
    plan = vtp.make_plan(model, rate=0.25, min_keep=0)
    assert {len(plan.kept[name]) / width for name, width in plan.widths.items()} == {0.75}
    assert plan.threshold == 0
    assert all(set(range(1, width, 2)) <= set(plan.kept[name]) for name, width in plan.widths.items())


# -------------------------------------------------------------------------------------------------- scores


def test_custom_scores_decide_what_is_kept(tiny):
    wanted = {name: set(range(1, width, 3)) for name, width in vtp.describe(tiny).site_widths().items()}
    scores = {
        name: torch.tensor([float(i in wanted[name]) for i in range(layer.in_features)])
        for name, layer in vtp.sites(tiny).items()
    }
    lost = sum(len(s) for s in scores.values()) - sum(map(len, wanted.values()))
    plan = vtp.make_plan(tiny, rate=lost / sum(map(len, scores.values())), score=scores, min_keep=0)
    assert {name: set(kept) for name, kept in plan.kept.items()} == wanted
    assert plan.score == "custom"
    as_lists = {name: score.tolist() for name, score in scores.items()}
    assert vtp.make_plan(tiny, rate=plan.rate, score=as_lists, min_keep=0).kept == plan.kept


def test_taylor_ranks_by_the_mean_square_over_steps(tiny):
    model = copy.deepcopy(tiny)
    steps = {name: 1 + i for i, name in enumerate(vtp.sites(model))}
    for name, layer in vtp.sites(model).items():
        layer.taylor_steps.fill_(steps[name])
    plan = vtp.make_plan(model, rate=0.4, score="taylor", min_keep=0)
    means = {name: (layer.taylor / steps[name]).numpy() for name, layer in vtp.sites(model).items()}
    kept = np.concatenate([means[name][list(plan.kept[name])] for name in means])
    removed = np.concatenate([np.delete(means[name], plan.kept[name]) for name in means])
    assert removed.max() <= kept.min()
    assert plan.score == "taylor"


def test_taylor_without_statistics_is_refused_by_site():
    model = gated(build(dtype=torch.float32))
    with pytest.raises(vtp.PlanError, match=r"'taylor' has no statistics at blocks\.0\.attn\.qkv"):
        vtp.make_plan(model, rate=0.4, score="taylor")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", ["gate", "taylor", "custom"])
def test_scores_that_are_not_finite_are_refused_by_site(tiny, value, score):
    model, name = copy.deepcopy(tiny), "blocks.1.mlp.fc1"
    layer = vtp.sites(model)[name]
    layer.gate.data[3] = layer.taylor[3] = value
    if score == "custom":
        score = {site: each.gate for site, each in vtp.sites(model).items()}
    with pytest.raises(vtp.PlanError, match=r"score\['blocks\.1\.mlp\.fc1'\]: contains NaN or infinity"):
        vtp.make_plan(model, rate=0.4, score=score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_of_any_dtype_are_ranked(dtype):
    model = gated(build(dtype=dtype))
    plan = vtp.make_plan(model, rate=0.4, min_keep=0)
    assert number_kept(plan) == math.floor(0.6 * sum(plan.widths.values()))


# -------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.4", "x", True, [0.4]], ids=str)
def test_rate_outside_its_range_is_refused(tiny, rate):
    with pytest.raises(vtp.PlanError, match=r"rate: got .* expected a share"):
        vtp.make_plan(tiny, rate=rate)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "10e9", True], ids=str)
def test_budget_that_is_no_number_is_refused(tiny, kind, value):
    with pytest.raises(vtp.PlanError, match=f"{kind}: got .* expected a positive number"):
        vtp.make_plan(tiny, **{kind: value})


@pytest.mark.parametrize("budgets", [{}, {"rate": 0.4, "macs": 1e4}, {"macs": 1e4, "params": 1e4}], ids=str)
def test_none_or_several_budgets_are_refused(tiny, budgets):
    with pytest.raises(vtp.PlanError, match="expected exactly one"):
        vtp.make_plan(tiny, **budgets)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scope", value) for value in ("layer", None, ["global"])),
        *(("score", value) for value in ("magnitude", 3)),
        *(("round_to", value) for value in (0, -8, 1.5, "8", None, True)),
        *(("min_keep", value) for value in (-1, -0.1, 1.5, math.nan, math.inf, "a", None, True)),
    ],
    ids=str,
)
def test_bad_argument_is_refused_by_name(tiny, name, value):
    with pytest.raises(vtp.PlanError, match=f"^{name}: got "):
        vtp.make_plan(tiny, rate=0.4, **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.mlp.fc1"), "no entry for site 'blocks.0.mlp.fc1'"),
        (lambda s: s.update({"blocks.0.mlp.fc1": torch.ones(11)}), r"got shape \(11,\), expected \(12,\)"),
        (lambda s: s.update({"blocks.0.mlp.fc1": torch.ones(1, 12)}), r"got shape \(1, 12\)"),
        (lambda s: s.update({"blocks.0.mlp.fc1": ["a"] * 12}), "expected numbers"),
        (lambda s: s.update({"blocks.0.mlp.fc1": None}), "expected|got shape"),
    ],
    ids=["missing", "short", "two-dimensional", "words", "none"],
)
def test_bad_custom_score_is_refused_by_site(tiny, change, message):
    scores = {name: layer.gate.detach() for name, layer in vtp.sites(tiny).items()}
    change(scores)
    with pytest.raises(vtp.PlanError, match=message):
        vtp.make_plan(tiny, rate=0.4, score=scores)


def test_model_without_gates_is_refused():
    with pytest.raises(vtp.PlanError, match=r"has no gates; call vtp.insert_gates"):
        vtp.make_plan(build(), rate=0.4)


def test_model_with_gates_at_some_sites_only_is_refused_by_site():
    model = build(dtype=torch.float32)
    model.blocks[1].mlp.fc1 = vtp.GatedLinear.from_linear(model.blocks[1].mlp.fc1)
    with pytest.raises(vtp.PlanError, match=r"no gates at \['blocks\.0\.attn\.proj'"):
        vtp.make_plan(model, rate=0.4)


# ------------------------------------------------------------------------------------- the plan as a value


def test_plan_cannot_be_changed(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threshold = 0.0
    for mapping in (plan.kept, plan.scores, plan.budget):
        with pytest.raises(TypeError):
            mapping[next(iter(mapping))] = ()
        with pytest.raises(TypeError):
            del mapping[next(iter(mapping))]
    with pytest.raises(TypeError):
        plan.kept["blocks.0.mlp.fc2"][0] = 7


def test_plan_does_not_follow_the_mapping_it_was_made_from(plan):
    kept = {name: list(indices) for name, indices in plan.kept.items()}
    own = dataclasses.replace(plan, kept=kept)
    kept["blocks.0.attn.qkv"].clear()
    kept.clear()
    assert own == plan
    assert hash(own) == hash(plan)


@pytest.mark.parametrize(
    "round_trip",
    [
        copy.copy,
        copy.deepcopy,
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: vtp.PruningPlan.from_dict(p.to_dict()),
    ],
    ids=["copy", "deepcopy", "pickle", "dict"],
)
def test_copies_are_equal_and_hash_alike(plan, round_trip):
    again = round_trip(plan)
    assert again == plan
    assert hash(again) == hash(plan)
    assert {plan: 1}[again] == 1
    assert again.cost == plan.cost


def test_different_plans_differ(tiny, plan):
    other = vtp.make_plan(tiny, rate=0.41)
    assert other != plan
    assert len({plan, other}) == 2


def test_hash_of_equal_plans_is_equal_whatever_the_order_of_their_scores(plan):
    other = dataclasses.replace(plan, scores=dict(reversed(list(plan.scores.items()))))
    assert other == plan
    assert hash(other) == hash(plan)


@pytest.mark.parametrize(
    "settings", [{"rate": 0.4}, {"macs": 12_000, "per_mac": True, "round_to": 2, "min_keep": 1}]
)
def test_json_file_brings_back_an_equal_plan(tiny, tmp_path, settings):
    plan = vtp.make_plan(tiny, **settings)
    plan.save(tmp_path / "plan.json")
    again = vtp.PruningPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert hash(again) == hash(plan)
    assert (again.cost, again.rate, str(again)) == (plan.cost, plan.rate, str(plan))
    assert torch.equal(
        vtp.compact(tiny, again).blocks[1].mlp.fc1.weight, vtp.compact(tiny, plan).blocks[1].mlp.fc1.weight
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_file_is_plain_json_without_nan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads((tmp_path / "plan.json").read_text(), parse_constant=refuse)
    assert data["plan_version"] == 2
    assert data["kept"]["blocks.0.attn.qkv"] == list(plan.kept["blocks.0.attn.qkv"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(plan, tmp_path, share):
    file = tmp_path / "plan.json"
    plan.save(file)
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    with pytest.raises(vtp.PlanError, match=r"plan\.json is not JSON, or it is cut off"):
        vtp.PruningPlan.load(file)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b"3", b"null", b'{"a": 1}', b"\xff\xfe\x00", b"[" * 100_000, b'{"plan_version": 1}'],
    ids=["object", "list", "number", "null", "other", "binary", "deep", "empty-plan"],
)
def test_foreign_file_is_refused(tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(vtp.PlanError, match=r"not a pruning plan|not JSON|missing"):
        vtp.PruningPlan.load(file)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(vtp.FileError, match=r"cannot read .*none\.json: No such file"):
        vtp.PruningPlan.load(tmp_path / "none.json")
    with pytest.raises(vtp.FileError, match=r"cannot read .*: Is a directory"):
        vtp.PruningPlan.load(tmp_path)


def test_newer_plan_is_refused_with_both_versions(plan):
    with pytest.raises(vtp.PlanError, match="version 3, expected 2; update vtp"):
        vtp.PruningPlan.from_dict({**plan.to_dict(), "plan_version": 3})


SITE = "blocks.0.mlp.fc1"


@pytest.mark.parametrize(
    "indices",
    [[0, 12], [-1, 3], [3, 2], [3, 3], [0.5, 1.5], ["0", "1"], [None], "ab", 7, None, [[0]], [10**30]],
    ids=str,
)
def test_tampered_indices_are_refused(plan, indices):
    data = json.loads(json.dumps(plan.to_dict()))
    data["kept"][SITE] = indices
    with pytest.raises(vtp.PlanError, match=r"ascending indices|wrong type"):
        vtp.PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["kept"].pop(SITE),
        lambda d: d["kept"].update(extra=[0]),
        lambda d: d.update(kept=dict(reversed(d["kept"].items()))),
        lambda d: d["scores"].update({SITE: [1.0]}),
        lambda d: d["scores"].update({SITE: ["a"] * 12}),
        lambda d: d.update(threshold="high"),
        lambda d: d.update(budget="0.4"),
        lambda d: d.update(budget={"rate": "much"}),
        lambda d: d.update(extra=1),
        lambda d: d.pop("parent"),
        lambda d: d.update(architecture=None),
        lambda d: d["architecture"].update(num_heads=0),
        lambda d: d["architecture"].update(num_heads=5),
        lambda d: d["architecture"].update(num_heads="3"),
        lambda d: d["architecture"].update(embed_dim=12.0),
        lambda d: d["architecture"].update(patch_size=[0, 0]),
        lambda d: d["architecture"].update(patch_size=4),
        lambda d: d["architecture"].update(depth=-1),
        lambda d: d["architecture"].update(depth=3),
        lambda d: d["architecture"].update(depth=10**12),
        lambda d: d["architecture"].update(global_pool="best"),
        lambda d: d["architecture"].update(reg_tokens=-2),
        lambda d: d["architecture"].update(unknown=1),
    ],
)
def test_tampered_fields_are_refused(plan, change):
    data = json.loads(json.dumps(plan.to_dict()))
    change(data)
    with pytest.raises(vtp.PlanError):
        vtp.PruningPlan.from_dict(data)


# -- Key widths, turned values, predicted changes ----------------------------------------------------------


def with_keys(plan, **fields):
    keys = {"blocks.0.attn": (1, 4, 3)}
    return dataclasses.replace(plan, keys=keys, value_basis="principal", predicted_change=0.25, **fields)


def test_file_of_version_1_loads_with_the_keys_of_the_dense_model(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    for field in ("keys", "value_basis", "predicted_change"):
        del data[field]
    loaded = vtp.PruningPlan.from_dict(data | {"plan_version": 1})
    assert loaded == plan
    assert dict(loaded.keys) == {f"blocks.{i}.attn": (4, 4, 4) for i in range(2)}
    assert (loaded.value_basis, loaded.predicted_change) == ("dimensions", None)
    assert not loaded.needs_images
    assert loaded.cost == plan.cost


def test_file_of_version_2_brings_back_keys_basis_and_predicted_change(plan, tmp_path):
    narrow = with_keys(plan)
    narrow.save(tmp_path / "plan.json")
    loaded = vtp.PruningPlan.load(tmp_path / "plan.json")
    assert loaded == narrow
    assert loaded != plan
    assert hash(loaded) == hash(narrow)
    assert loaded.keys["blocks.0.attn"] == (1, 4, 3)
    assert loaded.keys["blocks.1.attn"] == (4, 4, 4)
    assert (loaded.value_basis, loaded.predicted_change) == ("principal", 0.25)
    assert copy.deepcopy(narrow) == pickle.loads(pickle.dumps(narrow)) == narrow


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blocks.2.attn": (4, 4, 4)}, r"keys: got \['blocks.2.attn'\], expected names like 'blocks.0.attn'"),
        ({"blocks.0.attn.qkv": (4, 4, 4)}, r"keys: got .*expected names like"),
        ({"blocks.0.attn": (4, 4)}, r"keys\['blocks.0.attn'\]: got \(4, 4\), expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (0, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (5, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (-1, 4, 4)}, "expected 3 widths from 1 to 4"),
        ({"blocks.0.attn": (2.5, 4, 4)}, "fields are missing, unknown or of the wrong type"),
        ({"blocks.0.attn": 4}, "fields are missing, unknown or of the wrong type"),
        ([4, 4, 4], "fields are missing, unknown or of the wrong type"),
    ],
    ids=str,
)
def test_bad_keys_are_refused(plan, keys, message):
    with pytest.raises(vtp.PlanError, match=message):
        vtp.PruningPlan.from_dict({**plan.to_dict(), "keys": keys})


@pytest.mark.parametrize(
    "field", [{"value_basis": "best"}, {"value_basis": None}, {"predicted_change": "much"}]
)
def test_bad_basis_or_change_is_refused(plan, field):
    with pytest.raises(vtp.PlanError):
        vtp.PruningPlan.from_dict({**plan.to_dict(), **field})


def test_norms_of_queries_and_keys_take_all_of_a_head():
    plan = vtp.make_plan(prepared(dataclasses.replace(TINY, qk_norm=True)), rate=0.0)
    with pytest.raises(vtp.PlanError, match="norms of queries and keys are over all of it"):
        dataclasses.replace(plan, keys={"blocks.1.attn": (4, 3, 4)})
    model = prepared(dataclasses.replace(TINY, qk_norm=True))
    with pytest.raises(vtp.PlanError, match=r"^key_width: got 3, expected 4 at most, norms"):
        vtp.make_plan(model, rate=0.4, key_width=3)
    assert not vtp.make_plan(model, rate=0.4, key_width=4).narrows_keys


def test_a_norm_before_proj_takes_values_as_they_are():
    plan = vtp.make_plan(prepared(dataclasses.replace(TINY, scale_attn_norm=True)), rate=0.0)
    with pytest.raises(vtp.PlanError, match="value_basis: got 'principal', expected 'dimensions': the norm"):
        dataclasses.replace(plan, value_basis="principal")


def test_head_that_is_gone_has_no_keys_whatever_they_were(plan):
    kept = dict(plan.kept) | {"blocks.0.attn.proj": (4, 5, 9)}
    narrow = dataclasses.replace(plan, kept=kept, keys={"blocks.0.attn": (1, 4, 4)})
    assert narrow.key_widths(0) == (0, 4, 4)
    assert narrow.block_widths(0).keys == (0, 4, 4)
    assert not narrow.narrows_keys
    assert narrow.cost == dataclasses.replace(narrow, keys={}).cost


def test_narrow_keys_are_cheaper_by_their_products_and_scores(tiny):
    plan = vtp.make_plan(tiny, rate=0.0)
    narrow = with_keys(plan)
    gone, tokens = 3 + 0 + 1, TINY.num_tokens
    assert plan.cost.params - narrow.cost.params == 2 * gone * (12 + 1)
    assert plan.cost.macs - narrow.cost.macs == tokens * 2 * gone * 12 + tokens**2 * gone


@pytest.mark.parametrize(
    ("share", "width"), [(0.5, 2), (0.25, 1), (1e-9, 1), (0.51, 3), (1, 1), (3, 3), (4, 4), (0.999999, 4)]
)
def test_key_width_is_a_share_rounded_up_or_a_number(tiny, share, width):
    plan = vtp.make_plan(tiny, rate=0.3, key_width=share)
    assert plan.keys["blocks.1.attn"] == (width,) * 3
    assert plan.narrows_keys == plan.needs_images == (width < 4)


def test_share_of_a_key_width_is_not_rounded_up_by_its_float():
    architecture = dataclasses.replace(TINY, embed_dim=100, num_heads=1)
    plan = vtp.make_plan(prepared(architecture), rate=0.3, key_width=0.07)
    assert plan.keys["blocks.0.attn"] == (7,)


@pytest.mark.parametrize("value", [0, -1, 1.5, 5, math.nan, math.inf, "2", True], ids=str)
def test_bad_key_width_is_refused_by_name(tiny, value):
    with pytest.raises(vtp.PlanError, match=f"^key_width: got {value!r}"):
        vtp.make_plan(tiny, rate=0.4, key_width=value)


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_budget_counts_the_keys_that_are_left(tiny, kind):
    most = 0.7 * getattr(vtp.count(tiny), kind)
    wide, narrow = (vtp.make_plan(tiny, **{kind: most}, key_width=width) for width in (None, 1))
    assert getattr(narrow.cost, kind) <= most
    assert number_kept(narrow) > number_kept(wide)


def test_printed_plan_shows_key_widths_where_they_are_narrow(plan):
    assert "key and value width of each head" in str(with_keys(plan))
    assert "key" not in str(plan)


def test_printed_plan_shows_every_width_and_what_is_left(fashion):
    plan = vtp.make_plan(fashion, rate=0.4)
    lines = str(plan).splitlines()
    for block in range(6):
        widths = [len(plan.kept[f"blocks.{block}.{site}"]) for site in SITES]
        row = [str(number) for number in (block, *widths, *plan.value_widths(block))]
        assert [line.split() for line in lines].count(row) == 1
    assert any(line.split() == ["dense", "96", "96", "96", "384"] for line in lines)
    for kind in ("params", "macs"):
        share = f"({getattr(plan.cost, kind) / getattr(plan.dense_cost, kind):.1%} left)"
        assert any(share in line for line in lines)
    assert "rate 0.4; score gate, global; 40.0% of dimensions removed" in lines[0]
    assert f"threshold {plan.threshold:.4g}" in lines[1]
    assert max(map(len, lines)) <= 100


# ------------------------------------------------------------------------------------- published arithmetic


@pytest.fixture(scope="module")
def deit_base():
    architecture = dataclasses.replace(DEIT_TINY, embed_dim=768, num_heads=12, mlp_hidden=3072)
    return vtp.insert_gates(architecture.build(weight_init="skip").bfloat16())


def test_deit_base_dense_has_86_57_million_params_and_17_56_billion_macs(deit_base):
    assert str(vtp.make_plan(deit_base, rate=0).cost) == "86.57M params, 17.56G MACs"


def test_deit_base_with_40_percent_of_all_gates_taken_from_fc2(deit_base):
    scores = {
        name: torch.full((layer.in_features,), 0.0 if name.endswith("fc2") else 1.0)
        for name, layer in vtp.sites(deit_base).items()
    }
    cost = vtp.make_plan(deit_base, rate=0.4, score=scores).cost
    assert (f"{cost.params / 1e6:.1f}", f"{cost.macs / 1e9:.2f}") == ("46.9", "9.76")


def test_deit_base_with_40_percent_of_each_gate_vector(deit_base):
    cost = vtp.make_plan(deit_base, rate=0.4, scope="per_layer").cost
    # 44.0536M parameters, which one decimal shows as 44.1.
    assert (f"{cost.params / 1e6:.1f}", f"{cost.macs / 1e9:.2f}") == ("44.1", "9.06")
