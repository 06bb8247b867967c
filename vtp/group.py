"""What processes that work on one thing together tell each other: sums, what the first has, errors of one.

A group is one of torch.distributed's; all of its processes make the same calls in the same order. None stands
for this process alone, and then nothing is sent: what takes a group computes the same without one, bit for
bit. A group is always given, never found: a function that took the default one by itself would hang where one
process calls it alone, as programs do for work that is to be done once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | None"  # a text, as a PyTorch may be built without it
T = TypeVar("T")


class RankError(RuntimeError):
    """Another process of the group failed; the message says which, and why."""


def world() -> Group:
    """All processes that were started together, or None where there is one, or none has joined yet."""
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if joined else None


def started_as_first() -> bool:
    """Whether this process is the only one or the first, as torchrun, accelerate launch and MPI say in the
    environment of those that they start: for who does not join the others, and leaves work to the first."""
    for size, rank in (
        ("WORLD_SIZE", "RANK"),
        ("PMI_SIZE", "PMI_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ):
        if int(os.environ.get(size, 1)) > 1:
            return int(os.environ.get(rank, 0)) == 0
    return True


def place(group: Group) -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def is_first(group: Group) -> bool:
    """Whether this is the process that speaks and writes."""
    return place(group)[0] == 0


def share(count: int, group: Group) -> int:
    """How many of so many things this process has, that are dealt in turn: number i to process i mod size."""
    rank, size = place(group)
    return len(range(rank, count, size))


def sum_over(group: Group, *tensors: Tensor) -> None:
    """Make each tensor the sum of those of all processes, in place; the same bits everywhere."""
    if group is not None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


def take_from_first(group: Group, *tensors: Tensor | None) -> None:
    """Overwrite each tensor by the first process's; None, where a layer has no bias, stays None."""
    if group is not None:
        for tensor in tensors:
            if tensor is not None:
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, group=group, group_src=0)
                tensor.detach().copy_(sent)


def gathered(group: Group, value: T) -> list[T]:
    """The values of all processes, in their order."""
    if group is None:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def first_makes(group: Group, make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; the others do not call it.

    The others wait for it as in any collective: for no longer than the group's timeout, of 15 minutes where
    `vtp.training.ranks` has made it.

    Raises what it raises on the first process, and RankError on the others.
    """
    if group is None:
        return make()
    made: list[T | None] = [None]
    with together(group):
        if is_first(group):
            made = [make()]
    dist.broadcast_object_list(made, group=group, group_src=0)
    return made[0]  # type: ignore[return-value]


@contextmanager
def together(group: Group) -> Iterator[None]:
    """An error of one process in here ends it in all: the others get a RankError where it ends, instead of
    waiting for one that does not come any more. In here nothing is sent."""
    mine = None
    try:
        yield
    except Exception as error:
        mine = error
    if group is not None:
        _wait_for_all(group)
    for rank, text in enumerate(gathered(group, None if mine is None else str(mine) or repr(mine))):
        if mine is None and text is not None:
            raise RankError(f"rank {rank}: {text}")
    if mine is not None:
        raise mine


def _wait_for_all(group: dist.ProcessGroup) -> None:
    """A barrier in which this process hears of signals: a collective that blocks acts on none until its end,
    and the first process may work for minutes before it comes."""
    barrier, pause = dist.barrier(group, async_op=True), 1e-3
    while not barrier.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    barrier.wait()


def refuse_different(group: Group, name: str, text: str) -> None:
    """Raise ValueError unless all processes have this text, which stands for what they call `name`."""
    first, *others = gathered(group, text)
    if odd := [rank for rank, other in enumerate(others, start=1) if other != first]:
        raise ValueError(f"{name}: ranks {odd} have another one than rank 0, expected the same on all ranks")
