"""Triton's cache for a run: filled ahead without a GPU, taken along, completed where something is missing.

    python -m bench.gpu --compile        # makes .triton-cache.tar.gz, with the Python and Triton of the run

A compilation is found again by Triton's own files, ptxas, the kernel's source, its line and its constants: so
a cache is good for one commit and one build of Triton. What is not found is compiled before anything is
measured, by all cores at once, together with what Triton makes by the host's compiler for each kernel's
arguments. How many that were is among the results.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from bench.gpu.cases import Record, first_line
from vtp.files import write_atomic
from vtp.machine import commit
from vtp_kernels import launching
from vtp_kernels.launching import Variant
from vtp_kernels.proofs import compilations

FOLDER = Path(__file__).resolve().parents[2] / ".triton-cache"  # which git ignores
TARGET, CAPABILITY = "sm_90", (9, 0)
MADE = "made.json"  # of what, and with what, it was filled


# --------------------------------------------------------------------------------
# What is launched


@functools.cache
def needed(target: str) -> dict[str, Variant]:
    """All that the cases of a run launch on `target`, by name."""
    from bench.gpu import configurations, numerics

    found: dict[str, Variant] = {}
    for op, module in compilations.OPS.items():
        for variant in importlib.import_module(module).variants(target):
            found[f"{op}/{variant.name}"] = variant
    for label, record in {**numerics.launches(), **configurations.launches()}.items():
        with launching.recording(label, target) as variants:
            record()
        # Candidates of one name differ in warps and stages.
        found |= {f"{label}/{v.name}-{v.num_warps}-{v.num_stages}": v for v in variants.values()}
    known: dict[tuple, str] = {}
    return {name: v for name, v in found.items() if known.setdefault(v.key(), name) == name}


# --------------------------------------------------------------------------------
# Filling and completing


def fill(folder: Path, jobs: int, names: Iterable[str] | None = None) -> Record:
    """Compile everything, or what is named, for `TARGET` into `folder`, and pack it beside that.

    It needs no GPU. What is in the folder already is not compiled again, and stays for the next time.

    Raises:
        FileError: the packed file cannot be written.
    """
    # The intermediate languages are for people, and several times the size of what is run.
    os.environ |= {"TRITON_CACHE_DIR": str(folder.absolute()), "TRITON_STORE_BINARY_ONLY": "1"}
    record = complete(jobs, None, names)
    made = {"target": TARGET, "versions": compilations.versions(), **commit(), **record}
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def pack(path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for file in sorted(folder.rglob("*")):
                if file.suffix in (".cubin", ".json"):
                    archive.add(file, file.relative_to(folder))

    write_atomic(packed(folder), pack)
    return record | {"bytes": packed(folder).stat().st_size}


def packed(folder: Path) -> Path:
    """The file that travels: `.triton-cache.tar.gz` of `.triton-cache`."""
    return folder.with_name(f"{folder.name}.tar.gz")


def take_over(
    file: Path, into: Path, note_damage: Callable[[str], object] = lambda reason: None
) -> Record | None:
    """Use what `fill` packed, unpacked into an empty folder; what is noted in it, None where it is missing.

    A file that `fill` did not make, or of which a part is lost, is taken as missing, and `note_damage` is
    given the reason.
    """
    os.environ["TRITON_CACHE_DIR"] = str(into.absolute())
    if not file.is_file():
        return None
    try:
        return _unpack(file, into)
    except (
        tarfile.TarError,
        zlib.error,
        EOFError,
        OSError,
        ValueError,  # of JSON, or of bytes that are no text
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        # What was unpacked before the damage might be half a kernel.
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True, exist_ok=True)
        note_damage(first_line(error).rstrip(":"))  # of which tarfile lists more below
        return None


def _unpack(file: Path, into: Path) -> Record:
    """What `take_over` does with a file that is there.

    Triton notes whole paths of what belongs together, and would find nothing where these are not there.
    """
    with tarfile.open(file) as archive:
        archive.extractall(into, filter="data")
    for group in into.absolute().glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in names if (group.parent / name).is_file()}
        group.write_text(json.dumps({"child_paths": here}))
    made = json.loads((into / MADE).read_text(encoding="utf-8"))
    return made | {name: made[name] for name in ("target", "versions", "commit", "modified")}  # all there


def complete(jobs: int, seconds: float | None, names: Iterable[str] | None = None) -> Record:
    """Compile for `TARGET` what Triton's cache has not; how many that were.

    Args:
        seconds: after which what is left is left to the cases that need it.
        names: of `needed`; None stands for all.
    """
    names = list(needed(TARGET) if names is None else names)
    record: Record = {"kernels": len(names), "found": 0, "compiled": 0, "failed": {}}
    # Spawned: Triton and PyTorch have threads, which a forked process would inherit half of.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(names)), mp_context=context)
    try:
        futures = {pool.submit(ready, name, TARGET): name for name in names}
        for future in wait(futures, seconds).done:
            try:
                record["found" if future.result() else "compiled"] += 1
            except Exception as error:  # the compiler's, or the death of a process
                record["failed"][futures[future]] = first_line(error)
    finally:
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)
    record["left"] = len(names) - record["found"] - record["compiled"] - len(record["failed"])
    return record


def ready(name: str, target: str) -> bool:
    """Have a kernel in Triton's cache and, where there is a GPU, its launcher; whether it was there."""
    from triton.runtime.driver import driver

    with compilations_noted() as noted:
        kernel = compilations.compile_for(needed(target)[name], target)
    with contextlib.suppress(RuntimeError):  # no GPU: "0 active drivers"
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return noted == [True]


@contextlib.contextmanager
def compilations_noted() -> Iterator[list[bool]]:
    """Within it, of every kernel that Triton loads for the first time, whether its cache had it."""
    import triton

    noted: list[bool] = []

    def note(*, cache_hit: bool, **_: Any) -> None:
        noted.append(cache_hit)

    before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, note
    try:
        yield noted
    finally:
        triton.knobs.compilation.listener = before
