"""What every op's file needs to launch: Triton, the path that is forced, a launch, what can be compiled.

Where Triton is missing (CPU-only builds of PyTorch, macOS) the files still import: `triton.jit` then leaves
the Python function as it is, nothing launches it, and the ops run on plain PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the kernels of a file are still defined, and never launched
    triton = types.SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = types.SimpleNamespace(constexpr=None)
    TensorDescriptor = None
    HAS_TRITON = False
else:
    HAS_TRITON = True


# ptxas of CUDA 12.8, which Triton 3.6 has, takes the addresses of some warp-group products of sm_90 from a
# register of something else: results were wrong on an H200, or the kernel read astray. Of the same PTX ptxas
# 12.9 and 13.0 make the right code (docs/speed-gpu.md).
_SOUND_PTXAS = (12, 9)


@functools.cache
def unsound_assembler() -> str | None:
    """Why Triton cannot assemble for NVIDIA's sm_90 here, or None.

    Where it has a sound ptxas for other chips alone, it is made to take that one, for all that this process
    or one that it starts compiles from then on.
    """
    tools, found = triton.knobs.nvidia, {}
    for name in ("ptxas", "ptxas_blackwell"):
        with contextlib.suppress(RuntimeError, AttributeError):  # Triton does not find it, or knows none
            found[name] = getattr(tools, name)
    sound = [n for n, tool in found.items() if tuple(map(int, tool.version.split("."))) >= _SOUND_PTXAS]
    if not sound:
        versions = ", ".join(tool.version for tool in found.values()) or "none"
        return (
            f"ptxas 12.9 or later is needed for it, and Triton has {versions}: set TRITON_PTXAS_PATH to one"
        )
    if "ptxas" not in sound:
        tools.ptxas = found[sound[0]].path
    return None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host: `triton.cdiv` takes microseconds there, which add up in eager mode."""
    return -(-a // b)


class Choice:
    """A decision that an op makes for each call, between paths that give the same result.

    Tables of the op say which path is faster; `forced_path` overrules them. `forced` is the path that it has
    put in force, or None.
    """

    def __init__(self, op: str, paths: tuple[str, ...]) -> None:
        self.op, self.paths = op, paths
        self.forced: str | None = None

    def takes(self, path: str, default: bool) -> bool:
        """Whether a call takes `path`: as forced, or `default`, as the tables say, where no path is."""
        return default if self.forced is None else self.forced == path


_choices: dict[str, list[Choice]] = {}
_forcing = threading.RLock()


@functools.cache  # so that the copy of an op that a test makes has the same
def choice(op: str, *paths: str) -> Choice:
    """The `Choice` of the op between these paths: made by the first call, returned by later ones.

    The module of the op asks it, and `forced_path` overrules it.
    """
    _choices.setdefault(op, []).append(Choice(op, paths))
    return _choices[op][-1]


def paths(op: str) -> tuple[tuple[str, ...], ...]:
    """The names that `forced_path` takes for an op: for each of its decisions, the paths to choose from.

    Raises:
        ValueError: there is no op of that name, or it has one path only.
    """
    if op not in _choices:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(_choices)}")
    return tuple(decision.paths for decision in _choices[op])


@contextlib.contextmanager
def forced_path(op: str, *forced: str) -> Iterator[None]:
    """Context in which an op takes the paths given, whatever its tables say: for tests and benchmarks.

    A call that a path cannot serve goes another way nevertheless: the path may be for few columns only, or
    have no epilogue. Paths are forced in the whole process, since autograd runs backward passes in threads of
    its own; another thread that forces one of any op waits until this is over. It may be nested.

    Args:
        op: the name of the op, as in "gated_linear".
        forced: names out of `paths(op)`, at most one of each decision.

    Raises:
        ValueError: the op or a path is not known, or two paths exclude one another.
    """
    known = [name for names in paths(op) for name in names]
    for name in forced:
        if name not in known:
            raise ValueError(f"path of {op}: got {name!r}, expected one of {', '.join(known)}")
    overruled = {}
    for decision in _choices[op]:
        chosen = [name for name in forced if name in decision.paths]
        if len(chosen) > 1:
            raise ValueError(f"paths of {op}: got {' and '.join(chosen)}, which exclude one another")
        if chosen:
            overruled[decision] = chosen[0]
    with _forcing:
        before = {decision: decision.forced for decision in overruled}
        try:
            for decision, name in overruled.items():
                decision.forced = name
            yield
        finally:
            for decision, name in before.items():
                decision.forced = name


# Names of Triton's types, for signatures and for the ids of variants.
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

# The architectures that the kernels are compiled for and checked on: the backend and what it calls the chip.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100
    "sm_100": ("cuda", 100, 32),  # B200
    "sm_120": ("cuda", 120, 32),  # RTX 5090
    "gfx942": ("hip", "gfx942", 64),  # MI300
}


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of a kernel: what is constexpr in it besides dtypes and layout.

    Nothing in it may come from the batch size; one entry stands for a whole bucket of shapes.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **blocks: int) -> Config:
        """A Config as the tables of the ops write it: tile sizes are keywords, named as in the kernel."""
        return cls(blocks, num_warps, num_stages)

    def __str__(self) -> str:
        return "x".join(map(str, self.blocks.values()))


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: all that Triton's own cache is keyed on.

    `signature` has Triton's type of each run-time argument (`*bf16`, `i32`, `tensordesc<bf16[128, 64]>`),
    `constants` the value of each constexpr, `aligned` the pointer arguments known to be 16-byte aligned.
    `dot` says what its matrix products must run on: "tensor_core", "fma" (IEEE float32) or None.
    """

    op: str
    name: str
    kernel: Any = field(repr=False)
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    dot: str | None = None

    def key(self) -> tuple:
        """A hashable value that is equal for equal compilations only."""
        kernel = getattr(self.kernel, "__name__", str(self.kernel))
        return (
            kernel,
            tuple(sorted(self.signature.items())),
            tuple(sorted(self.constants.items())),
            tuple(sorted(self.aligned)),
            self.num_warps,
            self.num_stages,
        )


def operands(dtype: torch.dtype) -> str:
    """The kind of operands that matrix products of `dtype` have, a key of the tables of tiles.

    "16" for numbers of 16 bits; "tf32" for float32 on tensor cores; "ieee" for float32 without them, which is
    the default of PyTorch (`torch.get_float32_matmul_precision`).
    """
    if dtype.itemsize == 2:
        return "16"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot` for operands of `dtype`; it has no effect on 16-bit numbers."""
    return "ieee" if operands(dtype) == "ieee" else "tf32"


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Context in which `torch.get_float32_matmul_precision()` is `name`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_amd(device: torch.device) -> bool:
    """Whether `device` is AMD's, or within `recording` whether its target is."""
    if _recording is not None:
        return TARGETS[_recording.target][0] == "hip"
    return device.type == "cuda" and torch.version.hip is not None


def has_descriptors(device: torch.device) -> bool:
    """Whether the device loads tiles by descriptor in hardware (TMA: compute capability 9.0 and later)."""
    if is_amd(device):
        return False
    if _recording is not None:
        return TARGETS[_recording.target][1] >= 90
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    config: Config,
    kinds: tuple | None = None,
    **constants: Any,
):
    """Run `kernel` over `grid`, on the device of its tensors.

    Floating-point contraction is on, explicitly: its default changes in Triton 3.10.

    Args:
        kinds: what tells compilations of the kernel apart beside the configuration, where the caller knows
            that it is no more: all other dtypes and constants are always the same, pointers start at 16
            bytes, and integers have 32 bits.
    """
    if _recording is not None:
        _recording.add(kernel, arguments, config, constants)
        _recording.on_launch(kernel, grid, arguments, config, **constants)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        _run(kernel, grid, {**arguments, **constants, **config.blocks}, config, device, kinds)


# A kernel, so that nothing else has its id later, and what Triton compiled of it, by what tells that apart.
_compiled: dict[tuple, tuple[Any, Any]] = {}


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    config: Config,
    device: torch.device,
    kinds: tuple | None,
):
    """Launch what was compiled for such arguments before, if `kinds` says which; else Triton looks for it.

    To look at 30 arguments takes Triton several times as long as to launch. A compiled kernel takes all
    arguments of its function in their order, constants included. AMD's are left to Triton, which there also
    compiles for the size of what pointers point to; and so is its interpreter.
    """
    key = None
    if kinds is not None and torch.version.hip is None and isinstance(kernel, triton.JITFunction):
        options = config.num_warps, config.num_stages, *config.blocks.values()
        key = id(kernel), device.index, *options, *kinds
        if key in _compiled:
            _, compiled = _compiled[key]
            compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
            return
    compiled = kernel[grid](
        **arguments, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True
    )
    if key is not None:
        _compiled[key] = kernel, compiled


class Recording:
    """The variants that launches ask for on a target, each once, while `recording` has it in force."""

    def __init__(self, op: str, target: str, on_launch: Callable[..., None] = lambda *_, **__: None) -> None:
        self.op, self.target, self.on_launch = op, target, on_launch
        self.variants: dict[tuple, Variant] = {}

    def add(self, kernel: Any, arguments: Mapping[str, Any], config: Config, constants: dict) -> None:
        """Note the variant that a call of `launch` with these arguments asks for."""
        constants = {**constants, **config.blocks}
        signature, aligned = {}, set()
        for name, value in arguments.items():
            if value is None:  # Triton compiles a missing pointer as a constant
                constants[name] = None
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPE_NAMES[value.dtype]
                aligned.add(name)
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        dot = None
        if "PRECISION" in constants:
            dot = "fma" if constants["PRECISION"] == "ieee" else "tensor_core"
        variant = Variant(
            op=self.op,
            name=_variant_name(kernel, signature, constants, config),
            kernel=kernel,
            signature=signature,
            constants=constants,
            aligned=frozenset(aligned),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            dot=dot,
        )
        self.variants.setdefault(variant.key(), variant)


_recording: Recording | None = None


@contextlib.contextmanager
def recording(
    op: str, target: str, on_launch: Callable[..., None] = lambda *_, **__: None
) -> Iterator[dict[tuple, Variant]]:
    """Context in which launches run nothing and are noted, as they would be on `target`.

    Yields the variants asked for so far, by key. Each launch is also passed on to `on_launch`, with the
    arguments of `launch`. So the list of what can be compiled is made by the code that launches, on meta
    tensors, and cannot drift from it.
    """
    global _recording
    outer, _recording = _recording, Recording(op, target, on_launch)
    try:
        yield _recording.variants
    finally:
        _recording = outer


def _variant_name(kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], config: Config):
    """As in `gated_linear_fwd-bf16.fp32-64x128x64-aligned-descriptors`: distinct for distinct variants."""
    types = [re.sub(r"\*|tensordesc<|\[.*", "", t) for t in signature.values() if t not in ("i32", "fp32")]
    flags = [
        f"{name.lower()}" if value is True else f"{name.lower()}_{value}"
        for name, value in constants.items()
        if name not in config.blocks and value not in (False, None)
    ]
    parts = [kernel.__name__.strip("_").removesuffix("_kernel"), ".".join(types), str(config), *flags]
    return "-".join(parts)
