"""Time against width on this machine: a table measured once, and what it says a plan will take.

A block's time is that of its two branches. A feed-forward branch depends on two widths (inputs of fc1, inputs
of fc2); an attention branch on four (inputs of qkv, heads alive, values of a head, keys of a head). Each
product's time is near to linear in each of its widths alone, so a coarse grid of measured branches and
multilinear interpolation between them says what any plan takes:

    time = outside + sum over blocks (mean over heads of attention(qkv, heads, values, keys) + mlp(fc1, fc2))

`runtime/latency_profile.py` measures the tables. They are for the CPU, for one batch size, dtype and number
of threads, and are kept as JSON under `$VTP_CACHE`, else `$XDG_CACHE_HOME/vtp`, else `~/.cache/vtp`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtp.files import FileError, cache_folder, refuse_unwritable, write_atomic
from vtp.kinds import LATENCY_TABLE, refuse_other_kinds
from vtp.machine import environment, vector_flags
from vtp.model.architecture import Architecture
from vtp.model.widths import BlockWidths
from vtp.pruning.compact import CompactModel
from vtp.pruning.plan import FrozenDict, PruningPlan
from vtp.words import counted
from vtp_kernels.library import cpp_unsupported_reason

TABLE_VERSION = 2  # 1 had no key widths: what narrow keys save cannot be told from it, so it is refused
_MOST_MS = 1e9  # of anything: eleven days
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of an Architecture; blocks are alike, the packed weights contain biases and scales, and nothing is dropped.
_WITHOUT_EFFECT = {
    "depth", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "drop_path_rate", "norm_eps", "init_values", "qkv_bias", "proj_bias", "glu", "eva", "scale_attn_norm",
    "scale_mlp_norm",
}  # fmt: skip


class LatencyTableError(ValueError):
    """A table that is damaged, or of another model than it is asked about; the message says which."""


# --------------------------------------------------------------------------------
# The table


@dataclasses.dataclass(frozen=True)
class Grid:
    """Times of one branch at every combination of some widths, for a whole batch.

    Attributes:
        axes: the widths of each axis, ascending; `LatencyTable` says where they begin and end.
        ms: milliseconds, the last axis fastest.
    """

    axes: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        for axis in self.axes:
            whole = all(type(width) is int for width in axis)
            if not axis or not whole or axis[0] < 1 or any(a >= b for a, b in itertools.pairwise(axis)):
                raise LatencyTableError(f"axes: got {axis}, expected ascending widths of at least 1")
        if len(self.ms) != math.prod(map(len, self.axes)):
            raise LatencyTableError(
                f"ms: got {counted(len(self.ms), 'time')}, expected {math.prod(map(len, self.axes))}"
            )
        if not all(isinstance(ms, float) and 0 <= ms < _MOST_MS for ms in self.ms):
            raise LatencyTableError(f"ms: expected times from 0 to {_MOST_MS:g}")

    @cached_property
    def _times(self) -> np.ndarray:
        """The first axis last, as `@` contracts that."""
        return np.array(self.ms).reshape([len(axis) for axis in self.axes]).T

    @cached_property
    def _shares(self) -> list[np.ndarray]:
        """For each axis, the share that each of its nodes has in each width: [width, node]."""
        found = []
        for axis in self.axes:
            widths = np.arange(axis[-1] + 1)
            found.append(np.stack([np.interp(widths, axis, node) for node in np.eye(len(axis))], axis=1))
        return found

    def mean(self, *widths: int | Sequence[int]) -> float:
        """Milliseconds at these widths, one along each axis.

        Along the last axes it may be a sequence, a width for each head: then the mean of what heads of these
        widths take.
        """
        times, of_heads = self._times, False
        for shares, width in zip(self._shares, widths, strict=True):
            own = shares[np.asarray(width)].T  # [node], or [node, head]
            times = (times * own).sum(-2) if of_heads else times @ own
            of_heads = own.ndim == 2
        return float(times.mean())


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """What branches of every width take on one machine; `predict` says what a plan will take.

    Attributes:
        geometry: the fields of `Architecture` that decide about speed. The number of blocks is not among
            them: a table serves models of any depth.
        machine: where it was measured; see `machine`. Threads and versions are part of it.
        batch_size, dtype: of the images; the dtype by name, "float32".
        engine: `OptimizedViT.engine` of the measured models.
        outside_ms: of everything outside the blocks: patches, final norm, head, and the call itself.
        attention: over inputs of qkv, heads alive, values of each head alive, queries and keys of each.
        mlp: over inputs of fc1, inputs of fc2. All axes go from 1 to the dense model's width, but for that of
            queries and keys where these have norms: it has that width alone, as nothing can narrow them.
        rounds: measurements of each point.
        date: of the measurement, ISO.
    """

    geometry: Mapping[str, Any]
    machine: Mapping[str, Any]
    batch_size: int
    dtype: str
    engine: str
    outside_ms: float
    attention: Grid
    mlp: Grid
    rounds: int
    date: str

    def __post_init__(self) -> None:
        for name in ("geometry", "machine"):
            items = {key: tuple(v) if isinstance(v, list) else v for key, v in getattr(self, name).items()}
            object.__setattr__(self, name, FrozenDict(items))
        if self.dtype not in DTYPES:
            raise LatencyTableError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name in ("batch_size", "rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise LatencyTableError(f"{name}: got {value!r}, expected an integer of at least 1")
        for name in ("engine", "date"):
            if not isinstance(getattr(self, name), str):
                raise LatencyTableError(f"{name}: got {getattr(self, name)!r}, expected a text")
        if not (isinstance(self.outside_ms, float) and 0 <= self.outside_ms < _MOST_MS):
            raise LatencyTableError(f"outside_ms: got {self.outside_ms!r}, expected a time of at least 0")
        try:
            width, heads = self.geometry["embed_dim"], self.geometry["num_heads"]
            head_dim = width // heads
            whole = self.geometry["qk_norm"] or "rotary" in self.geometry
            least = head_dim if whole else 1
            ends = {
                "attention": [(1, width), (1, heads), (1, head_dim), (least, head_dim)],
                "mlp": [(1, width), (1, self.geometry["mlp_hidden"])],
            }
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise LatencyTableError(f"geometry: {error!r}") from error
        for name, expected in ends.items():
            if (got := [(axis[0], axis[-1]) for axis in getattr(self, name).axes]) != expected:
                raise LatencyTableError(f"{name}.axes: got axes with ends {got}, expected {expected}")

    def predict(self, plan: PruningPlan | CompactModel) -> float:
        """Milliseconds of a forward pass of one batch through `vtp.optimize(vtp.compact(gated, plan))`.

        Raises:
            LatencyTableError: the plan is for a model of another geometry.
        """
        plan = plan.plan if isinstance(plan, CompactModel) else plan
        self.check_geometry(plan.architecture)
        total = self.outside_nanoseconds
        for i in range(plan.architecture.depth):
            total += self.block_nanoseconds(plan.block_widths(i))
        return total / 1e6

    # Whole nanoseconds, as sums of integers do not depend on their order: what the search for a plan adds up
    # block by block is what `predict` says.

    @property
    def outside_nanoseconds(self) -> int:
        """Time of everything outside the blocks."""
        return round(1e6 * self.outside_ms)

    def block_nanoseconds(self, widths: BlockWidths) -> int:
        """Time of a block with these kept widths; a branch that is a constant is gone and takes none."""
        keys = widths.keys or (self.attention.axes[-1][-1],) * len(widths.values)
        heads = [(value, key) for value, key in zip(widths.values, keys, strict=True) if value]
        total = 0  # each branch rounded by itself, as branches are added up too
        if widths.qkv and heads:
            total += round(1e6 * self.attention.mean(widths.qkv, len(heads), *zip(*heads, strict=True)))
        if widths.fc1 and widths.fc2:
            total += round(1e6 * self.mlp.mean(widths.fc1, widths.fc2))
        return total

    def check_geometry(self, architecture: Architecture) -> None:
        """Raise LatencyTableError, which names what differs, if the model has another geometry."""
        wanted_of = geometry(architecture)
        for name in dict.fromkeys([*wanted_of, *self.geometry]):
            got, wanted = self.geometry.get(name), wanted_of.get(name)
            if got != wanted:
                raise LatencyTableError(
                    f"latency table: made for a model with {name} {got}, the model has {wanted}; "
                    f"{how_to_make_one()}"
                )

    def to_dict(self) -> dict:
        """The table as JSON-able data; the inverse is `from_dict`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("geometry", "machine"):
            fields[name] = dict(fields[name])
        for name in ("attention", "mlp"):
            fields[name] = dataclasses.asdict(fields[name])
        return {"latency_table_version": TABLE_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: dict) -> "LatencyTable":
        """Raises LatencyTableError if `data` is not a table of this version, naming what is wrong."""
        if not isinstance(data, dict) or "latency_table_version" not in data:
            raise LatencyTableError("not a latency table (no latency_table_version)")
        fields = dict(data)
        if (found := fields.pop("latency_table_version")) != TABLE_VERSION:
            raise LatencyTableError(
                f"a latency table of version {found!r}, expected {TABLE_VERSION}; {how_to_make_one()}"
            )
        try:
            for name in ("attention", "mlp"):
                axes = tuple(tuple(axis) for axis in fields[name]["axes"])
                fields[name] = Grid(axes, tuple(map(float, fields[name]["ms"])))
            return cls(**fields)
        except LatencyTableError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LatencyTableError(
                f"fields are missing, unknown or of the wrong type ({error!r})"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, atomically. Raises FileError if it cannot be written."""
        text = json.dumps(self.to_dict(), indent=1)
        write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a table written by `save`. Raises FileError, which names the file and the reason."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except OSError as error:
            refuse_other_kinds(path, LATENCY_TABLE)
            raise FileError(f"path: cannot read {path}: {error.strerror}") from error
        except LatencyTableError as error:
            refuse_other_kinds(path, LATENCY_TABLE)
            raise FileError(f"path: {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            refuse_other_kinds(path, LATENCY_TABLE)
            raise FileError(f"path: {path} is not JSON, or it is cut off ({error})") from error


def geometry(architecture: Architecture) -> dict[str, Any]:
    """The fields of an architecture that decide how long its compact models take."""
    fields = dataclasses.asdict(architecture)
    found = {name: value for name, value in fields.items() if name not in _WITHOUT_EFFECT}
    # Said only of a model that has them, as tables from before do not say so of others.
    for name in ("glu", "scale_attn_norm", "scale_mlp_norm"):
        if getattr(architecture, name):
            found[name] = True
    if architecture.eva is not None:
        of_eva = {"rotary": architecture.eva.rope_type, "pool_heads": architecture.eva.attn_pool_num_heads}
        found |= {name: value for name, value in of_eva.items() if value is not None}
    return found


def how_to_make_one() -> str:
    """What to do for a table, as the end of an error message."""
    return (
        "`vtp bench MODEL --profile-widths` measures one on this machine once, as "
        "vtp.profile_widths(vtp.describe(model)) does"
    )


# --------------------------------------------------------------------------------
# The machine and the cache


def machine() -> dict[str, Any]:
    """What a time depends on beside the model: the CPU, the cores and threads that are used, the versions."""
    described = environment()
    try:
        own_version = version("vtp")
    except PackageNotFoundError:
        own_version = "unknown"
    available = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": described["cpu"],
        "flags": " ".join(vector_flags()),
        "cores": len(available(0)) if available else os.cpu_count(),
        "threads": described["threads"],
        "instruction_set": _instruction_set(),
        "torch": described["torch"],
        "vtp": own_version,
    }


def _instruction_set() -> str:
    reason = cpp_unsupported_reason()
    return torch.ops.vtp.cpu_isa() if reason is None else f"none: {reason}"


def _cache_file(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "latency" / f"{digest[:24]}.json"


def _key(table: LatencyTable) -> dict[str, Any]:
    """What a cached table has to agree in."""
    return {
        "geometry": dict(table.geometry),
        "machine": dict(table.machine),
        "batch_size": table.batch_size,
        "dtype": table.dtype,
    }


def make_cache_folder() -> Path:
    """The folder of the tables. Raises FileError if it cannot be made or written."""
    folder = cache_folder() / "latency"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cache: cannot make {folder}: {error.strerror}") from error
    refuse_unwritable(folder / "table.json")
    return folder


def store_table(table: LatencyTable) -> Path:
    """Put a table into the cache, instead of one that was measured before. Returns its file.

    Raises:
        FileError: the folder cannot be made or written.
    """
    make_cache_folder()
    file = _cache_file(_key(table))
    table.save(file)
    return file


def cached_table(
    architecture: Architecture, batch_size: int = 1, dtype: torch.dtype = torch.float32
) -> LatencyTable | None:
    """The table that was measured on this machine, with these threads and versions; None if there is none.

    A file in the cache that is damaged counts as none: `store_table` replaces it.
    """
    key = {
        "geometry": geometry(architecture),
        "machine": machine(),
        "batch_size": batch_size,
        "dtype": name_of(dtype),
    }
    try:
        table = LatencyTable.load(_cache_file(key))
    except FileError:
        return None
    return table if _key(table) == key else None


def name_of(dtype: torch.dtype) -> str:
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        raise LatencyTableError(f"dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    return names[dtype]
