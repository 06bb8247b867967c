"""The machine: what figures were measured on, in one description, and the memory that is in use."""

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp.timing import synchronize
from vtp.words import counted

RUNTIME_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "torch-pruning")


# --------------------------------------------------------------------------------
# Memory


def return_freed_memory() -> None:
    """Give the system back what was freed, where the C library would keep it for later (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
        "versions": {name: package_version(name) for name in RUNTIME_PACKAGES},
    }


def package_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
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


def in_one_line(results: Mapping[str, Any]) -> str:
    """What the figures of a results file were measured on, in one line."""
    env, hard = results["environment"], results["hardware"]
    if hard["gpu"]:
        place = f"{hard['gpu']}, CUDA {hard['cuda']}"
    else:
        bf16 = "" if hard["onednn_bf16"] else " without bf16 instructions"
        place = f"{env['cpu']}{bf16}, {counted(env['threads'], 'thread')}"
    return f"{place}, torch {env['torch']}, timm {env['timm']}, Python {env['python']}, {env['date']}"
