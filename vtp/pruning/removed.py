"""What an earlier cut has removed from a dense model that `vtp.expand` made of a compact one: its zeros."""

import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def removed_before(model: nn.Module) -> dict[str, np.ndarray]:
    """What an earlier cut has removed from a dense or gated model, which `expand` made.

    Returns:
        By site a mask over its gates, bool [width]: the dimension is zero where it is made and where it is
        read. By attention (`blocks.<i>.attn`) the width that the queries and keys of each head have left,
        int64 [heads]: rows behind it are zero.
    """
    found: dict[str, np.ndarray] = {}
    rotary = getattr(model, "rope", None) is not None
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        made = _zero_rows(attn.qkv).unflatten(0, (3, -1))
        alive = ~(made[0] & made[1]).unflatten(0, (attn.num_heads, -1))
        if rotary or not isinstance(attn.q_norm, nn.Identity):  # they keep their width
            alive = torch.ones_like(alive)
        places = torch.arange(1, attn.head_dim + 1, device=alive.device)
        found[f"blocks.{i}.attn"] = (alive * places).amax(1).clamp_min(1).cpu().numpy()
        gone = {
            "attn.qkv": _zero_norm(block.norm1) & _zero_columns(attn.qkv),
            "attn.proj": _not_made(attn.norm, made[2]) & _zero_columns(attn.proj),
            "mlp.fc1": _zero_norm(block.norm2) & _zero_columns(mlp.fc1),
            # With SwiGLU it is made by a row of each half.
            "mlp.fc2": _not_made(mlp.norm, _zero_rows(mlp.fc1).unflatten(0, (-1, mlp.fc2.in_features)).all(0))
            & _zero_columns(mlp.fc2),
        }
        found |= {f"blocks.{i}.{site}": mask.cpu().numpy() for site, mask in gone.items()}
    return found


def _not_made(norm: nn.Module, zero: Tensor) -> Tensor:
    """Which inputs of a layer are 0 whatever comes: by the norm before it, or by what makes them."""
    return zero if isinstance(norm, nn.Identity) else _zero_norm(norm)


def _zero_rows(linear: nn.Module) -> Tensor:
    zero = ~linear.weight.any(1)
    return zero if linear.bias is None else zero & (linear.bias == 0)


def _zero_columns(linear: nn.Module) -> Tensor:
    return ~linear.weight.any(0)


def _zero_norm(norm: nn.Module) -> Tensor:
    return (norm.weight == 0) & (norm.bias == 0)
