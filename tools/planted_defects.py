"""Plant defects, one at a time, in a copy of the tree, and see which test of `make test` catches each.

    python -m tools.planted_defects                    all of them, about ten minutes
    python -m tools.planted_defects training csrc      those of files whose path has one of these texts in it

Each is a mistake that somebody might make. They stand in `tools/defects`, a file for each package, a
paragraph for each:

    vtp/training/pixels.py: images of 12 bits in 16 become black      the file, and what is then wrong
    -brightest < NEAR_WHITE                                           the text that is there, once
    +brightest < 0                                                    what stands there instead
    ? tests/vtp/training/test_pixels.py -k unknown_scale              tests that see it, of the quick lane
    ! build                                                           where the C++ operators have to be built

Kernels have defects of their own, in `tests/vtp_kernels`, planted whenever the tests run.

Exit status: 0 where all are caught; 1 where one is not; 2 where a text is in no path, or where tests that may
see a defect were skipped for want of the C++ operators (`python setup.py build_ext --inplace` builds them).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm  # noqa: F401 what takes longest to import
import torch  # noqa: F401
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIBRARY = Path("vtp_kernels", "_cpu.abi3.so")  # the C++ operators, where they are built


@dataclass(frozen=True)
class Defect:
    """`old`, which is in `file` once, becomes `new`; `wrong` says what of it; `tests` may see it.

    build: whether the C++ operators have to be built for it.
    """

    file: str
    old: str
    new: str
    wrong: str
    tests: str
    build: bool = False


def defects(text: str) -> Iterator[Defect]:
    """The defects of a file of `tools/defects`; its form is at the top.

    Raises:
        ValueError: a paragraph is of another form; the message begins with its first line.
    """
    for paragraph in filter(None, text.strip("\n").split("\n\n")):
        first, *lines = paragraph.split("\n")
        file, _, wrong = first.partition(": ")
        old, new, tests, more = ([line[1:] for line in lines if line[:1] == mark] for mark in "-+?!")
        known = len(old) + len(new) + len(tests) + len(more) == len(lines)
        if not (wrong and old and known and len(tests) == 1 and more in ([], [" build"])):
            raise ValueError(
                f"{first!r}: got {lines}, expected lines -old, +new, ? tests and perhaps ! build"
            )
        yield Defect(file, "\n".join(old), "\n".join(new), wrong, tests[0].strip(), bool(more))


DEFECTS = [
    defect
    for path in sorted(Path(__file__).with_name("defects").glob("*.txt"))
    for defect in defects(path.read_text(encoding="utf-8"))
]


def planted(text: str, defect: Defect) -> str:
    """The text of the file with the defect in it."""
    count = text.count(defect.old)
    assert count == 1, f"{defect.file}: {defect.old!r} occurs {count} times, expected 1"
    return text.replace(defect.old, defect.new)


def copy_of_the_tree(folder: Path) -> None:
    """What git tracks, and the built operators."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("vtp_kernels/_cpu*.so")]
    for name in filter(None, [*tracked.split("\0"), *built]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def quick_lane(folder: Path, tests: str) -> tuple[int, str]:
    """Exit status and output of pytest for `tests`, in a fork of this process: it has PyTorch imported."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        status = 3
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(folder)
            sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
            sys.dont_write_bytecode = True
            options = ["-m", "not thorough", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
            status = pytest.main(options)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, output.read_text(encoding="utf-8")


class Untold(Exception):
    """Whether a defect is caught cannot be told; the message says why."""


def caught_by(defect: Defect, folder: Path) -> str | None:
    """The first test of the quick lane that fails with the defect; None where all pass.

    Raises:
        Untold: nothing failed, but tests were skipped and the C++ operators are missing.
    """
    file, library = folder / defect.file, folder / LIBRARY
    before, built = file.read_text(encoding="utf-8"), library.read_bytes() if library.exists() else None
    file.write_text(planted(before, defect), encoding="utf-8")
    try:
        if defect.build:
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        status, output = quick_lane(folder, defect.tests)
    finally:
        file.write_text(before, encoding="utf-8")
        if built is not None:
            library.write_bytes(built)
        else:
            library.unlink(missing_ok=True)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if failed is None and status != 0:
        raise RuntimeError(f"{defect.file}: the tests did not run:\n{output[-4000:]}")
    skipped = re.search(r"(\d+) skipped", output)
    if failed is None and skipped and built is None and not defect.build:
        raise Untold(f"not known: {skipped[1]} tests were skipped and {LIBRARY} is not built")
    return failed and failed[1]


def main(texts: Sequence[str]) -> int:
    """Plant what is in files with one of `texts` in their path, all without any; see the top."""
    texts = texts or [""]
    for text in texts:
        if not any(text in defect.file for defect in DEFECTS):
            files = ", ".join(dict.fromkeys(defect.file for defect in DEFECTS))
            print(f"texts: got {text!r}, expected a part of one of {files}", file=sys.stderr)
            return 2
    console, missed, untold = Console(), 0, 0
    table = Table("file", "what is wrong", "caught by")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        for defect in (d for d in DEFECTS if any(text in d.file for text in texts)):
            try:
                test = caught_by(defect, folder)
                missed += test is None
            except Untold as reason:
                test = str(reason)
                untold += 1
            console.print(
                f"{defect.file}: {defect.wrong}: {test or 'NOT CAUGHT'}", soft_wrap=True, markup=False
            )
            table.add_row(defect.file, defect.wrong, test or "NOT CAUGHT")
    console.print(table)
    if missed:
        return 1
    return 2 if untold else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
