"""Candidates for the tables of the ops' files: what each would gain over the entry that is there now.

A candidate stands in the table while its graph is captured; it has to compute the same. An entry is worth
changing where a candidate is faster at all of its batch sizes.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.gpu.cases import Case, Context, Record
from bench.gpu.ops import OPS, in_turns_if_right, on_meta
from bench.ops.shapes import Case as Shape
from bench.ops.subject import Subject
from vtp_kernels.launching import Config, forced_path
from vtp_kernels.library import TritonSides

NOW = "now"
BATCHES = (128, 8, 1)


@dataclass(frozen=True)
class Entry:
    """An entry of a table: of `vtp_kernels.<op>`, called `table`, at `keys`; empty, the table itself.

    model: whose widths ask for it; sites: where it is timed; candidates: blocks, warps and stages, where
    blocks that are not named stay as they are; path: that has to be forced for it, where it is not taken.
    """

    op: str
    table: str
    keys: tuple[object, ...]
    model: str
    sites: tuple[str, ...]
    candidates: tuple[tuple[dict[str, int], int, int], ...]
    path: str | None = None


def _tiles(*sizes: tuple[int, int, int, int, int], **more: int) -> tuple:
    return tuple(
        (dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **more), warps, stages) for m, n, k, warps, stages in sizes
    )


ENTRIES = (
    Entry(
        "compact_linear", "TILES", ("16",), "base", ("fc1", "fc2"),
        _tiles(
            (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4),
            (64, 256, 64, 8, 3), (64, 64, 64, 4, 4), (64, 128, 128, 4, 3),
        ) + _tiles((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), BORDER_N=64),
        path="kernel",
    ),
    Entry(
        "ragged_attention", "ONE_PASS_TILES", (), "base", ("attn",),
        (
            (dict(BLOCK_M=64), 4, 1), (dict(BLOCK_M=64), 4, 3), (dict(BLOCK_M=64), 8, 2),
            (dict(BLOCK_M=128), 8, 2),
            (dict(BLOCK_M=32), 4, 2), (dict(BLOCK_M=32), 2, 2),
        ),
    ),
    Entry(
        "ragged_attention", "ONLINE_TILES", ("16",), "base", ("attn",),
        (
            (dict(BLOCK_M=64, BLOCK_N=64), 4, 3), (dict(BLOCK_M=128, BLOCK_N=64), 8, 2),
            (dict(BLOCK_M=128, BLOCK_N=64), 8, 3), (dict(BLOCK_M=128, BLOCK_N=32), 4, 3),
            (dict(BLOCK_M=64, BLOCK_N=32), 4, 3), (dict(BLOCK_M=32, BLOCK_N=64), 4, 2),
        ),
        path="online",
    ),
    Entry(
        "layer_norm_gather", "FWD_TILES", (1024,), "base", ("qkv",),
        ((dict(ROWS=2), 4, 1), (dict(ROWS=8), 8, 1), (dict(ROWS=4), 8, 1), (dict(ROWS=1), 4, 1)),
    ),
    Entry(
        "gated_linear", "TILES", (("fwd", "16"),), "base", ("qkv", "fc2"),
        _tiles((64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 8, 3)),
    ),
    Entry(
        "compact_mlp", "FWD_TILES", (2, 192), "tiny", ("mlp",),
        ((dict(BLOCK_H=32), 8, 3), (dict(BLOCK_H=64), 8, 2), (dict(BLOCK_H=32), 4, 2)),
    ),
)  # fmt: skip


def cases(toy: bool) -> list[Case]:
    """Entry by entry, in order of the time that its op takes in a model."""
    found = []
    for entry in ENTRIES:
        for site in entry.sites:
            for batch in (2,) if toy else BATCHES:
                shape = _shape(entry, site, batch, toy)
                run = functools.partial(measure, entry, shape)
                found.append(Case(f"{entry.op} {_name(entry)}, {shape}", run, 15))
    return found


def _shape(entry: Entry, site: str, batch: int, toy: bool) -> Shape:
    widths = "dense" if entry.op == "gated_linear" else "compact"
    return Shape("toy" if toy else entry.model, widths, site, batch, "bfloat16", backward=False)


def measure(entry: Entry, shape: Shape, context: Context) -> Record:
    """The entry as it is, then each candidate in its place."""
    module, reference = OPS[entry.op]
    implementation = module.implementations(shape)["ours"]
    subject = Subject(shape, module.operands, reference)
    entries = {NOW: (implementation, subject, in_place(entry, current(entry)))}
    for label, config in configs(entry).items():
        entries[label] = implementation, subject, in_place(entry, config)
    return {"now": _label(current(entry)), "timed": in_turns_if_right(shape, entries, context)}


def launches() -> dict[str, Callable[[], None]]:
    """What the candidates launch, as calls on meta tensors."""

    def launch(entry: Entry) -> None:
        module, _ = OPS[entry.op]
        for config in configs(entry).values():
            for site in entry.sites:
                for batch in BATCHES:
                    shape = _shape(entry, site, batch, toy=False)
                    call = module.implementations(shape)["ours"].prepare(**on_meta(module, shape))
                    with in_place(entry, config), TritonSides(), torch.inference_mode():
                        call()

    return {f"candidates/{entry.op}": functools.partial(launch, entry) for entry in ENTRIES}


def configs(entry: Entry) -> dict[str, Config]:
    """The candidates by what they are called."""
    now = current(entry)
    found = [Config({**now.blocks, **blocks}, warps, stages) for blocks, warps, stages in entry.candidates]
    return {_label(config): config for config in found}


def _name(entry: Entry) -> str:
    """As in `FWD_TILES[2][192]`."""
    return entry.table + "".join(f"[{key!r}]" for key in entry.keys)


def _label(config: Config) -> str:
    return f"{config}, {config.num_warps} warps, {config.num_stages} stages"


def _table(entry: Entry) -> tuple[dict, str]:
    """What holds the entry, and under which key."""
    holder: dict = vars(importlib.import_module(f"vtp_kernels.{entry.op}"))
    *path, last = entry.table, *entry.keys
    for key in path:
        holder = holder[key]
    return holder, last


def current(entry: Entry) -> Config:
    """What the table has now."""
    holder, key = _table(entry)
    return holder[key]


@contextlib.contextmanager
def in_place(entry: Entry, config: Config) -> Iterator[None]:
    """Within it the op takes `config` where its table has this entry."""
    holder, key = _table(entry)
    before = holder[key]
    forced = forced_path(entry.op, entry.path) if entry.path else contextlib.nullcontext()
    holder[key] = config
    try:
        with forced:
            yield
    finally:
        holder[key] = before
