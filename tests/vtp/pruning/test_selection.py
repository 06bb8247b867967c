"""Making plans: what a rate, a budget, a scope and a floor mean, and what is refused."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import vtp
from tests.support.models import TINY, build, gated, prepared
from vtp.choices import SCOPES
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
    with pytest.raises(vtp.PlanError, match=r"macs: 1 cannot be met: ([\d,]+) MACs remain") as refusal:
        vtp.make_plan(tiny, macs=1)
    least = int(str(refusal.value).split("met: ")[1].split(" ")[0].replace(",", ""))
    assert vtp.make_plan(tiny, macs=least).cost.macs == least
    with pytest.raises(vtp.PlanError, match=f"{least:,} MACs"):
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


# ---------------------------------------------------------------------------------------------- key widths


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
