"""The programs of a launch: in which order they run, and which of them reads and writes what."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.guarded_memory import replaced


class RaceError(AssertionError):
    """Two programs of one launch use the same element, and one of them writes it."""


class AtomicError(AssertionError):
    """The kernel uses atomics: reductions are two-stage here."""


class RawBfloat16Error(AssertionError):
    """The kernel does arithmetic on bfloat16 without a cast to float32: right on a GPU, wrong here."""


@dataclass
class _Options:
    order: int | str = 0
    races: bool = True


_options = _Options()


@contextlib.contextmanager
def programs(order: int | str = 0, races: bool = True) -> Iterator[None]:
    """How launches run: in "natural" or "reversed" order or shuffled by a seed; with race detection or not.

    Without this: shuffled by seed 0, with race detection.
    """
    with replaced([(_options, "order", order), (_options, "races", races)]):
        yield


def permutation(n: int) -> np.ndarray:
    """In which order `n` programs run."""
    if _options.order == "natural":
        return np.arange(n)
    if _options.order == "reversed":
        return np.arange(n)[::-1]
    return np.random.default_rng(_options.order).permutation(n)


@dataclass
class _Buffer:
    """Who read and wrote each unit (the smallest element) of a storage: 0 nobody, else 1 + a program."""

    SEVERAL = -1

    name: str
    begin: int
    end: int
    unit: int

    def _nobody(self) -> np.ndarray:
        # `zeros` takes no memory until it is touched.
        return np.zeros(-(-(self.end - self.begin) // self.unit), np.int32)

    readers = cached_property(_nobody)
    writers = cached_property(_nobody)

    def access(self, addresses: np.ndarray, itemsize: int, program: int, is_write: bool) -> None:
        """`program` reads or writes the elements at `addresses`."""
        units = (addresses.astype(np.int64) - self.begin) // self.unit
        if itemsize > self.unit:
            units = (units[:, None] + np.arange(itemsize // self.unit)).ravel()
        user = 1 + program
        self._refuse_conflict(self.writers, "wrote", units, user, is_write)
        if is_write:
            self._refuse_conflict(self.readers, "read", units, user, is_write)
            self.writers[units] = user
        else:
            earlier = self.readers[units]
            self.readers[units] = np.where((earlier == 0) | (earlier == user), user, self.SEVERAL)

    def _refuse_conflict(
        self, users: np.ndarray, verb: str, units: np.ndarray, user: int, is_write: bool
    ) -> None:
        earlier = users[units]
        clash = (earlier != 0) & (earlier != user)
        if clash.any():
            first = clash.argmax()
            other = "several programs" if earlier[first] == self.SEVERAL else f"program {earlier[first] - 1}"
            raise RaceError(
                f"program {user - 1} {'writes' if is_write else 'reads'} byte {units[first] * self.unit} of "
                f"the memory of `{self.name}`, which {other} {verb} in the same launch"
            )


class Launch:
    """The memory of the launch under way, the program that runs, and the languages patched so far."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.program = 0
        self.patched: set[str] = set()
        storages: dict[tuple[int, int], tuple[str, int]] = {}
        for name, tensor in _tensors(arguments):
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            first_name, unit = storages.get(key, (name, tensor.itemsize))
            storages[key] = first_name, min(unit, tensor.itemsize)
        self.buffers = [
            _Buffer(name, *key, unit) for key, (name, unit) in storages.items() if key[0] < key[1]
        ]

    def start(self, program: int) -> None:
        """`program` runs from here on."""
        self.program = program

    def access(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, is_write: bool) -> None:
        """The program is about to load or store the elements at `pointers` where `mask`."""
        # The interpreter's mask is of integers, which would be indices, where a scalar is a part of it.
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        touched = [b for b in self.buffers if low < b.end and b.begin < high]
        if not any(b.begin <= low and high <= b.end for b in touched):
            self._note_stray(low, high, is_write)
        for buffer in touched if _options.races else ():
            inside = addresses[(addresses >= buffer.begin) & (addresses < buffer.end)]
            buffer.access(inside, itemsize, self.program, is_write)

    def _note_stray(self, low: int, high: int, is_write: bool) -> None:
        """Said before the access, since the process may not survive it."""
        where = "outside of all tensors"
        if self.buffers:
            near = min(self.buffers, key=lambda b: max(b.begin - low, high - b.end))
            past, before = high - near.end, near.begin - low
            where = f"{past} bytes past the end" if past > 0 else f"{before} bytes before the beginning"
            where += f" of the memory of `{near.name}`"
        crash_report.note(f"program {self.program} {'stores' if is_write else 'loads'} {where}")


_launches: list[Launch] = []


@contextlib.contextmanager
def launch(arguments: dict[str, Any]) -> Iterator[None]:
    """Watch the programs that run meanwhile; `arguments` are the kernel's."""
    _launches.append(Launch(arguments))
    try:
        yield
    finally:
        _launches.pop()


def current() -> Launch:
    """The launch under way."""
    return _launches[-1]


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, key)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
    elif hasattr(value, "base"):  # a TensorDescriptor
        yield from _tensors(value.base, name)


class _CrashReport:
    """What is left of a worker that crashed: its last stray access, and the kernel's line."""

    file = None

    def open(self, path: Path) -> None:
        self.file = path.open("w+")
        faulthandler.enable(self.file, all_threads=False)

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate()

    def note(self, text: str) -> None:
        if self.file:
            self.clear()
            print(text, file=self.file, flush=True)

    @staticmethod
    def read(path: Path) -> str:
        """The report without the frames of the machinery."""
        machinery = ("/site-packages/", "/multiprocessing/", "Extension modules:", "<string>")
        lines = path.read_text().splitlines() if path.exists() else []
        return "\n".join(line for line in lines if line and not any(part in line for part in machinery))


crash_report = _CrashReport()
