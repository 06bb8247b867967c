"""Does a model cut to a latency budget take as long as was asked for? Prediction against measurement.

The width table of a DeiT-S is measured (or taken from the cache), then plans are made for three budgets,
given as shares of what the table predicts for the dense model, with random gates that make widths unequal in
every layer and head. The dense model and the three compact ones, packed by `vtp.optimize`, then take turns
with the points of the table, which is so measured a second time.

The error is that of the second table: prediction and measurement at the same speed of the machine. "Over
budget" is beside what was asked for, by the first table: it contains how much the machine's speed has changed
in between, on a shared machine up to 10%. Prints a table and writes it with all times as JSON; takes three
minutes.

    python -m bench.latency_budget
    python -m bench.latency_budget --markdown   # that of docs/latency-budgets.md, from a run's file
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vtp
from bench.irregular import gated_model
from bench.results_file import add_results_file, check_results_file, print_results
from vtp.comparison.comparison import Runner, no_collections
from vtp.comparison.runtimes import DTYPES
from vtp.files import FileError, write_atomic
from vtp.machine import commit, description, in_one_line
from vtp.options import positive, thread_count
from vtp.pruning.latency_table import LatencyTable, cached_table
from vtp.runtime.latency_profile import WidthProfile
from vtp.timing import pairwise_ratio, take_turns

RESULTS = Path(__file__).parent / "results" / "latency_budget.json"
DENSE = "dense"
WARM_UP = 5.0  # seconds at most, for each model


def plans(gated: nn.Module, table: LatencyTable, shares: Sequence[float]) -> dict[str, vtp.PruningPlan]:
    """The dense model, and one plan for each share of the milliseconds that the table predicts for it."""
    dense = vtp.make_plan(gated, rate=0.0)
    whole = table.predict(dense)
    cut = {
        f"{share:.0%}": vtp.make_plan(gated, latency_ms=share * whole, latency_table=table)
        for share in shares
    }
    return {DENSE: dense, **cut}


def measure(
    gated: nn.Module,
    table: LatencyTable,
    profile: WidthProfile,
    shares: Sequence[float],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """The record of one comparison: asked, predicted and measured time of each model.

    Args:
        gated: a gated model of the table's geometry.
        table: what plans are made by.
        profile: measures another table in the same rounds.
        shares: budgets, of the dense model's predicted time.
        rounds, seconds: see `take_turns`.
    """
    dtype = DTYPES[table.dtype]
    images = torch.randn(table.batch_size, gated.patch_embed.proj.in_channels, *gated.patch_embed.img_size)
    images, made = images.to(dtype), plans(gated, table, shares)
    models = {name: vtp.optimize(vtp.compact(gated, plan), dtype) for name, plan in made.items()}
    runners = {name: Runner(partial(model, images)) for name, model in models.items()}
    for runner in runners.values():
        runner.settle(WARM_UP)
    first = profile.rounds
    with no_collections():
        done = take_turns({**runners, "table": profile}, rounds, seconds)
    table = profile.table(first)
    cases = []
    for name, plan in made.items():
        own, predicted = runners[name].seconds, table.predict(plan)
        measured = 1e3 * statistics.median(own)
        cases.append(
            {
                "model": name,
                "budget_ms": plan.budget.get("latency_ms"),
                "macs": plan.cost.macs,
                "predicted_ms": predicted,
                "median_ms": measured,
                "error": predicted / measured - 1,
                "of_dense": pairwise_ratio(own, runners[DENSE].seconds),
                "engine": models[name].engine,
                "seconds": own,
            }
        )
    return {"rounds": done, "cases": cases, "second_table": table.to_dict()}


# --------------------------------------------------------------------------------
# Tables

_HEADINGS = ("budget", "MACs", "predicted ms", "measured ms", "error", "over budget", "measured / dense")


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Cells under `_HEADINGS`, a row for each model."""
    shown = []
    for case in results["cases"]:
        ratio, budget, measured = case["of_dense"], case["budget_ms"], case["median_ms"]
        shown.append(
            [
                "dense" if budget is None else f"{budget:.1f} ms",
                f"{case['macs'] / 1e9:.2f}G",
                f"{case['predicted_ms']:.1f}",
                f"{measured:.1f}",
                f"{case['error']:+.1%}",
                "" if budget is None else f"{measured / budget - 1:+.1%}",
                f"{ratio['median']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})",
            ]
        )
    return shown


def markdown(results: Mapping[str, Any]) -> str:
    """The table of docs/latency-budgets.md, and a line on what it was measured on."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join([*lines, "", f"{title(results)}. Measured on {in_one_line(results)}."])


def title(results: Mapping[str, Any]) -> str:
    """What was compared, in words."""
    table, arguments = results["table"], results["arguments"]
    return (
        f"{arguments['model']}, batch {table['batch_size']}, {table['dtype']}, {table['engine']}: "
        f"{results['rounds']} rounds, the first table's {table['rounds']}"
    )


# --------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and check its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number = positive(int), positive(float)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name: %(default)s")
    parser.add_argument(
        "--shares",
        type=number,
        nargs="+",
        default=[0.85, 0.7, 0.55],
        help="budgets, of the dense model's predicted time: 0.85 0.7 0.55",
    )
    parser.add_argument("--batch", type=count, default=1, help="images: 1")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="float32")
    parser.add_argument("--cached", action="store_true", help="take the table from the cache if it has one")
    parser.add_argument("--profile-seconds", type=number, default=45.0, help="of measuring the table: 45")
    parser.add_argument("--rounds", type=count, default=150, help="timed calls of each model, at most: 150")
    parser.add_argument("--seconds", type=number, default=40.0, help="of the comparison, at most: 40")
    parser.add_argument("--threads", type=thread_count, default=os.cpu_count(), help="CPU threads: all cores")
    add_results_file(parser, RESULTS)
    options = parser.parse_args(argv)
    if not all(share < 1 for share in options.shares):
        parser.error(f"argument --shares: got {options.shares}, expected shares below 1")
    check_results_file(parser, options)
    return options


def main(argv: Sequence[str] | None = None, build: Callable[[str], nn.Module] = gated_model) -> int:
    """Run the command line; `build` makes the gated model of a name. Returns the exit status."""
    options = parse_arguments(argv)
    if options.markdown:
        return print_results(options.out, markdown)
    torch.set_num_threads(options.threads)
    try:
        gated, dtype = build(options.model), DTYPES[options.dtype]
        architecture = vtp.describe(gated)
    except (RuntimeError, ValueError, TypeError) as error:  # of timm, or of what vtp does not support
        print(f"argument --model: got {options.model!r}: {error}", file=sys.stderr)
        return 2
    table = cached_table(architecture, options.batch, dtype) if options.cached else None
    profile = WidthProfile(architecture, options.batch, dtype)
    try:
        if table is None:
            take_turns({"table": profile}, 10**9, options.profile_seconds)
            table = profile.table()
        results = {
            **description(torch.device("cpu")),
            **commit(),
            "arguments": {**vars(options), "out": options.out.name},
            "table": table.to_dict(),
            **measure(gated, table, profile, options.shares, rounds=options.rounds, seconds=options.seconds),
        }
        write_atomic(options.out, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    except (FileError, vtp.PlanError) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
