"""Parts of a dense block that calibration and refit look at one at a time, and how their layers are run."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import GluMlp
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from vtp.model.architecture import Architecture


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; float32 on a CPU by oneDNN, a tenth faster than MKL on AMD's processors.

    The operator is what `torch.compile` calls there; a PyTorch without it does without.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not (on_cpu and x.numel() and _HAS_ONEDNN):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
def fast_layers(*models: nn.Module) -> Iterator[None]:
    """Within it the linear layers in the blocks of these models run by `linear`."""
    layers = [layer for model in models for layer in model.blocks.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def layer_scales(block: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The factors [embed_dim] behind proj and behind fc2 of a block, dense or compact; None for none."""
    if isinstance(block, EvaBlock):
        return block.gamma_1, block.gamma_2
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """What a branch adds to the residual stream, from what its last layer puts out."""
    return x if gamma is None else x * gamma


def scaled_weight(linear: nn.Linear, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a layer with the LayerScale behind it, float64; a missing bias is 0."""
    weight = linear.weight.double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
    if gamma is None:
        return weight, bias
    return weight * gamma.double()[:, None], bias * gamma.double()


def split_heads(attn: nn.Module, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a dense attention, [images, heads, tokens, head_dim] each, as they are
    multiplied: behind norms, and rotated."""
    query, key, value = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is None:
        return query, key, value
    return _rotated(attn, query, rope), _rotated(attn, key, rope), value


def _rotated(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    prefix, patches = x[..., : attn.num_prefix_tokens, :], x[..., attn.num_prefix_tokens :, :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=-2)


def activated(mlp: nn.Module, given: Tensor) -> Tensor:
    """The hidden dimensions of a dense or compact feed-forward, from what its fc1 puts out; a norm before fc2
    is still to come."""
    if isinstance(mlp, GluMlp) or getattr(mlp, "glu", False):
        gate, value = given.chunk(2, dim=-1)
        return mlp.act(gate) * value
    return mlp.act(given)


def into_fc2(mlp: nn.Module, given: Tensor) -> Tensor:
    """What goes into fc2 of a dense or compact feed-forward, from what its fc1 puts out."""
    return mlp.norm(activated(mlp, given))


def attend(attn: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What goes into proj, [images, tokens, embed_dim]."""
    out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
    return attn.norm(out.transpose(1, 2).flatten(2))


def centred(key: Tensor) -> Tensor:
    """Keys [images, heads, tokens, head_dim] less their mean over tokens, which the softmax does not see."""
    return key - key.mean(-2, keepdim=True)


def hidden_rows(hidden: Tensor, architecture: Architecture) -> Tensor:
    """Rows of a dense fc1 that a cut to these inputs of fc2 needs: those that make them, with SwiGLU one of
    each half, or all of them for a norm before fc2."""
    if architecture.scale_mlp_norm:
        hidden = torch.arange(architecture.mlp_hidden, device=hidden.device)
    return torch.cat([hidden, architecture.mlp_hidden + hidden]) if architecture.glu else hidden


def read_tokens(architecture: Architecture) -> int | None:
    """How many tokens behind the last block, from the first on, the model's output depends on; None for all.

    Without a head, all: who takes features may want those of patches.
    """
    if architecture.global_pool != "token" or not architecture.num_classes:
        return None
    return 1 + int(architecture.distilled)
