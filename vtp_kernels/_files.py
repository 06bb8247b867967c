"""The files that the proofs write: whole, or untouched."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str, error: type[Exception]) -> None:
    """Write `text` to the file `path`, which only ever names a complete file.

    Raises:
        error: it cannot be written, with the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as failure:
        raise error(f"cannot write {path}: {failure.strerror}") from failure
    finally:
        temporary.unlink(missing_ok=True)
