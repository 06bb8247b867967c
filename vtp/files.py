"""Files that are either whole or absent, and the fingerprint that says which model a file holds."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as `_temporary` names them


class FileError(ValueError):
    """A file that cannot be read or written as what it should be; the message says why."""


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file so that `path` only ever names a complete one.

    `write` gets a temporary path in the same folder; the result is flushed to disk and renamed over
    `path`. On any error the temporary file is removed and what stood at `path` is untouched.

    Raises:
        FileError: the folder is missing or not writable, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes the file private to its owner; give it the permissions of an ordinary new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"path: cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_leftovers(*folders: Path) -> None:
    """Remove what a process that was killed within `write_atomic` has left in these folders, where nobody may
    be writing."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def refuse_unwritable(path: str | Path) -> None:
    """Raise FileError as `write_atomic` would, before work whose result is to be written there."""
    _temporary(Path(path)).unlink()


def _temporary(path: Path) -> Path:
    """An empty file in the folder of `path`."""
    try:
        if path.is_dir():
            raise FileError(f"path: {path} is a folder, expected a file name")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise FileError(f"path: cannot write into {path.parent}: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the platform lets a folder be opened (POSIX does, Windows does not)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_meta(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if some of a model's tensors, by name, are on the meta device."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device, where there are no numbers; expected weights: "
                "model.to_empty(device='cpu'), then model.load_state_dict(...)"
            )


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 (hex) over `text` and the names, dtypes, shapes and bytes of `tensors`, in name order.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    refuse_meta(tensors)
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder of what can be made again, such as tables of latencies and indexes of shards:
    `$VTP_CACHE`, else `$XDG_CACHE_HOME/vtp`, else `~/.cache/vtp`."""
    if own := os.environ.get("VTP_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "vtp"
