"""gated_linear, as it is trained: beside the gate on the activation, and beside no gate at all."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.shapes import Case, Implementation, linear_operands, plain
from vtp_kernels import gated_linear
from vtp_kernels.gated_linear import gated_linear_ref

SITES = ("qkv", "fc2")  # the most outputs for an input, and the fewest
BACKWARD = (False, True)


def operands(case: Case) -> dict[str, Any]:
    """x [B, N, K], weight [N, K], gate [K], bias [N]."""
    inputs, outputs = case.block.linear(case.site)
    weight, bias = linear_operands(inputs, outputs)
    return {"x": case.activations(inputs), "weight": weight, "gate": 0.5 + torch.rand(inputs), "bias": bias}


def ungated(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """The plain linear: what a gate costs shows beside it."""
    return F.linear(x, weight, bias)


def implementations(case: Case) -> dict[str, Implementation]:
    return {
        "ours": plain(gated_linear),
        "F.linear(x * gate)": plain(gated_linear_ref),
        "F.linear(x)": Implementation(plain(ungated).prepare, reference=ungated),
    }


def test_gated_linear(measure, case: Case, implementation: str) -> None:
    measure(case, implementations(case)[implementation], operands, gated_linear_ref)
