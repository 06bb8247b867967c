"""Types of command-line options."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any


def at_least_0(text: str) -> int:
    """The `type` of an option for an integer that may be 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 0")
    return value


def positive(kind: type) -> Callable[[str], Any]:
    """The `type` of an option that has to be above 0; `kind` is int or float."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            what = "an integer of at least 1" if kind is int else "a positive number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {what}")
        return value

    return parse


def thread_count(text: str) -> int:
    """The `type` of an option for CPU threads: from 1 to the number of cores."""
    count, cores = positive(int)(text), os.cpu_count()
    if count > cores:
        raise argparse.ArgumentTypeError(f"got {count}, expected at most {cores}, one for each core")
    return count
