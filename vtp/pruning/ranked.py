"""All dimensions of a model in the order in which they go, in groups that go together."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from vtp.choices import SCOPES
from vtp.files import fingerprint
from vtp.model.architecture import Architecture, describe
from vtp.model.widths import SITES
from vtp.pruning.budget import is_number
from vtp.pruning.calibration import Statistics
from vtp.pruning.gates import sites, with_gates
from vtp.pruning.plan import PlanError, PruningPlan
from vtp.pruning.removed import removed_before
from vtp.pruning.scores import ranking, site_of, site_scores


@dataclasses.dataclass(frozen=True)
class Groups:
    """Dimensions that are kept or removed together, the least important group first.

    names: site of each group; members: its gate indices; slots: its row and column in the array of widths
    that `widths_array` makes; sizes: how many dimensions it has; absent: how many of the first groups an
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
) -> Groups:
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
    return Groups([names[i] for i in order], members, np.concatenate(slots)[order], sizes, gone)


def _slot(architecture: Architecture, name: str, head: int) -> int:
    """Place of a site (and head) in the flattened array of widths, [depth, 3 + heads]."""
    _, block, site = name.split(".", 2)
    column = 3 + head if site == "attn.proj" else ("attn.qkv", "mlp.fc1", "mlp.fc2").index(site)
    return int(block) * (3 + architecture.num_heads) + column


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A model whose dimensions are ranked, and how.

    protected: sites that are not cut; absent: see `removed_before`; protect: what was asked for.
    """

    architecture: Architecture
    scores: Mapping[str, np.ndarray]
    groups: Groups
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


def rank_dimensions(
    model: nn.Module,
    statistics: Statistics | None,
    score: str | Mapping[str, Tensor] | None,
    scope: str,
    per_mac: bool,
    round_to: int,
    min_keep: float,
    protect: str | Iterable[str],
) -> Ranked:
    """Rank all dimensions, once the arguments are checked."""
    if scope not in (*SCOPES, "optimal"):
        raise PlanError(f"scope: got {scope!r}, expected one of {(*SCOPES, 'optimal')}")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise PlanError(f"round_to: got {round_to!r}, expected an integer of at least 1")
    if not is_number(min_keep) or not (0 <= min_keep < 1 or min_keep == int(min_keep) >= 1):
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
    return Ranked(
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
