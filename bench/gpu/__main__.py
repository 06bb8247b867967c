"""Measure everything on this machine's GPU, within a given time.

    python -m bench.gpu                  # all parts in nine minutes; writes runs/gpu
    python -m bench.gpu --parts models training --seconds 300
    python -m bench.gpu --rehearse       # everything at toy size on the CPU: does it run?
    python -m bench.gpu --compile        # ahead, for sm_90 and without a GPU: .triton-cache.tar.gz

It needs this folder and a Python with PyTorch, Triton and timm: nothing installed, nothing built, no network.
Kernels that were compiled ahead with the same Triton are taken from .triton-cache.tar.gz; what is missing
there is compiled first, on all cores, and counted. The parts come in order of value and have shares of the
time, what one leaves goes to those behind it:

- numerics, 30%: is it right? Tests, whole models, fine-tuning, compute-sanitizer. Meanwhile other processes
  compile what the models' cases ask of torch.compile, which would take longer than all else.
- models, 38%: images/s of compact models beside all that one could run instead.
- training, 14%: steps with gates beside steps without, and fine-tuning.
- ops, 11%: one op at a time beside the vendor's.
- configurations, 7%: candidates for the tables in the ops' files.

Three files are written: results.json anew after every case, so that what was measured when a run is ended
stays; log.txt; and table.txt, which is printed at the end, at most 100 lines, with a bar beside each figure.
Cases run in a process of their own, and in a fresh one after a case that broke it or took too long.

Exit status: 0; 1 where something failed, but not for being slow; 2 where nothing was measured as there is no
GPU, nothing can be compiled, or no file can be written.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cache
from bench.gpu.cases import PARTS, Part, Record
from bench.gpu.models import Ahead
from bench.gpu.schedule import Schedule
from bench.gpu.stopwatch import METHOD
from bench.gpu.table import failures, table
from bench.gpu.worker import Worker
from vtp.files import FileError, refuse_unwritable
from vtp.machine import commit, description, package_version
from vtp.options import positive
from vtp_kernels.proofs.compilations import CompilationError, check_compiler

COMPILING_SECONDS = 60  # for what is not in the cache; what is left then is compiled where it is launched
CORES_PER_COMPILER = 4  # of those that compile models ahead


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", choices=names, nargs="+", default=names, help="all, in this order")
    parser.add_argument("--seconds", type=positive(float), default=540.0, help="of the whole run: 540")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder: runs/gpu")
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache.FOLDER,
        help="folder of --compile, packed beside it: .triton-cache",
    )
    parser.add_argument("--jobs", type=positive(int), default=os.cpu_count(), help="compilers: all cores")
    parser.add_argument("--rehearse", action="store_true", help="at toy size, on the CPU")
    parser.add_argument("--compile", action="store_true", help="fill --cache, pack it, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the command line with some of `parts`. Returns the exit status; see the top."""
    started = time.monotonic()
    options = parse_arguments(argv)
    if not (options.compile or options.rehearse or torch.cuda.is_available()):
        print("There is no GPU that PyTorch can use: nothing was measured or written.", file=sys.stderr)
        return 2
    try:
        if options.compile:
            return compile_ahead(options)
        options.out.mkdir(parents=True, exist_ok=True)
        with open(options.out / "log.txt", "w", encoding="utf-8") as log:
            results = run(options, [part for part in parts if part.name in options.parts], log, started)
    except (CompilationError, FileError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(bool(failures(results)))


def compile_ahead(options: argparse.Namespace) -> int:
    """What --compile does."""
    check_compiler()
    options.cache.mkdir(parents=True, exist_ok=True)
    for file in (options.cache / cache.MADE, cache.packed(options.cache)):  # before minutes of compiling
        refuse_unwritable(file)
    record = cache.fill(options.cache, options.jobs)
    for name, reason in record["failed"].items():
        print(f"{name}: {reason}", file=sys.stderr)
    size = f"{record['bytes'] / 2**20:.1f} MiB"
    print(
        f"{record['kernels']} kernels for {cache.TARGET} in {cache.packed(options.cache)}, {size}: ", end=""
    )
    print(f"{record['compiled']} compiled, {record['found']} were there, {len(record['failed'])} failed")
    return int(bool(record["failed"]))


def run(options: argparse.Namespace, parts: Sequence[Part], log: Any, started: float) -> Record:
    """Measure, print and return everything."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return run_in(Path(folder), options, parts, log, started)


def run_in(
    folder: Path, options: argparse.Namespace, parts: Sequence[Part], log: Any, started: float
) -> Record:
    """`run`, with a folder for what Triton and inductor compile. It is the run's own: what an earlier one
    left would make compilers look fast."""
    device = torch.device("cpu" if options.rehearse else "cuda")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    damages: list[str] = []
    made = cache.take_over(cache.packed(options.cache), folder / "triton", damages.append)
    version = commit()
    if version["commit"] is None and made is not None:  # a copy without its history
        version = {name: made[name] for name in version}
    place = description(device)
    place["hardware"]["driver"] = _driver()
    results: Record = {
        **place,
        "triton": package_version("triton"),
        **version,
        "rehearsal": options.rehearse,
        "method": METHOD,
        "arguments": {"parts": [part.name for part in parts], "seconds": options.seconds},
        "cache": {"filled": made, "damaged": damages[0] if damages else None, **_no_kernels()},
        "parts": {},
    }
    cases = {part.name: importlib.import_module(part.module).cases(options.rehearse) for part in parts}
    with contextlib.ExitStack() as stack:
        # Asked to end, it ends its processes and prints what there is.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.callback(_print_table, results, options.out)
        if not options.rehearse and torch.cuda.get_device_capability() == cache.CAPABILITY:
            results["cache"] |= _complete(options.jobs)
        schedule = Schedule(
            parts,
            cases,
            options.seconds - (time.monotonic() - started),
            results,
            options.out / "results.json",
            lambda part: Worker(part, options.rehearse, log),
        )
        ahead = None
        if not options.rehearse and [part.name for part in parts][:2] == ["numerics", "models"]:
            ahead = Ahead(log, max(1, (os.cpu_count() or 1) // CORES_PER_COMPILER))
            stack.callback(ahead.end)

        def before_part(part: Part) -> None:
            print(f"{part.name}: {schedule.end - time.monotonic():.0f} s left", file=sys.stderr, flush=True)
            if ahead is not None and part.name != "numerics":
                ahead.end()

        schedule.run(before_part)
    return results


def _driver() -> str | None:
    """Version of NVIDIA's driver, None where its tool is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return None


def _no_kernels() -> Record:
    return {"kernels": 0, "found": 0, "compiled": 0, "failed": {}, "left": 0, "seconds": 0.0}


def _complete(jobs: int) -> Record:
    began = time.monotonic()
    found = cache.complete(jobs, COMPILING_SECONDS)
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _print_table(results: Record, out: Path) -> None:
    text = "\n".join(table(results)) + "\n"
    (out / "table.txt").write_text(text, encoding="utf-8")
    print(text, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
