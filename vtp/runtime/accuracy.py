"""How far a runtime's outputs may be from those of the model in float64."""

import math

from torch import Tensor

# Largest relative error (norm of the difference over norm) of any runtime, by the dtype that it computes in:
# a hundred float32 roundings, ten of those of a half precision.
CEILINGS = {"float64": 1e-12, "float32": 1e-5, "float16": 6e-3, "bfloat16": 5e-2}


def relative_error(got: Tensor | None, right: Tensor) -> float:
    """Norm of the difference over the norm of `right`; infinite where `got` is missing or does not fit."""
    if got is None or got.shape != right.shape:
        return math.inf
    difference, size = (got.double() - right.double()).norm().item(), right.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf
