"""Runs one command that the command line has read, and says how it ended."""

import argparse
import functools
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vtp.arguments import as_typed
from vtp.commands import COMMANDS, say_note
from vtp.training.evaluation import NonFiniteLossError
from vtp.training.loop import TrainingInterrupted
from vtp.training.ranks import blame, exit_now, rank
from vtp.training.signals import Terminated, ignore_signals, raised_signals
from vtp.training.slurm import join_tasks


def execute(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run a command. Returns the exit status: 0, 1 training failed, 2 bad input, 128 + signal.

    Of several processes that end by one error one says so, and names its rank.

    Args:
        options: what the parser has made of `arguments`.
        arguments: the command line, for messages that name what was typed.
    """
    try:
        join_tasks()
        with warnings.catch_warnings(), raised_signals():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, arguments, set())
            COMMANDS[options.command](options)
    except TrainingInterrupted as error:  # which all ranks have agreed on
        if rank() is not None:
            ignore_signals()
        if not rank():
            print(f"vtp: {error}", file=sys.stderr)
        return 128 + error.signum
    except (Exception, KeyboardInterrupt, Terminated) as error:
        said = _said_of(error, arguments, hasattr(options, "resume"))
        if rank() is not None:
            _end_rank(error, said)
        if said is None:
            raise
        print(f"vtp: {said.text}", file=sys.stderr)
        return said.status
    return 0


class _Said(NamedTuple):
    """What a command that fails says, and its exit status."""

    text: str
    status: int


def _said_of(error: BaseException, arguments: Sequence[str], resumable: bool) -> _Said | None:
    """Of an error that a user can do something about; None of others, which want a traceback."""
    if isinstance(error, NonFiniteLossError):
        return _Said(f"error: {error}", 1)
    if isinstance(error, (KeyboardInterrupt, Terminated)):  # outside of training: there is nothing to save
        number = signal.Signals(getattr(error, "signum", signal.SIGINT))
        hint = "; a run continues with --resume" if resumable else ""
        by = f" by {number.name}" if isinstance(error, Terminated) else ""
        return _Said(f"interrupted{by}{hint}", 128 + number)
    if isinstance(error, RuntimeError) and "is killed by signal" in str(error):  # what PyTorch's loader says
        hint = "; continue with --resume" if resumable else ""
        return _Said(f"error: {str(error).strip()} Where memory is short, give fewer --workers{hint}", 1)
    if isinstance(error, (ValueError, OSError)):
        return _Said(f"error: {as_typed(str(error), arguments)}", 2)
    return None


def _end_rank(error: BaseException, said: _Said | None) -> NoReturn:
    """End this process, one of several, with what is to be said of an error, unless another one says it."""
    ignore_signals()
    signalled = isinstance(error, (KeyboardInterrupt, Terminated))
    text, status = said or _Said(f"{type(error).__name__}: {error}", 1)
    loss = blame(text, status, certain=said is not None)
    if loss is not None and (said is None or signalled):  # a consequence
        if not rank() or loss.why is None:
            print(f"vtp: error: {loss}; rank {rank()} ends too", file=sys.stderr)
        exit_now(loss.status)
    if loss is None or loss.why != text:
        print(f"vtp: rank {rank()}: {text}", file=sys.stderr)
        if said is None:
            traceback.print_exception(error)
    exit_now(status)


def _show_warning(
    usual: Callable[..., None],
    arguments: Sequence[str],
    said: set[str],
    message: Warning,
    category: type[Warning],
    filename: str,
    *rest: Any,
) -> None:
    """Warnings of our own as notes on the `arguments`, each `said` once; others as usual, with the line of
    code that they are about."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        if str(message) not in said:
            said.add(str(message))
            say_note(as_typed(str(message), arguments))
    else:
        usual(message, category, filename, *rest)
