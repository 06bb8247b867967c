"""The cut: a model with the removed dimensions really gone, built from ordinary modules.

A `CompactViT` is a timm VisionTransformer, a `CompactEva` timm's Eva, whose blocks have a width of their own
for each layer and each head. Its outputs equal those of the gated model with the removed gates set to 0: kept
gate values are folded into the weights; a head without values goes with its query and key; a branch whose
output no longer depends on its input is replaced by the constant that it computes.

On a GPU the modules run on the ops of `vtp_kernels`, forward and backward, which take odd widths at full
speed, and in 16 bits they are trained on padded weights (`padded.py`); anywhere else, and in an exported or
traced program, on PyTorch's own operators.

Blocks, attention and feed-forward are subclasses of timm's, with its attributes, so that what looks for those
finds them: hooks, adapters, attention maps (`fused_attn = False`). What puts a forward of its own in their
place (token merging swaps classes) fails at its first reshape, as heads are not of one width any more.
"""

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerScale, get_act_layer, use_fused_attn
from timm.layers.drop import calculate_drop_path_rates
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import Tensor, nn

from vtp.files import fingerprint
from vtp.group import Group
from vtp.model.architecture import Architecture, describe, on_meta
from vtp.model.images import inherit_description
from vtp.model.widths import SITES
from vtp.pruning.dense_block import activated, hidden_rows, into_fc2, layer_scales, scaled
from vtp.pruning.gates import has_fingerprint, sites, with_gates
from vtp.pruning.padded import (
    Sections,
    attend_padded,
    filled_up,
    heads_are_faster_padded,
    is_plain_linear,
    padded_linear,
    rounded_up,
    trains_padded,
)
from vtp.pruning.plan import PlanError, PruningPlan
from vtp.pruning.refit import refit
from vtp.pruning.removed import removed_before
from vtp.pruning.streams import Progress, plain_copy
from vtp.words import counted
from vtp_kernels.compact_linear import compact_linear
from vtp_kernels.compact_mlp import compact_mlp
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.ragged_attention import ragged_attention
from vtp_kernels.rotary import rotate_heads, rotated_attention, rotates_in_attention
from vtp_kernels.rows import padded_width

_ERF_GELUS = (nn.GELU, get_act_layer("gelu"))
_WIDEST_HEAD = 256  # that `ragged_attention` takes


_plain_operators = False


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within it compact models run on PyTorch's own operators on a GPU too, to compare the ops with."""
    global _plain_operators
    before, _plain_operators = _plain_operators, True
    try:
        yield
    finally:
        _plain_operators = before


def _on_kernels(x: Tensor) -> bool:
    """Whether x is to go through the ops of `vtp_kernels`; exported and traced programs run without them."""
    if isinstance(x, torch.fx.Proxy):
        return False
    return x.is_cuda and not _plain_operators and not torch.compiler.is_exporting()


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; what someone put in the place of a linear, or hung on it, is called."""
    if _on_kernels(x) and is_plain_linear(layer):
        return compact_linear(x, layer.weight, layer.bias)
    return layer(x)


def is_erf_gelu(activation: nn.Module) -> bool:
    """Whether a module is the exact GELU, which the ops apply themselves."""
    return type(activation) in _ERF_GELUS and getattr(activation, "approximate", "none") == "none"


def has_op(mlp: nn.Module) -> bool:
    """Whether `compact_mlp` does what is between the linear layers of a CompactMlp or of a packed one."""
    return isinstance(mlp.norm, nn.Identity) and (mlp.glu or is_erf_gelu(mlp.act))


class LayerNormGather(nn.Module):
    """LayerNorm over all `dim` inputs that puts out `kept` of them.

    `out[..., j] = (x[..., index[j]] - mean) * rstd * weight[j] + bias[j]`, statistics over all of x
    [..., dim]. The affine parameters are stored for kept columns only: the others have no effect.
    """

    def __init__(self, dim: int, kept: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(kept))
        self.bias = nn.Parameter(torch.zeros(kept))
        index = torch.arange(kept) if kept < dim else None  # with all columns there is nothing to gather
        self.register_buffer("index", index)

    def forward(self, x: Tensor, padded: bool = False) -> Tensor:
        """x [..., dim] to [..., kept]; with `padded` the ops add zeros up to a multiple of 8 columns."""
        if _on_kernels(x):
            return layer_norm_gather(x, self.weight, self.bias, self.index, self.eps, padded=padded)
        if self.index is None:
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        normalized = F.layer_norm(x, (self.dim,), None, None, self.eps)
        return normalized.index_select(-1, self.index) * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kept={len(self.weight)}, eps={self.eps}"


class CompactAttention(Attention):
    """Self-attention whose heads have key widths, which are those of their queries too, and value widths.

    qkv puts out the queries of all heads, their keys, then their values: [..., 2 * sum(key_widths) +
    sum(value_widths)]. The softmax scale is that of the dense model, `head_dim ** -0.5`, whatever is left of
    a key. Norms of queries and keys are over all `head_dim`, and rotations of their pairs: with either no key
    is narrower. A norm before proj (`scale_attn_norm`) is over the values of all heads of the dense model,
    which are there then, and gathers those that proj keeps.

    Attributes:
        key_widths, value_widths: one entry for each head that is left.
        kept_heads: which heads of the dense model these are, by default the first.
        head_dim: the width of a head of the dense model.
        num_prefix_tokens, rotate_half: as those of timm's AttentionRope: tokens that are not rotated, and
            whether the pairs of a head are its halves, else neighbours.
        fused_attn: as timm's: whether attention may be one operator; else the weights go through `attn_drop`.
    """

    def __init__(
        self,
        architecture: Architecture,
        qkv_inputs: int,
        key_widths: tuple[int, ...],
        value_widths: tuple[int, ...],
        kept_heads: tuple[int, ...] | None = None,
        proj_inputs: int | None = None,
    ) -> None:
        """proj_inputs: that a norm before proj keeps; None for all values, which is so without one."""
        nn.Module.__init__(self)  # what timm's makes has other widths
        self.num_heads = len(value_widths)
        self.kept_heads = tuple(range(self.num_heads)) if kept_heads is None else kept_heads
        self.num_prefix_tokens = architecture.num_prefix_tokens
        self.is_rotary = architecture.rotary
        self.rotate_half = architecture.eva is not None and architecture.eva.rope_rotate_half
        self.head_dim = architecture.head_dim
        self.key_widths = key_widths
        self.value_widths = value_widths
        self.attn_dim = sum(value_widths)
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        if len(key_widths) != self.num_heads:
            raise ValueError(f"key_widths: got {key_widths}, expected one for each of {self.num_heads} heads")
        if architecture.whole_keys and set(key_widths) != {self.head_dim}:
            raise ValueError(
                f"key_widths: got {key_widths}, expected {self.head_dim} each: "
                f"{architecture.whole_keys_reason}"
            )
        outputs = 2 * sum(key_widths) + sum(value_widths)
        self.qkv = nn.Linear(qkv_inputs, outputs, bias=architecture.qkv_bias)
        norm = architecture.qk_norm
        self.q_norm = LayerNorm(self.head_dim, eps=architecture.norm_eps) if norm else nn.Identity()
        self.k_norm = LayerNorm(self.head_dim, eps=architecture.norm_eps) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(architecture.attn_drop_rate)
        inputs = self.attn_dim if proj_inputs is None else proj_inputs
        normed = architecture.scale_attn_norm
        self.norm = LayerNormGather(self.attn_dim, inputs, architecture.norm_eps) if normed else nn.Identity()
        self.gate = None
        self.proj = nn.Linear(inputs, architecture.embed_dim, bias=architecture.proj_bias)
        self.proj_drop = nn.Dropout(architecture.proj_drop_rate)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, qkv_inputs] to [B, N, embed_dim]; masks and angles are those of timm's attention."""
        if self.trains_padded(x):
            return self._forward_padded(x, attn_mask, is_causal, rope)
        out = self.attend(_linear(self.qkv, x), attn_mask, is_causal, rope, on_kernels=_on_kernels(x))
        return self.proj_drop(_linear(self.proj, self.norm(out)))

    def trains_padded(self, x: Tensor) -> bool:
        """Whether x, or what x is the norm of, goes through padded weights; its own columns may be padded."""
        # What is between the products knows the width of a head, which must then be what heads are padded to.
        knows = self.is_normed or self.is_rotary or not isinstance(self.norm, nn.Identity)
        fits = self.fused_attn and (not knows or self.head_dim % 8 == 0) and type(self) is CompactAttention
        return fits and _on_kernels(x) and trains_padded(x, self.qkv, self.proj)

    def _forward_padded(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None
    ) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        plain = attn_mask is None and not is_causal and not dropout
        keys, values, uniform = self._padded_heads(x.shape[-2], plain)
        own = *self.key_widths, *self.key_widths, *self.value_widths
        sections = Sections(own, (*keys, *keys, *values))
        qkv = padded_linear(x, self.qkv, rounded_up(self.qkv.in_features), sections)
        if rope is not None and self.rotates_by_op(rope):
            qkv, rope = rotate_heads(qkv, *self.rotation(rope)), None
        turned = self.is_normed or rope is not None
        query, key, value = qkv.split([sum(keys), sum(keys), sum(values)], dim=-1)
        if turned:
            query, key = self._turned(query, self.q_norm, rope), self._turned(key, self.k_norm, rope)
        if uniform:
            heads = query, key, value, self.num_heads
            out = attend_padded(*heads, attn_mask, dropout, is_causal=is_causal, scale=self.scale)
        else:
            qkv = torch.cat([query, key, value], dim=-1) if turned else qkv
            out = ragged_attention(qkv, keys, values, self.scale)
        inputs = Sections(self.value_widths, values)
        if isinstance(self.norm, LayerNormGather):  # over the values of whole heads
            out, inputs = self.norm(out, padded=True), rounded_up(self.proj.in_features)
        return self.proj_drop(padded_linear(out, self.proj, inputs, rounded_up(self.proj.out_features)))

    def _padded_heads(self, tokens: int, plain: bool) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """The widths of keys and of values that products make and take, and whether they are one for all, for
        PyTorch's attention; else that is `ragged_attention`, of plain softmax alone."""
        keys, values = filled_up(self.key_widths), filled_up(self.value_widths)
        widest = max(*self.key_widths, *self.value_widths)
        outer = self.qkv.in_features, self.proj.out_features
        fits = plain and max(widest, *values) <= _WIDEST_HEAD
        if fits and not heads_are_faster_padded(self.key_widths, self.value_widths, tokens, *outer):
            return keys, values, False
        uniform = (padded_width(widest),) * self.num_heads
        return uniform, uniform, True

    def attend(
        self,
        qkv: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        rope: Tensor | None = None,
        *,
        on_kernels: bool,
    ) -> Tensor:
        """The attention alone, without a norm before proj: qkv as it is put out to [B, N, sum(value_widths)].

        With `on_kernels` it is one op, and another before it that rotates, or in inference, where that is
        forced, one that does both; but masks, active dropout and norms of queries and keys stay on PyTorch's
        operators.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        widest = max(*self.key_widths, *self.value_widths)
        plain = attn_mask is None and not is_causal and not dropout
        fused = on_kernels and self.fused_attn and plain and widest <= _WIDEST_HEAD
        if on_kernels and rope is not None and self.rotates_by_op(rope):
            table, keys, prefix, half = self.rotation(rope)
            needs_gradient = torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad)
            if fused and rotates_in_attention() and not needs_gradient:
                return rotated_attention(qkv, keys, self.value_widths, self.scale, table, prefix, half)
            qkv, rope = rotate_heads(qkv, table, keys, prefix, half), None
        if fused and not self.is_normed and rope is None:
            return ragged_attention(qkv, self.key_widths, self.value_widths, self.scale)
        query, key, value = qkv.split(
            [sum(self.key_widths), sum(self.key_widths), sum(self.value_widths)], dim=-1
        )
        if self.is_normed or rope is not None:
            query, key = self._turned(query, self.q_norm, rope), self._turned(key, self.k_norm, rope)
        if fused:
            qkv = torch.cat([query, key, value], dim=-1)
            return ragged_attention(qkv, self.key_widths, self.value_widths, self.scale)
        ragged = len(set(self.key_widths)) > 1 or len(set(self.value_widths)) > 1
        if ragged and torch.compiler.is_exporting() and plain:
            return self._attend_in_one_node_a_head(query, key, value)
        if len(set(self.key_widths)) > 1:
            return self._attend_head_by_head(query, key, value, attn_mask, is_causal)
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = key.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.fused_attn and len(set(self.value_widths)) == 1:
            value = value.unflatten(-1, (self.num_heads, self.value_widths[0])).transpose(1, 2)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout, is_causal=is_causal, scale=self.scale
            )
            return out.transpose(1, 2).flatten(2)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        scores = self.attn_drop(_mask(scores, attn_mask, is_causal).softmax(dim=-1))
        heads = enumerate(_split(value, self.value_widths))
        return torch.cat([scores[:, head] @ value for head, value in heads], dim=-1)

    def rotates_by_op(self, rope: Tensor) -> bool:
        """Whether `rotate_heads` does what these angles say: not behind patch dropout, nor behind norms."""
        return rope.ndim < 4 and not self.is_normed

    def rotation(self, rope: Tensor) -> tuple[Tensor, tuple[int, ...], int, bool]:
        """What `rotate_heads` takes behind qkv."""
        return self._of_kept_heads(rope), self.key_widths, self.num_prefix_tokens, self.rotate_half

    @property
    def is_normed(self) -> bool:
        """Whether queries and keys pass a norm."""
        return not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))

    def _of_kept_heads(self, rope: Tensor) -> Tensor:
        """Angles [N, 2 d] of all heads as they are; of [..., heads, N, 2 d] those of the kept heads."""
        if rope.ndim == 2 or rope.shape[-3] <= len(self.kept_heads):
            return rope
        return torch.stack([rope[..., head, :, :] for head in self.kept_heads], dim=-3)

    def _turned(self, x: Tensor, norm: nn.Module, rope: Tensor | None) -> Tensor:
        """Queries or keys of all heads, [B, N, heads * head_dim], normed, and rotated as timm does it."""
        x = norm(x.unflatten(-1, (self.num_heads, self.head_dim)))
        if rope is not None:
            # [N, 2 d] of all heads, or [heads, N, 2 d]; behind patch dropout, with images before them.
            of_heads = self._of_kept_heads(rope.unsqueeze(0) if rope.ndim == 2 else rope)
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            patches = apply_rot_embed_cat(patches, of_heads.transpose(-3, -2), half=self.rotate_half)
            x = torch.cat([prefix, patches], dim=1)
        return x.flatten(-2)

    def _attend_head_by_head(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The same for heads of unequal key widths, whose scores are no one product."""
        pairs = zip(_split(queries, self.key_widths), _split(keys, self.key_widths), strict=True)
        scores = torch.stack([(query * self.scale) @ key.transpose(-2, -1) for query, key in pairs], dim=1)
        scores = self.attn_drop(_mask(scores, attn_mask, is_causal).softmax(dim=-1))
        heads = enumerate(_split(values, self.value_widths))
        return torch.cat([scores[:, head] @ value for head, value in heads], dim=-1)

    def _attend_in_one_node_a_head(self, *of_all: Tensor) -> Tensor:
        """The same for an exported program: other runtimes fuse an attention node, but no softmax over the
        scores of all heads of which they cannot see what they are multiplied with."""
        widths = (self.key_widths, self.key_widths, self.value_widths)
        parts = zip(of_all, widths, strict=True)
        heads = zip(*(part.unsqueeze(1).split(of_heads, dim=-1) for part, of_heads in parts), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, scale=self.scale) for q, k, v in heads]
        return torch.cat(outputs, dim=-1).squeeze(1)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, key_widths={self.key_widths}, value_widths={self.value_widths}"


def _split(x: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """The columns of each head; a list by index, as a traced value cannot be iterated over."""
    parts = x.split(widths, dim=-1)
    return [parts[head] for head in range(len(widths))]


@torch.fx.wrap  # a traced program decides about masks when it runs
def _mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        tokens = scores.shape[-1]
        attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, float("-inf"))
    return scores + attn_mask


class CompactMlp(Mlp):
    """fc1, activation, fc2 with `hidden` kept hidden dimensions: x [..., fc1_inputs] to [..., embed_dim].

    glu: SwiGLU: fc1 has 2 * hidden outputs, and silu of the first half is multiplied by the second.

    A norm before fc2 (`scale_mlp_norm`) is over all hidden dimensions of the dense model, which are there
    then, and gathers the `hidden` that fc2 keeps.
    """

    def __init__(self, architecture: Architecture, fc1_inputs: int, hidden: int) -> None:
        nn.Module.__init__(self)  # what timm's makes has other widths
        self.glu = architecture.glu
        made = architecture.mlp_hidden if architecture.scale_mlp_norm else hidden
        outputs = 2 * made if self.glu else made
        self.fc1 = nn.Linear(fc1_inputs, outputs, bias=architecture.proj_bias)
        self.act = nn.SiLU() if self.glu else _activation(architecture)
        self.drop1 = nn.Dropout(architecture.proj_drop_rate)
        normed = architecture.scale_mlp_norm
        self.norm = LayerNormGather(made, hidden, architecture.norm_eps) if normed else nn.Identity()
        self.fc2 = nn.Linear(hidden, architecture.embed_dim, bias=architecture.proj_bias)
        self.drop2 = nn.Dropout(architecture.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.trains_padded(x):
            return self._forward_padded(x)
        dropout = self.drop1.p if self.training else 0.0
        linears = is_plain_linear(self.fc1) and is_plain_linear(self.fc2)
        if _on_kernels(x) and linears and has_op(self) and not dropout:
            weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return self.drop2(compact_mlp(x, *weights, None, "swiglu" if self.glu else "gelu"))
        hidden = self.norm(self.drop1(activated(self, _linear(self.fc1, x))))
        return self.drop2(_linear(self.fc2, hidden))

    def trains_padded(self, x: Tensor) -> bool:
        """Whether x, or what x is the norm of, goes through padded weights; its own columns may be padded."""
        return type(self) is CompactMlp and _on_kernels(x) and trains_padded(x, self.fc1, self.fc2)

    def _forward_padded(self, x: Tensor) -> Tensor:
        parts = 2 if self.glu else 1
        made, kept = self.fc1.out_features // parts, self.fc2.in_features
        given = padded_linear(x, self.fc1, rounded_up(self.fc1.in_features), rounded_up(*(made,) * parts))
        hidden = self.drop1(activated(self, given))
        if isinstance(self.norm, LayerNormGather):
            hidden = self.norm(hidden[..., :made], padded=True)
        return self.drop2(
            padded_linear(hidden, self.fc2, rounded_up(kept), rounded_up(self.fc2.out_features))
        )


class ConstantBranch(nn.Module):
    """What is left of a branch that no longer depends on its input: one vector, `bias` [embed_dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, **of_attention: object) -> Tensor:
        """x [..., embed_dim] to the same shape; what else attention takes is accepted."""
        return self.bias.expand_as(x)


class CompactBlock(Block):
    """A pre-norm transformer block with the widths that a plan keeps."""

    def __init__(self, plan: PruningPlan, block: int, drop_path: float) -> None:
        nn.Module.__init__(self)  # what timm's makes has other widths
        architecture = plan.architecture
        width, eps = architecture.embed_dim, architecture.norm_eps
        qkv, proj, fc1, fc2 = (len(plan.kept[name]) for name in _site_names(block))
        heads = tuple(head for head, key in enumerate(plan.key_widths(block)) if key)
        key_widths = tuple(plan.key_widths(block)[head] for head in heads)
        value_widths = tuple(plan.value_widths(block)[head] for head in heads)
        if architecture.scale_attn_norm:
            value_widths = (plan.head_dim,) * len(heads)

        alive = bool(qkv and proj)
        self.norm1 = LayerNormGather(width, qkv, eps) if alive else nn.Identity()
        self.attn = (
            CompactAttention(architecture, qkv, key_widths, value_widths, heads, proj)
            if alive
            else ConstantBranch(width)
        )
        self.ls1 = _layer_scale(architecture) if alive else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()

        alive = bool(fc1 and fc2)
        self.norm2 = LayerNormGather(width, fc1, eps) if alive else nn.Identity()
        self.mlp = CompactMlp(architecture, fc1, fc2) if alive else ConstantBranch(width)
        self.ls2 = _layer_scale(architecture) if alive else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, embed_dim] to the same shape; `rope` is what timm's Eva hands to its blocks."""
        # What stands for an attention, such as an adapter's, may not know of angles.
        angles = {} if rope is None else {"rope": rope}
        attention = self.attn(
            _normed(self.norm1, self.attn, x), attn_mask=attn_mask, is_causal=is_causal, **angles
        )
        x = x + self.drop_path1(self.ls1(attention))
        return x + self.drop_path2(self.ls2(self.mlp(_normed(self.norm2, self.mlp, x))))


def _normed(norm: nn.Module, branch: nn.Module, x: Tensor) -> Tensor:
    """What a branch is given: padded where it can take that. Modules of others get what is kept."""
    pads = type(norm) is LayerNormGather and isinstance(branch, (CompactAttention, CompactMlp))
    return norm(x, padded=True) if pads and branch.trains_padded(x) else norm(x)


def _layer_scale(architecture: Architecture) -> nn.Module:
    if architecture.init_values is None:
        return nn.Identity()
    return LayerScale(architecture.embed_dim, init_values=architecture.init_values)


def _activation(architecture: Architecture) -> nn.Module:
    return (get_act_layer(architecture.act_layer) or nn.GELU)()


def _site_names(block: int) -> list[str]:
    return [f"blocks.{block}.{site}" for site in SITES]


class CompactViT(VisionTransformer):
    """A timm VisionTransformer cut to a plan; everything outside its blocks is timm's own.

    `CompactViT(plan)` has new weights; `vtp.compact` and `vtp.load` make one with trained weights.

    Attributes:
        plan: the PruningPlan that gives the widths.
        pretrained_cfg: that of the dense model, if it had one, for `timm.data.resolve_data_config`, but not
            where its weights come from.
    """

    def __init__(self, plan: PruningPlan) -> None:
        # Without storage there is nothing to initialise, and timm takes a while over it.
        weight_init = "skip" if torch.get_default_device().type == "meta" else ""
        super().__init__(**plan.architecture.timm_kwargs(), weight_init=weight_init)
        self.plan = plan
        self.blocks = compact_blocks(plan)


class CompactDistilledViT(CompactViT, VisionTransformerDistilled):
    """A CompactViT with DeiT's distillation token and head."""


class CompactEva(Eva):
    """A timm Eva cut to a plan: as a CompactViT, with the rotary embedding that timm hands to its blocks."""

    def __init__(self, plan: PruningPlan) -> None:
        super().__init__(**plan.architecture.timm_kwargs())
        self.plan = plan
        self.blocks = compact_blocks(plan)


CompactModel: TypeAlias = CompactViT | CompactEva


def compact_blocks(plan: PruningPlan) -> nn.Sequential:
    """The blocks of a plan, with new weights."""
    rates = calculate_drop_path_rates(plan.architecture.drop_path_rate, plan.architecture.depth)
    return nn.Sequential(*[CompactBlock(plan, i, rate) for i, rate in enumerate(rates)])


def new_compact(plan: PruningPlan) -> CompactModel:
    """The compact model of a plan, with new weights."""
    if plan.architecture.eva is not None:
        return CompactEva(plan)
    return (CompactDistilledViT if plan.architecture.distilled else CompactViT)(plan)


def empty_compact(plan: PruningPlan) -> CompactModel:
    """The compact model of a plan on the meta device: shapes without storage, to be given a state dict, and
    `vtp.model.eva.make_rotary_buffers`."""
    with on_meta():
        return new_compact(plan)


@torch.no_grad()
def compact(
    model: nn.Module,
    plan: PruningPlan,
    *,
    images: Tensor | Iterable | None = None,
    memory_gb: float | None = None,
    progress: Progress | None = None,
    group: Group = None,
) -> CompactModel:
    """Cut a gated or dense model to a plan. The result shares no memory with it.

    A plan that was made of other weights than the model's is followed, with a UserWarning that names both
    fingerprints: it may be meant, as weights that were trained a little further, or rounded by a cast, are
    others; a plan of another model of the same shape keeps what matters there, and is no better here than a
    draw. Plans of a latency profile name no weights, and are followed without a word.

    Args:
        model: the model that the plan was made for. It is not changed.
        plan: what is kept.
        images: what is left learns from these, in closed form, to do what the dense model did (see
            `pruning/refit.py`); unlabelled, as `vtp.calibrate` takes them, some two thousand; no more than
            16,384 are read, as their tokens are kept: a loader may be endless. None leaves the weights as
            they are: the result then computes what `model` does with the removed gates at 0.
        memory_gb: what the tokens of the images may take, for both models, in units of 1e9 bytes; the rest
            goes to a temporary file.
        progress: called with what is going on and the share that is done.
        group: with images, processes that share them, as `vtp.calibrate` takes it: all have the same model
            and plan, each has images of its own, and all get the same weights, bit for bit: those of one
            process to rounding.

    Returns:
        CompactViT, or CompactEva of timm's Eva, with the dtype, device and train/eval mode of `model`, all
        parameters trainable.

    Raises:
        PlanError: the plan was made for a model of other widths, or has cuts that take images.
        ImagesError: images of another shape or kind than the model's, or none, or not finite.
        ValueError: with images: activations are not finite, or the processes have different models or plans.
        RankError: another process of the group met an error.
    """
    gated = with_gates(model)
    layers = sites(gated)
    architecture = describe(gated)
    if architecture.site_widths() != plan.widths or architecture.num_heads != plan.architecture.num_heads:
        raise PlanError(
            f"plan: made for {counted(plan.architecture.depth, 'block')} of width "
            f"{plan.architecture.embed_dim}, got a model with {counted(architecture.depth, 'block')} of "
            f"width {architecture.embed_dim}"
        )
    for name in ("glu", "rotary", "scale_attn_norm", "scale_mlp_norm"):
        if (own := getattr(architecture, name)) != (theirs := getattr(plan.architecture, name)):
            raise PlanError(f"plan: made for a model with {name} {theirs}, got one with {name} {own}")
    if images is None and _takes_images(gated, plan):
        raise PlanError(
            "plan: it narrows queries and keys, or turns values, which takes images; give some to vtp.compact"
        )
    _warn_of_other_weights(model, gated, plan)
    plan = dataclasses.replace(plan, architecture=architecture)
    small = empty_compact(plan)
    state = {name: tensor for name, tensor in gated.state_dict().items() if not name.startswith("blocks.")}
    for i, block in enumerate(gated.blocks):
        device = layers[f"blocks.{i}.attn.qkv"].weight.device
        qkv, proj, fc1, fc2 = (
            torch.tensor(plan.kept[name], dtype=torch.int64, device=device) for name in _site_names(i)
        )
        new = small.blocks[i]
        attention = _cut_attention(block, new, qkv, proj, plan.key_widths(i), architecture)
        state |= _prefixed(f"blocks.{i}.", attention)
        state |= _prefixed(f"blocks.{i}.", _cut_mlp(block, new, fc1, fc2, architecture))
    if architecture.rotary:
        small.rope = copy.deepcopy(gated.rope)
    small.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    if images is not None:
        plain = plain_copy(gated)
        dtype = small.patch_embed.proj.weight.dtype
        small.to(plain.patch_embed.proj.weight.dtype).eval()
        refit(plain, small, plan, images, memory_gb=memory_gb, progress=progress, group=group)
        small.to(dtype)
    inherit_description(small, gated)
    if plan.architecture.distilled:
        small.set_distilled_training(gated.distilled_training)
    return small.train(gated.training)


def _warn_of_other_weights(model: nn.Module, gated: nn.Module, plan: PruningPlan) -> None:
    """Warn where a plan names other weights than the model's, as it is, with gates of 1, or with its gates
    folded into its weights: these are one model, and a plan may have been made of any of them."""
    if not plan.parent or any(parameter.is_meta for parameter in gated.parameters()):
        return
    forms = (lambda: model, lambda: gated, lambda: plain_copy(gated))
    if not any(has_fingerprint(form(), plan.parent) for form in forms):
        own = fingerprint(model.state_dict())
        warnings.warn(
            f"plan: made of weights with the fingerprint {plan.parent[:16]}, the model's have {own[:16]}: "
            "what it keeps was chosen for others (trained further, rounded by a cast, or of another model)",
            UserWarning,
            stacklevel=4,
        )


def _takes_images(gated: nn.Module, plan: PruningPlan) -> bool:
    """Whether the cut turns values, or narrows queries and keys beyond what an earlier cut has left."""
    if plan.value_basis != "dimensions":
        return plan.needs_images
    left = removed_before(gated)
    return any(
        0 < key < most
        for i in range(plan.architecture.depth)
        for key, most in zip(plan.key_widths(i), left[f"blocks.{i}.attn"], strict=True)
    )


def _prefixed(prefix: str, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items() if tensor is not None}


def _cut_norm(name: str, norm: nn.Module, new: nn.Module, keep: Tensor) -> dict[str, Tensor | None]:
    if not isinstance(new, LayerNormGather):
        return {}
    index = None if new.index is None else keep
    return {f"{name}.weight": norm.weight[keep], f"{name}.bias": norm.bias[keep], f"{name}.index": index}


def _cut_attention(
    block: nn.Module,
    new: CompactBlock,
    keep_qkv: Tensor,
    keep_proj: Tensor,
    key_widths: tuple[int, ...],
    architecture: Architecture,
) -> dict[str, Tensor | None]:
    """Tensors of the compact attention branch, by name within the block."""
    attn = block.attn
    proj_weight, proj_bias = attn.proj.folded_weight()[:, keep_proj], attn.proj.bias
    qkv_bias = attn.qkv.bias
    width = attn.num_heads * attn.head_dim
    if isinstance(new.attn, ConstantBranch):
        # Without inputs every token has the value `bias`, which any attention weights average to itself.
        values = proj_weight.new_zeros(width) if qkv_bias is None else qkv_bias[2 * width :]
        constant = _apply(proj_weight, attn.norm(values)[keep_proj], proj_bias)
        return {"attn.bias": scaled(constant, layer_scales(block)[0])}
    rows = block_rows(key_widths, made_values(keep_proj, architecture), width, attn.head_dim)
    return {
        **_cut_norm("norm1", block.norm1, new.norm1, keep_qkv),
        "attn.qkv.weight": attn.qkv.folded_weight()[rows][:, keep_qkv],
        "attn.qkv.bias": None if qkv_bias is None else qkv_bias[rows],
        **_prefixed("attn.q_norm.", dict(attn.q_norm.state_dict())),
        **_prefixed("attn.k_norm.", dict(attn.k_norm.state_dict())),
        **_cut_norm("attn.norm", attn.norm, new.attn.norm, keep_proj),
        "attn.proj.weight": proj_weight,
        "attn.proj.bias": proj_bias,
        "ls1.gamma": layer_scales(block)[0],
    }


def made_values(keep_proj: Tensor, architecture: Architecture) -> Tensor:
    """Values that a cut to these inputs of proj needs: the same, or all of them for a norm before proj."""
    if architecture.scale_attn_norm:
        return torch.arange(architecture.embed_dim, device=keep_proj.device)
    return keep_proj


def block_rows(key_widths: tuple[int, ...], values: Tensor, width: int, head_dim: int) -> Tensor:
    """Rows of a dense qkv [3 * width, ...] that a compact one has, in its order: queries, keys, values."""
    starts = range(0, width, head_dim)
    queries = torch.cat([start + torch.arange(w) for start, w in zip(starts, key_widths, strict=True)])
    queries = queries.to(values.device)
    return torch.cat([queries, width + queries, 2 * width + values])


def _cut_mlp(
    block: nn.Module, new: CompactBlock, keep_fc1: Tensor, keep_fc2: Tensor, architecture: Architecture
) -> dict[str, Tensor | None]:
    """Tensors of the compact feed-forward branch, by name within the block."""
    mlp = block.mlp
    fc2_weight = mlp.fc2.folded_weight()[:, keep_fc2]
    made = hidden_rows(keep_fc2, architecture)
    hidden_bias = None if mlp.fc1.bias is None else mlp.fc1.bias[made]
    gamma = layer_scales(block)[1]
    if isinstance(new.mlp, ConstantBranch):
        before_act = fc2_weight.new_zeros(len(made)) if hidden_bias is None else hidden_bias
        hidden = into_fc2(mlp, before_act)
        constant = _apply(
            fc2_weight, hidden[keep_fc2] if architecture.scale_mlp_norm else hidden, mlp.fc2.bias
        )
        return {"mlp.bias": scaled(constant, gamma)}
    return {
        **_cut_norm("norm2", block.norm2, new.norm2, keep_fc1),
        "mlp.fc1.weight": mlp.fc1.folded_weight()[made][:, keep_fc1],
        "mlp.fc1.bias": hidden_bias,
        **_cut_norm("mlp.norm", mlp.norm, new.mlp.norm, keep_fc2),
        "mlp.fc2.weight": fc2_weight,
        "mlp.fc2.bias": mlp.fc2.bias,
        "ls2.gamma": gamma,
    }


def _apply(weight: Tensor, vector: Tensor, bias: Tensor | None) -> Tensor:
    """`weight @ vector + bias` in float64, where a missing bias is 0; in the weight's dtype."""
    out = weight.double() @ vector.double()
    if bias is not None:
        out += bias.double()
    return out.to(weight.dtype)
