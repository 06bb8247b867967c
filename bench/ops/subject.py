"""What the operands of a case are, and what has to come out of them: nothing is timed that computes
something else."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.ops.shapes import DEVICE, Case
from vtp.comparison.comparison import CEILINGS, FACTOR, TINY, relative_error
from vtp.comparison.runtimes import DTYPES, Run


def mode(case: Case) -> contextlib.AbstractContextManager:
    """What a case runs in."""
    return torch.enable_grad() if case.backward else torch.inference_mode()


def results(run: Run, operands: dict[str, Any], dy: Tensor | None) -> dict[str, Tensor | None]:
    """The output of `run`, and, if there is dy, the gradients of all operands that need one, by name."""
    out = run()
    if dy is None:
        return {"output": out}
    leaves = {f"d{name}": t for name, t in operands.items() if isinstance(t, Tensor) and t.requires_grad}
    gradients = torch.autograd.grad(out, leaves.values(), dy, allow_unused=True)  # a gate, without gates
    return {"output": out, **dict(zip(leaves, gradients, strict=True))}


class Subject:
    """The operands of a case, in its dtype on its device, and what has to come out of them."""

    def __init__(
        self, case: Case, operands: Callable[[Case], dict[str, Any]], reference: Callable[..., Tensor]
    ) -> None:
        torch.manual_seed(0)
        given, self.backward = operands(case), case.backward
        self.operands = self._converted(given, DTYPES[case.dtype])
        exact = self._converted(self.operands, torch.float64)
        with mode(case):
            with FlopCounterMode(display=False) as counter:
                out = reference(**exact)
                self.dy = torch.randn(out.shape).to(DEVICE, DTYPES[case.dtype]) if case.backward else None
                dy = None if self.dy is None else self.dy.double()
                self.exact = results(lambda: out, exact, dy)
            plain = results(lambda: reference(**self.operands), self.operands, self.dy)
        self.macs = counter.get_total_flops() // 2
        self.bounds = {
            name: min(CEILINGS[case.dtype], FACTOR * relative_error(plain[name], t) + TINY[case.dtype])
            for name, t in self.exact.items()
            if t is not None
        }

    def _converted(self, operands: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """A copy of each tensor, those of floating point in `dtype`."""
        converted = dict(operands)
        for name, value in operands.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                converted[name] = value.detach().to(DEVICE, dtype, copy=True).requires_grad_(self.backward)
            elif isinstance(value, Tensor):
                converted[name] = value.to(DEVICE)
        return converted

    def errors(self, got: dict[str, Tensor | None]) -> dict[str, float]:
        """Relative error of the output and of each gradient."""
        return {name: relative_error(got[name], self.exact[name]) for name in self.bounds}
