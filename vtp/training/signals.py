"""Stopping on a signal at a moment of one's own choice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader


@dataclass
class Signals:
    """`received`: number of the signal that came, or None."""

    received: int | None = None


@contextmanager
def deferred_signals() -> Iterator[Signals]:
    """Note the first SIGINT or SIGTERM instead of dying by it; a second one acts as it did before.

    Python handles signals in the main thread alone: elsewhere nothing is changed.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        signals.received = number
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        restore()


def shielded(loader: DataLoader) -> DataLoader:
    """Put the loader's worker processes out of reach of signals to the group of this process.

    Ctrl-C in a shell goes to the whole group. The main process decides what to do then, and to finish its
    step it needs workers that live; it still ends them by a signal of its own.
    """
    loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
    return loader


def _init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    if then is not None:
        then(worker)
