"""The plots of report.html: matplotlib figures as inline SVG that follow the page's light and dark colours.

A figure is drawn with the light colours of `PALETTE`; on the way out every such colour becomes the CSS
variable of its role (`#2f6db3` -> `var(--qkv)`), so one SVG serves both colour schemes and print. Text stays
text, in the page's font. One unit of the view box is one CSS pixel at natural size. The output is a function
of the arguments alone: no date, no random ids.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from vtp.report.numbers import percent

# role: (light, dark). Cool colours for attention, warm ones for the MLP; one accent for what matters most.
PALETTE = {
    "ink": ("#1d2433", "#e6e9ef"),
    "muted": ("#5f697b", "#9aa4b5"),
    "line": ("#dadee6", "#343b48"),
    "removed": ("#b4bcc9", "#596375"),
    "page": ("#f5f6f8", "#0f1217"),
    "card": ("#fefefe", "#181c23"),
    "accent": ("#cf4128", "#ff7d60"),
    "qkv": ("#2f6db3", "#6ba6e8"),
    "proj": ("#1f8a82", "#4cc0b4"),
    "fc1": ("#bd820d", "#e2ae48"),
    "fc2": ("#8450a6", "#bf92e0"),
}
SITE_ROLES = {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
LIGHT = {role: colors[0] for role, colors in PALETTE.items()}
_ROLES = {color: role for role, color in LIGHT.items()}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # stage names come from files: a "$" in one is not mathematics
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_BINS = 48
_ABOVE_RIDGES = 3


@dataclass(frozen=True)
class Ridge:
    """The gates of one site of one block: |g| `[K]` and which are kept, bool `[K]` (None: not known)."""

    block: int
    magnitude: np.ndarray
    kept: np.ndarray | None


@dataclass(frozen=True)
class Curve:
    """One line of a training panel: `x` in epochs since the start of the run; a NaN in `y` leaves a gap."""

    x: Sequence[float]
    y: Sequence[float]
    role: str


@dataclass(frozen=True)
class Stage:
    """A stage's name and the epochs (counted over the whole run) between which it ran."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """A model in the accuracy-cost plot: MACs of one image, top-1 in percent."""

    label: str
    macs: float
    top1: float
    role: str


def css_variables(theme: int) -> str:
    """`--role: colour;` declarations of the light (0) or dark (1) colour scheme."""
    return " ".join(f"--{role}: {colors[theme]};" for role, colors in PALETTE.items())


def magnitude_bins(magnitudes: Sequence[np.ndarray], threshold: float | None) -> np.ndarray:
    """Edges `[bins + 1]` of the |g| axis that all panels share, with the threshold, if any, on an edge.

    All but the outermost 0.1% of the gates lie within.
    """
    values = np.concatenate([np.empty(0), *magnitudes])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (0.001, 0.999)) if values.size else (0.0, 1.0)
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    margin = max(0.04 * (high - low), 0.02 * max(high, 1e-3))
    low, high = max(low - margin, 0.0), high + margin
    if threshold is None:
        return np.linspace(low, high, _BINS + 1)
    width = (high - low) / _BINS
    below, above = math.floor((threshold - low) / width), math.ceil((high - threshold) / width)
    return threshold + width * np.arange(-below, above + 1)


@matplotlib.rc_context(_STYLE)
def gate_ridges(
    site: str, ridges: Sequence[Ridge], edges: np.ndarray, threshold: float | None, label: str
) -> str:
    """One site: a histogram of |g| per block, kept gates in the site's colour, removed ones in grey.

    Bar heights are square roots of counts, scaled to each block's highest bar; what lies outside `edges`
    `[bins + 1]` is counted in the end bins. At the right of each row: the share kept. Returns an `<svg>`.
    """
    rows = len(ridges)
    step = 36 if rows <= 8 else 28 if rows <= 14 else 20
    figure, axes = _figure(270, 46 + step * rows, left=24, right=38, top=26, bottom=20)
    for row, ridge in enumerate(ridges):
        _draw_ridge(axes, ridge, edges, base=-row, color=LIGHT[SITE_ROLES[site]])
    axes.set(xlim=(edges[0], edges[-1]), ylim=(1 - rows - 3 / step, 1.08))
    axes.set_yticks([-row + 0.3 for row in range(rows)], [str(ridge.block) for ridge in ridges])
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["left", "bottom"]].set_visible(False)
    if any(ridge.kept is not None for ridge in ridges):
        _write(axes, "kept", (1, 1), (6, 5), "axes fraction", color=LIGHT["muted"])
    if threshold is not None:
        axes.axvline(threshold, color=LIGHT["accent"], linewidth=1.3, zorder=_ABOVE_RIDGES)
        left = threshold - edges[0] < 0.4 * (edges[-1] - edges[0])
        at, coordinates = (threshold, 1), ("data", "axes fraction")
        text = f"threshold {threshold:.3g}"
        _write(axes, text, at, (0, 5), coordinates, ha="left" if left else "right", color=LIGHT["accent"])
    return _svg(figure, label)


def _draw_ridge(axes: Axes, ridge: Ridge, edges: np.ndarray, base: int, color: str) -> None:
    finite = np.isfinite(ridge.magnitude)
    magnitude = np.clip(ridge.magnitude[finite], edges[0], edges[-1])
    kept = np.ones(magnitude.size, bool) if ridge.kept is None else ridge.kept[finite]
    total, _ = np.histogram(magnitude, edges)
    removed, _ = np.histogram(magnitude[~kept], edges)
    height = 0.96 * np.sqrt(total) / max(math.sqrt(total.max(initial=0)), 1.0)
    grey = height * removed / np.maximum(total, 1)
    axes.axhline(base, color=LIGHT["line"], linewidth=0.8, zorder=1)
    axes.stairs(base + height, edges, baseline=base + grey, fill=True, color=color, linewidth=0, zorder=2)
    if removed.any():
        removed_style = {"color": LIGHT["removed"], "linewidth": 0, "zorder": 2}
        axes.stairs(base + grey, edges, baseline=base, fill=True, **removed_style)
    if ridge.kept is not None and ridge.kept.size:
        at, coordinates = (1, base + 0.3), ("axes fraction", "data")
        _write(axes, percent(float(ridge.kept.mean())), at, (6, 0), coordinates, va="center")


@matplotlib.rc_context(_STYLE)
def training_panel(
    curves: Sequence[Curve], stages: Sequence[Stage], label: str, reference: tuple[str, float] | None = None
) -> str:
    """One quantity over all epochs of the run, the stages separated by hairlines and named on top.

    `reference` is a (name, value) drawn as a dashed level. Returns an `<svg>` element.
    """
    figure, axes = _figure(350, 236, left=40, right=10, top=26, bottom=36)
    for curve in curves:
        dots = "o" if len(curve.x) <= 15 else None
        line = {"color": LIGHT[curve.role], "linewidth": 1.8, "zorder": 3}
        axes.plot(curve.x, curve.y, marker=dots, markersize=3.5, **line)
    axes.margins(y=0.14)
    if reference is not None:
        name, level = reference
        axes.axhline(level, color=LIGHT["muted"], linewidth=1, dashes=(4, 3), zorder=2)
        at, coordinates = (1, level), ("axes fraction", "data")
        _write(axes, name, at, (0, 4), coordinates, ha="right", color=LIGHT["muted"])
    start, end = stages[0].start, stages[-1].end
    axes.set_xlim(start, end + 0.02 * (end - start))
    axes.set_xlabel("epoch")
    _name_stages(axes, stages)
    _light_grid(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _svg(figure, label)


def _name_stages(axes: Axes, stages: Sequence[Stage]) -> None:
    total = stages[-1].end - stages[0].start
    for stage in stages:
        if stage.start > stages[0].start:
            axes.axvline(stage.start, color=LIGHT["line"], linewidth=1, zorder=1)
        room = max(3, int(44 * (stage.end - stage.start) / total))  # letters that fit on 300 units
        name = stage.name if len(stage.name) <= room else stage.name[: room - 1] + "…"
        at, coordinates = ((stage.start + stage.end) / 2, 1), ("data", "axes fraction")
        _write(axes, name, at, (0, 7), coordinates, ha="center", color=LIGHT["muted"])


@matplotlib.rc_context(_STYLE)
def accuracy_cost(
    points: Sequence[tuple[float, float, float]],
    *,
    dense: Mark | None,
    before: Mark | None,
    after: Mark | None,
    full_macs: float,
    label: str,
) -> str:
    """Top-1 [%] over MACs of one sparse model cut at several rates, with the models of the run marked.

    `points` are (rate, MACs, top-1); an arrow leads from `before` to `after` fine-tuning. `full_macs` is 100%
    of the upper axis. Returns an `<svg>` element.
    """
    figure, axes = _figure(540, 370, left=30, right=20, top=44, bottom=42)
    unit, prefix = _unit_of(full_macs)
    marks = [mark for mark in (dense, before, after) if mark is not None]
    points = sorted(points, key=lambda point: point[1])
    x, y = [macs / unit for _, macs, _ in points], [top1 for _, _, top1 in points]
    axes.plot(x, y, "o-", color=LIGHT["muted"], linewidth=1.6, markersize=4.5, zorder=3)
    for mark in marks:
        rim = {"markeredgecolor": LIGHT["card"], "markeredgewidth": 1.5}
        axes.plot(mark.macs / unit, mark.top1, "o", color=LIGHT[mark.role], markersize=9, zorder=5, **rim)
    if before and after:
        style = {"arrowstyle": "->", "color": LIGHT["accent"], "linewidth": 1.5, "shrinkA": 5, "shrinkB": 5}
        start, end = ((mark.macs / unit, mark.top1) for mark in (before, after))
        axes.annotate("", end, start, arrowprops=style, zorder=4)
    axes.set_xlim(0, 1.06 * max(full_macs, *(unit * v for v in x), *(mark.macs for mark in marks)) / unit)
    axes.margins(y=0.12)
    axes.autoscale_view()  # the limits must be final where labels are placed in pixels
    _macs_axis(axes, full_macs, unit, prefix)
    _label_points(axes, points, dense, before, after, unit)
    return _svg(figure, label)


@matplotlib.rc_context(_STYLE)
def pareto_front(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    *,
    full_macs: float,
    ylabel: str,
    label: str,
) -> str:
    """Predicted change (logarithmic) over MACs, (MACs, change) in ascending order, the chosen model marked.

    `full_macs` is 100% of the upper axis. Returns an `<svg>` element.
    """
    figure, axes = _figure(540, 330, left=44, right=20, top=44, bottom=42)
    unit, prefix = _unit_of(full_macs)
    x, y = [macs / unit for macs, _ in points], [change for _, change in points]
    axes.plot(x, y, "o-", color=LIGHT["muted"], linewidth=1.6, markersize=4.5, zorder=3)
    axes.set_yscale("log")
    if chosen is not None:
        rim = {"markeredgecolor": LIGHT["card"], "markeredgewidth": 1.5}
        axes.plot(chosen[0] / unit, chosen[1], "o", color=LIGHT["accent"], markersize=9, zorder=5, **rim)
        at = (chosen[0] / unit, chosen[1])
        style = {"color": LIGHT["accent"], "fontweight": "bold", "zorder": 6}
        _write(axes, "this run", at, (9, 7), "data", **style)
    axes.set_xlim(0, 1.06 * max(full_macs / unit, *x))
    axes.margins(y=0.12)
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _macs_axis(axes, full_macs, unit, prefix)
    return _svg(figure, label)


def _unit_of(macs: float) -> tuple[float, str]:
    return next(((u, p) for u, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if macs >= u), (1.0, ""))


def _macs_axis(axes: Axes, full_macs: float, unit: float, prefix: str) -> None:
    """MACs below, in this unit, and their share of `full_macs` above."""
    axes.set_xlabel(f"MACs per image ({prefix})" if prefix else "MACs per image")
    _light_grid(axes)
    share = axes.secondary_xaxis(
        "top", functions=(lambda v: v * unit / full_macs, lambda v: v * full_macs / unit)
    )
    share.set_xticks([0.2, 0.4, 0.6, 0.8, 1.0], ["20%", "40%", "60%", "80%", "100% of dense"])
    share.tick_params(length=0)
    share.spines["top"].set_visible(False)


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, float]],
    dense: Mark | None,
    before: Mark | None,
    after: Mark | None,
    unit: float,
) -> None:
    """Name the marks, then write the rates where there is room."""
    curve = [(macs / unit, top1) for _, macs, top1 in points]
    labels = _Labels(axes, curve, [(mark.macs / unit, mark.top1) for mark in (dense, before, after) if mark])
    below = [(9, -14, "left"), (-9, -14, "right"), (9, -28, "left"), (-9, -28, "right")]
    above = [(-9, 10, "right"), (9, 10, "left"), (-9, 24, "right"), (9, 24, "left")]
    for mark, places in (
        (dense, [(4, -18, "right"), (4, 18, "right"), *below, *above]),
        (after, above[:1] + below[:2] + above[1:] + below[2:]),
        (before, below[:2] + above[:2] + below[2:] + above[2:]),
    ):
        if mark:
            text, at = f"{mark.label} {mark.top1:.2f}", (mark.macs / unit, mark.top1)
            labels.add(text, at, places, fontweight="bold", color=LIGHT[mark.role])
    for (rate, _, _), at in zip(points, curve, strict=True):
        labels.add(percent(rate), at, [(-5, 10, "right"), (5, -10, "left")], color=LIGHT["muted"])


class _Labels:
    """Texts in an axes whose limits are final, none of them over the curve, over a mark or over another."""

    def __init__(
        self, axes: Axes, curve: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]]
    ) -> None:
        self.axes = axes
        x, y = axes.transData.transform(curve).T
        along = np.linspace(x[0], x[-1], 200)
        self.taken = [
            (u - 2, v - 2, u + 2, v + 2) for u, v in zip(along, np.interp(along, x, y), strict=True)
        ]
        self.taken += [(u - 6, v - 6, u + 6, v + 6) for u, v in map(axes.transData.transform, marks)]

    def add(
        self,
        text: str,
        at: tuple[float, float],
        places: Sequence[tuple[float, float, str]],
        **style: Any,
    ) -> None:
        """Write `text` at the first free one of `places`, (x, y, alignment) from `at`; omit it if none is."""
        x, y = self.axes.transData.transform(at)
        frame = self.axes.bbox
        for right, up, align in places:
            width = 7.3 * len(text)  # an upper estimate for a sans-serif of 11 units, bold or not
            left = x + right - (width if align == "right" else 0)
            box = (left, y + up - 7, left + width, y + up + 7)
            inside = (
                frame.x0 <= box[0] and box[2] <= frame.x1 + 12 and frame.y0 <= box[1] and box[3] <= frame.y1
            )
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                _write(self.axes, text, at, (right, up), "data", ha=align, va="center", zorder=6, **style)
                return


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _write(axes: Axes, text: str, at: tuple, offset: tuple, coordinates: Any, **style: Any) -> None:
    """Text at `at` in `coordinates` (matplotlib's `xycoords`), moved by `offset` units."""
    axes.annotate(text, at, offset, coordinates, "offset points", **style)


def _figure(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` units with one axes; the margins in units."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    )
    axes.patch.set_visible(False)
    return figure, axes


def _light_grid(axes: Axes) -> None:
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="both", length=0)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg role="img">` in CSS variables, without ids that nothing refers to."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):  # ids are unique in the page as long as labels are
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    opening, body = re.search(r"(<svg[^>]*>)(.*)", buffer.getvalue(), re.DOTALL).groups()
    view_box = re.search(r'viewBox="[^"]*"', opening).group()
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    referenced = set(re.findall(r'["(]#(\w+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in referenced else "", body)
    body = body.replace('xlink:href="#', 'href="#')
    body = re.sub(r'style="[^"]*"', _page_style, body)
    return f'<svg {view_box} role="img" aria-label="{html.escape(label)}">{body.rstrip()}'


def _page_style(style: re.Match[str]) -> str:
    """One style attribute with the page's font, and with CSS variables for the colours of the palette."""
    text = re.sub(r"font-family: [^;\"]*;? ?", "", style.group())
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda m: f"var(--{_ROLES[m.group()]})" if m.group() in _ROLES else m.group(), text
    )
