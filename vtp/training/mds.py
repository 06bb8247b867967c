"""MosaicML Streaming data sets, of this machine or remote, as a set like a folder of images.

The library `mosaicml-streaming` fetches, unpacks and decodes; which image is wanted when is our own sampler's
to say, as for all other sets, so that order, resuming and the numbers of processes and workers are the same.
Nothing is shared by memory between processes, and nothing is left behind where one is killed: a shard that is
not there is fetched by the first that wants it, the others wait.

The classes of the images are known only by reading all of them, so they are not.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset

from vtp.files import cache_folder
from vtp.training.pixels import DataError, is_deep

PREFIX = "mds://"
IMAGE_ENCODINGS = ("jpeg", "png", "pil")
LABEL_ENCODINGS = ("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "str_int")


class MdsImages(Dataset):
    """One split of a data set, samples (PIL image, int) of its column of images and that of integers.

    Args:
        place: a folder, or an address that the library knows: s3://..., gs://..., ...
        cache: folder into which the shards of an address are fetched, and compressed ones unpacked; None is
            one of `cache_folder()` for an address, and the folder itself for one.
        split: name of the folder in it.

    Attributes:
        lengths: images of each shard; digests: of each shard its name, images and bytes.

    Raises:
        DataError: the library is not installed; nothing is there; a column is a pickle, which is found out
            without opening one; there is not one column of images and one of integers.
    """

    def __init__(self, place: str, cache: str | Path | None, split: str) -> None:
        try:
            from streaming.base.stream import Stream
            from streaming.base.world import World
        except ImportError as error:
            raise DataError(
                f"data: {PREFIX} needs the optional package mosaicml-streaming: vtp[mds] ({error})"
            ) from error
        is_address = "://" in place
        if cache is None and is_address:
            cache = cache_folder() / "mds" / hashlib.sha256(place.encode()).hexdigest()[:16]
        remote, local = (place, str(cache)) if cache is not None else (None, place)
        self.split = split
        try:
            self.stream = Stream(
                remote=remote, local=local, split=split, download_retry=2, download_timeout=300, keep_zip=True
            )
            # Refuses pickles.
            self.shards = self.stream.get_shards(World.detect(), allow_unsafe_types=False)
        except Exception as error:  # of the library, and of any cloud's behind it
            raise DataError(f"data: cannot open split {split!r} of {PREFIX}{place}: {error}") from error
        self.lengths = [shard.samples for shard in self.shards]
        if not sum(self.lengths):
            raise DataError(f"data: split {split!r} of {PREFIX}{place} has no samples")
        self.ends = np.cumsum(self.lengths)
        self.digests = [
            (shard.raw_data.basename, shard.samples, shard.raw_data.bytes) for shard in self.shards
        ]
        self.image, self.label = (
            self._column(kind, encodings)
            for kind, encodings in (("images", IMAGE_ENCODINGS), ("integers", LABEL_ENCODINGS))
        )

    def _column(self, kind: str, encodings: tuple[str, ...]) -> str:
        columns = {
            (name, encoding)
            for shard in self.shards
            for name, encoding in zip(shard.column_names, shard.column_encodings, strict=True)
        }
        found = sorted({name for name, encoding in columns if encoding in encodings})
        if len(found) != 1:
            there = ", ".join(f"{name} ({encoding})" for name, encoding in sorted(columns))
            raise DataError(
                f"data: split {self.split!r}: got {len(found)} columns of {kind} among {there}; expected "
                f"one, encoded as {', '.join(encodings)}"
            )
        return found[0]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected 0 to {len(self) - 1}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard, place = self.shards[number], index - (int(self.ends[number]) - self.lengths[number])
        try:
            self._fetch(shard)
            sample = shard.get_item(place)
            image, label = sample[self.image], int(sample[self.label])
            deep = is_deep(image)
            image.load()
        except Exception as error:  # of the library, of Pillow's decoders, and of any cloud's
            raise DataError(f"{self._file(shard)}: sample {place}: unreadable ({error})") from error
        if deep:
            raise DataError(
                f"{self._file(shard)}: sample {place}: an image of more than 8 bits a channel (mode "
                f"{image.mode!r}), whose meaning takes a look at many; expected 8 bits, or an image folder"
            )
        return image, label

    def _file(self, shard: Any) -> str:
        return os.path.join(self.stream.local, self.split, shard.raw_data.basename)

    def _fetch(self, shard: Any) -> None:
        """Have the file of a shard; one that is not whole is of a process that was killed, and goes."""
        file, size = Path(self._file(shard)), shard.raw_data.bytes
        if _is_whole(file, size):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not _is_whole(file, size):
                if self.stream.remote is not None or shard.zip_data is not None:
                    file.unlink(missing_ok=True)
                self.stream.prepare_shard(shard)
        if not _is_whole(file, size):
            raise OSError(f"got {file.stat().st_size:,} bytes, expected {size:,}")


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
