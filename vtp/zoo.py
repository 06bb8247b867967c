"""Models by name: timm's with released weights or one's own, the shipped baseline, files of this package."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vtp.checkpoint import load
from vtp.choices import FASHION_DEIT
from vtp.files import FileError
from vtp.hugging_face import PREFIX
from vtp.hugging_face_checkpoints import open_transformers, without_weights
from vtp.kinds import MODELS, RUN, kind_of, refuse_other_kinds
from vtp.model.architecture import Architecture, describe
from vtp.model.images import new_head, set_image_config, set_imagenet_names
from vtp.pruning.compact import CompactModel
from vtp.weights import load_weights, model_arguments, read_weights


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
    name: str,
    *,
    from_scratch: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """A model by name or file, on the CPU.

    Args:
        name: "fashion-deit"; a file that `vtp.save` wrote; or one of timm's names: of its registry, with or
            without a tag, such a name behind "timm/", "hf-hub:OWNER/NAME" or "local-dir:FOLDER", also of what
            `vtp.save_pretrained` wrote; or "hf:OWNER/NAME" or "hf:FOLDER" of Hugging Face's transformers, see
            `vtp.from_transformers`.
        from_scratch: new weights drawn from `seed` instead of released ones.
        num_classes: give the model a new head of so many classes; None keeps its own.
        checkpoint: a file with weights for a model of timm's name, see `vtp.weights`: of DeiT's or timm's
            training, or plain safetensors. Number of classes, channels, patch and image size are its own.

    Returns:
        The model, which says what its classes are where that is known (`vtp.model.images.class_names`).

    Raises:
        FileError: `name` is neither a file nor a model that timm or transformers knows, or has no such
            weights, or a file cannot be read or holds another model.
        UnsupportedModelError: the method does not support that model.
    """
    torch.manual_seed(seed)
    complete = name == FASHION_DEIT or name.startswith(PREFIX) or Path(name).is_file()
    if checkpoint is not None and (from_scratch or complete):
        other = "from_scratch" if from_scratch else f"the model {name}, which has weights"
        raise FileError(
            f"checkpoint: got {checkpoint} and {other}; expected the name of its timm model alone"
        )
    if name == FASHION_DEIT and from_scratch:
        # timm's default initialisation is made for widths of several hundred; Xavier suits a width of 96.
        model = fashion_deit_architecture().build("cpu", weight_init="jax")
    elif name == FASHION_DEIT:
        with resources.as_file(resources.files("vtp") / "baselines" / "fashion_deit.safetensors") as file:
            model = load(file)
    elif Path(name).is_file():
        if from_scratch:
            raise FileError(f"model: {name} is a file with weights, which from_scratch would throw away")
        model = _load(name)
    elif name.startswith(PREFIX):
        source = name.removeprefix(PREFIX)
        describe(without_weights(source))  # refuse what is not supported before weights are read
        model = open_transformers(source, from_scratch=from_scratch)
    else:
        model = _open_timm(name, pretrained=not from_scratch, checkpoint=checkpoint)
        if not from_scratch and checkpoint is None and ":" not in timm_name(name):
            set_imagenet_names(model)
    if num_classes is not None:
        new_head(model, num_classes)
    elif from_scratch or checkpoint is not None:
        set_image_config(model, label_names=())
    return model


def open_without_weights(name: str) -> nn.Module:
    """The model of a name as `open_model` takes it, but for files of ours, on the meta device: of a hub its
    config alone is fetched, so that one of transformers does not say how its images are normalised.

    Raises:
        FileError, UnsupportedModelError: as `open_model` does.
    """
    if name == FASHION_DEIT:
        return open_model(name).to("meta")
    if name.startswith(PREFIX):
        return without_weights(name.removeprefix(PREFIX))
    own = timm_name(name)
    with torch.device("meta"):
        model = _create(own)
    if not isinstance(model, CompactModel):
        describe(model)
    if ":" not in own:
        set_imagenet_names(model)
    return model


def open_teacher(name: str, checkpoint: str | Path | None = None) -> nn.Module:
    """A model to distil from, of any architecture that timm has, on the CPU, in eval mode.

    Args:
        name: as `open_model` takes it, behind "hf:" any model of `vtp.from_transformers`; or the name of any
            model of timm's, "hf-hub:OWNER/NAME" or "local-dir:FOLDER".
        checkpoint: a file with one's own weights for a timm name, as DeiT's or timm's training writes it, or
            plain safetensors; no pickle is executed. The number of classes is that of its classifier.

    Raises:
        FileError: there is no such model, or its weights cannot be had or read.
    """
    bare = name.removeprefix("timm/")
    of_timm = timm.is_model(bare) or name.startswith(("hf-hub:", "local-dir:"))
    if name == FASHION_DEIT or Path(name).is_file() or not of_timm:
        if checkpoint is not None:
            raise FileError(
                f"teacher_checkpoint: got {checkpoint} for the teacher {name!r}, which has weights; expected "
                "it with a timm name alone"
            )
        try:
            if name.startswith(PREFIX):
                return open_transformers(name.removeprefix(PREFIX))
            return open_model(name).eval()
        except FileError as error:
            said = str(error).removeprefix("model: ").replace("--checkpoint", "--teacher-checkpoint")
            raise FileError(f"teacher: {said.replace('as the model,', 'as the teacher,')}") from error
    try:
        weights = None if checkpoint is None else read_weights(checkpoint)
    except FileError as error:
        said = str(error).replace("give it as the model", "give it as the teacher")
        raise FileError(f"teacher_{said}") from error
    try:
        if weights is None:
            return timm.create_model(bare, pretrained=True).eval()
        with torch.device("meta"):
            classifier = timm.create_model(bare).pretrained_cfg.get("classifier")
        head = weights.get(f"{classifier}.weight")
        model = timm.create_model(bare, **({} if head is None else {"num_classes": len(head)}))
        model.load_state_dict(weights)
    except Exception as error:  # a network, a hub and weights of another model can fail in all ways
        reason = f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        if weights is None:
            raise FileError(
                f"teacher: timm cannot open {name} with released weights {reason}; yours are taken with "
                "--teacher-checkpoint FILE"
            ) from error
        raise FileError(
            f"teacher_checkpoint: the weights in {checkpoint} are not those of {name} {reason}"
        ) from error
    return model.eval()


def _load(file: str) -> nn.Module:
    try:
        return load(file)
    except FileError as error:
        raise FileError(f"model: {str(error).removeprefix('path: ')}") from error


def _open_timm(name: str, *, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    own = timm_name(name)
    state = None if checkpoint is None else read_weights(checkpoint)
    pretrained = pretrained and state is None
    if pretrained:
        _refuse_without_weights(own)
    with torch.device("meta"):  # refuse what is not supported before its weights are fetched
        empty = _create(own)
        if state is not None or not isinstance(empty, CompactModel):  # which `vtp.save_pretrained` wrote
            describe(empty)
    if state is None:
        return _create(own, pretrained=pretrained)
    with torch.device("meta"):
        model = _create(own, **model_arguments(state, empty))
    load_weights(model, state, name, str(checkpoint))
    return model


def timm_name(name: str) -> str:
    """A name as `timm.create_model` takes it. Raises FileError, which says what to do, where it is none.

    Args:
        name: of timm's registry, such a name behind "timm/", "hf-hub:..." or "local-dir:...".
    """
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return name
    bare = name.removeprefix("timm/")
    if timm.is_model(bare):
        # Weights that this timm does not know by their tag may still be on the hub.
        known = bare == name or "." not in bare or bare in timm.list_models(pretrained=True)
        return bare if known else f"hf-hub:{name}"
    expected = (
        f"expected {FASHION_DEIT!r}, a file of vtp's, or a name of timm's: deit_small_patch16_224, "
        "hf-hub:OWNER/NAME or local-dir:FOLDER; or of transformers: hf:OWNER/NAME or hf:FOLDER"
    )
    if kind_of(name) == RUN:
        refuse_other_kinds(name, *MODELS.values(), name="model")
    if Path(name).is_dir():
        raise FileError(
            f"model: got the folder {name}, {expected}; with timm's config.json: local-dir:{name}, with that "
            f"of transformers: hf:{name}"
        )
    if Path(name).suffix in (".safetensors", ".pth", ".pt", ".tar", ".bin"):
        raise FileError(f"model: no file {name}; {expected}")
    close = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.75)
    hint = f"; timm has {', '.join(close)}" if close else ""
    if "/" in name and not close:
        hint = f"; on the hub: hf-hub:{name} of timm, hf:{name} of transformers"
    raise FileError(f"model: got {name!r}, {expected}{hint}")


def _refuse_without_weights(name: str) -> None:
    """Say which weights there are, where there are none by this name in timm's registry."""
    if ":" in name or name in timm.list_models(pretrained=True):
        return
    architecture, _, tag = name.partition(".")
    tags = [other.partition(".")[2] for other in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag:
        has = f"it has {', '.join(tags)}" if tags else "it has none"
        raise FileError(f"model: timm has no weights {tag!r} of {architecture}, {has}")
    if not tags:
        raise FileError(
            f"model: there are no released weights of {name}; --from-scratch draws new ones, --checkpoint "
            "FILE takes yours"
        )


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # a registry, a hub, a network and a file can fail in all ways
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"model: timm cannot open {name} ({type(error).__name__}: {reason}); weights that are in a file "
            "already are taken with --checkpoint FILE"
        ) from error
