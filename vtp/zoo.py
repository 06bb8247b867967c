"""Models by name: timm's with released weights, the shipped baseline, files of this package."""

from importlib import resources
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from vtp.checkpoint import load
from vtp.files import FileError
from vtp.model.architecture import Architecture, describe
from vtp.model.images import new_head, set_image_config, set_imagenet_names

FASHION_DEIT = "fashion-deit"


def fashion_deit_architecture() -> Architecture:
    """A DeiT for 28x28 grey images and ten classes: 6 blocks, width 96, 3 heads, 17 tokens."""
    return Architecture(
        distilled=False, img_size=(28, 28), patch_size=(7, 7), in_chans=1, num_classes=10,
        global_pool="token", embed_dim=96, depth=6, num_heads=3, mlp_hidden=384, qkv_bias=True,
        qk_norm=False, proj_bias=True, init_values=None, class_token=True, pos_embed="learn",
        no_embed_class=False, reg_tokens=0, pre_norm=False, final_norm=True, fc_norm=False,
        pool_include_prefix=False, dynamic_img_size=False, dynamic_img_pad=False, drop_rate=0.0,
        pos_drop_rate=0.0, patch_drop_rate=0.0, proj_drop_rate=0.0, attn_drop_rate=0.0,
        drop_path_rate=0.0, norm_eps=1e-6, act_layer=None,
    )  # fmt: skip


def open_model(
    name: str, *, from_scratch: bool = False, num_classes: int | None = None, seed: int = 0
) -> nn.Module:
    """A model by name or file, on the CPU.

    Args:
        name: "fashion-deit", a timm name, or a file that `vtp.save` wrote.
        from_scratch: new weights drawn from `seed` instead of released ones.
        num_classes: give the model a new head of so many classes; None keeps its own.

    Returns:
        The model, which says what its classes are where that is known (`vtp.model.images.class_names`).

    Raises:
        FileError: `name` is neither a file nor a model that timm knows, or the file cannot be read.
        UnsupportedModelError: the method does not support that timm model.
    """
    torch.manual_seed(seed)
    if name == FASHION_DEIT and from_scratch:
        # timm's default initialisation is made for widths of several hundred; Xavier suits a width of 96.
        model = fashion_deit_architecture().build("cpu", weight_init="jax")
    elif name == FASHION_DEIT:
        with resources.as_file(resources.files("vtp") / "baselines" / "fashion_deit.safetensors") as file:
            model = load(file)
    elif Path(name).is_file():
        if from_scratch:
            raise FileError(f"model: {name} is a file with weights, which from_scratch would throw away")
        model = load(name)
    elif timm.is_model(name):
        with torch.device("meta"):  # refuse what is not supported before its weights are fetched
            describe(timm.create_model(name))
        model = timm.create_model(name, pretrained=not from_scratch)
        if not from_scratch:
            set_imagenet_names(model)
    else:
        raise FileError(
            f"model: got {name!r}, expected {FASHION_DEIT!r}, a timm model name or a file of vtp's"
        )
    if num_classes is not None:
        new_head(model, num_classes)
    elif from_scratch:
        set_image_config(model, label_names=())
    return model


def open_teacher(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """A model to distil from, of any architecture that timm has, on the CPU, in eval mode.

    Args:
        name: as `open_model` takes it; or the name of any model of timm's, "hf-hub:OWNER/NAME" or
            "local-dir:FOLDER".
        checkpoint: a file with one's own weights for a timm name, as DeiT's or timm's training writes it, or
            plain safetensors; no pickle is executed. The number of classes is that of its classifier.

    Raises:
        FileError: there is no such model, or its weights cannot be had or read.
    """
    of_timm = timm.is_model(name) or name.startswith(("hf-hub:", "local-dir:"))
    if name == FASHION_DEIT or Path(name).is_file() or not of_timm:
        if checkpoint is not None:
            raise FileError(f"teacher: got {name!r} for the weights in {checkpoint}, expected a timm name")
        try:
            return open_model(name).eval()
        except FileError as error:
            raise FileError(f"teacher: {str(error).removeprefix('model: ')}") from error
    try:
        if checkpoint is None:
            return timm.create_model(name, pretrained=True).eval()
        weights = load_state_dict(str(checkpoint), use_ema=True, weights_only=True)
        with torch.device("meta"):
            classifier = timm.create_model(name).pretrained_cfg.get("classifier")
        head = weights.get(f"{classifier}.weight")
        model = timm.create_model(name, **({} if head is None else {"num_classes": len(head)}))
        model.load_state_dict(weights)
    except Exception as error:  # a network, a hub, a file and torch.load can fail in all ways
        what = "released weights" if checkpoint is None else f"the weights in {checkpoint}"
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"teacher: timm cannot open {name} with {what} ({type(error).__name__}: {reason})"
        ) from error
    return model.eval()
