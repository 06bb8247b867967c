"""What a run on a GPU consists of: parts, their cases, and what a case is told and may note."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

NOT_MEASURED = "not measured"
MEASURED = "measured"
TIME_IS_UP = f"{NOT_MEASURED}: time is up"
NOT_DONE = "failed: not done"  # begins the status of a case that was ended

# Changes to timm's models that make toys of them, for a rehearsal.
TOY = {"img_size": 32, "depth": 1, "num_classes": 16, "embed_dim": 48, "num_heads": 3}

Record = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a case runs in.

    device: the GPU, or in a rehearsal the CPU.
    toy: whether this is a rehearsal, in which sizes are toys.
    seconds: after which the case is ended, whatever it does.
    note: hands on figures that stand although the case itself may yet fail; keys of the case's record.
    """

    device: torch.device
    toy: bool
    seconds: float
    note: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """One measurement.

    run: makes the record; an exception is a failure.
    seconds: after which it is given up, so that what comes behind it has its time.
    """

    name: str
    run: Callable[[Context], Record]
    seconds: float


@dataclass(frozen=True)
class Part:
    """Cases that share the time of their part; they come in order of value.

    module: has `cases(toy)`, its list of cases.
    share: of the time of the run; what a part leaves goes to those behind it.
    """

    name: str
    module: str
    share: float


PARTS = (
    Part("numerics", "bench.gpu.numerics", 0.30),
    Part("models", "bench.gpu.models", 0.38),
    Part("training", "bench.gpu.training", 0.14),
    Part("ops", "bench.gpu.ops", 0.11),
    Part("configurations", "bench.gpu.configurations", 0.07),
)


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
