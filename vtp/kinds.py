"""What a file or folder is, told by what is in it: for messages about one that is given where another kind is
expected, which say what it is for.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from vtp.files import FileError


@dataclass(frozen=True)
class Kind:
    """name: with its article; use: what to do with one, in which FILE stands for its name."""

    name: str
    use: str


DENSE = Kind(
    "a dense model",
    "`vtp prune FILE --calibrate DATA` cuts it on unlabelled images, `vtp train sparse --model FILE` trains "
    "gates",
)
GATED = Kind(
    "a gated model", "`vtp prune FILE` cuts it, `vtp train sparse --model FILE` trains its gates further"
)
COMPACT = Kind(
    "a compact model",
    "`vtp finetune FILE` trains it further, `vtp prune FILE --calibrate DATA` cuts it again",
)
MODELS = {"dense": DENSE, "gated": GATED, "compact": COMPACT}
STATISTICS = Kind(
    "the statistics of a calibration",
    "`vtp prune MODEL --calibrate DATA --statistics FILE` cuts its model by them",
)
TRAINING = Kind(
    "a checkpoint of training",
    "`vtp inspect FILE` shows it, and the command that wrote it continues from it with --resume",
)
PLAN = Kind(
    "a pruning plan",
    "`vtp inspect FILE` shows it, and vtp.compact(model, vtp.PruningPlan.load('FILE')) cuts by it",
)
LATENCY_TABLE = Kind(
    "a table of latencies", "`vtp prune MODEL --latency-ms MS` finds it where it was written"
)
WEIGHTS = Kind(
    "weights alone", "give the name of the timm model that they are of as the model, and --checkpoint FILE"
)
EXPORTED = Kind("a model exported for another runtime", "give the file that it was made from")
IMAGE = Kind("an image", "`vtp predict MODEL FILE` says what it shows")
RUN = Kind("the folder of a run", "its models are FILE/*.safetensors")
FOLDER = Kind("a folder", "")
EMPTY = Kind("an empty file, damaged or cut off", "")

# Entries of the metadata of safetensors files, and fields of JSON, that say what they are.
_IN_METADATA = {"vtp_statistics": STATISTICS, "vtp-training-state": TRAINING}
_IN_JSON = {"plan_version": PLAN, "latency_table_version": LATENCY_TABLE}
_EXPORTED = (".onnx", ".pt2", ".xml", ".pte")
_OF_PYTORCH = (".pth", ".pt", ".tar", ".ckpt", ".bin")  # also in the format of before it was a zip file
_PICKLED = b"\x80"  # how that begins
_LARGEST_JSON = 100_000_000  # bytes: a plan of the largest model has a hundredth


def kind_of(path: str | Path) -> Kind | None:
    """The kind of a file or folder; None where there is none, or it is none of these kinds.

    A file that is damaged may be of the kind that its beginning says.
    """
    path = Path(path)
    if path.is_dir():
        return RUN if (path / "checkpoints").is_dir() else FOLDER
    if not path.is_file():
        return None
    if path.stat().st_size == 0:
        return EMPTY
    for kind in (_of_safetensors(path), _of_json(path), _of_image(path)):
        if kind is not None:
            return kind
    if path.suffix in _EXPORTED:
        return EXPORTED
    return WEIGHTS if _is_saved_by_pytorch(path) else None


def other_kind(path: str | Path, *expected: Kind) -> str | None:
    """What to say of a file or folder that is of another kind than those; None where it is of one of them, or
    not known."""
    kind = kind_of(path)
    if kind is None or kind in expected:
        return None
    names = [each.name for each in expected]
    wanted = "a model" if set(MODELS.values()) <= set(expected) else " or ".join(names)
    use = f"; {kind.use.replace('FILE', str(path))}" if kind.use else ""
    return f"{path} is {kind.name}, expected {wanted}{use}"


def refuse_other_kinds(path: str | Path, *expected: Kind, name: str = "path") -> None:
    """Raise FileError, which begins with the argument's `name`, where `other_kind` has something to say."""
    if (text := other_kind(path, *expected)) is not None:
        raise FileError(f"{name}: {text}")


def _of_safetensors(path: Path) -> Kind | None:
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, MemoryError):
        return None
    if "vtp" in metadata:
        try:
            return MODELS.get(json.loads(metadata["vtp"])["kind"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return next((kind for entry, kind in _IN_METADATA.items() if entry in metadata), WEIGHTS)


def _of_json(path: Path) -> Kind | None:
    with open(path, "rb") as file:
        if file.read(1) != b"{" or path.stat().st_size > _LARGEST_JSON:
            return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return next((kind for field, kind in _IN_JSON.items() if field in found), None)


def _of_image(path: Path) -> Kind | None:
    try:
        with Image.open(path):
            return IMAGE
    except Exception:  # Pillow raises errors of all kinds
        return None


def _is_saved_by_pytorch(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.read(1) == _PICKLED and path.suffix in _OF_PYTORCH:
                return True
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
