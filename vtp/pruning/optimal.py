"""Plans of the best widths for any budget: what `make_plan` does with the scope "optimal"."""

import math
from collections.abc import Mapping

import numpy as np

from vtp.model.widths import SITES
from vtp.pruning.allocation import Bounds, Way, allocate, branch_ways
from vtp.pruning.budget import Limit, refuse_less_than
from vtp.pruning.calibration import Statistics
from vtp.pruning.plan import PruningPlan
from vtp.pruning.ranked import Ranked


class OptimalWidths:
    """Plans of the best widths for any budget."""

    def __init__(self, ranked: Ranked, statistics: Statistics, limit: Limit) -> None:
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
        refuse_less_than(self.allocation.least, most, self._limit)
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
