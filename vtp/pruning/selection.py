"""Which dimensions are kept: a budget, one threshold over all scores, kept indices."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from vtp.model.architecture import Architecture
from vtp.model.widths import BlockWidths
from vtp.pruning.budget import Limit, is_number, limit_of, one_budget, refuse_less_than, widths_array
from vtp.pruning.calibration import Statistics
from vtp.pruning.latency_table import LatencyTable
from vtp.pruning.optimal import OptimalWidths
from vtp.pruning.plan import PlanError, PruningPlan
from vtp.pruning.ranked import Groups, Ranked, rank_dimensions


def make_plan(
    model: nn.Module,
    *,
    rate: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | None = None,
    statistics: Statistics | None = None,
    score: str | Mapping[str, Tensor] | None = None,
    scope: str = "global",
    key_width: float | None = None,
    per_mac: bool = False,
    round_to: int = 1,
    min_keep: float = 0.05,
    protect: str | Iterable[str] = (),
) -> PruningPlan:
    """Rank all dimensions of a model and keep the best that a budget allows. The model is not changed.

    Args:
        model: from `insert_gates`, usually after sparse training; or a dense one, to be cut without training,
            whose scores come from `statistics` or are your own.
        rate: share of all gates to remove, in [0, 1) (the paper's budget); at least that many go.
        macs: multiply-adds for one image that may remain, e.g. 10.0e9.
        params: parameters that may remain, e.g. 48e6.
        latency_ms: milliseconds that a forward pass of one batch may take, packed by `vtp.optimize`, as
            predicted by `latency_table`. Exactly one of the four budgets; it is never exceeded, and is met
            as closely as whole dimensions allow.
        latency_table: time against width, from `vtp.profile_widths`. None takes the one that
            was measured on this machine for one image in float32, with as many threads as now. A table of
            another machine gives a plan for that machine.
        statistics: of this model, from `vtp.calibrate`.
        score: "gate", |g| (the paper); "taylor", the mean of (g * dL/dg)**2 over training steps; from
            `statistics` "obs", what the removal adds to the change of the output in greedy OBS, "activation",
            |W_j|^2 var(x_j), or "variance", var(x_j); or a mapping from site name to a score of your own for
            each gate, larger is more important. None takes "obs" with statistics and "gate" without.
        scope: "global" compares all gates with each other (the paper); "per_site" removes the same share
            from each of the four kinds of site, "per_layer" from each single gate vector. "optimal" finds the
            widths of all sites, of the values, queries and keys of each head, and what is removed whole, by
            dynamic programming over the curves of `statistics`; `score` only orders the dimensions within a
            site. The cut then takes images.
        key_width: of the queries and keys of every head, a share below 1 or a number of dimensions; None
            leaves them as they are, or for scope "optimal" to it. The cut then takes images.
        per_mac: divide by the MACs that removing the dimension saves. Gates stay near 1 after sparse
            training, where a quotient would only compare costs, so "gate" enters it by its rank.
        round_to: widths become multiples of this (per head for `attn.proj`), or stay whole, for the same
            budget. A group of dimensions is ranked by its mean score.
        min_keep: the best dimensions of each gate vector that are never removed: a share below 1, or a
            number of dimensions. 0 lets heads, branches and layers vanish; scope "optimal" may remove them
            whole whatever it is.
        protect: parts that are never cut, whatever the budget takes from the rest: parts of the names of
            sites, such as "attn", "mlp.fc2", "blocks.0" or "blocks.3.attn.qkv". Protecting `attn.qkv` keeps
            its inputs and the width of queries and keys; `attn.proj`, the values. Weights of a protected part
            still change where the cut refits them.

    A model from `vtp.expand` has dimensions that an earlier cut removed: they count as gates and go first.
    Of a budget that the whole model meets, so that nothing is cut, a UserWarning tells.

    Raises:
        PlanError: an argument is out of range, a score is missing or not finite, or the budget cannot be
            met; the message names the argument and the least that is possible.
    """
    budget = one_budget(rate=rate, macs=macs, params=params, latency_ms=latency_ms)
    if latency_table is not None and latency_ms is None:
        raise PlanError("latency_table: got one without latency_ms, the budget that it is for")
    ranked = rank_dimensions(model, statistics, score, scope, per_mac, round_to, min_keep, protect)
    if scope == "optimal" and statistics is not None:
        if key_width is not None:
            raise PlanError("key_width: got one with scope='optimal', which finds it for each head")
        limit = limit_of(ranked.architecture, budget, latency_table, {})
        best = OptimalWidths(ranked, statistics, limit).plan(limit.most, budget)
        _warn_of_nothing_cut(best, ranked)
        return best
    architecture, groups = ranked.architecture, ranked.groups
    keys = _key_widths(ranked, key_width)
    removed = _fit(architecture, groups, limit_of(architecture, budget, latency_table, keys))
    kept = _kept_indices(architecture, groups, removed)
    one_number = scope == "global" and not per_mac and round_to == 1
    # What an earlier cut has removed was not compared.
    gone = np.concatenate(
        [
            np.delete(values, sorted({*kept[name], *np.flatnonzero(ranked.absent[name])}))
            for name, values in ranked.scores.items()
        ]
    )
    plan = ranked.plan(
        kept=kept,
        budget=budget,
        threshold=float(f"{gone.max():.6g}") if one_number and gone.size else None,
        keys=keys,
    )
    _warn_of_nothing_cut(plan, ranked)
    return plan


def _warn_of_nothing_cut(plan: PruningPlan, ranked: Ranked) -> None:
    """Warn where a budget leaves all that there is; a rate says by itself what it removes."""
    (name, most), *_ = plan.budget.items()
    whole = all(len(kept) == (~ranked.absent[site]).sum() for site, kept in plan.kept.items())
    whole_keys = all((np.array(widths) >= ranked.absent[head]).all() for head, widths in plan.keys.items())
    if name != "rate" and whole and whole_keys:
        has = f"{plan.cost.macs:.4g} MACs and {plan.cost.params:.4g} parameters"
        text = f"{name}: got {most:.4g}, which the model, of {has}, meets as it is: nothing is cut"
        warnings.warn(text, UserWarning, stacklevel=3)


@dataclasses.dataclass(frozen=True)
class ParetoPoint:
    """One model on the front: nothing cheaper changes the output less, as far as the measured curves say.

    Attributes:
        macs: multiply-adds for one image; params: parameters.
        change: predicted change of the output, in the unit of `Statistics.change`.
        plan: for `vtp.compact`.
    """

    macs: int
    params: int
    change: float
    plan: PruningPlan


def pareto(
    model: nn.Module,
    statistics: Statistics,
    *,
    by: str = "macs",
    points: int = 20,
    latency_table: LatencyTable | None = None,
    score: str | Mapping[str, Tensor] | None = None,
    round_to: int = 1,
    min_keep: float = 0.05,
    protect: str | Iterable[str] = (),
) -> list[ParetoPoint]:
    """The best widths for every budget, from one calibration: plans from the cheapest to the dense model.

    Args:
        model: dense or gated; statistics: of it, from `vtp.calibrate`.
        by: the budget: "macs", "params" or "latency_ms".
        points: how many budgets are looked at, evenly spaced from the least cost to the dense model's.
        latency_table, score, round_to, min_keep, protect: as `make_plan` takes them.

    Raises:
        PlanError: as `make_plan` does.
    """
    if by not in ("macs", "params", "latency_ms"):
        raise PlanError(f"by: got {by!r}, expected 'macs', 'params' or 'latency_ms'")
    if not isinstance(points, int) or isinstance(points, bool) or points < 1:
        raise PlanError(f"points: got {points!r}, expected an integer of at least 1")
    ranked = rank_dimensions(model, statistics, score, "optimal", False, round_to, min_keep, protect)
    limit = limit_of(ranked.architecture, {by: 1.0}, latency_table, {})
    optimal = OptimalWidths(ranked, statistics, limit)
    unit = 1e-6 if by == "latency_ms" else 1.0
    budgets = np.linspace(optimal.allocation.least, optimal.dense, points)
    plans = [optimal.plan(most, {by: unit * most}) for most in budgets]
    sized = [(optimal.size(plan), plan.predicted_change or 0.0, plan) for plan in plans]
    found: list[ParetoPoint] = []
    for _, change, plan in sorted(sized, key=lambda entry: entry[:2]):
        if not found or change < found[-1].change:
            found.append(ParetoPoint(plan.cost.macs, plan.cost.params, change, plan))
    return found


def _key_widths(ranked: Ranked, key_width: float | None) -> dict[str, tuple[int, ...]]:
    """Key widths of the heads of every attention that has narrower ones than the dense model."""
    architecture, d = ranked.architecture, ranked.architecture.head_dim
    width = d
    if key_width is not None:
        if not is_number(key_width) or not (0 < key_width < 1 or key_width == int(key_width) >= 1):
            raise PlanError(
                f"key_width: got {key_width!r}, expected a share in (0, 1) or a number of dimensions"
            )
        width = max(1, math.ceil(round(key_width * d, 6))) if key_width < 1 else int(key_width)
        if width > d or (architecture.whole_keys and width < d):
            why = architecture.whole_keys_reason if architecture.whole_keys else "that of a head"
            raise PlanError(f"key_width: got {key_width!r}, expected {d} at most, {why}")
    keys = {}
    for i in range(architecture.depth):
        name = f"blocks.{i}.attn"
        own = d if f"{name}.qkv" in ranked.protected else width
        keys[name] = tuple(np.minimum(ranked.absent[name], own).tolist())
    return {name: widths for name, widths in keys.items() if min(widths) < d}


def _block_of(row: np.ndarray, keys: tuple[int, ...]) -> BlockWidths:
    qkv, fc1, fc2, *values = row.tolist()
    return BlockWidths(qkv, tuple(values), fc1, fc2, keys)


def _fit(architecture: Architecture, groups: Groups, limit: Limit) -> list[int]:
    """Which groups go (positions in `groups`): the shortest run of least important ones that meets the
    budget, less those that can be given back because the last step (often a whole head) saved too much."""
    full = widths_array(architecture)

    def size(block: int, row: np.ndarray) -> int:
        return limit.size(_block_of(row, limit.keys.get(f"blocks.{block}.attn", ())))

    def widths_after(count: int) -> np.ndarray:
        gone = np.bincount(groups.slots[:count], groups.sizes[:count], minlength=full.size)
        return full - gone.astype(np.int64).reshape(full.shape)

    def total(widths: np.ndarray) -> int:
        return limit.outside + sum(size(block, row) for block, row in enumerate(widths))

    low, high = groups.absent, len(groups.sizes)
    refuse_less_than(total(widths_after(high)), limit.most, limit)
    while low < high:
        middle = (low + high) // 2
        if total(widths_after(middle)) <= limit.most:
            high = middle
        else:
            low = middle + 1
    widths = widths_after(low)
    slack, removed, exhausted = limit.most - total(widths), [], set()
    for position in range(low - 1, -1, -1):
        slot = int(groups.slots[position])
        block = slot // full.shape[1]
        row = widths[block]
        # A vector gives back its best group first, or none: else its order would not be that of the scores.
        if slack > 0 and slot not in exhausted and position >= groups.absent:
            before = size(block, row)
            row[slot % full.shape[1]] += groups.sizes[position]
            added = size(block, row) - before
            if added <= slack:
                slack -= added
                continue
            row[slot % full.shape[1]] -= groups.sizes[position]
            exhausted.add(slot)
        removed.append(position)
    return removed


def _kept_indices(
    architecture: Architecture, groups: Groups, removed: list[int]
) -> dict[str, tuple[int, ...]]:
    kept = {name: np.ones(width, dtype=bool) for name, width in architecture.site_widths().items()}
    for position in removed:
        kept[groups.names[position]][groups.members[position]] = False
    return {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in kept.items()}
