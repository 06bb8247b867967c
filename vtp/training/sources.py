"""Sets of (PIL image, int): idx files, files that timm's readers find, and any set with other labels."""

from __future__ import annotations

import copy
import gzip
import itertools
import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from vtp.training.multi_label import MultiLabelReader
from vtp.training.pixels import DataError, check_depth, is_deep
from vtp.words import counted

IDX_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
# A file of these formats that is whole ends in these bytes, give or take some padding.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


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
        raise DataError(
            f"{path}: truncated or corrupt idx file: got {counted(len(raw), 'byte')}, expected {expected:,}"
        )
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
    image where one is unreadable, which would train on other data than was asked for.

    label_map: the label to give for each that the reader gives; None leaves them as they are.
    """

    def __init__(self, reader: Any, label_map: Sequence[int] | None = None) -> None:
        self.reader, self.label_map = reader, label_map

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
        return image, label if self.label_map is None else self.label_map[label]

    def filename(self, index: int) -> str:
        """The image's file, or its number where the reader knows no file."""
        return self.reader.filename(index, absolute=True) or f"image number {index}"

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, int64 [S]"""
        if hasattr(self.reader, "labels"):
            labels = self.reader.labels
        elif hasattr(self.reader, "samples"):
            labels = np.array([label for _, label in self.reader.samples], dtype=np.int64)
        else:
            labels = np.asarray(self.reader.dataset[self.reader.label_key], dtype=np.int64)
        return labels if self.label_map is None else np.asarray(self.label_map)[labels]

    def header(self, index: int) -> tuple[str, tuple[int, int], bool]:
        """Pillow mode, (width, height) and whether it has more than 8 bits a channel, from the header of an
        image; DataError if there is none."""
        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                return image.mode, image.size, is_deep(image)
        except Exception as error:  # as above
            raise DataError(f"{self.filename(index)}: unreadable image ({error})") from error

    def check_depth(self, indices: Sequence[int]) -> None:
        """DataError unless what the pixels of these deep images mean is known; looks at 64 of them."""
        looked_at = spread(indices, 64)
        check_depth((self.filename(index), self[index][0]) for index in looked_at)

    def problem(self, index: int, deep: list[int]) -> str | None:
        """What is wrong with an image, or None, at the cost of its header and its last bytes; adds its index
        to `deep` if it has more than 8 bits a channel.

        A JPEG or PNG without its end marker is decoded to see whether it is really truncated. Pixels damaged
        between a good header and a good end are found only when they are decoded.
        """
        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                if is_deep(image):
                    deep.append(index)
                marker = END_MARKERS.get(image.format, b"")
                if marker not in last_bytes(file):
                    image.load()
        except Exception as error:  # as above
            return f"{self.filename(index)} ({error})"
        return None

    def examine(self) -> tuple[list[str], list[int]]:
        """The images that are unreadable or truncated, a text each, and the numbers of those with more than 8
        bits a channel."""
        threads = min(16, 2 * (os.cpu_count() or 1))
        deep: list[int] = []

        def share(first: int) -> list[str]:
            found = (self.problem(index, deep) for index in range(first, len(self), threads))
            return [problem for problem in found if problem]

        with ThreadPoolExecutor(threads) as pool:
            problems = sorted(itertools.chain.from_iterable(pool.map(share, range(threads))))
        return problems, sorted(deep)

    def check(self) -> None:
        """DataError that names the unreadable and truncated images, if there are any, or that says that the
        values of deep images have no known meaning. Shards were examined when they were indexed."""
        problems, deep = getattr(self.reader, "examined", None) or self.examine()
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise DataError(f"unreadable or truncated images: {'; '.join(problems[:5])}{more}")
        self.check_depth(deep)


class Relabelled(Dataset):
    """A map-style set of (PIL image, int) with other labels: label_map has one for each of the set's own."""

    def __init__(self, images: Dataset, label_map: Sequence[int]) -> None:
        self.images, self.label_map = images, label_map

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images[index]
        return image, self.label_map[label]

    @property
    def labels(self) -> np.ndarray | None:
        """The class of every image, int64 [S], or None as `labels_of` gives it."""
        labels = labels_of(self.images)
        return None if labels is None else np.asarray(self.label_map)[labels]


def relabelled(images: Dataset, label_map: Sequence[int], num_classes: int) -> Dataset:
    """The same images with other labels, of so many classes: `label_map` has one for each of theirs."""
    if isinstance(images, IterableDataset):
        images = copy.copy(images)
        images.target_transform = label_map.__getitem__
        return images
    if isinstance(images, FileImages) and isinstance(images.reader, MultiLabelReader):
        return FileImages(images.reader.relabelled(label_map, num_classes))
    if isinstance(images, FileImages):
        return FileImages(images.reader, label_map)
    return Relabelled(images, label_map)


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many of the indices, evenly spread."""
    places = np.linspace(0, len(indices) - 1, num=min(most, len(indices)), dtype=int)
    return [int(indices[place]) for place in places]


def last_bytes(file: Any, count: int = 64) -> bytes:
    """The last `count` bytes of an open binary file, whose position is left as it was."""
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - count))
    tail = file.read()
    file.seek(position)
    return tail


def open_images(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Image files, decoded; DataError for one that is none, or of whose pixels the meaning is not known."""
    images = FileImages(_Paths(paths))
    images.check()
    return [image for image, _ in images]


class _Paths:
    """A reader, as timm has them, of files without labels."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.samples = [(str(path), 0) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, absolute: bool = False) -> str:
        return self.samples[index][0]


def header_of(images: Dataset, index: int) -> tuple[str, tuple[int, int], bool]:
    """Of an image of any map-style set what `FileImages.header` tells."""
    if isinstance(images, FileImages):
        return images.header(index)
    image, _ = images[index]
    return image.mode, image.size, is_deep(image)


def check_depth_of(images: Dataset) -> None:
    """DataError unless what the pixels of the deep images among some 64 mean is known."""
    deep = [index for index in spread(range(len(images)), 64) if header_of(images, index)[-1]]
    if isinstance(images, FileImages):
        images.check_depth(deep)
    else:
        check_depth((f"image number {index}", images[index][0]) for index in deep)


def labels_of(images: Dataset) -> np.ndarray | None:
    """The class of every image, int64 [S], or None where the labels are known only by reading the images."""
    labels = getattr(images, "labels", getattr(images, "targets", None))
    return None if labels is None else np.asarray(labels, dtype=np.int64)


def shards_of(images: Dataset) -> Any:
    """What knows the shards that images lie in, one after the other: their `lengths`, the number of images of
    each, and `digests` of what is in them. None for images that lie in none."""
    if isinstance(images, Relabelled):
        return shards_of(images.images)
    reader = images.reader if isinstance(images, FileImages) else images
    return reader if hasattr(reader, "lengths") and hasattr(reader, "digests") else None
