"""A comparison: runtimes run the same model; each is checked, warmed up, and timed in turn with the others.

Nothing is timed that does not compute the same: outputs are compared with float64 before. What fails, is
missing or was not ready in time has a reason instead of a figure. A runtime over `SLOW` times slower than
ours is called once or twice and then stays out, unless its calls are short.
"""

import contextlib
import copy
import gc
import math
import signal
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtp.comparison.runtimes import REPEAT, Run, Runtime, Unsupported, prepare_eager
from vtp.machine import memory_bytes, peak_bytes
from vtp.runtime.accuracy import CEILINGS, relative_error
from vtp.timing import standard_error, synchronize, take_turns, timed
from vtp.words import counted

Record = dict[str, Any]

CPU = torch.device("cpu")

FACTOR = 2.0  # how many times the error of PyTorch's eager mode in the same dtype a runtime may make
TINY = {"float32": 1e-6, "bfloat16": 1e-3}  # and this much more, where eager is exact by luck

SLOW = 8.0  # times ours: a runtime slower than that leaves the rounds,
SLOW_CALL = 0.1  # seconds, if a call takes longer than this
SLOW_TWICE = 5.0  # seconds: a slow runtime is called a second time if one call takes less
SETTLED = 0.05  # the warm-up ends when the medians of three calls differ by less
WARM_UP_SECONDS = 10.0
SHORT = 0.25  # seconds: before a call that is shorter, another one brings caches and threads back
LEAST_TURN = 0.01  # seconds: a turn has as many calls as take that long,
MOST_CALLS = 20  # but not more than these

# --------------------------------------------------------------------------------
# Correctness: nothing is timed that does not compute the same

# Of each model what exporters made of it, and the seconds that it took.
_EXPORTS: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, float]]] = weakref.WeakKeyDictionary()


class Subject:
    """A model in float32 with its images, and what it has to put out.

    Args:
        images: [B, ...]; `repeats` times those, the batch that is timed.
        exact: outputs for `images` in float64, of another model that this one must equal.
        macs: of the model and one image, for the record.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        repeats: int = 1,
        exact: Tensor | None = None,
        macs: int | None = None,
    ) -> None:
        self.macs = macs
        self.model, self.images = model.eval(), images.repeat(repeats, *[1] * (images.ndim - 1))
        if exact is None:
            with torch.inference_mode():
                exact = copy.deepcopy(model).double()(images.double())
        self.exact = exact.repeat(repeats, *[1] * (exact.ndim - 1))
        self._errors: dict[str, float] = {}

    def exported(self, runtime: Runtime) -> tuple[Any, float | None]:
        """What `runtime.prepare` takes, and the seconds to make it; once for a model, whatever the batch."""
        if runtime.export is None:
            return self.model, None
        made = _EXPORTS.setdefault(self.model, {})
        if runtime.export not in made:
            started = time.perf_counter()
            source = runtime.export(self.model, tuple(self.images.shape[1:]))
            made[runtime.export] = source, time.perf_counter() - started
        return made[runtime.export]

    def eager_error(self, dtype: str) -> float:
        """Relative error of PyTorch's eager mode, on the first image: in bfloat16 eight may take a minute."""
        if dtype not in self._errors:
            with torch.inference_mode():
                logits = prepare_eager(self.model, self.images[:1], dtype=dtype)()
            self._errors[dtype] = relative_error(logits, self.exact[:1])
        return self._errors[dtype]

    def bound(self, runtime: Runtime) -> float:
        """The largest relative error that `runtime` may make: of one that chooses the arithmetic inside the
        ceiling alone."""
        ceiling = CEILINGS[runtime.dtype]
        if runtime.own_arithmetic:
            return ceiling
        return min(ceiling, FACTOR * self.eager_error(runtime.dtype) + TINY[runtime.dtype])


class OutOfTime(BaseException):
    """Raised by `time_limit`; no Exception, as compilers catch those."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what runs inside after so long, with `OutOfTime`. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or seconds == math.inf:
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: raised inside a destructor or a callback of the garbage collector, it is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ready(runtime: Runtime, subject: Subject, seconds: float) -> tuple[Record, Run | None]:
    """Prepare and check one runtime. Returns its record so far, and its call if there is something to time.

    Its record has the seconds to export the model, those to load it (compile and pack it, up to the end of
    the first call), and its memory: bytes at the peak of that call over those before it was loaded.

    Args:
        seconds: after which preparing it is given up.
    """
    device = subject.images.device
    record: Record = {
        "dtype": runtime.dtype,
        "status": "absent",
        "reason": runtime.unsupported_reason(device.type),
    }
    if record["reason"] is not None:
        return record, None
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            source, record["export_seconds"] = subject.exported(runtime)
        before = memory_bytes(device)
        left = seconds - (time.perf_counter() - started)
        started = time.perf_counter()
        with time_limit(left):
            run = runtime.prepare(source, subject.images)
    except OutOfTime:
        if "torch._inductor.async_compile" in sys.modules:  # whose processes would disturb the others
            torch._inductor.async_compile.shutdown_compile_workers()
        return record | {"status": "unready", "reason": "not ready in time; run again"}, None
    except Unsupported as error:
        return record | {"reason": str(error)}, None
    except Exception as error:  # of an exporter, a compiler, ...: the other runtimes have their figures
        return record | {"status": "failed", "reason": first_line(error)}, None
    try:
        with torch.inference_mode():
            called = time.perf_counter()
            outputs, peak = peak_bytes(run, device)
            ended = time.perf_counter()
            error = relative_error(outputs, subject.exact)
            record |= {"prepare_seconds": ended - started, "first_call_seconds": ended - called}
            record["memory_bytes"] = None if before is None or peak is None else peak - before
    except Exception as failure:
        return record | {"status": "failed", "reason": first_line(failure)}, None
    record |= {"error": error if math.isfinite(error) else None, "error_bound": subject.bound(runtime)}
    if (reason := _wrong((runtime, subject), outputs)) is not None:
        return record | {"status": "failed", "reason": reason}, None
    return record | {"status": "measured"}, run


def _wrong(entry: tuple[Runtime, Subject], outputs: Tensor | None) -> str | None:
    """What is wrong with the outputs, if anything."""
    runtime, subject = entry
    error, bound = relative_error(outputs, subject.exact), subject.bound(runtime)
    if error <= bound:  # nor NaN
        return None
    return f"wrong logits: relative error {error:.2g}, at most {bound:.2g} allowed"


def slowed(run: Run, share: float) -> Run:
    """`run`, then nothing for `share` of the time that it took: a slow-down that a comparison must show."""

    def call() -> Tensor:
        started = time.perf_counter()
        outputs = run()
        synchronize(outputs.device)
        ended = time.perf_counter()
        while time.perf_counter() - ended < share * (ended - started):
            pass
        return outputs

    return call


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table's notes."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


# --------------------------------------------------------------------------------
# Time


@dataclass
class Runner:
    """A call that is timed, and all its times: `warm_up` before the rounds, `seconds` in them."""

    run: Run
    device: torch.device = CPU
    warm_up: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    outputs: Tensor | None = None  # of the last call

    def call(self) -> float:
        """Call it once, and return the seconds that this took."""
        with torch.inference_mode():
            return timed(self._run, self.device)

    def _run(self) -> None:
        self.outputs = self.run()

    def step(self) -> None:
        """A round's turn: the median of its calls. What ran before has emptied the caches, and its threads
        may still be spinning."""
        usual = min(self.warm_up)
        if usual < SHORT:
            self.call()
        calls = math.ceil(LEAST_TURN / max(usual, LEAST_TURN / MOST_CALLS))
        self.seconds.append(statistics.median(self.call() for _ in range(calls)))

    def settle(self, limit: float) -> None:
        """Warm up until the median of three calls is near that of the three before, or `limit` has passed."""
        times = self.warm_up
        while sum(times) < limit:
            times.append(self.call())
            if len(times) >= 6:
                before, last = statistics.median(times[-6:-3]), statistics.median(times[-3:])
                if abs(last - before) < SETTLED * before:
                    return


@dataclass
class _Participant:
    """Takes turns until it breaks, without harm to the others."""

    runner: Runner
    failure: str | None = None

    def step(self) -> None:
        if self.failure is None:
            try:
                self.runner.step()
            except Exception as error:
                self.failure = first_line(error)


@dataclass(frozen=True)
class Budget:
    """rounds and seconds: of a case, see `take_turns`; prepare_seconds: for all runtimes of a case together,
    without ours; warm_up_seconds: for each; precision: rounds end early where the standard error of all
    ratios of "ours (repeat)" to "ours" is smaller."""

    rounds: int = 30
    seconds: float = 90.0
    prepare_seconds: float = 180.0
    warm_up_seconds: float = WARM_UP_SECONDS
    precision: float = 0.0


def compare_runtimes(
    entries: Mapping[str, tuple[Runtime, Subject]],
    budget: Budget,
    skip: Mapping[str, str] | None = None,
    *,
    report: Callable[[str], object] = lambda doing: None,
) -> Record:
    """Prepare, check and time all entries; rounds and, of each entry, its record.

    Args:
        entries: by label; `ours` of a dtype before those that are compared with it.
        skip: reasons why a label is not even prepared.
        report: is told what is being done.
    """
    torch._dynamo.reset()
    with no_collections():
        return _compare_runtimes(entries, budget, skip or {}, report)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """No garbage collection but those that are asked for, which then have less to look through."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.disable()
    if not frozen:  # else all would be unfrozen that somebody else has frozen
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _compare_runtimes(
    entries: Mapping[str, tuple[Runtime, Subject]],
    budget: Budget,
    skip: Mapping[str, str],
    report: Callable[[str], object],
) -> Record:
    records: dict[str, Record] = {}
    runners: dict[str, Runner] = {}
    started = time.perf_counter()
    for label, (runtime, subject) in entries.items():
        if label in skip:
            records[label] = {"dtype": runtime.dtype, "status": "skipped", "reason": skip[label]}
            continue
        report(f"preparing {label}")
        left = budget.prepare_seconds - (time.perf_counter() - started)
        records[label], run = ready(runtime, subject, math.inf if runtime.ours else left)
        records[label]["macs"] = subject.macs
        if run is not None:
            runners[label] = Runner(run, subject.images.device, [records[label]["first_call_seconds"]])
    with torch.compiler.set_stance("fail_on_recompile"):
        for label in list(runners):
            report(f"warming up {label}")
            if not _keeps_up(label, entries, records, runners, budget.warm_up_seconds):
                records[label] |= {"seconds": runners.pop(label).warm_up}
        report("taking turns")
        participants = {label: _Participant(runner) for label, runner in runners.items()}
        started = time.perf_counter()
        rounds = 0
        if runners:
            rounds = take_turns(
                participants, budget.rounds, budget.seconds, _precise(runners, budget.precision)
            )
        rounds_seconds = time.perf_counter() - started
    for label, runner in runners.items():
        reason = participants[label].failure or _wrong(entries[label], runner.outputs)
        if reason is None:
            records[label] |= {"warm_up_seconds": runner.warm_up, "seconds": runner.seconds}
        else:
            records[label] |= {"status": "failed", "reason": reason}
    return {"rounds": rounds, "rounds_seconds": rounds_seconds, "runtimes": records}


def _precise(runners: Mapping[str, Runner], precision: float) -> Callable[[int], bool]:
    """Whether so many rounds have shown what is noise; never where nothing takes part twice."""
    repeats = [(label, label.replace(REPEAT, "ours")) for label in runners if REPEAT in label]
    pairs = [(runners[again], runners[first]) for again, first in repeats if first in runners]

    def precise(rounds: int) -> bool:
        whole = [pair for pair in pairs if all(len(runner.seconds) == rounds for runner in pair)]
        return bool(pairs) and all(standard_error(a.seconds, b.seconds) < precision for a, b in whole)

    return precise


def _keeps_up(
    label: str,
    entries: Mapping[str, tuple[Runtime, Subject]],
    records: dict[str, Record],
    runners: Mapping[str, Runner],
    warm_up_seconds: float,
) -> bool:
    """Warm one runner up, unless it is so slow, or broken, that it has to leave; its record then says so."""
    runtime, runner = entries[label][0], runners[label]
    ours = [
        r for name, r in runners.items() if entries[name][0].ours and entries[name][0].dtype == runtime.dtype
    ]
    try:
        if ours and runner is not ours[0]:
            usual = statistics.median(ours[0].warm_up[-3:])
            limit = max(SLOW * usual, SLOW_CALL)
            if limit < runner.warm_up[0] < SLOW_TWICE:
                runner.warm_up.append(runner.call())
            if (fastest := min(runner.warm_up)) > limit:
                times = fastest / usual
                reason = (
                    f"{times:.0f} times ours in {counted(len(runner.warm_up), 'call')}, then left the rounds"
                )
                records[label] |= {"status": "slow", "reason": reason, "times_ours": times}
                return False
        runner.settle(warm_up_seconds)
    except Exception as error:
        records[label] |= {"status": "failed", "reason": first_line(error)}
        return False
    return True
