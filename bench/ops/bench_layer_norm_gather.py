"""layer_norm_gather: beside the norm of all columns, of which the kept ones are selected."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.shapes import Case, Implementation, plain
from vtp.comparison.runtimes import Run
from vtp_kernels import layer_norm_gather
from vtp_kernels.layer_norm_gather import layer_norm_gather_ref

SITES = ("qkv",)
BACKWARD = (False,)


def operands(case: Case) -> dict[str, Any]:
    """x [B, N, D], weight and bias [kept], index [kept], or None where all are kept."""
    D, kept = case.block.embed, case.block.qkv
    index = torch.randperm(D)[:kept].sort().values if kept < D else None
    affine = {"weight": torch.rand(kept) + 0.5, "bias": torch.randn(kept)}
    return {"x": 3 * case.activations(D) + 1, **affine, "index": index, "eps": 1e-6}


def norm_then_select(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, eps: float) -> Run:
    """What timm's norm and an index in front of the linear do."""
    shape = x.shape[-1:]
    if index is None:
        return lambda: F.layer_norm(x, shape, weight, bias, eps)
    weight, bias = (x.new_zeros(shape).index_copy(0, index, t) for t in (weight, bias))
    return lambda: F.layer_norm(x, shape, weight, bias, eps).index_select(-1, index)


def implementations(case: Case) -> dict[str, Implementation]:
    return {
        "ours": plain(layer_norm_gather),
        "plain expression": plain(layer_norm_gather_ref),
        "F.layer_norm" + (", index_select" if case.widths == "compact" else ""): Implementation(
            norm_then_select
        ),
    }


def test_layer_norm_gather(measure, case: Case, implementation: str) -> None:
    measure(case, implementations(case)[implementation], operands, layer_norm_gather_ref)
