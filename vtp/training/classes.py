"""Names of classes, and the order of their labels: of data, of a class map, and of a model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from vtp.training.pixels import DataError


def read_class_map(path: str | Path) -> tuple[str, ...]:
    """The class names of a class map as timm reads it: a .txt file, one name a line, in the order of labels.

    Raises:
        DataError: there is no such file, it is none of text (timm's other kind, a pickle, is never opened),
            or a name is there twice, or none.
    """
    if Path(path).suffix != ".txt":
        raise DataError(f"class_map: got {path}, expected a .txt file with one class name a line")
    if not Path(path).is_file():
        raise DataError(f"class_map: no file {path}")
    try:
        labels = load_class_map(str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class_map: cannot read {path} ({error})") from error
    if labels.get("") == max(labels.values(), default=0):  # an empty line at the end
        del labels[""]
    names = sorted(labels, key=labels.__getitem__)
    if not names or "" in labels or [labels[name] for name in names] != list(range(len(names))):
        raise DataError(f"class_map: {path} has an empty line, or a name twice; expected one name a line")
    return tuple(names)


def labels_by_name(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """For each of the names `own` its place among `names`; None if one is not among them.

    Accents may be one code point or two, as file systems have them.
    """
    own, names = ([unicodedata.normalize("NFC", name) for name in each] for each in (own, names))
    if own == names:
        return list(range(len(own)))
    place = {name: label for label, name in enumerate(names)}
    if len(place) < len(names) or len(set(own)) < len(own):  # a name twice says nothing about its place
        return None
    return [place[name] for name in own] if set(own) <= set(place) else None


def same_descriptions(own: Sequence[str], descriptions: Sequence[str] | None) -> bool:
    """Whether the names `own` are a model's descriptions of its classes in their order, as data sets have
    them that give ImageNet's synsets in words; what stands for two classes (crane) may be told apart."""
    if descriptions is None or len(own) != len(descriptions):
        return False
    return all(
        a == b or (a.startswith(b) and list(descriptions).count(b) > 1)
        for a, b in zip(own, descriptions, strict=True)
    )


def order_hint(names: Sequence[str]) -> str:
    """What to say of an order that other programs have otherwise; empty where all have it alike."""
    by_value = sorted(names, key=natural_key)
    if list(names) != sorted(names) or by_value == list(names):
        return ""
    return (
        f" (as text, as torchvision sorts them: {in_short(names, 4)}; timm's training script and earlier "
        f"versions of vtp sort by value: {in_short(by_value, 4)}; --class-map gives another order)"
    )


def in_short(names: Sequence[str], most: int = 8) -> str:
    """The names in one line, only the first where there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def difference(own: Sequence[str], names: Sequence[str], whose: str = "the model") -> str:
    """The data's and another list of names in one line; of long ones what only one of them has."""
    if max(len(own), len(names)) <= 12:
        return f"the data have {', '.join(own)}; {whose} has {', '.join(names)}"
    here, there = set(own), set(names)
    only_own, only_names = [n for n in own if n not in there], [n for n in names if n not in here]
    return (
        f"only the data have {in_short(only_own) or 'none'}; only {whose} has "
        f"{in_short(only_names) or 'none'}; {len(here & there)} are in both"
    )
