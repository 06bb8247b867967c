"""Which dimensions of a gated model are kept, and why: scores, a budget, one threshold, kept indices.

The paper (arXiv 2104.08500) sorts |g| over the whole model and cuts at the threshold a rate implies.
Beside it: budgets in MACs, parameters or milliseconds on a measured machine, Taylor scores, cost-aware
scores, ranking per site or layer, widths rounded to a multiple, and a floor under each width.
"""

import dataclasses
import itertools
import json
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from vtp.files import FileError, fingerprint, write_atomic
from vtp.model.architecture import SITES, Architecture, describe
from vtp.model.cost import Cost, attention_cost, in_short, mlp_cost, surroundings_cost
from vtp.pruning.gates import GatedLinear, sites

if TYPE_CHECKING:
    from vtp.pruning.latency_table import LatencyTable

PLAN_VERSION = 1
SCORES = ("gate", "taylor")
SCOPES = ("global", "per_site", "per_layer")


class PlanError(ValueError):
    """A plan that cannot be made, read, or applied; the message names the argument or the site."""


class FrozenDict(Mapping):
    """A mapping that cannot be changed after it is made, and that pickles (unlike MappingProxyType)."""

    def __init__(self, items: Mapping) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> tuple:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))  # equal mappings may differ in order


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What is kept of a gated model. Immutable; prints as a table; saves as JSON.

    Attributes:
        architecture: the dense model the indices refer to.
        kept: site name (`blocks.<i>.<site>`) to kept gate indices, ascending.
        scores: site name to the score of every gate, rounded to 6 significant digits.
        score, scope, per_mac, round_to, min_keep: how the ranking was made (see `make_plan`).
        budget: the one budget asked for, e.g. {"rate": 0.4}.
        threshold: the largest score that was removed, where scores were compared one by one (scope
            "global", not per MAC, round_to 1). Everything above it is kept; what is kept below it is
            protected by `min_keep`, or was given back to use a budget up. None otherwise or if nothing was
            removed.
        parent: fingerprint of the gated weights that were scored (SHA-256, hex), "" if there are none.
    """

    architecture: Architecture
    kept: Mapping[str, tuple[int, ...]]
    scores: Mapping[str, tuple[float, ...]]
    score: str
    scope: str
    per_mac: bool
    round_to: int
    min_keep: float
    budget: Mapping[str, float]
    threshold: float | None
    parent: str

    def __post_init__(self) -> None:
        self._own_values()
        widths = self.architecture.site_widths()
        if list(self.kept) != list(widths):
            raise PlanError(f"kept: got sites {list(self.kept)[:3]}..., expected {list(widths)[:3]}...")
        for name, width in widths.items():
            kept = self.kept[name]
            ascending = all(a < b for a, b in itertools.pairwise(kept))
            if not ascending or (kept and not 0 <= kept[0] <= kept[-1] < width):
                raise PlanError(f"kept[{name!r}]: expected ascending indices in [0, {width})")
            if name in self.scores and len(self.scores[name]) != width:
                raise PlanError(f"scores[{name!r}]: got {len(self.scores[name])} scores, expected {width}")

    def _own_values(self) -> None:
        """Make every field an immutable value of its own type. Raises TypeError or ValueError."""
        values = {
            "kept": {name: tuple(map(operator.index, kept)) for name, kept in self.kept.items()},
            "scores": {name: tuple(map(float, scores)) for name, scores in self.scores.items()},
            "budget": {name: float(value) for name, value in self.budget.items()},
        }
        for field, value in values.items():
            object.__setattr__(self, field, FrozenDict(value))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(self.threshold))

    @property
    def widths(self) -> dict[str, int]:
        """Gates per site before pruning."""
        return self.architecture.site_widths()

    @property
    def head_dim(self) -> int:
        """Value dimensions per head before pruning."""
        return self.architecture.head_dim

    def value_widths(self, block: int) -> tuple[int, ...]:
        """Kept value dimensions of each original head of a block; 0 where the head is removed."""
        heads = np.asarray(self.kept[f"blocks.{block}.attn.proj"], dtype=np.int64) // self.head_dim
        return tuple(np.bincount(heads, minlength=self.architecture.num_heads).tolist())

    @property
    def rate(self) -> float:
        """Share of all gates that is removed."""
        return 1 - sum(map(len, self.kept.values())) / sum(self.widths.values())

    @property
    def cost(self) -> Cost:
        """Exact cost of the compact model, predicted from the widths; equals `vtp.count(compact(...))`."""
        return _model_cost(self.architecture, map(self._block_widths, range(self.architecture.depth)))

    @property
    def dense_cost(self) -> Cost:
        """Cost of the dense model."""
        return _model_cost(self.architecture, [_full_widths(self.architecture)] * self.architecture.depth)

    def _block_widths(self, block: int) -> "_BlockWidths":
        qkv, _, fc1, fc2 = (len(self.kept[f"blocks.{block}.{site}"]) for site in SITES)
        return _BlockWidths(qkv, list(self.value_widths(block)), fc1, fc2)

    def __str__(self) -> str:
        cost, dense = self.cost, self.dense_cost
        ranking = f"{self.score}{' per MAC' if self.per_mac else ''}, {self.scope}"
        budget = ", ".join(f"{name} {value:g}" for name, value in self.budget.items())
        lines = [f"PruningPlan: {budget}; score {ranking}; {self.rate:.1%} of dimensions removed"]
        if self.threshold is not None:
            lines.append(f"threshold {self.threshold:.4g}")
        lines.append(f"{'block':>5} {'qkv':>6} {'proj':>6} {'fc1':>6} {'fc2':>6}   value width of each head")
        for i in range(self.architecture.depth):
            row = self._block_widths(i)
            heads = " ".join(str(width) for width in row.values)
            lines.append(f"{i:>5} {row.qkv:>6} {sum(row.values):>6} {row.fc1:>6} {row.fc2:>6}   {heads}")
        full = _full_widths(self.architecture)
        lines.append(f"dense {full.qkv:>6} {sum(full.values):>6} {full.fc1:>6} {full.fc2:>6}")
        for name, left, whole in (("params", cost.params, dense.params), ("MACs", cost.macs, dense.macs)):
            lines.append(f"{name}: {in_short(left)} of {in_short(whole)} ({left / whole:.1%} left)")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The plan as JSON-able data; the inverse is `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["architecture"] = dataclasses.asdict(self.architecture)
        for name in ("kept", "scores", "budget"):
            fields[name] = dict(fields[name])
        return {"plan_version": PLAN_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: dict) -> "PruningPlan":
        """Raises PlanError if `data` is not a plan of this version, naming what is wrong."""
        if not isinstance(data, dict) or "plan_version" not in data:
            raise PlanError("plan: not a pruning plan (no plan_version)")
        if data["plan_version"] != PLAN_VERSION:
            raise PlanError(
                f"plan: version {data['plan_version']}, expected {PLAN_VERSION}; update vtp to read it"
            )
        fields = {name: value for name, value in data.items() if name != "plan_version"}
        try:
            fields["architecture"] = Architecture.from_dict(fields["architecture"])
            return cls(**fields)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: fields are missing, unknown or of the wrong type ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        text = json.dumps(self.to_dict())
        write_atomic(path, lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan written by `save`. Raises FileError or PlanError with the reason."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise FileError(f"path: cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"path: {path} is not JSON, or it is cut off ({error})") from error
        return cls.from_dict(data)


def make_plan(
    gated: nn.Module,
    *,
    rate: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    latency_table: "LatencyTable | None" = None,
    score: str | Mapping[str, Tensor] = "gate",
    scope: str = "global",
    per_mac: bool = False,
    round_to: int = 1,
    min_keep: float = 0.05,
) -> PruningPlan:
    """Rank all gates of a model and keep the best that a budget allows. The model is not changed.

    Args:
        gated: a model from `insert_gates`, usually after sparse training.
        rate: share of all gates to remove, in [0, 1) (the paper's budget); at least that many go.
        macs: multiply-adds for one image that may remain, e.g. 10.0e9.
        params: parameters that may remain, e.g. 48e6.
        latency_ms: milliseconds that a forward pass of one batch may take, packed by `vtp.optimize`, as
            predicted by `latency_table`. Exactly one of the four budgets; it is never exceeded, and is met
            as closely as whole dimensions allow.
        latency_table: time against width, from `vtp.profile_widths`. None takes the one that
            was measured on this machine for one image in float32, with as many threads as now. A table of
            another machine gives a plan for that machine.
        score: "gate", |g| (the paper); "taylor", the mean of (g * dL/dg)**2 over training steps; or a
            mapping from site name to a score of your own for each gate, larger is more important.
        scope: "global" compares all gates with each other (the paper); "per_site" removes the same share
            from each of the four kinds of site, "per_layer" from each single gate vector.
        per_mac: divide by the MACs that removing the dimension saves. Gates stay near 1 after sparse
            training, where a quotient would only compare costs, so "gate" enters it by its rank.
        round_to: widths become multiples of this (per head for `attn.proj`), or stay whole, for the same
            budget. A group of dimensions is ranked by its mean score.
        min_keep: the best dimensions of each gate vector that are never removed: a share below 1, or a
            number of dimensions. 0 lets heads, branches and layers vanish.

    Raises:
        PlanError: an argument is out of range, a score is missing or not finite, or the budget cannot be
            met; the message names the argument and the least that is possible.
    """
    budget = _one_budget(rate=rate, macs=macs, params=params, latency_ms=latency_ms)
    if latency_table is not None and latency_ms is None:
        raise PlanError("latency_table: got one without latency_ms, the budget that it is for")
    if scope not in SCOPES:
        raise PlanError(f"scope: got {scope!r}, expected one of {SCOPES}")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise PlanError(f"round_to: got {round_to!r}, expected an integer of at least 1")
    if not _is_number(min_keep) or not (0 <= min_keep < 1 or min_keep == int(min_keep) >= 1):
        raise PlanError(f"min_keep: got {min_keep!r}, expected a share in [0, 1) or a number of dimensions")
    layers = sites(gated)
    architecture = describe(gated)
    if list(layers) != list(architecture.site_widths()):
        missing = sorted(architecture.site_widths().keys() - layers.keys())
        raise PlanError(f"gated: no gates at {missing[:4]}; vtp.insert_gates puts them at every site")
    scores = _scores(layers, score)
    ranks = _ranking(architecture, scores, score, scope, per_mac)
    groups = _groups(architecture, ranks, round_to, min_keep)
    removed = _fit(architecture, groups, _limit(architecture, budget, latency_table))
    kept = _kept_indices(architecture, groups, removed)
    one_number = scope == "global" and not per_mac and round_to == 1
    gone = np.concatenate([np.delete(values, kept[name]) for name, values in scores.items()])
    return PruningPlan(
        architecture=architecture,
        kept=kept,
        scores={name: tuple(float(f"{v:.6g}") for v in values) for name, values in scores.items()},
        score=score if isinstance(score, str) else "custom",
        scope=scope,
        per_mac=per_mac,
        round_to=round_to,
        min_keep=min_keep,
        budget=budget,
        threshold=float(f"{gone.max():.6g}") if one_number and gone.size else None,
        parent=fingerprint(gated.state_dict()),
    )


def _is_number(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return abs(value) < 1e300  # also false for NaN, and for integers that no float holds


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


def _scores(layers: Mapping[str, GatedLinear], score: str | Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The score of every gate, float64, larger is more important."""
    scores = {}
    for name, layer in layers.items():
        if isinstance(score, Mapping):
            if name not in score:
                raise PlanError(f"score: no entry for site {name!r}")
            value = score[name]
        elif score == "gate":
            value = layer.gate.detach().abs()
        elif score == "taylor":
            if layer.taylor_steps == 0:
                raise PlanError(
                    f"score: 'taylor' has no statistics at {name}; sparse training collects them, or call "
                    "accumulate_taylor() on each gated layer after a backward pass"
                )
            value = layer.taylor / layer.taylor_steps
        else:
            raise PlanError(f"score: got {score!r}, expected one of {SCORES} or a mapping")
        try:
            values = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, float)
        except (TypeError, ValueError) as error:
            raise PlanError(f"score[{name!r}]: expected numbers ({error})") from error
        if values.shape != (layer.in_features,):
            raise PlanError(f"score[{name!r}]: got shape {values.shape}, expected ({layer.in_features},)")
        if not np.isfinite(values).all():
            raise PlanError(f"score[{name!r}]: contains NaN or infinity, so gates cannot be ranked")
        scores[name] = values
    return scores


def _ranking(
    architecture: Architecture,
    scores: Mapping[str, np.ndarray],
    score: str | Mapping[str, Tensor],
    scope: str,
    per_mac: bool,
) -> dict[str, np.ndarray]:
    """Scores made comparable over the whole model, so that one global cut obeys `scope` and `per_mac`."""
    if per_mac:
        values = _quantiles(scores, lambda name: "") if score == "gate" else scores
        saved = _macs_of_one_dimension(architecture)
        values = {name: value / saved[_site_of(name)] for name, value in values.items()}
    else:
        values = dict(scores)
    if scope == "global":
        return values
    return _quantiles(values, _site_of if scope == "per_site" else str)


def _site_of(name: str) -> str:
    """`blocks.3.attn.qkv` to `attn.qkv`."""
    return name.split(".", 2)[2]


def _quantiles(scores: Mapping[str, np.ndarray], family_of: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Replace each score by its rank in (0, 1) among the scores of its family; ties share their mean rank."""
    ranks = {}
    for family in {family_of(name) for name in scores}:
        members = [name for name in scores if family_of(name) == family]
        values = np.concatenate([scores[name] for name in members])
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_rank = (np.cumsum(counts) - counts / 2) / len(values)
        split = np.cumsum([len(scores[name]) for name in members])[:-1]
        ranks |= dict(zip(members, np.split(mean_rank[inverse], split), strict=True))
    return {name: ranks[name] for name in scores}


def _macs_of_one_dimension(architecture: Architecture) -> dict[str, float]:
    """MACs that one dimension of a site costs in the dense model, relative to their mean."""
    full = _full_widths(architecture)
    whole = full.cost(architecture).macs
    fewer_values = [full.values[0] - 1, *full.values[1:]]
    less = (
        dataclasses.replace(full, qkv=full.qkv - 1),
        dataclasses.replace(full, values=fewer_values),
        dataclasses.replace(full, fc1=full.fc1 - 1),
        dataclasses.replace(full, fc2=full.fc2 - 1),
    )
    saved = {s: whole - one_less.cost(architecture).macs for s, one_less in zip(SITES, less, strict=True)}
    mean = sum(saved.values()) / len(saved)
    return {site: macs / mean for site, macs in saved.items()}


@dataclasses.dataclass
class _BlockWidths:
    """Kept widths of one block: inputs of qkv, values per head, inputs of fc1, inputs of fc2."""

    qkv: int
    values: list[int]
    fc1: int
    fc2: int

    def cost(self, architecture: Architecture) -> Cost:
        return attention_cost(architecture, self.qkv, self.values) + mlp_cost(
            architecture, self.fc1, self.fc2
        )


def _full_widths(architecture: Architecture) -> _BlockWidths:
    width, heads = architecture.embed_dim, architecture.num_heads
    return _BlockWidths(width, [architecture.head_dim] * heads, width, architecture.mlp_hidden)


def _model_cost(architecture: Architecture, blocks: Iterator[_BlockWidths] | Sequence[_BlockWidths]) -> Cost:
    return sum((block.cost(architecture) for block in blocks), surroundings_cost(architecture))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Dimensions that are kept or removed together, the least important group first.

    names: site of each group; members: its gate indices; slots: its row and column in the array of widths
    that `_widths_array` makes; sizes: how many dimensions it has.
    """

    names: list[str]
    members: list[np.ndarray]
    slots: np.ndarray
    sizes: np.ndarray


def _groups(
    architecture: Architecture, ranks: Mapping[str, np.ndarray], round_to: int, min_keep: float
) -> _Groups:
    """All removable groups in order.

    Equal ranks (gates that are all 1, say) are broken by the place within the vector, so that every site,
    layer and head loses the same share instead of the first layers losing everything.
    """
    names, members, slots, keys = [], [], [], []
    for name, width in architecture.site_widths().items():
        floor = min(width, int(min_keep) if min_keep >= 1 else math.ceil(min_keep * width))
        heads = architecture.num_heads if _site_of(name) == "attn.proj" else 1
        per_head = width // heads
        rank, place = ranks[name], np.arange(width) % per_head / per_head
        best_first = np.lexsort((place, -rank))
        protected = np.zeros(width, dtype=bool)
        protected[best_first[:floor]] = True
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
    return _Groups([names[i] for i in order], members, np.concatenate(slots)[order], sizes)


def _slot(architecture: Architecture, name: str, head: int) -> int:
    """Place of a site (and head) in the flattened array of widths, [depth, 3 + heads]."""
    _, block, site = name.split(".", 2)
    column = 3 + head if site == "attn.proj" else ("attn.qkv", "mlp.fc1", "mlp.fc2").index(site)
    return int(block) * (3 + architecture.num_heads) + column


def _widths_array(architecture: Architecture) -> np.ndarray:
    """Dense widths, int64 [depth, 3 + heads]: inputs of qkv, fc1 and fc2, then the values of each head."""
    full = _full_widths(architecture)
    return np.array([[full.qkv, full.fc1, full.fc2, *full.values]] * architecture.depth, dtype=np.int64)


def _block_of(row: np.ndarray) -> "_BlockWidths":
    qkv, fc1, fc2, *values = row.tolist()
    return _BlockWidths(qkv, values, fc1, fc2)


@dataclasses.dataclass(frozen=True)
class _Limit:
    """A budget, counted in whole units: dimensions, MACs, parameters or nanoseconds.

    name, value: the argument of `make_plan`; most: units that may remain; outside: units outside the blocks;
    size: units of a block, from its row of widths; text: a number of units in words.
    """

    name: str
    value: float
    most: float
    outside: int
    size: Callable[[np.ndarray], int]
    text: Callable[[float], str]


def _limit(architecture: Architecture, budget: Mapping[str, float], table: "LatencyTable | None") -> _Limit:
    ((name, value),) = budget.items()
    if name == "rate":
        full = _widths_array(architecture).sum()
        most = full - _removed_at_least(value, full)
        return _Limit(name, value, most, 0, lambda row: int(row.sum()), lambda n: f"{n:,.0f} dimensions kept")
    if name != "latency_ms":

        def size(row: np.ndarray) -> int:
            return getattr(_block_of(row).cost(architecture), name)

        outside = getattr(surroundings_cost(architecture), name)
        return _Limit(name, value, value, outside, size, lambda n: f"{n:,.0f} {name}")
    table = _table_for(architecture, table)

    def nanoseconds(row: np.ndarray) -> int:
        block = _block_of(row)
        return table.block_nanoseconds(block.qkv, block.values, block.fc1, block.fc2)

    most = math.floor(1e6 * value)
    most += (most + 1) / 1e6 <= value  # a prediction that is asked for again must be met
    return _Limit(name, value, most, table.outside_nanoseconds, nanoseconds, lambda n: f"{n / 1e6:,.6g} ms")


def _table_for(architecture: Architecture, table: "LatencyTable | None") -> "LatencyTable":
    # Packing and measuring, which no other budget needs; and they import this module.
    from vtp.pruning.latency_table import LatencyTable, LatencyTableError, cached_table, how_to_make_one

    table = cached_table(architecture) if table is None else table
    if not isinstance(table, LatencyTable | None):
        raise PlanError(f"latency_table: got {type(table).__name__}, expected a LatencyTable")
    if table is None:
        raise PlanError(
            "latency_ms: there is no latency table of this model for this machine, its versions and this "
            f"number of threads, for one image in float32; {how_to_make_one()}"
        )
    try:
        table.refuse_others(architecture)
    except LatencyTableError as error:
        raise PlanError(f"latency_table: {error}") from error
    return table


def _fit(architecture: Architecture, groups: _Groups, limit: _Limit) -> list[int]:
    """Which groups go (positions in `groups`): the shortest run of least important ones that meets the
    budget, less those that can be given back because the last step (often a whole head) saved too much."""
    full, size = _widths_array(architecture), limit.size

    def widths_after(count: int) -> np.ndarray:
        gone = np.bincount(groups.slots[:count], groups.sizes[:count], minlength=full.size)
        return full - gone.astype(np.int64).reshape(full.shape)

    def total(widths: np.ndarray) -> int:
        return limit.outside + sum(map(size, widths))

    low, high = 0, len(groups.sizes)
    least = total(widths_after(high))
    if least > limit.most:
        raise PlanError(
            f"{limit.name}: {limit.value:g} cannot be met: {limit.text(least)} remain when everything but "
            f"min_keep is removed, at most {limit.text(limit.most).split()[0]} may; "
            "lower min_keep or cut less"
        )
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
        row = widths[slot // full.shape[1]]
        # A vector gives back its best group first, or none: else its order would not be that of the scores.
        if slack > 0 and slot not in exhausted:
            before = size(row)
            row[slot % full.shape[1]] += groups.sizes[position]
            added = size(row) - before
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
