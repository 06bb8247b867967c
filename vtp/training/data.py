"""Images to train and test on: opening a data set and checking it.

`open_data` turns a name or a folder into a `Data`: two sets of (PIL image, label) and what is known about
them; `match_classes` gives its labels the order of a model's classes; `check_data` finds what would stop a
run before its first step. Readers of files and archives are timm's and torchvision's. How the sets become
batches is in vtp/training/loaders.py.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch.utils.data import Dataset, IterableDataset

from vtp.choices import EMBEDDED
from vtp.kinds import kind_of
from vtp.model.images import for_channels
from vtp.training.classes import (
    difference,
    in_short,
    labels_by_name,
    order_hint,
    read_class_map,
    same_descriptions,
)
from vtp.training.folders import ENDINGS, ClassFolders
from vtp.training.mds import PREFIX as MDS_PREFIX
from vtp.training.mds import MdsImages
from vtp.training.multi_label import METADATA, MultiLabelReader
from vtp.training.pixels import DataError
from vtp.training.shards import ShardReader, ShardSplit, expand_shards, find_shards
from vtp.training.sources import (
    FileImages,
    IdxImages,
    check_depth_of,
    header_of,
    labels_of,
    relabelled,
    spread,
)
from vtp.words import counted

EMBEDDED_FOLDER = Path(__file__).parents[1] / "datasets" / EMBEDDED
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)
# SHA-256 of the test labels, of the whole set and of the embedded one: by these it is known from sets whose
# files have the same names (MNIST, KMNIST).
FASHION_MNIST_LABELS = (
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    "d48f3fb4da5912554a7f9c6dce07791ffbb5fcad7c0569b580094b49498bfb11",
)
TEST_FOLDERS = ("val", "validation", "valid", "test")
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "wds", "torch")
KNOWN = (
    f"'{EMBEDDED}' (ships with the package); a folder with the four idx files of Fashion-MNIST, MNIST and "
    "alike (train-images-idx3-ubyte[.gz] and so on); an image folder (train/ and val/, validation/ or test/, "
    "each with one folder per class); a folder of webdataset shards (train/*.tar and val/*.tar, or "
    "*-train-*.tar and *-val-*.tar) or a pattern for them; 'mds://FOLDER'; 'torchvision:NAME'; or a name of "
    "timm.data.create_dataset "
    f"({', '.join(f'{prefix}/...' for prefix in TIMM_PREFIXES)})"
)


GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B"})


@dataclass(frozen=True)
class Data:
    """A data set for classification, and what its users must know about it.

    Attributes:
        name: as given to `open_data`.
        num_classes: None for a stream that does not say.
        class_names: one for each class, in the order of the labels; empty where the data do not name them.
        in_chans: 1 (grey) or 3 (RGB), as stored.
        image_size: edge in pixels if the images are squares of one size, else None.
        mean, std: of the pixel values in 0..1, one for each channel as stored.
        train, test: map-style sets of (PIL image, int), or two streams of them; `train` is None where only
            data to evaluate on were asked for.
        crop_pct: share of the resized image's edge that a test image keeps; None where nothing is said: all
            of small images, else timm's default.
        crop_mode, interpolation: of the test transform, as timm spells them.
        labels_present: where the data have only some of a model's classes, the labels of these: predictions
            are then made among them alone.
        by_class_map: whether the order of the classes was given by a class map.
        notes: what a user has to know about how the data were read, a sentence each.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...]
    in_chans: int
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Dataset | None
    test: Dataset
    crop_pct: float | None = None
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    labels_present: tuple[int, ...] | None = None
    by_class_map: bool = False
    notes: tuple[str, ...] = ()

    def for_model(self, pretrained_cfg: Mapping[str, Any] | None) -> Data:
        """A copy normalised and cropped as a timm model's `pretrained_cfg` says, as far as it does: what its
        weights expect."""
        names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
        said = {name: (pretrained_cfg or {}).get(name) for name in names}
        return replace(
            self,
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in said.items()
                if value is not None
            },
        )

    def noting(self, *notes: str) -> Data:
        """A copy with more notes."""
        return replace(self, notes=(*self.notes, *notes))


# ---------------------------------------------------------------------------------------------------------
# Opening


def open_data(
    spec: str | Path = EMBEDDED,
    *,
    root: str | Path | None = None,
    class_map: str | Path | None = None,
    train: bool = True,
) -> Data:
    """Open a data set for training and testing.

    Classes are in the order that torchvision gives them: that of folders is the order of their names as text.

    Args:
        spec: "fashion-mnist-10k" (embedded: 10,000 and 2,000 images of Fashion-MNIST, equally many of each
            class); a folder with four idx files, plain or gzipped, of Fashion-MNIST, MNIST and alike; an
            image folder with train/ and one of val/, validation/, valid/, test/, each with one folder per
            class, in which images may lie at any depth, or each with a metadata.csv where an image may be of
            several (see `multi_label`); a folder of webdataset shards on this machine, uncompressed tar files
            with train, and val, validation, valid or test, in the name of each or of its folder (or with
            timm's _info.json), or a pattern with braces and stars that stands for such; "mds://FOLDER", a
            MosaicML Streaming data set with such splits, FOLDER of this machine or an address such as
            s3://bucket/folder; "torchvision:NAME" (as the class in torchvision.datasets); or a name that
            timm.data.create_dataset knows: "hfds/...",
            "torch/...", or, streams that are read in sequence, "wds/...", "hfids/...", "tfds/...".
        root: where torchvision and timm find, or download to, the set; of "wds/..." a folder, which is read
            as one of shards, or an address: "https://host/folder", or "pipe:COMMAND folder"; of "mds://..."
            the folder that its shards are fetched and unpacked into. Without part otherwise.
        class_map: a text file with one class name a line, in the order that the labels are to have: as
            `--class-map` of timm's scripts. Class folders that are not in it are left out.
        train: whether the training images are wanted; without them an image folder needs no train/, and may
            itself be that of the classes.

    Raises:
        DataError: nothing is there, or not what was expected; train and test classes differ; a class has more
            than a few files that are no images to torchvision and timm but may be some; pixels of more than
            8 bits have no known meaning. Unreadable images and empty classes are left to `check_data`.
    """
    spec = str(spec)
    names = None if class_map is None else read_class_map(class_map)
    folder = Path(spec).expanduser()
    shards = _find_shards(spec, root)
    if not shards and spec != EMBEDDED and folder.is_dir() and not _holds_idx(folder):
        return _open_image_folder(folder, spec, names, train)
    if shards:
        data = _open_shards(shards, spec, train)
    elif spec == EMBEDDED:
        data = _open_idx(EMBEDDED_FOLDER, spec)
    elif folder.is_dir():
        data = _open_idx(folder, spec)
    elif spec.startswith(MDS_PREFIX):
        data = _open_mds(spec, root, train)
    elif spec.startswith("torchvision:"):
        data = _open_torchvision(spec, root, train)
    elif spec.partition("/")[0].lower() in TIMM_PREFIXES and "/" in spec:
        data = _open_timm(spec, root, train)
    else:
        kind = kind_of(spec)
        found = "neither a folder that exists nor a known name" if kind is None else kind.name
        raise DataError(f"data: {spec!r} is {found}; expected {KNOWN}")
    return data if names is None else _in_order_of(data, names)


def _in_order_of(data: Data, names: tuple[str, ...]) -> Data:
    """The data with labels in the order of a class map, which has to name all of their classes."""
    if not data.class_names:
        if data.num_classes not in (None, len(names)):
            raise DataError(
                f"class_map: got {counted(len(names), 'name')}, expected {data.num_classes}, the classes of "
                f"{data.name}"
            )
        return replace(data, class_names=names, num_classes=len(names), by_class_map=True)
    label_map = labels_by_name(data.class_names, names)
    if label_map is None:
        both = difference(data.class_names, names, "the class map")
        raise DataError(f"class_map: expected every class of {data.name}: {both}")
    return replace(_mapped(data, label_map, names), by_class_map=True)


def _mapped(data: Data, label_map: list[int], names: Sequence[str]) -> Data:
    """The data with their labels replaced: `label_map` has a place among `names` for each."""
    own = range(len(label_map))
    present = tuple(sorted(label_map[label] for label in data.labels_present or own))
    if label_map != list(own):
        train = None if data.train is None else relabelled(data.train, label_map, len(names))
        data = replace(data, train=train, test=relabelled(data.test, label_map, len(names)))
    return replace(
        data,
        class_names=tuple(names),
        num_classes=len(names),
        labels_present=present if len(present) < len(names) else None,
    )


def is_small_grey(spec: str | Path) -> bool:
    """Whether `open_data` would open small grey images, such as Fashion-MNIST's: idx files, those of the
    package among them, or what torchvision has of the kind."""
    spec = str(spec)
    if spec == EMBEDDED or (spec.startswith("torchvision:") and spec.endswith("MNIST")):
        return True
    return _holds_idx(Path(spec).expanduser())


def _holds_idx(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*-idx?-ubyte*"))


def _open_idx(folder: Path, name: str) -> Data:
    train, test = IdxImages.read(folder, "train"), IdxImages.read(folder, "t10k")
    height, width = train.images.shape[1:]
    is_fashion = hashlib.sha256(test.labels.tobytes()).hexdigest() in FASHION_MNIST_LABELS
    mean, std = FASHION_MNIST_MEAN, FASHION_MNIST_STD
    if not is_fashion:
        mean, std = ((round(float(f(train.images)) / 255, 4),) for f in (np.mean, np.std))
    return Data(
        name=name,
        num_classes=int(max(train.labels.max(initial=0), test.labels.max(initial=0))) + 1,
        class_names=FASHION_MNIST_CLASSES if is_fashion else (),
        in_chans=1,
        image_size=height if height == width else None,
        mean=mean,
        std=std,
        train=train,
        test=test,
    )


def _open_image_folder(folder: Path, name: str, class_map: tuple[str, ...] | None, train: bool) -> Data:
    train_folder = folder / "train"
    test_folder = next((folder / test for test in TEST_FOLDERS if (folder / test).is_dir()), None)
    if test_folder is None and not train and not train_folder.is_dir():
        test_folder = folder
    if test_folder is None or (train and not train_folder.is_dir()):
        raise DataError(f"data: found nothing to train and test on in the folder {folder}; expected {KNOWN}")
    if (test_folder / METADATA).is_file():
        return _open_multi_label(train_folder if train else None, test_folder, name)
    folders = [train_folder, test_folder] if train else [test_folder]
    found = [_class_folders(split) for split in folders]
    if class_map is None and found[0] != found[-1]:
        raise DataError(
            f"{folder}: the classes of train and {test_folder.name} differ: "
            f"only in train: {in_short(sorted(set(found[0]) - set(found[1]))) or 'none'}; "
            f"only in {test_folder.name}: {in_short(sorted(set(found[1]) - set(found[0]))) or 'none'}"
        )
    classes = class_map or found[0]
    # With the class list given, a class without images keeps its label and is seen to be empty by check_data.
    class_to_idx = {name: label for label, name in enumerate(classes)}
    sets = [FileImages(ClassFolders(split, class_to_idx)) for split in folders]
    notes = []
    for split, names, images in zip(folders, found, sets, strict=True):
        if len(images) == 0:
            raise DataError(
                f"{split}: no image in any class folder{' of the class map' if class_map else ''}; expected "
                f"files with one of the endings {' '.join(ENDINGS)}"
            )
        notes += _skipped_notes(split, names, images.reader)
    data = _described(name, sets[0] if train else None, sets[-1], classes)
    if class_map is not None and not train:
        missing = set(classes) - set(found[0])
        present = tuple(label for name, label in class_to_idx.items() if name not in missing)
        data = replace(data, labels_present=present if missing else None)
    return replace(data, by_class_map=class_map is not None, notes=tuple(notes))


def _open_multi_label(train_folder: Path | None, test_folder: Path, name: str) -> Data:
    test = MultiLabelReader(test_folder)
    train = None if train_folder is None else MultiLabelReader(train_folder)
    if train is not None and train.class_names != test.class_names:
        raise DataError(
            f"{test_folder / METADATA}: got columns {test.class_names}, expected those of "
            f"{train.root / METADATA}: {train.class_names}"
        )
    return _described(name, train and FileImages(train), FileImages(test), test.class_names)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not names:
        raise DataError(f"{folder}: holds no class; expected one folder of images for each class")
    return tuple(sorted(names))


def _skipped_notes(split: Path, names: Sequence[str], reader: ClassFolders) -> list[str]:
    skipped = reader.skipped_in_words()
    notes = [] if skipped is None else [f"{split}: {skipped}"]
    others = [name for name in names if name not in reader.class_to_idx]
    if others:
        notes.append(
            f"{split}: not in the class map, and left out: {counted(len(others), 'class folder')}: "
            f"{in_short(others)}"
        )
    return notes


def _find_shards(spec: str, root: str | Path | None) -> dict[str, ShardSplit]:
    """The shards on this machine that a specification means, by split; {} where it means something else."""
    folder = Path(spec).expanduser()
    if spec == EMBEDDED or _holds_idx(folder):
        return {}
    if folder.is_dir():
        return find_shards(folder)
    if spec.endswith(".tar"):
        return expand_shards(spec)
    if spec.lower().startswith("wds/") and root is not None and Path(root).is_dir():
        return find_shards(Path(root))
    return {}


def _open_shards(shards: Mapping[str, ShardSplit], name: str, train: bool) -> Data:
    wanted = ("train", "test") if train else ("test",)
    missing = [split for split in wanted if split not in shards]
    if missing:
        raise DataError(
            f"data: {name!r} has shards to {' and '.join(shards)}, but none to {missing[0]}; expected {KNOWN}"
        )
    readers = {split: ShardReader.open(shards[split]) for split in wanted}
    notes = []
    for split, reader in readers.items():
        no_image, no_class = reader.left_out
        without = f"{counted(no_image, 'sample')} without an image" if no_image else ""
        negative = f"{counted(no_class, 'image')} with a negative class" if no_class else ""
        if without or negative:
            rule = "; the ending of a name begins at its first dot" if no_image else ""
            left_out = ", ".join(filter(None, (without, negative)))
            notes.append(f"{split}: left out of the shards: {left_out}{rule}")
    images = {split: FileImages(reader) for split, reader in readers.items()}
    data = _described(name, images.get("train"), images["test"], ())
    classes = 1 + max(int(reader.labels.max()) for reader in readers.values())
    return replace(data, num_classes=classes, notes=tuple(notes))


def _open_mds(spec: str, root: str | Path | None, train: bool) -> Data:
    place = spec.removeprefix(MDS_PREFIX)
    if "://" not in place:
        place = str(Path(place).expanduser())
    train_set = MdsImages(place, root, "train") if train else None
    here = [split for split in TEST_FOLDERS if (Path(place) / split).is_dir()]
    test = MdsImages(place, root, here[0]) if here else _first_split(lambda s: MdsImages(place, root, s))
    grey = test[0][0].mode in GREY_MODES
    return _imagenet_like(spec, train_set, test, (), num_classes=None, in_chans=1 if grey else 3)


def _open_torchvision(spec: str, root: str | Path | None, train: bool) -> Data:
    name = spec.partition(":")[2]
    kind = getattr(torchvision.datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise DataError(
            f"data: {spec!r}: torchvision.datasets has no {name!r}; expected a name like FashionMNIST"
        )
    if root is None:
        raise DataError(f"data: {spec!r} needs root, the folder the data is in or shall be downloaded to")
    parameters = inspect.signature(kind).parameters
    options = {"download": True} if "download" in parameters else {}
    try:
        if "train" in parameters:
            training = kind(root, train=True, **options) if train else None
            test = kind(root, train=False, **options)
        else:
            training = kind(root, split="train", **options) if train else None
            test = _first_split(lambda split: kind(root, split=split, **options))
    except Exception as error:  # each data set of torchvision, and each way to download, raises its own types
        raise DataError(f"data: torchvision cannot open {name} in {root}: {error}") from error
    data = _described(spec, training, test, _names_of(test))
    if name == "FashionMNIST":
        data = replace(data, mean=FASHION_MNIST_MEAN, std=FASHION_MNIST_STD)
    return data


def _names_of(images: Dataset) -> tuple[str, ...]:
    """Class names as torchvision's sets have them: ImageNet's by synset, as its folders are called."""
    names = getattr(images, "wnids", getattr(images, "classes", ()))
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names)


def _open_timm(spec: str, root: str | Path | None, train: bool) -> Data:
    def read(split: str, is_training: bool = False) -> Dataset:
        # Streams would convert images of 16 bits to RGB by clipping them to white: they come as they are.
        return create_dataset(
            spec, root=root and str(root), split=split, is_training=is_training, download=False,
            input_img_mode=None if spec.lower().startswith("tfds/") else "",
        )  # fmt: skip

    try:
        training, test = read("train", is_training=True) if train else None, _first_split(read)
    except (Exception, SystemExit) as error:  # any reader, and any library behind it
        raise DataError(f"data: timm cannot open {spec!r} (root={root}): {error!r}") from error
    if isinstance(test, IterableDataset):
        classes = tuple(sorted(test.reader.class_to_idx, key=test.reader.class_to_idx.get))
        return _imagenet_like(spec, training, test, classes, num_classes=len(classes) or None, in_chans=3)
    if hasattr(test, "reader"):
        classes = tuple(sorted(test.reader.class_to_idx, key=test.reader.class_to_idx.get))
        files = None if training is None else FileImages(training.reader)
        return _described(spec, files, FileImages(test.reader), classes)
    data = _described(spec, training, test, _names_of(test))
    if isinstance(test, torchvision.datasets.FashionMNIST):
        data = replace(data, mean=FASHION_MNIST_MEAN, std=FASHION_MNIST_STD)
    return data


def _first_split(read: Any) -> Dataset:
    """The first usual test split that `read(split)` knows; raises its first error if it knows none."""
    errors = []
    for split in ("validation", "val", "valid", "test"):
        try:
            return read(split)
        except Exception as error:  # as in the callers
            errors.append(error)
            if "split" not in str(error).lower():
                break  # not the name of the split: another name would only fail again, perhaps slowly
    raise errors[0]


def _described(name: str, train: Dataset | None, test: Dataset, classes: tuple[str, ...]) -> Data:
    """A `Data` of two map-style sets, with what a look at a few images and the labels tells."""
    images = test if train is None else train
    looked_at = spread(range(len(images)), 16)
    headers = [header_of(images, index) for index in looked_at]
    sizes = {edge for _, size, _ in headers for edge in size}
    if any(deep for *_, deep in headers):
        check_depth_of(images)
    num_classes = len(classes)
    if not classes:
        labels = labels_of(images)
        num_classes = 0 if labels is None else int(labels.max()) + 1
    return _imagenet_like(
        name,
        train,
        test,
        classes,
        num_classes=num_classes or None,
        in_chans=1 if all(mode in GREY_MODES for mode, *_ in headers) else 3,
        image_size=sizes.pop() if len(sizes) == 1 else None,
    )


def _imagenet_like(
    name: str,
    train: Dataset | None,
    test: Dataset,
    classes: tuple[str, ...],
    *,
    num_classes: int | None,
    in_chans: int,
    image_size: int | None = None,
) -> Data:
    """A `Data` normalised with the statistics of ImageNet."""
    return Data(
        name=name,
        num_classes=num_classes,
        class_names=classes,
        in_chans=in_chans,
        image_size=image_size,
        mean=for_channels(IMAGENET_DEFAULT_MEAN, in_chans),
        std=for_channels(IMAGENET_DEFAULT_STD, in_chans),
        train=train,
        test=test,
    )


# ---------------------------------------------------------------------------------------------------------
# The classes of a model


def match_classes(
    data: Data,
    names: Sequence[str] | None,
    *,
    descriptions: Sequence[str] | None = None,
    is_new: bool = False,
    subset: bool = False,
) -> Data:
    """The data with labels that are the outputs of a model whose classes are `names`.

    Args:
        names: of the model's classes, in the order of its outputs; None where they are not known.
        descriptions: what these are in words, by which data may call them.
        is_new: whether the model's head is new, so that its classes are those of the data.
        subset: whether the data may have only some of the classes, as is fine for an evaluation.

    Returns:
        The data, their labels mapped by name where the order is another, with a note of what was done.

    Raises:
        DataError: the data have other classes than the model; both lists are in the message.
    """
    own = data.class_names
    if not own:
        if not names:
            return data
        return data.noting(f"{data.name} does not name its classes: they are taken in the model's order")
    if names is None:
        if is_new:
            hint = "" if data.by_class_map else order_hint(own)
            return data.noting(f"labels are in the order of the names of the classes{hint}") if hint else data
        return data.noting(
            "the order of the model's classes is not known, as its file does not say it: taken to be that of "
            f"the data, {in_short(own)}{'' if data.by_class_map else order_hint(own)}"
        )
    label_map = labels_by_name(own, names)
    if label_map is None and same_descriptions(own, descriptions):
        label_map = list(range(len(own)))
    if label_map is None and data.by_class_map and len(data.class_names) == len(names):
        return data.noting(
            f"the model's classes {in_short(names)} are, by the class map, the data's "
            f"{in_short(data.class_names)}"
        )
    if label_map is None:
        raise DataError(
            f"data: {data.name} has other classes than the model: {difference(own, names)}. Rename the class "
            "folders, or give --class-map FILE with the data's names in the order of the model's; --new-head "
            "trains a new head for other classes"
        )
    mapped = _mapped(data, label_map, names)
    if label_map != sorted(label_map):
        mapped = mapped.noting(
            f"the classes of {data.name} are in another order than the model's, and are mapped by name: "
            f"{in_short(own)}; the model has {in_short(names)}"
        )
    if mapped.labels_present is None:
        return mapped
    classes = counted(len(names), "class", "classes")
    some = f"{data.name} has {len(mapped.labels_present)} of the model's {classes}"
    if not subset:
        raise DataError(
            f"data: {some}; training on them would unlearn the others: expected all, or --new-head for a "
            "head of these alone"
        )
    return mapped.noting(f"{some}: predictions are made among these")


# ---------------------------------------------------------------------------------------------------------
# Checking


def check_data(data: Data, num_classes: int) -> None:
    """Find what would stop or spoil a run: to be called before its first step.

    Reads the header and the last bytes of every image file: about 0.1 ms for a file in the disk cache. Of
    shards this was done when they were indexed.

    Args:
        num_classes: width of the model's head.

    Raises:
        DataError: there is no head, or not one output of it for each class; a class has no image; a label is
            not that of a class; an image file is unreadable or truncated. What a stream holds is not known
            beforehand: of a stream, only the number of classes is checked, where it says.
    """
    if num_classes == 0:
        raise DataError(
            "num_classes: the model has no head, whose outputs could be classes; `vtp eval --knn` and "
            "--linear-probe evaluate its features, and --new-head trains a head"
        )
    if data.num_classes is not None and data.num_classes != num_classes:
        raise DataError(
            f"num_classes: the head has {counted(num_classes, 'output')}, but the data set {data.name} has "
            f"{counted(data.num_classes, 'class', 'classes')}; expected one output for each class "
            "(--new-head trains a new one; --class-map names the classes of all outputs where the data have "
            "only some)"
        )
    for split, images in (("train", data.train), ("test", data.test)):
        labels = None if images is None else labels_of(images)
        if labels is not None:
            _check_labels(labels, data, split)
        if isinstance(images, FileImages) and not hasattr(images.reader, "dataset"):  # Hugging Face's
            images.check()


def _check_labels(labels: np.ndarray, data: Data, split: str) -> None:
    if labels.ndim == 2:  # one number for each class: as if each image were there once for each that it has
        if labels.shape[1] != data.num_classes or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"{data.name}: {split}: got labels of {counted(labels.shape[1], 'number')} from "
                f"{labels.min()} to {labels.max()}, expected {data.num_classes} times 0 or 1"
            )
        labels = labels.nonzero()[1]
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= data.num_classes:
        found = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no labels"
        raise DataError(f"{data.name}: {split}: got {found}, expected 0 to {data.num_classes - 1}")
    counts = np.bincount(labels, minlength=data.num_classes)
    expected = range(data.num_classes) if data.labels_present is None else data.labels_present
    empty = [label for label in expected if counts[label] == 0]
    if empty:
        names = [data.class_names[label] if data.class_names else str(label) for label in empty]
        raise DataError(
            f"{data.name}: {split}: no image in {len(empty)} of "
            f"{counted(len(expected), 'class', 'classes')}: {in_short(names, 5)}"
        )


def is_multi_label(data: Data) -> bool:
    """Whether a label of the data is a vector with one number for each class."""
    if isinstance(data.train, IterableDataset):
        return False
    labels = labels_of(data.train)
    return np.ndim(data.train[0][1] if labels is None else labels[0]) == 1
