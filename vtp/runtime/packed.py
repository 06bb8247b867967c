"""Packed blocks: norms and scales folded into the weights, weights padded for the kernels."""

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
from vtp_kernels.compact_linear import compact_linear
from vtp_kernels.compact_mlp import compact_mlp
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.rotary import rotate_heads_
from vtp_kernels.rows import whole_rows


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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out]."""
        return compact_linear(x, self.weight, self.bias, residual=residual)[..., : self.out_features]


class PackedNorm(nn.Module):
    """A LayerNormGather whose weight and bias are in the linear behind it: x [..., dim] to [..., kept]."""

    def __init__(self, norm: LayerNormGather) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("index", None if norm.index is None else norm.index.clone())

    def widen(self, dim: int) -> bool:
        """Gather 8 n of the `dim` dimensions, the first again for each that is missing; whether there are."""
        missing = 0 if self.index is None else -len(self.index) % 8
        if missing and len(self.index) + missing <= dim:
            self.index = torch.cat([self.index, self.index[:1].expand(missing)])
            missing = 0
        return not missing

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_gather(x, None, None, self.index, self.eps)


class PackedAttention(nn.Module):
    """An attention branch with its norm and the residual: x [B, N, embed_dim] to the same shape."""

    def __init__(
        self, norm: LayerNormGather, attn: CompactAttention, scale: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.norm = PackedNorm(norm)
        self.qkv = _behind_norm(norm, attn.qkv, dtype)
        # Of the attention itself only what is between its linear layers is wanted.
        self.heads = copy.deepcopy(attn, {id(attn.qkv): nn.Identity(), id(attn.proj): nn.Identity()})
        self.heads.fused_attn = True
        self.proj = _before_scale(attn.proj, scale, dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None) -> Tensor:
        qkv = self.qkv(self.norm(x))
        if rope is not None and self.heads.rotates_by_op(rope):  # in place: nobody else has seen it
            qkv, rope = rotate_heads_(qkv, *self.heads.rotation(rope)), None
        out = self.heads.attend(qkv, attn_mask, is_causal, rope, on_kernels=True)
        missing = self.proj.in_features - out.shape[-1]
        if missing:  # an op's result has them in its padding, as zeros
            is_padded = out.stride(-2) == self.proj.in_features
            out = whole_rows(out) if is_padded else F.pad(out, (0, missing))
        return self.proj(out, residual=x)


class PackedMlp(nn.Module):
    """A feed-forward branch with its norm and the residual: x [..., embed_dim] to the same shape.

    glu: SwiGLU, as in a CompactMlp.
    """

    def __init__(self, norm: LayerNormGather, mlp: CompactMlp, scale: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = PackedNorm(norm)
        self.fc1 = _behind_norm(norm, mlp.fc1, dtype)
        self.glu, self.act = mlp.glu, copy.deepcopy(mlp.act)
        self.fc2 = _before_scale(mlp.fc2, scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        normalized, fc1, fc2 = self.norm(x), self.fc1, self.fc2
        if has_op(self):
            weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            return compact_mlp(normalized, *weights, x, "swiglu" if self.glu else "gelu")
        return fc2(activated(self, fc1(normalized)), residual=x)


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

    def widen(self, dim: int) -> None:
        """Have every matrix product take and make a multiple of 8 numbers, those that are more with zeros.

        A GPU's GEMM takes several times as long for other widths of 16-bit numbers (`compact_linear`).
        """
        if self.attn is not None:
            if self.attn.norm.widen(dim):
                self.attn.qkv.widen_inputs()
            self.attn.qkv.widen_outputs()
            self.attn.proj.widen_inputs()
        if self.mlp is not None:
            if self.mlp.norm.widen(dim):
                self.mlp.fc1.widen_inputs()
            if has_op(self.mlp):  # another activation may make something else of 0
                self.mlp.fc1.widen_outputs(2 if self.mlp.glu else 1)
                self.mlp.fc1.out_features = len(self.mlp.fc1.storage)
                self.mlp.fc2.widen_inputs()


def _behind_norm(norm: LayerNormGather, linear: nn.Linear, dtype: torch.dtype) -> PackedLinear:
    """With LayerNorm's output `n * w + b`: the linear `(W diag w) n + (W b + bias)` of n alone."""
    return PackedLinear(
        (_at_least_float32(linear.weight) * norm.weight).to(dtype),
        linear.weight.double() @ norm.bias.double() + _bias64(linear),
    )


def _before_scale(linear: nn.Linear, scale: nn.Module, dtype: torch.dtype) -> PackedLinear:
    """The linear with the LayerScale behind it: `(diag(gamma) W) x + gamma * bias`."""
    weight, bias = _at_least_float32(linear.weight), _bias64(linear)
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
