"""Compile every kernel that can be launched, for every target, without a GPU, and check the machine code.

    python -m vtp_kernels.proofs.compilations report [--targets T ...] [--ops OP ...] [--only TEXT]
                                                     [--out FILE] [--jobs N]
    python -m vtp_kernels.proofs.compilations check  [--targets T ...] [--ops OP ...] [--quick]
                                                     [--baseline FILE] [--jobs N]

`report` prints what each variant uses; a report of everything is also the baseline, kept beside this file.
`check` compiles again and fails on what no variant may do (`violations`) and on what got worse
(`regressions`).
Exit codes: 0 fine, 1 something is wrong with a kernel, 2 it could not be checked.

A second run is quick where Triton's cache is kept; it is keyed on all that the machine code depends on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vtp_kernels import launching
from vtp_kernels._files import write_whole
from vtp_kernels.launching import HAS_TRITON, TARGETS, Variant
from vtp_kernels.proofs.disassembly import CHIPS, measure, tensor_families

# Each op and the module whose `variants(target)` yields all compilations that its launchers can ask for.
OPS = {
    name: f"vtp_kernels.{name}"
    for name in (
        "gated_linear",
        "layer_norm_gather",
        "compact_linear",
        "ragged_attention",
        "rotary",
        "compact_mlp",
    )
}

BASELINE = Path(__file__).with_name("compilations.json")

# Another version of the compiler moves register counts by a few; more than this is the kernel's doing.
REGISTER_SLACK = 8

Record = dict[str, Any]


class CompilationError(RuntimeError):
    """Nothing could be compiled or compared, for the reason in the message."""


class Task(NamedTuple):
    """One variant to compile, by its name: a kernel itself cannot be sent to another process."""

    target: str
    op: str
    module: str
    name: str

    @property
    def key(self) -> str:
        """The `key` of the record that will come of it."""
        return f"{self.target} {self.op}/{self.name}"


def key(record: Mapping[str, Any]) -> str:
    """Target, op and name of a variant: what tells the records of a report apart."""
    return f"{record['target']} {record['op']}/{record['name']}"


# ---- what there is to compile ----


@functools.cache
def _variants(module: str, target: str) -> dict[str, Variant]:
    variants: dict[str, Variant] = {}
    for variant in importlib.import_module(module).variants(target):
        if variant.name in variants:
            raise CompilationError(f"{module}: two variants for {target} are called {variant.name}")
        variants[variant.name] = variant
    return variants


def tasks(targets: Iterable[str], ops: Iterable[str]) -> list[Task]:
    """Every variant that these ops can be asked for on these targets."""
    return [
        Task(target, op, OPS[op], name)
        for target in targets
        for op in ops
        for name in _variants(OPS[op], target)
    ]


def quick(chosen: Sequence[Task], baseline: Mapping[str, Record]) -> list[Task]:
    """A few of the tasks that cover, for each kernel and target, every type and constant of every argument.

    Of tasks that add as much, that with the most registers in the baseline is taken: the nearest to spilling.
    """
    traits: dict[Task, set] = {}
    for task in sorted(chosen, key=lambda t: (-baseline.get(t.key, {}).get("registers", 0), t)):
        variant = _variants(task.module, task.target)[task.name]
        types = {name: re.sub(r"\[.*\]", "", kind) for name, kind in variant.signature.items()}
        found = {*types.items(), *variant.constants.items(), ("types", frozenset(types.values()))}
        traits[task] = {(task.target, task.op, variant.kernel.__name__, *trait) for trait in found}
    missing = set().union(*traits.values())
    taken = []
    while missing:
        taken.append(max(traits, key=lambda task: len(traits[task] & missing)))
        missing -= traits.pop(taken[-1])
    return sorted(taken)


# ---- compiling ----


def compile_variant(variant: Variant, target: str) -> Record:
    """Compile a variant for a target and return its record, which has an `error` if that fails."""
    record: Record = {"target": target, "op": variant.op, "name": variant.name, "dot": variant.dot}
    tiles = [kind for kind in variant.signature.values() if kind.startswith("tensordesc")]
    # Whether rows of its tiles start at 16 bytes: by descriptor always, else where the kernel is told so. An
    # aligned pointer (`variant.aligned`) says nothing of the second row.
    record["aligned"] = bool(variant.constants.get("ALIGNED", tiles))
    try:
        compiled = compile_for(variant, target)
        tile_bytes = sum(map(_tile_bytes, tiles)) // len(tiles) if tiles else 0
        return record | measure(target, compiled.asm, compiled.metadata, tile_bytes)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return record | {"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]}


def compile_for(variant: Variant, target: str) -> Any:
    """Triton's CompiledKernel of a variant; from Triton's cache, if it is there.

    Raises:
        CompilationError: the target needs another assembler.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if target == "sm_90" and (reason := launching.unsound_assembler()) is not None:
        raise CompilationError(f"{target}: {reason}")
    source, options = _source(variant, target)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _source(variant: Variant, target: str) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles, and its options.

    Signature and attributes are put together by Triton itself, as it does for a launch: so its cache finds at
    run time what was compiled here, whatever this version of it notes of a constant.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    kernel, names = variant.kernel, variant.kernel.arg_names
    missing = [n for n in names if n not in variant.signature and n not in variant.constants]
    unknown = [n for n in (*variant.signature, *variant.constants, *variant.aligned) if n not in names]
    if missing or unknown:
        raise CompilationError(
            f"arguments without a type or value: {missing}; not arguments of the kernel: {unknown}"
        )
    values = {name: variant.constants.get(name) for name in names}

    def found_by_launch(name: str) -> tuple[str, Any]:
        """Type of an argument, and what a launch notes of its value: "D" for a multiple of 16."""
        kind = variant.signature.get(name)
        if kind is None:
            return "constexpr", values[name]
        return kind, "D" if name in variant.aligned else "" if kind.startswith("*") else None

    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    backend = make_backend(GPUTarget(*TARGETS[target]))
    _, signature, constants, attributes = kernel._pack_args(
        backend, options, values, list(map(found_by_launch, names)), None
    )
    return ASTSource(kernel, signature, constants, attributes), options


def _tile_bytes(kind: str) -> int:
    """Of `tensordesc<bf16[128, 64]>`: 16,384."""
    element, sizes = re.match(r"tensordesc<\w*?(\d+)\w*\[([\d, ]+)\]", kind).groups()
    size = int(element) // 8
    for axis in sizes.split(","):
        size *= int(axis)
    return size


def _compile_task(task: Task) -> Record:
    return compile_variant(_variants(task.module, task.target)[task.name], task.target)


def compile_all(chosen: Sequence[Task], jobs: int) -> dict[str, Record]:
    """Compile the tasks in `jobs` processes and return their records by key.

    Where the compiler crashes the rest is compiled one at a time, so that the crash is one variant's record.
    """
    records: dict[str, Record] = {}
    left = _compile_some(chosen, jobs, records) if chosen else []
    while left:
        left = _compile_some(left, 1, records)
        if left:
            culprit, *left = left
            record = {"target": culprit.target, "op": culprit.op, "name": culprit.name}
            records[culprit.key] = record | {"error": "the compiler crashed"}
    return {task.key: records[task.key] for task in chosen}


def _compile_some(chosen: Sequence[Task], jobs: int, records: dict[str, Record]) -> list[Task]:
    """Compile until done or a process dies; returns what is left, with `jobs == 1` the culprit first."""
    # Spawned: Triton and PyTorch have threads, which a forked process would inherit half of.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(chosen)), mp_context=context) as pool:
        futures: dict[Future, Task] = {}
        with contextlib.suppress(BrokenProcessPool):
            for task in chosen:
                futures[pool.submit(_compile_task, task)] = task
        progress = Console(stderr=True)
        for future in track(
            as_completed(futures), "Compiling", len(futures), console=progress, transient=True
        ):
            # Once one process is dead all that is not done fails so; what was done is still to be collected.
            with contextlib.suppress(BrokenProcessPool):
                records[futures[future].key] = future.result()
    return [task for task in chosen if task.key not in records]


# ---- judging ----


def violations(record: Mapping[str, Any]) -> list[str]:
    """What a record has that no variant may have, whatever it was before.

    The rules:

    - It compiles, and at least one block fits on a multiprocessor.
    - It does not spill. A spill is an instruction that accesses local memory (a stack frame that nothing
      reads or writes costs nothing), and on AMD also a scalar register kept in a lane of a vector register.
    - Where `dot` is "tensor_core", some instruction runs on the matrix cores. "fma" asks for nothing: NVIDIA
      has no such instruction for IEEE float32, AMD has one.
    - Where its tiles are aligned, at least half of the bytes that it loads come 16 at a time or by TMA. The
      rest may be vectors and scalars beside the tiles.
    """
    if "error" in record:
        return [f"does not compile: {record['error']}"]
    chip = CHIPS[record["target"]]
    found = []
    if record["local_accesses"]:
        where = f"{record['spill_bytes']} bytes of local memory per thread"
        found.append(f"spills: {record['local_accesses']} accesses to {where}, expected none")
    if record["scalar_spills"]:
        found.append(f"spills: {record['scalar_spills']} scalar registers, expected none")
    if record["shared"] > chip.shared_block:
        found.append(f"shared memory: {record['shared']:,} bytes, expected at most {chip.shared_block:,}")
    elif not record["blocks"]:
        found.append(
            f"occupancy: no block of {record['threads']} threads with {record['registers']} registers fits, "
            "expected at least one"
        )
    if record["dot"] == "tensor_core" and not record["tensor"]:
        found.append("matrix cores: no such instruction, expected some")
    if record["aligned"] and record["loads"] and record["load_width"] < 16:
        found.append(
            f"loads: mostly {record['load_width']} bytes ({_counts(record['loads'])}), expected 16 or TMA"
        )
    return found


def regressions(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """In what the record of a variant is worse than, or other than, that in the baseline."""
    if "error" in record or "error" in baseline:
        return []  # the first is a violation already, the second cannot get worse
    found = []

    def compare(worse: bool, what: str, now: object, before: object) -> None:
        if worse:
            found.append(f"{what}: {now}, baseline {before}")

    def compare_field(sign: int, field: str, what: str, unit: str = "", slack: int = 0) -> None:
        now, before = record[field], baseline[field]
        compare(sign * (now - before) > slack, what, f"{now:,}{unit}", f"{before:,}{unit}")

    compare_field(1, "registers", "registers", slack=REGISTER_SLACK)
    compare_field(-1, "occupancy", "occupancy", "%")
    compare_field(1, "shared", "shared memory", " bytes")
    compare_field(1, "fp64", "float64 instructions")
    for kind in ("load", "store"):
        compare_field(-1, f"{kind}_width", f"width of most {kind}s", " bytes")
        compare_field(-1, f"wide_{kind}s", f"bytes by wide {kind}s", "%")
    families = [" ".join(sorted(set(tensor_families(r["tensor"])))) or "none" for r in (record, baseline)]
    compare(families[0] != families[1], "matrix cores", *families)
    compare(record["dot"] != baseline["dot"], "dot", record["dot"], baseline["dot"])
    compare(record["aligned"] < baseline["aligned"], "tiles", "no longer aligned", "aligned")
    return found


def _counts(accesses: Mapping[str, int]) -> str:
    """`16:12 4:2`, the widest first."""
    order = sorted(accesses, key=lambda width: -99 if width == "tma" else -int(width))
    return " ".join(f"{width}:{accesses[width]}" for width in order) or "-"


# ---- the file ----


def versions() -> dict[str, str]:
    """Versions of this package and of the compilers that machine code depends on, by name."""
    import triton

    tools = triton.knobs.nvidia
    try:
        package = importlib.metadata.version("vtp")
    except importlib.metadata.PackageNotFoundError:
        package = "unknown"
    return {
        "ptxas": tools.ptxas.version,
        "ptxas_blackwell": tools.ptxas_blackwell.version,
        "triton": triton.__version__,
        "vtp": package,
    }


def save(path: Path, records: Iterable[Record]) -> None:
    """Write a report, one variant per line so that a diff can be read; the file is whole or untouched."""
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in sorted(records, key=key))
    text = f'{{"versions": {json.dumps(versions(), sort_keys=True)},\n"variants": [\n{lines}\n]}}\n'
    write_whole(path, text, CompilationError)


def load(path: Path) -> tuple[dict[str, str], dict[str, Record]]:
    """Read a report: the versions it was made with, and its records by key.

    Raises:
        CompilationError: it is not there, or is no report.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["versions"], {key(record): record for record in content["variants"]}
    except OSError as error:
        raise CompilationError(
            f"no baseline at {path} ({error.strerror}): "
            "`python -m vtp_kernels.proofs.compilations report` makes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CompilationError(f"{path} is not a report of this program: {error!r}") from None


# ---- commands ----


def report(arguments: argparse.Namespace, console: Console) -> int:
    """The command `report`: compile, print, and write what was asked for. Returns the exit code."""
    chosen = [task for task in tasks(arguments.targets, arguments.ops) if arguments.only in task.key]
    if not chosen:
        raise CompilationError(f"no variant has {arguments.only!r} in its name")
    records = compile_all(chosen, arguments.jobs)
    for target in arguments.targets:
        print_target(console, target, [r for r in records.values() if r["target"] == target])
    whole = set(arguments.targets) == set(TARGETS) and set(arguments.ops) == set(OPS) and not arguments.only
    if path := arguments.out or (BASELINE if whole else None):
        save(path, records.values())
        console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    else:
        console.print(
            "Not written: this is a part of the variants, and the baseline has all (--out FILE writes it)"
        )
    return _print_failures(
        console, [f"{name}: {text}" for name, r in records.items() for text in violations(r)]
    )


def print_target(console: Console, target: str, records: Sequence[Record]) -> None:
    """Print the table of the records of one target, and a line that sums them up."""
    if not records:
        return
    table = Table(title=target, title_justify="left")
    for column in (
        "variant",
        "regs",
        "spill",
        "shared",
        "threads",
        "blocks",
        "occup.",
        "loads",
        "stores",
        "code",
    ):
        table.add_column(column, justify="left" if column in ("variant", "loads", "stores") else "right")
    table.add_column("matrix cores")
    compiled = [record for record in records if "error" not in record]
    for r in compiled:
        table.add_row(
            f"{r['op']}/{r['name']}",
            *(f"{r[field]:,}" for field in ("registers", "local_accesses", "shared", "threads", "blocks")),
            f"{r['occupancy']}%",
            *(_counts(r[field]) for field in ("loads", "stores")),
            f"{r['code_bytes']:,}",
            " ".join(f"{count} {name}" for name, count in r["tensor"].items()) or "-",
            style="red" if violations(r) else None,
        )
    console.print(table)
    failed = len(records) - len(compiled)
    line = f"{target}: {len(records)} variants, {failed} do not compile"
    if compiled:
        spills = sum(bool(r["local_accesses"] or r["scalar_spills"]) for r in compiled)
        registers, shared = (max(r[field] for r in compiled) for field in ("registers", "shared"))
        least = min(r["occupancy"] for r in compiled)
        line += f", {spills} spill, at most {registers} registers and {shared:,} bytes of shared memory"
        line += f", occupancy at least {least}%"
    console.print(line + "\n", highlight=False, soft_wrap=True)


def check(arguments: argparse.Namespace, console: Console) -> int:
    """The command `check`: compile, and compare with the rules and the baseline. Returns the exit code."""
    before, baseline = load(arguments.baseline)
    everything = tasks(arguments.targets, arguments.ops)
    expected = {
        n for n, r in baseline.items() if r["target"] in arguments.targets and r["op"] in arguments.ops
    }
    names = {task.key for task in everything}
    again = "run `python -m vtp_kernels.proofs.compilations report`"
    failures = [f"{name}: in the baseline, but gone; {again}" for name in sorted(expected - names)]
    failures += [f"{name}: new, not in the baseline; {again}" for name in sorted(names - expected)]

    chosen = quick(everything, baseline) if arguments.quick else everything
    records = compile_all(chosen, arguments.jobs)
    worse = []
    for name, record in records.items():
        failures += [f"{name}: {text}" for text in violations(record)]
        worse += [f"{name}: {text}" for text in regressions(record, baseline.get(name, record))]
    now = versions()
    if before.get("triton") == now["triton"]:
        failures += worse
    else:
        # Another compiler is expected to make other code; it is not the kernels' fault.
        console.print(
            f"The baseline is of Triton {before.get('triton')}, this is {now['triton']}: changes are notes"
        )
        for line in worse:
            console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(records)} of {len(everything)} variants compiled, {len(failures)} failures")
    return _print_failures(console, failures)


def _print_failures(console: Console, failures: Sequence[str]) -> int:
    for line in failures:
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vtp_kernels.proofs.compilations", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        (report, "print what each variant uses"),
        (check, "compare with the rules and the baseline"),
    ):
        sub = commands.add_parser(command.__name__, help=text, description=text)
        sub.set_defaults(run=command)
        sub.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET",
                         help=f"of {', '.join(TARGETS)}; default: all")  # fmt: skip
        sub.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP",
                         help=f"of {', '.join(OPS)}; default: all")  # fmt: skip
        sub.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="compilations at a time")
    commands.choices["report"].add_argument(
        "--only", default="", help="variants whose name has this text in it"
    )
    commands.choices["report"].add_argument(
        "--out", type=Path, help=f"default, for a whole report: {BASELINE.name}"
    )
    commands.choices["check"].add_argument("--quick", action="store_true", help="one variant of each kind")
    commands.choices["check"].add_argument(
        "--baseline", type=Path, default=BASELINE, help="a report to compare with"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def check_compiler() -> None:
    """Raise CompilationError, with the reason, where Triton cannot compile."""
    if not HAS_TRITON:
        raise CompilationError("Triton is not installed, and nothing can be compiled without it")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise CompilationError(
            "TRITON_INTERPRET is set: kernels would be interpreted, unset it to compile them"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    # A file or a pipe has no width, and a table folded to 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        check_compiler()
        return arguments.run(arguments, console)
    except CompilationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
