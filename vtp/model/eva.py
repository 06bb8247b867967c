"""timm's `Eva`: DINOv3, EVA-02, ViTs with rotary embedding, Perception Encoders.

It says the same in several ways: queries, keys and values by one linear layer or by three, biases beside the
layer that they belong to, SwiGLU in one matrix or in two. Gates, cuts and files know one of them, whose
linear layers are modules that take all their inputs at once, `attn.qkv` and `mlp.fc1`: `with_fused_sites`
turns a model into that.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import AttentionRope, GluMlp, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

# Rotary embeddings by timm's name. "mixed" learns frequencies of each block and head.
ROTARY: dict[str, type[nn.Module]] = {
    "cat": RotaryEmbeddingCat,
    "dinov3": RotaryEmbeddingDinoV3,
    "mixed": RotaryEmbeddingMixed,
}


@dataclasses.dataclass(frozen=True)
class EvaArguments:
    """What timm's Eva takes and its VisionTransformer does not, under timm's names.

    Attributes that are None where the model has no such part: `rope_type`, one of `ROTARY`; `ref_feat_shape`;
    `attn_pool_num_heads` and `attn_pool_mlp_ratio` of pooling by attention. `rope_*_coords` are augmentations
    of training.
    """

    rope_type: str | None
    rope_temperature: float
    rope_grid_offset: float
    rope_grid_indexing: str
    rope_rotate_half: bool
    rope_shift_coords: float | None
    rope_jitter_coords: float | None
    rope_rescale_coords: float | None
    ref_feat_shape: tuple[int, int] | None
    attn_pool_num_heads: int | None
    attn_pool_mlp_ratio: float | None

    @classmethod
    def of(cls, model: Eva) -> "EvaArguments":
        """Those that made `model`, whose rotary embedding is None or one of `ROTARY`."""
        rope, pool = model.rope, model.attn_pool
        names = [name for name, kind in ROTARY.items() if type(rope) is kind]
        shape = getattr(rope, "ref_feat_shape", None)
        return cls(
            rope_type=names[0] if names else None,
            rope_temperature=float(getattr(rope, "temperature", 10_000.0)),
            rope_grid_offset=float(getattr(rope, "grid_offset", 0.0)),
            rope_grid_indexing=getattr(rope, "grid_indexing", "ij"),
            rope_rotate_half=getattr(rope, "rotate_half", False),
            rope_shift_coords=getattr(rope, "shift_coords", None),
            rope_jitter_coords=getattr(rope, "jitter_coords", None),
            rope_rescale_coords=getattr(rope, "rescale_coords", None),
            ref_feat_shape=None if shape is None else tuple(shape),
            attn_pool_num_heads=None if pool is None else pool.num_heads,
            # timm takes int(embed_dim * ratio); the half keeps the product above the integer.
            attn_pool_mlp_ratio=None if pool is None else (pool.mlp.fc1.out_features + 0.5) / model.embed_dim,
        )

    def timm_kwargs(self) -> dict[str, Any]:
        """Arguments of timm's constructor."""
        return dataclasses.asdict(self) | {"use_rot_pos_emb": self.rope_type is not None}


def rotary_settings(rope: nn.Module | None) -> dict[str, Any]:
    """What a rotary embedding computes from, by attribute; what it keeps of earlier calls is not among it."""
    if rope is None:
        return {}
    plain = (int, float, str, bool, tuple, list, type(None))
    settings = {name: value for name, value in vars(rope).items() if isinstance(value, plain)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name != "training" and not name.startswith("_")
    }


def ropes(model: nn.Module) -> list[Tensor | None]:
    """By block what an Eva hands to it beside tokens of images of its own size: sines and cosines of the
    angles of the patches, [patches, 2 * head_dim], or [heads, patches, 2 * head_dim] where frequencies are
    learned; None where queries and keys are not rotated.
    """
    rope = getattr(model, "rope", None)
    if rope is None:
        return [None] * len(model.blocks)
    embed = rope.get_embed(shape=model.patch_embed.grid_size) if model.dynamic_img_size else rope.get_embed()
    return list(embed)[: len(model.blocks)] if model.rope_mixed else [embed] * len(model.blocks)


def without_storage(model: nn.Module) -> nn.Module:
    """A copy on the meta device: shapes and settings."""
    # deepcopy finds every tensor in `memo` already copied.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def with_fused_sites(model: nn.Module) -> nn.Module:
    """The model itself, changed in place where it must be: one `attn.qkv` and one `mlp.fc1` in each block.

    It computes the same, up to how products of another shape are rounded. A model with q and v biases alone
    gets one for keys too, of zeros.
    """
    for block in model.blocks:
        block.attn = _with_one_qkv(block.attn)
        block.mlp = _with_one_fc1(block.mlp)
    return model


def make_rotary_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Fill what a model that was built without storage has no file or state dict for, before they are loaded.

    Args:
        dtype: of the model's weights.
    """
    rope = getattr(model, "rope", None)
    if rope is not None:
        rope.to_empty(device=device)
        rope.init_non_persistent_buffers()
        rope.to(dtype)


def other_angles(model: nn.Module) -> str | None:
    """Which buffer of the rotary embedding is not what its settings give, or None: no file has them."""
    rope = getattr(model, "rope", None)
    if rope is None or any(buffer.is_meta for buffer in rope.buffers()):
        return None
    fresh = copy.deepcopy(rope).cpu().float()
    fresh.init_non_persistent_buffers()
    expected = dict(fresh.to(model.patch_embed.proj.weight.dtype).named_buffers())
    for name, got in rope.named_buffers():
        # Made on a GPU, as for another image size, an angle may be rounded otherwise.
        bound = 8 * torch.finfo(expected[name].dtype).eps * expected[name].double().abs().clamp(min=1)
        if ((got.cpu().double() - expected[name].double()).abs() > bound).any():
            return name
    return None


def _with_one_qkv(attn: nn.Module) -> nn.Module:
    """The attention as timm's AttentionRope with one qkv; any other kind than timm's three as it is."""
    if not isinstance(attn, (EvaAttention, AttentionRope)):
        return attn
    if isinstance(attn, AttentionRope) and attn.qkv is not None:
        return attn
    if attn.qkv is not None:
        weight, biases = attn.qkv.weight, (attn.q_bias, attn.k_bias, attn.v_bias)
    else:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        weight, biases = _joined([layer.weight for layer in layers]), tuple(layer.bias for layer in layers)
    has_bias = any(bias is not None for bias in biases)
    if has_bias:
        biases = tuple(weight.new_zeros(attn.proj.in_features) if b is None else b for b in biases)
    with torch.device("meta"):
        fused = AttentionRope(
            weight.shape[1],
            attn.num_heads,
            qkv_bias=has_bias,
            num_prefix_tokens=attn.num_prefix_tokens,
            rotate_half=attn.rotate_half,
        )
    fused.qkv.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    fused.qkv.bias = _joined(biases) if has_bias else None
    for name in ("q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop", "fused_attn"):
        setattr(fused, name, getattr(attn, name))
    return fused.train(attn.training)


def _with_one_fc1(mlp: nn.Module) -> nn.Module:
    """A SwiGLU of two matrices as timm's GluMlp; any other feed-forward as it is."""
    if not isinstance(mlp, SwiGLU):
        return mlp
    with torch.device("meta"):
        packed = GluMlp(
            mlp.fc1_g.in_features,
            2 * mlp.fc1_g.out_features,
            mlp.fc2.out_features,
            act_layer=nn.SiLU,
            bias=mlp.fc1_g.bias is not None,
            gate_last=False,
        )
    packed.fc1.weight = _joined([mlp.fc1_g.weight, mlp.fc1_x.weight])
    if mlp.fc1_g.bias is not None:
        packed.fc1.bias = _joined([mlp.fc1_g.bias, mlp.fc1_x.bias])
    for name in ("act", "drop1", "norm", "fc2", "drop2"):
        setattr(packed, name, getattr(mlp, name))
    return packed.train(mlp.training)


def _joined(parts: Sequence[Tensor]) -> nn.Parameter:
    trained = any(part.requires_grad for part in parts)
    return nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=trained)
