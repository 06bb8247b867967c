"""What images a model expects, and what its outputs are called: timm's `pretrained_cfg`, kept true.

Both lie where timm keeps them, in the dictionary `model.pretrained_cfg`: input_size, mean, std, crop_pct,
crop_mode and interpolation, as `timm.data.resolve_model_data_config` reads them, and the names of the classes
in the order of the outputs as `label_names`, with longer ones in `label_descriptions`. Files carry it.
"""

from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.data.constants import DEFAULT_CROP_PCT
from timm.models._pretrained import filter_pretrained_cfg
from torch import nn

# What `timm.data.create_transform` has to know about the images that a model takes.
IMAGE_FIELDS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
# Up to this edge (pixels) images are taken to be cut to their object: shown whole if nothing is said.
SMALL_IMAGE = 64


def image_config(model: nn.Module) -> dict[str, Any]:
    """What images a model expects, as arguments of `timm.data.create_transform`.

    It is what `timm.data.resolve_model_data_config` gives, of any timm model, but with the size and the
    channels that the model itself has, mean and std for just these channels, and small images kept whole
    where the model says nothing about the crop.

    Returns:
        input_size (channels, height, width); mean and std of pixel values in 0..1, one for each channel;
        crop_pct, crop_mode, interpolation. ImageNet's mean and std where `knows_normalisation` is False.
    """
    config = resolve_model_data_config(model)
    size = own_input_size(model) or tuple(config["input_size"])
    if _said(model).get("crop_pct") is None:
        config["crop_pct"] = default_crop_pct(*size[1:])
    mean, std = (for_channels(config[name], size[0]) for name in ("mean", "std"))
    return {**config, "input_size": size, "mean": mean, "std": std}


def knows_normalisation(model: nn.Module) -> bool:
    """Whether the model says by what mean and std its images are normalised."""
    return all(_said(model).get(name) is not None for name in ("mean", "std"))


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's classes in the order of its outputs, or None where they are not known."""
    names = _said(model).get("label_names")
    if isinstance(names, dict):  # timm takes them by index too, which JSON has made a string
        by_index = {str(index): name for index, name in names.items()}
        names = [by_index[str(index)] for index in range(len(names)) if str(index) in by_index]
    if not names or len(names) != getattr(model, "num_classes", None):
        return None
    return tuple(map(str, names))


def class_descriptions(model: nn.Module) -> tuple[str, ...] | None:
    """What the classes are in words where their names say little (n02123045: tabby, tabby cat), or None."""
    names, descriptions = class_names(model), _said(model).get("label_descriptions")
    if names is None or not isinstance(descriptions, dict):
        return None
    return tuple(str(descriptions.get(name, name)) for name in names)


def awaits_classes(model: nn.Module) -> bool:
    """Whether the model has a head that has not been trained yet: its classes will be those of the data."""
    return _said(model).get("label_names") == ()


def set_image_config(model: nn.Module, **fields: Any) -> None:
    """Let a model say more about its images and classes: fields of timm's `pretrained_cfg`, in place.

    Args:
        fields: of `IMAGE_FIELDS`, or `label_names` (one for each output; `()` for a new head).
    """
    said = dict(_said(model))
    if "label_names" in fields:
        said.pop("label_descriptions", None)  # of other classes
    model.pretrained_cfg = model.default_cfg = {**said, **fields}


def imagenet_classes(model: nn.Module) -> tuple[str, ...] | None:
    """The synsets of the ImageNet that has as many classes as a model of timm's, by which timm guesses too;
    None where there is none, or the model has another head than its description."""
    config = _said(model)
    subset = infer_imagenet_subset(config)
    if subset is None or "architecture" not in config or config["num_classes"] != model.num_classes:
        return None
    return tuple(ImageNetInfo(subset).label_names())


def set_imagenet_names(model: nn.Module) -> None:
    """Name the classes of a model, which are known to be those of `imagenet_classes`: by synset, in words."""
    names = imagenet_classes(model)
    if names is None or class_names(model) is not None:
        return
    info = ImageNetInfo(infer_imagenet_subset(_said(model)))
    set_image_config(model, label_names=names, label_descriptions=info.label_descriptions(as_dict=True))


def new_head(model: nn.Module, num_classes: int) -> None:
    """Give a model a head with new weights for so many classes, whose names are those of the next data."""
    model.reset_classifier(num_classes)
    set_image_config(model, label_names=())


def inherit_description(model: nn.Module, parent: nn.Module) -> None:
    """Let a model that was made of another one say of its images and classes what that one does: timm's
    `pretrained_cfg`, but for where the weights come from, which are the other one's."""
    if getattr(parent, "pretrained_cfg", None) is not None:
        model.pretrained_cfg = model.default_cfg = without_source(parent.pretrained_cfg)


def without_source(config: dict[str, Any]) -> dict[str, Any]:
    """A `pretrained_cfg` with which timm finds no weights, as its `save_for_hf` writes it."""
    config = config if isinstance(config, dict) else config.to_dict()  # timm's own class, set by hand
    found = filter_pretrained_cfg(config, remove_source=True, remove_null=False)
    return {name: value for name, value in found.items() if name not in ("state_dict", "custom_load")}


def described(model: nn.Module) -> dict[str, Any]:
    """The model's `pretrained_cfg` with the size, channels and number of classes that it has, and without
    names that are of another head."""
    config, size = dict(_said(model)), own_input_size(model)
    if size is not None:
        config["input_size"] = size
    if hasattr(model, "num_classes"):
        config["num_classes"] = model.num_classes
    if class_names(model) is None:
        for name in ("label_names", "label_descriptions"):
            config.pop(name, None)
    return config


def default_crop_pct(height: int, width: int) -> float:
    """The share of a resized image's edge that is kept where nothing is said about it."""
    return 1.0 if max(height, width) <= SMALL_IMAGE else DEFAULT_CROP_PCT


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Means (or standard deviations) for images that are converted to `channels` channels."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _said(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def own_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) as a vision transformer itself has them."""
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None or not hasattr(embed, "proj"):
        return None
    return (embed.proj.in_channels, *size)
