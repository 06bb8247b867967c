"""How much faster a cut model is than the dense one, in each runtime that it is exported to.

    python -m bench.exported                # table and JSON, some minutes
    python -m bench.exported --markdown     # that of docs/export.md, from a run's file

A model of timm's with random weights and the same cut to widths that are unequal in every layer and head are
written for each export target, which checks their outputs. Then all files take turns round by round in random
order, beside PyTorch's eager mode and this package's own engine; ratios are of times in the same round. All
compute in float32, on as many threads: also OpenVINO, which would take bfloat16 by itself.
"""

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import vtp
from bench.irregular import cut, gated_model
from bench.results_file import markdown_table, run_or_print
from vtp.comparison.exported import runtime_version
from vtp.comparison.tables import Rows
from vtp.machine import environment
from vtp.runtime.export import TARGETS, ExportError
from vtp.timing import Stopwatch, pairwise_ratio, take_turns

OUT = Path(__file__).parent / "results" / "exported.json"
RATE = 0.4
MODELS: dict[str, dict[str, Any]] = {
    "deit_small_patch16_224": {},
    "vit_small_patch16_dinov3": {"img_size": 224},
}
BATCHES = (1, 8)
SECONDS = 60.0  # for the turns at one batch size


def compare(name: str, arguments: dict[str, Any], batch: int, seconds: float) -> dict[str, Any]:
    """Times of the dense and the cut model in every runtime, or the reason that there are none."""
    gated = gated_model(name, **arguments)
    small = cut(gated, RATE)
    dense = small.plan.architecture.build("cpu").eval()
    images = torch.randn(batch, 3, *dense.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    runs: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = vtp.compact(vtp.insert_gates(dense), vtp.make_plan(vtp.insert_gates(dense), rate=0.0))
        runs |= {("PyTorch eager", "dense"): dense, ("PyTorch eager", "cut"): small}
        runs |= {("vtp.optimize", "dense"): vtp.optimize(whole), ("vtp.optimize", "cut"): vtp.optimize(small)}
        for target, (about, export) in TARGETS.items():
            try:
                for kind, model in (("dense", dense), ("cut", small)):
                    file = Path(folder) / f"{target}_{kind}{about.suffix}"
                    export(model, file)
                    runs[target, kind] = about.load(file)
            except (ExportError, ModuleNotFoundError) as error:
                runs.pop((target, "dense"), None)
                reasons[target] = str(error)
        found = times(runs, images, seconds)
    return {
        "macs": {"dense": vtp.count(dense).macs, "cut": vtp.count(small).macs},
        **found,
        "reasons": reasons,
    }


@torch.inference_mode()
def times(
    runs: dict[tuple[str, str], Callable[[Tensor], Tensor]], images: Tensor, seconds: float
) -> dict[str, Any]:
    """By runtime the median milliseconds of both models, and of the cut one's time over the dense one's."""
    watches = {key: Stopwatch(functools.partial(run, images), images.device) for key, run in runs.items()}
    for watch in list(watches.values()) * 3:  # caches, allocators, first calls
        watch.call()
    named = {f"{runtime}, {kind}": watch for (runtime, kind), watch in watches.items()}
    rounds = take_turns(named, 10**9, seconds)
    by_runtime = {}
    for runtime in dict.fromkeys(runtime for runtime, _ in runs):
        dense, own = (watches[runtime, kind].seconds for kind in ("dense", "cut"))
        by_runtime[runtime] = {
            "dense_ms": 1e3 * statistics.median(dense),
            "cut_ms": 1e3 * statistics.median(own),
            "share": pairwise_ratio(own, dense),
        }
    return {"rounds": rounds, "runtimes": by_runtime}


def tables(content: dict[str, Any]) -> dict[str, Rows]:
    """By title, which names model and batch, a row for each runtime."""
    found = {}
    for case in content["cases"]:
        share = case["macs"]["cut"] / case["macs"]["dense"]
        title = f"{case['model']}, batch {case['batch']}: {share:.0%} of the dense model's MACs"
        rows: Rows = [["runtime", "dense, ms", "cut, ms", "cut / dense", "quartiles"]]
        for runtime, own in case["runtimes"].items():
            ratio = own["share"]
            rows.append(
                [
                    content["runtimes"].get(runtime, runtime),
                    f"{own['dense_ms']:.1f}",
                    f"{own['cut_ms']:.1f}",
                    f"{ratio['median']:.2f}",
                    f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
                ]
            )
        rows += [[content["runtimes"][target], why, "", "", ""] for target, why in case["reasons"].items()]
        found[title] = rows
    return found


def markdown(content: dict[str, Any]) -> str:
    """The tables of docs/export.md."""
    return "\n".join(f"{title}:\n\n{markdown_table(rows)}" for title, rows in tables(content).items())


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Times of all models and batches in every runtime."""
    content: dict[str, Any] = {
        "rate": RATE,
        "environment": environment(),
        "runtimes": {name: runtime_version(target) for name, (target, _) in TARGETS.items()},
        "cases": [],
    }
    for name, arguments in MODELS.items():
        for batch in BATCHES:
            console.print(f"{name}, batch {batch}", highlight=False)
            found = compare(name, arguments, batch, options.seconds)
            content["cases"].append({"model": name, "batch": batch, **found})
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where the results file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.exported", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of turns a case: {SECONDS:g}")
    return run_or_print(parser, argv, OUT, measure=measure, tables=tables, markdown=markdown)


if __name__ == "__main__":
    sys.exit(main())
