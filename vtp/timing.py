"""Taking turns: how things are timed beside each other on a machine whose speed drifts.

All that are compared run round by round, in random order, and a claim is the median over rounds of the ratio
of two times of the same round. Absolute times are shown and never compared.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

LEAST_ROUNDS = 5  # the fewest that have quartiles worth printing
ENOUGH_ROUNDS = 10  # the fewest that say how much times scatter


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU from when it is idle until it has done what the call gave it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


class Step(Protocol):
    """Something that takes turns and notes the time of each for itself."""

    def step(self) -> object: ...


class Stopwatch:
    """A call that takes turns, and the seconds of each of its turns."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call, self.device = call, device
        self.seconds: list[float] = []

    def step(self) -> None:
        self.seconds.append(timed(self.call, self.device))


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: at random, but always the same, so that all follow all others."""
    return random.Random(number).sample(names, len(names))


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    seconds: float,
    precise: Callable[[int], bool] = lambda done: False,
    *,
    least_rounds: int = LEAST_ROUNDS,
) -> int:
    """Round by round, one step of each. Returns the number of rounds.

    Args:
        rounds: how many; fewer, but at least `least_rounds`, where one more would exceed `seconds`.
        precise: whether so many are enough, asked from `ENOUGH_ROUNDS` on.
    """
    started = time.perf_counter()
    for done in range(rounds):
        elapsed = time.perf_counter() - started
        if done >= least_rounds and elapsed * (done + 1) / done > seconds:
            return done
        if done >= ENOUGH_ROUNDS and precise(done):
            return done
        for name in turns(list(steps), done):
            steps[name].step()
    return rounds


def pairwise_ratio(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles over rounds of own time over the reference's time in the same round."""
    ratios = [this / other for this, other in zip(own, reference, strict=True)]
    if len(ratios) == 1:
        ratios *= 2
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def standard_error(own: Sequence[float], reference: Sequence[float]) -> float:
    """Standard error of the median of `pairwise_ratio`: sqrt(pi / 2) sigma / sqrt(rounds) of a normal
    distribution, whose quartiles are 1.349 sigma apart."""
    ratio = pairwise_ratio(own, reference)
    return math.sqrt(math.pi / 2 / len(own)) * (ratio["q3"] - ratio["q1"]) / 1.349


@dataclass(frozen=True)
class Latency:
    """median_ms: of one batch, milliseconds. speedup: median over rounds of the first model's time over this
    model's time in the same round, so that a machine whose speed drifts does not decide the comparison."""

    median_ms: float
    speedup: float


@torch.inference_mode()
def interleaved_latency(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    *,
    seconds: float = 8.0,
    min_rounds: int = 15,
) -> dict[str, Latency]:
    """Time a forward pass of each model on `images` [B, C, H, W], in turn, in random order.

    Args:
        models: name to model or another function, all on the device of `images`; the first is the reference
            of `speedup`.
        seconds: how long to go on once `min_rounds` are done.
    """
    stopwatches = {name: Stopwatch(partial(model, images), images.device) for name, model in models.items()}
    for stopwatch in list(stopwatches.values()) * 3:  # warm-up: caches, allocator, first-call set-up
        stopwatch.call()
    take_turns(stopwatches, 10**9, seconds, least_rounds=min_rounds)
    reference = next(iter(stopwatches.values())).seconds
    return {
        name: Latency(
            1e3 * statistics.median(stopwatch.seconds),
            pairwise_ratio(reference, stopwatch.seconds)["median"],
        )
        for name, stopwatch in stopwatches.items()
    }
