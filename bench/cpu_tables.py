"""The tables of bench/cpu_engine.py, every figure from the raw times of a results file."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vtp.bench.measure import machine, pairwise_ratio

Record = dict[str, Any]
Rows = list[list[str]]  # the first is the header


def in_rounds(record: Record, label: str) -> list[float] | None:
    """Times of the rounds; None of a peer that was not in them."""
    peer = record["peers"].get(label, {"status": "absent"})
    return peer["seconds"] if peer["status"] == "measured" else None


def p95(seconds: Sequence[float]) -> float:
    """The time that 95% of calls do not exceed."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def competitors(record: Record, dtype: str) -> dict[str, list[float]]:
    """Peers of ours in `dtype` that were in the rounds: for bfloat16 of any dtype, else of the same."""
    found = {}
    for label, peer in record["peers"].items():
        comparable = dtype == "bfloat16" or peer["dtype"] == dtype
        if comparable and not label.startswith("ours") and (seconds := in_rounds(record, label)):
            found[label] = seconds
    return found


def fastest(record: Record, dtype: str) -> str | None:
    """The competitor of the least median."""
    times = competitors(record, dtype)
    return min(times, key=lambda label: statistics.median(times[label]), default=None)


def _milliseconds(seconds: Sequence[float] | None) -> str:
    return "-" if seconds is None else f"{1e3 * statistics.median(seconds):.2f}"


def _ratio(own: Sequence[float] | None, reference: Sequence[float] | None, scale: float = 1.0) -> str:
    """Median and quartiles of own over reference time, each multiplied by `scale`."""
    if own is None or reference is None:
        return "-"
    ratio = {name: scale * value for name, value in pairwise_ratio(own, reference).items()}
    return f"{ratio['median']:.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})"


def _of(results: Record, case: str) -> list[Record]:
    return [record for record in results["cases"].values() if record["case"] == case]


def _dtypes(record: Record) -> list[str]:
    return list(dict.fromkeys(peer["dtype"] for peer in record["peers"].values()))


def fastest_table(results: Record) -> Rows:
    """A row for each model, batch and dtype of ours."""
    header = ["model", "batch", "MACs", "ours in", "rounds", "ours ms", "p95 ms"]
    rows = [[*header, "fastest peer", "its ms", "its p95 ms", "peer / ours", "noise"]]
    for record in _of(results, "models"):
        for dtype in _dtypes(record):
            ours, best = in_rounds(record, f"ours, {dtype}"), fastest(record, dtype)
            other = None if best is None else in_rounds(record, best)
            again = in_rounds(record, f"ours again, {dtype}")
            rows.append([
                record["model"], str(record["batch"]), f"{record['macs'] / 1e9:.2f} G", dtype,
                str(record["rounds"]), _milliseconds(ours), "-" if ours is None else f"{1e3 * p95(ours):.2f}",
                best or "none", _milliseconds(other), "-" if other is None else f"{1e3 * p95(other):.2f}",
                _ratio(other, ours), _ratio(again, ours),
            ])  # fmt: skip
    return rows


def peers_table(results: Record) -> Rows:
    """A row for each peer, a column for each model and batch: milliseconds, and how many times ours."""
    records = _of(results, "models")
    labels = dict.fromkeys(label for record in records for label in record["peers"])
    rows = [["peer", *(f"{record['model']}, batch {record['batch']}" for record in records)]]
    for label in labels:
        cells = [label]
        for record in records:
            peer, seconds = record["peers"].get(label), in_rounds(record, label)
            if peer is None:
                cells.append("-")
            elif seconds is not None:
                ours = in_rounds(record, f"ours, {peer['dtype']}")
                cells.append(f"{_milliseconds(seconds)} ms, {_ratio(seconds, ours)}")
            elif peer["status"] == "slow":
                cells.append(f"about {peer['times_ours']:.0f}x, {len(peer['seconds'])} call(s)")
            else:
                cells.append(peer["status"])
        rows.append(cells)
    return rows


def speedup_table(results: Record) -> Rows:
    """Dense over compact time, and how much of what the MACs promise that is."""
    rows = [
        [
            "model",
            "batch",
            "dtype",
            "rounds",
            "dense ms",
            "compact ms",
            "speed-up",
            "MACs",
            "speed-up / MACs",
            "noise",
        ]
    ]
    for record in _of(results, "speedup"):
        promised = record["macs"]["dense"] / record["macs"]["compact"]
        for dtype in _dtypes(record):
            dense, small, again = (
                in_rounds(record, f"{name}, {dtype}") for name in ("dense", "compact", "compact again")
            )
            rows.append([
                record["model"], str(record["batch"]), dtype, str(record["rounds"]), _milliseconds(dense),
                _milliseconds(small), _ratio(dense, small), f"{promised:.2f}x",
                _ratio(dense, small, 1 / promised), _ratio(again, small),
            ])  # fmt: skip
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
    for record in _of(results, "widths"):
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
    for record in _of(results, "rate"):
        times = {label: s for label in record["peers"] if (s := in_rounds(record, label))}
        flops_of = {label: record["peers"][label].get("flops", record["flops"]) for label in times}
        for label in sorted(times, key=lambda name: statistics.median(times[name]) / flops_of[name]):
            flops = flops_of[label]
            rates = (1e-9 * flops / f(times[label]) for f in (statistics.median, min))
            rows.append(
                [label, product(label, record), str(record["rounds"]), *(f"{rate:,.0f}" for rate in rates)]
            )
    return rows


def product(label: str, record: Record) -> str:
    """What was multiplied."""
    return "-" if "flops" in record["peers"][label] else f"{record['size']} cubed"


def gemm_table(results: Record) -> Rows:
    """Rates of single products, a row for each shape."""
    records = _of(results, "gemm")
    labels = list(dict.fromkeys(label for r in records for label in r["peers"] if in_rounds(r, label)))
    rows = [["GFLOP/s of", *(record["shape"] for record in records)]] if records else [[]]
    for label in labels:
        times = [in_rounds(record, label) for record in records]
        rates = (
            f"{1e-9 * record['flops'] / statistics.median(seconds):,.0f}" if seconds else "-"
            for record, seconds in zip(records, times, strict=True)
        )
        rows.append([label, *rates])
    return rows


TABLES = {
    "models": {
        "Fastest peer over ours": fastest_table,
        "All peers, and how many times ours of the same dtype": peers_table,
    },
    "speedup": {"Dense over compact, both on our engine": speedup_table},
    "widths": {"Time per MAC of a feed-forward branch, by width": widths_table},
    "rate": {"Rate of a large square product, and inside our engine": rate_table},
    "gemm": {"Rate of single products": gemm_table},
}  # fmt: skip


def tables(results: Record) -> dict[str, Rows]:
    """All that have a row, by title."""
    shown = {title: make(results) for case in TABLES.values() for title, make in case.items()}
    return {title: rows for title, rows in shown.items() if len(rows) > 1}


def notes(results: Record) -> list[str]:
    """One line for each reason why a peer has no figure, with the cases that it holds for."""
    found: dict[str, list[str]] = {}
    for key, record in results["cases"].items():
        for label, peer in record.get("peers", {}).items():
            if peer["status"] != "measured":
                found.setdefault(f"{label}: {peer['status']}: {peer['reason']}", []).append(key)
        for shape, reason in record.get("failed", {}).items():
            found.setdefault(f"{shape}: failed: {reason}", []).append(key)
    return [f"{what} ({'; '.join(keys)})" for what, keys in found.items()]


def place(results: Record) -> str:
    """Machine, versions and commits, in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v is not None)
    commits = {
        f"{(r['commit'] or 'unknown')[:8]}{' with changes' * bool(r['modified'])}"
        for r in results["cases"].values()
    }
    isa = " ".join(results["hardware"]["isa"])
    return f"{machine(results)}; {versions or 'no other library'}; {isa}; commit {', '.join(sorted(commits))}"


def markdown(results: Record) -> str:
    """The README's tables, the reasons of those without figures, and the machine."""
    lines = []
    for title, (header, *rows) in tables(results).items():
        cells = (header, ["---"] * len(header), *rows)
        lines += [f"{title}:", "", *("| " + " | ".join(row) + " |" for row in cells), ""]
    return "\n".join(
        [*lines, *(f"- {note}" for note in notes(results)), "", f"Measured on {place(results)}."]
    )


def show(console: Console, results: Record, case: str) -> None:
    """The tables of one case on the terminal."""
    for title, make in TABLES[case].items():
        header, *rows = make(results)
        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for column in header:
            shown.add_column(column)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
