"""Is `vtp.optimize` on a CPU faster than what else runs the same compact model, and does a cut buy its MACs?

All peers get one compact DeiT (random weights, 40% of dimensions removed, every layer and head another
width), the same images and the same number of threads. Four cases:

- models: one forward pass of the model by every peer that is installed.
- speedup: dense over compact, both on our engine, beside dense MACs over compact MACs.
- widths: time per MAC of a feed-forward branch at every width from 449 to 511.
- rate: the best rate that any library reaches on a large square product, and our engine's inside a model.
- gemm: rates of single products at the shapes of compact models.

A peer is timed only if its logits are right: against float64, at most twice the error of PyTorch's eager mode
in the same dtype (ONNX Runtime and OpenVINO, whose arithmetic is their own: `CEILINGS`). What fails, is
missing or was not ready in time is shown with its reason and has no figure. Each warms up until its times
settle, then they take turns round by round in rotating order; ratios are of times in the same round. A peer
over 20 times slower than ours is called once or twice and then stays out, also of larger cases.

Results are written after each case, and a run takes up what is there for the same machine, versions, threads
and options, whatever the commit: use --fresh to measure changed code. Exports and compilers have a time limit
for each case; compilers keep on disk what they have built, so that a second run measures those that were not
ready in the first.

    python bench/cpu_engine.py
    python bench/cpu_engine.py --markdown      # the README's tables, from the file that a run wrote
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cpu_peers import (
    DTYPES,
    PEERS,
    FeedForward,
    Peer,
    Run,
    Unsupported,
    gemm_peers,
    prepare_eager,
    prepare_feed_forward,
)
from cpu_tables import Record, markdown, notes, place, show
from measure import (
    commit,
    hardware,
    irregular_models,
    positive,
    randomize_vectors,
    relative_error,
    take_turns,
    vector_flags,
)
from rich.console import Console
from torch import Tensor, nn

import vtp
from vtp.files import FileError, write_atomic
from vtp.pipeline import environment

RESULTS = Path(__file__).parent / "results" / "cpu_engine.json"
CASES = ("models", "speedup", "widths", "rate", "gemm")
# M, K, N of linear layers of compact models, batches 1 and 8: tiny's fc1, small's qkv, base's fc1 and fc2.
SHAPES = [(M, *widths) for M in (197, 1576) for widths in ((115, 461), (231, 1003), (461, 1843), (1843, 768))]
RATE = 0.4
TOKENS = 197  # of an image: the rows of a product at batch 1

FACTOR = 2.0  # how many times the error of PyTorch's eager mode in the same dtype a peer may make
TINY = {"float32": 1e-6, "bfloat16": 1e-3}  # and this much more, where eager is exact by luck
# Largest relative error (norm of the difference over norm) of any peer, and the only bound of those that
# choose the arithmetic inside: a hundred float32 roundings, ten bfloat16 roundings.
CEILINGS = {"float32": 1e-5, "bfloat16": 5e-2}

SLOW = 20.0  # times ours: a peer slower than that leaves the rounds
SLOW_TWICE = 5.0  # seconds: a slow peer is called a second time if one call takes less
SETTLED = 0.05  # the warm-up ends when the medians of three calls differ by less
WARM_UP_SECONDS = 10.0
SHORT = 0.25  # seconds: before a call that is shorter, another one brings caches and threads back

Rows = list[list[str]]  # the first is the header

# --------------------------------------------------------------------------------
# Correctness: nothing is timed that does not compute the same


class Subject:
    """A model in float32 with its images, and what it has to put out."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model.eval(), images
        with torch.inference_mode():
            self.exact = copy.deepcopy(model).double()(images.double())
        self._errors: dict[str, float] = {}

    def eager_error(self, dtype: str) -> float:
        """Relative error of PyTorch's eager mode, on the first image: in bfloat16 eight may take a minute."""
        if dtype not in self._errors:
            with torch.inference_mode():
                logits = prepare_eager(self.model, self.images[:1], dtype=dtype)()
            self._errors[dtype] = relative_error(logits, self.exact[:1])
        return self._errors[dtype]

    def bound(self, peer: Peer) -> float:
        """The largest relative error that `peer` may make."""
        ceiling = CEILINGS[peer.dtype]
        if peer.own_arithmetic:
            return ceiling
        return min(ceiling, FACTOR * self.eager_error(peer.dtype) + TINY[peer.dtype])


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
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ready(peer: Peer, subject: Subject, seconds: float) -> tuple[Record, Run | None]:
    """Prepare and check one peer. Returns its record so far, and its call if there is something to time.

    Args:
        seconds: after which preparing it is given up.
    """
    record: Record = {"dtype": peer.dtype, "status": "absent", "reason": peer.why_not()}
    if record["reason"] is not None:
        return record, None
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            run = peer.prepare(subject.model, subject.images)
    except OutOfTime:
        if "torch._inductor.async_compile" in sys.modules:  # whose processes would disturb the others
            torch._inductor.async_compile.shutdown_compile_workers()
        return record | {"status": "unready", "reason": "not ready in time; run again"}, None
    except Unsupported as error:
        return record | {"reason": str(error)}, None
    except Exception as error:  # of an exporter, a compiler, ...: the other peers have their figures
        return record | {"status": "failed", "reason": first_line(error)}, None
    record["prepare_seconds"] = time.perf_counter() - started
    try:
        with torch.inference_mode():
            error = relative_error(run(), subject.exact)
    except Exception as failure:
        return record | {"status": "failed", "reason": first_line(failure)}, None
    bound = subject.bound(peer)
    record |= {"error": error if math.isfinite(error) else None, "error_bound": bound}
    if not error <= bound:  # nor NaN
        reason = f"wrong logits: relative error {error:.2g}, at most {bound:.2g} allowed"
        return record | {"status": "failed", "reason": reason}, None
    return record | {"status": "measured"}, run


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table's notes."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


# --------------------------------------------------------------------------------
# Time


@dataclass
class Runner:
    """A call that is timed, and all its times: `warm_up` before the rounds, `seconds` in them."""

    run: Run
    warm_up: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def call(self) -> float:
        """Seconds of one call."""
        with torch.inference_mode():
            started = time.perf_counter()
            self.run()
            return time.perf_counter() - started

    def step(self) -> None:
        """A round's turn. What ran before has emptied the caches, and its threads may still be spinning."""
        if self.warm_up[-1] < SHORT:
            self.call()
        self.seconds.append(self.call())

    def settle(self, limit: float = WARM_UP_SECONDS) -> None:
        """Warm up until the median of three calls is near that of the three before, or `limit` has passed."""
        times = self.warm_up
        while sum(times) < limit or not times:
            times.append(self.call())
            if len(times) >= 6:
                before, last = statistics.median(times[-6:-3]), statistics.median(times[-3:])
                if abs(last - before) < SETTLED * before:
                    return


@dataclass(frozen=True)
class Budget:
    """rounds and seconds: of a case, see `take_turns`; prepare_seconds: for all peers of a case together."""

    rounds: int = 30
    seconds: float = 90.0
    prepare_seconds: float = 180.0


def contest(
    entries: Mapping[str, tuple[Peer, Subject]], budget: Budget, skip: Mapping[str, str] | None = None
) -> Record:
    """Prepare, check and time all entries; rounds and, of each entry, its record.

    Args:
        entries: by label; `ours` of a dtype before those that are compared with it.
        skip: reasons why a label is not even prepared.
    """
    torch._dynamo.reset()
    records: dict[str, Record] = {}
    runners: dict[str, Runner] = {}
    started = time.perf_counter()
    for label, (peer, subject) in entries.items():
        if skip and label in skip:
            records[label] = {"dtype": peer.dtype, "status": "skipped", "reason": skip[label]}
            continue
        left = budget.prepare_seconds - (time.perf_counter() - started)
        records[label], run = ready(peer, subject, math.inf if peer.ours else left)
        if run is not None:
            runners[label] = Runner(run)
    with torch.compiler.set_stance("fail_on_recompile"):
        for label in list(runners):
            if not _keeps_up(label, entries, records, runners):
                records[label] |= {"seconds": runners.pop(label).warm_up}
        rounds = take_turns(runners, budget.rounds, budget.seconds) if runners else 0
    for label, runner in runners.items():
        records[label] |= {"warm_up_seconds": runner.warm_up, "seconds": runner.seconds}
    return {"rounds": rounds, "peers": records}


def _keeps_up(
    label: str,
    entries: Mapping[str, tuple[Peer, Subject]],
    records: dict[str, Record],
    runners: Mapping[str, Runner],
) -> bool:
    """Warm one runner up, unless it is so slow, or broken, that it has to leave; its record then says so."""
    peer, runner = entries[label][0], runners[label]
    ours = [
        r for name, r in runners.items() if entries[name][0].ours and entries[name][0].dtype == peer.dtype
    ]
    try:
        runner.warm_up.append(runner.call())
        if ours and runner is not ours[0]:
            usual = statistics.median(ours[0].warm_up[-3:])
            if runner.warm_up[0] > SLOW * usual and runner.warm_up[0] < SLOW_TWICE:
                runner.warm_up.append(runner.call())
            if (fastest := min(runner.warm_up)) > SLOW * usual:
                times = fastest / usual
                reason = f"{times:.0f} times ours in {len(runner.warm_up)} call(s), then left the rounds"
                records[label] |= {"status": "slow", "reason": reason, "times_ours": times}
                return False
        runner.settle()
    except Exception as error:
        records[label] |= {"status": "failed", "reason": first_line(error)}
        return False
    return True


# --------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Model:
    """timm's name, changes to it, and the batch sizes of the two cases that run whole models."""

    name: str
    batches: tuple[int, ...] = (1,)
    speedup_batches: tuple[int, ...] = (1, 8)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def build(self, rates: Sequence[float]) -> list[vtp.CompactViT]:
        models = irregular_models(self.name, rates, **self.changes)
        for model in models:
            randomize_vectors(model)
        return models


MODELS = {
    "tiny": Model("deit_tiny_patch16_224"),
    "small": Model("deit_small_patch16_224"),
    "base": Model("deit_base_patch16_224", batches=(1, 8)),
}
TOYS = {
    "toy": Model(
        "deit_tiny_patch16_224",
        (1,),
        (1, 2),
        {"img_size": 32, "depth": 1, "num_classes": 16, "embed_dim": 96},
    )
}


def random_images(model: vtp.CompactViT, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    patch = model.patch_embed
    return torch.randn(batch, patch.proj.in_channels, *patch.img_size, generator=generator)


def measure_models(
    model: Model, batch: int, peers: Iterable[Peer], budget: Budget, results: Record
) -> Record:
    """One compact model by all peers but those that `results` says are too slow."""
    (small,) = model.build([RATE])
    macs = vtp.count(small).macs
    subject = Subject(small, random_images(small, batch))
    entries = {peer.label: (peer, subject) for peer in peers}
    return {"macs": macs, **contest(entries, budget, too_slow(results, batch * macs))}


def measure_speedup(model: Model, batch: int, peers: Iterable[Peer], budget: Budget, _: Record) -> Record:
    """The dense and the compact model on our engine; `peers` are ours."""
    dense, small = model.build([0.0, RATE])
    subjects = {
        name: Subject(m, random_images(m, batch)) for name, m in (("compact", small), ("dense", dense))
    }
    entries = {
        f"{name}{peer.name.removeprefix('ours')}, {peer.dtype}": (peer, subjects[name])
        for peer in peers
        for name in (["dense", "compact"] if peer.ours else ["compact"])
    }
    return {"macs": {"dense": vtp.count(dense).macs, "compact": vtp.count(small).macs}} | contest(
        entries, budget
    )


WIDTHS_EMBED_DIM = 480


def measure_widths(widths: Sequence[int], dtype: str, budget: Budget, _: Record) -> Record:
    """A feed-forward branch on our engine at many widths, of fc1's inputs and outputs and fc2's inputs."""
    models = {str(w): FeedForward(WIDTHS_EMBED_DIM, min(w, WIDTHS_EMBED_DIM), w) for w in widths}
    return {"macs": {w: TOKENS * model.macs_per_token for w, model in models.items()}} | contest(
        {w: (_feed_forward_peer(dtype), Subject(model, _tokens(model))) for w, model in models.items()},
        budget,
    )


def _feed_forward_peer(dtype: str, name: str = "ours") -> Peer:
    return Peer(name, dtype, functools.partial(prepare_feed_forward, dtype=dtype), ours=True)


def _tokens(model: FeedForward) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, TOKENS, model.vit.embed_dim)


def measure_gemm(shape: tuple[int, int, int], peers: Iterable[Peer], budget: Budget, _: Record) -> Record:
    """A product of [M, K] and [K, N] by every library."""
    M, K, N = shape
    torch.manual_seed(0)
    subject = Subject(nn.Linear(K, N, bias=False), torch.randn(M, K))
    # `eager_error` is that of the first row, which is much like any other.
    return {"flops": 2 * M * K * N} | contest({p.label: (p, subject) for p in peers}, budget)


def measure_rate(size: int, peers: Iterable[Peer], budget: Budget, _: Record) -> Record:
    """A product of `size` x `size` matrices by every library; of ours, all feed-forward branches of a compact
    DeiT-B at batch 1, norms and GELU included, at the widths that `size` would have in it."""
    torch.manual_seed(0)
    square = Subject(nn.Linear(size, size, bias=False), torch.randn(size, size))
    embed_dim, inputs, hidden = (size * part // 2048 for part in (768, 461, 1843))
    model = FeedForward(embed_dim, inputs, hidden, depth=12)
    peers, dtypes = [peer for peer in peers if not peer.ours], {}
    for peer in peers:
        dtypes[peer.dtype] = _feed_forward_peer(peer.dtype, "ours, feed-forward of DeiT-B")
    branches = Subject(model, _tokens(model))
    entries = {p.label: (p, branches) for p in dtypes.values()} | {p.label: (p, square) for p in peers}
    record = {"flops": 2 * size**3} | contest(entries, budget)
    for peer in dtypes.values():
        record["peers"][peer.label]["flops"] = 2 * TOKENS * model.macs_per_token
    return record


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------
# The results file


def blank() -> Record:
    """Results of this machine without a case."""
    cpu = torch.device("cpu")
    return {
        "environment": environment(),
        "hardware": {**hardware(cpu), "isa": vector_flags()},
        "versions": {name: _version(name) for name in ("onnx", "onnxscript", "onnxruntime", "openvino")},
        "rate": RATE,
        "cases": {},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def same_machine(results: Record, other: Record) -> bool:
    """Whether figures of both may stand in one table: all but date and cases agree."""

    def identity(content: Record) -> Record:
        without_date = {k: v for k, v in content["environment"].items() if k != "date"}
        return {**{k: v for k, v in content.items() if k != "cases"}, "environment": without_date}

    return identity(results) == identity(other)


def opened(path: Path, fresh: bool) -> Record:
    """The results to go on with.

    Raises:
        FileError: what is at `path` was measured elsewhere, or is no results file.
    """
    results = blank()
    if fresh or not path.is_file():
        return results
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if same_machine(before, results):
            return before
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"argument --out: {path} is no results file: {error!r}") from error
    raise FileError(
        f"argument --out: {path} is of another machine, other versions or threads; use --fresh to replace it"
    )


def is_done(record: Record | None, asked: Record) -> bool:
    """Whether a case needs no measuring: it was asked for alike, and every peer was ready in time."""
    if record is None or record["asked"] != asked:
        return False
    return not any(peer["status"] == "unready" for peer in record.get("peers", {}).values())


def too_slow(results: Record, work: float) -> dict[str, str]:
    """Label to reason, for peers that left the rounds of a model with less than `work` (batch x MACs)."""
    found = {}
    for key, record in results["cases"].items():
        if record["case"] == "models" and record["batch"] * record["macs"] < work:
            for label, peer in record["peers"].items():
                if peer["status"] == "slow":
                    found[label] = f"{peer['times_ours']:.0f} times ours in {key}"
    return found


# --------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number, usual = positive(int), positive(float), Budget()
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="all four")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="all three")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="both")
    parser.add_argument("--rounds", type=count, default=usual.rounds, help=f"at most: {usual.rounds}")
    parser.add_argument(
        "--seconds", type=number, default=usual.seconds, help=f"budget of a case's rounds: {usual.seconds:g}"
    )
    parser.add_argument(
        "--prepare-seconds",
        type=number,
        default=usual.prepare_seconds,
        help=f"for exports and compilers, of a case: {usual.prepare_seconds:g}",
    )
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="CPU threads: all cores")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try it out")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file --out has")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--markdown", action="store_true", help="print the file --out; measure nothing")
    options = parser.parse_args(argv)
    if options.markdown and not options.out.is_file():
        parser.error(f"argument --out: {options.out} is not there; run without --markdown first")
    if options.out.is_dir() or not options.out.parent.is_dir():
        parser.error(f"argument --out: got {options.out}, expected a file name in a folder that exists")
    if options.quick and options.out == RESULTS:
        parser.error("argument --out: toy sizes must not replace the results; name another file")
    return options


@dataclass(frozen=True)
class Job:
    """A case to measure: what it is, and how, given the results so far."""

    what: Record
    run: Callable[[Record], Record]

    @property
    def key(self) -> str:
        """Its name in the results file."""
        return ", ".join(str(v) if k in ("case", "model") else f"{k} {v}" for k, v in self.what.items())


def jobs(options: argparse.Namespace, peers: Sequence[Peer]) -> list[Job]:
    """All cases that were asked for, the small ones before the large."""
    budget = Budget(options.rounds, options.seconds, options.prepare_seconds)
    peers = [peer for peer in peers if peer.dtype in options.dtypes]
    ours = [peer for peer in peers if peer.name in ("ours", "ours again")]
    models = TOYS if options.quick else {name: MODELS[name] for name in MODELS if name in options.models}
    found: list[Job] = []

    def add(case: str, run: Callable[..., Record], *arguments: Any, **what: Any) -> None:
        found.append(Job({"case": case, **what}, lambda results: run(*arguments, results)))

    for name, model in models.items():
        for batch in model.batches:
            add("models", measure_models, model, batch, peers, budget, model=name, batch=batch)
    for name, model in models.items():
        for batch in model.speedup_batches:
            add("speedup", measure_speedup, model, batch, ours, budget, model=name, batch=batch)
    for dtype in options.dtypes:
        widths = range(15, 18) if options.quick else range(449, 512)
        add("widths", measure_widths, widths, dtype, budget, dtype=dtype)
    size = 64 if options.quick else 2048
    add("rate", measure_rate, size, gemm_peers(peers), budget, size=size)
    short = dataclasses.replace(budget, seconds=min(budget.seconds, 15.0))
    for M, K, N in [(7, 37, 61)] if options.quick else SHAPES:
        add("gemm", measure_gemm, (M, K, N), gemm_peers(peers), short, shape=f"{M}x{K}x{N}")
    return [job for job in found if job.what["case"] in options.cases]


def main(argv: Sequence[str] | None = None, peers: Sequence[Peer] = PEERS) -> int:
    """Run the command line with these peers. Returns the exit status: 1 where a peer failed, 2 where there is
    no file to read or write."""
    options, console = parse_arguments(argv), Console(width=None if sys.stdout.isatty() else 200)
    try:
        if options.markdown:
            print(markdown(json.loads(options.out.read_text(encoding="utf-8"))))
            return 0
        torch.set_num_threads(options.threads)
        results = opened(options.out, options.fresh)
        run(options, peers, results, console)
    except FileError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, KeyError, TypeError) as error:
        if not options.markdown:
            raise
        print(f"argument --out: {options.out} is no results file: {error!r}", file=sys.stderr)
        return 2
    for note in notes(results):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print(f"Measured on {place(results)}. Written to {options.out}")
    return int(
        any(p["status"] == "failed" for r in results["cases"].values() for p in r.get("peers", {}).values())
    )


def run(options: argparse.Namespace, peers: Sequence[Peer], results: Record, console: Console) -> None:
    """Measure what `results` lacks, write it after each case, and show it."""
    asked = {name: getattr(options, name) for name in ("dtypes", "rounds", "seconds", "prepare_seconds")}
    todo = jobs(options, peers)
    for number, job in enumerate(todo):
        if is_done(results["cases"].get(job.key), asked):
            console.print(f"{job.key}: is in {options.out}", highlight=False)
        else:
            started = time.perf_counter()
            record = {**job.what, "asked": asked, **commit(), **job.run(results)}
            record["wall_seconds"] = time.perf_counter() - started
            results["cases"][job.key] = record
            text = json.dumps(results, indent=1, allow_nan=False) + "\n"
            write_atomic(options.out, lambda path, text=text: path.write_text(text, encoding="utf-8"))
            console.print(f"{job.key}: {record['wall_seconds']:.0f} s", highlight=False)
        case = job.what["case"]
        if number + 1 == len(todo) or todo[number + 1].what["case"] != case:
            show(console, results, case)


if __name__ == "__main__":
    raise SystemExit(main())
