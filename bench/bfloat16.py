"""Is bfloat16 on the CPU engine worth it on this machine, and faster than what one would use instead?

Compact DeiTs (40% of dimensions removed, every layer and head another width) by every runtime in both dtypes;
what share of the best product's rate the engine reaches in feed-forward and attention branches; what a cut
buys; whether bfloat16 finds the same classes. Written for machines with AMX; it runs on any. What is asked of
them is in the table beside what was found. Half an hour on two cores, for one thread and then two.

    python -m bench.bfloat16
    python -m bench.bfloat16 --markdown
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import vtp
from bench import cases
from bench.cases import MODELS, RATE, TOYS, Model
from bench.products import gemm_runtimes
from bench.results_file import run_or_print
from bench.tables import fastest
from vtp.comparison.comparison import Budget, Record
from vtp.comparison.own_model import compare_branches
from vtp.comparison.runtimes import RUNTIMES
from vtp.comparison.tables import Rows, in_rounds, markdown_table, ratio
from vtp.machine import commit, description, in_one_line
from vtp.options import positive, thread_count
from vtp.timing import pairwise_ratio
from vtp.training.data import open_data
from vtp.training.loaders import test_loader
from vtp.zoo import FASHION_DEIT, open_model

RESULTS = Path(__file__).parent / "results" / "bfloat16.json"
OURS, HALF = "ours, float32", "ours, bfloat16"
CUT = "unequal 40%"
# What is asked of a machine with AMX, by model and batch: the fastest other runtime's time over ours, the
# share of the removed multiply-adds that becomes speed, float32's time over bfloat16's.
FASTER = {"tiny, batch 1": 1.5, "small, batch 1": 1.3, "base, batch 1": 1.15, "base, batch 8": 1.1}
REALISED = {"tiny": 0.7, "small": 0.8, "base": 0.9}
OVER_FLOAT32 = {"base, batch 1": 3.0, "base, batch 8": 3.0}
RATES = {"feed-forward": 0.85, "attention": 0.4}
AGREEMENT = 0.995


def measure(models: Mapping[str, Model], size: int, budget: Budget) -> Record:
    """All cases on as many threads as PyTorch has.

    Args:
        models: by name; rates of branches are of the last.
        size: of the square product whose rate is the measure of all.
    """
    found: Record = {"models": {}, "cuts": {}}
    for name, model in models.items():
        for batch in model.batches:
            found["models"][f"{name}, batch {batch}"] = cases.measure_models(
                model, batch, RUNTIMES, False, budget, {"cases": {}}
            )
        ours = cases.of(RUNTIMES, ("float32", "bfloat16"), "ours", "ours (repeat)")
        found["cuts"][name] = cases.measure_sweep(model, 1, ours, [0.0, RATE], budget, {})
    found["rate"] = cases.measure_rate(size, gemm_runtimes(RUNTIMES), budget, {})
    last = next(reversed(models.values()))
    found["attention"] = compare_branches(last.cut(RATE), 1, "bfloat16", budget)
    return found


def agreement() -> float:
    """Share of the test images on which the shipped model has the same class in float32 and in bfloat16."""
    gated = vtp.insert_gates(open_model(FASHION_DEIT).eval())
    small = vtp.compact(gated, vtp.make_plan(gated, rate=0.0))
    fast = {dtype: vtp.optimize(small, dtype) for dtype in (torch.float32, torch.bfloat16)}
    same = [
        fast[torch.float32](images).argmax(-1) == fast[torch.bfloat16](images).argmax(-1)
        for images, _ in test_loader(open_data(), image_size=28, in_chans=1, batch_size=250)
    ]
    return torch.cat(same).float().mean().item()


# --------------------------------------------------------------------------------
# What they say


def rate(runtime: Record, operations: float) -> float:
    """Operations a second of a runtime; 0 of one that was not timed."""
    return operations / statistics.median(runtime["seconds"]) if runtime["status"] == "measured" else 0.0


def shares(found: Record) -> dict[str, float]:
    """What branches reach of the best product's rate in bfloat16, by kind."""
    products = [
        r for r in found["rate"]["runtimes"].values() if r["dtype"] == "bfloat16" and "flops" not in r
    ]
    best = max((rate(runtime, found["rate"]["flops"]) for runtime in products), default=0.0)
    forward = found["rate"]["runtimes"]["ours, feed-forward of DeiT-B, bfloat16"]
    attention = [r for name, r in found["attention"]["runtimes"].items() if name.endswith(".attn")]
    timed = [r for r in attention if r["status"] == "measured"]
    seconds = sum(statistics.median(r["seconds"]) for r in timed)
    rates = {
        "feed-forward": rate(forward, forward["flops"]),
        "attention": 2 * sum(r["macs"] for r in timed) / seconds if timed else 0.0,
    }
    return {name: value / best if best else 0.0 for name, value in rates.items()}


def median(own: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Of ratios of own to other time in the same rounds; 0 where one was not timed."""
    return 0.0 if own is None or other is None else pairwise_ratio(own, other)["median"]


def row(
    question: str, threads: str, value: float, wanted: float | None, shown: str | None = None
) -> list[str]:
    """A row of the table: what was found beside what is asked of a machine with AMX."""
    verdict = "-" if wanted is None else "yes" if value >= wanted else "not measured" if not value else "no"
    asked = "-" if wanted is None else f"{wanted:g}"
    return [question, threads, shown or (f"{value:.2f}" if value else "-"), asked, verdict]


def table(content: Record) -> Rows:
    """What was asked, found and wanted."""
    rows = [["what", "threads", "found", "asked with AMX", "reached"]]
    for threads, found in content["threads"].items():
        for name, record in found["models"].items():
            half, single = in_rounds(record, HALF), in_rounds(record, OURS)
            for dtype, own, asked in (("bfloat16", half, FASTER.get(name)), ("float32", single, None)):
                best = fastest(record, dtype)
                peer = None if best is None else in_rounds(record, best)
                title = f"{name}: fastest other ({best or 'none'}) / ours in {dtype}"
                rows.append(row(title, threads, median(peer, own), asked, ratio(peer, own)))
            title = f"{name}: ours in float32 / in bfloat16"
            over = OVER_FLOAT32.get(name, 1.0)
            rows.append(row(title, threads, median(single, half), over, ratio(single, half)))
        for name, record in found["cuts"].items():
            promised = record["macs"]["dense"] / record["macs"][CUT]
            times = (in_rounds(record, f"{which}: {HALF}") for which in ("dense", CUT))
            title = f"{name}: of the multiply-adds removed, as speed"
            rows.append(row(title, threads, median(*times) / promised, REALISED.get(name)))
        for name, share in shares(found).items():
            rows.append(row(f"{name} branches: of the best product's rate", threads, share, RATES[name]))
    same = content["agreement"]
    rows.append(row("same class as in float32", "-", same, AGREEMENT, f"{same:.2%}"))
    return rows


def tables(content: Record) -> dict[str, Rows]:
    """The table by its title."""
    return {f"bfloat16 on {content['engine']}": table(content)}


def markdown(content: Record) -> str:
    """The table and the machine."""
    ((title, rows),) = tables(content).items()
    lines = markdown_table(title, rows)
    return "\n".join([*lines, f"Measured on {in_one_line(content)}; commit {content['commit']}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where the results file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.bfloat16", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=thread_count, nargs="+", default=[1, 2], help="1 2")
    parser.add_argument("--seconds", type=positive(float), default=20.0, help="of a case's rounds: 20")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try it out")

    def measured(options: argparse.Namespace, console: Console) -> Record:
        if options.quick and options.out == RESULTS:
            parser.error("argument --out: toy sizes must not replace the results; name another file")
        content: dict[str, Any] = {**description(torch.device("cpu")), **commit(), "threads": {}}
        before = torch.get_num_threads()
        try:
            for threads in options.threads:
                console.print(f"{threads} threads", highlight=False)
                torch.set_num_threads(threads)
                budget = Budget(200, options.seconds, 0.0 if options.quick else 100.0, 1.0, 0.003)
                models, size = (TOYS, 64) if options.quick else (MODELS, 2048)
                content["threads"][str(threads)] = measure(models, size, budget)
            content |= {"agreement": agreement(), "engine": torch.ops.vtp.cpu_choice(True)}
        finally:
            torch.set_num_threads(before)
        return content

    return run_or_print(parser, argv, RESULTS, measure=measured, tables=tables, markdown=markdown)


if __name__ == "__main__":
    sys.exit(main())
