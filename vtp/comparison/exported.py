"""`vtp export MODEL`: size and latency of the exported model beside the dense one's, in one runtime."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vtp.comparison.tables import Rows
from vtp.machine import package_version
from vtp.model.cost import abbreviated, count
from vtp.pruning.compact import CompactModel
from vtp.runtime.export.checked import Target
from vtp.timing import interleaved_latency


def runtime_version(target: Target) -> str:
    """The runtime of a target with its version."""
    version = package_version(target.packages[-1] if target.packages else "torch")
    return f"{target.runtime} {version or '(not installed)'}"


def beside_dense(
    small: CompactModel,
    target: Target,
    path: Path,
    export: Callable[..., float],
    images: Tensor,
    *,
    seconds: float,
) -> Rows:
    """A table of the dense and the compact model: MACs, bytes of the file, milliseconds, speed.

    The dense model is that of the plan's architecture, with random weights, as a compact model's file has no
    others.

    Args:
        small: the model that was exported to `path`.
        export: what exported it; takes a model and a path.
        images: [B, C, H, W] in the dtype that the file takes: the batch that is timed.
        seconds: how long the two take turns.

    Raises:
        ExportError: the dense model cannot be exported.
    """
    torch.manual_seed(0)
    dense = small.plan.architecture.build("cpu").eval()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / f"dense{target.suffix}"
        export(dense, other)
        files = {"dense": other, "compact": path}
        sizes = {name: target.size(file) for name, file in files.items()}
        runs = {name: target.load(file) for name, file in files.items()}
        found = interleaved_latency(runs, images, seconds=seconds, min_rounds=5)
    rows: Rows = [["model", "MACs", "file", f"ms, batch {len(images)}", "speed"]]
    for name, model in (("dense", dense), ("compact", small)):
        latency = found[name]
        macs, size = abbreviated(count(model).macs), f"{sizes[name] / 1e6:.2f} MB"
        rows.append([name, macs, size, f"{latency.median_ms:.2f}", f"{latency.speedup:.2f}x"])
    return rows
