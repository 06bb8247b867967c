"""Stopping on a signal at a moment of one's own choice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

# What schedulers send some time before they kill: Slurm's --signal often is USR1. Windows has no such signal.
FROM_SCHEDULERS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
STOPPING = (signal.SIGINT, *FROM_SCHEDULERS)
REPEATED = 5.0  # seconds


class Terminated(BaseException):
    """A signal of FROM_SCHEDULERS, as KeyboardInterrupt is SIGINT. `signum` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Signals:
    """`received`: number of the signal that came, or None."""

    received: int | None = None


@contextmanager
def deferred_signals() -> Iterator[Signals]:
    """Note the first SIGINT, SIGTERM or SIGUSR1 instead of dying by it; a second one acts as it did before.

    SIGTERM or SIGUSR1 again within REPEATED seconds is the same one: a scheduler that signals every process
    of a job also signals torchrun, which hands it on. Python handles signals in the main thread alone:
    elsewhere nothing is changed.
    """
    signals = Signals()
    noted = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if signals.received is None:
            signals.received, noted = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - noted > REPEATED:
            restore()
            signal.raise_signal(number)

    with _handled(STOPPING, note) as restore:
        yield signals


@contextmanager
def raised_signals() -> Iterator[None]:
    """Raise Terminated on the first SIGTERM or SIGUSR1, in the main thread; a second one acts as before."""

    def interrupt(number: int, frame: object) -> None:
        restore()
        raise Terminated(number)

    with _handled(FROM_SCHEDULERS, interrupt) as restore:
        yield


@contextmanager
def immediate_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process at once: for a call from which they cannot wake Python."""
    with _handled(FROM_SCHEDULERS, signal.SIG_DFL):
        yield


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGUSR1 from now on, in a process that ends by one: the same signal may reach the
    processes of a run seconds apart, and has reached all of them through the first."""
    if threading.current_thread() is threading.main_thread():
        for number in FROM_SCHEDULERS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(numbers: tuple[int, ...], handler: Any) -> Iterator[Callable[[], None]]:
    """Within it the signals go to the handler, in the main thread; what it gives takes them back."""
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, before in previous.items():
            signal.signal(number, before)

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()


def shielded(loader: DataLoader) -> DataLoader:
    """Put the loader's worker processes out of reach of signals that are for the main process.

    Ctrl-C in a shell goes to the whole group, a signal of Slurm's to every process of a task. The main
    process decides what to do then, and to finish its step it needs workers that live; it still ends them by
    a signal of its own.
    """
    loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
    return loader


def _init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    main = multiprocessing.parent_process()
    if main is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # in threads to come too
        threading.Thread(target=_heed, args=(main.pid,), daemon=True).start()
    elif hasattr(os, "setpgid"):  # macOS: of Ctrl-C at least
        os.setpgid(0, 0)
    if then is not None:
        then(worker)


def _heed(pid: int) -> None:
    """End this process by the first signal of STOPPING that process `pid` sends; those of others pass."""
    while signal.sigwaitinfo(STOPPING).si_pid != pid:
        pass
    os._exit(0)
