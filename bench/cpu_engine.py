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
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cpu_tables import markdown, notes, place, show
from irregular import irregular_models, randomize_vectors
from products import FeedForward, gemm_peers, prepare_feed_forward
from rich.console import Console
from torch import Tensor, nn

import vtp
from vtp.bench.contest import Budget, Record, Subject, contest
from vtp.bench.measure import commit, hardware, positive, vector_flags
from vtp.bench.peers import DTYPES, PEERS, Peer
from vtp.files import FileError, write_atomic
from vtp.pipeline import environment

RESULTS = Path(__file__).parent / "results" / "cpu_engine.json"
CASES = ("models", "speedup", "widths", "rate", "gemm")
# M, K, N of linear layers of compact models, batches 1 and 8: tiny's fc1, small's qkv, base's fc1 and fc2.
SHAPES = [(M, *widths) for M in (197, 1576) for widths in ((115, 461), (231, 1003), (461, 1843), (1843, 768))]
RATE = 0.4
TOKENS = 197  # of an image: the rows of a product at batch 1

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
