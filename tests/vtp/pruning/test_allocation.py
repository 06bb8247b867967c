"""The best widths for a budget: exact, never above it, and in the plans and fronts that come of it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image
from tests.vtp.pruning.test_latency_table import made_up
from vtp.model.cost import block_cost, model_cost, surroundings_cost
from vtp.model.widths import SITES, BlockWidths
from vtp.pruning.allocation import Way, allocate, front, rescaled

BUDGETS = ("rate", "macs", "params", "latency_ms")
DENSE = model_cost(TINY, [TINY.dense_widths] * TINY.depth)


def gated_plan(model):
    """The plan that keeps everything."""
    return vtp.make_plan(gated(model), rate=0.0)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def statistics(model):
    return vtp.calibrate(model, image(model, batch=60))


@pytest.fixture(scope="module")
def table():
    return made_up(TINY)


def with_tensors(statistics, changes):
    """The same statistics with some tensors replaced."""
    return dataclasses.replace(statistics, tensors=dict(statistics.tensors) | changes)


def best(model, statistics, kind, share, table, **settings):
    """The optimal plan for a share of the dense cost, and (cost, budget)."""
    if kind == "rate":
        plan = vtp.make_plan(model, rate=1 - share, statistics=statistics, scope="optimal", **settings)
        return plan, plan.rate * -1, -(1 - share)
    value = share * (table.predict(gated_plan(model)) if kind == "latency_ms" else getattr(DENSE, kind))
    more = {"latency_table": table} if kind == "latency_ms" else {}
    plan = vtp.make_plan(model, **{kind: value}, statistics=statistics, scope="optimal", **more, **settings)
    cost = table.predict(plan) if kind == "latency_ms" else getattr(plan.cost, kind)
    return plan, cost, value


# -- Dynamic programming -----------------------------------------------------------------------------------


def random_branches(seed, branches=4, ways=5, total=10_000):
    """Ways of random cost and change; the dearest of all branches cost 10,000 in all, one step each unit."""
    generator = np.random.default_rng(seed)
    result = []
    for branch in range(branches):
        costs = np.sort(generator.integers(0, total // branches, ways))
        costs[-1] = total // branches
        changes = np.sort(generator.random(ways))[::-1] * 10.0 ** generator.integers(-3, 3)
        result.append([
            Way(BlockWidths(fc1=branch, fc2=k), int(c), float(e))
            for k, (c, e) in enumerate(zip(costs, changes, strict=True))
        ])  # fmt: skip
    return result


def brute(branches, most):
    """The least change of all combinations within the budget."""
    fitting = [
        sum(way.change for way in ways)
        for ways in itertools.product(*branches)
        if sum(way.cost for way in ways) <= most
    ]
    return min(fitting, default=math.inf)


@pytest.mark.parametrize("seed", range(6))
def test_least_change_is_that_of_all_combinations(seed):
    branches, outside = random_branches(seed), 77
    allocation = allocate(branches, outside)
    least = sum(ways[0].cost for ways in branches)
    assert allocation.least == outside + least
    for most in np.linspace(least, 10_000, 40).round():
        ways = allocation.ways(outside + most)
        assert sum(way.cost for way in ways) <= most
        assert [way.widths.fc1 for way in ways] == [0, 1, 2, 3]
        assert sum(way.change for way in ways) == pytest.approx(brute(branches, most), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("total", [37, 999_983, 12_345_678_901])
def test_costs_between_steps_lose_at_most_a_step_for_each_branch(seed, total):
    branches = random_branches(seed, total=total)
    allocation = allocate(branches, 0)
    rounding = (len(branches) + 1) * allocation.unit
    for most in np.linspace(allocation.least, total, 30):
        ways = allocation.ways(most)
        assert sum(way.cost for way in ways) <= most
        change = sum(way.change for way in ways)
        assert brute(branches, most) * (1 - 1e-12) <= change <= brute(branches, most - rounding) * (1 + 1e-12)


def test_more_budget_is_never_worse_by_more_than_rounding():
    branches = random_branches(11, branches=6, ways=8)
    allocation = allocate(branches, 0)
    changes = [
        sum(way.change for way in allocation.ways(most)) for most in range(allocation.least, 10_001, 7)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(changes))


def test_front_drops_what_is_beaten_and_ties():
    ways = [Way(BlockWidths(fc1=i), cost, change) for i, (cost, change) in enumerate(
        [(5, 1.0), (3, 2.0), (3, 1.5), (4, 1.5), (9, 0.0), (7, 1.0), (0, 9.0)]
    )]  # fmt: skip
    assert [(way.cost, way.change) for way in front(ways)] == [(0, 9.0), (3, 1.5), (5, 1.0), (9, 0.0)]


def test_branches_that_cost_nothing_are_all_kept():
    branches = [[Way(BlockWidths(), 0, 1.0), Way(BlockWidths(fc1=1), 0, 0.5)]] * 3
    assert [way.change for way in allocate(branches, 10).ways(10)] == [0.5] * 3


# -- Curves ------------------------------------------------------------------------------------------------


def test_rescaled_meets_the_measured_points_and_never_rises_with_width():
    errors = np.array([8.0, 4, 2, 1, 0.5, 0])
    points = np.array([[0, 3.0], [2, 0.1]])
    changes = rescaled(errors, points)
    assert changes[0] == pytest.approx(3)
    assert changes[2] == pytest.approx(0.1)
    assert changes[1] == pytest.approx(4 * math.sqrt(3 / 8 * 0.1 / 2))
    assert changes[3] == pytest.approx(0.05)
    assert changes[5] == 0
    assert (np.diff(changes) <= 0).all()


@pytest.mark.parametrize("errors", [[1, 1, 0, 0], [0, 0, 0, 0], [1e30, 1e20, 0, 0], [1e-320, 0, 0, 0]])
@pytest.mark.parametrize("points", [[[0, 1], [2, 1e-16]], [[0, 0], [2, 0]], [[0, 1e12], [2, 1e9]]])
def test_curves_of_units_that_lose_nothing_stay_finite(errors, points):
    with np.errstate(all="raise", under="ignore"):
        changes = rescaled(np.array(errors, float), np.array(points, float))
    assert np.isfinite(changes).all()
    assert changes[-1] == 0
    assert (np.diff(changes) <= 0).all()


# -- Plans -------------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("share", [0.35, 0.62, 0.9, 1.0])
def test_budget_is_never_exceeded(model, statistics, table, kind, share):
    plan, cost, value = best(model, statistics, kind, share, table)
    assert cost <= value * (1 + 1e-12 if kind == "rate" else 1)
    assert math.isfinite(plan.predicted_change)
    assert plan.value_basis == "principal"
    if share >= 1:
        assert plan.predicted_change == 0


@pytest.mark.parametrize("kind", ["macs", "latency_ms"])
def test_more_budget_changes_no_more(model, statistics, table, kind):
    shares = np.linspace(0.4, 1, 5)  # 0.3 of the time is less than what is outside the blocks
    changes = [best(model, statistics, kind, share, table)[0].predicted_change for share in shares]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_plan_and_norms_keep_keys_whole(family):
    model = build(FAMILIES[family])
    statistics = vtp.calibrate(model, image(model, batch=20))
    most = 0.5 * gated_plan(model).dense_cost.macs
    plan = vtp.make_plan(model, macs=most, statistics=statistics, scope="optimal")
    assert plan.cost.macs <= most
    if FAMILIES[family].whole_keys:
        assert not plan.narrows_keys
    assert vtp.count(vtp.compact(model, plan, images=image(model, batch=20))) == plan.cost


def test_plan_is_the_best_of_all_that_are_possible():
    """One block of one head, every width of every site tried: the budget is met with the least change."""
    architecture = dataclasses.replace(TINY, embed_dim=4, num_heads=1, depth=1, mlp_hidden=5)
    model = build(architecture)
    statistics = vtp.calibrate(model, image(model, batch=60))
    of = {name.removeprefix("blocks.0."): tensor.numpy() for name, tensor in statistics.tensors.items()}
    inputs = {
        site: rescaled(of[f"{site}.errors"][::-1], of[f"{site}.changes"])
        for site in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    }
    values = rescaled(np.append(of["attn.values"][0, ::-1].cumsum()[::-1], 0), of["attn.values.changes"])
    key_errors = np.append(of["attn.keys"][0, ::-1].cumsum()[::-1], 0)
    width, change = of["attn.keys.changes"][0]
    keys = key_errors * change / key_errors[int(width)]
    outside = surroundings_cost(architecture).macs

    def cost(qkv, value, key, fc1, fc2):
        widths = BlockWidths(qkv, (value,), fc1, fc2, (key if value else 0,))
        return outside + block_cost(architecture, widths).macs

    found = []
    attention = [(0, 0, 1, values[0])]
    attention += [
        (q, v, k, inputs["attn.qkv"][q] + values[v] + keys[k])
        for q, v, k in itertools.product(range(1, 5), range(1, 5), range(1, 5))
    ]
    mlp = [(0, 0, inputs["mlp.fc2"][0])]
    mlp += [
        (a, b, inputs["mlp.fc1"][a] + inputs["mlp.fc2"][b])
        for a, b in itertools.product(range(1, 5), range(1, 6))
    ]
    for (q, v, k, first), (a, b, second) in itertools.product(attention, mlp):
        found.append((cost(q, v, k, a, b), first + second))
    for share in (0.5, 0.7, 0.85):
        most = share * found[-1][0]  # of the dense model
        plan = vtp.make_plan(model, macs=most, statistics=statistics, scope="optimal", min_keep=0)
        least = min(change for spent, change in found if spent <= most)
        # Heads are chosen at all inputs first, and widths are tried at some levels: near the best, not below.
        assert least * (1 - 1e-6) <= plan.predicted_change <= 1.5 * least


@pytest.mark.covering(1)
@pytest.mark.parametrize("round_to", [2, 4])
@pytest.mark.parametrize("kind", ["macs", "latency_ms"])
def test_widths_are_multiples_or_whole(model, statistics, table, kind, round_to):
    plan, cost, value = best(model, statistics, kind, 0.6, table, round_to=round_to)
    assert cost <= value
    for i in range(2):
        row, full = plan.block_widths(i), TINY.dense_widths
        pairs = [(row.qkv, full.qkv), (row.fc1, full.fc1), (row.fc2, full.fc2)]
        pairs += [*zip(row.values, full.values, strict=True), *((key, 4) for key in row.keys)]
        for width, whole in pairs:
            assert width % round_to == 0 or width == whole


@pytest.mark.parametrize("min_keep", [0, 0.3, 3])
def test_floor_holds_for_what_is_not_removed_whole(model, statistics, table, min_keep):
    plan, _, _ = best(model, statistics, "macs", 0.4, table, min_keep=min_keep)
    for name, width in plan.widths.items():
        if not name.endswith("proj"):
            floor = min_keep if min_keep >= 1 else math.ceil(min_keep * width)
            assert len(plan.kept[name]) == 0 or len(plan.kept[name]) >= floor
    floor = min_keep if min_keep >= 1 else math.ceil(min_keep * 4)
    for i in range(2):
        assert all(width == 0 or width >= floor for width in plan.value_widths(i))


def test_kept_dimensions_are_those_that_obs_removes_last_and_principal_values_come_first(model, statistics):
    plan = vtp.make_plan(model, macs=0.5 * DENSE.macs, statistics=statistics, scope="optimal")
    for i, site in itertools.product(range(2), ("attn.qkv", "mlp.fc1", "mlp.fc2")):
        name = f"blocks.{i}.{site}"
        order, kept = statistics.tensors[f"{name}.order"].long().tolist(), plan.kept[name]
        assert set(kept) == set(order[len(order) - len(kept) :])
    for i in range(2):
        expected = [4 * head + j for head, width in enumerate(plan.value_widths(i)) for j in range(width)]
        assert list(plan.kept[f"blocks.{i}.attn.proj"]) == expected


@pytest.mark.parametrize("what", ["head", "attention", "mlp"])
def test_what_does_nothing_is_removed_whole(model, statistics, what):
    if what == "head":
        energies = statistics.tensors["blocks.0.attn.values"].clone()
        energies[1] = 0
        changed = {"blocks.0.attn.values": energies}
    else:
        units = ("attn.qkv", "attn.values") if what == "attention" else ("mlp.fc1", "mlp.fc2")
        changed = {}
        for unit in units:
            points = statistics.tensors[f"blocks.0.{unit}.changes"].clone()
            points[:, 1] = 0
            changed[f"blocks.0.{unit}.changes"] = points
    plan = vtp.make_plan(
        model, macs=0.75 * DENSE.macs, statistics=with_tensors(statistics, changed),
        scope="optimal",
    )  # fmt: skip
    if what == "head":
        assert plan.value_widths(0)[1] == 0
        assert min(plan.value_widths(0)[0], plan.value_widths(0)[2]) > 0
    elif what == "attention":
        assert sum(plan.value_widths(0)) == 0
        assert len(plan.kept["blocks.0.mlp.fc2"]) > 0
    else:
        assert len(plan.kept["blocks.0.mlp.fc2"]) == 0
        assert sum(plan.value_widths(0)) > 0


@pytest.mark.parametrize("kind", ["macs", "params", "latency_ms"])
def test_budget_that_cannot_be_met_is_refused_with_the_least_that_can(model, statistics, table, kind):
    more = {"latency_table": table} if kind == "latency_ms" else {}
    arguments = {"statistics": statistics, "scope": "optimal", **more}
    with pytest.raises(vtp.PlanError, match=f"^{kind}: .* cannot be met") as error:
        vtp.make_plan(model, **{kind: 1e-3 if kind == "latency_ms" else 10}, **arguments)
    least = float(str(error.value).split("cannot be met: ")[1].split()[0].replace(",", ""))
    plan = vtp.make_plan(model, **{kind: least * (1 + 1e-9)}, **arguments)
    assert all(not kept for name, kept in plan.kept.items() if name.endswith(("qkv", "fc1")))


def test_dense_budget_keeps_the_dense_model(model, statistics):
    plan = vtp.make_plan(model, macs=DENSE.macs, statistics=statistics, scope="optimal")
    assert plan.cost == plan.dense_cost
    assert plan.rate == 0
    assert not plan.needs_images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_width": 2}, "key_width: got one with scope='optimal'"),
        ({"per_mac": True}, "per_mac: got True with scope='optimal'"),
        ({"statistics": None}, "statistics: got None"),
        ({"score": "gate"}, "score: got 'gate', and the model has no gates"),
    ],
    ids=str,
)
def test_arguments_that_go_ill_with_optimal_are_refused_by_name(model, statistics, arguments, message):
    with pytest.raises(vtp.PlanError, match=f"^{message}"):
        vtp.make_plan(model, **{"macs": 1e4, "statistics": statistics, "scope": "optimal"} | arguments)


# -- Pareto ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["macs", "params", "latency_ms"])
def test_front_is_sorted_from_the_cheapest_to_the_dense_model_and_no_point_beats_another(
    model, statistics, table, by
):
    more = {"latency_table": table} if by == "latency_ms" else {}
    found = vtp.pareto(model, statistics, by=by, points=25, **more)
    costs = [table.predict(p.plan) if by == "latency_ms" else getattr(p.plan.cost, by) for p in found]
    changes = [point.change for point in found]
    assert len(found) > 8
    assert all(a < b for a, b in itertools.pairwise(costs))
    assert all(a > b for a, b in itertools.pairwise(changes))
    assert all((p.macs, p.params) == (p.plan.cost.macs, p.plan.cost.params) for p in found)
    assert all(p.change == p.plan.predicted_change for p in found)
    assert all(not any(found[0].plan.kept[f"blocks.{i}.{site}"] for site in SITES) for i in range(2))
    assert found[-1].change == 0
    assert costs[-1] == (table.predict(gated_plan(model)) if by == "latency_ms" else getattr(DENSE, by))


def test_points_of_the_front_are_the_plans_of_their_budgets(model, statistics):
    for point in vtp.pareto(model, statistics, points=6):
        again = vtp.make_plan(model, macs=point.plan.budget["macs"], statistics=statistics, scope="optimal")
        assert again == point.plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "rate"}, "by: got 'rate'"), ({"points": 0}, "points: got 0"),
        ({"points": 2.0}, "points: got 2.0"), ({"points": True}, "points: got True"),
        ({"statistics": None}, "statistics: got None"), ({"round_to": 0}, "round_to: got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_argument_of_pareto_is_refused_by_name(model, statistics, arguments, message):
    with pytest.raises(vtp.PlanError, match=f"^{message}"):
        vtp.pareto(model, **{"statistics": statistics} | arguments)


@pytest.mark.covering(1)
@pytest.mark.parametrize("score", ["obs", "activation", "variance"])
@pytest.mark.parametrize("scope", ["global", "per_site", "per_layer"])
def test_scores_of_statistics_meet_a_budget_in_every_scope(model, statistics, score, scope):
    most = 0.6 * DENSE.macs
    plan = vtp.make_plan(model, macs=most, statistics=statistics, score=score, scope=scope)
    assert 0.9 * most <= plan.cost.macs <= most
    assert plan.value_basis == "dimensions"
    assert plan.predicted_change is None
    assert not plan.needs_images


def test_obs_scores_keep_the_order_of_removal(model, statistics):
    scores = vtp.make_plan(model, rate=0.0, statistics=statistics).scores
    for name, values in scores.items():
        order = statistics.tensors[f"{name}.order"].long().tolist()
        ranked = torch.tensor(values)[order]
        assert (ranked.diff() >= 0).all(), name
