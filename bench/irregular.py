"""The models of the benchmarks: cut to widths that are unequal in every layer and head."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

import vtp


def irregular_models(
    name: str, rates: Sequence[float], seed: int = 0, **changes: Any
) -> list[vtp.CompactViT]:
    """timm's model `name`, cut at each of `rates`, to widths that are unequal in every layer and head.

    Args:
        rates: share of dimensions to remove; 0 gives the dense model as a CompactViT.
        changes: arguments for timm.
    """
    torch.manual_seed(seed)
    gated = vtp.insert_gates(timm.create_model(name, **changes))
    with torch.no_grad():
        for layer in vtp.sites(gated).values():
            # A scale for each layer, and for each 64 dimensions, the heads of attention.
            groups = -(-len(layer.gate) // 64)
            scale = torch.empty(()).uniform_(0.8, 1.2) * torch.empty(groups).uniform_(0.7, 1.3)
            layer.gate.uniform_(0, 1).mul_(scale.repeat_interleave(64)[: len(layer.gate)])
    return [vtp.compact(gated, vtp.make_plan(gated, rate=rate, min_keep=0)).eval() for rate in rates]


@torch.no_grad()
def randomize_vectors(model: nn.Module, seed: int = 0) -> None:
    """Noise on biases and norms, which timm starts at 0 and 1: a wrong one would not be seen."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
