"""Training in 16 bits on a GPU: every width of a matrix product is a multiple of 8, zeros in what is more.

cuBLAS takes three to five times as long for 16-bit widths that are no multiple of 8, and heads of unequal
widths have no fused attention in PyTorch. So each step forms padded weights from the parameters, in the pass
that casts them; norms put out padded rows, and activations keep their zeros from one product to the next:
biases are padded with zeros too, an activation makes of a zero what meets zero columns of the next weight.
All between the norms is PyTorch's own operators, which the host launches faster than ops in Python.

What is computed is the same, the gradient of the padding goes nowhere, and parameters, their gradients, files
and optimizers know nothing of it. Hooks on a norm, and on the input of a branch, see the zeros.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_kernels import launching
from vtp_kernels.library import autocast_is_on
from vtp_kernels.rows import padded_width

# FLOP/s of an H200 in bfloat16 at the widths of a compact DeiT-B, batch 128, of what is kept or padded:
# `ragged_attention` 12.2 GFLOP in 212 us, fused attention of PyTorch 15.9 in 89, matrix products 46.5 in 101
# (bench/results/gpu-h200.json).
_RAGGED, _FUSED, _PRODUCTS = 5.8e13, 1.8e14, 4.6e14
# What `launching.forced_path` can force.
_HEADS = launching.choice("packed_attention", "ragged", "padded")
_TRAINING = launching.choice("compact_training", "narrow", "padded")


class Sections(NamedTuple):
    """The columns or rows of a weight: sections of these widths side by side, and the width that each is
    filled up to."""

    own: tuple[int, ...]
    padded: tuple[int, ...]


def rounded_up(*own: int) -> Sections:
    """Each section filled up to a multiple of 8."""
    return Sections(own, tuple(map(padded_width, own)))


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of the layer is a product with its weight and nothing else: no other class, no hooks."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is nn.Linear and not any(hooks)


def trains_padded(x: Tensor, *linears: nn.Module) -> bool:
    """Whether a branch that begins and ends with these layers is trained on padded widths: where gradients
    are recorded, the layers are ordinary, and what they multiply has 16 bits."""
    if not torch.is_grad_enabled() or not all(map(is_plain_linear, linears)):
        return False
    fits = linears[-1].out_features % 8 == 0  # the width of the residual stream
    return fits and _TRAINING.takes("padded", _dtype(x, linears[0]).itemsize == 2)


def _dtype(x: Tensor, layer: nn.Linear) -> torch.dtype:
    """What `layer(x)` is computed in."""
    if autocast_is_on(x.device) and x.dtype != torch.float64:  # which autocast leaves
        return torch.get_autocast_dtype(x.device.type)
    return layer.weight.dtype


def heads_are_faster_padded(
    key_widths: Sequence[int], value_widths: Sequence[int], tokens: int, inputs: int, outputs: int
) -> bool:
    """Whether PyTorch's fused attention of heads filled up to the widest takes less time on a GPU,
    in 16 bits, than `ragged_attention`; with what it costs the products before and behind it.

    Args:
        tokens: of an image.
        inputs: of the product before it.
        outputs: of the product behind it.
    """
    columns = len(key_widths) * padded_width(max(*key_widths, *value_widths))
    more_values = columns - sum(value_widths)
    more_products = (2 * (columns - sum(key_widths)) + more_values) * inputs + more_values * outputs
    ragged = 2 * tokens * (sum(key_widths) + sum(value_widths)) / _RAGGED
    padded = 4 * tokens * columns / _FUSED + 2 * more_products / _PRODUCTS
    return _HEADS.takes("padded", padded < ragged)


def filled_up(widths: tuple[int, ...]) -> tuple[int, ...]:
    """The widths with the least of them so much larger that all together are a multiple of 8."""
    least = min(range(len(widths)), key=widths.__getitem__)
    return (*widths[:least], widths[least] + -sum(widths) % 8, *widths[least + 1 :])


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float,
) -> Tensor:
    """PyTorch's fused attention of heads of one width: [B, N, heads * width] each, and what it returns."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, None if is_causal else attn_mask, dropout, is_causal=is_causal, scale=scale
    )
    return out.transpose(1, 2).flatten(2)


def padded_linear(x: Tensor, layer: nn.Linear, inputs: Sections, outputs: Sections) -> Tensor:
    """`layer` on padded widths: x [..., sum(inputs.padded)], or as `layer` itself takes it, to
    [..., sum(outputs.padded)], with zeros in what is more. Either has one section."""
    missing = sum(inputs.padded) - x.shape[-1]
    if missing:
        x = F.pad(x, (0, missing))
    dtype = _dtype(x, layer)
    weight = _among_zeros(layer.weight, dtype, outputs, inputs)
    bias = None if layer.bias is None else _among_zeros(layer.bias, dtype, outputs)
    return F.linear(x, weight, bias)


def _among_zeros(parameter: Tensor, dtype: torch.dtype, *sections: Sections) -> Tensor:
    """The parameter in `dtype`, with zeros; sections: of each of its dimensions."""
    shape = tuple(sum(of.padded) for of in sections)
    if shape == parameter.shape:
        return parameter.to(dtype)
    dim = next((dim for dim, of in enumerate(sections) if len(of.own) > 1), None)
    places = None if dim is None else _places(sections[dim], parameter.device)
    if not torch.compiler.is_compiling():
        return _AmongZeros.apply(parameter, dtype, shape, dim, places)
    # A compiler makes one pass of these too; torch 2.11 loses gradients of a compiled Function that writes.
    missing = [0 if i == dim else shape[i] - own for i, own in enumerate(parameter.shape)]
    padded = F.pad(parameter.to(dtype), [n for m in reversed(missing) for n in (0, m)])
    return padded if dim is None else padded.new_zeros(shape).index_copy(dim, places, padded)


_MOST_PLACES = 1024  # of two for each attention: 10 MB at the widths of a DeiT-B
_known_places: dict[tuple[Sections, torch.device], Tensor] = {}


def _places(sections: Sections, device: torch.device) -> Tensor:
    """Where each column stands when its section is filled up, int64: made once for each attention."""
    if torch.compiler.is_compiling():
        return _find_places(sections, device)
    key = sections, device
    if key in _known_places:
        return _known_places[key]
    places = _find_places(sections, device)
    if type(places) is Tensor and not places.is_inference():  # nor of a mode that only pretends to compute
        if len(_known_places) == _MOST_PLACES:
            _known_places.clear()
        _known_places[key] = places
    return places


def _find_places(sections: Sections, device: torch.device) -> Tensor:
    """Without a copy from the host, which a compiled step would make again each time."""
    columns = places = torch.arange(sum(sections.own), device=device)
    end = 0
    for width, to in zip(sections.own[:-1], sections.padded, strict=False):
        end += width
        if to > width:
            places = places + (columns >= end) * (to - width)
    return places


class _AmongZeros(torch.autograd.Function):
    """A parameter in another dtype, in the first corner of a tensor of zeros, but along `dim` at `places`."""

    @staticmethod
    def forward(ctx, parameter, dtype, shape, dim, places):
        ctx.dim, ctx.shape, ctx.dtype = dim, parameter.shape, parameter.dtype
        ctx.save_for_backward(places)
        out = parameter.new_zeros(shape, dtype=dtype)
        corner = _corner(out, parameter.shape, dim)
        if dim is None:
            corner.copy_(parameter)  # casts in the same pass
        else:
            corner.index_copy_(dim, places, parameter.to(dtype))
        return out

    @staticmethod
    def backward(ctx, gradient):
        (places,) = ctx.saved_tensors
        corner = _corner(gradient, ctx.shape, ctx.dim)
        if ctx.dim is not None:
            corner = corner.index_select(ctx.dim, places)
        return corner.to(ctx.dtype), None, None, None, None


def _corner(t: Tensor, shape: torch.Size, dim: int | None) -> Tensor:
    """The view of t with the first numbers of each dimension, all of them along `dim`."""
    for i, width in enumerate(shape):
        t = t if i == dim else t.narrow(i, 0, width)
    return t
