"""Inference on a CPU: a packed model, written down for the C++ engine of `csrc/cpu`, which runs it at once.

`csrc/cpu/model.h` reads what `_Writer` writes: one buffer of bytes with every weight, laid out as the
micro-kernels read it, and a list of integers that says what lies where.
"""

import copy
import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtp.pruning.compact import CompactAttention, CompactDistilledViT, is_erf_gelu
from vtp.runtime.packed import PackedAttention, PackedBlock, PackedLinear, PackedMlp, PackedNorm
from vtp_kernels.library import cpp_unsupported_reason

_FORMAT = 6  # of the list of integers; csrc/cpu/model.cpp has the same
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_PANEL = 16  # outputs whose weights lie side by side
_TILE_INPUTS = 32  # of a panel in bfloat16 there is a whole multiple
_ALIGNMENT = 64  # bytes: a cache line
# Of the sets whose kernels for bfloat16 have activations in it too; those of others are float32.
_INPUT_STEPS = {"avx512_bf16": 2, "amx_bf16": _TILE_INPUTS}


def unsupported_reason(vit: VisionTransformer | Eva, dtype: torch.dtype) -> str | None:
    """Why the C++ engine cannot run a packed model, or packed blocks alone, in `dtype`; None if it can."""
    if (device := next(vit.buffers()).device).type != "cpu":
        return f"the model is on {device}"
    if dtype not in _DTYPES:
        return f"it computes in float32 and bfloat16, not in {dtype}"
    for i, block in enumerate(vit.blocks):
        if block.mlp is not None and not block.mlp.glu and not is_erf_gelu(block.mlp.act):
            return f"the activation of block {i}, {type(block.mlp.act).__name__}, is not the exact GELU"
        heads = block.attn and block.attn.heads
        for norm in (heads.q_norm, heads.k_norm) if heads else ():
            if not isinstance(norm, nn.Identity) and norm.eps != block.attn.norm.eps:
                return f"the norms of block {i} differ in eps"
    return cpp_unsupported_reason()


def pack(vit: VisionTransformer | Eva, dtype: torch.dtype) -> nn.Module:
    """A packed model, its biases still in float64, on the C++ engine: whole, or at least its blocks.

    What timm does before and after the blocks stays with timm where it is more than patches, positions, a
    norm and a linear head on the class tokens.
    """
    return CpuViT(vit, dtype) if _is_plain(vit) else pack_blocks(vit, dtype)


def pack_blocks(vit: VisionTransformer | Eva, dtype: torch.dtype) -> VisionTransformer | Eva:
    """The same with the blocks alone on the C++ engine, so that what goes in and out of them can be had."""
    vit.blocks = nn.Sequential(CpuBlocks(vit, dtype))
    if _is_mixed(vit):
        vit.rope_mixed = False  # timm's Eva then hands the embeddings of all blocks to the one that is there
    return vit.to(dtype)


def block_by_block(vit: VisionTransformer | Eva) -> VisionTransformer | Eva:
    """A packed model with a module for each block: itself, or another of the same parts where one module has
    all blocks."""
    single = getattr(vit.blocks[0], "single", None)
    if single is None:
        return vit
    same = copy.copy(vit)
    same._modules = {**vit._modules, "blocks": single}
    if vit.blocks[0].separate:
        same.rope_mixed = True
    return same


def _is_plain(vit: VisionTransformer | Eva) -> bool:
    """Whether the engine can do what is outside the blocks."""
    patch = vit.patch_embed
    heads = [vit.head, vit.head_dist] if isinstance(vit, CompactDistilledViT) else [vit.head]
    return (
        isinstance(vit, VisionTransformer)
        and type(patch) is PatchEmbed
        and patch.img_size is not None
        and not vit.dynamic_img_size
        and patch.flatten
        and all(isinstance(part, nn.Identity) for part in (patch.norm, vit.norm_pre, vit.fc_norm))
        and type(patch.proj) is nn.Conv2d
        and isinstance(vit.norm, nn.LayerNorm)
        and vit.global_pool == "token"
        and vit.attn_pool is None
        and all(type(head) is nn.Linear for head in heads)
    )


def panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] as the micro-kernels read it, 16 outputs side by side, padded with zeros.

    float32: [out / 16, in, 16]; bfloat16, two inputs side by side, padded to 32: [out / 16, in / 2, 16, 2].
    """
    outputs, inputs = weight.shape
    pairs = dtype == torch.bfloat16
    padded = F.pad(weight.to(dtype), (0, -inputs % _TILE_INPUTS if pairs else 0, 0, -outputs % _PANEL))
    by_panel = padded.unflatten(0, (-1, _PANEL))
    return (by_panel.unflatten(-1, (-1, 2)) if pairs else by_panel).transpose(1, 2).contiguous()


def activations(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [M, K] as the operator `cpu_linear` takes them beside `panels` in `dtype`.

    They get the dtype that the engine's activations have then, bfloat16 or float32, and zeros up to a
    multiple of the inputs that it reads at once.
    """
    step = _INPUT_STEPS.get(torch.ops.vtp.cpu_isa()) if dtype == torch.bfloat16 else None
    return x.float() if step is None else F.pad(x, (0, -x.shape[1] % step)).bfloat16()


def rotary_table(rope: Tensor, prefix_tokens: int, rotate_half: bool) -> Tensor:
    """A rotary embedding as timm hands it to blocks, as the operator `cpu_blocks` takes it.

    Args:
        rope: [..., N, 2 d], for each patch d sines, then d cosines. Each angle is there twice, side by side,
            or with `rotate_half` in the two halves of d.
        prefix_tokens: how many tokens there are before the patches; they are not rotated.
        rotate_half: whether pairs are (i, i + d / 2), else (2 i, 2 i + 1).

    Returns:
        [tables, prefix_tokens + N, d] in float32, contiguous: d / 2 cosines, then d / 2 sines.
    """
    width = rope.shape[-1] // 2
    once = slice(width // 2) if rotate_half else slice(None, None, 2)
    sines, cosines = (part[..., once].float() for part in rope.split(width, dim=-1))
    before = (0, 0, prefix_tokens, 0)
    table = torch.cat([F.pad(cosines, before, value=1.0), F.pad(sines, before)], dim=-1)
    return table.reshape(-1, *table.shape[-2:])


def _pairs_apart(width: int) -> list[int]:
    """Columns of a head in an order that brings pairs (2 i, 2 i + 1) to (i, i + width / 2)."""
    return [*range(0, width, 2), *range(1, width, 2)]


class _Writer:
    """The bytes and the list of integers of a packed model."""

    def __init__(self, dtype: torch.dtype, vit: VisionTransformer | Eva) -> None:
        self.dtype = dtype
        self._vit = vit
        self._parts: list[Tensor] = []
        self._starts: list[int] = []  # of each block in the list
        self._size = 0
        heads = [block.attn.heads for block in vit.blocks if block.attn is not None]
        norms = [
            branch.norm for block in vit.blocks for branch in (block.attn, block.mlp) if branch is not None
        ]
        eps = norms[0].eps if norms else getattr(vit.norm, "eps", 0.0)
        scale = heads[0].scale if heads else 1.0
        self.list = [_FORMAT, _DTYPES[dtype], vit.embed_dim, heads[0].head_dim if heads else 0]
        self.list += [_bits(eps), _bits(scale), vit.rope.num_heads if _is_mixed(vit) else 0]

    def buffers(self) -> tuple[Tensor, Tensor]:
        """(bytes, list), as the operators take them."""
        self._parts.append(torch.zeros(-self._size % _ALIGNMENT, dtype=torch.uint8))
        return torch.cat(self._parts), torch.tensor(self.list)

    def layouts_of_single_blocks(self) -> list[Tensor]:
        """The list for each block alone, on the same bytes, once that of blocks alone is complete."""
        ends = [*self._starts[1:], len(self.list) - 1]
        before, after = self.list[: self._starts[0] - 1], self.list[-1:]
        return [
            torch.tensor([*before, 1, *self.list[start:end], *after])
            for start, end in zip(self._starts, ends, strict=True)
        ]

    def memory(self, tensor: Tensor) -> None:
        """Put the tensor's bytes at the end, and their offset into the list."""
        padding = -self._size % _ALIGNMENT
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._parts += [torch.zeros(padding, dtype=torch.uint8), data]
        self.list.append(self._size + padding)
        self._size += padding + len(data)

    def maybe(self, tensor: Tensor | None) -> None:
        """Whether there is a tensor, and where."""
        self.list.append(int(tensor is not None))
        if tensor is not None:
            self.memory(tensor)

    def linear(self, weight: Tensor, bias: Tensor) -> None:
        """A layer of weight [out, in] and bias [out], in panels of 16 outputs."""
        outputs, inputs = weight.shape
        self.list += [inputs, outputs]
        self.memory(panels(weight, self.dtype))
        self.memory(F.pad(bias.double(), (0, -outputs % _PANEL)).float())

    def packed(self, layer: PackedLinear) -> None:
        self.linear(layer.weight, layer.bias)

    def norm(self, norm: PackedNorm, kept: int) -> None:
        self.list.append(kept)
        self.maybe(None if norm.index is None else norm.index.int())

    def patches(self, vit: VisionTransformer) -> None:
        """The patch embedding; its bias goes into the table of positions."""
        proj = vit.patch_embed.proj
        channels, (height, width), (rows, columns) = (
            proj.in_channels,
            vit.patch_embed.img_size,
            proj.kernel_size,
        )
        self.list += [1, channels, height, width, rows, columns, vit.num_prefix_tokens]
        self.linear(proj.weight.flatten(1), torch.zeros(vit.embed_dim))
        self.memory(F.pad(_positions(vit), (0, -vit.embed_dim % _PANEL)).float())

    def blocks(self, blocks: Sequence[PackedBlock]) -> None:
        self.list.append(len(blocks))
        for block in blocks:
            self._starts.append(len(self.list))
            self.maybe(None if block.offset is None else block.offset.float())
            self.list.append(int(block.attn is not None))
            if block.attn is not None:
                self._attention(block.attn)
            self.list.append(int(block.mlp is not None))
            if block.mlp is not None:
                self._mlp(block.mlp)

    def _attention(self, branch: PackedAttention) -> None:
        self.norm(branch.norm, branch.qkv.in_features)
        heads = branch.heads
        self.list += [heads.num_heads, *heads.key_widths, *heads.value_widths, *self._tables(heads)]
        weight, bias = branch.qkv.weight, branch.qkv.bias
        norms = [p for norm in (heads.q_norm, heads.k_norm) for p in norm.parameters()]
        if _rope(self._vit) is not None and not heads.rotate_half:
            # Queries and keys in another order, the same for both: their products stay as they are.
            widths = [*heads.key_widths, *heads.key_widths, sum(heads.value_widths)]
            *keys, values = torch.arange(len(weight)).split(widths)
            rows = torch.cat([*(rows[_pairs_apart(len(rows))] for rows in keys), values])
            weight, bias = weight[rows], bias[rows]
            norms = [p[_pairs_apart(len(p))] for p in norms]
        self.linear(weight, bias)
        self.maybe(torch.stack(norms).float() if norms else None)
        self._last_layer(heads.norm, branch.proj)

    def _tables(self, heads: CompactAttention) -> list[int]:
        """Of each head which of the rotary embeddings of its block it has, -1 without."""
        if _rope(self._vit) is None:
            return [-1] * heads.num_heads
        return list(heads.kept_heads) if _is_mixed(self._vit) else [0] * heads.num_heads

    def _mlp(self, branch: PackedMlp) -> None:
        self.norm(branch.norm, branch.fc1.in_features)
        self.list += [int(branch.glu), branch.fc1.out_features // (2 if branch.glu else 1)]
        if branch.glu:
            self.linear(*(_halves_by_panel(t) for t in (branch.fc1.weight, branch.fc1.bias)))
        else:
            self.packed(branch.fc1)
        self._last_layer(branch.hidden_norm, branch.fc2)

    def _last_layer(self, norm: nn.Module, layer: PackedLinear) -> None:
        """That of a branch, with the norm before it where there is one."""
        self.list.append(int(isinstance(norm, PackedNorm)))
        if isinstance(norm, PackedNorm):
            self.norm(norm, layer.in_features)
        self.packed(layer)

    def head(self, vit: VisionTransformer) -> None:
        """The last norm folded into the head. DeiT averages two heads: they read two tokens side by side."""
        heads = [vit.head, vit.head_dist] if isinstance(vit, CompactDistilledViT) else [vit.head]
        weights = [head.weight.double() for head in heads]
        bias = sum(
            weight @ vit.norm.bias.double() + (0 if head.bias is None else head.bias.double())
            for weight, head in zip(weights, heads, strict=True)
        )
        self.list += [1, len(heads)]
        weight = torch.cat([weight * vit.norm.weight.double() for weight in weights], dim=1)
        self.linear(weight / len(heads), bias / len(heads))


def _rope(vit: VisionTransformer | Eva) -> nn.Module | None:
    """The rotary embedding of a model."""
    return getattr(vit, "rope", None)


def _is_mixed(vit: VisionTransformer | Eva) -> bool:
    """Whether each block and head of the dense model is rotated by angles of its own."""
    return getattr(vit, "rope_mixed", False)


def _halves_by_panel(rows: Tensor) -> Tensor:
    """Rows [2 * hidden, ...] as panels of the first half and of the second in turn, zeros behind each."""
    halves = rows.unflatten(0, (2, -1))
    padded = F.pad(halves, (*[0, 0] * (rows.ndim - 1), 0, -halves.shape[1] % _PANEL))
    return padded.unflatten(1, (-1, _PANEL)).transpose(0, 1).flatten(0, 2)


def _bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _positions(vit: VisionTransformer) -> Tensor:
    """What every token has before patches are added: [tokens, embed_dim] in float64."""
    patch = vit.patch_embed
    bias = torch.zeros(vit.embed_dim) if patch.proj.bias is None else patch.proj.bias
    tokens = bias.double().expand(1, patch.num_patches, -1)
    return vit._pos_embed(tokens)[0].double()


class _CpuModule(nn.Module):
    """Holds what `_Writer` wrote. `dtype` is of the weights; they stay on the CPU."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.dtype = writer.dtype
        weights, layout = writer.buffers()
        self.register_buffer("weights", weights)
        self.register_buffer("layout", layout)

    def _refuse_masks(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask, is_causal: the CPU engine has no attention masks; call the compact model itself"
            )


class CpuViT(_CpuModule):
    """Images [B, C, H, W] to logits [B, outputs], in the images' dtype, float32 or bfloat16."""

    def __init__(self, vit: VisionTransformer, dtype: torch.dtype) -> None:
        writer = _Writer(dtype, vit)
        writer.patches(vit)
        writer.blocks(vit.blocks)
        writer.head(vit)
        super().__init__(writer)
        self.outputs = vit.head.out_features

    def forward(self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        self._refuse_masks(attn_mask, is_causal)
        return torch.ops.vtp.cpu_vit(images, self.weights, self.layout, self.outputs)


class CpuBlocks(_CpuModule):
    """Tokens [B, N, embed_dim] to the same shape and dtype, through all blocks of a model.

    In one call, within which the residual stream is in float32.

    `rope` is the rotary embedding of a model that has one, as `get_embed` of timm's `Eva.rope` gives it:
    [N, 2 d] for N tokens without the prefix and heads of width d, or [depth, heads, N, 2 d] where each block
    and head of the dense model has its own (`Eva.rope_mixed`). Another shape is a ValueError, and so is None
    where heads are rotated.

    Attributes:
        single: for what is between the blocks each of them by itself, on the same weights in memory. A mixed
            embedding is then that of its heads, [heads, N, 2 d].
    """

    def __init__(self, vit: VisionTransformer | Eva, dtype: torch.dtype) -> None:
        writer = _Writer(dtype, vit)
        writer.list.append(0)
        writer.blocks(vit.blocks)
        writer.list.append(0)
        super().__init__(writer)
        rope, heads = _rope(vit), [block.attn.heads for block in vit.blocks if block.attn is not None]
        self.has_rope, self.prefix_tokens = rope is not None, vit.num_prefix_tokens
        self.separate = (rope.depth, rope.num_heads) if _is_mixed(vit) else ()
        # None: no head is left that is rotated.
        self.rotated_width = heads[0].head_dim if rope is not None and heads else None
        self.rotate_half = heads[0].rotate_half if heads else False
        layouts = zip(vit.blocks, writer.layouts_of_single_blocks(), strict=True)
        self.single = nn.Sequential(*[self._alone(block, layout) for block, layout in layouts])

    def _alone(self, block: PackedBlock, layout: Tensor) -> "CpuBlocks":
        """A block of these, with a list of integers of its own."""
        other = copy.copy(self)
        other._buffers, other._modules = {**self._buffers, "layout": layout}, {}
        other.separate = self.separate[1:]
        other.rotated_width = None if block.attn is None else self.rotated_width
        return other

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        self._refuse_masks(attn_mask, is_causal)
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"tokens: got {x.dtype}, expected float32 or bfloat16, as the CPU engine has no other; "
                "vtp.optimize(model, dtype=...) packs for another dtype"
            )
        return torch.ops.vtp.cpu_blocks(x, self.weights, self.layout, self._rotary(x, rope))

    def _rotary(self, x: Tensor, rope: Tensor | None) -> Tensor | None:
        got = None if rope is None else tuple(rope.shape)
        if self.rotated_width is None:
            if not self.has_rope and rope is not None:
                raise ValueError(f"rope: got shape {got}, expected None: the model has no rotary embedding")
            return None
        expected = (*self.separate, x.shape[1] - self.prefix_tokens, 2 * self.rotated_width)
        if rope is None or got != expected:
            raise ValueError(f"rope: got {got and f'shape {got}'}, expected shape {expected}")
        return rotary_table(rope, self.prefix_tokens, self.rotate_half)
