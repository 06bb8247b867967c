"""Which timm vision transformer a model is: described as plain data, rebuilt from it, or refused by name.

Everything the method needs to know about a model (widths, heads, tokens, biases, where norms stand) is
in one immutable `Architecture`. A description is accepted only if the model rebuilt from it has the same
modules, settings and tensors, so a variant that is not understood is refused instead of mangled.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from timm.layers import (
    AttentionRope,
    DropPath,
    GluMlp,
    LayerNorm,
    PatchEmbed,
    SwiGLU,
    SwiGLUPacked,
    get_act_layer,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import TorchFunctionMode

from vtp.model.eva import ROTARY, EvaArguments, rotary_settings, with_fused_sites, without_storage
from vtp.model.widths import SITES, BlockWidths


class _Unfilled(TorchFunctionMode):
    """Leaves new tensors as they are, without initial values."""

    _FILLS = frozenset(
        [
            "uniform_",
            "normal_",
            "kaiming_uniform_",
            "constant_",
            "zero_",
            "fill_",
            "erfinv_",
            "mul_",
            "add_",
            "div_",
            "clamp_",
        ]  # these of a truncated normal distribution
    )

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Context in which models are made without storage. Nor are initial values made for it, as
    `torch.device("meta")` alone would: they take most of the time, and nobody sees them."""
    with torch.device("meta"), _Unfilled():
        yield


class UnsupportedModelError(ValueError):
    """A model that the method does not support; the message names the part and the reason."""


MOST_BLOCKS = 1000  # that a file may ask for; each is built before its tensors are compared

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
# Settings that a module's printed form does not show and that change what a model computes.
_MODEL_SETTINGS = (
    "global_pool",
    "has_class_token",
    "num_reg_tokens",
    "num_prefix_tokens",
    "no_embed_class",
    "pool_include_prefix",
    "dynamic_img_size",
    "in_chans",
    "num_classes",
)
_EVA_SETTINGS = (
    "global_pool",
    "num_prefix_tokens",
    "no_embed_class",
    "cls_embed",
    "rope_mixed",
    "dynamic_img_size",
    "in_chans",
    "num_classes",
)
_ATTENTION_SETTINGS = ("num_heads", "head_dim", "scale")
_ROTARY_ATTENTION_SETTINGS = (*_ATTENTION_SETTINGS, "num_prefix_tokens", "rotate_half")
_PATCH_SETTINGS = ("img_size", "patch_size", "flatten", "output_fmt", "strict_img_size", "dynamic_img_pad")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A timm `VisionTransformer` or `Eva` as data. Field names are timm's where timm has the argument.

    Attributes that are not timm's: `distilled` (DeiT's second token and head), `mlp_hidden` (inputs of fc2),
    `norm_eps`, `act_layer` (a name, or None for timm's default, `nn.GELU`), `glu` (SwiGLU: fc1 has
    2 * mlp_hidden outputs, and silu of the first half is multiplied by the second), `eva` (what only an Eva
    has; None for a VisionTransformer).

    `scale_attn_norm` and `scale_mlp_norm`, a LayerNorm before proj and before fc2, are over all inputs of
    that layer. So what makes these inputs stays whole whatever a cut takes from the layer: it gathers behind
    the norm, and a removed input saves its column of proj or of fc2 alone. That is all an exact cut can do:
    mean and variance depend on every input, and the sum of squares of the removed ones takes as many products
    as they do.
    """

    distilled: bool
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int
    global_pool: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    qkv_bias: bool
    qk_norm: bool
    proj_bias: bool
    init_values: float | None
    class_token: bool
    pos_embed: str
    no_embed_class: bool
    reg_tokens: int
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    pool_include_prefix: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: float
    pos_drop_rate: float
    patch_drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    norm_eps: float
    act_layer: str | None
    glu: bool = False
    eva: EvaArguments | None = None
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by where their token is."""
        return self.eva is not None and self.eva.rope_type is not None

    @property
    def whole_keys(self) -> bool:
        """Whether queries and keys keep their width."""
        return self.qk_norm or self.rotary

    @property
    def whole_keys_reason(self) -> str:
        """Why they do."""
        if self.rotary:
            return "queries and keys are rotated in pairs, each by angles of its own"
        return "norms of queries and keys are over all of it"

    @property
    def head_dim(self) -> int:
        """Width of one head's query and key, and of its value before pruning."""
        return self.embed_dim // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens per image at `img_size`, prefix tokens included."""
        round_up = self.dynamic_img_pad
        patches = 1
        for size, patch in zip(self.img_size, self.patch_size, strict=True):
            patches *= -(-size // patch) if round_up else size // patch
        return patches + self.num_prefix_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    def site_widths(self) -> dict[str, int]:
        """Gates per site before pruning, keyed `blocks.<i>.<site>`, in the order of the forward pass."""
        widths = (self.embed_dim, self.embed_dim, self.embed_dim, self.mlp_hidden)
        return {
            f"blocks.{i}.{site}": width
            for i in range(self.depth)
            for site, width in zip(SITES, widths, strict=True)
        }

    @property
    def dense_widths(self) -> BlockWidths:
        """Widths of each block before pruning."""
        values = (self.head_dim,) * self.num_heads
        return BlockWidths(self.embed_dim, values, self.embed_dim, self.mlp_hidden, keys=values)

    def timm_kwargs(self) -> dict:
        """Arguments for the timm constructor that makes this model."""
        kwargs = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("distilled", "mlp_hidden", "norm_eps", "glu", "eva"):
            kwargs.pop(name)
        # timm takes int(embed_dim * mlp_ratio); the half keeps the product above the integer it must reach.
        kwargs["mlp_ratio"] = (self.mlp_hidden + 0.5) / self.embed_dim
        kwargs["norm_layer"] = partial(LayerNorm, eps=self.norm_eps)
        if self.eva is not None:
            for name, of_eva in _NAMES_OF_EVA.items():
                kwargs[of_eva] = kwargs.pop(name)
            for name in ("proj_bias", "pool_include_prefix", "act_layer"):  # which Eva leaves no choice about
                kwargs.pop(name)
            kwargs["use_abs_pos_emb"] = kwargs.pop("pos_embed") != "none"
            return kwargs | {"swiglu_mlp": self.glu, "attn_type": "rope"} | self.eva.timm_kwargs()
        if self.glu:
            kwargs |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
            kwargs["mlp_ratio"] = (2 * self.mlp_hidden + 0.5) / self.embed_dim
        return kwargs

    def build(self, device: str | torch.device = "cpu", weight_init: str = "") -> VisionTransformer | Eva:
        """The dense timm model with new weights on `device` ("meta" makes one without storage)."""
        device = torch.device(device)
        with on_meta() if device.type == "meta" else device:
            if self.eva is not None:
                return with_fused_sites(Eva(**self.timm_kwargs()))
            cls = VisionTransformerDistilled if self.distilled else VisionTransformer
            return cls(**self.timm_kwargs(), weight_init=weight_init)

    @classmethod
    def from_dict(cls, fields: dict) -> "Architecture":
        """The inverse of `dataclasses.asdict`, from parsed JSON.

        Raises:
            ValueError: fields are missing, unknown or of another type, or describe no model.
        """
        fields = _MISSING_BEFORE | fields
        if isinstance(fields["eva"], dict):
            _check_fields(EvaArguments, fields["eva"], "architecture.eva")
            shape = fields["eva"]["ref_feat_shape"]
            eva = EvaArguments(**fields["eva"] | {"ref_feat_shape": shape and tuple(shape)})
            fields["eva"] = eva
        _check_fields(cls, fields, "architecture")
        for name in ("in_chans", "embed_dim", "depth", "num_heads", "mlp_hidden"):
            if fields[name] < 1:
                raise ValueError(f"architecture.{name}: got {fields[name]}, expected at least 1")
        if fields["depth"] > MOST_BLOCKS:
            raise ValueError(f"architecture.depth: got {fields['depth']}, expected at most {MOST_BLOCKS}")
        if fields["embed_dim"] % fields["num_heads"]:
            raise ValueError(f"architecture.num_heads: {fields['num_heads']} do not divide embed_dim")
        architecture = cls(**fields | {name: tuple(fields[name]) for name in ("img_size", "patch_size")})
        try:
            dataclasses.replace(architecture, depth=1).build("meta", weight_init="skip")
        except Exception as error:  # timm asserts, torch raises errors of all kinds
            kind = type(error).__name__
            raise ValueError(f"architecture: timm cannot build it ({kind}: {error})") from error
        return architecture


# Fields that older files do not have.
_MISSING_BEFORE = {"glu": False, "eva": None, "scale_attn_norm": False, "scale_mlp_norm": False}
# The arguments that Eva calls otherwise.
_NAMES_OF_EVA = {
    "reg_tokens": "num_reg_tokens",
    "pre_norm": "use_pre_transformer_norm",
    "final_norm": "use_post_transformer_norm",
    "fc_norm": "use_fc_norm",
    "scale_attn_norm": "scale_attn_inner",
    "scale_mlp_norm": "scale_mlp",
}


def _check_fields(cls: Any, fields: dict, where: str) -> None:
    """Raise ValueError unless `fields`, from JSON, are those of a dataclass, of its types."""
    expected = {field.name for field in dataclasses.fields(cls)}
    if set(fields) != expected:
        odd = sorted(set(fields) ^ expected)
        raise ValueError(f"{where}: fields {odd} are missing or unknown")
    for field in dataclasses.fields(cls):
        if not _is_of_type(fields[field.name], field.type):
            kind = getattr(field.type, "__name__", field.type)
            raise ValueError(f"{where}.{field.name}: got {fields[field.name]!r}, expected {kind}")


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value parsed from JSON can be that of a field annotated with `kind`."""
    if kind == tuple[int, int] | None:
        return value is None or _is_of_type(value, tuple[int, int])
    if kind == tuple[int, int]:
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        return pair and all(type(size) is int and size > 0 for size in value)
    if type(value) is int and kind not in (int, int | None):
        value = float(value)  # 0 is as good as 0.0
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def describe(model: nn.Module) -> Architecture:
    """Describe a dense or gated timm VisionTransformer or Eva.

    Raises:
        UnsupportedModelError: naming the part that is not supported and why.
    """
    _refuse_other_classes(model)
    refuse_changed_behaviour(model)
    _refuse_other_parts(model)
    fused = model if _has_fused_sites(model) else with_fused_sites(without_storage(model))
    architecture = Architecture(**describe_surroundings(fused), **_describe_blocks(fused))
    _check_rebuilds(fused, architecture)
    return architecture


def _has_fused_sites(model: nn.Module) -> bool:
    return not any(
        isinstance(block.attn, EvaAttention)
        or getattr(block.attn, "qkv", None) is None
        or isinstance(block.mlp, SwiGLU)
        for block in model.blocks
    )


def describe_surroundings(model: VisionTransformer | Eva) -> dict:
    """The fields of `Architecture` outside the blocks, read from the live model.

    Works on a compact model too, whose head or input size may have been changed since the cut.
    """
    patch = model.patch_embed
    if patch.img_size is None:
        raise UnsupportedModelError("patch_embed.img_size is None: give the model an image size")
    common = {
        "distilled": isinstance(model, VisionTransformerDistilled),
        "img_size": tuple(patch.img_size),
        "patch_size": tuple(patch.patch_size),
        "in_chans": patch.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patch.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
    }
    if isinstance(model, Eva):
        return common | {
            "reg_tokens": model.num_prefix_tokens - int(model.cls_token is not None),
            "final_norm": not isinstance(model.norm, nn.Identity),
            "pool_include_prefix": False,
            "eva": EvaArguments.of(model),
        }
    return common | {
        "reg_tokens": model.num_reg_tokens,
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "pool_include_prefix": model.pool_include_prefix,
    }


def _describe_blocks(model: VisionTransformer | Eva) -> dict:
    """The fields of `Architecture` that all blocks share, read from the first (drop path: from the last)."""
    block = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    last_drop_path = model.blocks[-1].drop_path1
    scale = block if isinstance(model, Eva) else block.ls1
    init_values = getattr(scale, "init_values", None)  # nn.Identity has none
    return {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_hidden": mlp.fc2.in_features,
        "glu": not isinstance(mlp, Mlp),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": None if init_values is None else float(init_values),
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": last_drop_path.drop_prob if isinstance(last_drop_path, DropPath) else 0.0,
        "norm_eps": block.norm1.eps,
        "act_layer": _activation_name(mlp.act) if isinstance(mlp, Mlp) else None,
        "scale_attn_norm": not isinstance(attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(mlp.norm, nn.Identity),
    }


def _activation_name(activation: nn.Module) -> str | None:
    if type(activation) is nn.GELU and activation.approximate == "none":
        return None
    for name in _ACTIVATIONS:
        if type(activation) is get_act_layer(name):
            return name
    raise UnsupportedModelError(
        f"blocks.0.mlp.act: {activation} is not supported, expected one of {_ACTIVATIONS}"
    )


def _refuse_other_classes(model: nn.Module) -> None:
    cls = type(model)
    if cls in (VisionTransformer, VisionTransformerDistilled, Eva):
        return
    name = class_name(model)
    expected = (
        "timm's VisionTransformer or VisionTransformerDistilled (DeiT, DeiT-III, ViT, DINOv2 and their kin), "
        "or its Eva (DINOv3, EVA-02, ViTs with rotary embedding)"
    )
    if not isinstance(model, (VisionTransformer, Eva)):
        hint = wrapped_hint(model)
        if name.startswith("vtp."):
            hint = "; it is packed for inference: take the compact model that it was made from"
        raise UnsupportedModelError(f"model: got {name}, expected {expected}{hint}")
    if hasattr(model, "plan"):
        raise UnsupportedModelError(
            f"model: got {name}, which is cut already, expected a dense model; vtp.expand(model) is one that "
            "computes the same, to gate, calibrate or cut again"
        )
    timms = Eva if isinstance(model, Eva) else VisionTransformer
    own = sorted({attribute for c in cls.__mro__ for attribute in _methods(c) if c.__module__ not in _OWNERS})
    raise UnsupportedModelError(
        f"model: got {name}, a subclass of timm's {timms.__name__} that overrides "
        f"{', '.join(own) or 'nothing'}; a cut would not keep that class. Make timm's own model with the "
        "same arguments (global_pool='avg' for one that takes the mean over patches and then a norm), give "
        "it the weights with plain.load_state_dict(model.state_dict()), see that its outputs are the same, "
        "and pass it"
    )


_OWNERS = (
    VisionTransformer.__module__,
    VisionTransformerDistilled.__module__,
    Eva.__module__,
    nn.Module.__module__,
    "builtins",
)


def _methods(cls: type) -> list[str]:
    """What a class defines itself that can change what a model computes."""
    return [name for name, value in vars(cls).items() if callable(value) and not name.startswith("__")]


def class_name(module: nn.Module) -> str:
    """The class of a module with where it comes from: more than one library has a `Linear`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def wrapped_hint(model: nn.Module) -> str:
    """What to pass instead of a wrapper, as the end of an error message; "" for a model that is none."""
    children = list(model._modules)
    if children == ["_orig_mod"]:
        return "; it is what torch.compile made: pass the model inside it, model._orig_mod"
    if children in (["module"], ["model"]):  # of DistributedDataParallel, of timm's FeatureGetterNet
        return f"; it wraps another model: pass that, model.{children[0]}"
    if hasattr(model, "merge_and_unload"):
        return "; it has adapters: pass what model.merge_and_unload() returns"
    return ""


# Forward hooks that leave outputs as they are.
HARMLESS_HOOKS: set[Callable] = set()


def refuse_changed_behaviour(model: nn.Module) -> None:
    """Refuse what a module does beyond its class and tensors: a cut, a file and a packed model forget it.

    Raises:
        UnsupportedModelError: a method was replaced, there is a forward hook, or a tensor is parametrised;
            the message names it.
    """
    for name, module in model.named_modules():
        where = name or "model"
        _refuse_parametrised(where, module)
        _refuse_replaced_methods(where, module)
        for kind, hooks in (("pre-hook", module._forward_pre_hooks), ("hook", module._forward_hooks)):
            for hook in hooks.values():
                if hook in HARMLESS_HOOKS:
                    continue
                raise UnsupportedModelError(
                    f"{where}: it has a forward {kind}, {_described(hook)}, which gates, a cut or a file "
                    f"would forget; {_how_to_remove(hook)}"
                )


def _refuse_parametrised(where: str, module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    for tensor, by in module.parametrizations.items():
        names = ", ".join(type(p).__name__ for p in by)
        raise UnsupportedModelError(
            f"{where}.{tensor} is parametrised by {names}, which gates, a cut or a file would forget; "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}) keeps its present value"
        )


def _refuse_replaced_methods(where: str, module: nn.Module) -> None:
    cls = type(module)
    for attribute, value in vars(module).items():
        plain = getattr(cls, attribute, None)
        # What model.compile() leaves computes the same; so does a method of the class that was bound anew.
        if plain is None or not callable(value) or getattr(value, "__func__", None) is plain:
            continue
        raise UnsupportedModelError(
            f"{where}.{attribute} was replaced by {_described(value)}, which gates, a cut or a file would "
            f"forget; remove it with del module.{attribute}, and replace that of the compact model instead"
        )
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is not None and getattr(forward, "__module__", base.__module__) != base.__module__:
            raise UnsupportedModelError(
                f"{where}: {base.__module__}.{base.__name__}.forward was replaced by {_described(forward)}, "
                "which a cut would forget; undo it, and replace that of the compact model instead"
            )


def _described(function: object) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{name}"


def _how_to_remove(hook: object) -> str:
    if isinstance(hook, BasePruningMethod):
        return "torch.nn.utils.prune.remove(module, 'weight') makes its zeros permanent"
    if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
        return "torch.nn.utils.remove_weight_norm(module), or remove_spectral_norm, keeps the present weight"
    return "remove it with handle.remove(), and register it on the compact model instead"


def _refuse_other_parts(model: nn.Module) -> None:
    if len(model.blocks) == 0:
        raise UnsupportedModelError("model.blocks is empty: there is nothing to gate")
    if type(model.patch_embed) is not PatchEmbed:
        raise UnsupportedModelError(f"patch_embed: {type(model.patch_embed).__name__}, expected PatchEmbed")
    owners: dict[int, str] = {}
    for i, block in enumerate(model.blocks):
        for name in ("attn", "mlp"):
            part = getattr(block, name, None)
            first = owners.setdefault(id(part), f"blocks.{i}.{name}")
            if part is not None and first != f"blocks.{i}.{name}":
                raise UnsupportedModelError(
                    f"blocks.{i}.{name} is the same module as {first}: a cut gives each widths of its own"
                )
    is_eva = isinstance(model, Eva)
    if is_eva and model.rope is not None and type(model.rope) not in ROTARY.values():
        known = ", ".join(kind.__name__ for kind in ROTARY.values())
        raise UnsupportedModelError(f"rope: {type(model.rope).__name__} is not supported, expected {known}")
    for i, block in enumerate(model.blocks):
        expected = EvaBlock if is_eva else Block
        if type(block) is not expected:
            raise UnsupportedModelError(
                f"blocks.{i}: {type(block).__name__} is not supported, expected timm's pre-norm "
                f"{expected.__name__}"
            )
        _refuse_other_attention(f"blocks.{i}.attn", block.attn, is_eva)
        _refuse_other_mlp(f"blocks.{i}.mlp", block.mlp)
        for branch in ("attn", "mlp"):
            owner = getattr(block, branch)
            for name, linear in owner.named_children():
                if name not in _LINEARS:
                    continue
                if type(linear) is not nn.Linear and not hasattr(linear, "gate"):
                    raise UnsupportedModelError(
                        f"blocks.{i}.{branch}.{name}: {class_name(linear)} is not supported, expected "
                        "nn.Linear; gates, statistics and cuts come before quantization and adapters"
                    )
        inside = {f"{b}.norm": getattr(block, b).norm for b in ("attn", "mlp")}
        inside = {name: norm for name, norm in inside.items() if not isinstance(norm, nn.Identity)}
        for name, norm in {"norm1": block.norm1, "norm2": block.norm2, **inside}.items():
            if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine or norm.bias is None:
                raise UnsupportedModelError(
                    f"blocks.{i}.{name}: {norm} is not supported, expected LayerNorm with weight and bias"
                )
        if is_eva and (block.gamma_1 is None) != (block.gamma_2 is None):
            raise UnsupportedModelError(
                f"blocks.{i}.gamma_2: a LayerScale of attention alone is not supported"
            )


# What linear layers of a block may be called: `vtp.model.eva.with_fused_sites` joins some of them.
_LINEARS = frozenset(
    {"qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc1_g", "fc1_x", "fc2"},
)


def _refuse_other_attention(where: str, attn: nn.Module, is_eva: bool) -> None:
    expected = (EvaAttention, AttentionRope) if is_eva else (Attention,)
    if type(attn) not in expected:
        names = " or ".join(kind.__name__ for kind in expected)
        raise UnsupportedModelError(
            f"{where}: {type(attn).__name__} is not supported, expected timm's {names}"
        )
    if getattr(attn, "gate", None) is not None:
        raise UnsupportedModelError(f"{where}.gate: sigmoid-gated attention is not supported")
    if getattr(attn, "num_kv_groups", 1) != 1:
        raise UnsupportedModelError(
            f"{where}: grouped-query attention, where {attn.num_kv_groups} heads share keys and values, is "
            "not supported: no head could go alone"
        )
    for name in ("q_norm", "k_norm"):
        norm = getattr(attn, name)
        if not isinstance(norm, (nn.Identity, nn.LayerNorm)):
            raise UnsupportedModelError(
                f"{where}.{name}: {norm} is not supported, expected LayerNorm or none"
            )


def _refuse_other_mlp(where: str, mlp: nn.Module) -> None:
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise UnsupportedModelError(
            f"{where}: {type(mlp).__name__} is not supported, expected timm's Mlp, GluMlp or SwiGLU"
        )
    if isinstance(mlp, Mlp):
        return
    if type(mlp.act) is not nn.SiLU:
        raise UnsupportedModelError(f"{where}.act: {mlp.act} is not supported in a gated one, expected SiLU")
    if getattr(mlp, "gate_last", False):
        raise UnsupportedModelError(f"{where}: its last half is the gate, expected the first, as in SwiGLU")


@dataclasses.dataclass(frozen=True)
class _Rebuilt:
    """What a model that a description reproduces has.

    settings: of its parts, by owner and name. rope: those of its rotary embedding. lines: what it prints.
    shapes: of its tensors, by name.
    """

    settings: dict[tuple[str, str], Any]
    rope: dict[str, Any]
    lines: list[str]
    shapes: dict[str, torch.Size]


@lru_cache(maxsize=32)  # making gates, a plan and a cut describe one model a dozen times
def _rebuilt(architecture: Architecture, kinds: tuple[tuple[str, type], ...], printed: str) -> _Rebuilt:
    """Of the model that `architecture` describes, with layers of these classes at its sites.

    printed: the description as text, for the cache: 0 and 0.0 are equal, and a model prints them.
    """
    rebuilt, kind_of = architecture.build("meta", weight_init="skip"), dict(kinds)
    with on_meta():
        replace_sites(rebuilt, lambda name, linear: kind_of[name](**_linear_arguments(linear)))
    is_eva = architecture.eva is not None
    of_attention = _ROTARY_ATTENTION_SETTINGS if is_eva else _ATTENTION_SETTINGS
    attentions = [(f"blocks.{i}.attn", of_attention) for i in range(architecture.depth)]
    of_model = _EVA_SETTINGS if is_eva else _MODEL_SETTINGS
    return _Rebuilt(
        settings={
            (owner, setting): getattr(rebuilt.get_submodule(owner), setting)
            for owner, settings in (("", of_model), ("patch_embed", _PATCH_SETTINGS), *attentions)
            for setting in settings
        },
        rope=rotary_settings(rebuilt.rope) if is_eva else {},
        lines=repr(rebuilt).splitlines(),
        shapes={name: tensor.shape for name, tensor in rebuilt.state_dict().items()},
    )


def _check_rebuilds(model: VisionTransformer | Eva, architecture: Architecture) -> None:
    """Refuse a model that the description does not reproduce: modules, settings, tensor shapes."""
    sites = [f"blocks.{i}.{site}" for i in range(architecture.depth) for site in SITES]
    kinds = tuple((name, type(model.get_submodule(name))) for name in sites)
    rebuilt = _rebuilt(architecture, kinds, repr(architecture))
    for (owner, setting), expected in rebuilt.settings.items():
        got = getattr(model.get_submodule(owner), setting)
        if got != expected:
            where = f"{owner}.{setting}".lstrip(".")
            raise UnsupportedModelError(f"{where}: {got!r} is not supported here, expected {expected!r}")
    if architecture.eva is not None and rotary_settings(model.rope) != rebuilt.rope:
        differ = dict(rotary_settings(model.rope).items() - rebuilt.rope.items())
        raise UnsupportedModelError(f"rope: settings {differ} are not supported here")
    got_lines = repr(model).splitlines()
    if got_lines != rebuilt.lines:
        difference = [
            line
            for line in difflib.unified_diff(rebuilt.lines, got_lines, n=0, lineterm="")
            if not line.startswith(("---", "+++", "@@"))
        ]
        raise UnsupportedModelError(
            "model: it has parts that are not supported: " + " | ".join(difference[:6])
        )
    got_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if got_shapes != rebuilt.shapes:
        odd = sorted(dict(got_shapes.items() ^ rebuilt.shapes.items()))
        raise UnsupportedModelError(f"model: tensors {odd[:4]} have unexpected names or shapes")


def _linear_arguments(linear: nn.Linear) -> dict:
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }


def replace_sites(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Replace the linear layer at every site of every block by `make(name, linear)`, in place."""
    for i in range(len(model.blocks)):
        for site in SITES:
            name = f"blocks.{i}.{site}"
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(name, model.get_submodule(name)))
