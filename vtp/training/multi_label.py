"""Images that may be of several classes at once, and how well a model tells which.

On disk they are as Hugging Face's `imagefolder` has them, with a column for each class, as timm reads binary
fields: train/ and val/, each with images at any depth and a metadata.csv

    file_name,cat,dog,indoors
    0001.jpg,1,0,1
    more/0002.jpg,0,0,0

A label is then a vector of 0 and 1, one for each class in the order of the columns.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp.training.pixels import DataError

METADATA = "metadata.csv"


class MultiLabelReader:
    """The images that a metadata.csv lists, as one of timm's readers gives them.

    Attributes:
        samples: (path, label) for each image; class_names: the columns.

    Raises:
        DataError: the file is not as above, or names an image that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.root, file = folder, folder / METADATA
        try:
            with open(file, newline="", encoding="utf-8-sig") as lines:
                header, *rows = list(csv.reader(lines)) or [[]]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file}: cannot be read ({error})") from error
        if header[:1] != ["file_name"] or len(header) < 2 or len(set(header)) < len(header):
            raise DataError(f"{file}: got columns {header[:6]}, expected file_name and one for each class")
        self.class_names = tuple(header[1:])
        self.samples = [self._sample(file, line, row) for line, row in enumerate(rows, 2) if row]
        if not self.samples:
            raise DataError(f"{file}: lists no image")

    def _sample(self, file: Path, line: int, row: list[str]) -> tuple[str, tuple[int, ...]]:
        name, *values = (value.strip() for value in row)
        if len(values) != len(self.class_names) or not set(values) <= {"0", "1"}:
            raise DataError(
                f"{file}, line {line}: got {row[:6]}, expected a file name and "
                f"{len(self.class_names)} times 0 or 1"
            )
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{file}, line {line}: there is no image {path}")
        return str(path), tuple(map(int, values))

    def relabelled(self, label_map: Sequence[int], num_classes: int) -> MultiLabelReader:
        """The same images with vectors of so many classes: `label_map` has a place for each column."""
        other = copy.copy(self)
        other.samples = []
        for path, label in self.samples:
            wider = [0] * num_classes
            for place, value in zip(label_map, label, strict=True):
                wider[place] = value
            other.samples.append((path, tuple(wider)))
        return other

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, ...]]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, absolute: bool = False) -> str:
        """The image's path, relative to the folder or as it is opened."""
        path = Path(self.samples[index][0])
        return str(path if absolute else path.relative_to(self.root))


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over the classes of the average precision, in percent, of those that an image has.

    scores: [images, classes], higher is more likely; targets: 0 or 1, alike.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    found = (precision * hits).sum(0) / hits.sum(0)  # NaN for a class without an image
    return 100.0 * found.nanmean().item()
