"""VTP: prune a vision transformer, and actually run it faster.

gated = vtp.insert_gates(timm.create_model("deit_base_patch16_224", pretrained=True))
...                                     # train with the penalty 1e-4 * vtp.l1_penalty(gated)
plan = vtp.make_plan(gated, rate=0.4)   # or macs=10.0e9, params=48e6, latency_ms=12
small = vtp.compact(gated, plan)        # an ordinary, trainable, smaller model
vtp.save(small, "deit_b_40.safetensors")
fast = vtp.optimize(small, dtype=torch.bfloat16)    # packed weights, fused kernels, inference only
"""

import os
import sys

__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether this is the beginning of `vtp ...`, which pip puts beside Python, or `python -m vtp.cli ...`:
    they have another look at what was typed before they take the seconds that PyTorch needs."""
    program = (sys.argv or [""])[0]
    if program == "-m":  # while Python looks for the module that it is to run
        return ("-m", "vtp.cli") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    beside = os.path.realpath(os.path.dirname(sys.executable))
    folder, name = os.path.split(os.path.realpath(program))
    return name in ("vtp", "vtp.exe") and folder == beside


if not _is_command_line():
    from vtp.checkpoint import load, read_metadata, save
    from vtp.files import FileError
    from vtp.hub import push_to_hub, save_pretrained
    from vtp.hugging_face import from_transformers
    from vtp.model.architecture import Architecture, UnsupportedModelError, describe
    from vtp.model.cost import Cost, count
    from vtp.pruning.calibration import Statistics, calibrate
    from vtp.pruning.compact import CompactEva, CompactViT, compact
    from vtp.pruning.expand import expand
    from vtp.pruning.gates import GatedLinear, insert_gates, l1_penalty, sites
    from vtp.pruning.latency_table import LatencyTable
    from vtp.pruning.plan import PlanError, PruningPlan
    from vtp.pruning.selection import ParetoPoint, make_plan, pareto
    from vtp.pruning.streams import ImagesError
    from vtp.runtime.latency_profile import profile_widths
    from vtp.runtime.optimize import OptimizedViT, optimize

__all__ = [
    "Architecture",
    "CompactEva",
    "CompactViT",
    "Cost",
    "FileError",
    "GatedLinear",
    "ImagesError",
    "LatencyTable",
    "OptimizedViT",
    "ParetoPoint",
    "PlanError",
    "PruningPlan",
    "Statistics",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "compact",
    "count",
    "describe",
    "expand",
    "from_transformers",
    "insert_gates",
    "l1_penalty",
    "load",
    "make_plan",
    "optimize",
    "pareto",
    "profile_widths",
    "push_to_hub",
    "read_metadata",
    "save",
    "save_pretrained",
    "sites",
]
