"""The sections of the report, each a function from plain data to HTML.

Every string that comes from a file goes through `escape`. What a run does not have becomes a note.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vtp.report import figures, markup
from vtp.report.figures import SITE_ROLES, Curve, Mark, Ridge, Stage
from vtp.report.numbers import (
    AFTER,
    BEFORE,
    COLUMNS,
    DENSE,
    NOTHING,
    ROW_NAMES,
    comparison_rows,
    entries,
    environment,
    find_row,
    headline,
    latency_note,
    magnitude,
    number,
    percent,
    removed_share,
    served_row,
)
from vtp.words import counted

_STAGES = ("dense", "sparse", "finetune")
_SITE_INPUTS = {
    "attn.qkv": "LayerNorm output, into qkv",
    "attn.proj": "attention output, into proj",
    "mlp.fc1": "LayerNorm output, into fc1",
    "mlp.fc2": "GELU output, into fc2",
}


def header(config: Mapping[str, Any], results: Mapping[str, Any], plan: Any) -> str:
    """What was removed, what it cost, and what is left."""
    what, facts, notes = headline(results, plan)
    cost = ", ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    names = [str(config[key]) for key in ("model", "data") if isinstance(config.get(key), str)]
    eyebrow = " · ".join(["Vision transformer pruning", *names])
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(what)}</h1>'
        f'<p class="lead">{cost}</p>{"".join(map(markup.note, notes))}'
        f"{_what_is_left(results, plan)}</header>"
    )


def _what_is_left(results: Mapping[str, Any], plan: Any) -> str:
    """Bars: dimensions, MACs, parameters, file size and latency of the final model in percent of dense."""
    dense, final = find_row(results, DENSE), find_row(results, AFTER) or find_row(results, BEFORE)
    served = served_row(results) or final
    shares = []
    if plan is not None:
        ours, theirs = sum(map(len, plan.kept.values())), sum(plan.widths.values())
        shares.append(("Dimensions", 1 - removed_share(plan), f"{theirs:,} → {ours:,}"))
    for label, key, row, show in (
        ("MACs", "macs", final, magnitude),
        ("Parameters", "params", final, magnitude),
        ("File size", "file_bytes", final, functools.partial(magnitude, unit="B")),
        ("Latency", "latency_ms", served, lambda ms: f"{ms:.2f} ms"),
    ):
        ours, theirs = number(row.get(key)), number(dense.get(key))
        if ours >= 0 and theirs > 0:
            shares.append((label, ours / theirs, f"{show(theirs)} → {show(ours)}"))
    items = "".join(
        f"<div><dt>{label}</dt><dd><b>{percent(share)}</b> <small>{detail}</small></dd>"
        f'<dd class="bar" aria-hidden="true"><i style="width:{min(100 * share, 100):.1f}%"></i></dd></div>\n'
        for label, share, detail in shares
        if not math.isnan(share)
    )
    return f'<dl class="left">{items}</dl>' if items else ""


def comparison(results: Mapping[str, Any], one_shot: bool = False) -> str:
    """The table of all models."""
    rows = comparison_rows(results)
    how = f"In brackets: compared with dense (points of top-1, percent of size). {latency_note(results)}"
    expected = (DENSE, BEFORE, AFTER) if one_shot else (DENSE, "sparse", BEFORE, AFTER)
    missing = [ROW_NAMES.get(model, model) for model in expected if not find_row(results, model)]
    notes = [f"Not in results.json: {', '.join(missing)}."] if missing else []
    if not rows:
        return markup.section("comparison", "Before and after", "", "", ["results.json has no results."])
    final = ROW_NAMES[served_row(results).get("model", AFTER)]
    table = markup.table(COLUMNS, rows, "Comparison of the models of this run", final=final)
    return markup.section("comparison", "Before and after", how, f'<div class="card">{table}</div>', notes)


# ------------------------------------------------------------------------------------- gates and widths


def _site_of(name: str) -> tuple[int, str] | None:
    """`blocks.3.attn.qkv` -> (3, "attn.qkv"); None for any other name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match and match[2] in SITE_ROLES else None


def _kept_mask(name: str, width: int, plan: Any) -> np.ndarray | None:
    if plan is None:
        return None
    kept = plan.kept.get(name)
    if kept is None or any(not 0 <= index < width for index in kept):
        found = "does not know this site" if kept is None else f"keeps indices up to {max(kept)}"
        raise ValueError(
            f"plan: it {found} ({name}, {counted(width, 'gate')}); expected the plan made from these gates"
        )
    mask = np.zeros(width, bool)
    mask[list(kept)] = True
    return mask


def _gate_threshold(plan: Any) -> float | None:
    """The plan's threshold where it is one value of |g| for all sites, else None."""
    comparable = plan is not None and plan.score == "gate" and plan.scope == "global" and not plan.per_mac
    return plan.threshold if comparable else None


def _threshold_note(plan: Any) -> str:
    """Why there is no line at the threshold in the plots of the gates."""
    if plan is None:
        return "No plan: which gates are removed is not known, all are drawn in colour."
    if not removed_share(plan) > 0:
        return "The plan removes nothing: there is no threshold."
    why = [f"score {plan.score}{' per MAC' if plan.per_mac else ''}", f"scope {plan.scope}"]
    if plan.round_to > 1:
        why.append(f"widths rounded to {plan.round_to}")
    return (
        f"The cut is not at one value of |g| ({', '.join(why)}), so no threshold is drawn: grey are the "
        "gates that the plan removes."
    )


def gates(gates: Mapping[str, np.ndarray], plan: Any) -> str:
    """Distributions of |g| by site and block."""
    title = "Where the gates ended up"
    ridges: dict[str, list[Ridge]] = {site: [] for site in SITE_ROLES}
    for name, values in gates.items():
        found = _site_of(name)
        if found:
            values = np.abs(np.asarray(values, dtype=np.float64).ravel())
            ridges[found[1]].append(Ridge(found[0], values, _kept_mask(name, values.size, plan)))
    notes = [f"No gates recorded for {site}." for site, rows in ridges.items() if not rows]
    everything = [ridge.magnitude for rows in ridges.values() for ridge in rows]
    if not everything:
        return markup.section("gates", title, "", "", ["No gates: the run has no sparse-trained model."])
    threshold = _gate_threshold(plan)
    edges = figures.magnitude_bins(everything, threshold)
    values = np.concatenate(everything)
    if values.size and np.ptp(values) == 0:
        notes.append(f"All gates are equal ({values[0]:g}): sparse training has not told them apart.")
    if odd := int((~np.isfinite(values)).sum()):
        notes.append(f"{counted(odd, 'gate is', 'gates are')} not finite and not drawn.")
    if threshold is None:
        notes.append(_threshold_note(plan))
    panels = "".join(_gate_panel(site, rows, edges, threshold) for site, rows in ridges.items() if rows)
    how = (
        "One row per block: how many gates have which |g|. Colour: kept. Grey: removed. At the right of a "
        "row: the share kept. Bar height is the square root of the count, scaled to the row's highest bar; "
        "the outermost 0.1% of the gates are in the end bins."
    )
    return markup.section(
        "gates", title, how, f'<div class="card"><div class="panels four">{panels}</div></div>', notes
    )


def _gate_panel(site: str, rows: Sequence[Ridge], edges: np.ndarray, threshold: float | None) -> str:
    rows = sorted(rows, key=lambda ridge: ridge.block)
    known = [row.kept for row in rows if row.kept is not None]
    share = f", {percent(float(np.concatenate(known).mean()))} kept" if known else ""
    label = f"Histograms of the gates of {site} in {counted(len(rows), 'block')}{share}"
    caption = f'<span class="site {SITE_ROLES[site]}">{site}</span>{share}<small>{_SITE_INPUTS[site]}</small>'
    return markup.figure(figures.gate_ridges(site, rows, edges, threshold, label), caption)


def _map_cell(role: str, kept: int, width: int) -> str:
    """One cell of a heat map: percent kept, and the width in small; the colour's strength is the share."""
    share = kept / width if width else math.nan
    mix = 0 if not kept else 8 + 50 * share
    return f'<td class="{role}" style="--mix:{mix:.0f}%">{percent(share)}<small>{kept}</small></td>'


def widths(plan: Any) -> str:
    """Heat maps of kept widths: blocks by sites, and blocks by heads."""
    title = "What is left of each layer"
    if plan is None:
        return markup.section("widths", title, "", "", ["No plan: nothing was cut in this run."])
    blocks = sorted({found[0] for found in map(_site_of, plan.widths) if found})
    if not blocks:
        return markup.section("widths", title, "", "", ["The plan names no site of a transformer block."])
    notes, maps = [], [_site_map(plan, blocks)]
    stay = getattr(getattr(plan, "architecture", None), "scale_attn_norm", False)
    values = {block: tuple(plan.value_widths(block)) for block in blocks}
    if any(values.values()):
        if getattr(plan, "narrows_keys", False):
            keys = {block: tuple(plan.key_widths(block)) for block in blocks}
            maps.append(_head_map("key width", "qkv", keys, plan.head_dim))
        maps.append(_head_map("value width", "proj", values, plan.head_dim))
        gone = sum(width == 0 for widths in values.values() for width in widths)
        total, has = sum(map(len, values.values())), "has" if gone == 1 else "have"
        if gone and stay:
            notes.append(f"{gone} of {counted(total, 'head')} {has} no value dimension left that proj reads.")
        elif gone:
            are = "is" if gone == 1 else "are"
            notes.append(f"{gone} of {counted(total, 'head')} {has} no value dimension left and {are} gone.")
    else:
        notes.append("The plan records no value widths of heads: there is no map of heads.")
    how = (
        "Percent kept, and below it the number of dimensions; the stronger the colour, the more is kept. "
        f"A head's value, query and key have {counted(plan.head_dim, 'dimension')} each before the cut; "
    )
    how += (
        "the norm before proj is over the values of all heads, which stay: what is left is what proj reads."
        if stay
        else "a head with no value left goes, with its query and key."
    )
    return markup.section(
        "widths", title, how, f'<div class="card"><div class="maps">{"".join(maps)}</div></div>', notes
    )


def _site_map(plan: Any, blocks: Sequence[int]) -> str:
    head = "".join(f'<th scope="col" class="site {role}">{site}</th>' for site, role in SITE_ROLES.items())
    names = {(block, site): f"blocks.{block}.{site}" for block in blocks for site in SITE_ROLES}
    size = {key: (len(plan.kept.get(name, ())), plan.widths.get(name, 0)) for key, name in names.items()}
    body = "".join(
        f'<tr><th scope="row">{block}</th>'
        + "".join(_map_cell(role, *size[block, site]) for site, role in SITE_ROLES.items())
        + "</tr>\n"
        for block in blocks
    )
    totals = (
        (role, *(sum(size[b, site][i] for b in blocks) for i in (0, 1))) for site, role in SITE_ROLES.items()
    )
    body += f'<tr class="sum"><th scope="row">all</th>{"".join(_map_cell(*total) for total in totals)}</tr>'
    return _map("Layers", "sites", head, body)


def _head_map(what: str, role: str, widths: Mapping[int, Sequence[int]], head_dim: int) -> str:
    heads = max(map(len, widths.values()))
    head = "".join(f'<th scope="col">{h}<span class="sr"> (head)</span></th>' for h in range(heads))
    body = "".join(
        f'<tr><th scope="row">{block}</th>'
        + "".join(_map_cell(role, width, head_dim) for width in row)
        + "</tr>\n"
        for block, row in widths.items()
    )
    return _map(f"Heads ({what})", "heads", head, body)


def _map(caption: str, css: str, head: str, body: str) -> str:
    return (
        f'{markup.scroll(caption, css)}<table class="map"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


# --------------------------------------------------------------------------- training and accuracy-cost


def training(metrics: Iterable[Mapping[str, Any]], results: Mapping[str, Any], one_shot: bool = False) -> str:
    """Loss, accuracy and sum of |g| by epoch."""
    title, notes = "Training", []
    records = _stage_records(metrics)
    if not records:
        return markup.section("training", title, "", "", ["No epoch was recorded in metrics.jsonl."])
    if DENSE not in records:
        notes.append("No dense stage: the run started from a trained dense model.")
    stages, start = [], 0
    for name, rows in records.items():
        stages.append(Stage(name, start, start + len(rows)))
        start += len(rows)
        notes += _stage_notes(name, rows)
    curves = {key: _curves(key, records, stages) for key in ("train_loss", "test_loss", "test_top1", "l1")}
    panels = [
        _panel("Loss", {"train": curves["train_loss"], "test": curves["test_loss"]}, stages),
        _panel(
            "Top-1 (%)", {"": curves["test_top1"] + _after_cut(records, stages, results)}, stages, results
        ),
        _panel("Sum of |g|", {"": curves["l1"]}, [s for s in stages if _any_finite("l1", records[s.name])]),
    ]
    if not curves["l1"] and not one_shot:
        notes.append("No stage recorded the sum of |g|.")
    penalty = "" if one_shot else "; the penalty of the sparse stage drives the sum of |g| down"
    how = (
        "One point per epoch, the stages one after the other. Fine-tuning starts from the accuracy right "
        f"after the cut{penalty}. Compare training losses within a stage only: augmentation and distillation "
        "change what is summed."
    )
    body = f'<div class="card"><div class="panels three">{"".join(panels)}</div></div>' if any(panels) else ""
    return markup.section("training", title, how, body, notes)


def _stage_records(metrics: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records by stage, in order of first appearance; of an epoch run twice (a resume) the last one."""
    stages: dict[str, dict[float, Mapping[str, Any]]] = {}
    for record in metrics:
        epochs = stages.setdefault(str(record.get("stage", "unnamed")), {})
        epoch = number(record.get("epoch"))
        epochs[len(epochs) if math.isnan(epoch) else epoch] = record
    return {name: [epochs[epoch] for epoch in sorted(epochs)] for name, epochs in stages.items()}


def _stage_notes(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes, planned = [], number(rows[-1].get("epochs"))
    if planned > len(rows):
        notes.append(f"Stage “{name}” has {len(rows)} of {counted(round(planned), 'epoch')}.")
    for key in ("train_loss", "test_loss", "test_top1"):
        missing = sum(math.isnan(number(row.get(key))) for row in rows)
        if missing:
            notes.append(
                f"Stage “{name}”: {key} is missing or not finite in {missing} of "
                f"{counted(len(rows), 'epoch')}."
            )
    return notes


def _any_finite(key: str, rows: Iterable[Mapping[str, Any]]) -> bool:
    return any(not math.isnan(number(row.get(key))) for row in rows)


def _curves(
    key: str, records: Mapping[str, Sequence[Mapping[str, Any]]], stages: Iterable[Stage]
) -> list[Curve]:
    """One curve of a metric for each stage that has a finite value of it."""
    role = {"train_loss": "muted", "test_top1": "accent"}.get(key, "ink")
    return [
        Curve(
            [stage.start + i + 1 for i in range(len(records[stage.name]))],
            [number(row.get(key)) for row in records[stage.name]],
            role,
        )
        for stage in stages
        if _any_finite(key, records[stage.name])
    ]


def _after_cut(
    records: Mapping[str, Sequence], stages: Iterable[Stage], results: Mapping[str, Any]
) -> list[Curve]:
    """The curve from accuracy right after the cut to the first epoch of fine-tuning, where both are known."""
    before = number(find_row(results, BEFORE).get("top1"))
    stage = next((stage for stage in stages if stage.name == "finetune"), None)
    first = number(records["finetune"][0].get("test_top1")) if stage else math.nan
    if stage is None or math.isnan(before + first):
        return []
    return [Curve([stage.start, stage.start + 1], [before, first], "accent")]


def _panel(
    title: str,
    curves: Mapping[str, Sequence[Curve]],
    stages: Sequence[Stage],
    results: Mapping[str, Any] | None = None,
) -> str:
    """One panel, `curves` by legend entry; with the dense accuracy as a level if `results` are given."""
    drawn = [curve for group in curves.values() for curve in group]
    if not drawn:
        return ""
    level = number(find_row(results or {}, DENSE).get("top1"))
    reference = None if math.isnan(level) else (f"dense {level:.2f}", level)
    label = f"{title} per epoch, in the stages {', '.join(stage.name for stage in stages)}"
    keys = "".join(
        f'<span class="key" style="--key:var(--{group[0].role})">{name}</span>'
        for name, group in curves.items()
        if name and group
    )
    return markup.figure(figures.training_panel(drawn, stages, label, reference), f"<b>{title}</b>{keys}")


def reslice(results: Mapping[str, Any]) -> str:
    """Accuracy over cost of the sparse model cut at several rates."""
    title, notes = "How far can it be cut?", []
    found = [
        tuple(number(entry.get(key)) for key in ("rate", "macs", "top1"))
        for entry in entries(results, "reslice")
    ]
    points = [point for point in found if not math.isnan(sum(point)) and point[1] > 0]
    if not points:
        notes.append(
            "The sparse model was not cut at other rates: results.json has no “reslice” with numbers."
        )
        return markup.section("reslice", title, "", "", notes)
    if len(points) < len(found):
        notes.append(
            f"{len(found) - len(points)} of {len(found)} rates have no finite result and are not shown."
        )
    marks = {
        "dense": _mark(results, DENSE, "dense", "ink"),
        "before": _mark(results, BEFORE, "right after the cut", "muted"),
        "after": _mark(results, AFTER, "fine-tuned", "accent"),
    }
    full = number(find_row(results, DENSE).get("macs"))
    if not full > 0:
        notes.append("The MACs of the dense model are not known: percentages are of the largest model shown.")
        full = max([*(mark.macs for mark in marks.values() if mark), *(macs for _, macs, _ in points)])
    caption = "Top-1 (%) over MACs, before any fine-tuning"
    label = f"{caption}: " + ", ".join(f"{top1:.2f} at rate {percent(rate)}" for rate, _, top1 in points)
    svg = figures.accuracy_cost(points, **marks, full_macs=full, label=label)
    rows = [
        (percent(rate), f"{magnitude(macs)} ({percent(macs / full)})", f"{top1:.2f}")
        for rate, macs, top1 in points
    ]
    table = markup.table(("rate", "MACs", "top-1"), rows, caption)
    how = (
        "The one sparse-trained model, cut at several rates with no training in between. The grey line is "
        "before any fine-tuning; its labels are the share of dimensions removed. The arrow is what "
        "fine-tuning changed at the rate of this run."
    )
    body = f'<div class="card panels wide">{markup.figure(svg, f"<b>{caption}</b>")}{table}</div>'
    return markup.section("reslice", title, how, body, notes)


def pareto(results: Mapping[str, Any]) -> str:
    """The front that the calibration predicts: change of the output over cost."""
    title, found = "How far can it be cut?", results.get("pareto")
    if not isinstance(found, Mapping):
        return markup.section("pareto", title, "", "", ["results.json has no “pareto”: no front is known."])

    def figures_of(entry: Any) -> tuple[float, float]:
        own = entry if isinstance(entry, Mapping) else {}
        return number(own.get("macs")), number(own.get("change"))

    full = number(find_row(results, DENSE).get("macs"))
    points = sorted(point for point in map(figures_of, entries(found, "points")) if point[0] > 0 < point[1])
    if not points:
        return markup.section("pareto", title, "", "", ["The front has no point with numbers."])
    full = full if full > 0 else points[-1][0]
    chosen = figures_of(found.get("chosen"))
    mark = chosen if chosen[0] > 0 < chosen[1] else None
    unit = str(found.get("change", ""))
    caption = f"Predicted change of the output ({unit}) over MACs"
    label = f"{caption}: " + ", ".join(f"{change:.2g} at {magnitude(macs)}" for macs, change in points)
    svg = figures.pareto_front(points, mark, full_macs=full, ylabel=unit, label=label)
    named = sorted([(*point, "") for point in points] + ([(*mark, "this run")] if mark else []))
    rows = [
        (f"{magnitude(macs)} ({percent(macs / full)})" + (f", {name}" if name else ""), f"{change:.2g}")
        for macs, change, name in named
    ]
    final = next((row[0] for row, point in zip(rows, named, strict=True) if point[2]), None)
    table = markup.table(("MACs", "change"), rows, caption, final=final)
    how = (
        "From the one calibration, the best widths for every budget. The change is the sum of what each cut "
        "alone was measured to do to the output of the dense model; the refit then mends a part of it. Where "
        "the line gets steep, a cut gets expensive."
    )
    body = f'<div class="card panels wide">{markup.figure(svg, f"<b>{escape(caption)}</b>")}{table}</div>'
    notes = [] if mark else ["This run's model is not marked: its widths were not chosen by this measure."]
    return markup.section("pareto", title, how, body, notes)


def _mark(results: Mapping[str, Any], model: str, label: str, role: str) -> Mark | None:
    row = find_row(results, model)
    macs, top1 = number(row.get("macs")), number(row.get("top1"))
    return Mark(label, macs, top1, role) if macs > 0 and not math.isnan(top1) else None


# ------------------------------------------------------------------------------- configuration, the page


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value, value))
    return NOTHING if value is None else str(value)


def setup(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Configuration (single options; options of the stages side by side) and environment."""
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    stages = {key: group for key, group in groups.items() if key in _STAGES or _has_sibling(key, groups)}
    single = {key: value for key, value in config.items() if key not in stages}
    machine = environment(results)
    notes, cards = [], []
    if single:
        cards.append(_options("Run", single))
    if stages:
        options = dict.fromkeys(key for group in stages.values() for key in group)
        rows = [(key, *(_value(group.get(key, "")) for group in stages.values())) for key in options]
        cards.append("<h3>Stages</h3>" + markup.table(("option", *stages), rows, "Options by stage"))
    if machine:
        cards.append(_options("Environment", machine))
    if not config:
        notes.append("No configuration (config.json) in the run folder.")
    if not machine:
        notes.append("results.json does not say on what machine, with what versions, this was measured.")
    body = "".join(f'<div class="card">{card}</div>' for card in cards)
    return markup.section("setup", "Configuration and environment", "", body, notes)


def _has_sibling(name: str, groups: Mapping[str, Mapping]) -> bool:
    """Whether another group has at least half of this one's options, as the stages of a run do."""
    own = groups[name].keys()
    return any(
        2 * len(own & group.keys()) >= max(len(own), 1) for key, group in groups.items() if key != name
    )


def _options(title: str, options: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{escape(str(key))}</dt><dd>{escape(_value(item))}</dd></div>"
        for key, item in options.items()
    )
    return f'<h3>{escape(title)}</h3><dl class="options">{items}</dl>'
