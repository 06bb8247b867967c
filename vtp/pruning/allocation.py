"""The best widths for a budget, from measured curves: exact dynamic programming over the branches of a model.

A branch can be cut in some thousand ways, each with a cost and with a change of the model's output that
`vtp.calibrate` measured, or scaled from what it measured (`Statistics`). Changes of units that were cut alone
are added up: what one does to another is left to the refit. Of a branch's ways only those are kept that no
other beats in both cost and change; then the least change for every budget follows branch by branch (Kurtic,
Frantar and Alistarh, "ZipLM", NeurIPS 2023, arXiv 2302.04089, find layer widths alike).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vtp.model.widths import SITES, BlockWidths
from vtp.pruning.calibration import Statistics

_Width = TypeVar("_Width")
_STEPS = 10_000  # of the budget
_MOST_WIDTHS = 24  # of one kind that are tried in a branch, spread over all that are possible
_LEAST = 1e-300
_MOST = math.log(1e300)  # of a change; a factor that was measured where there was no error may be anything


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to cut a branch: its widths (the other branch's are 0), their cost, and what they change."""

    widths: BlockWidths
    cost: int
    change: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the ways to cut a block may do.

    Attributes:
        least_values: kept of a head that is not removed, where it has as many.
        most_values, most_keys: of each head, what an earlier cut has left of it.
        value_levels: of all heads, fewest first, which alone are tried, where a norm before proj is over the
            values as they are; None elsewhere.
        cut_values, cut_keys: whether fewer may stay.
        may_lose_attention, may_lose_mlp: whether the branch may be removed whole.
    """

    least_values: int
    most_values: tuple[int, ...]
    most_keys: tuple[int, ...]
    cut_values: bool = True
    cut_keys: bool = True
    may_lose_attention: bool = True
    may_lose_mlp: bool = True
    value_levels: tuple[tuple[int, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Allocation:
    """The least change for every budget: `ways(most)`.

    Attributes:
        branches: ways of each branch, attention and feed-forward in turn, cheapest first.
        outside: cost of all that no branch has a part in.
        unit: cost of a step of the tables; chosen: for each branch and number of steps, the way taken.
    """

    branches: Sequence[Sequence[Way]]
    outside: int
    unit: float
    chosen: Sequence[np.ndarray]

    @property
    def least(self) -> int:
        """Cost of the cheapest model."""
        return self.outside + sum(ways[0].cost for ways in self.branches)

    def ways(self, most: float) -> list[Way]:
        """A way for each branch, of at most this cost in all (at least `least`); the least change there is.

        What rounding to steps leaves of the budget goes to the branches that gain most by it.
        """
        step = min(math.floor(max(most - self.outside, 0) / self.unit), len(self.chosen[0]) - 1)
        found: list[Way] = []
        for ways, chosen in zip(reversed(self.branches), reversed(self.chosen), strict=True):
            way = ways[max(chosen[step], 0)]
            found.insert(0, way)
            step = max(step - math.ceil(way.cost / self.unit), 0)
        return self._filled(found, most)

    def _filled(self, found: list[Way], most: float) -> list[Way]:
        slack = most - self.outside - sum(way.cost for way in found)
        while True:
            gains = [
                ((way.change - better.change) / (better.cost - way.cost), branch, better)
                for branch, way in enumerate(found)
                for better in self.branches[branch]
                if 0 < better.cost - way.cost <= slack and better.change < way.change
            ]
            if not gains:
                return found
            _, branch, better = max(gains, key=lambda gain: gain[0])
            slack -= better.cost - found[branch].cost
            found[branch] = better


def allocate(branches: Sequence[Sequence[Way]], outside: int) -> Allocation:
    """Find the least change for every budget up to that of the dense model."""
    branches = [front(ways) for ways in branches]
    unit = max(sum(ways[-1].cost for ways in branches) / _STEPS, 1e-9)
    size = _STEPS + len(branches) + 1  # each branch's cost is rounded up to a step
    best, chosen = np.zeros(size), []
    for ways in branches:
        changes, taken = np.full(size, np.inf), np.full(size, -1)
        for index, way in enumerate(ways):
            steps = math.ceil(way.cost / unit)
            with_way = np.full(size, np.inf)
            with_way[steps:] = best[: size - steps] + way.change
            better = with_way < changes
            changes[better], taken[better] = with_way[better], index
        best = changes
        chosen.append(taken)
    return Allocation(branches, outside, unit, chosen)


def front(ways: Iterable[Way]) -> list[Way]:
    """Those that no other beats in cost and change, cheapest first."""
    kept: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.cost, way.change)):
        if not kept or way.change < kept[-1].change:
            kept.append(way)
    return kept


def branch_ways(
    statistics: Statistics,
    block: int,
    widths: Mapping[str, Sequence[int]],
    size: Callable[[BlockWidths], int],
    round_to: int,
    bounds: Bounds,
) -> tuple[list[Way], list[Way]]:
    """All ways to cut the two branches of a block.

    Args:
        widths: numbers of inputs that qkv, fc1 and fc2 may keep, by site.
        size: cost of a block in whole units.
        round_to: of which the widths of heads become multiples, or stay whole.
        bounds: what may be cut.
    """
    architecture, curves = statistics.architecture, _Curves(statistics, block)
    nothing = size(BlockWidths())

    def cost(widths: BlockWidths) -> int:
        # What a block without branches has is half of each of them: constants, in parameters.
        return size(widths) - nothing + nothing // 2

    tried = {site: _spread(sorted(numbers)) for site, numbers in widths.items()}
    # Heads first, at all inputs: what is beaten there is beaten, or nearly, at fewer.
    heads = []
    stay = architecture.scale_attn_norm  # heads, whatever is left of them behind the norm
    change_of_keys = functools.cache(curves.keys)  # many value levels leave the same heads
    for values in curves.value_levels(round_to, bounds):
        change_of_values = curves.values(values)
        for level in curves.key_levels(round_to, bounds):
            keys = tuple(key if value or stay else 0 for key, value in zip(level, values, strict=True))
            own = BlockWidths(architecture.embed_dim, values, keys=keys)
            heads.append(Way(own, cost(own), change_of_values + change_of_keys(keys)))
    attention, mlp = [], []
    if bounds.may_lose_attention:
        attention.append(Way(BlockWidths(), cost(BlockWidths()), curves.values((0,) * curves.heads)))
    for way in front(heads):
        for number in filter(None, tried["attn.qkv"]):
            own = dataclasses.replace(way.widths, qkv=number)
            attention.append(Way(own, cost(own), way.change + float(curves.inputs["attn.qkv"][number])))
    into, hidden = curves.inputs["mlp.fc1"], curves.inputs["mlp.fc2"]
    if bounds.may_lose_mlp:
        mlp.append(Way(BlockWidths(), cost(BlockWidths()), float(hidden[0])))
    for fc1 in filter(None, tried["mlp.fc1"]):
        for fc2 in filter(None, tried["mlp.fc2"]):
            own = BlockWidths(fc1=fc1, fc2=fc2)
            mlp.append(Way(own, cost(own), float(into[fc1] + hidden[fc2])))
    return attention, mlp


class _Curves:
    """The changes of a block's units at every width."""

    def __init__(self, statistics: Statistics, block: int) -> None:
        architecture = statistics.architecture
        self.heads, self.head_dim = architecture.num_heads, architecture.head_dim

        def of(name: str) -> np.ndarray:
            return statistics.tensors[f"blocks.{block}.{name}"].numpy()

        self.inputs = {
            site: rescaled(of(f"{site}.errors")[::-1], of(f"{site}.changes"))
            for site in SITES
            if f"blocks.{block}.{site}.changes" in statistics.tensors
        }
        if "attn.proj" not in self.inputs:
            self.value_energies = of("attn.values")
            self._value_points = of("attn.values.changes")
        narrow = f"blocks.{block}.attn.keys" in statistics.tensors
        self.key_energies = of("attn.keys") if narrow else None
        self._key_points = of("attn.keys.changes") if narrow else None

    def value_levels(self, round_to: int, bounds: Bounds) -> list[tuple[int, ...]]:
        """Value widths that are tried."""
        if bounds.value_levels is not None:
            return _spread(bounds.value_levels)
        if not bounds.cut_values:
            return [bounds.most_values]
        return _levels(
            self.value_energies, round_to, bounds.least_values, bounds.most_values, whole_heads=True
        )

    def key_levels(self, round_to: int, bounds: Bounds) -> list[tuple[int, ...]]:
        """Key widths that are tried; those that are left alone where keys have norms."""
        if self.key_energies is None or not bounds.cut_keys:
            return [bounds.most_keys]
        return _levels(self.key_energies, round_to, 1, bounds.most_keys, whole_heads=False)

    def values(self, widths: Sequence[int]) -> float:
        """Change with so many values left of each head."""
        if "attn.proj" in self.inputs:
            return float(self.inputs["attn.proj"][sum(widths)])
        return self._change(self.value_energies, self._value_points, widths, range(self.heads))

    def keys(self, widths: Sequence[int]) -> float:
        """Change with so many keys left of each head; heads with 0 are gone and count for nothing."""
        if self.key_energies is None:
            return 0.0
        alive = [head for head in range(self.heads) if widths[head]]
        return self._change(self.key_energies, self._key_points, widths, alive)

    def _change(
        self, energies: np.ndarray, points: np.ndarray, widths: Sequence[int], heads: Iterable[int]
    ) -> float:
        left = np.concatenate(
            [np.cumsum(energies[:, ::-1], axis=1)[:, ::-1], np.zeros((self.heads, 1))], axis=1
        )
        error = sum(left[head, widths[head]] for head in heads)
        even = left[:, (points[:, 0] // self.heads).astype(int)].sum(0)  # all heads were cut alike there
        return float(_times(error, sum(widths), points[:, 0], _factors(points, even)))


def rescaled(errors: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Changes at every width, from errors at every width and changes that were measured at some.

    The factor between the two is interpolated in its logarithm, and what comes of it never rises with width.
    """
    factors = _factors(points, errors[points[:, 0].astype(int)])
    return np.minimum.accumulate(_times(errors, np.arange(len(errors)), points[:, 0], factors))


def _factors(points: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Logarithms of what turns the errors at the measured points to the changes there."""
    return np.log(np.maximum(points[:, 1], _LEAST)) - np.log(np.maximum(errors, _LEAST))


def _times(error: Any, width: Any, at: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Errors at these widths, times a factor that is known `at` some; 0 where either is."""
    logarithm = np.log(np.maximum(error, _LEAST)) + np.interp(width, at, factors)
    some = np.greater(error, 0) & (logarithm > math.log(10 * _LEAST))
    return np.where(some, np.exp(np.minimum(logarithm, _MOST)), 0.0)


def _spread(widths: Sequence[_Width]) -> list[_Width]:
    """At most `_MOST_WIDTHS` of ascending widths, the first and the last among them."""
    at = np.unique(np.linspace(0, len(widths) - 1, _MOST_WIDTHS).round().astype(int))
    return [widths[i] for i in at]


def _levels(
    energies: np.ndarray, round_to: int, least: int, most: tuple[int, ...], *, whole_heads: bool
) -> list[tuple[int, ...]]:
    """Widths of all heads, `most` and less, for some levels of energy above which directions are kept.

    With `whole_heads` also those in which the heads that carry least are gone.
    """
    heads = len(energies)
    found: dict[tuple[int, ...], None] = {most: None}
    ordered = np.sort(energies.ravel())
    levels = ordered[np.linspace(0, len(ordered) - 1, _MOST_WIDTHS).round().astype(int)]
    weakest = np.argsort(energies.sum(1), kind="stable")
    for gone in range(heads) if whole_heads else (0,):
        for level in levels if gone % max(1, heads // 4) == 0 else ():
            widths = (energies > level).sum(1)
            widths = np.minimum(most, -(-np.maximum(widths, least) // round_to) * round_to)
            widths[weakest[:gone]] = 0
            found[tuple(int(width) for width in widths)] = None
    return list(found)
