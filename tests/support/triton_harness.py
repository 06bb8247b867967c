"""Run Triton kernels without a GPU: what a test of a kernel imports.

Triton reads TRITON_INTERPRET when `@triton.jit` runs, and a stray access must be able to end a process, so
kernels run in a worker process of their own. A function of the test module does the launch and the checks:

    def check(M, K, dtype, side): ...                   # runs in the worker

    def test_op(interpreter, M, K, dtype, side):        # the fixture of conftest.py
        interpreter.run(check, M, K, dtype, side)

This module must not import Triton at the top: the worker sets the environment first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.support.guarded_memory import CanaryError, check_canaries, guarded, guarded_outputs, replaced
from tests.support.launches import AtomicError, RaceError, RawBfloat16Error, crash_report, programs

__all__ = [
    "AtomicError",
    "CanaryError",
    "Interpreter",
    "KernelCrash",
    "KernelTimeout",
    "RaceError",
    "RawBfloat16Error",
    "check_canaries",
    "guarded",
    "guarded_outputs",
    "mutated",
    "programs",
]


class KernelCrash(AssertionError):
    """The worker died: the kernel touched a protected page."""


class KernelTimeout(AssertionError):
    """The worker did not answer in time."""


_ERRORS_OF_KERNELS = (AtomicError, CanaryError, RaceError, RawBfloat16Error)


class Interpreter:
    """A worker process with the mended interpreter. It starts on first use and again after a crash."""

    def __init__(self) -> None:
        self._process = None
        self._directory = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable, *args: Any, timeout: float = 120.0, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` in the worker; `function` is at the top of an importable module.

        Raises KernelCrash, KernelTimeout, what the harness found wrong in the kernel, or an AssertionError
        with the worker's traceback for any other exception.
        """
        request = pickle.dumps((function, args, kwargs))
        if self._process is None:
            self._start()
        try:
            self._connection.send_bytes(request)
            if not self._connection.poll(timeout):
                self.close()
                raise KernelTimeout(f"{function.__name__}: no answer in {timeout:g} s")
            result, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise KernelCrash(f"{function.__name__}: {self._cause_of_death()}") from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
            self._directory.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="triton_harness_")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, self._directory.name), daemon=True)
        self._process.start()
        other_end.close()

    def _cause_of_death(self) -> str:
        self._process.join()
        code = self._process.exitcode
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        what = ", a protected page was touched" if name in ("SIGSEGV", "SIGBUS") else ""
        report = crash_report.read(Path(self._directory.name) / "crash")
        self.close()
        return f"{name}{what}\n{report}"


def _serve(connection: Connection, directory: str) -> None:
    assert "triton" not in sys.modules, "imported too early for TRITON_INTERPRET"
    os.environ["TRITON_INTERPRET"] = "1"
    tempfile.tempdir = directory  # so that a crash leaves nothing behind
    torch.set_num_threads(1)
    crash_report.open(Path(directory) / "crash")
    importlib.import_module("tests.support.mended_interpreter").install()
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        crash_report.clear()
        try:
            function, args, kwargs = pickle.loads(request)
            reply = pickle.dumps((function(*args, **kwargs), None))
        except BaseException as error:
            kind = type(error) if isinstance(error, _ERRORS_OF_KERNELS) else AssertionError
            reply = pickle.dumps((None, kind(f"{error}\n{_traceback(error)}")))
        connection.send_bytes(reply)


def _traceback(error: BaseException) -> str:
    """The traceback without the frames of Triton and PyTorch, between which a kernel's line is lost."""
    report = traceback.TracebackException.from_exception(error)
    report.stack = traceback.StackSummary.from_list(
        [f for f in report.stack if "site-packages" not in f.filename]
    )
    return "".join(report.format())


_numbers = itertools.count()
_copies = functools.cache(tempfile.TemporaryDirectory)


def mutated(
    module_name: str,
    replacements: Sequence[tuple[str, str] | tuple[str, str, int]],
    helpers: Sequence[str] = (),
) -> types.ModuleType:
    """A copy of a module with `(old, new)` or `(old, new, count)` replaced in its source, under a fresh name.

    Each `old` must occur exactly `count` times (once unless given), so that a test cannot go on planting a
    defect in text that is no longer there. The copy is a file, because `@triton.jit` reads its source, and
    belongs to the same package, so that relative imports work.

    helpers: modules from which the module, or one behind in this list, imports functions by name. An `old`
    may be in one of them instead, all of its occurrences in the same module; the copy then imports from a
    copy of that helper, which nothing else sees, and so do those behind.

    While the copy is executed nothing is registered with torch.library (or as a FLOP formula): `Library` and
    the `register_*` functions do nothing, and `custom_op` and `triton_op` leave the plain function. So
    `torch.ops` still runs the original; a test calls the launch wrappers of the copy.
    """
    importlib.import_module(module_name)  # a copy may look up the ops that the original registers
    names = (module_name, *helpers)
    sources = {name: Path(importlib.util.find_spec(name).origin).read_text() for name in names}
    changed = dict(sources)
    for old, new, *count in replacements:
        expected, found = (count or [1])[0], [changed[name].count(old) for name in names]
        assert max(found) == sum(found) == expected, (
            f"{module_name}: {old!r} occurs {sum(found)} times, expected {expected} in one of {names}"
        )
        place = names[found.index(expected)]
        changed[place] = changed[place].replace(old, new)
    originals = {name: sys.modules[name] for name in helpers}
    copied = False
    try:
        for name in helpers:  # one behind a copy may import from it
            copied = copied or changed[name] != sources[name]
            if copied:
                sys.modules[name] = _copy(name, changed[name])
        return _copy(module_name, changed[module_name])
    finally:
        sys.modules.update(originals)


def _copy(module_name: str, source: str) -> types.ModuleType:
    package, _, name = module_name.rpartition(".")
    name = f"{name}_mutated_{os.getpid()}_{next(_numbers)}"
    path = Path(_copies().name) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{package}.{name}" if package else name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _no_registration():
        spec.loader.exec_module(module)
    return module


def _no_registration() -> contextlib.AbstractContextManager:
    from torch.utils import flop_counter  # imports Triton

    library = torch.library

    def inert(*args: Any, **kwargs: Any) -> Any:
        """Stands for a registration: given a function, or used as a decorator, it leaves the function."""
        return args[-1] if args and isinstance(args[-1], types.FunctionType) else lambda function: function

    def plain_op(name: str, function: Callable | None = None, /, **kwargs: Any) -> Callable:
        if function is None:
            return functools.partial(plain_op, name)
        op = functools.partial(function)
        for method in dir(library.CustomOpDef):
            if method.startswith("register_"):
                setattr(op, method, inert)
        return op

    names = ["define", "impl", *(name for name in dir(library) if name.startswith("register_"))]
    patches = [(library, name, inert) for name in names]
    patches += [(library, name, plain_op) for name in ("custom_op", "triton_op")]
    methods = [name for name, value in vars(library.Library).items() if isinstance(value, types.FunctionType)]
    patches += [(flop_counter, "register_flop_formula", inert)]
    patches += [(library.Library, name, lambda self, *args, **kwargs: None) for name in methods]
    if "vtp_kernels.library" in sys.modules:  # it notes what an op runs on a GPU
        patches.append((sys.modules["vtp_kernels.library"], "define", inert))
    return replaced(patches)
