"""Which dimensions of a gated model are kept, and why: scores, a budget, one threshold, kept indices.

The paper (arXiv 2104.08500) sorts |g| over the whole model and cuts at the threshold a rate implies.
Beside it: budgets in MACs, parameters or milliseconds on a measured machine, Taylor scores, cost-aware
scores, ranking per site or layer, widths rounded to a multiple, and a floor under each width.
"""

import dataclasses
import itertools
import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vtp.files import FileError, write_atomic
from vtp.kinds import PLAN, refuse_other_kinds
from vtp.model.architecture import Architecture
from vtp.model.cost import Cost, abbreviated, model_cost
from vtp.model.widths import SITES, BlockWidths

PLAN_VERSION = 2  # 1 had neither keys, value_basis nor predicted_change; it is read as what it meant
VALUE_BASES = ("dimensions", "principal")


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
    """What is kept of a dense or gated model. Immutable; prints as a table; saves as JSON.

    Attributes:
        architecture: the dense model the indices refer to.
        kept: site name (`blocks.<i>.<site>`) to kept gate indices, ascending. With value_basis "principal"
            those of `attn.proj` count the principal directions of each head's values, the largest first.
        scores: site name to the score of every gate, rounded to 6 significant digits.
        score, scope, per_mac, round_to, min_keep: how the ranking was made (see `make_plan`).
        budget: the one budget asked for, e.g. {"rate": 0.4}.
        threshold: the largest score that was removed, where scores were compared one by one (scope
            "global", not per MAC, round_to 1). Everything above it is kept; what is kept below it is
            protected by `min_keep`, or was given back to use a budget up. None otherwise or if nothing was
            removed.
        parent: fingerprint of the gated weights that were scored (SHA-256, hex), "" if there are none.
        keys: attention name (`blocks.<i>.attn`) to the width of each head's queries and keys, from 1 on; a
            head without values is removed whatever it says. Missing names have the width of the dense model.
        value_basis: "dimensions", values are cut to some of their own dimensions; "principal", first turned,
            head by head, to the directions that matter most to the output (see `pruning/refit.py`).
        predicted_change: with scope "optimal", the sum of the changes of the output that were measured for
            each cut alone, in the unit of `Statistics.change`; else None.
        protect: the parts that were not to be cut.
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
    keys: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    value_basis: str = "dimensions"
    predicted_change: float | None = None
    protect: tuple[str, ...] = ()

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
        if self.value_basis not in VALUE_BASES:
            raise PlanError(f"value_basis: got {self.value_basis!r}, expected one of {VALUE_BASES}")
        if self.value_basis != "dimensions" and self.architecture.scale_attn_norm:
            raise PlanError(
                f"value_basis: got {self.value_basis!r}, expected 'dimensions': the norm before proj is over "
                "the values as they are"
            )
        object.__setattr__(self, "keys", FrozenDict(self._checked_keys()))

    def _checked_keys(self) -> dict[str, tuple[int, ...]]:
        """An entry for every attention. Raises PlanError."""
        names = [f"blocks.{i}.attn" for i in range(self.architecture.depth)]
        if unknown := sorted(set(self.keys) - set(names)):
            raise PlanError(f"keys: got {unknown[:3]}, expected names like {names[0]!r}")
        full, keys = (self.head_dim,) * self.architecture.num_heads, {}
        for name in names:
            keys[name] = widths = self.keys.get(name, full)
            if len(widths) != len(full) or not all(1 <= width <= self.head_dim for width in widths):
                raise PlanError(
                    f"keys[{name!r}]: got {widths}, expected {len(full)} widths from 1 to {self.head_dim}"
                )
            if self.architecture.whole_keys and widths != full:
                raise PlanError(
                    f"keys[{name!r}]: got {widths}, expected {self.head_dim} a head: "
                    f"{self.architecture.whole_keys_reason}"
                )
        return keys

    def _own_values(self) -> None:
        """Make every field an immutable value of its own type. Raises TypeError or ValueError."""
        values: dict[str, Mapping[str, Any]] = {
            "kept": {name: tuple(map(operator.index, kept)) for name, kept in self.kept.items()},
            "keys": {name: tuple(map(operator.index, widths)) for name, widths in self.keys.items()},
            "scores": {name: tuple(map(float, scores)) for name, scores in self.scores.items()},
            "budget": {name: float(value) for name, value in self.budget.items()},
        }
        for field, value in values.items():
            object.__setattr__(self, field, FrozenDict(value))
        if isinstance(self.protect, str) or not all(isinstance(part, str) for part in self.protect):
            raise PlanError(f"protect: got {self.protect!r}, expected names of parts")
        object.__setattr__(self, "protect", tuple(self.protect))
        for field in ("threshold", "predicted_change"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, float(getattr(self, field)))

    @property
    def widths(self) -> dict[str, int]:
        """Gates per site before pruning."""
        return self.architecture.site_widths()

    @property
    def head_dim(self) -> int:
        """Value dimensions per head before pruning."""
        return self.architecture.head_dim

    def value_widths(self, block: int) -> tuple[int, ...]:
        """Kept value dimensions of each original head of a block; 0 where the head is removed.

        With a norm before proj they are those that proj reads of what the heads put out: none is removed.
        """
        heads = np.asarray(self.kept[f"blocks.{block}.attn.proj"], dtype=np.int64) // self.head_dim
        return tuple(np.bincount(heads, minlength=self.architecture.num_heads).tolist())

    def key_widths(self, block: int) -> tuple[int, ...]:
        """Width of the queries and keys of each original head of a block; 0 where the head is removed."""
        values = self.value_widths(block)
        if self.architecture.scale_attn_norm:
            values = (sum(values),) * len(values)
        pairs = zip(self.keys[f"blocks.{block}.attn"], values, strict=True)
        return tuple(key if value else 0 for key, value in pairs)

    @property
    def narrows_keys(self) -> bool:
        """Whether a head that is left has narrower queries and keys than the dense model."""
        blocks = range(self.architecture.depth)
        return any(0 < width < self.head_dim for i in blocks for width in self.key_widths(i))

    @property
    def needs_images(self) -> bool:
        """Whether the cut turns values, or narrows queries and keys, which takes images (`vtp.compact`)."""
        narrow = self.narrows_keys
        if self.value_basis == "dimensions":
            return narrow
        blocks = range(self.architecture.depth)
        return narrow or any(0 < w < self.head_dim for i in blocks for w in self.value_widths(i))

    @property
    def rate(self) -> float:
        """Share of all gates that is removed."""
        return 1 - sum(map(len, self.kept.values())) / sum(self.widths.values())

    @property
    def cost(self) -> Cost:
        """Exact cost of the compact model, predicted from the widths; equals `vtp.count(compact(...))`."""
        return model_cost(self.architecture, map(self.block_widths, range(self.architecture.depth)))

    @property
    def dense_cost(self) -> Cost:
        """Cost of the dense model."""
        return model_cost(self.architecture, [self.architecture.dense_widths] * self.architecture.depth)

    def block_widths(self, block: int) -> BlockWidths:
        """Kept widths of a block."""
        qkv, _, fc1, fc2 = (len(self.kept[f"blocks.{block}.{site}"]) for site in SITES)
        return BlockWidths(qkv, self.value_widths(block), fc1, fc2, self.key_widths(block))

    def __str__(self) -> str:
        cost, dense = self.cost, self.dense_cost
        ranking = f"{self.score}{' per MAC' if self.per_mac else ''}, {self.scope}"
        budget = ", ".join(f"{name} {value:g}" for name, value in self.budget.items())
        lines = [f"PruningPlan: {budget}; score {ranking}; {self.rate:.1%} of dimensions removed"]
        if self.threshold is not None:
            lines.append(f"threshold {self.threshold:.4g}")
        if self.protect:
            lines.append(f"not to be cut: {', '.join(self.protect)}")
        narrow = self.narrows_keys
        heads = "key and value width of each head" if narrow else "value width of each head"
        lines.append(f"{'block':>5} {'qkv':>6} {'proj':>6} {'fc1':>6} {'fc2':>6}   {heads}")
        for i in range(self.architecture.depth):
            row = self.block_widths(i)
            pairs = zip(row.keys, row.values, strict=True)
            heads = " ".join(f"{key}/{value}" if narrow else str(value) for key, value in pairs)
            lines.append(f"{i:>5} {row.qkv:>6} {sum(row.values):>6} {row.fc1:>6} {row.fc2:>6}   {heads}")
        full = self.architecture.dense_widths
        lines.append(f"dense {full.qkv:>6} {sum(full.values):>6} {full.fc1:>6} {full.fc2:>6}")
        for name, left, whole in (("params", cost.params, dense.params), ("MACs", cost.macs, dense.macs)):
            lines.append(f"{name}: {abbreviated(left)} of {abbreviated(whole)} ({left / whole:.1%} left)")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The plan as JSON-able data; the inverse is `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["architecture"] = dataclasses.asdict(self.architecture)
        for name in ("kept", "scores", "budget", "keys"):
            fields[name] = dict(fields[name])
        return {"plan_version": PLAN_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: dict) -> "PruningPlan":
        """Raises PlanError if `data` is not a plan of this version, naming what is wrong."""
        if not isinstance(data, dict) or "plan_version" not in data:
            raise PlanError("plan: not a pruning plan (no plan_version)")
        if data["plan_version"] not in (1, PLAN_VERSION):
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
            refuse_other_kinds(path, PLAN)
            raise FileError(f"path: cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            refuse_other_kinds(path, PLAN)
            raise PlanError(f"path: {path} is not JSON, or it is cut off ({error})") from error
        refuse_other_kinds(path, PLAN)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"path: {path}: {str(error).removeprefix('plan: ')}") from error
