"""Random numbers as functions of what they are for: they depend neither on what was drawn before nor on which
process or worker draws them."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info


def seed_of(*key: object) -> int:
    """A 32-bit seed that depends on all of key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, those of its accelerators too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seeds(*numbers: int) -> tuple[int, int, int]:
    """Seeds for Python's, NumPy's and torch's generator: well-mixed functions of all the int64 numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=20).digest()
    return struct.unpack("<QIQ", digest)


def seed_generators(*numbers: int) -> None:
    """Seed the three global generators of the CPU from int64 numbers."""
    for_python, for_numpy, for_torch = seeds(*numbers)
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed, which also seeds every accelerator's generator and is 200 times as slow.
    torch.default_generator.manual_seed(for_torch)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the three global generators as they were found, unless this is a worker process, where nobody
    else draws from them."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
