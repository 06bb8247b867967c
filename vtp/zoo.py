"""Models by name: timm's with released weights, the shipped baseline, files of this package."""

from importlib import resources
from pathlib import Path

import timm
import torch
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
