"""Is a pruned model faster than what a user would pick instead? The README's claims of speed rest on this.

- models: one compact DeiT (40% of dimensions removed, every layer and head another width) by every runtime.
- compilers: one block of it by torch.compile, which needs minutes for all of them.
- place: what might be run in place of that model: the same padded to multiples of 16, with zeros left in
  place, the dense model, a dense model of the same MACs, Torch-Pruning's result at the same MACs.
- planted: whether a slow-down of 10% and a wrong result of our engine would be seen.
- sweep: cuts of 0 to 60%, heads unequal and uniform, at batches of 1 to 64: does a cut buy its MACs?
- heads: queries and keys, values, or all three at a quarter of their width: does that buy its MACs?
- training: a step of sparse training with gates, without, and with gates by hand.
- layers: a feed-forward branch at many widths beside the dense one.
- widths: time per MAC of a feed-forward branch at every width from 449 to 511.
- rate: the best rate that any library reaches on a large square product, and our engine's inside a model.
- gemm: rates of single products at the shapes of compact models; only when asked for.

All of a case get the same weights, images and number of threads. A runtime is timed only if its outputs are
right, and has a figure only if they still are in the last round: against float64, at most a rounding more
than twice the error of PyTorch's eager mode in the same dtype (ONNX Runtime and OpenVINO, whose arithmetic
is their own: `CEILINGS` in vtp/comparison/comparison.py). What fails, is missing or was not ready in time is
shown with its reason and has no figure. Each warms up until its times settle, then they take turns round by
round in random order; ratios are of times in the same round. "ours (repeat)" is our engine a second time: its
ratio is noise, and rounds go on until its standard error is below 0.3%, or the case's time is up. What a case
leaves of its time, later ones share: the whole takes no longer on a noisy machine. A runtime over 8 times
slower than ours, whose calls are not short, is called once or twice and then stays out, also of larger cases.

Results are written after each case, and a run takes up what is there for the same machine, versions, threads
and options, whatever the commit: use --fresh to measure changed code. A case in which two of the same differ
by over 2% is named at the end, and measured again by the next run. Exports and compilers have a time limit
for each case; compilers keep on disk what they have built, so that a second run measures those that were not
ready in the first.

    python -m bench.compare
    python -m bench.compare --markdown      # the tables of docs/speed-cpu.md, from a run's file
    python -m bench.compare --device cuda   # whole models and steps on a GPU; never run by the authors
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import cases
from bench.cases import MODELS, RATES, SHAPES, TOYS
from bench.plots import draw
from bench.products import gemm_runtimes
from bench.results_file import add_results_file, check_results_file, print_results
from bench.tables import main_dtype, markdown, notes, place, repeats, show
from vtp.comparison.comparison import Budget, Record
from vtp.comparison.runtimes import DTYPES, RUNTIMES, Runtime
from vtp.comparison.tables import in_rounds
from vtp.files import FileError, write_atomic
from vtp.machine import commit, description
from vtp.options import positive, thread_count
from vtp.timing import pairwise_ratio

FOLDER = Path(__file__).parent / "results"
RESULTS = FOLDER / "compare.json"  # of a CPU
ON_GPU = ("models", "compilers", "place", "planted", "sweep", "heads", "training")
# Without "gemm", which is for people who work on the kernels.
USUAL_CASES = (*ON_GPU, "layers", "widths", "rate")
CASES = (*USUAL_CASES, "gemm")

PRECISION = 0.003  # of what is noise: where its median has a smaller standard error, rounds end
MOST_NOISE = 0.02  # by which two of the same may differ: a case with more is measured again by the next run
# Budget of a case's rounds over --seconds, and by model and batch where the work is more than usual.
SHARES = {"models": 2.5, "planted": 0.7, "layers": 0.4, "widths": 1.0}
LARGE = {
    ("models", "tiny", 1): 1.5,
    ("models", "base", 8): 5.5,
    ("place", "base", None): 2.0,
    ("sweep", "tiny", 64): 3.0,
    ("sweep", "small", 8): 1.5,
    ("sweep", "small", 64): 3.0,
    ("sweep", "base", 1): 2.0,
    ("sweep", "base", 8): 3.0,
    ("sweep", "base", 64): 9.0,
    ("training", "base", 8): 1.5,
}


# --------------------------------------------------------------------------------
# The results file


def blank(device: str) -> Record:
    """Results of this machine without a case."""
    return {**description(torch.device(device)), "rate": cases.RATE, "cases": {}}


def same_machine(results: Record, other: Record) -> bool:
    """Whether figures of both may stand in one table: all but date and cases agree."""

    def identity(content: Record) -> Record:
        without_date = {k: v for k, v in content["environment"].items() if k != "date"}
        return {**{k: v for k, v in content.items() if k != "cases"}, "environment": without_date}

    return identity(results) == identity(other)


def opened(path: Path, fresh: bool, device: str) -> Record:
    """The results to go on with.

    Raises:
        FileError: what is at `path` was measured elsewhere, or is no results file.
    """
    results = blank(device)
    if fresh or not path.is_file():
        return results
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        complete = all({"case", "asked"} <= r.keys() for r in before["cases"].values())
        if complete and same_machine(before, results):
            return before
        if not complete:
            raise KeyError("a case without 'case' or 'asked'")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise FileError(f"argument --out: {path} is no results file: {error!r}") from error
    raise FileError(
        f"argument --out: {path} is of another machine, other versions or threads; use --fresh to replace it"
    )


def is_done(record: Record | None, asked: Record) -> bool:
    """Whether a case needs no measuring: it was asked for alike, is no matter of noise, and every runtime was
    ready in time."""
    if record is None or record["asked"] != asked or (noisy(record) and not asked["quick"]):
        return False
    return not any(runtime["status"] == "unready" for runtime in record.get("runtimes", {}).values())


def noisy(record: Record) -> bool:
    """Whether two of the same differ by more than they may."""
    return any(abs(pairwise_ratio(*pair)["median"] - 1) > MOST_NOISE for pair in repeats(record))


def failures(results: Record) -> list[str]:
    """Runtimes whose results were wrong or that broke, and planted defects that were not seen."""
    found = []
    for key, record in results["cases"].items():
        for label, runtime in record.get("runtimes", {}).items():
            planted = record["case"] == "planted" and label.startswith(cases.WRONG)
            if (runtime["status"] == "failed") != planted:
                found.append(f"{key}: {label}: {runtime['reason'] or 'a wrong result was not seen'}")
        if record["case"] == "planted" and not record["asked"].get("quick") and not slow_down_seen(record):
            found.append(f"{key}: a slow-down of 10% was not seen")
        for label, variant in record.get("variants", {}).items():
            if variant["failed"]:
                found.append(f"{key}: {label}: {variant['failed']}")
    return found


def slow_down_seen(record: Record) -> bool:
    """Whether what was slowed down stands out from the noise, at three of four rounds."""
    dtype = main_dtype(record)
    ours, again, slow = (
        in_rounds(record, f"{name}, {dtype}") for name in ("ours", "ours (repeat)", cases.SLOWED)
    )
    if ours is None or again is None or slow is None:
        return False
    return pairwise_ratio(slow, ours)["q1"] > pairwise_ratio(again, ours)["median"]


# --------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and check its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number = positive(int), positive(float)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(USUAL_CASES), help="all but gemm")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="all three")
    parser.add_argument(
        "--compile", choices=MODELS, nargs="*", default=[],
        help="models that torch.compile takes part in as a whole; it needs many minutes for each: none",
    )  # fmt: skip
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="both")
    parser.add_argument("--rounds", type=count, default=200, help="at most: 200")
    parser.add_argument("--seconds", type=number, default=15.0, help="of a usual case's rounds: 15")
    parser.add_argument(
        "--prepare-seconds", type=number, default=100.0, help="for exports and compilers, of a case: 100"
    )
    parser.add_argument("--threads", type=thread_count, default=os.cpu_count(), help="CPU threads: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu; cuda: what runs there")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try it out")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file --out has")
    add_results_file(parser, RESULTS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not (options.markdown or torch.cuda.is_available()):
        parser.error("argument --device: got 'cuda', but PyTorch sees no GPU")
    if options.device == "cuda":
        options.cases = [case for case in options.cases if case in ON_GPU]
        if options.out == RESULTS:
            options.out = FOLDER / "compare-cuda.json"
    if not options.cases:
        parser.error(f"argument --cases: on a GPU expected some of {', '.join(ON_GPU)}")
    main = cases.MAIN_DTYPE[options.device]
    needed = {"place", "planted", "sweep", "heads"}.intersection(options.cases)
    if needed and main not in options.dtypes:
        parser.error(f"argument --dtypes: expected {main} among them for {', '.join(sorted(needed))}")
    check_results_file(parser, options)
    if options.quick and options.out == RESULTS:
        parser.error("argument --out: toy sizes must not replace the results; name another file")
    return options


@dataclass(frozen=True)
class Job:
    """A case to measure: what it is, and how, given a budget and the results so far.

    budget: what is planned for it; asked: options that it alone has.
    """

    what: Record
    run: Callable[[Budget, Record], Record]
    budget: Budget
    asked: Record = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of a case in the results file."""
        return ", ".join(str(v) if k in ("case", "model") else f"{k} {v}" for k, v in self.what.items())


def jobs(options: argparse.Namespace, runtimes: Sequence[Runtime]) -> list[Job]:
    """All cases that were asked for, the small ones before the large."""
    runtimes = [runtime for runtime in runtimes if runtime.dtype in options.dtypes]
    quick = options.quick
    models = TOYS if quick else {name: MODELS[name] for name in MODELS if name in options.models}
    if options.device != "cpu":
        models = {name: dataclasses.replace(model, device=options.device) for name, model in models.items()}
    found: list[Job] = []

    def add(case: str, run: Callable[..., Record], *arguments: Any, **what: Any) -> None:
        size = (case, what.get("model"), what.get("batch"))
        budget = Budget(
            options.rounds,
            options.seconds * LARGE.get(size, SHARES.get(case, 1.0)),
            options.prepare_seconds,
            # Of many entries, none of which compiles in its first calls.
            warm_up_seconds=1.0 if case in ("place", "sweep", "heads", "layers", "widths") else 4.0,
            precision=PRECISION,
        )
        found.append(Job({"case": case, **what}, functools.partial(run, *arguments), budget))

    for name, model in models.items():
        for batch in model.batches:
            compiled = name in options.compile and batch == 1
            add("models", cases.measure_models, model, batch, runtimes, compiled, model=name, batch=batch)
            found[-1].asked["compilers"] = compiled
    smallest = next(iter(models))
    shallow = models[smallest].shallow(1)
    add("compilers", cases.measure_compilers, shallow, runtimes, model=smallest, blocks=1)
    for name, model in models.items():
        add("place", cases.measure_place, model, runtimes, model=name)
    add("planted", cases.measure_planted, models[smallest], runtimes, model=smallest)
    for name, model in models.items():
        for batch in model.sweep_batches:
            rates = RATES[::2] if quick else RATES
            add("sweep", cases.measure_sweep, model, batch, runtimes, rates, model=name, batch=batch)
    for name, model in models.items():
        for batch in model.batches:
            add("heads", cases.measure_heads, model, batch, runtimes, model=name, batch=batch)
    for name, model in models.items():
        batch, depth = (2, 1) if quick else (8, 2)
        add("training", cases.measure_training, model, batch, depth, model=name, batch=batch)
    for embed_dim in [48] if quick else [192, 384, 768]:
        widths = [4 * embed_dim * part // 16 + part % 16 for part in range(2, 17, 7 if quick else 2)]
        add("layers", cases.measure_layers, embed_dim, widths, runtimes, embed_dim=embed_dim)
    for dtype in options.dtypes:
        widths = range(15, 18) if quick else range(449, 512)
        add("widths", cases.measure_widths, widths, dtype, dtype=dtype)
    size = 64 if quick else 2048
    add("rate", cases.measure_rate, size, gemm_runtimes(runtimes), size=size)
    for M, K, N in [(7, 37, 61)] if quick else SHAPES:
        add("gemm", cases.measure_gemm, (M, K, N), gemm_runtimes(runtimes), shape=f"{M}x{K}x{N}")
    return [job for job in found if job.what["case"] in options.cases]


def main(argv: Sequence[str] | None = None, runtimes: Sequence[Runtime] = RUNTIMES) -> int:
    """Run the command line with these runtimes. Returns the exit status: 1 where a runtime failed, 2 where no
    file can be read or written."""
    options, console = parse_arguments(argv), Console(width=None if sys.stdout.isatty() else 200)
    if options.markdown:
        return print_results(options.out, markdown)
    try:
        torch.set_num_threads(options.threads)
        results = opened(options.out, options.fresh, options.device)
        run(options, runtimes, results, console)
    except FileError as error:
        print(error, file=sys.stderr)
        return 2
    for note in notes(results):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print(f"Measured on {place(results)}. Written to {options.out}")
    for file in draw(results, options.out):
        print(f"Drawn: {file}")
    for key in (key for key, record in results["cases"].items() if noisy(record) and not options.quick):
        print(f"noise over {MOST_NOISE:.0%}: {key}; run again to measure it again")
    for line in failures(results):
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failures(results)))


def run(options: argparse.Namespace, runtimes: Sequence[Runtime], results: Record, console: Console) -> None:
    """Measure what `results` lacks, write it after each case, and show it."""
    usual = {
        name: getattr(options, name) for name in ("quick", "dtypes", "rounds", "seconds", "prepare_seconds")
    }
    todo, spare = jobs(options, runtimes), 0.0
    for number, job in enumerate(todo):
        asked = usual | job.asked
        if is_done(results["cases"].get(job.key), asked):
            print(f"{job.key}: is in {options.out}", flush=True)
            spare += job.budget.seconds
        else:
            started, planned = time.perf_counter(), job.budget.seconds
            # Half of what those before have left: one noisy case is not to take it from all that follow.
            budget = dataclasses.replace(job.budget, seconds=planned + spare / 2)
            record = {**job.what, "asked": asked, **commit(), **job.run(budget, results)}
            spare += planned - record["rounds_seconds"]
            record["wall_seconds"] = time.perf_counter() - started
            results["cases"][job.key] = record
            text = json.dumps(results, indent=1, allow_nan=False) + "\n"
            write_atomic(options.out, lambda path, text=text: path.write_text(text, encoding="utf-8"))
            print(f"{job.key}: {record['wall_seconds']:.0f} s", flush=True)
        case = job.what["case"]
        if number + 1 == len(todo) or todo[number + 1].what["case"] != case:
            show(console, results, case)


if __name__ == "__main__":
    raise SystemExit(main())
