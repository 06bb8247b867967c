"""compact_linear at the four linears of a block, each with the epilogue that it has there.

One with padding has its inputs padded already, as the layer before would leave them, and keeps it in the
result: what is timed is a model whose widths were rounded up.
"""

from functools import partial
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
from vtp_kernels import compact_linear
from vtp_kernels.compact_linear import compact_linear_ref
from vtp_kernels.library import cpp_unsupported_reason
from vtp_kernels.rows import in_padded_rows

SITES = ("qkv", "proj", "fc1", "fc2")
BACKWARD = (False,)


def operands(case: Case) -> dict[str, Any]:
    """x [B, N, K], weight [N, K], bias [N]; GELU after fc1, residual [B, N, N] after proj and fc2."""
    inputs, outputs = case.block.linear(case.site)
    weight, bias = linear_operands(inputs, outputs)
    return {
        "x": case.activations(inputs),
        "weight": weight,
        "bias": bias,
        "activation": "gelu" if case.site == "fc1" else None,
        "residual": case.activations(outputs) if case.site in ("proj", "fc2") else None,
    }


def ours(x: Tensor, weight: Tensor, **epilogue: Any) -> Run:
    """With rows where the ops put them, at 16 bytes."""
    x, weight = in_padded_rows(x), in_padded_rows(weight)
    return lambda: compact_linear(x, weight, **epilogue)


def rounded_up(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, residual: Tensor | None, *, multiple: int
) -> Run:
    x, bias, weight = padded(x, multiple), padded(bias, multiple), padded(weight, multiple, (0, 1))
    residual = None if residual is None else padded(residual, multiple)
    return lambda: compact_linear_ref(x, weight, bias, activation, residual)


def engine(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, residual: Tensor | None) -> Run:
    """The product of the engine; PyTorch adds the epilogue, which the engine has inside."""
    shape = *x.shape[:-1], -1
    rows, linear = activations(x.flatten(0, -2), x.dtype), engine_linear(weight, bias)
    outputs = len(bias)

    def run() -> Tensor:
        out = linear(rows).view(shape)[..., :outputs]
        out = F.gelu(out) if activation == "gelu" else out
        return out if residual is None else out + residual

    return run


def implementations(case: Case) -> dict[str, Implementation]:
    _, outputs = case.block.linear(case.site)
    found = {"ours": Implementation(ours), "F.linear": plain(compact_linear_ref)}
    if DEVICE.type == "cpu" and cpp_unsupported_reason() is None:
        found["product of the CPU engine"] = Implementation(engine)
    if case.widths == "compact":
        for multiple in (16, 64):
            prepare = partial(rounded_up, multiple=multiple)
            found[f"padded to {multiple}"] = Implementation(prepare, kept=lambda out: out[..., :outputs])
    return found


def test_compact_linear(measure, case: Case, implementation: str) -> None:
    measure(case, implementations(case)[implementation], operands, compact_linear_ref)
