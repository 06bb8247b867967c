"""The measurement behind a latency table: blocks of many widths, timed in turn.

What is measured is what runs: compact models of a few equal blocks with random weights, on `vtp.optimize`. Of
the time of each, what is outside the blocks is taken off. All points of the grids take turns round by round,
so that a machine whose speed drifts slows all of them down alike.

Narrow queries and keys take no grid of their own: what they save is products of two widths each (outputs and
inputs of qkv; width and tokens, in the scores), the same whatever the values are. So heads with the narrowest
keys are measured at the ends of the other axes, and what they save there is interpolated.
"""

import dataclasses
import datetime
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtp.model.architecture import Architecture
from vtp.model.cost import block_cost, surroundings_cost
from vtp.model.eva import make_rotary_buffers
from vtp.model.widths import SITES, BlockWidths
from vtp.pruning.compact import empty_compact
from vtp.pruning.latency_table import Grid, LatencyTable, LatencyTableError, geometry, machine, name_of
from vtp.pruning.plan import PruningPlan
from vtp.runtime.optimize import OptimizedViT, optimize
from vtp.timing import Step, Stopwatch, take_turns, turns

_BLOCKS = 2.0  # dense blocks whose multiply-adds a measured model has, so that the call itself weighs little
_MOST_BLOCKS = 12
_MOST_BYTES = 20e6  # of a measured model's weights, as all of them are in memory at once
_SHORT = 2e-3  # seconds: before a call that is shorter, another one wakes the threads up


class _Point(Stopwatch):
    """A model whose turns are timed, and its times in seconds."""

    def __init__(
        self, blocks: Sequence[BlockWidths], model: OptimizedViT, images: torch.Tensor, warm: bool
    ) -> None:
        super().__init__(lambda: model(images), images.device)
        self.blocks, self.model, self.warm = blocks, model, warm
        for _ in range(2):
            self.call()

    @torch.inference_mode()
    def step(self) -> None:
        if self.warm or (self.seconds and self.seconds[-1] < _SHORT):
            self.call()
        super().step()


class _Progress:
    """Takes turns with the points and says what share of the time is over."""

    def __init__(self, seconds: float, report: Callable[[float], None]) -> None:
        self._seconds, self._report, self._started = seconds, report, time.perf_counter()

    def step(self) -> None:
        self._report(min(1.0, (time.perf_counter() - self._started) / self._seconds))


def profile_widths(
    architecture: Architecture,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    seconds: float = 75.0,
    progress: Callable[[float], None] | None = None,
) -> LatencyTable:
    """Measure time against width on this machine's CPU, with as many threads as PyTorch has now.

    Some 80 small models are built first, which takes seconds (and 1.5 GB for DeiT-B), then they take turns.

    Args:
        architecture: of the dense model; `vtp.describe(model)`.
        batch_size: images of a forward pass.
        dtype: that `vtp.optimize` packs in: float32, bfloat16 or float16.
        seconds: of measuring, in as many rounds as fit; at least 5 rounds are done.
        progress: called with the share of the measurement that is over, from 0 to 1.

    Raises:
        LatencyTableError: an argument is out of range.
    """
    if not 0 < seconds < math.inf:
        raise LatencyTableError(f"seconds: got {seconds!r}, expected a positive number")
    profile = WidthProfile(architecture, batch_size, dtype)
    steps: dict[str, Step] = {"profile": profile}
    if progress is not None:
        steps["progress"] = _Progress(seconds, progress)
    take_turns(steps, 10**9, seconds)
    if progress is not None:
        progress(1.0)
    return profile.table()


class WidthProfile:
    """The models that a table is made from, for whoever has other things to measure in the same rounds.

    Args, Raises: those of `profile_widths`.

    Attributes:
        rounds: measurements of each point so far.
    """

    def __init__(self, architecture: Architecture, batch_size: int, dtype: torch.dtype) -> None:
        self._dtype = name_of(dtype)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise LatencyTableError(f"batch_size: got {batch_size!r}, expected an integer of at least 1")
        self._architecture, self._batch_size = architecture, batch_size
        self._axes = _axes(architecture)
        self._points = _points(architecture, self._axes, batch_size, dtype)
        self.rounds = 0

    def step(self) -> None:
        """One round: every point has a turn."""
        for key in turns(list(self._points), self.rounds):
            self._points[key].step()
        self.rounds += 1

    def table(self, first: int = 0) -> LatencyTable:
        """What was measured, from round `first` on."""
        points = self._points
        times = [point.seconds[first:] for point in points.values()]
        medians = dict(zip(points, steady_medians(times), strict=True))
        outside = 1e3 * medians["outside"]
        grids = {}
        for branch, branch_axes in self._axes.items():
            ms = {
                key[1:]: max(0.0, (1e3 * medians[key] - outside) / len(point.blocks))
                for key, point in points.items()
                if key[0] == branch
            }
            grids[branch] = Grid(branch_axes, tuple(monotone(completed(branch_axes, ms)).ravel().tolist()))
        return LatencyTable(
            geometry=geometry(self._architecture),
            machine=machine(),
            batch_size=self._batch_size,
            dtype=self._dtype,
            engine=points["outside"].model.engine,
            outside_ms=outside,
            rounds=self.rounds - first,
            date=datetime.date.today().isoformat(),
            **grids,
        )


def steady_medians(times: Sequence[Sequence[float]]) -> np.ndarray:
    """What each point takes at the machine's usual speed, from its times [points][rounds].

    A round's speed is the median over all points of how much slower they were than usual; each time is
    divided by that of its round before its median over rounds is taken.
    """
    measured = np.array(times)
    usual = np.median(measured, axis=1)
    for _ in range(3):
        slowness = np.median(measured / usual[:, None], axis=0)
        usual = np.median(measured / slowness, axis=1) * np.median(slowness)
    return usual


def monotone(times: np.ndarray) -> np.ndarray:
    """Times that never fall as a width grows: half way between the least such above and the most below.

    Noise would otherwise make wider models look faster, and a search for a budget would follow it.
    """
    for axis in range(times.ndim):
        above = np.maximum.accumulate(times, axis)
        below = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
        times = (above + below) / 2
    return times


def completed(axes: Sequence[Sequence[int]], ms: Mapping[tuple[int, ...], float]) -> np.ndarray:
    """Times at all widths, in the shape of the axes, from those of the widths that are `_measured`.

    Elsewhere the last width takes off what it takes off at the ends of the other axes, interpolated.
    """
    times = np.array([ms.get(widths, np.nan) for widths in itertools.product(*axes)])
    times = times.reshape([len(axis) for axis in axes])
    others = axes[:-1]
    at_ends = times[np.ix_(*(sorted({0, len(axis) - 1}) for axis in others))]
    saved_there = np.maximum(at_ends[..., -1] - at_ends[..., 0], 0)
    grid = Grid(tuple(map(_ends, others)), tuple(saved_there.ravel().tolist()))
    saved = np.array([grid.mean(*widths) for widths in itertools.product(*others)])
    rest = np.maximum(times[..., -1] - saved.reshape(times.shape[:-1]), 0)
    return np.where(np.isnan(times), rest[..., None], times)


def _measured(axes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Widths that an attention branch is measured at: with narrow keys, the ends of the other axes alone."""
    full = [(*widths, axes[-1][-1]) for widths in itertools.product(*axes[:-1])]
    narrow = [(*widths, axes[-1][0]) for widths in itertools.product(*map(_ends, axes[:-1]))]
    return list(dict.fromkeys(full + narrow))


def _ends(axis: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({axis[0], axis[-1]}))


def _axes(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Measured widths of each branch."""
    width, heads, hidden = architecture.embed_dim, architecture.num_heads, architecture.mlp_hidden
    some_heads = range(1, heads + 1) if heads <= 6 else np.linspace(1, heads, 5).round().tolist()
    return {
        "attention": (
            _nodes(width, (1 / 2,)),
            tuple(sorted({*map(int, some_heads), max(1, heads - 1)})),
            _nodes(architecture.head_dim, (1 / 2,)),
            # No third node: DeiT-T at half of its keys took 3% more than the line between these two says.
            (architecture.head_dim,) if architecture.whole_keys else _nodes(architecture.head_dim, ()),
        ),
        "mlp": (_nodes(width, (1 / 2,)), _nodes(hidden, (1 / 8, 3 / 8, 5 / 8, 7 / 8))),
    }


def _nodes(width: int, shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted({1, *(max(1, round(share * width)) for share in shares), width}))


def _points(
    architecture: Architecture,
    axes: Mapping[str, tuple[tuple[int, ...], ...]],
    batch_size: int,
    dtype: torch.dtype,
) -> dict[Any, _Point]:
    """The models to measure, by branch and widths, and "outside"."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, architecture.in_chans, *architecture.img_size)
    images = torch.randn(size, generator=generator).to(dtype)
    warm = _fits_in_cache(architecture, dtype)
    blocks: dict[Any, list[BlockWidths]] = {"outside": [BlockWidths()]}
    for qkv, heads, values, keys in _measured(axes["attention"]):
        own = _attention_blocks(architecture, qkv, heads, values, keys, dtype)
        blocks["attention", qkv, heads, values, keys] = own
    for fc1, fc2 in itertools.product(*axes["mlp"]):
        blocks["mlp", fc1, fc2] = _mlp_blocks(architecture, fc1, fc2, dtype)
    return {
        key: _Point(own, _random_model(architecture, own, dtype, generator), images, warm)
        for key, own in blocks.items()
    }


def _fits_in_cache(architecture: Architecture, dtype: torch.dtype) -> bool:
    """Whether the dense model's weights stay in the CPU's cache from one forward pass to the next.

    Those of a larger model come from memory each time; those of a small measured model would not, were it
    not for the models between its turns. So a measured model is called twice in its turn only if it stands
    for a model that fits.
    """
    block = block_cost(architecture, architecture.dense_widths)
    params = surroundings_cost(architecture).params + architecture.depth * block.params
    return params * dtype.itemsize <= _cache_bytes()


def _cache_bytes() -> int:
    """Bytes of the last-level cache; 32 MiB where the machine does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(sizes, default=32 << 20)


def _attention_blocks(
    architecture: Architecture, qkv: int, heads: int, values: int, keys: int, dtype: torch.dtype
) -> list[BlockWidths]:
    widths = BlockWidths(qkv, (values,) * heads, keys=(keys,) * heads)
    number = _how_many(architecture, widths, dtype)
    values_around, keys_around = (
        _around(width, 4, architecture.head_dim, number * heads) for width in (values, keys)
    )
    return [
        BlockWidths(qkv, tuple(values_around[i::number]), keys=tuple(keys_around[i::number]))
        for i in range(number)
    ]


def _mlp_blocks(architecture: Architecture, fc1: int, fc2: int, dtype: torch.dtype) -> list[BlockWidths]:
    number = _how_many(architecture, BlockWidths(fc1=fc1, fc2=fc2), dtype)
    return [BlockWidths(fc1=fc1, fc2=own) for own in _around(fc2, 32, architecture.mlp_hidden, number)]


def _how_many(architecture: Architecture, widths: BlockWidths, dtype: torch.dtype) -> int:
    """Blocks of a measured model."""
    dense, own = (block_cost(architecture, w) for w in (architecture.dense_widths, widths))
    wanted = min(_BLOCKS * dense.macs / own.macs, _MOST_BYTES / (own.params * dtype.itemsize))
    return max(1, min(_MOST_BLOCKS, round(wanted)))


def _around(width: int, spread: int, full: int, number: int) -> list[int]:
    """`number` widths spread evenly around one, which is their mean.

    Time grows in small steps, of 8 or 16 outputs and of tasks that divide unevenly among threads. A width of
    the grid would lie on one side of a step by chance; widths around it meet both sides, as those of a plan
    do. The dense model's own width is what it is.
    """
    spread = min(spread, width - 1, full - width)
    offsets = [round(spread * (2 * (i + 0.5) / number - 1)) for i in range(number)]
    return [width + offset for offset in offsets]


@torch.no_grad()
def _random_model(
    architecture: Architecture, blocks: Sequence[BlockWidths], dtype: torch.dtype, generator: torch.Generator
) -> OptimizedViT:
    """A model of such blocks with random weights, packed."""
    plan = _plan(dataclasses.replace(architecture, depth=len(blocks), drop_path_rate=0.0), blocks, generator)
    model = empty_compact(plan).to_empty(device="cpu").eval()
    make_rotary_buffers(model, torch.device("cpu"), torch.float32)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    for i, block in enumerate(model.blocks):
        norms = (
            block.norm1,
            getattr(block.attn, "norm", None),
            block.norm2,
            getattr(block.mlp, "norm", None),
        )
        for norm, site in zip(norms, SITES, strict=True):
            if getattr(norm, "index", None) is not None:
                norm.index.copy_(torch.tensor(plan.kept[f"blocks.{i}.{site}"]))
    return optimize(model, dtype)


def _plan(
    architecture: Architecture, blocks: Sequence[BlockWidths], generator: torch.Generator
) -> PruningPlan:
    """A plan of these widths, made by hand; inputs are kept here and there, as in a real one."""
    width, head_dim = architecture.embed_dim, architecture.head_dim

    def some(number: int) -> list[int]:
        return sorted(torch.randperm(width, generator=generator)[:number].tolist())

    kept: dict[str, tuple[int, ...]] = {}
    keys: dict[str, tuple[int, ...]] = {}
    for i, own in enumerate(blocks):
        values = [head * head_dim + j for head, number in enumerate(own.values) for j in range(number)]
        indices = (some(own.qkv), values, some(own.fc1), range(own.fc2))
        kept |= {f"blocks.{i}.{site}": tuple(index) for site, index in zip(SITES, indices, strict=True)}
        gone = (head_dim,) * (architecture.num_heads - len(own.keys))
        keys[f"blocks.{i}.attn"] = own.keys + gone
    return PruningPlan(
        architecture, kept, {}, score="custom", scope="global", per_mac=False, round_to=1, min_keep=0,
        budget={}, threshold=None, parent="", keys=keys,
    )  # fmt: skip
