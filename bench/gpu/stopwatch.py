"""How calls are timed on a GPU: by events, as replays of a captured graph, in turns."""

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.gpu.cases import Record
from vtp.timing import pairwise_ratio, take_turns, timed

WARM_UP = 3  # calls before a capture, in which libraries choose and allocate
FLUSHED_BYTES = 512 * 2**20  # several times the largest L2
LEAD_SECONDS = 2e-3  # of writing before a sample: meanwhile the host queues the sample's launches
TURN_SECONDS = 0.01  # replays in one turn take at least that,
MOST_REPLAYS = 50  # but there are no more of them

METHOD = (
    "Everyone is a captured CUDA graph; they take turns round by round in random order. Models are replayed "
    f"back to back for at least {TURN_SECONDS * 1e3:g} ms, after one replay that is not counted, as in a "
    f"server. Ops are replayed once, after {FLUSHED_BYTES >> 20} MiB were written: L2 holds no operand. "
    "Times are CUDA events'. Medians; ratios are medians of ratios within a round."
)


class Captured:
    """A call as a CUDA graph; without a GPU the call itself.

    Args:
        call: takes no arguments, and the same memory each time.

    Attributes:
        outputs: of the last replay.
    """

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self.graph = None
        self._call = call  # with the tensors that the graph reads: it holds addresses, not tensors
        if device.type != "cuda":
            self.outputs = call()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call()

    def __call__(self) -> Tensor:
        if self.graph is None:
            self.outputs = self._call()
        else:
            self.graph.replay()
        return self.outputs


class Flush:
    """Writes that leave nothing in L2, for as long as the host needs to queue what comes next."""

    def __init__(self, device: torch.device) -> None:
        self.times = 0
        if device.type == "cuda":
            self.buffer = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
            seconds = statistics.median(event_seconds(self.buffer.zero_) for _ in range(5))
            self.times = math.ceil(LEAD_SECONDS / seconds)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.buffer.zero_()


def event_seconds(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of one call on the GPU, by events; `before` runs ahead of it, untimed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class Warm:
    """Takes turns by replaying back to back; `seconds` has the mean of each turn."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call, self.device = call, device
        self.seconds: list[float] = []
        self.replays = 1
        usual = statistics.median(self._mean() for _ in range(WARM_UP))
        self.replays = min(MOST_REPLAYS, math.ceil(TURN_SECONDS / usual)) if device.type == "cuda" else 1

    def step(self) -> None:
        self.seconds.append(self._mean())

    def _mean(self) -> float:
        if self.device.type != "cuda":
            return timed(self.call, self.device)

        def replay() -> None:
            for _ in range(self.replays):
                self.call()

        return event_seconds(replay, before=self.call) / self.replays


class Cold:
    """Takes turns one call at a time with nothing in L2; `seconds` has the time of each."""

    def __init__(self, call: Callable[[], object], device: torch.device, flush: Flush) -> None:
        self.call, self.device, self.flush = call, device, flush
        self.seconds: list[float] = []

    def step(self) -> None:
        if self.device.type == "cuda":
            self.seconds.append(event_seconds(self.call, before=self.flush))
        else:
            self.seconds.append(timed(self.call, self.device))


def in_turns(steps: Mapping[str, Warm | Cold], rounds: int, seconds: float) -> dict[str, Record]:
    """Of each the median time and the ratio of its time to that of the first, which is its reference."""
    done = take_turns(steps, rounds, seconds)
    reference = next(iter(steps.values())).seconds
    return {
        name: {
            "median_seconds": statistics.median(step.seconds),
            "over_reference": pairwise_ratio(step.seconds, reference),
            "rounds": done,
        }
        for name, step in steps.items()
    }
