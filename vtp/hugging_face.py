"""Vision transformers of Hugging Face's transformers, as timm models that compute the same.

    model = vtp.from_transformers(transformers.AutoModelForImageClassification.from_pretrained(name))

Checkpoints by name, `--model hf:OWNER/NAME`, are opened by `hugging_face_checkpoints.py`.
"""

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtp.model.architecture import (
    UnsupportedModelError,
    class_name,
    refuse_changed_behaviour,
    wrapped_hint,
)
from vtp.model.images import imagenet_classes, set_image_config, set_imagenet_names

PREFIX = "hf:"

__all__ = ["from_transformers"]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A class of transformers: `backbone` is where its transformer lies, "" for itself."""

    backbone: str
    make: Callable[[Any, dict[str, Tensor]], nn.Module]


def from_transformers(model: nn.Module, *, image_processor: Any = None) -> nn.Module:
    """The timm model that computes what a vision transformer of Hugging Face's transformers does.

    Outputs are equal in eval mode, for images of the size of the checkpoint (`config.image_size`), of DINOv3
    for all sizes that its patches divide. `timm_model(images)` is `model(images).logits`, or without a head
    the last hidden state of the class token; `timm_model.forward_features(images)` is `last_hidden_state`.

    | of transformers | becomes timm's |
    |---|---|
    | ViTModel, ViTForImageClassification | VisionTransformer |
    | DeiTForImageClassificationWithTeacher | VisionTransformerDistilled |
    | DeiTModel, DeiTForImageClassification | VisionTransformer, the distillation token as its register |
    | Dinov2Model, Dinov2WithRegistersModel | VisionTransformer |
    | Dinov2(WithRegisters)ForImageClassification | the same, without the head: see Warns |
    | DINOv3ViTModel | Eva, as `vit_*_patch16_dinov3` |

    Mask tokens are left out, which only masked images use. So are dropout, stochastic depth and the shifts of
    DINOv3's coordinates, which only training uses: the drop rates of the timm model are 0.

    Args:
        model: of one of these classes, with weights of floating point on one device. It is not changed.
        image_processor: the checkpoint's, from `AutoImageProcessor.from_pretrained`, which says how images
            are resized, cropped and normalised, in `pretrained_cfg`; None leaves that open.

    Returns:
        A model with memory of its own, of the same dtype, on the same device and in the same mode. Its
        `pretrained_cfg` names where it comes from, and the classes where `config.id2label` does.

    Warns:
        UserWarning: an output of `model` has no counterpart: the pooler of ViTModel and DeiTModel, and the
            head of the classifiers of DINOv2, which reads the class token and the mean of the patch tokens
            side by side, as none of timm's does. The message says how to compute it from the timm model's.

    Raises:
        UnsupportedModelError: another class, or a model that computes something that its timm model does
            not: activations that timm does not have, hooks, adapters, quantized layers, biases of rotated
            keys, changed modules; the message names the part.
        TypeError: `image_processor` is none of images.
    """
    kind = KINDS.get(type(model).__name__)
    if kind is None or not type(model).__module__.startswith("transformers.models."):
        raise UnsupportedModelError(
            f"model: got {class_name(model)}, expected one of transformers' {', '.join(KINDS)}"
            f"{wrapped_hint(model)}"
        )
    _refuse_changes(model)
    config = model.config
    if not config.num_hidden_layers:
        raise UnsupportedModelError("config.num_hidden_layers: got 0, expected at least 1")
    made = kind.make(config, _canonical(model, kind.backbone))
    _warn_of_what_is_left_out(model)
    made.train(model.training)
    _describe(made, config, image_processor)
    return made


# --------------------------------------------------------------------------------
# What is refused


def _refuse_changes(model: nn.Module) -> None:
    """Refuse what class and config do not say of a model, as its timm model would not have it."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "model: it is quantized (config.quantization_config); expected weights of floating point: load "
            "the checkpoint that it was made from"
        )
    refuse_changed_behaviour(_without_hooks_of_transformers(model))
    for name, tensor in model.state_dict().items():
        if type(tensor) is not Tensor or not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"model: {name} is {type(tensor).__name__} of {tensor.dtype}, expected a plain tensor of "
                "floating point; quantize after pruning"
            )
    with torch.device("meta"), quiet():
        plain = type(model)(copy.deepcopy(model.config), **_options(model))
    parts, expected = ({n: _outline(m) for n, m in each.named_modules()} for each in (model, plain))
    for name in sorted(parts.keys() | expected.keys()):
        if parts.get(name) != expected.get(name):
            raise UnsupportedModelError(
                f"{name or 'model'}: got {parts.get(name)}, expected {expected.get(name)} as in a new "
                f"{type(model).__name__} of model.config; adapters have to be merged "
                "(model.merge_and_unload()), and layers must not be replaced or quantized"
            )


def _outline(module: nn.Module) -> str:
    """A module without those inside it: its class, how it is printed, and its numbers, as scaling is one.
    Only training drops."""
    if isinstance(module, nn.Dropout):
        return class_name(module)
    printed = module.extra_repr()
    numbers = [
        f"{name}={value}"
        for name, value in vars(module).items()
        if type(value) in (int, float) and "drop" not in name and f"{name}={value}" not in printed
    ]
    return f"{class_name(module)}({', '.join([*filter(None, [printed]), *numbers])})"


def _options(model: nn.Module) -> dict[str, bool]:
    """Arguments of a class beside its config, as they were for this model."""
    if type(model).__name__ not in ("ViTModel", "DeiTModel"):
        return {}
    return {
        "add_pooling_layer": model.pooler is not None,
        "use_mask_token": model.embeddings.mask_token is not None,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and reports: what matters in them is checked."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _without_hooks_of_transformers(module: nn.Module) -> nn.Module:
    """The same modules without the hooks that `output_hidden_states=True` leaves: these only look on."""
    same = object.__new__(type(module))
    vars(same).update(vars(module))
    vars(same)["_modules"] = {
        name: child if child is None else _without_hooks_of_transformers(child)
        for name, child in module._modules.items()
    }
    vars(same)["_forward_hooks"] = {
        key: hook
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    }
    return same


def _warn_of_what_is_left_out(model: nn.Module) -> None:
    name = type(model).__name__
    if getattr(model, "pooler", None) is not None:
        warnings.warn(
            f"{name}: its pooler was left out, as timm has none; what it computes is "
            "model.pooler(timm_model.forward_features(images))",
            stacklevel=3,
        )
    if name in ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"):
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        warnings.warn(
            f"{name}: its head was left out, and outputs are features: it reads the class token and the mean "
            "of the patch tokens side by side, as no head of timm's does. With f = "
            "timm_model.forward_features(images) its logits are model.classifier(torch.cat([f[:, 0], "
            f"f[:, {prefix}:].mean(1)], dim=1))",
            stacklevel=3,
        )


# --------------------------------------------------------------------------------
# Tensors, by names that all versions of transformers share

_BLOCK = re.compile(r"(?:encoder\.layer|model\.layer|layers|layer)\.(\d+)\.(.+)")
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layer_scale1.lambda1": "scale1",
    "layer_scale2.lambda1": "scale2",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.o_proj": "proj",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "proj",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp.weights_in": "fc1",  # gate and input, one behind the other
    "mlp.weights_out": "fc2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "fc2",
}
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.mask_token": None,  # used only with bool_masked_pos
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "norm": "norm",
    "pooler.dense": None,
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


def _canonical(model: nn.Module, backbone: str) -> dict[str, Tensor]:
    """The tensors of a model as `blocks.<i>.<part>` with the parts of `_IN_BLOCK`, and timm's names outside
    of the blocks. Raises UnsupportedModelError where there are others."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        own = name.removeprefix(f"{backbone}.") if backbone else name
        block = _BLOCK.fullmatch(own)
        part, leaf = block[2] if block else own, ""
        if part.endswith((".weight", ".bias")):
            part, _, leaf = part.rpartition(".")
        names = _IN_BLOCK if block else _OUTSIDE
        if part not in names:
            raise UnsupportedModelError(
                f"model: {name} is no known part of {type(model).__name__}: is this transformers newer?"
            )
        if names[part] is not None and tensor.numel():  # registers may be none
            where = f"blocks.{block[1]}." if block else ""
            found[f"{where}{names[part]}{'.' if leaf else ''}{leaf}"] = tensor
    return found


# --------------------------------------------------------------------------------
# timm's models

# transformers' activations, by the names that timm has for them. What is not here has no equal in timm:
# gelu_fast rounds the constants of gelu_new, gelu_10 clips.
_ACTIVATIONS = {
    "gelu": None,
    "gelu_python": None,
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _vision_transformer(
    config: Any,
    tensors: dict[str, Tensor],
    *,
    cls: type = VisionTransformer,
    no_embed_class: bool = False,
) -> nn.Module:
    gated = getattr(config, "use_swiglu_ffn", False)
    if not gated and config.hidden_act not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.hidden_act: timm has no {config.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    state = _plain_parts(config, tensors, "ls1.gamma", "ls2.gamma")
    for i in range(config.num_hidden_layers):
        for leaf in ("weight", "bias"):
            _join(state, f"blocks.{i}.attn.qkv.{leaf}", tensors, [f"blocks.{i}.{p}.{leaf}" for p in "qkv"])
            halves = [f"blocks.{i}.{part}.{leaf}" for part in ("gate", "up")]
            _join(state, f"blocks.{i}.mlp.fc1.{leaf}", tensors, halves)
    kwargs = {
        **_common(config, tensors, hidden=len(state["blocks.0.mlp.fc1.weight"])),
        "qkv_bias": "blocks.0.q.bias" in tensors,
        "act_layer": nn.SiLU if gated else _ACTIVATIONS[config.hidden_act],
        "init_values": (config.layerscale_value or 1.0) if "blocks.0.scale1" in tensors else None,
        "reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "no_embed_class": no_embed_class,
        "weight_init": "skip",
    }
    if gated:
        kwargs["mlp_layer"] = SwiGLUPacked
    return _filled(partial(cls, **kwargs), state)


def _deit(config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """A DeiT whose distillation token no head reads: it is one register, with a position."""
    names = {"dist_token": "reg_token"}
    return _vision_transformer(config, {names.get(name, name): tensor for name, tensor in tensors.items()})


def _dinov2(config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    height, width = _pair(config.image_size)
    if height != width:
        raise UnsupportedModelError(
            f"config.image_size: got {(height, width)}; transformers resamples the positions of a DINOv2 "
            "whose images are not square from a square grid, which they do not have: expected a square"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if registers := "reg_token" in tensors:  # which have no positions; then no prefix token of timm's has
        of_class, of_patches = tensors["pos_embed"].tensor_split([1], dim=1)
        tensors |= {"cls_token": tensors["cls_token"] + of_class, "pos_embed": of_patches}
    return _vision_transformer(config, tensors, no_embed_class=registers)


def _dinov3(config: Any, tensors: dict[str, Tensor]) -> nn.Module:
    gated = config.use_gated_mlp
    if config.hidden_act != ("silu" if gated else "gelu"):
        kind, own = ("gated", "silu") if gated else ("plain", "gelu")
        raise UnsupportedModelError(
            f"config.hidden_act: got {config.hidden_act!r}, expected {own!r}, which the {kind} MLP of timm's "
            "Eva computes"
        )
    state = _plain_parts(config, tensors, "gamma_1", "gamma_2")
    qkv_bias = any(f"blocks.0.{part}.bias" in tensors for part in "qv")
    for i in range(config.num_hidden_layers):
        name = f"blocks.{i}"
        key_bias = tensors.get(f"{name}.k.bias")
        if key_bias is not None and not key_bias.is_meta and key_bias.any():
            raise UnsupportedModelError(
                f"{name}.attention.k_proj.bias is not zero (config.key_bias): timm's Eva has no bias of keys "
                "that are rotated, and the softmax does not cancel it"
            )
        _join(state, f"{name}.attn.qkv.weight", tensors, [f"{name}.{part}.weight" for part in "qkv"])
        # timm's layers have a bias where one of these may have none: zeros.
        biases = {"proj": "attn.proj.bias", "fc2": "mlp.fc2.bias"}
        biases |= {"q": "attn.q_bias", "v": "attn.v_bias"} if qkv_bias else {}
        for part, layer in ({"gate": "fc1_g", "up": "fc1_x"} if gated else {"up": "fc1"}).items():
            state[f"{name}.mlp.{layer}.weight"] = tensors[f"{name}.{part}.weight"]
            biases[part] = f"mlp.{layer}.bias"
        for part, bias in biases.items():
            weight = tensors[f"{name}.{part}.weight"]
            state[f"{name}.{bias}"] = tensors.get(f"{name}.{part}.bias", weight.new_zeros(len(weight)))
    kwargs = {
        **_common(config, tensors, hidden=len(tensors["blocks.0.up.weight"])),
        "qkv_bias": qkv_bias,
        "init_values": config.layerscale_value,
        "swiglu_mlp": gated,
        "swiglu_align_to": 1,  # the gate by itself, as in timm's DINOv3, and of any width
        "num_reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": config.rope_theta,
        "rope_rotate_half": True,
        "use_fc_norm": False,
        "dynamic_img_size": True,
    }
    return _filled(partial(Eva, **kwargs), state)


def _common(config: Any, tensors: dict[str, Tensor], *, hidden: int) -> dict[str, Any]:
    """Arguments that all of timm's classes take; `hidden`: width of the MLP, as they count it."""
    dim, head = config.hidden_size, tensors.get("head.weight")
    return {
        "img_size": _pair(config.image_size),
        "patch_size": _pair(config.patch_size),
        "in_chans": config.num_channels,
        "num_classes": 0 if head is None else len(head),
        "global_pool": "token",
        "embed_dim": dim,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        # timm takes int(dim * mlp_ratio); the half keeps the product above the integer it must reach.
        "mlp_ratio": (hidden + 0.5) / dim,
        "norm_layer": partial(LayerNorm, eps=config.layer_norm_eps),
    }


def _plain_parts(config: Any, tensors: dict[str, Tensor], scale1: str, scale2: str) -> dict[str, Tensor]:
    """By timm's names all tensors but queries, keys, values, gates and what they gate."""
    names = {"proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "scale1": scale1, "scale2": scale2}
    dim, state = config.hidden_size, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blocks\.(\d+)\.([a-z0-9]+)(.*)", name)
        if found is None:
            state[name] = tensor
            continue
        block, part, leaf = found.groups()
        if part in "qkv" and leaf == ".weight" and tensor.shape != (dim, dim):
            raise UnsupportedModelError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {(dim, dim)}: heads were removed, or "
                "have another width than hidden_size / num_attention_heads"
            )
        if part not in ("q", "k", "v", "gate", "up"):
            state[f"blocks.{block}.{names.get(part, part)}{leaf}"] = tensor
    return state


def _filled(make: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """A timm model with copies of these tensors, all of them and nothing else."""
    one = state["patch_embed.proj.weight"]
    with torch.device("meta"):
        model = make().to(one.dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != expected:
        odd = sorted(dict(got.items() ^ expected.items()))
        raise UnsupportedModelError(
            f"model: the tensors of timm's {type(model).__name__} differ from those given in {odd[:4]}"
        )
    model.to_empty(device=one.device)
    for module in model.modules():  # what is computed and not stored, as rotations
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    model.load_state_dict(state)
    return model


def _join(state: dict[str, Tensor], name: str, tensors: dict[str, Tensor], parts: list[str]) -> None:
    """Put `parts`, one behind the other, into `state` as `name`, where there are any."""
    if found := [tensors[part] for part in parts if part in tensors]:
        state[name] = torch.cat(found)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


KINDS = {
    "ViTModel": _Kind("", _vision_transformer),
    "ViTForImageClassification": _Kind("vit", _vision_transformer),
    "DeiTModel": _Kind("", _deit),
    "DeiTForImageClassification": _Kind("deit", _deit),
    "DeiTForImageClassificationWithTeacher": _Kind(
        "deit", partial(_vision_transformer, cls=VisionTransformerDistilled)
    ),
    "Dinov2Model": _Kind("", _dinov2),
    "Dinov2ForImageClassification": _Kind("dinov2", _dinov2),
    "Dinov2WithRegistersModel": _Kind("", _dinov2),
    "Dinov2WithRegistersForImageClassification": _Kind("dinov2_with_registers", _dinov2),
    "DINOv3ViTModel": _Kind("", _dinov3),
}


# --------------------------------------------------------------------------------
# What the model says of its images and classes


def _describe(model: nn.Module, config: Any, image_processor: Any) -> None:
    name = str(getattr(config, "_name_or_path", "") or "")
    fields: dict[str, Any] = {
        "architecture": source_of(name) if name else f"transformers.{config.model_type}",
        "num_classes": model.num_classes,
        "classifier": ("head", "head_dist") if isinstance(model, VisionTransformerDistilled) else "head",
        "first_conv": "patch_embed.proj",
    }
    if image_processor is not None:
        embed = model.patch_embed
        fields |= _image_fields(image_processor, embed.proj.in_channels, embed.img_size)
    set_image_config(model, **fields)
    labels = _labels(config, model.num_classes)
    if labels is not None and _are_of_imagenet(model, labels):
        set_imagenet_names(model)
    elif labels is not None:
        set_image_config(model, label_names=labels)


def source_of(name: str) -> str:
    """What files say that a model is from: of a folder its name, and not where it lies."""
    return f"{PREFIX}{Path(name).resolve().name if Path(name).is_dir() else name}"


def _labels(config: Any, num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes in the order of the outputs; None for those that transformers makes up."""
    named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
    if not num_classes or set(named) != set(range(num_classes)):
        return None
    labels = tuple(named[index] for index in range(num_classes))
    return None if labels == tuple(f"LABEL_{index}" for index in range(num_classes)) else labels


def _are_of_imagenet(model: nn.Module, labels: tuple[str, ...]) -> bool:
    """Whether the labels are ImageNet's in words and in its order, which data sets name by synset. A few may
    be written otherwise."""
    synsets = imagenet_classes(model)
    if synsets is None:
        return False
    subset = infer_imagenet_subset({"num_classes": model.num_classes})
    words = ImageNetInfo(subset).label_descriptions(as_dict=True)
    same = sum(label in (synset, words.get(synset)) for label, synset in zip(labels, synsets, strict=True))
    return same >= 0.9 * len(labels)


_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


def _image_fields(processor: Any, channels: int, img_size: tuple[int, int]) -> dict[str, Any]:
    """An image processor's settings as `timm.data.create_transform` has them."""
    needed = ["do_rescale", "do_normalize", "do_resize"]
    needed += ["image_mean", "image_std"] if getattr(processor, "do_normalize", False) else []
    if missing := [name for name in needed if getattr(processor, name, None) is None]:
        raise TypeError(
            f"image_processor: got {type(processor).__name__} without {', '.join(missing)}, expected what "
            "AutoImageProcessor.from_pretrained gives for an image classifier"
        )
    fields: dict[str, Any] = {}
    # timm takes pixels as 0..1, a processor as they come from rescale_factor.
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    for name, values in (("mean", mean), ("std", std)):
        each = [values] * channels if isinstance(values, (int, float)) else values
        fields[name] = tuple(float(value) / scale for value in each)
    if not processor.do_resize:
        return fields
    resample = getattr(processor, "resample", None)
    if resample in _INTERPOLATIONS:
        fields["interpolation"] = _INTERPOLATIONS[resample]
    size = _edges(processor.size)
    fields["crop_mode"] = "center" if "shortest_edge" in size else "squash"
    fields["crop_pct"] = 1.0
    if getattr(processor, "do_center_crop", False):
        crop, edge = _edges(processor.crop_size).get("height"), size.get("shortest_edge", size.get("height"))
        if crop and edge and crop < edge:
            fields["crop_pct"] = _crop_pct(crop, edge, max(img_size))
    return fields


def _edges(size: Any) -> dict[str, int]:
    """What is set of a processor's size: shortest_edge, or height and width."""
    names = ("shortest_edge", "height", "width")
    if isinstance(size, int):
        return {"shortest_edge": size}
    get = size.get if isinstance(size, dict) else partial(getattr, size)
    return {name: value for name in names if (value := get(name, None)) is not None}


def _crop_pct(crop: int, edge: int, img_size: int) -> float:
    """The share of an image that is kept; timm then resizes to floor(img_size / share)."""
    share = crop / edge
    wanted = round(img_size * edge / crop)
    return share if math.floor(img_size / share) == wanted else img_size / (wanted + 0.5)
