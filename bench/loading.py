"""How many images of shards our loader reads in a second, beside timm's, and how much memory they take.

    python -m bench.loading                # table and JSON; some minutes, 0.8 GB of a temporary folder
    python -m bench.loading --markdown     # that of docs/scale.md, from a run's file

Small JPEGs are written into shards, which both loaders read for one epoch with the same transforms: ours by
place, timm's (`timm.data.create_loader` over its reader of webdataset) in sequence. Each has a process of its
own with its workers; they take turns of some batches in random order, and ratios are of times in the same
turn. Memory is that of the process and its workers without the libraries, which other programs may share.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_dataset, create_loader

from bench.results_file import markdown_table, run_or_print
from vtp.comparison.tables import Rows
from vtp.machine import description, in_one_line, package_version
from vtp.timing import pairwise_ratio, take_turns
from vtp.training.data import open_data
from vtp.training.loaders import set_epoch, train_loader
from vtp.training.shards import ShardReader, find_shards
from vtp.training.transforms import Augment

OUT = Path(__file__).parent / "results" / "loading.json"
IMAGES, SHARD, EDGE, DISTINCT, CLASSES = 200_000, 10_000, 64, 500, 1000
BATCH, WORKERS, TURN = 128, 2, 64  # TURN: batches
AUGMENT = Augment(interpolation="bilinear")  # what timm's loader does unless told otherwise
NAMES = {"vtp": "vtp, by place", "timm": "timm, in sequence"}


# ---------------------------------------------------------------------------------------------------------
# The shards


def write_shards(folder: Path, images: int, shard: int) -> int:
    """train-*.tar and val-0000.tar with timm's _info.json, of so many images in all and in a shard. Returns
    the bytes of the training shards."""
    encoded = [_jpeg(number) for number in range(DISTINCT)]
    splits = {}
    for split, count in (("train", images), ("val", min(images, shard, 100))):
        lengths = [min(shard, count - first) for first in range(0, count, shard)]
        names = [f"{split}-{number:04d}.tar" for number in range(len(lengths))]
        for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
            with tarfile.open(folder / name, "w") as tar:
                for index in range(number * shard, number * shard + length):
                    label = str(index % CLASSES).encode()
                    for ending, content in (("jpg", encoded[index % DISTINCT]), ("cls", label)):
                        member = tarfile.TarInfo(f"{index:08d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        splits[split] = {
            "name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths,
        }  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
    return sum((folder / name).stat().st_size for name in splits["train"]["filenames"])


def _jpeg(number: int) -> bytes:
    """A smooth colour image of EDGE x EDGE pixels, about 1.5 kB."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=75)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------
# The loaders


def our_batches(folder: Path, workers: int) -> Iterator[Any]:
    """An epoch of training batches of ours."""
    loader = train_loader(
        open_data(folder), image_size=EDGE, in_chans=3, batch_size=BATCH, augment=AUGMENT, seed=0,
        workers=workers,
    )  # fmt: skip
    set_epoch(loader, 0)
    return iter(loader)


def timms_batches(folder: Path, workers: int) -> Iterator[Any]:
    """An epoch of training batches of timm's."""
    images = create_dataset("wds/any", root=str(folder), split="train", is_training=True, batch_size=BATCH)
    loader = create_loader(
        images, EDGE, BATCH, is_training=True, num_workers=workers, device=torch.device("cpu"),
        persistent_workers=False,
    )  # fmt: skip
    return iter(loader)


BATCHES = {"vtp": our_batches, "timm": timms_batches}


class Reading:
    """A loader in a process of its own, which reads some batches at a time.

    Attributes:
        seconds: of each turn; memory: bytes after each; images: so far; ended: whether the epoch is over.
    """

    def __init__(self, name: str, folder: Path, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_read, args=(theirs, name, folder, workers))
        self.process.start()
        self.seconds: list[float] = []
        self.memory: list[int | None] = []
        self.images, self.ended = 0, False
        self.step()  # of which the start of the workers is a part
        self.first_turn = self.seconds.pop()

    def step(self) -> None:
        self.connection.send(TURN)
        images, seconds, memory = self.connection.recv()
        self.images += images
        self.ended = images < TURN * BATCH
        self.seconds.append(seconds)
        self.memory.append(memory)

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()


def _read(connection: Connection, name: str, folder: Path, workers: int) -> None:
    # As DataLoader's workers are forks on Linux, whatever this process is.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    batches = BATCHES[name](folder, workers)
    while (count := connection.recv()) is not None:
        images, began = 0, time.perf_counter()
        for _ in range(count):
            batch = next(batches, None)
            if batch is None:
                break
            images += len(batch[1])
        connection.send((images, time.perf_counter() - began, memory_bytes(os.getpid())))


def memory_bytes(process: int) -> int | None:
    """Memory of a process and those that it started, without files, whose pages other programs may share;
    pages that they share count once (Linux's Pss). None where the system does not say."""
    try:
        found = sum(memory_bytes(child) or 0 for child in _children(process))
        lines = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
        return found + sum(1024 * int(line[1]) for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))
    except OSError:
        return None


def _children(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


# ---------------------------------------------------------------------------------------------------------
# The comparison


def compare(folder: Path, workers: int) -> dict[str, Any]:
    """Both loaders read an epoch in turns, until one of them has."""
    readings = {name: Reading(name, folder, workers) for name in BATCHES}
    try:
        while not any(reading.ended for reading in readings.values()):
            take_turns(readings, 1, 0.0)
        for reading in readings.values():
            if reading.ended:  # a turn of fewer batches
                reading.images -= reading.images % (TURN * BATCH)
        turns = min(len(reading.seconds) for reading in readings.values()) - 1
    finally:
        for reading in readings.values():
            reading.end()
    seconds = {name: reading.seconds[:turns] for name, reading in readings.items()}
    return {
        "turns": turns,
        "loaders": {
            name: {
                "images_per_second": TURN * BATCH * turns / sum(seconds[name]),
                "first_turn_seconds": reading.first_turn,
                "memory": reading.memory[: turns + 1],
            }
            for name, reading in readings.items()
        },
        "ratio": pairwise_ratio(seconds["timm"], seconds["vtp"]),
    }


def tables(content: dict[str, Any]) -> dict[str, Rows]:
    """By title a row for each loader."""
    about = content["shards"]
    title = (
        f"{about['images']:,} JPEGs of {EDGE} x {EDGE} pixels in {about['count']} shards of "
        f"{about['bytes'] / about['count'] / 1e6:.0f} MB; batches of {BATCH}, {content['workers']} workers, "
        f"{content['turns']} turns of {TURN * BATCH:,} images"
    )
    rows: Rows = [
        [
            "loader",
            "images a second",
            "over timm's, median (quartiles)",
            "MB after the first turn, half and all",
            "first turn, s",
        ]
    ]
    for name, own in content["loaders"].items():
        ratio = content["ratio"]
        said = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if name == "vtp" else "1"
        memory = own["memory"]
        places = [memory[0], memory[len(memory) // 2], memory[-1]]
        megabytes = ", ".join("?" if bytes_ is None else f"{bytes_ / 1e6:,.0f}" for bytes_ in places)
        rows.append(
            [NAMES[name], f"{own['images_per_second']:,.0f}", said, megabytes,
             f"{own['first_turn_seconds']:.1f}"]
        )  # fmt: skip
    return {title: rows}


def markdown(content: dict[str, Any]) -> str:
    """The table of docs/scale.md."""
    index = content["index"]
    parts = [f"{title}:\n\n{markdown_table(rows)}" for title, rows in tables(content).items()]
    return "\n".join(
        [
            *parts,
            f"The index of the shards took {index['seconds']:.0f} s, once, and {index['bytes'] / 1e6:.1f} MB "
            f"of the cache; opening them with it {index['again_seconds']:.2f} s.",
            f"{in_one_line(content)}, webdataset {content['webdataset']}.",
        ]
    )


def _index(folder: Path) -> dict[str, float]:
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        ShardReader.open(find_shards(folder)["train"])
        seconds.append(time.perf_counter() - began)
    size = sum(file.stat().st_size for file in Path(os.environ["VTP_CACHE"]).glob("shards/*"))
    return {"seconds": seconds[0], "again_seconds": seconds[1], "bytes": size}


def measure(images: int, shard: int, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, in a temporary folder that is removed; `TMPDIR` says where."""
    before = os.environ.get("VTP_CACHE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        os.environ["VTP_CACHE"] = str(Path(name) / "cache")
        try:
            say(f"writing {images:,} images")
            size = write_shards(folder, images, shard)
            index = _index(folder)
            say("reading")
            found = compare(folder, workers)
        finally:
            if before is None:
                del os.environ["VTP_CACHE"]
            else:
                os.environ["VTP_CACHE"] = before
    return {
        **description(torch.device("cpu")),
        "webdataset": package_version("webdataset"),
        "shards": {"images": images, "count": -(-images // shard), "bytes": size},
        "workers": workers,
        "index": index,
        **found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where the results file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES, help=f"in all (default {IMAGES:,})")
    parser.add_argument("--shard", type=int, default=SHARD, help=f"images of a shard (default {SHARD:,})")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"of each loader (default {WORKERS})")

    def measured(options: argparse.Namespace, console: Console) -> dict[str, Any]:
        least = 4 * TURN * BATCH  # of each loader: a first turn, two that count and what is left
        if options.shard < 1 or options.workers < 1 or options.images < least:
            parser.error(
                f"argument --images: got {options.images}, expected at least {least}, in shards of 1 or more"
            )
        return measure(options.images, options.shard, options.workers, console.print)

    return run_or_print(parser, argv, OUT, measure=measured, tables=tables, markdown=markdown)


if __name__ == "__main__":
    sys.exit(main())
