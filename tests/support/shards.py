"""Webdataset shards of small images."""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def noise(number: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """A grey image that is another for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of members by name, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, splits: Mapping[str, Sequence[int]], classes: int = 3) -> Path:
    """folder/<split>/<shard>.tar: of each split shards of so many images, numbered through, of which number n
    is `noise(n)` of the class n % classes."""
    for split, lengths in splits.items():
        number = 0
        for shard, length in enumerate(lengths):
            members = []
            for _ in range(length):
                members += [(f"{number:05d}.png", encoded(noise(number))),
                            (f"{number:05d}.cls", str(number % classes).encode())]  # fmt: skip
                number += 1
            write_tar(folder / split / f"{shard:03d}.tar", members)
    return folder
