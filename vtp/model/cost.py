"""Parameters and multiply-adds: counted on a real model, and predicted from widths alone.

A multiply-add is one MAC. Counted are the matrix products of linear layers, convolutions and attention,
as `torch.utils.flop_counter` sees them (half its FLOPs); elementwise work is not.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vtp.model.architecture import Architecture, UnsupportedModelError, wrapped_hint
from vtp.model.eva import without_storage
from vtp.model.widths import BlockWidths


@dataclasses.dataclass(frozen=True, order=True)
class Cost:
    """params: parameters (numbers, not bytes); macs: multiply-adds for one image at the model's own size."""

    params: int
    macs: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.macs + other.macs)

    def __str__(self) -> str:
        return f"{abbreviated(self.params)} params, {abbreviated(self.macs)} MACs"


def abbreviated(number: int) -> str:
    """17_564_000_000 to "17.56G", 678_730 to "0.68M": in G from 1e9 on, else in M."""
    return f"{number / 1e9:.2f}G" if number >= 1e9 else f"{number / 1e6:.2f}M"


def count(model: nn.Module, image_size: tuple[int, int] | None = None) -> Cost:
    """Count a dense, gated or compact vision transformer by running it on tensors without storage.

    The model is not changed and no weight is read; parameters are those of `model.parameters()`.

    Args:
        model: a timm VisionTransformer or Eva, or what `insert_gates` or `compact` made of one.
        image_size: (height, width) in pixels; None takes the model's own.

    Raises:
        UnsupportedModelError: it is another model, or a wrapper of one.
    """
    if not isinstance(model, (VisionTransformer, Eva)):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}, expected timm's VisionTransformer or its Eva"
            f"{wrapped_hint(model)}"
        )
    params = sum(parameter.numel() for parameter in model.parameters())
    clone = without_storage(model).eval()
    for module in clone.modules():  # hooks of the caller's are not made for tensors without storage
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    conv = clone.patch_embed.proj
    size = image_size or clone.patch_embed.img_size
    image = torch.empty(1, conv.in_channels, *size, device="meta", dtype=conv.weight.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        clone(image)
    return Cost(params, counter.get_total_flops() // 2)


def model_cost(architecture: Architecture, blocks: Iterable[BlockWidths]) -> Cost:
    """Cost of a compact model with blocks of these widths."""
    return sum((block_cost(architecture, widths) for widths in blocks), surroundings_cost(architecture))


def block_cost(architecture: Architecture, widths: BlockWidths) -> Cost:
    """Cost of one block with its norms."""
    attention = attention_cost(architecture, widths.qkv, widths.values, widths.keys)
    return attention + mlp_cost(architecture, widths.fc1, widths.fc2)


@functools.lru_cache(maxsize=32)
def surroundings_cost(architecture: Architecture) -> Cost:
    """Cost of everything outside the blocks: embedding, tokens, final norm, pooling, heads."""
    without_blocks = dataclasses.replace(architecture, depth=0, drop_path_rate=0.0)
    frequencies = 0
    if architecture.eva is not None and architecture.eva.rope_type == "mixed":
        # Two for each pair of each head of each block, which timm cannot make for no block at all.
        frequencies = architecture.depth * architecture.embed_dim
        eva = dataclasses.replace(architecture.eva, rope_type="cat")
        without_blocks = dataclasses.replace(without_blocks, eva=eva)
    return count(without_blocks.build("meta", weight_init="skip")) + Cost(frequencies, 0)


def attention_cost(
    architecture: Architecture, qkv_inputs: int, value_widths: Sequence[int], key_widths: Sequence[int] = ()
) -> Cost:
    """Cost of one attention branch with its norm.

    Args:
        architecture: the dense model.
        qkv_inputs: kept inputs of qkv.
        value_widths: kept value dimensions per head; a head with 0 is gone with its query and key, unless a
            norm before proj reads them all: then they are inputs of proj alone.
        key_widths: width of the query and key of each of those heads; () for that of the dense model.
    """
    width, tokens, head_dim = architecture.embed_dim, architecture.num_tokens, architecture.head_dim
    values = sum(value_widths)
    if qkv_inputs == 0 or values == 0:
        return Cost(width, 0)  # what is left is a constant vector
    key_widths = key_widths or [head_dim] * len(value_widths)
    normed = architecture.scale_attn_norm
    keys = sum(width for width, alive in zip(key_widths, value_widths, strict=True) if alive or normed)
    made = width if normed else values
    outputs = 2 * keys + made
    params = 2 * qkv_inputs + qkv_inputs * outputs + values * width + 2 * values * normed
    params += outputs * architecture.qkv_bias + width * architecture.proj_bias
    params += 4 * head_dim * architecture.qk_norm + width * (architecture.init_values is not None)
    macs = tokens * (qkv_inputs * outputs + values * width)
    macs += tokens * tokens * (keys + made)
    return Cost(params, macs)


def mlp_cost(architecture: Architecture, fc1_inputs: int, hidden: int) -> Cost:
    """Cost of one feed-forward branch with its norm, for kept inputs of fc1 and of fc2 (`hidden`)."""
    width = architecture.embed_dim
    if fc1_inputs == 0 or hidden == 0:
        return Cost(width, 0)
    normed = architecture.scale_mlp_norm
    outputs = (architecture.mlp_hidden if normed else hidden) * (2 if architecture.glu else 1)
    params = 2 * fc1_inputs + outputs * fc1_inputs + hidden * width + 2 * hidden * normed
    params += (outputs + width) * architecture.proj_bias + width * (architecture.init_values is not None)
    return Cost(params, architecture.num_tokens * (outputs * fc1_inputs + hidden * width))
