"""Which dimensions are kept: a budget, one threshold over all scores, kept indices."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from vtp.files import fingerprint
from vtp.model.architecture import Architecture, describe
from vtp.model.cost import block_cost, surroundings_cost
from vtp.model.widths import SITES, BlockWidths
from vtp.pruning.allocation import Bounds, Way, allocate, branch_ways
from vtp.pruning.calibration import Statistics
from vtp.pruning.gates import sites, with_gates
from vtp.pruning.latency_table import LatencyTable, LatencyTableError, cached_table, how_to_make_one
from vtp.pruning.plan import PlanError, PruningPlan
from vtp.pruning.removed import removed_before
from vtp.pruning.scores import SCOPES, ranking, site_of, site_scores


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
    budget = _one_budget(rate=rate, macs=macs, params=params, latency_ms=latency_ms)
    if latency_table is not None and latency_ms is None:
        raise PlanError("latency_table: got one without latency_ms, the budget that it is for")
    ranked = _ranked(model, statistics, score, scope, per_mac, round_to, min_keep, protect)
    if scope == "optimal" and statistics is not None:
        if key_width is not None:
            raise PlanError("key_width: got one with scope='optimal', which finds it for each head")
        limit = _limit(ranked.architecture, budget, latency_table, {})
        best = _Optimal(ranked, statistics, limit).plan(limit.most, budget)
        _warn_of_nothing_cut(best, ranked)
        return best
    architecture, groups = ranked.architecture, ranked.groups
    keys = _key_widths(ranked, key_width)
    removed = _fit(architecture, groups, _limit(architecture, budget, latency_table, keys))
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


def _warn_of_nothing_cut(plan: PruningPlan, ranked: "_Ranked") -> None:
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
    ranked = _ranked(model, statistics, score, "optimal", False, round_to, min_keep, protect)
    limit = _limit(ranked.architecture, {by: 1.0}, latency_table, {})
    optimal = _Optimal(ranked, statistics, limit)
    unit = 1e-6 if by == "latency_ms" else 1.0
    budgets = np.linspace(optimal.allocation.least, optimal.dense, points)
    plans = [optimal.plan(most, {by: unit * most}) for most in budgets]
    sized = [(optimal.size(plan), plan.predicted_change or 0.0, plan) for plan in plans]
    found: list[ParetoPoint] = []
    for _, change, plan in sorted(sized, key=lambda entry: entry[:2]):
        if not found or change < found[-1].change:
            found.append(ParetoPoint(plan.cost.macs, plan.cost.params, change, plan))
    return found


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """A model whose dimensions are ranked, and how.

    protected: sites that are not cut; absent: see `removed_before`; protect: what was asked for.
    """

    architecture: Architecture
    scores: Mapping[str, np.ndarray]
    groups: "_Groups"
    score: str
    scope: str
    per_mac: bool
    round_to: int
    min_keep: float
    protect: tuple[str, ...]
    protected: frozenset[str]
    absent: Mapping[str, np.ndarray]
    parent: str

    def plan(self, **fields: Any) -> PruningPlan:
        """The plan with these fields beside its own; `scores` among them for others than those ranked by."""
        scores = fields.pop("scores", self.scores)
        return PruningPlan(
            architecture=self.architecture,
            scores={name: tuple(float(f"{v:.6g}") for v in values) for name, values in scores.items()},
            score=self.score,
            scope=self.scope,
            per_mac=self.per_mac,
            round_to=self.round_to,
            min_keep=self.min_keep,
            protect=self.protect,
            parent=self.parent,
            **fields,
        )


def _ranked(
    model: nn.Module,
    statistics: Statistics | None,
    score: str | Mapping[str, Tensor] | None,
    scope: str,
    per_mac: bool,
    round_to: int,
    min_keep: float,
    protect: str | Iterable[str],
) -> _Ranked:
    """Rank all dimensions, once the arguments are checked."""
    if scope not in (*SCOPES, "optimal"):
        raise PlanError(f"scope: got {scope!r}, expected one of {(*SCOPES, 'optimal')}")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise PlanError(f"round_to: got {round_to!r}, expected an integer of at least 1")
    if not _is_number(min_keep) or not (0 <= min_keep < 1 or min_keep == int(min_keep) >= 1):
        raise PlanError(f"min_keep: got {min_keep!r}, expected a share in [0, 1) or a number of dimensions")
    if statistics is not None and not isinstance(statistics, Statistics):
        raise PlanError(f"statistics: got {type(statistics).__name__}, expected those of vtp.calibrate")
    if scope == "optimal" and statistics is None:
        raise PlanError("statistics: got None, expected those of vtp.calibrate for scope='optimal'")
    if scope == "optimal" and per_mac:
        raise PlanError("per_mac: got True with scope='optimal', which weighs every cost; expected False")
    if score is None:
        score = "gate" if statistics is None else "obs"
    gated = with_gates(model)
    if gated is not model and score in ("gate", "taylor"):
        raise PlanError(
            f"score: got {score!r}, and the model has no gates; call vtp.insert_gates(model) and train it, "
            "or give statistics from vtp.calibrate"
        )
    if statistics is not None:
        try:
            statistics.check_model(model)
        except ValueError as error:
            raise PlanError(str(error)) from error
    parent = fingerprint(model.state_dict())
    layers = sites(gated)
    architecture = describe(gated)
    if list(layers) != list(architecture.site_widths()):
        missing = sorted(architecture.site_widths().keys() - layers.keys())
        raise PlanError(f"gated: no gates at {missing[:4]}; vtp.insert_gates puts them at every site")
    if not isinstance(protect, Iterable):
        raise PlanError(f"protect: got {protect!r}, expected names of parts")
    parts = (protect,) if isinstance(protect, str) else tuple(protect)
    protected = _protected_sites(architecture, parts)
    absent = removed_before(gated)
    scores = {
        name: np.where(absent[name], 0.0, values)
        for name, values in site_scores(layers, score, statistics).items()
    }
    ranks = ranking(architecture, scores, score, scope, per_mac)
    return _Ranked(
        architecture=architecture,
        scores=scores,
        groups=_groups(architecture, ranks, round_to, min_keep, protected, absent),
        score=score if isinstance(score, str) else "custom",
        scope=scope,
        per_mac=per_mac,
        round_to=round_to,
        min_keep=min_keep,
        protect=parts,
        protected=protected,
        absent=absent,
        parent=parent,
    )


def _protected_sites(architecture: Architecture, parts: tuple[str, ...]) -> frozenset[str]:
    """The sites whose names contain one of these parts, whole components of them."""
    names, found = list(architecture.site_widths()), set()
    for part in parts:
        matching = [name for name in names if isinstance(part, str) and part and f".{part}." in f".{name}."]
        if not matching:
            raise PlanError(
                f"protect: got {part!r}, expected a part of the name of a site, such as 'attn', "
                f"'mlp.fc2', 'blocks.0' or {names[-1]!r}; everything outside these is never cut"
            )
        found.update(matching)
    return frozenset(found)


def _other_site(name: str) -> str:
    """The other site of a branch, which the first has no effect without."""
    block, site = name.split(".", 2)[1:]
    return f"blocks.{block}.{SITES[SITES.index(site) ^ 1]}"


class _Optimal:
    """Plans of the best widths for any budget."""

    def __init__(self, ranked: _Ranked, statistics: Statistics, limit: "_Limit") -> None:
        self._ranked, self._statistics, self._limit = ranked, statistics, limit
        architecture, groups = ranked.architecture, ranked.groups
        self._removals: dict[str, list[int]] = {name: [] for name in architecture.site_widths()}
        for position, name in enumerate(groups.names):
            self._removals[name].append(position)
        least = ranked.min_keep if ranked.min_keep >= 1 else ranked.min_keep * architecture.head_dim
        branches: list[list[Way]] = []
        for i in range(architecture.depth):
            widths = {site: self._widths(f"blocks.{i}.{site}") for site in ("attn.qkv", "mlp.fc1", "mlp.fc2")}
            floor = min(architecture.head_dim, max(1, math.ceil(least)))
            bounds = self._bounds(i, floor)
            branches += branch_ways(statistics, i, widths, limit.size, ranked.round_to, bounds)
        self.allocation = allocate(branches, limit.outside)
        self.dense = limit.outside + architecture.depth * limit.size(architecture.dense_widths)

    def size(self, plan: PruningPlan) -> int:
        """Cost of a plan in the units of the budget."""
        blocks = map(plan.block_widths, range(plan.architecture.depth))
        return self._limit.outside + sum(map(self._limit.size, blocks))

    def _widths(self, name: str) -> list[int]:
        """Numbers of dimensions that a site may keep."""
        sizes = self._ranked.groups.sizes[self._removals[name]]
        full = self._ranked.architecture.site_widths()[name]
        widths = [full, *(full - np.cumsum(sizes)).tolist()]
        left = full - int(self._ranked.absent[name].sum())
        enough = min(width for width in widths if width >= left)
        return [enough] if name in self._ranked.protected else [w for w in widths if w <= enough]

    def _bounds(self, block: int, least_values: int) -> Bounds:
        """What the heads of a block may keep, and which of its branches have to stay."""
        ranked, names = self._ranked, [f"blocks.{block}.{site}" for site in SITES]
        qkv, proj, fc1, fc2 = (name in ranked.protected for name in names)
        heads = (ranked.architecture.num_heads, -1)
        values = (~ranked.absent[names[1]]).reshape(heads).sum(1)
        # A branch that an earlier cut has removed is gone, protected or not.
        no_attention, no_mlp = (any(ranked.absent[n].all() for n in pair) for pair in (names[:2], names[2:]))
        return Bounds(
            least_values=least_values,
            most_values=tuple(values.tolist()),
            most_keys=tuple(ranked.absent[f"blocks.{block}.attn"].tolist()),
            cut_values=not proj,
            cut_keys=not qkv,
            may_lose_attention=no_attention or not (qkv or proj),
            may_lose_mlp=no_mlp or not (fc1 or fc2),
            value_levels=self._value_levels(names[1]) if ranked.architecture.scale_attn_norm else None,
        )

    def _value_levels(self, name: str) -> tuple[tuple[int, ...], ...]:
        """How many inputs of a proj are of each head, for each number that it may keep of them but none."""
        architecture = self._ranked.architecture
        heads = [
            np.asarray(self._kept(name, width)) // architecture.head_dim
            for width in sorted(self._widths(name))
            if width
        ]
        return tuple(tuple(np.bincount(own, minlength=architecture.num_heads).tolist()) for own in heads)

    def plan(self, most: float, budget: Mapping[str, float]) -> PruningPlan:
        """The plan of the least change for at most this cost. Raises PlanError where there is none."""
        _refuse_less_than(self.allocation.least, most, self._limit)
        ways = self.allocation.ways(most)
        architecture, scores = self._ranked.architecture, dict(self._ranked.scores)
        kept: dict[str, tuple[int, ...]] = {}
        keys: dict[str, tuple[int, ...]] = {}
        d = architecture.head_dim
        for i, (attention, mlp) in enumerate(zip(ways[::2], ways[1::2], strict=True)):
            values = attention.widths.values or (0,) * architecture.num_heads
            kept[f"blocks.{i}.attn.qkv"] = self._kept(f"blocks.{i}.attn.qkv", attention.widths.qkv)
            if architecture.scale_attn_norm:
                kept[f"blocks.{i}.attn.proj"] = self._kept(f"blocks.{i}.attn.proj", sum(values))
            else:
                kept[f"blocks.{i}.attn.proj"] = tuple(
                    h * d + j for h, width in enumerate(values) for j in range(width)
                )
                scores[f"blocks.{i}.attn.proj"] = (
                    self._statistics.tensors[f"blocks.{i}.attn.values"].flatten().numpy()
                )
            kept[f"blocks.{i}.mlp.fc1"] = self._kept(f"blocks.{i}.mlp.fc1", mlp.widths.fc1)
            kept[f"blocks.{i}.mlp.fc2"] = self._kept(f"blocks.{i}.mlp.fc2", mlp.widths.fc2)
            keys[f"blocks.{i}.attn"] = tuple(
                width or d for width in attention.widths.keys or (d,) * len(values)
            )
        return self._ranked.plan(
            kept=kept,
            keys=keys,
            scores=scores,
            budget=budget,
            threshold=None,
            value_basis="dimensions" if architecture.scale_attn_norm else "principal",
            predicted_change=sum(way.change for way in ways),
        )

    def _kept(self, name: str, width: int) -> tuple[int, ...]:
        """The best `width` dimensions of a site."""
        total, groups = self._ranked.architecture.site_widths()[name], self._ranked.groups
        if not width:
            return ()
        mask = np.ones(total, dtype=bool)
        for position in self._removals[name]:
            if mask.sum() <= width:
                break
            mask[groups.members[position]] = False
        return tuple(np.flatnonzero(mask).tolist())


def _key_widths(ranked: _Ranked, key_width: float | None) -> dict[str, tuple[int, ...]]:
    """Key widths of the heads of every attention that has narrower ones than the dense model."""
    architecture, d = ranked.architecture, ranked.architecture.head_dim
    width = d
    if key_width is not None:
        if not _is_number(key_width) or not (0 < key_width < 1 or key_width == int(key_width) >= 1):
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


def _is_number(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return value < 1e300 and not value <= -1e300  # also false for NaN, and for integers that no float holds


def _one_budget(**budgets: float | None) -> dict[str, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise PlanError(f"{', '.join(budgets)}: got {sorted(given) or 'none'}, expected exactly one of them")
    ((name, value),) = given.items()
    if name == "rate" and not (_is_number(value) and 0 <= value < 1):
        raise PlanError(f"rate: got {value!r}, expected a share in [0, 1)")
    if not (_is_number(value) and (value > 0 or (value == 0 and name != "latency_ms"))):
        raise PlanError(f"{name}: got {value!r}, expected a positive number")
    return {name: float(value)}


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Dimensions that are kept or removed together, the least important group first.

    names: site of each group; members: its gate indices; slots: its row and column in the array of widths
    that `_widths_array` makes; sizes: how many dimensions it has; absent: how many of the first groups an
    earlier cut has removed.
    """

    names: list[str]
    members: list[np.ndarray]
    slots: np.ndarray
    sizes: np.ndarray
    absent: int


def _groups(
    architecture: Architecture,
    ranks: Mapping[str, np.ndarray],
    round_to: int,
    min_keep: float,
    protected_sites: frozenset[str],
    absent: Mapping[str, np.ndarray],
) -> _Groups:
    """All removable groups in order.

    Equal ranks (gates that are all 1, say) are broken by the place within the vector, so that every site,
    layer and head loses the same share instead of the first layers losing everything.
    """
    names, members, slots, keys = [], [], [], []
    for name, width in architecture.site_widths().items():
        floor = min(width, int(min_keep) if min_keep >= 1 else math.ceil(min_keep * width))
        if name in protected_sites:
            floor = width
        elif _other_site(name) in protected_sites:
            floor = max(floor, 1)
        heads = architecture.num_heads if site_of(name) == "attn.proj" else 1
        per_head = width // heads
        rank, place = ranks[name], np.arange(width) % per_head / per_head
        best_first = np.lexsort((place, -rank, absent[name]))
        protected = np.zeros(width, dtype=bool)
        protected[best_first[:floor]] = True
        protected &= ~absent[name]
        for head in range(heads):
            own = best_first[best_first // per_head == head]
            starts = np.arange(0, per_head, min(round_to, per_head))
            counts = np.diff(starts, append=per_head)
            # Within a vector the order is strict even where means tie: groups go from its end.
            key = np.stack(
                [
                    -starts,
                    -np.add.reduceat(place[own], starts) / counts,
                    np.add.reduceat(rank[own], starts) / counts,
                    ~np.logical_and.reduceat(absent[name][own], starts),
                ]
            )
            removable = ~np.logical_or.reduceat(protected[own], starts)
            keys.append(key[:, removable])
            members += [part for part, free in zip(np.split(own, starts[1:]), removable, strict=True) if free]
            names += [name] * int(removable.sum())
            slots.append(np.full(int(removable.sum()), _slot(architecture, name, head)))
    order = np.lexsort(np.concatenate(keys, axis=1))
    members = [members[i] for i in order]
    sizes = np.array([len(part) for part in members], dtype=np.int64)
    gone = int((~np.concatenate(keys, axis=1)[-1].astype(bool)).sum())
    return _Groups([names[i] for i in order], members, np.concatenate(slots)[order], sizes, gone)


def _slot(architecture: Architecture, name: str, head: int) -> int:
    """Place of a site (and head) in the flattened array of widths, [depth, 3 + heads]."""
    _, block, site = name.split(".", 2)
    column = 3 + head if site == "attn.proj" else ("attn.qkv", "mlp.fc1", "mlp.fc2").index(site)
    return int(block) * (3 + architecture.num_heads) + column


def _widths_array(architecture: Architecture) -> np.ndarray:
    """Dense widths, int64 [depth, 3 + heads]: inputs of qkv, fc1 and fc2, then the values of each head."""
    full = architecture.dense_widths
    return np.array([[full.qkv, full.fc1, full.fc2, *full.values]] * architecture.depth, dtype=np.int64)


def _block_of(row: np.ndarray, keys: tuple[int, ...]) -> BlockWidths:
    qkv, fc1, fc2, *values = row.tolist()
    return BlockWidths(qkv, tuple(values), fc1, fc2, keys)


@dataclasses.dataclass(frozen=True)
class _Limit:
    """A budget, counted in whole units: dimensions, MACs, parameters or nanoseconds.

    name, value: the argument of `make_plan`; most: units that may remain; outside: units outside the blocks;
    size: units of a block; keys: by attention key widths of its heads, where they are not those of the dense
    model; text: a number of units in words.
    """

    name: str
    value: float
    most: float
    outside: int
    size: Callable[[BlockWidths], int]
    keys: Mapping[str, tuple[int, ...]]
    text: Callable[[float], str]


def _limit(
    architecture: Architecture,
    budget: Mapping[str, float],
    table: LatencyTable | None,
    keys: Mapping[str, tuple[int, ...]],
) -> _Limit:
    ((name, value),) = budget.items()
    if name == "rate":
        full = _widths_array(architecture).sum()
        most = full - _removed_at_least(value, full)
        return _Limit(name, value, most, 0, _dimensions, keys, lambda n: f"{n:,.0f} dimensions")
    if name != "latency_ms":

        def size(widths: BlockWidths) -> int:
            return getattr(block_cost(architecture, widths), name)

        outside = getattr(surroundings_cost(architecture), name)
        return _Limit(name, value, value, outside, size, keys, lambda n: f"{n:,.0f} {name}")
    table = _table_for(architecture, table)

    most = math.floor(1e6 * value)
    most += (most + 1) / 1e6 <= value  # a prediction that is asked for again must be met
    outside, size = table.outside_nanoseconds, table.block_nanoseconds
    return _Limit(name, value, most, outside, size, keys, lambda n: f"{n / 1e6:,.6g} ms")


def _dimensions(widths: BlockWidths) -> int:
    """Gates that are left in a block."""
    return widths.qkv + sum(widths.values) + widths.fc1 + widths.fc2


def _refuse_less_than(least: float, most: float, limit: _Limit) -> None:
    if least > most:
        may = limit.text(most).split()[0]
        raise PlanError(
            f"{limit.name}: {limit.value:g} cannot be met: {limit.text(least)} remain when all is removed "
            f"but min_keep and protected parts, more than the {may} that may; protect less, lower min_keep "
            "or cut less"
        )


def _table_for(architecture: Architecture, table: LatencyTable | None) -> LatencyTable:
    table = cached_table(architecture) if table is None else table
    if not isinstance(table, LatencyTable | None):
        raise PlanError(f"latency_table: got {type(table).__name__}, expected a LatencyTable")
    if table is None:
        raise PlanError(
            "latency_ms: there is no latency table of this model for this machine, its versions and this "
            f"number of threads, for one image in float32; {how_to_make_one()}"
        )
    try:
        table.check_geometry(architecture)
    except LatencyTableError as error:
        raise PlanError(f"latency_table: {error}") from error
    return table


def _fit(architecture: Architecture, groups: _Groups, limit: _Limit) -> list[int]:
    """Which groups go (positions in `groups`): the shortest run of least important ones that meets the
    budget, less those that can be given back because the last step (often a whole head) saved too much."""
    full = _widths_array(architecture)

    def size(block: int, row: np.ndarray) -> int:
        return limit.size(_block_of(row, limit.keys.get(f"blocks.{block}.attn", ())))

    def widths_after(count: int) -> np.ndarray:
        gone = np.bincount(groups.slots[:count], groups.sizes[:count], minlength=full.size)
        return full - gone.astype(np.int64).reshape(full.shape)

    def total(widths: np.ndarray) -> int:
        return limit.outside + sum(size(block, row) for block, row in enumerate(widths))

    low, high = groups.absent, len(groups.sizes)
    _refuse_less_than(total(widths_after(high)), limit.most, limit)
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


def _removed_at_least(rate: float, total: int) -> int:
    """Dimensions that a rate removes, rounded up; 0.3 * 10 is 3 although its float is a little more."""
    return math.ceil(round(rate * total, 6))


def _kept_indices(
    architecture: Architecture, groups: _Groups, removed: list[int]
) -> dict[str, tuple[int, ...]]:
    kept = {name: np.ones(width, dtype=bool) for name, width in architecture.site_widths().items()}
    for position in removed:
        kept[groups.names[position]][groups.members[position]] = False
    return {name: tuple(np.flatnonzero(mask).tolist()) for name, mask in kept.items()}
