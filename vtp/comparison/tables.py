"""Tables of a comparison, every figure from its raw times."""

import math
import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from vtp.comparison.comparison import Record
from vtp.timing import pairwise_ratio

Rows = list[list[str]]  # the first is the header


def in_rounds(record: Record, label: str) -> list[float] | None:
    """Times of the rounds; None of a runtime that was not in them."""
    runtime = record["runtimes"].get(label, {"status": "absent"})
    return runtime["seconds"] if runtime["status"] == "measured" else None


def p95(seconds: Sequence[float]) -> float:
    """The time that 95% of calls do not exceed."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]


def milliseconds(seconds: Sequence[float] | None) -> str:
    """The median of some times as a text, in milliseconds."""
    return "-" if seconds is None else f"{1e3 * statistics.median(seconds):.2f}"


def ratio(own: Sequence[float] | None, reference: Sequence[float] | None, scale: float = 1.0) -> str:
    """Median and quartiles of own over reference time, each multiplied by `scale`."""
    if own is None or reference is None:
        return "-"
    found = {name: scale * value for name, value in pairwise_ratio(own, reference).items()}
    return f"{found['median']:.2f}x ({found['q1']:.2f}-{found['q3']:.2f})"


def costs(runtime: Record) -> list[str]:
    """Seconds to export and to load a model, and its memory in MiB, as three cells."""
    seconds = (runtime.get("export_seconds"), runtime.get("prepare_seconds"))
    memory = runtime.get("memory_bytes")
    cells = ["-" if value is None else f"{value:.2f}" for value in seconds]
    return [*cells, "-" if memory is None else f"{memory / 2**20:,.0f}"]


def runtimes_table(record: Record, reference: str) -> Rows:
    """Times of each runtime of one comparison; `reference` is the label that others are compared with."""
    rows = [["", "median ms", "p95 ms", f"time / {reference}"]]
    for label, runtime in record["runtimes"].items():
        seconds = in_rounds(record, label)
        if seconds is None:
            compared = f"about {runtime['times_ours']:.0f}x" if runtime["status"] == "slow" else "-"
            rows.append([label, runtime["status"], "-", compared])
        else:
            compared = ratio(seconds, in_rounds(record, reference))
            rows.append([label, milliseconds(seconds), f"{1e3 * p95(seconds):.2f}", compared])
    return rows


def costs_table(record: Record) -> Rows:
    """What it takes to get each runtime of one comparison ready, and its memory."""
    rows = [["", "export s", "load s", "memory MiB"]]
    return rows + [
        [label, *costs(runtime)] for label, runtime in record["runtimes"].items() if "memory_bytes" in runtime
    ]


def reasons(record: Record) -> list[str]:
    """One line for each runtime without a figure."""
    return [
        f"{label}: {runtime['status']}: {runtime['reason']}"
        for label, runtime in record["runtimes"].items()
        if runtime["status"] != "measured"
    ]


def markdown_table(title: str, rows: Rows) -> list[str]:
    """A title and rows as the lines of a Markdown table."""
    header, *others = rows
    cells = (header, ["---"] * len(header), *others)
    return [f"{title}:", "", *("| " + " | ".join(row) + " |" for row in cells), ""]


def print_table(console: Console, title: str, rows: Rows) -> None:
    """Print a title and rows as a table on the terminal."""
    header, *others = rows
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for number, column in enumerate(header):
        shown.add_column(column, no_wrap=number == 0)
    for row in others:
        shown.add_row(*row)
    console.print(shown)
