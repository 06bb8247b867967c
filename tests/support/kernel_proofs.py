"""What the proofs of all kernels share: tensors in guarded memory, runs of a check, planted defects.

The file of an op has a `Case`, the `Data` of one, checks, and

    def prove(check, case, *args, replacements=(), **conditions):       # runs in the worker
        op = loaded(MODULE, replacements)
        return run_check(check, op, Data(case), *args, **conditions)

Its planted defects are `Defect`s, each with what `prove` is to be given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import signal
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.guarded_memory import replaced
from tests.support.launches import crash_report
from tests.support.triton_harness import (
    Interpreter,
    RaceError,
    RawBfloat16Error,
    check_canaries,
    guarded,
    guarded_outputs,
    mutated,
)

# Here, so that every file of proofs is skipped where Triton is missing.
triton = pytest.importorskip("triton")

FAR = 2**29  # elements from row to row: beyond 32 bits in the fifth


# -- Tensors ------------------------------------------------------------------------------------------------


def place(
    t: torch.Tensor | None, layout: str, side: str, align_vectors: int | None = None
) -> torch.Tensor | None:
    """`t` in guarded memory: in padded rows with NaN behind the width, unless the layout says otherwise.

    layout: "padded", "wide" or "far" (rows that begin further apart), "tight", "misaligned", "transposed", or
        "images" (a first axis of 3). It says nothing about vectors, which are tight.
    align_vectors: the bytes at a multiple of which a vector begins.
    """
    if t is None or t.dim() == 1:
        return None if t is None else guarded(t, side, align=align_vectors)
    if layout == "misaligned":
        return guarded(t, side, offset_elements=1)
    if layout in ("tight", "images"):
        t = guarded(t, side)
        return t.unflatten(0, (3, -1)) if layout == "images" else t
    if layout == "transposed":
        return guarded(t.T.contiguous(), side).T
    width = t.shape[-1]
    full = F.pad(t, (0, -width % 8), value=torch.nan)
    row_stride = {"padded": full.shape[-1], "wide": full.shape[-1] + 8, "far": FAR}[layout]
    return guarded(full, side, align=16, row_stride=row_stride)[..., :width]


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest even at 10 bits of mantissa."""
    bits = t.detach().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


def assert_like(found: Iterable[torch.Tensor], fake: Iterable[torch.Tensor]) -> None:
    """Results lie in memory as the fake implementation says."""
    for i, (a, b) in enumerate(zip(found, fake, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), f"result {i}"


def assert_padding_is_zero(name: str, t: torch.Tensor) -> None:
    """The columns behind the width are 0 up to the next multiple of 8."""
    width = t.shape[-1]
    whole = t.as_strided((*t.shape[:-1], -(-width // 8) * 8), t.stride())
    assert not whole[..., width:].count_nonzero(), f"{name}: padding is not 0 (NaN: never written)"


# -- A check and its conditions -----------------------------------------------------------------------------


def loaded(module_name: str, replacements: Sequence[tuple] = ()) -> types.ModuleType:
    """The module of an op, or a copy with `replacements` in its source, in that of its kernels where they
    are in a file of their own, or in what these have of `_tiles`."""
    if not replacements:
        return importlib.import_module(module_name)
    kernels = f"{module_name}_kernels"
    own = [kernels] if importlib.util.find_spec(kernels) else []
    return mutated(module_name, replacements, helpers=["vtp_kernels._tiles", *own])


def run_check(
    check: Callable,
    op: types.ModuleType,
    data: Any,
    *args: Any,
    descriptors: bool = False,
    attributes: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    forced: Sequence[str] = (),
    tf32: bool = False,
    **kwargs: Any,
) -> set[tuple]:
    """`check(op, data, ...)` with guarded outputs; returns keys of the variants that it launched.

    descriptors: whether the device has them. attributes: names and values to set in `op` meanwhile.
    forced: the name of the op and the paths of it that are forced.
    tf32: whether products of float32 may be made of it.
    """
    recorder = op.launching.Recording(op.__name__, "")
    launch = op.launch

    def recorded_launch(
        kernel: Any, grid: Any, arguments: Any, config: Any, kinds: Any = None, **constants: Any
    ) -> None:
        recorder.add(kernel, arguments, config, constants)
        launch(kernel, grid, arguments, config, **constants)

    patches = [(op, "launch", recorded_launch), (op.launching, "has_descriptors", lambda device: descriptors)]
    patches += [(op, name, value) for name, value in dict(attributes).items()]
    path = op.launching.forced_path(*forced) if forced else contextlib.nullcontext()
    with replaced(patches), path, op.launching.matmul_precision("high" if tf32 else "highest"):
        with guarded_outputs(data.case.side):
            check(op, data, *args, **kwargs)
        check_canaries()
    return set(recorder.variants)


@functools.cache
def _compiled_ahead_of_time(module_name: str, target: str) -> set[tuple]:
    return {variant.key() for variant in importlib.import_module(module_name).variants(target)}


def assert_compiled_ahead_of_time(launched: set[tuple], module_name: str, target: str) -> None:
    """All that was launched is in the list that is compiled ahead of time."""
    missing = launched - _compiled_ahead_of_time(module_name, target)
    assert not missing, f"launched, but not compiled ahead of time: {missing}"


# -- Planted defects ----------------------------------------------------------------------------------------

# Besides "guard-page", where a process dies.
PROOFS = {
    "poison": (AssertionError, "are NaN"),
    "padding": (AssertionError, "padding is not 0"),
    "zero-padding": (AssertionError, "padding is not 0"),
    "overflow-check": (AssertionError, "int32 overflow"),
    "race-detection": (RaceError, "in the same launch"),
    "bfloat16-check": (RawBfloat16Error, "bfloat16"),
    "error-rule": (AssertionError, "further from float64|root mean square"),
}
READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS = (
    "read past the end",
    "write past the end",
    "missing mask",
    "missing other",
    "race",
    "unwritten",
    "raw bfloat16",
    "wrong value",
)
# Of ops whose rows are padded, and of launches whose rows may be far apart.
PAD_IN, PAD_OUT, OFFSET = "padding of an input used", "padding of a result not zero", "32-bit offset"


@dataclass(frozen=True)
class Defect:
    """`old` becomes `new` in the source of a kernel, its launcher or a helper: a defect of some kind.

    proof: the one that finds it. old, new: one text each, or several.
    options: what `prove` is given besides the check, `case` among it.
    argument: the one whose memory is overrun, where a page is touched. count: how often `old` is there.
    """

    kernel: str
    kind: str
    what: str
    proof: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    argument: str = ""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kernel}-{self.what}-{self.proof}"

    @property
    def replacements(self) -> list[tuple[str, str, int]]:
        """What `mutated` is given."""
        old, new = ((text,) if isinstance(text, str) else text for text in (self.old, self.new))
        return [(a, b, self.count) for a, b in zip(old, new, strict=True)]


def in_kernel(kernel: str, options: tuple, *rows: tuple) -> list[Defect]:
    """Defects from rows of kind, what, proof, old and new; behind these other options and the argument."""
    return [Defect(kernel, *row[:5], *(row[5:] or (options,))) for row in rows]


_proved = set()


def prove_with_defect(prove: Callable, check: Callable, defect: Defect) -> Any:
    """In the worker. The check passes without the defect, so that it is the defect which is found."""
    options = dict(defect.options)
    without_defect = prove, defect.kernel, defect.options
    if without_defect not in _proved:
        prove(check, **options)
        _proved.add(without_defect)
    planted = functools.partial(prove, check, **options, replacements=defect.replacements)
    return crash_of(planted) if defect.proof == "guard-page" else planted()


def crash_of(function: Callable[[], Any]) -> str:
    """The report of the crash in which `function` ends a fork of the worker: a new worker takes seconds."""
    child = os.fork()
    if not child:
        try:
            function()
            crash_report.note("no crash")
        except BaseException as error:
            crash_report.note(repr(error))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "no signal"
    return f"{how}\n{crash_report.read(Path(crash_report.file.name))}"


def assert_defect_is_caught(
    interpreter: Interpreter, prove: Callable, check: Callable, defect: Defect
) -> None:
    """By the proof that is meant to, and at the argument that is meant to be overrun."""
    if defect.proof == "guard-page":
        report = interpreter.run(prove_with_defect, prove, check, defect)
        at_end = dict(defect.options)["case"].side == "end"
        where = "past the end" if at_end else "before the beginning"
        where += f" of the memory of `{defect.argument}`"
        assert report.startswith("SIGSEGV") and where in report and "_kernel" in report, report
        return
    error, says = PROOFS[defect.proof]
    with pytest.raises(error, match=says) as caught:
        interpreter.run(prove_with_defect, prove, check, defect)
    assert type(caught.value) is error, caught.value


def assert_defects_of_every_kind(
    defects: Iterable[Defect],
    op: types.ModuleType,
    kinds: Iterable[str],
    but_for: Collection[tuple[str, str]] = (),
) -> None:
    """Every kernel of `op` has a defect of every kind, but for these (kernel, kind)."""
    name = op.__name__.rpartition(".")[2]
    kernels = {
        attribute.strip("_").removeprefix(f"{name}_").removesuffix("_kernel")
        for attribute, value in vars(op).items()
        if isinstance(value, triton.runtime.jit.KernelInterface) and attribute.endswith("_kernel")
    }
    wanted = set(itertools.product(kernels, kinds))
    found = {(defect.kernel, defect.kind) for defect in defects}
    missing, unknown = wanted - found, found - wanted
    assert missing == set(but_for), f"kernels and kinds without a defect: {missing}"
    assert not unknown, f"defects of no kernel or kind: {unknown}"
