"""Webdataset shards on a disk of this machine, read by place: any image of any shard, without what is before.

A shard is an uncompressed tar file whose samples are members that follow each other with a key and several
endings: `0007.jpg` with its class in `0007.cls`, or in the field `label` of `0007.json`. The key of a sample
ends at the first dot of a name: `7.left.jpg` is a file `left.jpg` of sample 7, and no image of it. The
headers of a shard are read once: where its images lie and of which classes they are is kept, with what is
wrong with them, under `cache_folder()`. The shards are then a set like a folder of images, for any number of
processes.

Only images, `.cls` and `.json` are ever read of a shard; members of other kinds, pickles among them, are not.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vtp.files import FileError, cache_folder, write_atomic
from vtp.training.classes import in_short
from vtp.training.pixels import DataError
from vtp.training.progress import share_bar
from vtp.training.sources import FileImages
from vtp.words import counted

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "label"  # of a .json, where timm's _info.json names none
TEST_SPLITS = ("val", "validation", "valid", "test")
INFO_FILES = ("_info.json", "info.json")
CACHE_VERSION = 2  # 1 took the first of two images under one key
# A name as webdataset divides it: at the first dot after the last slash.
_SAMPLE = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_END = bytes(tarfile.BLOCKSIZE)
# At an end: two blocks, and what fills up the last record.
_MOST_ZEROS = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE - tarfile.BLOCKSIZE


# ---------------------------------------------------------------------------------------------------------
# Which shards there are


@dataclass(frozen=True)
class ShardSplit:
    """The shards of one split.

    label_field: of the .json, in which the class is; None for .cls or, where there is none, LABEL_FIELD.
    images: how many there should be; None where nothing says.
    """

    paths: tuple[str, ...]
    label_field: str | None = None
    images: int | None = None


def find_shards(folder: Path) -> dict[str, ShardSplit]:
    """The splits "train" and "test" of a folder of shards, as far as they are there; {} for another folder.

    As its _info.json says, as timm's have one; else by names: `train/0000.tar`, `set-train-0000.tar`. Shards
    beside or in folders of anything else are archives of it.

    Raises:
        DataError: an _info.json cannot be read, or not all names tell the split.
    """
    for name in INFO_FILES:
        if (folder / name).is_file() and (said := _from_info(folder / name)):
            return said
    folders = [folder / name for name in ("train", *TEST_SPLITS) if (folder / name).is_dir()]
    paths = [path for each in (folder, *folders) for path in each.glob("*.tar") if not path.is_dir()]
    if gone := [str(path) for path in paths if not path.is_file()]:
        raise DataError(
            f"data: got {counted(len(gone), 'shard')} with no file behind it: {in_short(gone, 4)}"
        )
    compressed = [str(path) for each in (folder, *folders) for path in each.iterdir() if _is_compressed(path)]
    if paths and compressed:
        raise DataError(
            f"data: got {counted(len(compressed), 'compressed shard')} in {folder}, expected none: unpack "
            f"them, or move them elsewhere: {in_short(compressed, 4)}"
        )
    if not paths or any(_holds_folders(each) for each in folders):
        return {}
    named = any(_split_word(path.relative_to(folder)) for path in paths)
    return _by_names(paths, folder) if named or not _holds_folders(folder) else {}


def expand_shards(pattern: str) -> dict[str, ShardSplit]:
    """The splits of the shards that a path with braces, stars and question marks stands for.

    Raises:
        DataError: there is no such file, or not all names tell the split.
    """
    patterns = [pattern]
    if "{" in pattern:
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise DataError(
                f"data: {pattern!r} has braces, which need the optional package webdataset: vtp[streams]"
            ) from error
        patterns = list(braceexpand(pattern))
    paths = []
    for each in patterns:
        found = sorted(glob.glob(os.path.expanduser(each)))
        if not found:
            raise DataError(f"data: there is no shard {each}, which {pattern!r} stands for")
        paths += found
    return _by_names([Path(path) for path in paths], Path(os.path.commonpath(map(os.path.dirname, paths))))


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(folder))


def _split_word(path: Path) -> str | None:
    """The first word of a path that names a split."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((word for word in words if word in ("train", *TEST_SPLITS)), None)


def _by_names(paths: Iterable[Path], folder: Path) -> dict[str, ShardSplit]:
    """The splits by the names of the paths below `folder`; all are of the test split where none names one."""
    by_word: dict[str | None, list[str]] = {}
    for path in sorted(set(paths)):
        by_word.setdefault(_split_word(path.relative_to(folder)), []).append(str(path))
    unknown = by_word.pop(None, [])
    if unknown and by_word:
        raise DataError(
            f"data: got {counted(len(unknown), 'shard')} whose name does not tell the split: "
            f"{in_short(unknown, 4)}; expected train or one of {', '.join(TEST_SPLITS)} in each"
        )
    found = {"train": by_word.get("train", ())}
    found["test"] = next((by_word[word] for word in TEST_SPLITS if word in by_word), unknown)
    return {split: ShardSplit(tuple(paths)) for split, paths in found.items() if paths}


def _from_info(file: Path) -> dict[str, ShardSplit]:
    """The splits of timm's _info.json; {} where it is none, or not all are uncompressed tar files."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(info, dict) or "splits" not in info:
            return {}
        found = {}
        for split, names in (("train", ("train",)), ("test", TEST_SPLITS)):
            said = next((info["splits"][name] for name in names if name in info["splits"]), None)
            if said is not None:
                paths = tuple(str(file.parent / name) for name in said["filenames"])
                found[split] = ShardSplit(paths, said.get("alt_label") or None, int(said["num_samples"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not as timm writes it: expected splits with filenames and num_samples ({error!r})"
        ) from error
    plain = all(path.endswith(".tar") for split in found.values() for path in split.paths)
    return found if plain else {}


# ---------------------------------------------------------------------------------------------------------
# What is in a shard


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a shard lie, in their order.

    Attributes:
        offsets, sizes: of the files of the images in bytes, int64 [S]; labels: int64 [S].
        keys: names of the samples, UTF-8, bytes [S].
        left_out: samples without an image, and images with a negative class, which is none: int64 [2].
        problems: the images that cannot be read, a text each; deep: numbers of those with more than 8 bits
            a channel, int64.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    left_out: np.ndarray
    problems: np.ndarray
    deep: np.ndarray

    def digest(self) -> str:
        """What is known of the images without decoding any, as a SHA-256 in hexadecimal digits."""
        found = hashlib.sha256()
        for part in (self.sizes, self.labels, self.keys):
            found.update(part.tobytes())
        return found.hexdigest()


def index_of(path: str, label_field: str | None = None) -> ShardIndex:
    """The index of a shard: the one that is kept, where the file is as it was then, or a new one, which is
    kept if that can be.

    Raises:
        DataError: the file is no uncompressed tar file, or is cut short; an image has no class.
    """
    file = _cache_file(path, label_field)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return ShardIndex(**arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        pass  # none, or of no use
    index = _examined(path, _read_index(path, label_field))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, lambda temporary: _write(temporary, index))
    except (OSError, FileError):
        pass  # it is made again next time
    return index


def _write(temporary: Path, index: ShardIndex) -> None:
    with open(temporary, "wb") as file:
        np.savez(file, **vars(index))


def _cache_file(path: str, label_field: str | None) -> Path:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read this shard ({error.strerror})") from error
    known = (CACHE_VERSION, os.path.realpath(path), found.st_size, found.st_mtime_ns, label_field)
    return cache_folder() / "shards" / f"{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}.npz"


def _read_index(path: str, label_field: str | None) -> ShardIndex:
    places: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    no_image = no_class = 0
    for key, files in _samples(path):
        images = [ending for ending in IMAGE_ENDINGS if ending in files]
        if len(images) > 1:
            raise DataError(f"{path}: {key}: has the images .{' and .'.join(images)}, expected one")
        if not images:
            no_image += 1
            continue
        image = files[images[0]]
        label = _label(path, key, files, label_field)
        if label < 0:
            no_class += 1
            continue
        places.append((*image[:2], label))
        keys.append(key.encode("utf-8", "surrogateescape"))
    offsets, sizes, labels = np.array(places, dtype=np.int64).reshape(-1, 3).T.copy()
    return ShardIndex(
        offsets,
        sizes,
        labels,
        keys=np.array(keys, dtype="S"),
        left_out=np.array([no_image, no_class]),
        problems=np.array([], dtype="U"),
        deep=np.array([], dtype=np.int64),
    )


def _samples(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The key of each sample and its files by ending: (offset, size) of an image, the content of a label."""
    key, files = None, {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # which would grow
                match = _SAMPLE.fullmatch(member.name)
                if match is None or _META.match(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    _refuse_linked(path, member, match[2].lower())
                    continue
                if match[1] != key:
                    if key is not None:
                        yield key, files
                    key, files = match[1], {}
                ending = match[2].lower()
                if ending in files:
                    raise DataError(f"{path}: {key}: has two files .{ending}, expected one")
                if ending in IMAGE_ENDINGS:
                    files[ending] = (member.offset_data, member.size)
                elif ending in ("cls", "json"):
                    file.seek(member.offset_data)
                    files[ending] = file.read(member.size)
            # tarfile takes for the end a header that it cannot read or that is zeros, and a file that stops.
            file.seek(tar.offset)
            rest = file.read(_MOST_ZEROS + 1)
            if not len(_END) <= len(rest) <= _MOST_ZEROS or any(rest):
                raise DataError(
                    f"{path}: damaged or cut short, or several in one, after {key or 'its beginning'}: "
                    f"expected the mark of the end of a tar file at byte {tar.offset:,}, and at most "
                    f"{_MOST_ZEROS:,} bytes of zeros from there on"
                )
    except DataError:
        raise
    except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: of what an extended header holds
        where = f" after {key}" if key else ""
        raise DataError(f"{path}: no uncompressed tar file, damaged or cut short{where} ({error})") from error
    if key is not None:
        yield key, files


def _refuse_linked(path: str, member: tarfile.TarInfo, ending: str) -> None:
    """Raise DataError where an image or a class is a member without its content, such as the second of two
    names of one file, which tar writes as a hard link to the first."""
    if ending not in (*IMAGE_ENDINGS, "cls", "json"):
        return
    kind = "a sparse file" if member.isreg() else "no file"
    if member.islnk() or member.issym():
        kind = f"a {'hard' if member.islnk() else 'symbolic'} link to {member.linkname}"
    raise DataError(
        f"{path}: {member.name}: is {kind}, expected a file: write the shard with `tar --dereference "
        "--hard-dereference`"
    )


def _label(path: str, key: str, files: Mapping[str, bytes], label_field: str | None) -> int:
    """The class of a sample."""
    try:
        if label_field is None and "cls" in files:
            found = files["cls"].decode()
        else:
            found = json.loads(files["json"])[label_field or LABEL_FIELD]
        if isinstance(found, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", found, re.ASCII) is None:
            raise ValueError(f"got {found!r}")  # of which Python reads more as a number, such as 1_0
        label = int(found)
        if isinstance(found, bool) or float(found) != label or abs(label) >= 2**31:
            raise ValueError(f"got {found!r}")
        return label
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        field = f"the number of a class in field {label_field or LABEL_FIELD!r} of a .json"
        expected = field if label_field else f"a number in a .cls, or {field}"
        raise DataError(f"{path}: {key}: has no class, expected {expected} ({error!r})") from error


def _examined(path: str, index: ShardIndex) -> ShardIndex:
    """The index with what is wrong with the images, each of which is opened."""
    problems, deep = FileImages(ShardReader([path], [index])).examine()
    return ShardIndex(
        **vars(index) | {"problems": np.array(problems, dtype="U"), "deep": np.array(deep, dtype=np.int64)}
    )


# ---------------------------------------------------------------------------------------------------------
# All shards of a split


class ShardReader:
    """The images of shards in their order, as one of timm's readers of files gives them.

    Attributes:
        lengths: images of each shard; labels: of all images, int64 [S].
        examined: the images that cannot be read, a text each, and the numbers of those with more than 8 bits
            a channel.
        left_out: samples without an image, and images with a negative class.
        digests: of each shard its file's name and what is in it.
    """

    def __init__(self, paths: Sequence[str], indexes: Sequence[ShardIndex]) -> None:
        self.paths, self.keys = tuple(paths), [index.keys for index in indexes]
        self.lengths = [len(index.labels) for index in indexes]
        self.ends = np.cumsum(self.lengths)
        self.offsets, self.sizes, self.labels = (
            np.concatenate([getattr(index, name) for index in indexes])
            for name in ("offsets", "sizes", "labels")
        )
        firsts = self.ends - self.lengths
        deep = [int(i + first) for index, first in zip(indexes, firsts, strict=True) for i in index.deep]
        self.examined = [str(text) for index in indexes for text in index.problems], deep
        self.left_out = sum(index.left_out for index in indexes).tolist()
        self.digests = [
            (os.path.basename(path), index.digest()) for path, index in zip(paths, indexes, strict=True)
        ]

    @classmethod
    def open(cls, split: ShardSplit) -> ShardReader:
        """The shards of a split; indexes those that are not yet, which is told on stderr.

        Raises:
            DataError: a shard cannot be read, there is no image, or there are not as many as there should be.
        """
        count = len(split.paths)
        # Processes that start together begin at different shards, and find the others' in the cache.
        rank, ranks = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))
        order = np.roll(np.arange(count), -(rank * count // ranks)).tolist()
        indexes: list[ShardIndex | None] = [None] * count
        new = sum(not _cache_file(path, split.label_field).exists() for path in split.paths)
        if new and rank == 0:
            folder = os.path.dirname(split.paths[0])
            print(
                f"vtp: reading what is in {new:,} of {counted(count, 'shard')} of {folder}", file=sys.stderr
            )
        with share_bar(Console(stderr=True), "index of shards") as bar:
            for done, number in enumerate(order, 1):
                indexes[number] = index_of(split.paths[number], split.label_field)
                bar(os.path.basename(split.paths[number]), done / count)
        reader = cls(split.paths, indexes)
        _, no_class = reader.left_out
        samples = len(reader) + no_class
        if split.images not in (None, samples):
            raise DataError(
                f"{os.path.dirname(split.paths[0])}: got {counted(samples, 'image')} in "
                f"{counted(count, 'shard')}, expected {split.images:,} as {INFO_FILES[0]} says"
            )
        if not len(reader):
            raise DataError(
                f"{in_short(split.paths, 3)}: no image in these shards; expected files with one of the "
                f"endings .{' .'.join(IMAGE_ENDINGS)} behind the first dot of their names"
            )
        return reader

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        path = self.paths[self._shard(index)]
        size = int(self.sizes[index])
        with open(path, "rb", buffering=0) as file:
            file.seek(int(self.offsets[index]))
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"got {len(content):,} bytes, expected {size:,}: the shard was changed or cut")
        return io.BytesIO(content), int(self.labels[index])

    def filename(self, index: int, absolute: bool = False) -> str:
        """The shard, and the key of the image in it."""
        shard = self._shard(index)
        path, key = self.paths[shard], self.keys[shard][index - (self.ends[shard] - self.lengths[shard])]
        return f"{path if absolute else os.path.basename(path)}: {key.decode('utf-8', 'replace')}"

    def _shard(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}")
        return int(np.searchsorted(self.ends, index, side="right"))
