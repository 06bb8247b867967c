"""A model whose weights lie in parts on several processes: PyTorch's FSDP2 (`fully_shard`), block by block.

Weights, their gradients and the optimizer's state are sharded along their first dimension; a block's weights
are gathered when it runs and given back after. Gates are replicated: they are small, and what is done to them
(penalty, proximal step, Taylor statistics) asks for all of a gate at once. So is a parameter of no elements.

`fully_shard` is called here and not through Accelerate's plugin, which takes no CPU (it trains with DDP
instead, and does not say so) and takes modules, not parameters, to leave out. So the tests, on CPUs, run the
very code that GPUs run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vtp.training.config import TrainConfig
from vtp.training.sparsity import gated_linears

# Each process would ask its part of a weight which way to go, and wait for others that went another.
NOT_SHARDED = ("sgdp",)


def wants_sharding(config: TrainConfig, processes: int) -> bool:
    """Whether a stage is sharded: one process has nothing to share out.

    Raises:
        ValueError: settings that do not go with sharding, or Accelerate is told to shard by itself.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "ACCELERATE_USE_FSDP: got true, expected it unset, as Accelerate would shard the gates too; "
            "`--fsdp` (TrainConfig.fsdp) shards everything else"
        )
    if not config.fsdp:
        return False
    if config.precision == "fp16":
        raise ValueError("config.precision: got 'fp16' with fsdp, expected 'no' or 'bf16'")
    if config.opt in NOT_SHARDED:
        raise ValueError(f"config.opt: got {config.opt!r} with fsdp, expected an optimizer other than that")
    return processes > 1


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard a model on `device` over all processes, in place; each has the whole of it at first.

    Both its parameters and those of its blocks are given back after each forward pass, so that whoever looks
    at the parameters between two steps (optimizer, moving average, checkpoint) meets the shards.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    gates = {layer.gate for layer in gated_linears(model)}
    whole = gates | {parameter for parameter in model.parameters() if parameter.numel() == 0}
    for module in (*getattr(model, "blocks", ()), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; of one that is sharded a new one. To be called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """`value`, which every process has whole, in shards if `own`, of the same shape, is."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers of a sharded model into one that is not, tensor by tensor."""
    own = target.state_dict()
    for name, value in source.state_dict().items():
        own[name].copy_(whole(value))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of replicated parameters their means over the processes, with one all-reduce."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, which takes no mixture, where some gradients are sharded."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    replicated = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = _square(shards)
    dist.all_reduce(squares)
    norm = (squares + _square(replicated)).sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # as PyTorch's, which asks no device for the norm
    torch._foreach_mul_(shards + replicated, scale)


def _square(gradients: Sequence[Tensor]) -> Tensor:
    """The squared norm of all gradients together, 0-dim."""
    return nn.utils.get_total_norm(gradients).square()
