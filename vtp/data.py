"""Images to train and test on: opening a data set, checking it, augmenting, and batching it reproducibly.

`open_data` turns a name or a folder into a `Data`: two sets of (PIL image, label) and what is known about
them. `check_data` finds what would stop a run before its first step. `train_loader` and `test_loader` turn
the sets into batches of normalised float32 tensors; transforms, augmentation and readers are timm's.

**What is reproducible.** The order of an epoch is a function of (seed, epoch), and the augmentation of a
sample a function of (seed, epoch, sample index): neither depends on the number of workers, on the process, or
on where in the epoch one starts. To that end the sampler hands out (epoch, index) pairs, so that a worker
that outlives an epoch needs no message from the training loop, and every sample is transformed after the
three global generators that transforms draw from (Python's, NumPy's and torch's) were seeded from (seed,
epoch, index). They are restored afterwards: loading data does not disturb the dropout of the model.

**Several processes.** The loaders are meant for `accelerate.Accelerator.prepare`, which gives each process
every n-th batch of the one order; `set_epoch` works on a prepared loader as on a bare one.

**Streams** (timm's "wds/", "hfids/" and "tfds/" sets, read in sequence) promise less: the same seed, epoch
and number of workers give the same batches; starting in the middle of an epoch reads and drops what comes
before; several processes are refused.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import inspect
import itertools
import math
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_dataset,
    create_transform,
    resolve_data_config,
)
from timm.data.constants import DEFAULT_CROP_PCT
from timm.data.random_erasing import RandomErasing
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision import transforms

EMBEDDED = "fashion-mnist-10k"
EMBEDDED_FOLDER = Path(__file__).parent / "datasets" / EMBEDDED
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
IDX_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
TEST_FOLDERS = ("val", "validation", "valid", "test")
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "wds", "torch")
KNOWN = (
    f"'{EMBEDDED}' (ships with the package); a folder with the four idx files of Fashion-MNIST "
    "(train-images-idx3-ubyte[.gz] and so on); an image folder (train/ and val/, validation/ or test/, each "
    "with one folder per class); 'torchvision:NAME'; or a name of timm.data.create_dataset "
    f"({', '.join(f'{prefix}/...' for prefix in TIMM_PREFIXES)})"
)

# Up to this edge (pixels) images are taken to be cut to their object: the test transform shows them whole.
SMALL_IMAGE = 64
# Up to this edge DeiT replaces the random resized crop by a shifted one.
DEIT_SMALL_IMAGE = 32

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B"})
# A file of these formats that is whole ends in these bytes, give or take some padding.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class DataError(ValueError):
    """The data cannot be used as asked; the message names what is wrong and what was expected."""


@dataclass(frozen=True)
class Data:
    """A data set for classification, and what its users must know about it.

    Attributes:
        name: as given to `open_data`.
        num_classes: None for a stream that does not say.
        class_names: one for each class, in the order of the labels; empty for a stream that does not say.
        in_chans: 1 (grey) or 3 (RGB), as stored.
        image_size: edge in pixels if the images are squares of one size, else None.
        mean, std: of the pixel values in 0..1, one for each channel as stored.
        train, test: map-style sets of (PIL image, int), or two streams of them.
        crop_pct: share of the resized image's edge that a test image keeps. Images of up to SMALL_IMAGE
            pixels are kept whole whatever it says.
        interpolation: of the test transform, as timm spells it.
    """

    name: str
    num_classes: int | None
    class_names: tuple[str, ...]
    in_chans: int
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Dataset
    test: Dataset
    crop_pct: float = DEFAULT_CROP_PCT
    interpolation: str = "bicubic"

    def for_model(self, pretrained_cfg: Mapping[str, Any]) -> Data:
        """A copy normalised and cropped as a timm model's `pretrained_cfg` says: what its weights expect."""
        config = resolve_data_config(pretrained_cfg=dict(pretrained_cfg))
        return replace(self, **{key: config[key] for key in ("mean", "std", "crop_pct", "interpolation")})


@dataclass(frozen=True)
class Augment:
    """How training images are varied; the names are those of DeiT's and timm's command lines.

    Mixup and CutMix work on batches and belong to the training loop.

    Attributes:
        crop_padding: if not None, the crop is a shift by at most so many pixels (black comes in) instead of a
            random resized crop; `scale`, `ratio` and `interpolation` then have no part.
        scale, ratio: area (share of the image) and aspect ratio of the random resized crop.
        interpolation: of the random resized crop and of RandAugment ("bilinear", "bicubic" or "random").
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation; without effect beside `auto_augment`, as in timm.
        auto_augment: a policy in timm's spelling, or None.
        reprob, remode, recount: random erasing: probability, filling, most regions.
    """

    crop_padding: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "random"
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = None
    reprob: float = 0.0
    remode: str = "const"
    recount: int = 1

    @classmethod
    def preset(cls, name: str, image_size: int = 224) -> Augment:
        """A named choice: "light" (shift by 2 and flip), "deit" (as DeiT was trained) or "none".

        DeiT's own code shifts by 4 instead of cropping where images are 32 pixels or smaller; so does "deit".
        """
        presets = {
            "light": cls(crop_padding=2, color_jitter=0.0),
            "deit": cls(
                crop_padding=4 if image_size <= DEIT_SMALL_IMAGE else None,
                interpolation="bicubic",
                color_jitter=0.3,
                auto_augment="rand-m9-mstd0.5-inc1",
                reprob=0.25,
                remode="pixel",
            ),
            "none": cls(crop_padding=0, hflip=0.0, color_jitter=0.0),
        }
        if name not in presets:
            raise DataError(f"augment: got {name!r}, expected one of {', '.join(presets)}")
        return presets[name]


# ---------------------------------------------------------------------------------------------------------
# Sources: sets of (PIL image, int)


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzipped if the name ends in .gz.

    Returns a read-only uint8 array of the shape the header gives ([images, rows, columns] or [labels]).
    Raises DataError if the file cannot be read, is not an idx file of unsigned bytes, or is cut short.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated, corrupt or unreadable idx file ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: not an idx file of unsigned bytes: got magic {raw[:4].hex() or 'nothing'}")
    header = 4 + 4 * raw[3]
    # Sizes that are cut off count as 0, for the length to be wrong below.
    shape = struct.unpack(f">{raw[3]}I", raw[4:header].ljust(header - 4, b"\0"))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise DataError(f"{path}: truncated or corrupt idx file: got {len(raw)} bytes, expected {expected}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


class IdxImages(Dataset):
    """Grey images held in memory. images: uint8 [S, H, W]; labels: uint8 [S]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    @classmethod
    def read(cls, folder: Path, split: str) -> IdxImages:
        """One split ("train" or "t10k") of an idx folder; DataError if a file is missing or damaged."""
        paths = [find_idx(folder, f"{split}-{name}") for name in IDX_NAMES]
        images, labels = (read_idx(path) for path in paths)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{paths[0]} and {paths[1]} do not belong together: got shapes {images.shape} and "
                f"{labels.shape}, expected [images, rows, columns] and [images]"
            )
        return cls(images, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def find_idx(folder: Path, name: str) -> Path:
    """The plain or gzipped idx file `name` in `folder`; DataError if there is neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: the idx file {name} (or {name}.gz) is missing")


class FileImages(Dataset):
    """Images of one of timm's random-access readers, strictly: timm's ImageDataset goes on with the next
    image where one is unreadable, which would train on other data than was asked for."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file)
                image.load()
        except Exception as error:  # Pillow's decoders raise many types, SyntaxError among them
            raise DataError(f"{self.filename(index)}: unreadable or truncated image ({error})") from error
        return image, label

    def filename(self, index: int) -> str:
        """The image's file, or its number where the reader knows no file."""
        return self.reader.filename(index, absolute=True) or f"image number {index}"

    @property
    def labels(self) -> np.ndarray:
        """int64 [S]"""
        if hasattr(self.reader, "samples"):
            return np.array([label for _, label in self.reader.samples], dtype=np.int64)
        return np.asarray(self.reader.dataset[self.reader.label_key], dtype=np.int64)

    def header(self, index: int) -> tuple[str, tuple[int, int]]:
        """Pillow mode and (width, height) from the image's header; DataError if there is none."""
        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                return image.mode, image.size
        except Exception as error:  # as above
            raise DataError(f"{self.filename(index)}: unreadable image ({error})") from error

    def problem(self, index: int) -> str | None:
        """What is wrong with an image, or None, at the cost of its header and its last bytes.

        A JPEG or PNG without its end marker is decoded to see whether it is really truncated. Pixels damaged
        between a good header and a good end are found only when they are decoded.
        """
        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                marker = END_MARKERS.get(image.format, b"")
                if marker not in last_bytes(file):
                    image.load()
        except Exception as error:  # as above
            return f"{self.filename(index)} ({error})"
        return None

    def check(self) -> None:
        """DataError that names the unreadable and truncated images, if there are any."""
        threads = min(16, 2 * (os.cpu_count() or 1))

        def share(first: int) -> list[str]:
            found = (self.problem(index) for index in range(first, len(self), threads))
            return [problem for problem in found if problem]

        with ThreadPoolExecutor(threads) as pool:
            problems = sorted(itertools.chain.from_iterable(pool.map(share, range(threads))))
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise DataError(f"unreadable or truncated images: {'; '.join(problems[:5])}{more}")


def last_bytes(file: Any, count: int = 64) -> bytes:
    """The last `count` bytes of an open binary file, whose position is left as it was."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - count))
    tail = file.read()
    file.seek(position)
    return tail


# ---------------------------------------------------------------------------------------------------------
# Opening


def open_data(spec: str | Path = EMBEDDED, *, root: str | Path | None = None) -> Data:
    """Open a data set for training and testing.

    Args:
        spec: "fashion-mnist-10k" (embedded: 10,000 and 2,000 images of Fashion-MNIST, equally many of each
            class); a folder with the four idx files, plain or gzipped, taken to be Fashion-MNIST; an image
            folder with train/ and one of val/, validation/, valid/, test/, each with one folder per class;
            "torchvision:NAME" (as the class in torchvision.datasets); or a name that timm.data.create_dataset
            knows: "hfds/...", "wds/...", "torch/...", ... .
        root: where torchvision and timm find, or download to, the set; without part otherwise.

    Raises:
        DataError: nothing is there, or not what was expected, or train and test classes differ. Unreadable
            images and empty classes are left to `check_data`.
    """
    spec = str(spec)
    if spec == EMBEDDED:
        return _open_idx(EMBEDDED_FOLDER, name=spec)
    if spec.startswith("torchvision:"):
        return _open_torchvision(spec, root)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if any(folder.glob("*-idx?-ubyte*")):
            return _open_idx(folder, name=spec)
        return _open_image_folder(folder, name=spec)
    if spec.partition("/")[0].lower() in TIMM_PREFIXES and "/" in spec:
        return _open_timm(spec, root)
    raise DataError(f"data: {spec!r} is neither a folder that exists nor a known name; expected {KNOWN}")


def _open_idx(folder: Path, name: str) -> Data:
    train, test = IdxImages.read(folder, "train"), IdxImages.read(folder, "t10k")
    height, width = train.images.shape[1:]
    return Data(
        name=name,
        num_classes=len(FASHION_MNIST_CLASSES),
        class_names=FASHION_MNIST_CLASSES,
        in_chans=1,
        image_size=height if height == width else None,
        mean=FASHION_MNIST_MEAN,
        std=FASHION_MNIST_STD,
        train=train,
        test=test,
    )


def _open_image_folder(folder: Path, name: str) -> Data:
    test_folder = next((folder / test for test in TEST_FOLDERS if (folder / test).is_dir()), None)
    if not (folder / "train").is_dir() or test_folder is None:
        raise DataError(f"data: found nothing to train and test on in the folder {folder}; expected {KNOWN}")
    classes, test_classes = _class_folders(folder / "train"), _class_folders(test_folder)
    if classes != test_classes:
        raise DataError(
            f"{folder}: the classes of train and {test_folder.name} differ: "
            f"only in train: {sorted(set(classes) - set(test_classes)) or 'none'}, "
            f"only in {test_folder.name}: {sorted(set(test_classes) - set(classes)) or 'none'}"
        )
    # With the class list given, a class without images keeps its label and is seen to be empty by check_data.
    class_map = {name: label for label, name in enumerate(classes)}
    train, test = (_read_image_folder(split, class_map) for split in (folder / "train", test_folder))
    return _described(name, train, test, classes)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if not names:
        raise DataError(f"{folder}: holds no class; expected one folder of images for each class")
    return tuple(sorted(names, key=natural_key))


def _read_image_folder(folder: Path, class_map: dict[str, int]) -> FileImages:
    try:
        images = create_dataset("", root=str(folder), search_split=False, class_map=class_map)
    except RuntimeError as error:
        endings = " ".join(get_img_extensions())
        raise DataError(
            f"{folder}: no image in any class folder; expected files with one of the endings {endings}"
        ) from error
    return FileImages(images.reader)


def _open_torchvision(spec: str, root: str | Path | None) -> Data:
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
            train, test = (kind(root, train=split, **options) for split in (True, False))
        else:
            train = kind(root, split="train", **options)
            test = _first_split(lambda split: kind(root, split=split, **options))
    except Exception as error:  # each data set of torchvision, and each way to download, raises its own types
        raise DataError(f"data: torchvision cannot open {name} in {root}: {error}") from error
    data = _described(spec, train, test, tuple(getattr(train, "classes", ())))
    if name == "FashionMNIST":
        data = replace(data, mean=FASHION_MNIST_MEAN, std=FASHION_MNIST_STD)
    return data


def _open_timm(spec: str, root: str | Path | None) -> Data:
    def read(split: str, is_training: bool = False) -> Dataset:
        return create_dataset(
            spec, root=root and str(root), split=split, is_training=is_training, download=False
        )

    try:
        train, test = read("train", is_training=True), _first_split(read)
    except (Exception, SystemExit) as error:  # any reader, and any library behind it
        raise DataError(f"data: timm cannot open {spec!r} (root={root}): {error!r}") from error
    if isinstance(train, IterableDataset):
        classes = tuple(sorted(train.reader.class_to_idx, key=train.reader.class_to_idx.get))
        return _imagenet_like(spec, train, test, classes, num_classes=len(classes) or None, in_chans=3)
    if hasattr(train, "reader"):
        classes = tuple(sorted(train.reader.class_to_idx, key=train.reader.class_to_idx.get))
        return _described(spec, FileImages(train.reader), FileImages(test.reader), classes)
    data = _described(spec, train, test, tuple(getattr(train, "classes", ())))
    if isinstance(train, torchvision.datasets.FashionMNIST):
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


def _described(name: str, train: Dataset, test: Dataset, classes: tuple[str, ...]) -> Data:
    """A `Data` of two map-style sets, with what a look at a few images and the labels tells."""
    looked_at = np.linspace(0, len(train) - 1, num=min(16, len(train)), dtype=int)
    headers = [_header(train, int(index)) for index in looked_at]
    sizes = {edge for _, size in headers for edge in size}
    if not classes:
        labels = labels_of(train)
        classes = tuple(str(label) for label in range(0 if labels is None else int(labels.max()) + 1))
    return _imagenet_like(
        name,
        train,
        test,
        classes,
        num_classes=len(classes) or None,
        in_chans=1 if all(mode in GREY_MODES for mode, _ in headers) else 3,
        image_size=sizes.pop() if len(sizes) == 1 else None,
    )


def _header(images: Dataset, index: int) -> tuple[str, tuple[int, int]]:
    if isinstance(images, FileImages):
        return images.header(index)
    image, _ = images[index]
    return image.mode, image.size


def _imagenet_like(
    name: str,
    train: Dataset,
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
        mean=_for_channels(IMAGENET_DEFAULT_MEAN, in_chans),
        std=_for_channels(IMAGENET_DEFAULT_STD, in_chans),
        train=train,
        test=test,
    )


# ---------------------------------------------------------------------------------------------------------
# Checking


def check_data(data: Data, num_classes: int) -> None:
    """Find what would stop or spoil a run: to be called before its first step.

    Reads the header and the last bytes of every image file: about 0.1 ms for a file in the disk cache.

    Args:
        num_classes: width of the model's head.

    Raises:
        DataError: the head does not have one output for each class; a class has no image; a label is not that
            of a class; an image file is unreadable or truncated. What a stream holds is not known beforehand:
            of a stream, only the number of classes is checked, where it says.
    """
    if data.num_classes is not None and data.num_classes != num_classes:
        raise DataError(
            f"num_classes: the head has {num_classes} outputs, but the data set {data.name} has "
            f"{data.num_classes} classes; expected one output for each class"
        )
    for split, images in (("train", data.train), ("test", data.test)):
        labels = labels_of(images)
        if labels is not None:
            _check_labels(labels, data, split)
        if isinstance(images, FileImages) and hasattr(images.reader, "samples"):
            images.check()


def _check_labels(labels: np.ndarray, data: Data, split: str) -> None:
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(data.class_names):
        found = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no labels"
        raise DataError(f"{data.name}: {split}: got {found}, expected 0 to {len(data.class_names) - 1}")
    counts = np.bincount(labels, minlength=len(data.class_names))
    empty = [data.class_names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise DataError(
            f"{data.name}: {split}: no image in {len(empty)} of {len(data.class_names)} classes: "
            f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
        )


def labels_of(images: Dataset) -> np.ndarray | None:
    """int64 [S], or None where the labels are known only by reading the images."""
    labels = getattr(images, "labels", getattr(images, "targets", None))
    return None if labels is None else np.asarray(labels, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------
# Reproducible randomness


def _seeds(*numbers: int) -> tuple[int, int, int]:
    """Seeds for Python's, NumPy's and torch's generator: well-mixed functions of all the int64 numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=20).digest()
    return struct.unpack("<QIQ", digest)


def _seed_generators(*numbers: int) -> None:
    for_python, for_numpy, for_torch = _seeds(*numbers)
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed, which also seeds every accelerator's generator and is 200 times as slow.
    torch.default_generator.manual_seed(for_torch)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Leave the three global generators as they were found, unless this is a worker process, where nobody
    else draws from them."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class EpochSampler(Sampler):
    """Yields (epoch, index) for each sample of an epoch, in an order that (seed, epoch) determines.

    `position` takes effect with the next iteration, and stays until it is called again. The length is always
    that of a whole epoch.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(_seeds(self.seed, self.epoch)[2])
        order = torch.randperm(self.samples, generator=generator)[self.skip :].tolist()
        return zip(itertools.repeat(self.epoch), order)

    def position(self, epoch: int, skip: int) -> None:
        """Begin the next iterations with sample number `skip` of `epoch`'s order."""
        self.epoch, self.skip = epoch, skip


# ---------------------------------------------------------------------------------------------------------
# From images to batches


class ShiftedCrop:
    """A square crop of `size` pixels from around the centre, shifted at random by at most `padding` pixels in
    each direction; what lies outside of the image is black.

    torchvision's RandomCrop(size, padding) makes the same image by padding it first, at six times the cost.
    """

    def __init__(self, size: int, padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Image.Image) -> Image.Image:
        left = (image.width - self.size) // 2 + random.randint(-self.padding, self.padding)
        top = (image.height - self.size) // 2 + random.randint(-self.padding, self.padding)
        return image.crop((left, top, left + self.size, top + self.size))


class Pipeline:
    """From PIL images to normalised tensors: timm's transforms image by image, then, as in timm's own
    prefetching loader, conversion and normalisation batch by batch, which is several times cheaper.

    Random erasing comes last, on normalised pixels, image by image with a seed for each.
    """

    def __init__(
        self, steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...], erasing: RandomErasing | None
    ) -> None:
        self.steps = transforms.Compose(steps)
        self.mode = "L" if len(mean) == 1 else "RGB"
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.erasing = erasing

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The transformed image, uint8 [H, W, C]; draws from the global generators."""
        if image.mode != self.mode:
            image = image.convert(self.mode)
        pixels = np.asarray(self.steps(image))
        return pixels.reshape(*pixels.shape[:2], -1)

    def batch(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """float32 [B, C, H, W], normalised."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        batch = batch.to(torch.float32, memory_format=torch.contiguous_format)
        return batch.div_(255).sub_(self.mean).div_(self.std)


def _training_pipeline(data: Data, image_size: int, in_chans: int, augment: Augment) -> Pipeline:
    mean, std = _for_channels(data.mean, in_chans), _for_channels(data.std, in_chans)
    steps = create_transform(
        image_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        use_prefetcher=True,
    ).transforms[:-1]  # the last one converts to a tensor
    if augment.crop_padding is not None:
        steps[0] = ShiftedCrop(image_size, augment.crop_padding)
        if data.image_size != image_size:
            steps.insert(0, transforms.Resize(image_size, transforms.InterpolationMode.BICUBIC))
    _keep_one_bit(steps)
    erasing = None
    if augment.reprob > 0:
        erasing = RandomErasing(augment.reprob, mode=augment.remode, max_count=augment.recount, device="cpu")
    return Pipeline(steps, mean, std, erasing)


def _keep_one_bit(steps: list[Any]) -> None:
    """Let the posterizing of timm's policies keep at least one bit of each pixel.

    At the end of its range timm asks Pillow for 0 bits, a black image, which Pillow 13 refuses.
    """
    for step in steps:
        policy = itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ()))
        for operation in policy:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(level_fn: Callable, level: float, hparams: dict[str, Any]) -> tuple[int]:
    (bits,) = level_fn(level, hparams)
    return (max(1, bits),)


def _test_pipeline(data: Data, image_size: int, in_chans: int) -> Pipeline:
    steps = create_transform(
        image_size,
        crop_pct=1.0 if image_size <= SMALL_IMAGE else data.crop_pct,
        interpolation=data.interpolation,
        use_prefetcher=True,
    ).transforms[:-1]  # as above
    return Pipeline(
        steps, _for_channels(data.mean, in_chans), _for_channels(data.std, in_chans), erasing=None
    )


def _for_channels(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Means (or standard deviations) for images that are converted to `in_chans` channels."""
    if len(values) == in_chans:
        return tuple(values)
    return (sum(values) / len(values),) * in_chans


class TrainingSet(Dataset):
    """Batches of augmented samples: takes the (epoch, index) pairs of `EpochSampler`, a batch at a time."""

    def __init__(self, images: Dataset, pipeline: Pipeline, seed: int) -> None:
        self.images, self.pipeline, self.seed = images, pipeline, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = [], []
        with _generators_restored():
            for epoch, index in keys:
                image, label = _sample(self.images, index)
                _seed_generators(self.seed, epoch, index)
                pixels.append(self.pipeline.pixels(image))
                labels.append(label)
            batch = self.pipeline.batch(pixels)
            if self.pipeline.erasing is not None:
                for (epoch, index), image in zip(keys, batch, strict=True):
                    _seed_generators(self.seed, epoch, index, 1)
                    self.pipeline.erasing(image)  # in place
        return batch, torch.tensor(labels, dtype=torch.int64)


class EvaluationSet(Dataset):
    """Batches of samples as they are: takes indices, a batch at a time."""

    def __init__(self, images: Dataset, pipeline: Pipeline) -> None:
        self.images, self.pipeline = images, pipeline

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [_sample(self.images, index) for index in indices]
        batch = self.pipeline.batch([self.pipeline.pixels(image) for image, _ in samples])
        return batch, torch.tensor([label for _, label in samples], dtype=torch.int64)


def _sample(images: Dataset, index: int) -> tuple[Image.Image, int]:
    try:
        return images[index]
    except DataError:
        raise
    except Exception as error:  # of torchvision's data sets, which name neither file nor number
        raise DataError(f"image number {index} of {type(images).__name__}: unreadable ({error})") from error


class StreamSet(IterableDataset):
    """Samples of one of timm's sequential readers, augmented: (float32 [C, H, W], int)."""

    def __init__(self, reader: Any, pipeline: Pipeline, seed: int) -> None:
        self.reader, self.pipeline, self.seed = reader, pipeline, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        # A copy, because a reader that has been read keeps the state of its shuffling for its next epoch.
        reader = copy.copy(self.reader)
        reader.set_epoch(self.epoch)
        worker = get_worker_info()
        for number, (image, label) in enumerate(reader):
            with _generators_restored():
                _seed_generators(self.seed, self.epoch, 0 if worker is None else worker.id, number)
                sample = self.pipeline.batch([self.pipeline.pixels(image)])[0]
                if self.pipeline.erasing is not None:
                    self.pipeline.erasing(sample)
            yield sample, int(label)


class StreamLoader(DataLoader):
    """A DataLoader that drops its first `skip_batches` batches, as Accelerate's loaders do."""

    skip_batches = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.skip_batches, None)


# ---------------------------------------------------------------------------------------------------------
# Loaders


def _as_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate function for sets that make whole batches themselves."""
    return batch


def train_loader(
    data: Data,
    *,
    image_size: int,
    in_chans: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    workers: int = 0,
) -> DataLoader:
    """Shuffled, augmented batches of the training set; the last incomplete batch is dropped.

    Call `set_epoch` before each epoch: without it the loader repeats the epoch it is at (0 at first). timm's
    create_loader does not fit, because it takes no sampler; its transforms are used as they are.

    Args:
        image_size: edge of the square images that the model takes, in pixels.
        in_chans: 1 or 3; images are converted to grey or RGB.
        batch_size: for each process.
        seed: int64; with the epoch it determines order and augmentation.
        workers: processes that load; 0 loads in this one.

    Returns:
        A loader of (float32 [B, C, H, W] normalised, int64 [B]).

    Raises:
        DataError: an argument out of range, fewer images than one batch, or a stream on several processes.
            In iteration: an image that cannot be decoded, by name.
    """
    _check_arguments(image_size, in_chans, batch_size)
    pipeline = _training_pipeline(data, image_size, in_chans, augment)
    if isinstance(data.train, IterableDataset):
        return _stream_loader(data.train, pipeline, batch_size, seed, workers, drop_last=True)
    if len(data.train) < batch_size:
        raise DataError(
            f"batch_size: got {batch_size}, expected at most {len(data.train)}, the number of training images"
        )
    return DataLoader(
        TrainingSet(data.train, pipeline, seed),
        batch_size,
        sampler=EpochSampler(len(data.train), seed),
        drop_last=True,
        collate_fn=_as_is,
        **_loader_options(workers),
    )


def test_loader(
    data: Data, *, image_size: int, in_chans: int, batch_size: int, workers: int = 0
) -> DataLoader:
    """Batches of the whole test set in its order, without augmentation; arguments and batches as in
    `train_loader`, but the last batch may be smaller."""
    _check_arguments(image_size, in_chans, batch_size)
    pipeline = _test_pipeline(data, image_size, in_chans)
    if isinstance(data.test, IterableDataset):
        return _stream_loader(data.test, pipeline, batch_size, seed=0, workers=workers, drop_last=False)
    return DataLoader(
        EvaluationSet(data.test, pipeline), batch_size, collate_fn=_as_is, **_loader_options(workers)
    )


test_loader.__test__ = False  # not a test case of pytest


def _check_arguments(image_size: int, in_chans: int, batch_size: int) -> None:
    if in_chans not in (1, 3):
        raise DataError(f"in_chans: got {in_chans}, expected 1 (grey) or 3 (RGB)")
    if image_size < 1:
        raise DataError(f"image_size: got {image_size}, expected at least 1 pixel")
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected at least 1")


def _loader_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # A generator of its own: a DataLoader draws a seed for its workers at the start of each iteration,
        # from the global generator if it has none; a resumed epoch would draw once more than a whole one.
        "generator": torch.Generator().manual_seed(0),
    }


def _stream_loader(
    images: IterableDataset, pipeline: Pipeline, batch_size: int, seed: int, workers: int, drop_last: bool
) -> DataLoader:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise DataError("data: a stream is read by one process only; use an image folder or 'hfds/...'")
    reader = copy.copy(images.reader)
    reader.common_seed = reader.worker_seed = seed
    reader.batch_size = batch_size
    reader.set_loader_cfg(num_workers=workers)
    # Workers that end with the epoch: their seeds are drawn, and the epoch reaches them, when they start.
    options = _loader_options(workers) | {"persistent_workers": False}
    return StreamLoader(StreamSet(reader, pipeline, seed), batch_size, drop_last=drop_last, **options)


def set_epoch(loader: DataLoader, epoch: int, start: int = 0) -> None:
    """Make the next iterations of a training loader yield batches start, start + 1, ... of `epoch`.

    Args:
        loader: from `train_loader`, bare or prepared by Accelerate; start then counts the batches of each
            process, of which the n processes take turns in the epoch's one order.
        epoch: 0 or more.
        start: 0 to len(loader), which stays the number of batches of a whole epoch.
    """
    if not 0 <= start <= len(loader):
        raise DataError(f"start: got {start}, expected 0 to the {len(loader)} batches of an epoch")
    if isinstance(loader.dataset, StreamSet):
        loader.dataset.epoch = epoch
        loader.skip_batches = start
        bare = getattr(loader, "base_dataloader", loader)
        bare.generator = torch.Generator().manual_seed(_seeds(loader.dataset.seed, epoch)[2])
        return
    batches, processes = loader.batch_sampler, 1
    if isinstance(batches, BatchSamplerShard):
        processes = 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    if not isinstance(batches.sampler, EpochSampler):
        raise DataError(f"loader: got one with a {type(batches.sampler).__name__}, expected a train_loader")
    batches.sampler.position(epoch, skip=start * processes * batches.batch_size)
