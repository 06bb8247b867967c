"""Packed blocks: norms and scales folded into the weights, weights padded for the kernels; and the patch
embedding as one product."""

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from vtp.pruning.compact import (
    CompactAttention,
    CompactBlock,
    CompactMlp,
    ConstantBranch,
    LayerNormGather,
    has_op,
)
from vtp.pruning.dense_block import activated
from vtp.pruning.padded import attend_padded, heads_are_faster_padded
from vtp_kernels.compact_linear import add_linear_, compact_linear
from vtp_kernels.compact_mlp import WIDEST_FUSED, compact_mlp
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.rotary import rotated_linear, rotates_in_attention
from vtp_kernels.rows import padded_width, whole_rows


class PackedLinear(nn.Module):
    """`x W^T + bias (+ residual)` with the rows of W stored as the kernels read them.

    `storage` [out, in rounded up to 8] is W beside zeros, so that every row starts at 16 bytes. W itself is a
    view made when it is needed: `to`, `deepcopy`, `state_dict` and `torch.export` then meet a plain buffer.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("storage", F.pad(weight, (0, -self.in_features % 8)))
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """W [out, in], a view of `storage`; with zeros where it was widened."""
        return self.storage[:, : self.in_features]

    def widen_inputs(self) -> None:
        """Take 8 n inputs, of which those behind the last meet zeros."""
        self.in_features = self.storage.shape[1]

    def widen_outputs(self, parts: int = 1) -> None:
        """Compute 8 n outputs, of which those behind the last are 0, in each of `parts` equal parts.

        `forward` leaves those of one part in the padding.
        """
        missing = -(self.out_features // parts) % 8
        of_parts = self.storage.unflatten(0, (parts, -1)), self.bias.unflatten(0, (parts, -1))
        self.storage = F.pad(of_parts[0], (0, 0, 0, missing)).flatten(0, 1)
        self.bias = F.pad(of_parts[1], (0, missing)).flatten()

    def pad_heads(self, widths: Sequence[int], to: int, *, inputs: bool) -> None:
        """Give each of the heads that lie side by side among the inputs, or the outputs, `to` of them, those
        behind its own width with zeros."""
        if inputs:
            heads = self.weight.split(tuple(widths), dim=1)
            weight = torch.cat([F.pad(head, (0, to - head.shape[1])) for head in heads], dim=1)
            self.storage, self.in_features = F.pad(weight, (0, -weight.shape[1] % 8)), weight.shape[1]
            return
        heads = zip(self.storage.split(tuple(widths)), self.bias.split(tuple(widths)), strict=True)
        padded = [(F.pad(w, (0, 0, 0, to - len(w))), F.pad(b, (0, to - len(b)))) for w, b in heads]
        self.storage, self.bias = (torch.cat(parts) for parts in zip(*padded, strict=True))
        self.out_features = len(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, rotation: tuple | None = None) -> Tensor:
        """x [..., in] to [..., out]; where the bias is left to others, in the place of the residual.

        rotation: of queries and keys, what `rotated_linear` takes behind the bias.
        """
        if rotation is not None:
            return rotated_linear(x, self.weight, self.bias, *rotation)[..., : self.out_features]
        if residual is not None and self.bias is None:
            return add_linear_(residual, x, self.weight)
        return compact_linear(x, self.weight, self.bias, residual=residual)[..., : self.out_features]


class PatchProduct(nn.Module):
    """The convolution of a patch embedding, whose patches do not overlap, as a product of patches: images
    [B, C, H, W] to [B, out, rows of patches, columns of patches], with the channels of a patch side by side.

    On an H200 the convolution itself took 9% of the time of a compact DeiT-B, a product of its size takes 1%.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.kernel_size = conv.in_channels, conv.kernel_size
        self.register_buffer("weight", conv.weight.detach().clone())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    @staticmethod
    def takes(conv: nn.Module) -> bool:
        """Whether a convolution is such a product."""
        return (
            type(conv) is nn.Conv2d
            and conv.stride == conv.kernel_size
            and conv.padding in ((0, 0), "valid")
            and conv.dilation == (1, 1)
            and conv.groups == 1
        )

    def forward(self, images: Tensor) -> Tensor:
        channels, (height, width) = images.shape[1], self.kernel_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        images = images[:, :, : rows * height, : columns * width]
        patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels * height * width)
        weight, missing = self.weight.flatten(1), -(channels * height * width) % 8
        if missing:  # 14 * 14 * 3 are no multiple of 8, for which a product takes several times as long
            patches, weight = F.pad(patches, (0, missing)), F.pad(weight, (0, missing))
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)


class PackedNorm(nn.Module):
    """A LayerNormGather whose weight and bias are in the linear behind it: x [..., dim] to [..., kept].

    shift [dim] is what is added to x first, or None.
    """

    def __init__(self, norm: LayerNormGather) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("shift", None)
        self.register_buffer("index", None if norm.index is None else norm.index.clone())

    def widen(self, dim: int) -> bool:
        """Gather 8 n of the `dim` dimensions, the first again for each that is missing; whether there are."""
        missing = -(dim if self.index is None else len(self.index)) % 8
        if missing and self.index is not None and len(self.index) + missing <= dim:
            self.index = torch.cat([self.index, self.index[:1].expand(missing)])
            missing = 0
        return not missing

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_gather(x, None, None, self.index, self.eps, shift=self.shift)


class PackedAttention(nn.Module):
    """An attention branch with its norm and the residual: x [B, N, embed_dim] to the same shape.

    padded_head: 0, or the width to which every head's query, key and value are filled up with zeros, for
    PyTorch's fused attention.
    """

    padded_head = 0

    def __init__(
        self, norm: LayerNormGather, attn: CompactAttention, scale: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.norm = PackedNorm(norm)
        self.qkv = _folded(norm, attn.qkv, None, dtype)
        # Of the attention itself only what is between its linear layers is wanted.
        self.heads = copy.deepcopy(attn, {id(attn.qkv): nn.Identity(), id(attn.proj): nn.Identity()})
        self.heads.fused_attn = True
        self.heads.norm = _packed_norm(attn.norm)
        self.proj = _folded(attn.norm, attn.proj, scale, dtype)

    def pad_heads(self) -> None:
        """Fill up all heads to the width of the widest, rounded up to 8."""
        keys, values = self.heads.key_widths, self.heads.value_widths
        self.padded_head = padded_width(max(*keys, *values))
        self.qkv.pad_heads((*keys, *keys, *values), self.padded_head, inputs=False)
        self.proj.pad_heads(values, self.padded_head, inputs=True)

    def can_add_in_place(self) -> bool:
        """Whether a product of its own adds to the residual stream."""
        return True

    @property
    def adds_in_place(self) -> bool:
        """Whether it writes its input, and leaves its bias to others."""
        return self.proj.bias is None

    def is_faster_padded(self, tokens: int) -> bool:
        """Whether PyTorch's fused attention of padded heads takes less time than `ragged_attention` on a GPU,
        what it costs the products before and behind it included."""
        storage, keys, values = self.qkv.storage, self.heads.key_widths, self.heads.value_widths
        if storage.device.type == "cpu" or storage.dtype.itemsize != 2:
            return False  # of wider numbers it is not known
        padded_head = padded_width(max(*keys, *values))
        normed = self.heads.is_normed or not isinstance(self.heads.norm, nn.Identity)
        if normed or (self.heads.is_rotary and set(keys) != {padded_head}):
            return False  # what is between the products and attention knows the widths as they are
        return heads_are_faster_padded(keys, values, tokens, self.qkv.in_features, self.proj.out_features)

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None) -> Tensor:
        rotation, in_attention = None, rotates_in_attention() and not self.padded_head
        if rope is not None and self.heads.rotates_by_op(rope) and not in_attention:
            rotation, rope = self.heads.rotation(rope), None
        qkv = self.qkv(self.norm(x), rotation=rotation)
        if self.padded_head:
            heads, scale = self.heads.num_heads, self.heads.scale
            out = attend_padded(*qkv.chunk(3, dim=-1), heads, attn_mask, is_causal=is_causal, scale=scale)
            return self.proj(out, residual=x)
        out = self.heads.attend(qkv, attn_mask, is_causal, rope, on_kernels=True)
        out = self.heads.norm(out)
        missing = self.proj.in_features - out.shape[-1]
        if missing:  # an op's result has them in its padding, as zeros
            is_padded = out.stride(-2) == self.proj.in_features
            out = whole_rows(out) if is_padded else F.pad(out, (0, missing))
        return self.proj(out, residual=x)


class PackedMlp(nn.Module):
    """A feed-forward branch with its norm and the residual: x [..., embed_dim] to the same shape.

    glu: SwiGLU, as in a CompactMlp; fused: whether `compact_mlp` does what is behind the norm.
    """

    def __init__(self, norm: LayerNormGather, mlp: CompactMlp, scale: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = PackedNorm(norm)
        self.fc1 = _folded(norm, mlp.fc1, None, dtype)
        self.glu, self.act, self.fused = mlp.glu, copy.deepcopy(mlp.act), has_op(mlp)
        self.hidden_norm = _packed_norm(mlp.norm)
        self.fc2 = _folded(mlp.norm, mlp.fc2, scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        normalized, fc1, fc2 = self.norm(x), self.fc1, self.fc2
        if not self.fused:
            return fc2(self.hidden_norm(activated(self, fc1(normalized))), residual=x)
        if fc2.bias is None:
            return fc2(compact_linear(normalized, fc1.weight, fc1.bias, activation="gelu"), residual=x)
        weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return compact_mlp(normalized, *weights, x, "swiglu" if self.glu else "gelu")

    def can_add_in_place(self) -> bool:
        """Whether a product of its own adds to the residual stream: `compact_mlp` makes the whole branch in
        one kernel where rows are short, and with SwiGLU both products."""
        return not (self.fused and (self.glu or self.fc2.out_features <= WIDEST_FUSED))

    @property
    def adds_in_place(self) -> bool:
        """Whether it writes its input, and leaves its bias to others."""
        return self.fc2.bias is None


class PackedBlock(nn.Module):
    """A CompactBlock on the ops; a branch that was a constant is gone.

    `offset` [embed_dim] is added to the input: constants that have no linear before them, or None.
    """

    def __init__(self, block: CompactBlock, dtype: torch.dtype) -> None:
        super().__init__()
        dead_attn, dead_mlp = (isinstance(branch, ConstantBranch) for branch in (block.attn, block.mlp))
        self.attn = None if dead_attn else PackedAttention(block.norm1, block.attn, block.ls1, dtype)
        self.mlp = None if dead_mlp else PackedMlp(block.norm2, block.mlp, block.ls2, dtype)
        self.register_buffer("offset", None)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, embed_dim] to the same shape; masks and angles are those of timm's attention."""
        if self.offset is not None:
            x = x + self.offset
        if self.attn is not None:
            x = self.attn(x, attn_mask, is_causal, rope)
        return x if self.mlp is None else self.mlp(x)

    def widen(self, dim: int, tokens: int) -> None:
        """Have every matrix product take and make a multiple of 8 numbers, those that are more with zeros.

        A GPU's GEMM takes several times as long for other widths of 16-bit numbers (`compact_linear`). With
        so many tokens an image heads are padded too, where that is faster.
        """
        if self.attn is not None:
            if self.attn.is_faster_padded(tokens):
                self.attn.pad_heads()
            if self.attn.norm.widen(dim):
                self.attn.qkv.widen_inputs()
            self.attn.qkv.widen_outputs()
            inner = self.attn.heads.norm
            if isinstance(inner, nn.Identity) or inner.widen(self.attn.heads.attn_dim):
                self.attn.proj.widen_inputs()
        if self.mlp is not None:
            if self.mlp.norm.widen(dim):
                self.mlp.fc1.widen_inputs()
            if self.mlp.fused:  # another activation may make something else of 0, and a norm would see it
                self.mlp.fc1.widen_outputs(2 if self.mlp.glu else 1)
                self.mlp.fc1.out_features = len(self.mlp.fc1.storage)
                self.mlp.fc2.widen_inputs()
            else:
                hidden = self.mlp.fc1.out_features // (2 if self.mlp.glu else 1)
                self.mlp.fc1.widen_outputs()
                if isinstance(self.mlp.hidden_norm, PackedNorm) and self.mlp.hidden_norm.widen(hidden):
                    self.mlp.fc2.widen_inputs()


def _packed_norm(norm: nn.Module) -> nn.Module:
    """A norm before proj or fc2; nn.Identity where there is none."""
    return PackedNorm(norm) if isinstance(norm, LayerNormGather) else nn.Identity()


def _folded(norm: nn.Module, linear: nn.Linear, scale: nn.Module | None, dtype: torch.dtype) -> PackedLinear:
    """A linear layer with the norm before it and the LayerScale behind it, where there are such.

    With LayerNorm's output `n * w + b` it is the linear `(W diag w) n + (W b + bias)` of n alone; with gamma
    behind it `(diag(gamma) W) x + gamma * bias`.
    """
    weight, bias = _at_least_float32(linear.weight), _bias64(linear)
    if isinstance(norm, LayerNormGather):
        weight, bias = weight * norm.weight, linear.weight.double() @ norm.bias.double() + bias
    if isinstance(scale, LayerScale):
        weight, bias = weight * scale.gamma[:, None], bias * scale.gamma.double()
    return PackedLinear(weight.to(dtype), bias)


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _bias64(linear: nn.Linear) -> Tensor:
    """A copy of the bias, zeros if there is none, in float64 until everything is added that belongs to it."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features, dtype=torch.float64)
    return linear.bias.to(torch.float64, copy=True)


def absorb_constants(blocks: Iterable[CompactBlock], packed: Sequence[PackedBlock]) -> None:
    """Add what constant branches put out to the bias of the linear before them on the residual stream.

    Every later linear and norm then reads the stream as it was. Without a linear before them they become the
    `offset` of the first block.
    """
    stream = None
    for block, new in zip(blocks, packed, strict=True):
        linears = (new.attn and new.attn.proj, new.mlp and new.mlp.fc2)
        for branch, linear in zip((block.attn, block.mlp), linears, strict=True):
            if linear is not None:
                stream = linear.bias
            elif stream is None:
                stream = packed[0].offset = branch.bias.to(torch.float64, copy=True)
            else:
                stream += branch.bias


def add_in_place(packed: Sequence[PackedBlock]) -> None:
    """Have branches add to the residual stream where it is, so that the blocks write their input.

    A product can add to what it finds there, but not its bias too. So biases are left out of the stream: a
    norm adds those before it to what it reads, until a branch that adds in another way, the last at the
    latest, makes up for them.
    """
    branches = [branch for block in packed for branch in (block.attn, block.mlp) if branch is not None]
    left = None
    for branch in branches:
        branch.norm.shift = left
        linear = branch.proj if isinstance(branch, PackedAttention) else branch.fc2
        bias = linear.bias if left is None else linear.bias + left
        if branch is branches[-1] or not branch.can_add_in_place():
            linear.bias, left = bias, None
        else:
            linear.bias, left = None, bias
