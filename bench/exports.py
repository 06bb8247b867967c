"""What each export target makes of each kind of model: whether its outputs are right, and what it fuses.

    python -m bench.exports               # tables and JSON
    python -m bench.exports --markdown    # those of docs/export.md, from a run's file

timm's models with random weights, two blocks deep, as they are and cut to widths that are unequal in every
layer and head. Each is exported, which checks its outputs against float64 in the target's own runtime; then
the nodes of the graph that the runtime really runs are counted. Nothing is timed.
"""

import argparse
import collections
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.irregular import cut, gated_model
from bench.results_file import markdown_table, run_or_print
from vtp.comparison.exported import runtime_version
from vtp.comparison.tables import Rows
from vtp.machine import environment
from vtp.pruning.compact import CompactViT
from vtp.runtime.export import TARGETS, ExportError

OUT = Path(__file__).parent / "results" / "exports.json"
RATE, DEPTH = 0.4, 2
# One of each kind that is exported in a way of its own, with arguments for timm.
MODELS: dict[str, dict[str, Any]] = {
    "deit_small_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98, "num_classes": 0},
    "vit_base_patch16_clip_quickgelu_224": {},
}
# Of the nodes of a runtime's graph those that say whether attention, GELU and norms are fused.
_NODES = {
    "onnx": (
        "Attention",
        "Softmax",
        "BiasGelu",
        "QuickGelu",
        "LayerNormalization",
        "SkipLayerNormalization",
    ),
    "openvino": ("Subgraph", "Softmax", "MVN"),
}


def models() -> dict[str, nn.Module]:
    """By title: each of `MODELS` dense and cut, and one whose queries and keys are narrowed too."""
    found: dict[str, nn.Module] = {}
    for name, arguments in MODELS.items():
        gated = gated_model(name, depth=DEPTH, **arguments)
        small = cut(gated, RATE)
        found[f"{name}, dense"] = small.plan.architecture.build("cpu").eval()
        found[f"{name}, cut"] = small
        if len(found) == 2:  # of the first alone
            found[f"{name}, cut, keys narrowed"] = _narrowed(small)
    return found


def _narrowed(small: CompactViT) -> CompactViT:
    """One of the same plan with keys of unequal widths, and random weights."""
    plan, full = small.plan, small.plan.head_dim
    heads = range(plan.architecture.num_heads)
    keys = {
        f"blocks.{i}.attn": tuple(full // 2 + (7 * head + i) % (full // 2) for head in heads)
        for i in range(DEPTH)
    }
    torch.manual_seed(0)
    return CompactViT(dataclasses.replace(plan, keys=keys)).eval()


def nodes_in_onnx_runtime(file: Path) -> collections.Counter[str]:
    """Kinds of nodes of the graph that ONNX Runtime runs, after its optimizations."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return collections.Counter(node.op_type for node in graph.node)


def nodes_in_openvino(file: Path) -> collections.Counter[str]:
    """Kinds of nodes of the graph that OpenVINO runs in float32; fused attention is a Subgraph."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    graph = openvino.Core().compile_model(file, "CPU", settings).get_runtime_model()
    return collections.Counter(node.get_rt_info()["layerType"].astype(str) for node in graph.get_ops())


_COUNT = {"onnx": nodes_in_onnx_runtime, "openvino": nodes_in_openvino}


def record(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Of each target the error or the reason that there is none, and the counts of nodes."""
    found: dict[str, Any] = {}
    for name, (target, export) in TARGETS.items():
        try:
            file = folder / f"model{target.suffix}"
            found[name] = {"error": export(model, file)}
            if name in _COUNT:
                counted = _COUNT[name](file)
                found[name]["nodes"] = {kind: counted[kind] for kind in _NODES[name]}
        except (ExportError, ModuleNotFoundError) as error:
            found[name] = {"reason": str(error)}
    return found


def tables(content: dict[str, Any]) -> dict[str, Rows]:
    """By title: errors of all targets, and nodes in ONNX Runtime and OpenVINO."""
    records = content["models"]
    errors: Rows = [["model", *content["runtimes"].values()]]
    nodes: Rows = [["model", *(content["runtimes"][name] for name in _NODES)]]
    for title, found in records.items():
        errors.append([title, *(_cell(found[name]) for name in content["runtimes"])])
        counts = [found[name].get("nodes", {}) for name in _NODES]
        # That no softmax is left is worth saying; of other kinds those that there are.
        shown = ([f"{n} {kind}" for kind, n in each.items() if n or kind == "Softmax"] for each in counts)
        nodes.append([title, *map(", ".join, shown)])
    return {"Relative error of the outputs against float64": errors, "Nodes of the graph that runs": nodes}


def _cell(found: dict[str, Any]) -> str:
    return f"{found['error']:.0e}" if "error" in found else f"refused: {found['reason']}"


def markdown(content: dict[str, Any]) -> str:
    """The tables of docs/export.md."""
    return "\n".join(map(markdown_table, tables(content).values()))


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Errors, or reasons, and counts of nodes of all models and targets."""
    content: dict[str, Any] = {
        "rate": RATE,
        "depth": DEPTH,
        "environment": environment(),
        "runtimes": {name: runtime_version(target) for name, (target, _) in TARGETS.items()},
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for title, model in models().items():
            console.print(title, highlight=False)
            content["models"][title] = record(model, Path(folder))
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where the results file cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__.splitlines()[0])
    return run_or_print(parser, argv, OUT, measure=measure, tables=tables, markdown=markdown)


if __name__ == "__main__":
    sys.exit(main())
