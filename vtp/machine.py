"""What all comparisons share: whose turn it is, ratios, the error that is checked, the machine."""

import argparse
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vtp.runtime.cpu import return_freed_memory

PEER_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "torch-pruning")
LEAST_ROUNDS = 5  # the fewest that have quartiles worth printing
ENOUGH_ROUNDS = 10  # the fewest that say how much times scatter


# --------------------------------------------------------------------------------
# Correctness


def relative_error(got: Tensor | None, right: Tensor) -> float:
    """Norm of the difference over the norm of `right`; infinite where `got` is missing or does not fit."""
    if got is None or got.shape != right.shape:
        return math.inf
    difference, size = (got.double() - right.double()).norm().item(), right.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf


# --------------------------------------------------------------------------------
# Time


class Step(Protocol):
    """Something that takes turns and notes the time of each for itself."""

    def step(self) -> object: ...


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: at random, but always the same, so that all follow all others."""
    return random.Random(number).sample(names, len(names))


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    seconds: float,
    precise: Callable[[int], bool] = lambda done: False,
) -> int:
    """Round by round, one step of each. Returns the number of rounds.

    Args:
        rounds: how many; fewer, but at least `LEAST_ROUNDS`, where one more would exceed `seconds`.
        precise: whether so many are enough, asked from `ENOUGH_ROUNDS` on.
    """
    started = time.perf_counter()
    for done in range(rounds):
        elapsed = time.perf_counter() - started
        if done >= LEAST_ROUNDS and elapsed * (done + 1) / done > seconds:
            return done
        if done >= ENOUGH_ROUNDS and precise(done):
            return done
        for name in turns(list(steps), done):
            steps[name].step()
    return rounds


def pairwise_ratio(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles over rounds of own time over the reference's time in the same round."""
    ratios = [this / other for this, other in zip(own, reference, strict=True)]
    if len(ratios) == 1:
        ratios *= 2
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def standard_error(own: Sequence[float], reference: Sequence[float]) -> float:
    """Of the median of `pairwise_ratio`: sqrt(pi / 2) sigma / sqrt(rounds) of a normal distribution, whose
    quartiles are 1.349 sigma apart."""
    ratio = pairwise_ratio(own, reference)
    return math.sqrt(math.pi / 2 / len(own)) * (ratio["q3"] - ratio["q1"]) / 1.349


# --------------------------------------------------------------------------------
# Memory


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int | None:
    """Memory in use: of a GPU what PyTorch has allocated; else what is resident of this process, after what
    is free was given back, or None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return_freed_memory()
    return _status_bytes("VmRSS")


def peak_bytes(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int | None]:
    """What a call returns, and the most memory in use during it; see `memory_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        outputs = call()
        synchronize(device)
        return outputs, torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is resident now
    except OSError:  # no Linux, or not allowed
        return call(), None
    return call(), _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


# --------------------------------------------------------------------------------
# Machine


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def vector_flags() -> list[str]:
    """Every vector and matrix instruction set of the CPU, as Linux names them."""
    return sorted(flag for flag in _cpu_flags() if flag.startswith(("avx", "amx", "fma", "f16c", "vnni")))


def hardware(device: torch.device) -> dict[str, Any]:
    """The instruction sets that matter for the speed of a step, and the GPU if it ran on one."""
    flags = _cpu_flags()
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "flags": {f: f in flags for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")},
        "onednn_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def environment() -> dict[str, Any]:
    """Versions and machine that figures were measured with."""
    return {
        **{name: version(name) for name in ("torch", "timm")},
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f"family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return f"{fields.get('model name', platform.machine())} {family}".strip()


def description(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of a comparison on `device`, for its results file."""
    return {
        "environment": environment(),
        "hardware": {**hardware(device), "isa": vector_flags()},
        "versions": {name: _version(name) for name in PEER_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """Commit of this checkout and whether files differ from it; None where that is unknown."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    # An installed copy may lie in a checkout of something else.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "modified": None}
    # What a comparison writes itself is no change of what it measures.
    changes = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)bench/results")
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(changes)}


def machine(results: Mapping[str, Any]) -> str:
    """What the figures were measured on, in one line."""
    env, hard = results["environment"], results["hardware"]
    if hard["gpu"]:
        place = f"{hard['gpu']}, CUDA {hard['cuda']}"
    else:
        bf16 = "" if hard["onednn_bf16"] else " without bf16 instructions"
        place = f"{env['cpu']}{bf16}, {env['threads']} thread{'s' * (env['threads'] > 1)}"
    return f"{place}, torch {env['torch']}, timm {env['timm']}, Python {env['python']}, {env['date']}"


# --------------------------------------------------------------------------------
# Command line


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


def thread_count(text: str) -> int:
    """The `type` of an option for CPU threads: from 1 to the number of cores."""
    count, cores = positive(int)(text), os.cpu_count()
    if count > cores:
        raise argparse.ArgumentTypeError(f"got {count}, expected at most {cores}, one for each core")
    return count
