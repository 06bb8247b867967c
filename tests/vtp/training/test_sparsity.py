"""What sparse training does to gates between the backward pass and the update."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vtp.pruning.gates import GatedLinear
from vtp.training.config import TrainConfig
from vtp.training.sparsity import settle_gates


def with_gradients(count: int) -> list[GatedLinear]:
    """Gated layers of several widths; gates of both signs and 0, with gradients."""
    generator = torch.Generator().manual_seed(count)
    layers = [GatedLinear.from_linear(nn.Linear(3 + i % 2, 2)) for i in range(count)]
    for layer in layers:
        layer.gate.data = torch.randint(-1, 2, layer.gate.shape, generator=generator).float() / 3
        layer.gate.grad = torch.randn(layer.gate.shape, generator=generator)
    return layers


class Counted(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket.__name__ != "detach"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("take_taylor", [False, True])
@pytest.mark.parametrize("settings", [{}, {"l1": 0.0}, {"l1_mode": "proximal"}], ids=str)
def test_statistics_are_of_the_task_and_then_the_penalty_enters_the_gradients(settings, take_taylor):
    config = TrainConfig(**{"l1": 0.25, **settings})
    layers = with_gradients(5)
    before = copy.deepcopy(layers)
    for old, layer in zip(before, layers, strict=True):  # which deepcopy leaves out
        old.gate.grad = layer.gate.grad.clone()
    settle_gates(layers, config, take_taylor)
    for old, layer in zip(before, layers, strict=True):
        task = old.gate.grad
        taken = (old.gate * task).square() if take_taylor else torch.zeros_like(task)
        assert torch.equal(layer.taylor, taken.detach()) and layer.taylor_steps == int(take_taylor)
        penalty = config.l1 if config.l1_mode == "subgradient" else 0.0
        assert torch.equal(layer.gate.grad, task + penalty * old.gate.detach().sign())


def test_a_gate_more_is_no_launch_more():
    calls = []
    for count in (2, 12):
        layers = with_gradients(count)
        with Counted() as counted:
            settle_gates(layers, TrainConfig(l1=0.25), True)
        calls.append(counted.calls)
    assert calls[0] == calls[1] > 0
