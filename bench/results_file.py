"""The command line of a benchmark that writes its results into a file: the options --out and --markdown."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vtp.comparison.tables import Rows, print_table
from vtp.files import FileError, refuse_unwritable, write_atomic


def run_or_print(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    out: Path,
    *,
    measure: Callable[[argparse.Namespace, Console], Any],
    tables: Callable[[Any], Mapping[str, Rows]],
    markdown: Callable[[Any], str],
) -> int:
    """What the `main` of a benchmark does: measure, write the results and show them, or print old ones.

    Args:
        parser: with the benchmark's own options; --out, by default `out`, and --markdown come to them.
        measure: called with all options and the terminal; what it returns is written as JSON.
        tables: of the results, by title, for the terminal; markdown: the text that --markdown prints.

    Returns:
        The exit status: 2 where the results file cannot be read or written.
    """
    add_results_file(parser, out)
    options = parser.parse_args(argv)
    check_results_file(parser, options)
    if options.markdown:
        return print_results(options.out, markdown)
    console = Console(width=None if sys.stdout.isatty() else 200)  # a folded table cannot be read
    content = measure(options, console)
    write_results(options.out, content)
    for title, rows in tables(content).items():
        print_table(console, title, rows)
    console.print(f"Written to {options.out}", highlight=False, soft_wrap=True)
    return 0


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
