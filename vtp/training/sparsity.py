"""What sparse training does to gates (VTP, arXiv 2104.08500): penalty, proximal step, statistics, rates.

Sparse training adds an l1 penalty on the gates g, with weight lambda (`TrainConfig.l1`), in one of two ways:

    subgradient   g.grad += lambda * sign(g)               before the optimizer's step; VTP, arXiv 2104.08500
    proximal      g <- sign(g) * max(|g| - lambda*lr, 0)   after it, lr being that of the gates; the ISTA step
                  (Parikh and Boyd, Proximal Algorithms, 2014, section 4.3), which makes gates exactly zero

The proximal step belongs to a gradient step `g - lr * grad`. AdamW rescales the gradient per element; the
step of the prox stays the plain lr, so that lambda*lr is what a gate loses per update. With the subgradient,
AdamW rescales the penalty together with the task gradient, so lambda counts relative to the size of that.

Taylor statistics: the mean over steps of (g * dL/dg)^2, of the task loss alone (Molchanov et al., arXiv
1906.10771); `make_plan(score="taylor")` ranks by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from vtp.pruning.gates import GatedLinear, accumulate_taylor
from vtp.training.config import TrainConfig


def gated_linears(model: nn.Module) -> list[GatedLinear]:
    """The modules with a gate; their gates must be float32, in which small l1 steps are not rounded away."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, GatedLinear)}
    for name, module in found.items():
        if module.gate.dtype != torch.float32:
            raise ValueError(f"{name}.gate: got {module.gate.dtype}, expected torch.float32")
    return list(found.values())


def gate_param_groups(
    model: nn.Module, gates: list[nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """timm's groups with and without weight decay, and one of the gates: no decay, own learning rate."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    gate_ids = {id(gate) for gate in gates}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in gate_ids]
    if gates:  # lr_scale is how timm's schedulers keep a group's lr a multiple of the others' throughout
        groups.append({"params": gates, "weight_decay": 0.0, "lr_scale": config.gate_lr})
    return groups


@torch.no_grad()
def settle_gates(layers: Sequence[GatedLinear], config: TrainConfig, take_taylor: bool) -> None:
    """Between backward and update: the Taylor statistics from the gradients of the task loss, if asked, and
    then the penalty's own gradient, `l1 sign(g)`.

    All gates at once, as PyTorch's optimizers take their tensors: else the host would launch seven kernels
    for each gate.
    """
    if not layers:
        return
    if take_taylor:
        accumulate_taylor(layers)
    if config.l1 > 0 and config.l1_mode == "subgradient":
        signs = torch._foreach_sign([layer.gate for layer in layers])
        torch._foreach_add_([layer.gate.grad for layer in layers], signs, alpha=config.l1)


def soft_threshold(gates: Iterable[Tensor], amount: float) -> None:
    """Shrink gates in place, g <- sign(g) * max(|g| - amount, 0): the prox of amount * sum |g|."""
    with torch.no_grad():
        for gate in gates:
            gate.copy_(F.softshrink(gate, amount))


@torch.no_grad()
def gate_statistics(gates: Iterable[Tensor], l1: float) -> dict[str, float]:
    """What the metrics say of the gates.

    l1: sum |g|; l1_penalty: lambda times that; gates_mean: mean |g|; gates_zero: share of gates exactly 0;
    gates_below: share below half the mean |g|, a measure of spread that does not depend on how far the
    penalty shrank all gates alike, as the cut looks at nothing but their order.
    """
    size = torch.cat([gate.detach().abs().flatten() for gate in gates]).cpu().double()
    total, mean = size.sum().item(), size.mean().item()
    return {
        "l1": total,
        "l1_penalty": l1 * total,
        "gates_mean": mean,
        "gates_zero": (size == 0).double().mean().item(),
        "gates_below": (size < 0.5 * mean).double().mean().item(),
    }
