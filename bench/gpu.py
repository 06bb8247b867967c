"""Measure where a GPU is: numerics, stray accesses and races, times of the ops and of whole training steps.

    make gpu
    python -m bench.gpu --parts gated_linear --models base --batch 1 2 4 8 16 32

Four parts, in this order: `numerics` runs tests/gpu; `sanitizer` runs a few of these tests under
compute-sanitizer; `gated_linear` times the op at the linears of DeiT beside its peers, and along each of its
paths, so that `FUSED_ROWS` in vtp_kernels/gated_linear.py can be set from figures; `step` is
bench/gating_cost.py. One results file, bench/results/gpu-<name of the GPU>.json, is written anew as figures
come in; what has not run is "not measured" in it, and what computes something else has no figure.

Exit status: 0; 1 where a test or a peer failed; 2 where nothing was measured as there is no GPU, or no file
can be written.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vtp.comparison.comparison import relative_error
from vtp.files import FileError, write_atomic
from vtp.machine import commit, hardware
from vtp.options import positive
from vtp.pipeline import environment
from vtp.timing import pairwise_ratio, synchronize, turns
from vtp_kernels import gated_linear
from vtp_kernels.gated_linear import FUSED_ROWS, gated_linear_ref
from vtp_kernels.launching import forced_path
from vtp_kernels.library import triton_unsupported_reason

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "gpu"
STEP = HERE / "gating_cost.py"
PARTS = ("numerics", "sanitizer", "gated_linear", "step")
TOOLS = ("memcheck", "racecheck")
NOT_MEASURED = "not measured"
MEASURED = "measured"

WIDTHS = {"tiny": 192, "small": 384, "base": 768}  # DeiT
TOKENS = 197
# The dtypes of x and of the parameters; "autocast" runs under it.
PRECISIONS = {
    "autocast": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
# Largest relative error (norm of the difference over norm) of the output and of each gradient.
TOLERANCES = {"autocast": 1e-2, "bf16": 1e-2, "float32": 1e-4}
NAMES = ("y", "dx", "dweight", "dbias", "dgate")
REFERENCE = "ungated"

WARM_UP = 3  # calls of each peer after the one that is checked, which compiles
FLUSHED_BYTES = 512 * 2**20  # several times the largest L2
# The GPU writes that long before each sample, and meanwhile the host queues the sample's kernels.
LEAD_SECONDS = 2e-3
METHOD = (
    "Peers take turns round by round in random order. `gpu` is the time between two CUDA events around one "
    f"call; before it {FLUSHED_BYTES >> 20} MiB are written for at least {LEAD_SECONDS * 1e3:g} ms: L2 holds "
    "no operand, and launching takes no part unless it takes longer than that. `call` is wall-clock time of "
    "one call and the wait for its end, with what L2 holds. Medians and quartiles; ratios are of times in "
    "the same round, to F.linear without a gate. A peer is timed only if output and gradients are right."
)

MOST_SECONDS = 3600  # of one run of tests: under compute-sanitizer it may be hundreds of times slower

Record = dict[str, Any]

# --------------------------------------------------------------------------------
# Cases and peers


@dataclass(frozen=True)
class Case:
    """One linear, [outputs, inputs], at `rows` rows of x [batch, tokens, inputs].

    backward: with the gradients of x, weight, bias and gate, or the forward pass alone, without autograd.
    """

    model: str
    linear: str
    inputs: int
    outputs: int
    batch: int
    precision: str
    backward: bool
    tokens: int = TOKENS

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"

    def __str__(self) -> str:
        return f"{self.model} {self.linear}, batch {self.batch}, {self.precision}, {self.direction}"


def deit_cases(models: Iterable[str], batches: Iterable[int], precisions: Iterable[str]) -> list[Case]:
    """Every linear of a block of each model."""
    cases = []
    for precision in precisions:
        for backward in (False, True):
            for model in models:
                D = WIDTHS[model]
                linears = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
                for linear, (inputs, outputs) in linears.items():
                    for batch in batches:
                        cases.append(Case(model, linear, inputs, outputs, batch, precision, backward))
    return cases


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ungated(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """The plain linear; what a gate is compared with."""
    return F.linear(x, weight, bias)


def naive(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """The gate on the activation, as one would write it by hand."""
    return F.linear(x * gate, weight, bias)


def compiled_naive() -> Function:
    """`naive` by torch.compile, for one shape: it must not count as one recompilation too many."""
    torch.compiler.reset()
    return torch.compile(naive, dynamic=False)


@dataclass(frozen=True)
class Peer:
    """make: called once for each case. path: what is forced on gated_linear, one of `FORCED_PATHS`."""

    make: Callable[[], Function]
    gated: bool = True
    path: str | None = None


# What a product of any number of rows can be made to take: GEMM kernels that scale W themselves, or a kernel
# that folds the gate into W, the vendor's GEMM, and one that unfolds.
FORCED_PATHS = ("fused", "vendor")
PEERS: dict[str, Peer] = {
    REFERENCE: Peer(lambda: ungated, gated=False),
    "naive": Peer(lambda: naive),
    "naive compiled": Peer(compiled_naive),
    "gated_linear": Peer(lambda: gated_linear),
    **{path: Peer(lambda: gated_linear, path=path) for path in FORCED_PATHS},
}


def forced(path: str | None) -> contextlib.AbstractContextManager[None]:
    """Within it gated_linear takes `path`, or what its table says."""
    return forced_path("gated_linear", *([] if path is None else [path]))


def why_no_paths(case: Case, device: torch.device) -> str | None:
    """Why gated_linear has no paths to choose from in this case; None where it has."""
    if device.type != "cuda":
        return "there are paths on a GPU only"
    if taken(case) == "folded":
        return "trained in mixed precision, the folded weight takes the place of the cast weight"
    return triton_unsupported_reason(device)


def taken(case: Case) -> str:
    """The path that the table takes; "folded" where the op does not ask it."""
    x_dtype, dtype = PRECISIONS[case.precision]
    if case.backward and x_dtype != dtype:
        return "folded"
    return "fused" if case.rows <= FUSED_ROWS[x_dtype.itemsize] else "vendor"


# --------------------------------------------------------------------------------
# One case


def operands(case: Case, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """x, weight, bias, gate, of the scale that a model has; and dy."""
    generator = torch.Generator(device).manual_seed(0)
    x_dtype, dtype = PRECISIONS[case.precision]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tensors = {
        "x": normal(case.batch, case.tokens, case.inputs).to(x_dtype),
        "weight": (normal(case.outputs, case.inputs) / case.inputs**0.5).to(dtype),
        "bias": normal(case.outputs).to(dtype),
        "gate": (0.5 + torch.rand(case.inputs, generator=generator, device=device)).to(dtype),
    }
    dy = normal(case.batch, case.tokens, case.outputs).to(x_dtype)
    return {name: t.requires_grad_(case.backward) for name, t in tensors.items()}, dy


def call(
    function: Function, case: Case, tensors: Mapping[str, Tensor], dy: Tensor, gated: bool
) -> list[Tensor]:
    """y, and in a case with backward the gradients of x, weight, bias and, of a gated peer, the gate."""
    x, weight, bias, gate = tensors.values()
    autocast = torch.autocast(dy.device.type, torch.bfloat16, enabled=case.precision == "autocast")
    with autocast, torch.set_grad_enabled(case.backward):
        y = function(x, weight, gate, bias)
    if not case.backward:
        return [y]
    return [y, *torch.autograd.grad(y, (x, weight, bias, gate) if gated else (x, weight, bias), dy)]


def expected(case: Case, tensors: Mapping[str, Tensor], dy: Tensor, gated: bool) -> list[Tensor]:
    """What `call` has to return, in float64."""
    exact = {name: t.detach().double() for name, t in tensors.items()}
    if not gated:
        exact["gate"] = torch.ones_like(exact["gate"])
    exact = {name: t.requires_grad_(case.backward) for name, t in exact.items()}
    without_casts = Case(**{**asdict(case), "precision": "float32"})
    return call(gated_linear_ref, without_casts, exact, dy.double(), gated)


def failure(
    results: Sequence[Tensor], right: Sequence[Tensor], tensors: Mapping[str, Tensor], tolerance: float
) -> str | None:
    """Why these results are wrong; None where they are right."""
    for name, result, reference in zip(NAMES, results, right, strict=False):
        if name != "y" and result.dtype != tensors[name.removeprefix("d")].dtype:
            return f"{name}: {result.dtype}"
        error = relative_error(result.detach(), reference.detach())
        if not error <= tolerance:  # nor NaN
            return f"{name}: relative error {error:.2g}, at most {tolerance:g} allowed"
    return None if len(results) == len(right) else f"{len(results)} results, expected {len(right)}"


def check(
    case: Case, peers: Mapping[str, Peer], tensors: Mapping[str, Tensor], dy: Tensor
) -> tuple[dict[str, Record], dict[str, Callable[[], object]]]:
    """Call each peer once. Returns a record for each, and a ready-made call of those that were right."""
    records: dict[str, Record] = {}
    right_calls: dict[str, Callable[[], object]] = {}
    for gated in (False, True):
        right = expected(case, tensors, dy, gated)
        for name, peer in peers.items():
            if peer.gated != gated:
                continue
            if peer.path is not None and (reason := why_no_paths(case, dy.device)):
                records[name] = {"status": f"{NOT_MEASURED}: {reason}"}
                continue
            try:
                run = functools.partial(call, peer.make(), case, tensors, dy, gated)
                with forced(peer.path):
                    reason = failure(run(), right, tensors, TOLERANCES[case.precision])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of a compiler, a launch, ...: the other peers have their figures
                reason = first_line(error)
            records[name] = {"status": MEASURED if reason is None else f"failed: {reason}"}
            if reason is None:
                right_calls[name] = run
    return {name: records[name] for name in peers}, {n: right_calls[n] for n in peers if n in right_calls}


class Stopwatch:
    """Seconds of one call, by `gpu` and by `call` (see `METHOD`); without a GPU there is no `gpu`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kinds = ("gpu", "call") if device.type == "cuda" else ("call",)
        if device.type == "cuda":
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
            self.writes = 1
            seconds = statistics.median(self.gpu(self.buffer.zero_) for _ in range(5))
            self.writes = math.ceil(LEAD_SECONDS / seconds)

    def gpu(self, run: Callable[[], object]) -> float:
        for _ in range(self.writes):
            self.buffer.zero_()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3

    def call(self, run: Callable[[], object]) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - started


def measure(case: Case, peers: Mapping[str, Peer], stopwatch: Stopwatch, rounds: int) -> Record:
    """Check, then time the peers of one case; the record that the results file has of it."""
    record = pending(case, peers)
    try:
        tensors, dy = operands(case, stopwatch.device)
        record["peers"], calls = check(case, peers, tensors, dy)
        if REFERENCE not in calls:  # a ratio to it would mean nothing
            for name in calls:
                record["peers"][name] = {"status": f"{NOT_MEASURED}: {REFERENCE} failed"}
            return record
        samples = take_turns(calls, peers, stopwatch, rounds)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return pending(case, peers, f"{NOT_MEASURED}: out of GPU memory")
    except Exception as error:  # such as a stray access, after which nothing runs: what was measured stays
        return pending(case, peers, f"failed: {first_line(error)}")
    for name in calls:
        record["peers"][name] |= figures(samples[name], samples[REFERENCE])
    if {"fused", "vendor"} <= calls.keys() and "gpu" in stopwatch.kinds:
        ratio = pairwise_ratio(samples["fused"]["gpu"], samples["vendor"]["gpu"])
        record["fused_over_vendor"] = ratio
        record["faster"] = faster(ratio)
    return record | {"rounds": rounds}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def pending(case: Case, peers: Iterable[str], status: str = NOT_MEASURED) -> Record:
    """The record of a case without figures."""
    return {
        **asdict(case),
        "rows": case.rows,
        "taken": taken(case),
        "faster": NOT_MEASURED,
        "rounds": NOT_MEASURED,
        "peers": {name: {"status": status} for name in peers},
    }


def take_turns(
    calls: Mapping[str, Callable[[], object]], peers: Mapping[str, Peer], stopwatch: Stopwatch, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Round by round, one sample of each kind from each; in seconds."""
    samples = {name: {kind: [] for kind in stopwatch.kinds} for name in calls}
    for number in range(-WARM_UP, rounds):
        for name in turns(list(calls), max(number, 0)):
            with forced(peers[name].path):
                for kind in stopwatch.kinds:
                    seconds = getattr(stopwatch, kind)(calls[name])
                    if number >= 0:
                        samples[name][kind].append(seconds)
    return samples


def figures(own: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]) -> Record:
    """Of each kind of time the median, and its ratio to the reference."""
    return {
        kind: {
            "median_seconds": statistics.median(own[kind]),
            "ratio": pairwise_ratio(own[kind], reference[kind]),
        }
        for kind in own
    }


def faster(fused_over_vendor: Mapping[str, float]) -> str:
    """Which path is faster; "equal" where a quarter of the rounds says otherwise."""
    if fused_over_vendor["q3"] < 1:
        return "fused"
    return "vendor" if fused_over_vendor["q1"] > 1 else "equal"


def advice(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each entry of `FUSED_ROWS` the bound that would lose least in these cases, and what is lost now.

    A loss is the geometric mean, over cases, of the time of the path taken over that of the faster path. All
    bounds from `least_rows` to below `rows_below` (None: any) make the same choices.
    """
    found: dict[str, Any] = {}
    for element_size, now in FUSED_ROWS.items():
        measured = [
            (case["rows"], case["fused_over_vendor"]["median"])
            for case in cases
            if "fused_over_vendor" in case and PRECISIONS[case["precision"]][0].itemsize == element_size
        ]
        if not measured:
            found[str(element_size)] = NOT_MEASURED
            continue
        bounds = [0, *sorted({rows for rows, _ in measured})]
        best = min(bounds, key=lambda bound: _loss(measured, bound))
        above = [bound for bound in bounds if bound > best]
        found[str(element_size)] = {
            "cases": len(measured),
            "now": now,
            "loss_now": _loss(measured, now),
            "least_rows": best,
            "rows_below": above[0] if above else None,
            "loss": _loss(measured, best),
        }
    return found


def _loss(measured: Iterable[tuple[int, float]], bound: int) -> float:
    """measured: rows, and the time of the fused path over the other's."""
    return statistics.geometric_mean(
        max(1.0, ratio) if rows <= bound else max(1.0, 1 / ratio) for rows, ratio in measured
    )


# --------------------------------------------------------------------------------
# The parts that other programs do


def run_tests(
    *options: str, tests: Path = TESTS, prefix: Sequence[str] = (), variables: Mapping[str, str] | None = None
) -> Record:
    """Run pytest, whose output goes to the terminal; counts, and the names of tests that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [*prefix, *pytest, str(tests), *options]
        environ = {**os.environ, **(variables or {})}
        started = time.perf_counter()
        try:
            status = subprocess.run(command, cwd=HERE.parent, env=environ, timeout=MOST_SECONDS).returncode
        except subprocess.TimeoutExpired:
            return {"status": f"failed: not done after {MOST_SECONDS} s"}
        seconds = time.perf_counter() - started
        try:
            cases = list(ElementTree.parse(report).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            return {"status": f"failed: pytest wrote no report, exit status {status}"}
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    reason = None
    if status or failed:
        reason = f"failed: {len(failed)} of {len(cases)} tests, exit status {status}"
    elif not passed:
        reason = f"{NOT_MEASURED}: all tests were skipped"
    return {
        "status": reason or MEASURED,
        "passed": passed,
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
        "skipped": len(skipped),
        "skipped_because": sorted({c.find("skipped").get("message", "") for c in skipped}),
        "seconds": round(seconds, 1),
    }


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or where the CUDA toolkit puts it."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def sanitize(tool: str, tests: Path = TESTS) -> Record:
    """The tests that are marked for it, under a tool of compute-sanitizer."""
    executable = find_sanitizer()
    if executable is None:
        return {"status": f"{NOT_MEASURED}: compute-sanitizer: not installed"}
    # Each tensor in an allocation of its own: PyTorch's pool would hide what lies between two of them.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # Calls of the driver's interface that fail are no news: PyTorch tries some to see whether they work.
        options = [
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            "--report-api-errors",
            "no",
            "--log-file",
            str(log),
        ]
        record = run_tests("-m", "sanitizer", tests=tests, prefix=[executable, *options], variables=variables)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if record["status"] == MEASURED and not any("SUMMARY: 0 " in line for line in lines):
        record["status"] = "failed: compute-sanitizer gave no clean summary"
    return record | {"log": lines[-40:]}


def step(script: Path = STEP) -> Record:
    """Whole training steps: the results of bench/gating_cost.py, which prints its own tables."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        status = subprocess.run(
            [sys.executable, str(script), "--device", "cuda", "--out", str(out)]
        ).returncode
        try:
            results = json.loads(out.read_text())
        except (OSError, ValueError):
            return {"status": f"failed: gating_cost.py wrote no results, exit status {status}"}
    return {"status": f"failed: exit status {status}" if status else MEASURED, **results}


# --------------------------------------------------------------------------------
# Tables and the results file


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def place(device: torch.device) -> dict[str, Any]:
    """What figures depend on: machine, GPU, driver and versions."""
    found = {**environment(), **hardware(device), "triton": _version("triton"), "hip": torch.version.hip}
    found["driver"] = found["capability"] = found["multiprocessors"] = found["memory_bytes"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["driver"] = _driver()
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
    return found


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _driver() -> str | None:
    if torch.version.hip is not None:
        with contextlib.suppress(OSError):
            return Path("/sys/module/amdgpu/version").read_text().strip()
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return None


def cell(record: Mapping[str, Any], of_reference: bool) -> str:
    """A peer's figure, on the GPU (and per call): microseconds of the reference, ratios of the others."""
    if record["status"] != MEASURED:
        return record["status"].partition(":")[0]
    shown = []
    for kind in ("gpu", "call"):
        if kind not in record:
            shown.append(NOT_MEASURED)
        elif of_reference:
            shown.append(f"{record[kind]['median_seconds'] * 1e6:.1f}")
        else:
            shown.append(f"{record[kind]['ratio']['median']:.2f}x")
    return f"{shown[0]} ({shown[1]})"


def tables(cases: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> list[Table]:
    """One table for each precision and direction, a row for each linear and batch."""
    groups: dict[str, Table] = {}
    for case in cases:
        direction = "forward + backward" if case["backward"] else "forward"
        title = f"gated_linear, {case['precision']}, {direction}"
        if title not in groups:
            groups[title] = _table(title, ["linear", "batch", "rows", *peers, "faster path", "table takes"])
        cells = [cell(case["peers"][name], name == REFERENCE) for name in peers]
        linear = f"{case['model']} {case['linear']}"
        chosen = case["taken"] + (
            " (slower)" if case["faster"] not in (case["taken"], "equal", NOT_MEASURED) else ""
        )
        groups[title].add_row(linear, str(case["batch"]), str(case["rows"]), *cells, case["faster"], chosen)
    return list(groups.values())


def _table(title: str, headings: Sequence[str]) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "linear" else "right", no_wrap=True)
    return shown


def advice_lines(found: Mapping[str, Any]) -> list[str]:
    """One line for each entry of `FUSED_ROWS`."""
    lines = []
    for element_size, entry in found.items():
        name = f"FUSED_ROWS[{element_size}]"
        if entry == NOT_MEASURED:
            lines.append(f"{name}: {NOT_MEASURED}")
            continue
        below = "or more" if entry["rows_below"] is None else f"to {entry['rows_below'] - 1}"
        lines.append(
            f"{name} = {entry['now']} loses {entry['loss_now'] - 1:.1%} to the faster path of each of "
            f"{entry['cases']} cases; best: {entry['least_rows']} {below} loses {entry['loss'] - 1:.1%}"
        )
    return lines


def summary(results: Mapping[str, Any]) -> list[str]:
    """One line for each part but the table of times."""
    found = {"numerics": results["numerics"], **results["sanitizer"], "step": results["step"]}
    lines = []
    for name, record in found.items():
        counts = f", {record['passed']} passed, {record['skipped']} skipped" if "passed" in record else ""
        lines.append(f"{name}: {record['status']}{counts}")
    return lines


def failures(results: Mapping[str, Any]) -> list[str]:
    """One line for each test run, tool or peer that failed."""
    lines = [line for line in summary(results) if ": failed" in line]
    for case in results["gated_linear"]["cases"]:
        where = f"{case['model']} {case['linear']}, batch {case['batch']}, {case['precision']}"
        for name, record in case["peers"].items():
            if record["status"].startswith("failed"):
                lines.append(f"{where}{', backward' * case['backward']}: {name} {record['status']}")
    return lines


# --------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = positive(int)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="all four")
    parser.add_argument("--models", choices=WIDTHS, nargs="+", default=list(WIDTHS), help="all three")
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8, 128], help="images: 1 8 128")
    parser.add_argument(
        "--precision", choices=PRECISIONS, nargs="+", default=["autocast", "bf16"], help="autocast bf16"
    )
    parser.add_argument("--rounds", type=count, default=30, help="samples of each peer: 30")
    parser.add_argument("--out", type=Path, help="results file; by default named after the GPU")
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None,
    *,
    device: torch.device | None = None,
    cases: Sequence[Case] | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> int:
    """Run the command line. Returns the exit status; see the top.

    Args:
        device: by default the GPU; on a CPU this is a rehearsal, in which nothing runs on a GPU.
        cases, peers: in place of those of the command line.
    """
    options = parse_arguments(argv)
    if device is None:
        if not torch.cuda.is_available():
            print("There is no GPU that PyTorch can use: nothing was measured or written.", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    if cases is None:
        cases = deit_cases(*(dict.fromkeys(o) for o in (options.models, options.batch, options.precision)))
    where = place(device)
    out = options.out or HERE / "results" / f"gpu-{slug(where['gpu'] or where['cpu'])}.json"
    results: dict[str, Any] = {
        "place": where,
        **commit(),
        "arguments": {**vars(options), "out": out.name},
        "numerics": {"status": NOT_MEASURED},
        "sanitizer": {tool: {"status": NOT_MEASURED} for tool in TOOLS},
        "gated_linear": {
            "method": METHOD,
            "tolerances": TOLERANCES,
            "fused_rows": {str(size): rows for size, rows in FUSED_ROWS.items()},
            "advice": advice([]),
            "cases": [pending(case, peers) for case in cases],
        },
        "step": {"status": NOT_MEASURED},
    }
    try:
        for _ in measure_parts(results, options, cases, peers, device):
            write_atomic(out, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    except FileError as error:
        print(error, file=sys.stderr)
        return 2
    report(results, list(peers), out)
    return 1 if failures(results) else 0


def measure_parts(
    results: dict[str, Any],
    options: argparse.Namespace,
    cases: Sequence[Case],
    peers: Mapping[str, Peer],
    device: torch.device,
) -> Iterator[None]:
    """Fill in `results`; yields at the start and whenever something is new, so that it can be written."""
    yield
    if "numerics" in options.parts:
        results["numerics"] = run_tests()
        yield
    for tool in TOOLS if "sanitizer" in options.parts else ():
        results["sanitizer"][tool] = sanitize(tool)
        yield
    if "gated_linear" in options.parts:
        part, stopwatch = results["gated_linear"], Stopwatch(device)
        for number, case in enumerate(
            track(cases, "gated_linear", console=Console(stderr=True), transient=True)
        ):
            part["cases"][number] = measure(case, peers, stopwatch, options.rounds)
            part["advice"] = advice(part["cases"])
            yield
        del stopwatch  # its buffer, which the next part's process may need
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "step" in options.parts:
        results["step"] = step()
        yield


def report(results: Mapping[str, Any], peers: Sequence[str], out: Path) -> None:
    """Print what the results file says."""
    where = results["place"]
    machine = where["gpu"] or where["cpu"]
    console = Console(width=max(Console().width, 180))  # a table cut off says nothing; a wrapped line does
    print(f"{machine}, driver {where['driver']}, CUDA {where['cuda']}, torch {where['torch']}, ", end="")
    print(f"triton {where['triton']}, {where['date']}, commit {(results['commit'] or 'unknown')[:12]}")
    for line in summary(results):
        print(line)
    print("Times on the GPU (and wall-clock, per call): microseconds ungated, and ratios to that.")
    for shown in tables(results["gated_linear"]["cases"], peers):
        console.print(shown)
    for line in advice_lines(results["gated_linear"]["advice"]):
        print(line)
    for line in failures(results):
        print(line, file=sys.stderr)
    print(f"written: {out}")


if __name__ == "__main__":
    raise SystemExit(main())
