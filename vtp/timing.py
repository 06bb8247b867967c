"""Latency of several models side by side: medians of rounds in which the models take turns."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtp.machine import turns


@dataclass(frozen=True)
class Latency:
    """median_ms: of one batch, milliseconds. speedup: median over rounds of the first model's time over this
    model's time in the same round, so that a machine whose speed drifts does not decide the comparison."""

    median_ms: float
    speedup: float


@torch.inference_mode()
def interleaved_latency(
    models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 8.0, min_rounds: int = 15
) -> dict[str, Latency]:
    """Time a forward pass of each model on `images` [B, C, H, W], in turn, in random order.

    Args:
        models: name to model, all on the device of `images`; the first is the reference of `speedup`.
        seconds: how long to go on once `min_rounds` are done.
    """
    order = list(models)
    for name in order * 3:  # warm-up: caches, allocator, first-call set-up
        _timed(models[name], images)
    times: dict[str, list[float]] = {name: [] for name in order}
    started = time.perf_counter()
    while len(times[order[0]]) < min_rounds or time.perf_counter() - started < seconds:
        for name in turns(order, len(times[order[0]])):
            times[name].append(_timed(models[name], images))
    reference = times[order[0]]
    return {
        name: Latency(
            1e3 * statistics.median(own),
            statistics.median(first / this for first, this in zip(reference, own, strict=True)),
        )
        for name, own in times.items()
    }


def _timed(model: nn.Module, images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
