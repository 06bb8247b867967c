"""Parts of a dense block that calibration and refit look at one at a time."""

import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn


def scaled_weight(linear: nn.Linear, layer_scale: nn.Module) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a layer with its LayerScale, float64; a missing bias is 0."""
    weight = linear.weight.double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
    if isinstance(layer_scale, LayerScale):
        gamma = layer_scale.gamma.double()
        return weight * gamma[:, None], bias * gamma
    return weight, bias


def split_heads(attn: nn.Module, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a dense attention, [images, heads, tokens, head_dim] each, behind norms."""
    query, key, value = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    return attn.q_norm(query), attn.k_norm(key), value


def attend(attn: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What goes into proj, [images, tokens, embed_dim]."""
    return F.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2).flatten(2)


def centred(key: Tensor) -> Tensor:
    """Keys [images, heads, tokens, head_dim] less their mean over tokens, which the softmax does not see."""
    return key - key.mean(-2, keepdim=True)
