"""compact_mlp: beside two linears with GELU between, as they are and with widths rounded up to 16."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.ops.shapes import (
    DEVICE,
    Case,
    Implementation,
    engine_linear,
    linear_operands,
    padded,
    plain,
)
from vtp.comparison.runtimes import Run
from vtp.runtime.cpu import activations
from vtp_kernels import compact_mlp
from vtp_kernels.compact_mlp import compact_mlp_ref
from vtp_kernels.library import cpp_unsupported_reason
from vtp_kernels.rows import in_padded_rows

SITES = ("mlp",)
BACKWARD = (False,)


def operands(case: Case) -> dict[str, Any]:
    """x [B, N, K], fc1_weight [hidden, K], fc2_weight [D, hidden], their biases, residual [B, N, D]."""
    fc1, fc2 = case.block.linear("fc1"), case.block.linear("fc2")
    found: dict[str, Any] = {"x": case.activations(fc1[0])}
    found["fc1_weight"], found["fc1_bias"] = linear_operands(*fc1)
    found["fc2_weight"], found["fc2_bias"] = linear_operands(*fc2)
    return found | {"residual": case.activations(fc2[1])}


def ours(**operands: Tensor) -> Run:
    """With rows where the ops put them, at 16 bytes."""
    operands = {name: in_padded_rows(t) if t.ndim > 1 else t for name, t in operands.items()}
    return lambda: compact_mlp(**operands)


def to_16(**operands: Tensor) -> dict[str, Tensor]:
    """The inputs and the hidden layer padded to multiples of 16; D is a multiple of 16 in every DeiT."""
    return {n: padded(t, 16, (0, 1) if n.endswith("weight") else (-1,)) for n, t in operands.items()}


def rounded_up(**operands: Tensor) -> Run:
    operands = to_16(**operands)
    return lambda: compact_mlp_ref(**operands)


def engine(**operands: Tensor) -> Run:
    """Two products of the engine; PyTorch does what is between and after, which the engine has inside."""
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual = to_16(**operands).values()
    dtype = x.dtype
    rows = activations(x.flatten(0, -2), dtype)
    fc1, fc2 = engine_linear(fc1_weight, fc1_bias), engine_linear(fc2_weight, fc2_bias)
    return lambda: fc2(activations(F.gelu(fc1(rows)), dtype)).view(residual.shape) + residual


def implementations(case: Case) -> dict[str, Implementation]:
    found = {"ours": Implementation(ours), "F.linear, F.gelu, F.linear": plain(compact_mlp_ref)}
    if DEVICE.type == "cpu" and cpp_unsupported_reason() is None:
        found["products of the CPU engine"] = Implementation(engine)
    if case.widths == "compact":
        found["padded to 16"] = Implementation(rounded_up)
    return found


def test_compact_mlp(measure, case: Case, implementation: str) -> None:
    measure(case, implementations(case)[implementation], operands, compact_mlp_ref)
