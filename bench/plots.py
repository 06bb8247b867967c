"""The plots of bench/compare.py: speed against MACs, throughput against batch, what a layer's cut buys."""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.cases import RATE
from bench.tables import cuts, main_dtype, of_case, realised
from vtp.comparison.comparison import Record
from vtp.comparison.tables import in_rounds
from vtp.files import write_atomic
from vtp.machine import in_one_line

MARKS = {"ours": "o-", "PyTorch eager": "s--", "OpenVINO": "^:"}


def draw(results: Record, beside: Path) -> list[Path]:
    """Write each plot that there are figures for as `<name of the results file>-<plot>.png`; the files."""
    made = []
    for name, (case, plot) in PLOTS.items():
        records = [record for record in of_case(results, case) if _wanted(name, record)]
        if not records:
            continue
        figure = Figure(figsize=(4.2 * len(records) if name != "throughput" else 12.6, 3.6), dpi=120)
        plot(figure, records)
        figure.text(0.5, 0.005, in_one_line(results), ha="center", fontsize=6, color="0.4")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        file = beside.with_name(f"{beside.stem}-{name}.png")
        write_atomic(file, lambda path, figure=figure: figure.savefig(path, format="png"))
        made.append(file)
    return made


def _wanted(name: str, record: Record) -> bool:
    return name != "speed" or record["batch"] == 1


def _images_per_second(record: Record, name: str) -> float | None:
    seconds = in_rounds(record, f"{name}, {main_dtype(record)}")
    return record["batch"] / statistics.median(seconds) if seconds else None


def speed(figure: Figure, records: list[Record]) -> None:
    """Images per second of every cut against its MACs, beside the line on which a MAC saved is time saved."""
    for number, record in enumerate(records):
        axes = figure.add_subplot(1, len(records), number + 1)
        macs, names = record["macs"], cuts(record)
        dense = _images_per_second(record, "dense: ours")
        shown = sorted(macs.values())
        if dense is not None:
            axes.plot(
                [m / 1e9 for m in shown],
                [dense * macs["dense"] / m for m in shown],
                "k-",
                lw=0.8,
                label="ideal",
            )
        for heads in ("unequal", "uniform"):
            for runtime, mark in MARKS.items():
                own = [n for n in names if n == "dense" or n.startswith(heads)]
                points = [
                    (macs[n] / 1e9, rate)
                    for n in own
                    if (rate := _images_per_second(record, f"{n}: {runtime}")) is not None
                ]
                if len(points) > 1:
                    style = {"alpha": 0.5, "mfc": "none"} if heads == "uniform" else {}
                    axes.plot(*zip(*points, strict=True), mark, label=f"{runtime}, {heads} heads", **style)
        _finish(axes, record["model"], "MACs per image (G)", "images per second")


def throughput(figure: Figure, records: list[Record]) -> None:
    """Images per second against batch, dense and cut."""
    models = list(dict.fromkeys(record["model"] for record in records))
    for number, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), number + 1)
        own = [record for record in records if record["model"] == model]
        for name in ("dense", f"unequal {RATE:.0%}"):
            for runtime, mark in MARKS.items():
                points = [
                    (r["batch"], rate)
                    for r in own
                    if (rate := _images_per_second(r, f"{name}: {runtime}")) is not None
                ]
                if points:
                    style = {"alpha": 0.5, "mfc": "none"} if name == "dense" else {}
                    axes.plot(*zip(*points, strict=True), mark, label=f"{runtime}, {name}", **style)
        _finish(axes, model, "batch", "images per second")
        axes.set_xticks([r["batch"] for r in own])


def layers(figure: Figure, records: list[Record]) -> None:
    """Speed-up of a feed-forward branch over the dense one, as a share of what its MACs promise, by width."""
    for number, record in enumerate(records):
        axes = figure.add_subplot(1, len(records), number + 1)
        for runtime in ("ours", "PyTorch eager"):
            shares = realised(record, runtime)
            axes.plot(list(shares), list(shares.values()), MARKS[runtime], label=runtime)
        axes.axhline(1.0, color="k", lw=0.8)
        axes.set_ylim(0, 1.2)
        axes.set(title=f"feed-forward of width {record['embed_dim']}", xlabel="hidden units kept")
        axes.set_ylabel("realised over ideal speed-up")
        axes.legend(fontsize=7)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(True, lw=0.3)
    axes.legend(fontsize=6)


PLOTS: dict[str, tuple[str, Callable[[Figure, list[Record]], None]]] = {
    "speed": ("sweep", speed),
    "throughput": ("sweep", throughput),
    "layers": ("layers", layers),
}
