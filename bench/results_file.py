"""The options --out and --markdown of a benchmark that writes its results into a file."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtp.comparison.tables import Rows
from vtp.files import FileError, refuse_unwritable, write_atomic


def add_results_file(parser: argparse.ArgumentParser, default: Path) -> None:
    """The options of a comparison that writes its results: --out, and --markdown, which prints them."""
    parser.add_argument("--out", type=Path, default=default, help="results file")
    parser.add_argument(
        "--markdown", action="store_true", help="print the file --out as Markdown; measure nothing"
    )


def check_results_file(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where --out can be neither read nor written."""
    if options.markdown and not options.out.is_file():
        parser.error(f"argument --out: {options.out} is not there; run without --markdown first")
    if options.out.is_dir() or not options.out.parent.is_dir():
        parser.error(f"argument --out: got {options.out}, expected a file name in a folder that exists")
    if not options.markdown:  # before anything is measured
        try:
            refuse_unwritable(options.out)
        except FileError as error:
            parser.error(f"argument --out: {error}")


def print_results(path: Path, markdown: Callable[[Any], str]) -> int:
    """What --markdown does. Returns the exit status: 2 where the file is of something else."""
    try:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    except (
        ValueError,
        LookupError,
        ArithmeticError,
        TypeError,
        AttributeError,
        StopIteration,
        OSError,
    ) as error:
        print(f"argument --out: {path} is no results file: {error!r}", file=sys.stderr)
        return 2
    return 0


def write_results(path: Path, content: Any) -> None:
    """Write results as JSON, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def markdown_table(rows: Rows) -> str:
    """A table, whose first row names the columns, and an empty line behind it."""
    first, *others = rows
    lines = [first, ["---"] * len(first), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
