"""Image data for training and testing."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """The data cannot be used as asked; the message names what is wrong and what was expected."""


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
    shape = tuple(int(size) for size in np.frombuffer(raw[4:header], dtype=">u4"))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise DataError(f"{path}: truncated or corrupt idx file: got {len(raw)} bytes, expected {expected}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
