"""What a stage of training tells while it runs: a bar or lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from vtp.files import FileError, write_atomic
from vtp.words import counted

BAR_SECONDS = 0.25  # between two updates of the bar: more often cannot be read and costs time
BAR_COLUMNS = 110  # a terminal with fewer has room for the figures only
WAITING_BOUND = 0.2  # share of an epoch's time spent waiting for images, above which that is told
LONG_EPOCH = 10.0  # seconds of an epoch that is worth telling about: shorter ones say it again at once
LINE_SECONDS = 10.0  # between two lines where there is no terminal


@contextmanager
def share_bar(console: Console, title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar that goes when it is done; what it gives takes what is going on and the share that is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda text, share: bar.update(task, description=f"{title}: {text}", completed=share)


class StageProgress:
    """Shows how a stage goes: a bar on a terminal, else a line now and then. A context manager.

    stage: its name. epochs, steps: of the stage, and steps of an epoch. updates: steps done before.
    last: record of the last finished epoch, or {}. enabled: False shows nothing.
    """

    def __init__(
        self, stage: str, epochs: int, steps: int, updates: int, last: dict[str, Any], *, enabled: bool
    ) -> None:
        self.stage, self.epochs, self.steps, self.last = stage, epochs, steps, last
        self.first = self.updates = updates
        self.loss, self.images_per_second, self.waiting = math.nan, math.nan, 0.0
        self.started = self.shown = time.perf_counter()
        self.enabled = enabled
        self.bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        if self.enabled:
            console = get_console()
            text = "{task.description}  {task.fields[status]}"
            columns = [TextColumn(text, table_column=Column(no_wrap=True))]
            if console.width >= BAR_COLUMNS:
                columns.append(BarColumn(20))
            if console.is_terminal:
                self.bar = Progress(*columns, console=console, refresh_per_second=2)
                self.task = self.bar.add_task(self._title(), total=self.epochs * self.steps, status="")
                self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            text = f"{self.stage}: {text}"
            # Not by the console where there is no terminal: it would break the line.
            print(text, flush=True) if self.bar is None else self.bar.console.print(text, highlight=False)

    def settled(self, loss: float, images_per_second: float, waiting: float) -> None:
        """New figures to show: loss of the last step, and speed and share of time that was spent waiting for
        images in this epoch."""
        self.loss, self.images_per_second, self.waiting = loss, images_per_second, waiting

    def step(self, updates: int) -> None:
        """After a step; `updates` counts all of the stage."""
        self.updates = updates
        now = time.perf_counter()
        if now - self.shown >= (LINE_SECONDS if self.bar is None else BAR_SECONDS):
            self._show(f"step {(updates - 1) % self.steps + 1}/{self.steps}")

    def epoch(self, record: dict[str, Any]) -> None:
        """After an epoch with the given record of metrics."""
        self.last = record
        self._show("done")

    def _show(self, place: str) -> None:
        self.shown = time.perf_counter()
        if self.bar is not None:
            self.bar.update(
                self.task, description=self._title(), completed=self.updates, status=self._status()
            )
        elif self.enabled:
            print(f"{self._title()} {place}  {self._status()}", flush=True)

    def _title(self) -> str:
        return f"{self.stage} {max(self.updates - 1, 0) // self.steps + 1}/{self.epochs}"

    def _status(self) -> str:
        parts = [f"loss {self.loss:.3f}"]
        if "test_top1" in self.last:
            parts.append(f"top-1 {self.last['test_top1']:.2f}%")
        if "l1" in self.last:
            parts.append(f"|g| {self.last['gates_mean']:.3f} zero {self.last['gates_zero']:.0%}")
        done = max(self.updates - self.first, 1)
        left = (time.perf_counter() - self.started) / done * (self.epochs * self.steps - self.updates)
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
        parts.append(f"{self.images_per_second:.0f} img/s")
        parts.append(f"{self.waiting:.0%} waiting")
        return " ".join(parts)


class LoaderWait:
    """Hands on the batches of a loader, and measures for how long nothing is computed for want of one.

    On a GPU a wait counts only where all that was asked of it is done when the batch comes: otherwise it went
    on with earlier steps meanwhile.

    Attributes:
        seconds: so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self.asked = torch.cuda.Event() if device.type == "cuda" else None

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of one iteration over the loader."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            if self.asked is not None:
                self.asked.record()
            batch = next(batches, None)
            if batch is None:
                return
            if self.asked is None or self.asked.query():
                self.seconds += time.perf_counter() - began
            yield batch


def loader_warning(waiting: float, seconds: float, epoch: int, workers: int, processes: int) -> str | None:
    """What to say of an epoch of so many seconds, of which that share was spent waiting for images; None
    where that is no more than WAITING_BOUND, or the epoch no LONG_EPOCH.

    workers: of each process; processes: on this machine.
    """
    if waiting <= WAITING_BOUND or seconds < LONG_EPOCH:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    possible = cores // processes
    text = (
        f"the loader is the bottleneck: {waiting:.0%} of the time of epoch {epoch} went by waiting for images"
        f" at {counted(workers, 'worker')}"
    )
    if workers < possible:
        more = min(possible, max(2, 2 * workers))
        return f"{text}; this machine has {counted(cores, 'core')}: try --workers {more}"
    used = f"all {cores} cores are" if cores > 1 else "the one core is"
    return f"{text}, and {used} in use; smaller image files, or lighter augmentation, take less"


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append record to metrics.jsonl and have it on the disk on return. Raises FileError if it cannot."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FileError(f"path: cannot write {path}: {error.strerror}") from error


def rewrite_metrics(path: Path, stage: str, history: list[dict[str, Any]]) -> None:
    """Replace the lines of `stage` by `history`, which drops those of epochs that will be done again."""
    others = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut short by the kill that this run resumes from
            continue
        if isinstance(record, dict) and record.get("stage") != stage:
            others.append(record)
    text = "".join(json.dumps(record) + "\n" for record in others + history)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class Board:
    """TensorBoard's scalars of one stage, or nothing where `writer` is None; FileError on a full disk."""

    def __init__(self, writer: Any | None) -> None:
        self.writer = writer

    def step(self, loss: float, updates: int) -> None:
        """The loss of one step."""
        if self.writer is not None:
            with self._writing():
                self.writer.add_scalar("loss/step", loss, updates)

    def epoch(self, record: dict[str, Any], updates: int) -> None:
        """An epoch's record of metrics; on disk on return, as a checkpoint follows."""
        if self.writer is None:
            return
        with self._writing():
            for name, value in record.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"epoch/{name}", value, updates)
            self.writer.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self.writer.get_logdir()
            raise FileError(f"path: cannot write into {folder}: {error.strerror}") from error


@contextmanager
def tensorboard(folder: Path, updates: int, *, enabled: bool) -> Iterator[Board]:
    """A Board in `folder`; events of a killed run that lie after `updates` are hidden."""
    if not enabled:
        yield Board(None)
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

    writer = SummaryWriter(str(folder), purge_step=updates + 1)
    try:
        yield Board(writer)
    finally:
        with suppress(OSError):  # a full disk, which has been said; epochs were flushed
            writer.close()
