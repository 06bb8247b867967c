"""What a run bought and what it cost, in numbers and words: the same for the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from vtp.words import counted

NOTHING = "\N{EN DASH}"
_MINUS, _TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
COLUMNS = ("model", "top-1", "params", "MACs", "file size", "latency (median)", "speed-up")
DENSE, BEFORE, AFTER = "dense", "compact before fine-tuning", "compact after"
OPTIMIZED = "compact, optimized"
ROW_NAMES = {AFTER: "compact after fine-tuning", OPTIMIZED: "the same, vtp.optimize"}


def number(value: object) -> float:
    """`value` as a float; NaN for what is not a number (None, strings, booleans, infinities)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def percent(share: float) -> str:
    """0.62 -> "62%"; never "0%" or "100%" for a share that only rounds to it."""
    if math.isnan(share):
        return NOTHING
    rounded = round(100 * share)
    exact = rounded not in (0, 100) or share in (0, 1)
    return f"{rounded}%" if exact else f"{100 * share:.2g}%" if share < 0.5 else f"{100 * share:.1f}%"


def magnitude(value: float, unit: str = "") -> str:
    """1_234_567 -> "1.23 M" (with unit "B": "1.23 MB")."""
    if math.isnan(value):
        return NOTHING
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def signed(value: float) -> str:
    """Two decimals with a sign, a real minus, and no "-0.00"."""
    rounded = round(value, 2)
    return "±0.00" if rounded == 0 else f"{rounded:+.2f}".replace("-", _MINUS)


def entries(results: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The list of objects under `key` ("rows" or "reslice"); empty if there is none."""
    found = results.get(key) or []
    if not isinstance(found, list) or not all(isinstance(entry, Mapping) for entry in found):
        raise ValueError(f"results[{key!r}]: got {str(found)[:60]}, expected a list of objects")
    return found


def environment(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Versions and machine, empty if not recorded."""
    found = results.get("environment") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"results['environment']: got {type(found).__name__}, expected an object")
    return found


def find_row(results: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The row of a model, empty if it has none."""
    return next((row for row in entries(results, "rows") if row.get("model") == model), {})


def served_row(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row that says how fast the final model is in use: by `vtp.optimize`, where that was timed."""
    packed = find_row(results, OPTIMIZED)
    return packed if number(packed.get("latency_ms")) > 0 else find_row(results, AFTER)


def _speedup(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Times faster than dense: as recorded, else from the two latencies; NaN if neither is there."""
    recorded, latency = number(row.get("speedup")), number(row.get("latency_ms"))
    if math.isnan(recorded) and latency > 0:
        return number(dense.get("latency_ms")) / latency
    return recorded


def comparison_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the comparison, one tuple as long as `COLUMNS` for each model; "–" for what is missing."""
    dense = find_row(results, DENSE)

    def cell(row: Mapping[str, Any], key: str, unit: str = "") -> str:
        value, reference = number(row.get(key)), number(dense.get(key))
        comparable = row is not dense and value >= 0 and reference > 0
        return magnitude(value, unit) + (f" ({percent(value / reference)})" if comparable else "")

    rows = []
    for row in entries(results, "rows"):
        name, top1 = str(row.get("model", NOTHING)), number(row.get("top1"))
        loss = top1 - number(dense.get("top1"))
        accuracy = NOTHING if math.isnan(top1) else f"{top1:.2f}"
        if row is not dense and not math.isnan(loss):
            accuracy += f" ({signed(loss)})"
        latency, speedup = number(row.get("latency_ms")), _speedup(row, dense)
        rows.append(
            (
                ROW_NAMES.get(name, name),
                accuracy,
                cell(row, "params"),
                cell(row, "macs"),
                cell(row, "file_bytes", "B"),
                NOTHING if math.isnan(latency) else f"{latency:.2f} ms",
                NOTHING if math.isnan(speedup) else f"{speedup:.2f}{_TIMES}",
            )
        )
    return rows


def comparison_table(results: Mapping[str, Any]) -> Table:
    """The table that ends a run: dense, sparse, compact before and after fine-tuning."""
    table = Table(caption=latency_note(results), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in comparison_rows(results):
        table.add_row(*(Text(cell) for cell in row))  # Text: a "[" in a name is not markup
    return table


def latency_note(results: Mapping[str, Any]) -> str:
    """What the latency figures are of."""
    batch = number(environment(results).get("latency_batch"))
    of = "" if math.isnan(batch) else f" of a batch of {counted(round(batch), 'image')}"
    return (
        f"Latency{of}: median of interleaved rounds, so that a busy machine slows all models alike. "
        "Speed-up: median of the rounds' own ratios, which the ratio of two medians need not be."
    )


def is_one_shot(config: Mapping[str, Any]) -> bool:
    """Whether the run went without sparse training."""
    return config.get("one_shot") is True


def removed_share(plan: Any) -> float:
    """Share of all gated dimensions that the plan removes; NaN without a plan."""
    if plan is None:
        return math.nan
    total = sum(plan.widths.values())
    return 1 - sum(len(kept) for kept in plan.kept.values()) / total if total else math.nan


def headline(results: Mapping[str, Any], plan: Any) -> tuple[str, list[str], list[str]]:
    """What was removed; what it cost, in a few words each; and what must be said beside it."""
    dense, final = find_row(results, DENSE), find_row(results, AFTER) or find_row(results, BEFORE)
    removed = removed_share(plan)
    what = f"{percent(removed)} of dimensions removed" if removed > 0 else "No dimension removed"
    if math.isnan(removed):
        what = "A vision transformer, pruned" if final else "A run without a pruned model"
    if not final:
        return what, [], ["results.json has no compact model: there is nothing to compare yet."]
    macs = number(final.get("macs")) / (number(dense.get("macs")) or math.nan)
    before, after = number(dense.get("top1")), number(final.get("top1"))
    served = served_row(results) or final
    speed, by = _speedup(served, dense), " with vtp.optimize" if served.get("model") == OPTIMIZED else ""
    facts = [
        (macs, f"{percent(macs)} of MACs left"),
        (after - before, f"top-1 {before:.2f} → {after:.2f}"),
        (speed, _speed_words(speed) + by),
    ]
    notes = _loss_notes(before, after, fine_tuned=bool(find_row(results, AFTER)))
    if math.isnan(speed):
        notes.append("The speed-up is not known: latency was not measured for both models.")
    elif speed < 1.03 and macs < 0.97:
        notes.append(f"Fewer MACs, but {_speed_words(speed)} than the dense model on this machine.")
    return what, [text for value, text in facts if not math.isnan(value)], notes


def _speed_words(speed: float) -> str:
    """1.5 -> "1.5× faster"; within 3% of dense, the noise of a latency measurement, "no faster"."""
    if 0.97 < speed < 1.03:
        return "no faster"
    return f"{speed:.2g}{_TIMES} faster" if speed > 1 else f"{1 / speed:.2g}{_TIMES} slower"


def _loss_notes(before: float, after: float, fine_tuned: bool) -> list[str]:
    loss = before - after
    notes = [] if fine_tuned else ["There was no fine-tuning: these are the figures right after the cut."]
    if math.isnan(loss):
        return [*notes, "What it costs in accuracy is not known: top-1 was not measured for both models."]
    if loss > 2 and fine_tuned:
        return [f"The cut costs {loss:.2f} points of top-1: fine-tuning did not bring the accuracy back."]
    return [*notes, f"The cut costs {loss:.2f} points of top-1."] if loss > 0.5 else notes
