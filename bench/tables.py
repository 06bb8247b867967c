"""The tables of bench/compare.py, every figure from the raw times of a results file."""

import functools
import statistics

from rich.console import Console

from bench.cases import RATE, SLOWED, WRONG
from bench.gating_cost import REFERENCE
from bench.gating_cost import REPEAT as REPEAT_UNGATED
from vtp.comparison.comparison import Record
from vtp.comparison.runtimes import DTYPES, REPEAT
from vtp.comparison.tables import (
    Rows,
    costs,
    in_rounds,
    markdown_table,
    milliseconds,
    p95,
    print_table,
    ratio,
)
from vtp.machine import in_one_line
from vtp.timing import pairwise_ratio
from vtp.words import counted


def of_case(results: Record, case: str) -> list[Record]:
    return [record for record in results["cases"].values() if record["case"] == case]


def main_dtype(record: Record) -> str:
    """The dtype of a case that compares in one: that of our engine's second time."""
    label = next((label for label in record["runtimes"] if "ours (repeat), " in label), ", float32")
    return label.rpartition(", ")[2]


def _dtypes(record: Record) -> list[str]:
    return list(dict.fromkeys(runtime["dtype"] for runtime in record["runtimes"].values()))


# --------------------------------------------------------------------------------
# Whole models


def other_runtimes(record: Record, dtype: str) -> dict[str, list[float]]:
    """Runtimes of the compact model in `dtype` that were in the rounds, without ours: for bfloat16 of any
    dtype, else of the same."""
    found = {}
    for label in record["runtimes"]:
        comparable = dtype == "bfloat16" or record["runtimes"][label]["dtype"] == dtype
        if comparable and not label.startswith("our") and (seconds := in_rounds(record, label)):
            found[label] = seconds
    return found


def fastest(record: Record, dtype: str) -> str | None:
    """The other runtime of the least time over ours in the same rounds."""
    ours, times = in_rounds(record, f"ours, {dtype}"), other_runtimes(record, dtype)
    if ours is None:
        return None
    return min(times, key=lambda label: pairwise_ratio(times[label], ours)["median"], default=None)


def noise(record: Record) -> str:
    """The ratio of our engine's repeat to our engine, of a case that has both; else "-"."""
    return next((ratio(*pair) for pair in repeats(record)), "-")


def repeats(record: Record) -> list[tuple[list[float], list[float]]]:
    """Times of what takes part a second time, and of the first, in the same rounds."""
    if variants := record.get("variants"):
        pair = [variants[name].get("seconds") for name in (REPEAT_UNGATED, REFERENCE)]
        return [(pair[0], pair[1])] if all(pair) else []
    labels = [label for label in record["runtimes"] if REPEAT in label]
    pairs = [(in_rounds(record, label), in_rounds(record, label.replace(REPEAT, "ours"))) for label in labels]
    return [(again, first) for again, first in pairs if again and first]


def fastest_table(results: Record) -> Rows:
    """A row for each model, batch and dtype of ours."""
    header = ["model", "batch", "MACs", "ours in", "rounds", "ours ms", "p95 ms"]
    rows = [[*header, "fastest runtime", "its ms", "its p95 ms", "runtime / ours", "noise"]]
    for record in of_case(results, "models"):
        for dtype in _dtypes(record):
            ours, best = in_rounds(record, f"ours, {dtype}"), fastest(record, dtype)
            other = None if best is None else in_rounds(record, best)
            rows.append([
                record["model"], str(record["batch"]), f"{record['macs'] / 1e9:.2f} G", dtype,
                str(record["rounds"]), milliseconds(ours), "-" if ours is None else f"{1e3 * p95(ours):.2f}",
                best or "none", milliseconds(other), "-" if other is None else f"{1e3 * p95(other):.2f}",
                ratio(other, ours), noise(record),
            ])  # fmt: skip
    return rows


def runtimes_table(results: Record) -> Rows:
    """A row for each runtime, a column for each model and batch: milliseconds, and how many times ours."""
    records = of_case(results, "models")
    labels = dict.fromkeys(label for record in records for label in record["runtimes"])
    rows = [["runtime", *(f"{record['model']}, batch {record['batch']}" for record in records)]]
    for label in labels:
        rows.append([label, *(_beside_ours(record, label) for record in records)])
    return rows


def _beside_ours(record: Record, label: str) -> str:
    runtime, seconds = record["runtimes"].get(label), in_rounds(record, label)
    if runtime is None:
        return "-"
    if seconds is not None:
        ours = in_rounds(record, f"ours, {runtime['dtype']}")
        return f"{milliseconds(seconds)} ms, {ratio(seconds, ours)}"
    if runtime["status"] == "slow":
        return f"about {runtime['times_ours']:.0f}x, {counted(len(runtime['seconds']), 'call')}"
    return runtime["status"]


def compilers_table(results: Record) -> Rows:
    """A row for each runtime: its time beside ours, the seconds until it was ready, and memory."""
    rows = [["model", "blocks", "runtime", "rounds", "time, and over ours", "ready after, s", "memory MiB"]]
    for record in of_case(results, "compilers"):
        for label, runtime in record["runtimes"].items():
            _, load, memory = costs(runtime)
            rows.append([
                record["model"], str(record["blocks"]), label, str(record["rounds"]),
                _beside_ours(record, label), load, memory,
            ])  # fmt: skip
    return rows


def in_its_place_table(results: Record) -> Rows:
    """A row for each other model, by model: its MACs, and times of runtimes over ours on the compact one."""
    columns = ("ours", "PyTorch eager", "OpenVINO")
    header = ["model", "in place of the compact one", "MACs", *(f"{name} / ours" for name in columns)]
    rows = [[*header, "rounds", "noise"]]
    for record in of_case(results, "place"):
        dtype, runtimes = main_dtype(record), record["runtimes"]
        ours = in_rounds(record, f"ours, {dtype}")
        names = dict.fromkeys(label.partition(": ")[0] for label in runtimes if ": " in label)
        for name in names:
            labels = {runtime: f"{name}: {runtime}, {dtype}" for runtime in columns}
            macs = next((runtimes[label].get("macs") for label in labels.values() if label in runtimes), None)
            cells = (ratio(in_rounds(record, label), ours) for label in labels.values())
            size = "-" if macs is None else f"{macs / 1e9:.2f} G"
            rows.append([record["model"], name, size, *cells, str(record["rounds"]), noise(record)])
    return rows


def costs_table(results: Record) -> Rows:
    """Beside time: what it takes to get a model ready, and its memory."""
    rows = [["model", "batch", "runtime", "export s", "load s", "memory MiB"]]
    for record in of_case(results, "models"):
        for label in record["runtimes"]:
            if in_rounds(record, label) and not label.startswith("ours (repeat)"):
                cells = costs(record["runtimes"][label])
                rows.append([record["model"], str(record["batch"]), label, *cells])
    return rows


def planted_table(results: Record) -> Rows:
    """What the method sees of a slow-down and of a wrong result that were planted in our engine."""
    rows = [["model", "rounds", "ours (repeat) / ours", f"{SLOWED} / ours", WRONG]]
    for record in of_case(results, "planted"):
        dtype = main_dtype(record)
        ours = in_rounds(record, f"ours, {dtype}")
        ratios = (ratio(in_rounds(record, f"{n}, {dtype}"), ours) for n in ("ours (repeat)", SLOWED))
        wrong = record["runtimes"][f"{WRONG}, {dtype}"]
        figure = wrong["reason"] if wrong["status"] == "failed" else "NOT SEEN"
        rows.append([record["model"], str(record["rounds"]), *ratios, figure])
    return rows


def cuts(record: Record) -> list[str]:
    """Names of the cuts of a case, the dense model first."""
    return list(record["macs"])


def speedups_table(case: str, results: Record) -> Rows:
    """Dense over cut time on our engine, what the MACs promise, and how much of that it is."""
    names = list(dict.fromkeys(name for r in of_case(results, case) for name in cuts(r)[1:]))
    rows = [["model", "batch", "dtype", "rounds", "dense ms", *names, "noise"]]
    for record in of_case(results, case):
        for dtype in DTYPES:
            dense = in_rounds(record, f"dense: ours, {dtype}")
            if dense is None:
                continue
            row = [record["model"], str(record["batch"]), dtype, str(record["rounds"]), milliseconds(dense)]
            for name in names:
                own = in_rounds(record, f"{name}: ours, {dtype}")
                row.append("-" if own is None else _speedup(record, name, dense, own))
            rows.append([*row, noise(record)])
    return rows


def _speedup(record: Record, name: str, dense: list[float], own: list[float]) -> str:
    """A speed-up as a text, as in "1.80x of 2.00x: 0.90 (0.88-0.92)"."""
    promised = record["macs"]["dense"] / record["macs"][name]
    found = pairwise_ratio(dense, own)
    share, q1, q3 = (found[key] / promised for key in ("median", "q1", "q3"))
    return f"{found['median']:.2f}x of {promised:.2f}x: {share:.2f} ({q1:.2f}-{q3:.2f})"


def training_table(results: Record) -> Rows:
    """Time of a step over that of the model without gates."""
    rows = [["model", "batch", "blocks", "rounds", "step without gates", "gated", "by hand", "noise"]]
    for record in of_case(results, "training"):
        variants = record["variants"]
        cells = ["failed"] * 4
        if not variants[REFERENCE]["failed"]:
            plain = variants[REFERENCE]["seconds"]
            cells = [f"{statistics.median(plain):.3g} s"]
            cells += [
                "failed" if variants[name]["failed"] else ratio(variants[name]["seconds"], plain)
                for name in ("gated", "naive", REPEAT_UNGATED)
            ]
        rows.append(
            [record["model"], str(record["batch"]), str(record["depth"]), str(record["rounds"]), *cells]
        )
    return rows


# --------------------------------------------------------------------------------
# Parts of models


def realised(record: Record, runtime: str) -> dict[int, float]:
    """By width, the speed-up of a layer over the widest one, as a share of what its MACs promise."""
    rates = {}
    for width, macs in record["macs"].items():
        if seconds := in_rounds(record, f"{width}: {runtime}, float32"):
            rates[int(width)] = macs / statistics.median(seconds)
    return {width: rate / rates[max(rates)] for width, rate in rates.items()}


def layers_table(results: Record) -> Rows:
    """A row for each width of the transformer and runtime."""
    rows = [["width of the transformer", "runtime", "rounds", "speed-up / MACs, by hidden units kept"]]
    for record in of_case(results, "layers"):
        for runtime in ("ours", "PyTorch eager"):
            shares = (f"{width}: {share:.2f}" for width, share in realised(record, runtime).items())
            rows.append([str(record["embed_dim"]), runtime, str(record["rounds"]), ", ".join(shares)])
    return rows


def picoseconds_per_mac(record: Record) -> dict[int, float]:
    """Median time per multiply-add, by width."""
    times = {width: in_rounds(record, width) for width in record["macs"]}
    return {
        int(width): 1e12 * statistics.median(seconds) / record["macs"][width]
        for width, seconds in times.items()
        if seconds
    }


def widths_table(results: Record) -> Rows:
    """How much a width that is no multiple of 16 costs."""
    header = ["dtype", "widths", "rounds", "ps per MAC", "multiples of 16", "others", "least", "most", "at"]
    rows = [header]
    for record in of_case(results, "widths"):
        per_mac = picoseconds_per_mac(record)
        if not per_mac:
            continue
        mean, most = statistics.mean(per_mac.values()), max(per_mac, key=per_mac.__getitem__)
        even, odd = ([v for w, v in per_mac.items() if (w % 16 == 0) == whole] for whole in (True, False))
        rows.append([
            record["dtype"], str(len(per_mac)), str(record["rounds"]), f"{mean:.2f}",
            *(f"{statistics.mean(side) / mean:.3f}x" if side else "-" for side in (even, odd)),
            f"{min(per_mac.values()) / mean:.3f}x", f"{per_mac[most] / mean:.3f}x", str(most),
        ])  # fmt: skip
    return rows


def rate_table(results: Record) -> Rows:
    """The rate of each library, fastest first."""
    rows = [["library", "product", "rounds", "GFLOP/s, median", "fastest call"]]
    for record in of_case(results, "rate"):
        times = {label: s for label in record["runtimes"] if (s := in_rounds(record, label))}
        flops_of = {label: record["runtimes"][label].get("flops", record["flops"]) for label in times}
        for label in sorted(times, key=lambda name: statistics.median(times[name]) / flops_of[name]):
            flops = flops_of[label]
            rates = (1e-9 * flops / f(times[label]) for f in (statistics.median, min))
            rows.append(
                [label, product(label, record), str(record["rounds"]), *(f"{rate:,.0f}" for rate in rates)]
            )
    return rows


def product(label: str, record: Record) -> str:
    """The shape of a product as a text."""
    return "-" if "flops" in record["runtimes"][label] else f"{record['size']} cubed"


def gemm_table(results: Record) -> Rows:
    """Rates of single products, a row for each shape."""
    records = of_case(results, "gemm")
    labels = list(dict.fromkeys(label for r in records for label in r["runtimes"] if in_rounds(r, label)))
    rows = [["GFLOP/s of", *(record["shape"] for record in records)]] if records else [[]]
    for label in labels:
        times = [in_rounds(record, label) for record in records]
        rates = (
            f"{1e-9 * record['flops'] / statistics.median(seconds):,.0f}" if seconds else "-"
            for record, seconds in zip(records, times, strict=True)
        )
        rows.append([label, *rates])
    return rows


# --------------------------------------------------------------------------------
# All of them

TABLES = {
    "models": {
        "Fastest runtime over ours": fastest_table,
        "All runtimes, and how many times ours of the same dtype": runtimes_table,
        "Export, load (with the first call) and memory": costs_table,
    },
    "compilers": {"torch.compile, in a model of few blocks": compilers_table},
    "place": {f"In place of the model cut by {RATE:.0%}, time over ours of that one": in_its_place_table},
    "planted": {"Planted in our engine": planted_table},
    "sweep": {
        "Speed-up over the dense model on our engine, of what MACs promise: the share": functools.partial(
            speedups_table, "sweep"
        )
    },
    "heads": {
        "The same with nothing but parts of heads at a quarter of their width": functools.partial(
            speedups_table, "heads"
        )
    },
    "training": {"Step of sparse training over a step without gates": training_table},
    "layers": {"A feed-forward branch beside the dense one": layers_table},
    "widths": {"Time per MAC of a feed-forward branch, by width": widths_table},
    "rate": {"Rate of a large square product, and inside our engine": rate_table},
    "gemm": {"Rate of single products": gemm_table},
}  # fmt: skip


def tables(results: Record) -> dict[str, Rows]:
    """All that have a row, by title."""
    shown = {title: make(results) for case in TABLES.values() for title, make in case.items()}
    return {title: rows for title, rows in shown.items() if len(rows) > 1}


def notes(results: Record) -> list[str]:
    """One line for each reason why a runtime has no figure, with the cases that it holds for."""
    found: dict[str, list[str]] = {}
    for key, record in results["cases"].items():
        for label, runtime in record.get("runtimes", {}).items():
            if runtime["status"] != "measured" and record["case"] != "planted":
                found.setdefault(f"{label}: {runtime['status']}: {runtime['reason']}", []).append(key)
    return [f"{what} ({'; '.join(keys)})" for what, keys in found.items()]


def place(results: Record) -> str:
    """Machine, versions and commits, in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v is not None)
    commits = {
        f"{(r['commit'] or 'unknown')[:8]}{' with changes' * bool(r['modified'])}"
        for r in results["cases"].values()
    }
    isa = " ".join(results["hardware"]["isa"])
    libraries, code = versions or "no other library", ", ".join(sorted(commits))
    return f"{in_one_line(results)}; {libraries}; {isa}; commit {code}"


def markdown(results: Record) -> str:
    """The tables of docs/speed-cpu.md, the reasons of those without figures, and the machine."""
    lines = [line for title, rows in tables(results).items() for line in markdown_table(title, rows)]
    return "\n".join(
        [*lines, *(f"- {note}" for note in notes(results)), "", f"Measured on {place(results)}."]
    )


def show(console: Console, results: Record, case: str) -> None:
    """The tables of one case on the terminal."""
    for title, make in TABLES[case].items():
        rows = make(results)
        if len(rows) > 1:
            print_table(console, title, rows)
