"""Which timm vision transformer a model is: described as plain data, rebuilt from it, or refused by name.

Everything the method needs to know about a model (widths, heads, tokens, biases, where norms stand) is
in one immutable `Architecture`. A description is accepted only if the model rebuilt from it has the same
modules, settings and tensors, so a variant that is not understood is refused instead of mangled.
"""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale, PatchEmbed, get_act_layer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from vtp.model.widths import SITES, BlockWidths


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
_ATTENTION_SETTINGS = ("num_heads", "head_dim", "scale")
_PATCH_SETTINGS = ("img_size", "patch_size", "flatten", "output_fmt", "strict_img_size", "dynamic_img_pad")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A timm `VisionTransformer` as data. Field names are timm's where timm has the argument.

    Attributes that are not timm's: `distilled` (DeiT's second token and head), `mlp_hidden` (fc1 outputs),
    `norm_eps`, `act_layer` (a name, or None for timm's default, `nn.GELU`).
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
        return patches + int(self.class_token) + int(self.distilled) + self.reg_tokens

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
        kwargs = dataclasses.asdict(self)
        for name in ("distilled", "mlp_hidden", "norm_eps"):
            kwargs.pop(name)
        # timm takes int(embed_dim * mlp_ratio); the half keeps the product above the integer it must reach.
        kwargs["mlp_ratio"] = (self.mlp_hidden + 0.5) / self.embed_dim
        kwargs["norm_layer"] = partial(LayerNorm, eps=self.norm_eps)
        return kwargs

    def build(self, device: str | torch.device = "cpu", weight_init: str = "") -> VisionTransformer:
        """The dense timm model with new weights on `device` ("meta" makes one without storage)."""
        cls = VisionTransformerDistilled if self.distilled else VisionTransformer
        with torch.device(device):
            return cls(**self.timm_kwargs(), weight_init=weight_init)

    @classmethod
    def from_dict(cls, fields: dict) -> "Architecture":
        """The inverse of `dataclasses.asdict`, from parsed JSON.

        Raises:
            ValueError: fields are missing, unknown or of another type, or describe no model.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            odd = sorted(set(fields) ^ expected)
            raise ValueError(f"architecture: fields {odd} are missing or unknown")
        for field in dataclasses.fields(cls):
            if not _is_of_type(fields[field.name], field.type):
                kind = getattr(field.type, "__name__", field.type)
                raise ValueError(f"architecture.{field.name}: got {fields[field.name]!r}, expected {kind}")
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


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value parsed from JSON can be that of a field annotated with `kind`."""
    if kind == tuple[int, int]:
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        return pair and all(type(size) is int and size > 0 for size in value)
    if type(value) is int and kind is not int:
        value = float(value)  # 0 is as good as 0.0
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def describe(model: nn.Module) -> Architecture:
    """Describe a dense or gated timm VisionTransformer.

    Raises:
        UnsupportedModelError: naming the part that is not supported and why.
    """
    _refuse_other_classes(model)
    refuse_changed_behaviour(model)
    _refuse_other_parts(model)
    architecture = Architecture(**describe_surroundings(model), **_describe_blocks(model))
    _check_rebuilds(model, architecture)
    return architecture


def describe_surroundings(model: VisionTransformer) -> dict:
    """The fields of `Architecture` outside the blocks, read from the live model.

    Works on a compact model too, whose head or input size may have been changed since the cut.
    """
    patch = model.patch_embed
    if patch.img_size is None:
        raise UnsupportedModelError("patch_embed.img_size is None: give the model an image size")
    return {
        "distilled": isinstance(model, VisionTransformerDistilled),
        "img_size": tuple(patch.img_size),
        "patch_size": tuple(patch.patch_size),
        "in_chans": patch.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": patch.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
    }


def _describe_blocks(model: VisionTransformer) -> dict:
    """The fields of `Architecture` that all blocks share, read from the first (drop path: from the last)."""
    block = model.blocks[0]
    attn, mlp = block.attn, block.mlp
    last_drop_path = model.blocks[-1].drop_path1
    return {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_hidden": mlp.fc1.out_features,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": float(block.ls1.init_values) if isinstance(block.ls1, LayerScale) else None,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": last_drop_path.drop_prob if isinstance(last_drop_path, DropPath) else 0.0,
        "norm_eps": block.norm1.eps,
        "act_layer": _activation_name(mlp.act),
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
    if cls in (VisionTransformer, VisionTransformerDistilled):
        return
    name = class_name(model)
    expected = (
        "timm's VisionTransformer or VisionTransformerDistilled (DeiT, DeiT-III, ViT, DINOv2 and their kin)"
    )
    if not isinstance(model, VisionTransformer):
        hint = wrapped_hint(model)
        if name.startswith("vtp."):
            hint = "; it is packed for inference: take the compact model that it was made from"
        raise UnsupportedModelError(f"model: got {name}, expected {expected}{hint}")
    if hasattr(model, "plan"):
        raise UnsupportedModelError(
            f"model: got {name}, which is cut already, expected a dense model; vtp.expand(model) is one that "
            "computes the same, to gate, calibrate or cut again"
        )
    own = sorted({attribute for c in cls.__mro__ for attribute in _methods(c) if c.__module__ not in _OWNERS})
    raise UnsupportedModelError(
        f"model: got {name}, a subclass of timm's VisionTransformer that overrides "
        f"{', '.join(own) or 'nothing'}; a cut would not keep that class. Make timm's own model with the "
        "same arguments (global_pool='avg' for one that takes the mean over patches and then a norm), give "
        "it the weights with plain.load_state_dict(model.state_dict()), see that its outputs are the same, "
        "and pass it"
    )


_OWNERS = (
    VisionTransformer.__module__,
    VisionTransformerDistilled.__module__,
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
    if children == ["module"]:
        return "; it wraps another model: pass that, model.module"
    if hasattr(model, "merge_and_unload"):
        return "; it has adapters: pass what model.merge_and_unload() returns"
    return ""


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
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise UnsupportedModelError(
                f"blocks.{i}: {type(block).__name__} is not supported, expected timm's pre-norm Block"
            )
        if type(block.attn) is not Attention:
            raise UnsupportedModelError(
                f"blocks.{i}.attn: {type(block.attn).__name__} is not supported, expected timm's Attention"
            )
        if getattr(block.attn, "gate", None) is not None:
            raise UnsupportedModelError(f"blocks.{i}.attn.gate: sigmoid-gated attention is not supported")
        if not isinstance(block.attn.norm, nn.Identity) or not isinstance(block.mlp.norm, nn.Identity):
            raise UnsupportedModelError(
                f"blocks.{i}: a norm between attention and proj, or between fc1 and fc2, is not supported: "
                "its statistics would change with every removed dimension"
            )
        if type(block.mlp) is not Mlp:
            raise UnsupportedModelError(
                f"blocks.{i}.mlp: {type(block.mlp).__name__} is not supported, expected Mlp: a gated MLP "
                "(SwiGLU) has two hidden projections to cut together, which the plan does not describe"
            )
        for site in SITES:
            linear = block.get_submodule(site)
            if type(linear) is not nn.Linear and not hasattr(linear, "gate"):
                raise UnsupportedModelError(
                    f"blocks.{i}.{site}: {class_name(linear)} is not supported, expected nn.Linear; gates, "
                    "statistics and cuts come before quantization and adapters"
                )
        for name in ("norm1", "norm2"):
            norm = getattr(block, name)
            if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine or norm.bias is None:
                raise UnsupportedModelError(
                    f"blocks.{i}.{name}: {norm} is not supported, expected LayerNorm with weight and bias"
                )


def _check_rebuilds(model: VisionTransformer, architecture: Architecture) -> None:
    """Refuse a model that the description does not reproduce: modules, settings, tensor shapes."""
    rebuilt = architecture.build("meta", weight_init="skip")
    with torch.device("meta"):
        replace_sites(
            rebuilt, lambda name, linear: type(model.get_submodule(name))(**_linear_arguments(linear))
        )
    attentions = [(f"blocks.{i}.attn", _ATTENTION_SETTINGS) for i in range(architecture.depth)]
    for owner, settings in (("", _MODEL_SETTINGS), ("patch_embed", _PATCH_SETTINGS), *attentions):
        for setting in settings:
            got = getattr(model.get_submodule(owner), setting)
            expected = getattr(rebuilt.get_submodule(owner), setting)
            if got != expected:
                where = f"{owner}.{setting}".lstrip(".")
                raise UnsupportedModelError(f"{where}: {got!r} is not supported here, expected {expected!r}")
    got_lines, expected_lines = repr(model).splitlines(), repr(rebuilt).splitlines()
    if got_lines != expected_lines:
        difference = [
            line
            for line in difflib.unified_diff(expected_lines, got_lines, n=0, lineterm="")
            if not line.startswith(("---", "+++", "@@"))
        ]
        raise UnsupportedModelError(
            "model: it has parts that are not supported: " + " | ".join(difference[:6])
        )
    got_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected_shapes = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    if got_shapes != expected_shapes:
        odd = sorted(dict(got_shapes.items() ^ expected_shapes.items()))
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
