"""What must be the same for training to be continued: what is in the data, not where it lies.

A run may be resumed from another place, with its data moved or mounted elsewhere, on another machine: images
are known by their names within the data set, their sizes and their labels, models by their weights. How the
images of an update are shared out among processes and passes does not count, but how many they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from vtp.files import fingerprint
from vtp.training.config import TrainConfig
from vtp.training.data import Data
from vtp.training.sources import FileImages, IdxImages, labels_of, shards_of
from vtp.training.transforms import Augment

# Settings that decide how a machine does its work, not what is trained.
OF_THE_MACHINE = ("batch_size", "effective_batch", "fsdp", "grad_checkpointing", "compile")


def data_identity(data: Data) -> dict[str, Any]:
    """What is in a data set, and how its pixels are normalised, as JSON-able values by name.

    Of image files the relative names, sizes in bytes and labels count, of idx files all of it, of what timm
    or torchvision open by name that name and the labels. Files are asked for their size; none is read.
    """
    about = ("num_classes", "in_chans", "image_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    found = {f"data.{name}": getattr(data, name) for name in about}
    found["data.class_names"] = _digest(data.class_names)
    for split, images in (("train", data.train), ("test", data.test)):
        found[f"data.{split}"] = _contents(images, data.name)
    return json.loads(json.dumps(found))


def stage_identity(
    data: Data,
    config: TrainConfig,
    stage: str,
    augment: Augment,
    steps: int,
    images: int,
    processes: int,
    models: Mapping[str, nn.Module | None],
) -> dict[str, Any]:
    """All that must be the same for the checkpoint of a stage to be continued, as JSON gives it back.

    steps: of an epoch; images: of an update; processes: that train together, which counts for a stream alone;
    models: those whose weights count, by name.
    """
    flat = {
        "stage": stage,
        **{
            name: None if model is None else fingerprint(model.state_dict()) for name, model in models.items()
        },
        **data_identity(data),
        "steps": steps,
        "effective_batch": images,
        **({"processes": processes} if isinstance(data.train, IterableDataset) else {}),
        **{f"config.{name}": value for name, value in settings_that_count(asdict(config), data).items()},
        **{f"augment.{name}": value for name, value in asdict(augment).items()},
    }
    return json.loads(json.dumps(flat))


def translated(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint in the words of the current one: older ones gave the number of processes
    and the images of each."""
    if "effective_batch" in saved or "config.batch_size" not in saved:
        return saved
    images = saved["processes"] * saved["config.batch_size"]
    names = saved.keys() - {"config.batch_size"} - ({"processes"} - current.keys())
    return {name: value for name, value in saved.items() if name in names} | {"effective_batch": images}


def settings_that_count(settings: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Of the settings of a stage those that decide what is trained: not how many processes load the images,
    unless these are a stream, which gives others to another number; nor those of the machine. The images of
    an update do count, but only the processes together know them."""
    left_out = OF_THE_MACHINE + (() if isinstance(data.train, IterableDataset) else ("workers",))
    return {name: value for name, value in settings.items() if name not in left_out}


def _contents(images: Dataset, name: str) -> str:
    """How many images, and a digest of what is known of them without decoding any."""
    length = f"{len(images):,} images" if hasattr(images, "__len__") else "images"
    if isinstance(images, IterableDataset):
        return f"{length}, streamed from {name}"
    if isinstance(images, IdxImages):
        arrays = (images.images, images.labels)
        return f"{length}, {_digest(part for a in arrays for part in (a.shape, a.tobytes()))}"
    labels = labels_of(images)
    shards = shards_of(images)
    if shards is not None:
        known = getattr(images, "label_map", None) if labels is None else labels.tobytes()
        return f"{length}, {_digest([*shards.digests, known])}"
    if isinstance(images, FileImages) and hasattr(images.reader, "samples"):
        return f"{length}, {_digest(_files(images))}"
    return f"{length}, {_digest([name, None if labels is None else labels.tolist()])}"


def _files(images: FileImages) -> Iterator[Any]:
    for index, label in enumerate(images.labels.tolist()):
        file = images.reader.samples[index][0]  # a path, or a member of a tar file
        size = os.path.getsize(file) if isinstance(file, str) else file.size
        yield (images.reader.filename(index).replace(os.sep, "/"), size, label)


def _digest(parts: Iterable[Any]) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over bytes or the text of each part, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else f"{part!r}\n".encode())
    return found.hexdigest()[:16]
