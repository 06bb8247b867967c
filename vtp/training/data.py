"""Images to train and test on: opening a data set and checking it.

`open_data` turns a name or a folder into a `Data`: two sets of (PIL image, label) and what is known about
them. `check_data` finds what would stop a run before its first step. Readers of files and archives are
timm's. How the sets become batches is in vtp/training/loaders.py.
"""

from __future__ import annotations

import gzip
import inspect
import itertools
import math
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, resolve_data_config
from timm.data.constants import DEFAULT_CROP_PCT
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset

from vtp.training.multi_label import METADATA, MultiLabelReader

EMBEDDED = "fashion-mnist-10k"
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
IDX_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
TEST_FOLDERS = ("val", "validation", "valid", "test")
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "wds", "torch")
KNOWN = (
    f"'{EMBEDDED}' (ships with the package); a folder with the four idx files of Fashion-MNIST "
    "(train-images-idx3-ubyte[.gz] and so on); an image folder (train/ and val/, validation/ or test/, each "
    "with one folder per class); 'torchvision:NAME'; or a name of timm.data.create_dataset "
    f"({', '.join(f'{prefix}/...' for prefix in TIMM_PREFIXES)})"
)


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
        crop_pct: share of the resized image's edge that a test image keeps. Small images are kept
            whole whatever it says (see vtp/training/loaders.py).
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
        """The class of every image, int64 [S]"""
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
            folder with train/ and one of val/, validation/, valid/, test/, each with one folder per class, or
            each with a metadata.csv where an image may be of several (see `multi_label`);
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


def is_small_grey(spec: str | Path) -> bool:
    """Whether `open_data` would open small grey images, such as Fashion-MNIST's: idx files, those of the
    package among them, or what torchvision has of the kind."""
    spec = str(spec)
    if spec == EMBEDDED or (spec.startswith("torchvision:") and spec.endswith("MNIST")):
        return True
    folder = Path(spec).expanduser()
    return folder.is_dir() and any(folder.glob("*-idx?-ubyte*"))


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
    if (test_folder / METADATA).is_file():
        return _open_multi_label(folder / "train", test_folder, name)
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


def _open_multi_label(train_folder: Path, test_folder: Path, name: str) -> Data:
    try:
        train, test = (MultiLabelReader(split) for split in (train_folder, test_folder))
    except ValueError as error:
        raise DataError(str(error)) from error
    if train.class_names != test.class_names:
        raise DataError(
            f"{test_folder / METADATA}: got columns {test.class_names}, expected those of "
            f"{train_folder / METADATA}: {train.class_names}"
        )
    return _described(name, FileImages(train), FileImages(test), train.class_names)


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
        mean=for_channels(IMAGENET_DEFAULT_MEAN, in_chans),
        std=for_channels(IMAGENET_DEFAULT_STD, in_chans),
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
            f"{data.num_classes} classes; expected one output for each class (--new-head trains a new one)"
        )
    for split, images in (("train", data.train), ("test", data.test)):
        labels = labels_of(images)
        if labels is not None:
            _check_labels(labels, data, split)
        if isinstance(images, FileImages) and hasattr(images.reader, "samples"):
            images.check()


def _check_labels(labels: np.ndarray, data: Data, split: str) -> None:
    if labels.ndim == 2:  # one number for each class: as if each image were there once for each that it has
        if labels.shape[1] != len(data.class_names) or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"{data.name}: {split}: got labels of {labels.shape[1]} numbers from {labels.min()} to "
                f"{labels.max()}, expected {len(data.class_names)} times 0 or 1"
            )
        labels = labels.nonzero()[1]
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
    """The class of every image, int64 [S], or None where the labels are known only by reading the images."""
    labels = getattr(images, "labels", getattr(images, "targets", None))
    return None if labels is None else np.asarray(labels, dtype=np.int64)


def is_multi_label(data: Data) -> bool:
    """Whether a label of the data is a vector with one number for each class."""
    if isinstance(data.train, IterableDataset):
        return False
    labels = labels_of(data.train)
    return np.ndim(data.train[0][1] if labels is None else labels[0]) == 1


def for_channels(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """Means (or standard deviations) for images that are converted to `in_chans` channels."""
    if len(values) == in_chans:
        return tuple(values)
    return (sum(values) / len(values),) * in_chans
