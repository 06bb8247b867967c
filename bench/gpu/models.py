"""Whole models: the compact one on our kernels beside what one could run instead, all as CUDA graphs.

Beside `vtp.optimize` there are the same compact model on PyTorch's operators, eager and compiled; the same
with widths filled up to 16 and whole heads, so that PyTorch's fused attention takes it; the dense model; and
a dense transformer of the same MACs: each compiled for its one batch size, in bfloat16. The model's outputs
are compared with float64, which is computed for a few images and repeated, before anything is timed.

torch.compile needs half a minute for a model whose layers all differ, and much more with max-autotune. So
`Ahead` compiles in other processes while the numerics run, for which the GPU need not be quiet; here their
work is found in inductor's cache. It ends before the first of these cases. What is not ready within its case
is not measured. Max-autotune comes last.
"""

import contextlib
import copy
import functools
import gc
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

import vtp
from bench.gpu.cases import MEASURED, NOT_MEASURED, TOY, Case, Context, Record, first_line
from bench.gpu.stopwatch import Captured, Warm, event_seconds, in_turns
from bench.irregular import cut, gated_model, padded, same_macs_dense, zeros_in_place
from vtp.comparison.comparison import CEILINGS, FACTOR, TINY, OutOfTime, relative_error, time_limit
from vtp.comparison.runtimes import own_code
from vtp.pruning.compact import plain_operators
from vtp_kernels import launching

ROOT = Path(__file__).resolve().parents[2]
RATE = 0.4  # share of dimensions that is removed
IMAGES = 8  # that differ; a larger batch repeats them
ROUNDS, ROUNDS_SECONDS = 30, 4.0
PROFILED_REPLAYS, MOST_KERNELS = 5, 25
KEPT_SECONDS = ROUNDS_SECONDS + 4  # of a case, for its rounds: preparing ends before
MODELS = {
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "DINOv3-S+": "vit_small_plus_patch16_dinov3",  # with rotary embedding and SwiGLU
}

# In order of value: the largest batch and single images, which have bars of their own, then what is between.
SIZES = (
    ("DeiT-B", 256), ("DeiT-B", 1), ("DeiT-S", 1), ("DeiT-B", 32), ("DeiT-S", 256), ("DeiT-S", 32),
    ("DeiT-B", 8), ("DeiT-S", 8), ("DeiT-B", 128), ("DeiT-S", 128),
)  # fmt: skip
PROFILED_SIZES = SIZES[:2]
PAIRED_SIZES = (("DINOv3-S+", 1), ("DINOv3-S+", 3))  # with so few rows that a product can have an epilogue
ROTATED_SIZES = (("DINOv3-S+", 128),)  # with so many that rotation is a pass, which attention would save
AUTOTUNED_SIZES = (("DeiT-B", 32), ("DeiT-B", 1), ("DeiT-S", 1))


@dataclass(frozen=True)
class Runtime:
    """A way to run a model.

    model: which of `Variants`; mode: None for eager PyTorch, else torch.compile's; forced: None, or for our
    ops and packing what `launching.forced_path` takes, which may be nothing.
    """

    name: str
    model: str
    mode: str | None = None
    forced: tuple[tuple[str, str], ...] | None = None


OURS = Runtime("ours", "compact", forced=())
# What we would be if tables or predictions said otherwise, of which each wants to know at two batch sizes.
OTHERWISE = (
    Runtime("ours, ragged heads", "compact", forced=(("packed_attention", "ragged"),)),
    Runtime("ours, padded heads", "compact", forced=(("packed_attention", "padded"),)),
    Runtime("ours, products of the vendor", "compact", forced=(("compact_linear", "vendor"),)),
    Runtime("ours, products of our own", "compact", forced=(("compact_linear", "kernel"),)),
)
PASSES = (
    Runtime("ours, rotation in a pass", "compact", forced=(("rotated_linear", "pass"),)),
    Runtime("ours, SwiGLU in a pass", "compact", forced=(("swiglu", "pass"),)),
)
# Rotation in attention is in our own: beside it the other two ways, by the rows, with our own too.
IN_ATTENTION = (
    OTHERWISE[0],
    Runtime(
        "ours, ragged heads that attention rotates",
        "compact",
        forced=(("packed_attention", "ragged"), ("rotated_linear", "attention")),
    ),
)
DEFAULT, AUTOTUNED = "default", "max-autotune-no-cudagraphs"  # the graph is captured here, as everyone's
RUNTIMES = (  # those that take longest to compile last
    OURS,
    Runtime("dense, compiled", "dense", DEFAULT),
    Runtime("dense of the same MACs, compiled", "same MACs", DEFAULT),
    Runtime("padded to 16, compiled", "padded", DEFAULT),
    Runtime("compact, eager", "compact"),
    Runtime("compact, compiled", "compact", DEFAULT),
)
AUTOTUNED_RUNTIMES = (
    OURS,
    Runtime("dense, max-autotune", "dense", AUTOTUNED),
    Runtime("padded to 16, max-autotune", "padded", AUTOTUNED),
    Runtime("compact, max-autotune", "compact", AUTOTUNED),
)


def cases(toy: bool) -> list[Case]:
    """The card's ceilings, then models by value."""
    found = [Case("ceilings", ceilings, 15)]
    for name, batch in SIZES[: 2 if toy else None]:
        found.append(Case(f"{name}, batch {batch}", functools.partial(measure, name, batch, RUNTIMES), 60))
        if (name, batch) in PROFILED_SIZES:
            run = functools.partial(measure, name, batch, (OURS, *OTHERWISE))
            found.append(Case(f"{name}, batch {batch}, otherwise", run, 30))
            found.append(Case(f"{name}, batch {batch}, profile", functools.partial(profile, name, batch), 20))
    for name, batch in PAIRED_SIZES[: 1 if toy else None]:
        run = functools.partial(measure, name, batch, (OURS, *PASSES, *IN_ATTENTION))
        found.append(Case(f"{name}, batch {batch}, epilogues", run, 30))
    for name, batch in ROTATED_SIZES:
        run = functools.partial(measure, name, batch, (OURS, *IN_ATTENTION))
        found.append(Case(f"{name}, batch {batch}, rotation", run, 30))
    for name, batch in AUTOTUNED_SIZES[: 1 if toy else None]:
        run = functools.partial(measure, name, batch, AUTOTUNED_RUNTIMES)
        found.append(Case(f"{name}, batch {batch}, max-autotune", run, 90))
    return found


def ceilings(context: Context) -> Record:
    """FLOP/s of a large bfloat16 product of random numbers, and bytes/s of a large copy."""
    size = 64 if context.toy else 8192
    a, b = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    source = torch.randint(255, (size * size * 16,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    calls = {"flops_per_second": lambda: torch.mm(a, b), "bytes_per_second": lambda: target.copy_(source)}
    amounts = {"flops_per_second": 2 * size**3, "bytes_per_second": 2 * source.numel()}
    record = {}
    for name, call in calls.items():
        times = [_seconds(call, context) for _ in range(5 if context.toy else 25)]
        record[name] = amounts[name] / statistics.median(times[len(times) // 5 :])
    return record


def _seconds(call: Callable[[], object], context: Context) -> float:
    if context.device.type == "cuda":
        return event_seconds(call)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# --------------------------------------------------------------------------------
# One model at one batch size


class Variants:
    """The compact model and what might be run in its place, in float32 on the device, with outputs in
    float64 for `IMAGES` images; each made when it is first asked for."""

    def __init__(self, name: str, device: torch.device, toy: bool) -> None:
        self.device = device
        gated = gated_model(MODELS[name], **TOY if toy else {})
        plan = vtp.make_plan(gated, rate=RATE, min_keep=0)
        compact = cut(gated, RATE)
        macs = vtp.count(compact).macs
        self._make: dict[str, Callable[[], nn.Module]] = {
            "compact": lambda: compact,
            "padded": lambda: padded(gated, plan, whole_heads=True),
            "dense": lambda: zeros_in_place(gated, vtp.make_plan(gated, rate=0.0)),
            "same MACs": lambda: same_macs_dense(plan.architecture, macs),
        }
        self._made: dict[str, tuple[nn.Module, Tensor, float]] = {}
        patch = compact.patch_embed
        generator = torch.Generator().manual_seed(0)
        shape = IMAGES, patch.proj.in_channels, *patch.img_size
        self.images = torch.randn(shape, generator=generator).to(self.device)

    def batch(self, size: int) -> Tensor:
        """Images [size, C, H, W] in bfloat16."""
        repeats = -(-size // IMAGES)
        return self.images.bfloat16().repeat(repeats, 1, 1, 1)[:size].contiguous()

    @torch.inference_mode()
    def of(self, kind: str) -> tuple[nn.Module, Tensor, float]:
        """The model; its logits [IMAGES, classes] in float64; the largest relative error allowed."""
        if kind not in self._made:
            model = self._make[kind]().to(self.device).eval()
            with plain_operators():
                exact = copy.deepcopy(model).double()(self.images.double())
                plain = copy.deepcopy(model).bfloat16()(self.images.bfloat16())
            bound = min(CEILINGS["bfloat16"], FACTOR * relative_error(plain, exact) + TINY["bfloat16"])
            self._made[kind] = model, exact, bound
        return self._made[kind]


variants = functools.cache(Variants)  # cases share models


def prepare(runtime: Runtime, model: nn.Module, images: Tensor, toy: bool) -> Callable[[], Tensor]:
    """A call without arguments that runs the model on `images`; compiled, if it has to be."""
    if runtime.forced is not None:
        with _forced(runtime.forced):
            fast = vtp.optimize(model, torch.bfloat16)

        def call() -> Tensor:
            with _forced(runtime.forced or ()):
                return fast(images)

        return call
    model = copy.deepcopy(model).bfloat16()
    if runtime.mode is None:
        return lambda: model(images)
    # In a rehearsal nothing is gained by a compiler.
    options = {"backend": "eager"} if toy else {"mode": runtime.mode}
    compiled = torch.compile(own_code(model), dynamic=False, **options)
    compiled(images)
    return lambda: compiled(images)


@contextlib.contextmanager
def _forced(paths: tuple[tuple[str, str], ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for op, path in paths:
            stack.enter_context(launching.forced_path(op, path))
        yield


@torch.inference_mode()
def measure(name: str, batch: int, runtimes: tuple[Runtime, ...], context: Context) -> Record:
    """Prepare, check and capture everyone, then let them take turns."""
    until = time.monotonic() + context.seconds - KEPT_SECONDS
    subject = variants(name, context.device, context.toy)
    images = subject.batch(2 if context.toy else batch)
    pending = {runtime.name: {"status": NOT_MEASURED} for runtime in runtimes}
    record: Record = {"batch": len(images), "timed": pending}
    turns: dict[str, Warm] = {}
    with plain_operators(), _without_compiled_code():
        for runtime in runtimes:
            found, call = ready(runtime, subject, images, context, until)
            record["timed"][runtime.name] = found
            context.note(record)
            if call is not None:
                turns[runtime.name] = Warm(call, context.device)
        if OURS.name in turns:
            figures = in_turns(turns, 3 if context.toy else ROUNDS, ROUNDS_SECONDS)
            for label, figure in figures.items():
                record["timed"][label] |= figure
    return record


@torch.inference_mode()
def profile(name: str, batch: int, context: Context) -> Record:
    """Where the time of our model goes: of each kernel its launches and its seconds in one replay."""
    subject = variants(name, context.device, context.toy)
    images = subject.batch(2 if context.toy else batch)
    call = Captured(prepare(OURS, subject.of(OURS.model)[0], images, context.toy), context.device)
    call()
    return {"kernels": kernels(call, context, PROFILED_REPLAYS)[:MOST_KERNELS]}


def kernels(call: Callable[[], object], context: Context, calls: int) -> list[Record]:
    """Of each kernel its launches and its seconds in one call, of so many; the longest first."""
    on_gpu = context.device.type == "cuda"
    activities = [getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    found = [
        {
            "kernel": event.key[:120],
            "launches": event.count / calls,
            "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6 / calls,
        }
        for event in profiler.key_averages()
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def ready(
    runtime: Runtime, subject: Variants, images: Tensor, context: Context, until: float
) -> tuple[Record, Callable[[], Tensor] | None]:
    """The record of a runtime so far, and its captured call if that was right and ready by then."""
    started = time.monotonic()
    try:
        with time_limit(math.inf if runtime is OURS else max(until - started, 0.01)):
            model, exact, bound = subject.of(runtime.model)
            call = Captured(prepare(runtime, model, images, context.toy), context.device)
    except OutOfTime:
        if "torch._inductor.async_compile" in sys.modules:  # whose processes would disturb the others
            torch._inductor.async_compile.shutdown_compile_workers()
        return {"status": f"{NOT_MEASURED}: not ready in time"}, None
    except Exception as error:  # of a compiler, a launch: the others have their figures
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # raises where nothing runs any more: then the case ends here
        return {"status": f"failed: {first_line(error)}"}, None
    exact = exact.repeat(-(-len(images) // IMAGES), 1)[: len(images)]
    error = relative_error(call(), exact)
    record = {
        "status": MEASURED,
        "macs": vtp.count(model).macs,
        "error": error if math.isfinite(error) else None,
        "error_bound": bound,
        "prepare_seconds": round(time.monotonic() - started, 2),
    }
    if not error <= bound:  # nor NaN
        wrong = f"failed: wrong logits: relative error {error:.2g}, at most {bound:.2g} allowed"
        return record | {"status": wrong}, None
    return record, call


@contextlib.contextmanager
def _without_compiled_code() -> Iterator[None]:
    """What is compiled within goes afterwards, with its memory."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --------------------------------------------------------------------------------
# Compiling ahead


def jobs() -> list[tuple[str, int, Runtime]]:
    """All that has to be compiled, in the order of the cases."""
    found = [(*size, runtime) for size in SIZES for runtime in RUNTIMES]
    found += [(*size, runtime) for size in AUTOTUNED_SIZES for runtime in AUTOTUNED_RUNTIMES]
    return [job for job in found if job[2].mode is not None]


class Ahead:
    """Processes that compile what the cases will ask for, until they are ended."""

    def __init__(self, log: TextIO, processes: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.models", str(number), str(processes)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for number in range(processes)
        ]

    def end(self) -> None:
        """End them, with the compilers that they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = []


def compile_ahead(number: int, processes: int) -> None:
    """Do every `processes`-th job; what is compiled stays in inductor's cache."""
    from torch._inductor import config

    config.compile_threads = max(1, (os.cpu_count() or 1) // processes)
    context = Context(torch.device("cuda"), toy=False, seconds=math.inf, note=lambda content: None)
    for name, batch, runtime in jobs()[number::processes]:
        started = time.monotonic()
        subject = variants(name, context.device, context.toy)
        try:
            with torch.inference_mode(), plain_operators(), _without_compiled_code():
                prepare(runtime, subject.of(runtime.model)[0], subject.batch(batch), context.toy)
        except Exception as error:  # the case will say what is wrong with it
            print(f"ahead: {name}, batch {batch}, {runtime.name}: {first_line(error)}", flush=True)
            continue
        print(f"ahead: {name}, batch {batch}, {runtime.name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    compile_ahead(*map(int, sys.argv[1:]))
