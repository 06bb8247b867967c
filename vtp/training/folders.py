"""Which files of a class folder are read: torchvision's choice; the others are counted and named."""

from __future__ import annotations

import mimetypes
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from vtp.training.classes import in_short
from vtp.training.pixels import DataError
from vtp.words import counted

# Of files that are images to torchvision's folders, or to timm's.
ENDINGS = tuple(dict.fromkeys((*IMG_EXTENSIONS, *get_img_extensions())))
FEW = 3  # files of a class that may be none of these though they look like images


class ClassFolders(ReaderImageFolder):
    """timm's reader, of what torchvision's ImageFolder reads: all images at any depth below a class folder.

    Files of other kinds, and hidden ones, which are copies that editors and file managers leave, are skipped.

    Args:
        root: the folder of the class folders.
        class_to_idx: label of each class folder to read.

    Attributes:
        skipped: what was not read, relative to `root`.

    Raises:
        DataError: more than a few files of a class are skipped that may well be images.
    """

    def __init__(self, root: Path, class_to_idx: Mapping[str, int]) -> None:
        self.root, self.class_to_idx = str(root), dict(class_to_idx)
        self.skipped = [entry.name for entry in os.scandir(root) if entry.is_file()]
        self.samples = make_dataset(self.root, self.class_to_idx, is_valid_file=self._take, allow_empty=True)
        self.skipped = [name for name in self.skipped if not _is_litter(name)]
        _refuse_lost_images(root, self.skipped)

    def skipped_in_words(self) -> str | None:
        """How many files were skipped, of what kinds and which; None where there are none."""
        if not self.skipped:
            return None
        kinds = Counter(Path(name).suffix.lower() or "without ending" for name in self.skipped)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        files = counted(len(self.skipped), "file is", "files are")
        return f"{files} skipped ({counts}): {in_short(self.skipped, 5)}"

    def _take(self, path: str) -> bool:
        name = path[len(self.root) + 1 :]
        if name.lower().endswith(ENDINGS) and not _is_hidden(name):
            return True
        self.skipped.append(name)
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or f"{os.sep}." in name


def _is_litter(name: str) -> bool:
    """Whether a file is one that an operating system leaves, and nobody's data."""
    return Path(name).name in ("Thumbs.db", "desktop.ini") or (
        _is_hidden(name) and not name.lower().endswith(ENDINGS)
    )


def _refuse_lost_images(root: Path, skipped: list[str]) -> None:
    """DataError if among the skipped files of a class there are more than a few that may well be images:
    their endings are those of images that other programs read, or unknown."""
    lost: dict[str, list[str]] = {}
    for name in skipped:
        kind = mimetypes.guess_type(name)[0]
        if (kind is None or kind.startswith("image/")) and not _is_hidden(name):
            first, *rest = Path(name).parts
            lost.setdefault(first if rest else "", []).append(name)
    for label, names in lost.items():
        if len(names) > FEW:
            where = f"class {label!r} loses" if label else "there are outside of class folders"
            raise DataError(
                f"{root}: {where} {len(names)} files: {in_short(names, 5)}; expected files with one of the "
                f"endings {' '.join(ENDINGS)} in class folders: convert or move these files, or move them out"
            )
