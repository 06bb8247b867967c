"""The page as a whole, and the run folder it is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from vtp import checkpoint
from vtp.files import FileError, write_atomic
from vtp.pruning.gates import sites
from vtp.pruning.plan import PruningPlan
from vtp.report.numbers import headline, is_one_shot

_SPARSE_TRAINING = "Zhu, Tang, Han, “Vision Transformer Pruning”, arXiv 2104.08500"
_ONE_SHOT = (
    "calibration, widths by dynamic programming and a closed-form refit, cf. Frantar and Alistarh, “Optimal "
    "Brain Compression”, NeurIPS 2022, and Kurtic, Frantar, Alistarh, “ZipLM”, NeurIPS 2023"
)


def render_report(
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    gates: Mapping[str, np.ndarray],
    plan: Any,
    results: Mapping[str, Any],
) -> str:
    """The page as a string; needs no file, and gives the same bytes for the same arguments.

    Args:
        config: the run's configuration; dicts in it are shown side by side as stages.
        metrics: one dict for each epoch, as in metrics.jsonl.
        gates: gate values by site name (`blocks.<i>.<site>`), float `[K]`; empty if there are none.
        plan: a `PruningPlan`, or anything with its fields; None if there is none.
        results: `rows`, `reslice` (of a one-shot run `pareto`) and `environment` as in results.json; each may
            be missing.

    Raises:
        ValueError: the plan does not belong to the gates.
    """
    from vtp.report import figures, sections  # for which matplotlib is imported; few commands write a page

    one_shot = is_one_shot(config)
    parts = (
        sections.header(config, results, plan),
        sections.comparison(results, one_shot),
        *([] if one_shot else [sections.gates(gates, plan)]),
        sections.widths(plan),
        sections.pareto(results) if one_shot else sections.reslice(results),
        sections.training(metrics, results, one_shot),
        sections.setup(config, results),
    )
    template = Template((resources.files("vtp.report") / "page.html.template").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(headline(results, plan)[0]),
        light=figures.css_variables(0),
        dark=figures.css_variables(1),
        body="\n".join(parts),
        method=_ONE_SHOT if one_shot else _SPARSE_TRAINING,
    )


# ------------------------------------------------------------------------------------------------ files


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; empty lines are skipped. Raises FileError naming file and line."""
    records = []
    for line_number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            records.append(_parse_object(line, f"{path}, line {line_number}"))
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as text: {error}") from error


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{where}: not JSON ({error}): got {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise FileError(f"{where}: got {type(value).__name__}, expected a JSON object")
    return value


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files of the run; what is not there is noted on the page.

    Raises:
        FileError: a file is malformed (it is named, with the line), or the page cannot be written.
        FileNotFoundError: `run_dir` holds no run.
    """
    run_dir = Path(run_dir)
    files = {
        name: run_dir / name
        for name in ("config.json", "metrics.jsonl", "plan.json", "results.json", "sparse.safetensors")
    }
    there = {name for name, path in files.items() if path.is_file()}
    if not there:
        raise FileNotFoundError(
            f"run_dir: {run_dir} has none of {', '.join(files)}; expected the folder of a run"
        )

    def read_object(name: str) -> dict[str, Any]:
        return _parse_object(_read_text(files[name]), str(files[name])) if name in there else {}

    gates = {}
    if "sparse.safetensors" in there:
        model = checkpoint.load(files["sparse.safetensors"])
        gates = {name: layer.gate.detach().float().cpu().numpy() for name, layer in sites(model).items()}
    page = render_report(
        config=read_object("config.json"),
        metrics=read_metrics(files["metrics.jsonl"]) if "metrics.jsonl" in there else [],
        gates=gates,
        plan=PruningPlan.load(files["plan.json"]) if "plan.json" in there else None,
        results=read_object("results.json"),
    )
    report = run_dir / "report.html"
    write_atomic(report, lambda path: path.write_text(page, encoding="utf-8"))
    return report
