"""One run in a folder at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from vtp.files import FileError, remove_leftovers

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in the folder; holds, as JSON, who has it
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # said by the file system


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of an existing folder, and remove what a killed one has left half written.

    The lock is the kernel's (flock): it ends with the process, whatever ends that. Over NFS it holds between
    machines, unless mounted with `nolock` or `local_lock`. Windows has none, and nothing is kept out there.

    Raises:
        FileError: another process has it; the message names that and its machine.
    """
    if fcntl is None:
        yield
        return
    file = _locked(folder / LOCK)
    try:
        if file is not None:
            remove_leftovers(folder, folder / "checkpoints", folder / "timm")
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                os.unlink(folder / LOCK)  # while it is held: who waits for it looks whether it is still there
            file.close()


def _locked(path: Path) -> IO[str] | None:
    """The open file with the lock; None where there are no locks."""
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise FileError(f"run folder: cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in NO_LOCKS:
                    warnings.warn(
                        f"{path.parent} is on a file system without locks ({error.strerror}): nothing keeps "
                        "a second run out of it",
                        stacklevel=2,
                    )
                    return None
                owner = _owner(file)
            raise FileError(
                f"run folder: {path.parent} is in use by {owner}; wait for its end, or name another folder"
            ) from error
        if _is(path, file):
            break
        file.close()  # was removed by the run that had it
    # Data workers live for seconds after this process was killed, and must not hold what it held.
    os.register_at_fork(after_in_child=file.close)
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"}, file)
    file.flush()
    return file


def _is(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one of that name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        said: dict[str, Any] = json.loads(file.read())
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written yet
        return "another process"
