"""The torch.library namespace `vtp`, and how an op gets into it.

Each op has a plain PyTorch implementation for every device and, where Triton runs, one of its own for CUDA
(ROCm's PyTorch uses the same dispatch key).
"""

from __future__ import annotations

import functools
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from vtp_kernels import launching

LIBRARY = torch.library.Library("vtp", "DEF")


def _load_cpp(folder: Path = Path(__file__).parent) -> str | None:
    """Load the C++ operators of a folder. Why they are not there, None if they are."""
    files = sorted(folder.glob("_cpu*.so"))
    if not files:
        return "the C++ extension is not built"
    try:
        if (reason := _truncated(files[0])) is not None:
            return f"{reason}: build it again"
        torch.ops.load_library(files[0])
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    torch.library.register_fake("vtp::cpu_vit", _cpu_vit_fake, lib=LIBRARY)
    torch.library.register_fake("vtp::cpu_blocks", lambda tokens, *_: torch.empty_like(tokens), lib=LIBRARY)
    return None


def _truncated(library: Path) -> str | None:
    """Why a library's file is not whole, None if it is as long as its header has it, or has none to say so.

    The system maps pages that such a file lacks, and ends the process at the first touch of one.
    """
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):  # of 64 bits, little-endian
        return None
    # The table of sections, which linkers write last: where it starts, the bytes of an entry, how many.
    (start,), (entry, entries) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<2H", header, 58)
    size, expected = library.stat().st_size, start + entry * entries
    if size >= expected:
        return None
    return f"{library.parent.name}/{library.name} is truncated ({size:,} bytes of {expected:,})"


def _cpu_vit_fake(images: torch.Tensor, weights, layout, outputs: int) -> torch.Tensor:
    return images.new_empty(images.shape[0], outputs)


_NO_CPP_REASON = _load_cpp()  # at once: a program that torch.export made may need them


def cpp_supports(*tensors: torch.Tensor) -> bool:
    """Whether the C++ operators are loaded and take these tensors.

    They take contiguous tensors on the CPU, all of float32 except the first, which may also be bfloat16.
    """
    first, *others = tensors
    return (
        _NO_CPP_REASON is None
        and first.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == torch.float32 for t in others)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    )


@functools.cache
def cpp_unsupported_reason() -> str | None:
    """Why the C++ operators cannot run here, or None if they can. The first call also warns of the reason.

    Raises:
        RuntimeError: the environment variable VTP_CPU_ISA names no instruction set of this machine.
    """
    if _NO_CPP_REASON is None:
        torch.ops.vtp.cpu_choice(False)  # of float32: no trial
    else:
        warnings.warn(
            f"vtp_kernels: {_NO_CPP_REASON}; vtp.optimize runs on plain PyTorch operators on a CPU. Results "
            "are the same; compact models are slower. With a C++ compiler `pip install .` builds it, in a "
            "checkout also `python setup.py build_ext --inplace`.",
            stacklevel=2,
        )
    return _NO_CPP_REASON


# What each op runs on a GPU with Triton, by its name.
TRITON_SIDES: dict[str, Callable] = {}
# What the dispatcher would call for each op, by its name and then the type of a device.
_DIRECT: dict[str, dict[str, Callable]] = {}


def define(schema: str, *, plain: Callable, triton: Callable, fake: Callable) -> None:
    """Register an op of the namespace `vtp`.

    Both implementations run outside autocast: the public function has chosen the dtypes already.

    Args:
        schema: as `torch.library` takes it, without the namespace.
        plain: the implementation for any device.
        triton: the one for a GPU on which Triton runs.
        fake: shapes, dtypes and strides of the results alone.
    """
    short = schema.partition("(")[0]
    name, TRITON_SIDES[short] = f"vtp::{short}", triton
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    direct = {"cpu": without_autocast(plain), "cuda": without_autocast(_on_gpu(plain, triton))}
    torch.library.impl(name, "CompositeExplicitAutograd", direct["cpu"], lib=LIBRARY)
    torch.library.impl(name, "CUDA", direct["cuda"], lib=LIBRARY)
    _DIRECT[short] = direct
    torch.library.register_fake(name, fake, lib=LIBRARY)


def define_gradient(
    op: str, *, by: str, backward: Callable, setup_context: Callable, public_name: str | None = None
) -> None:
    """Register the gradient of an op of the namespace `vtp`, which can be differentiated once.

    Args:
        op: name of the op.
        by: name of the op that computes the gradient, and refuses to be differentiated itself.
        backward, setup_context: as `torch.library.register_autograd` takes them.
        public_name: the function whose gradient this is, for messages; `op` unless it is given.
    """
    name = public_name or op

    def refuse(*_: object) -> NoReturn:
        refuse_second_derivative(name)

    torch.library.register_autograd(f"vtp::{op}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"vtp::{by}", refuse, lib=LIBRARY)


def takes_direct_calls(x: torch.Tensor) -> bool:
    """Whether `direct` may be called for x: eagerly, on a CPU or GPU, with nobody watching the dispatcher."""
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and not _len_torch_dispatch_stack())


def direct(op: str, x: torch.Tensor) -> Callable:
    """What the dispatcher would call for an op on the device of x. That enters Python twice in each pass of
    an op that has a gradient, which costs a small layer more than its gate does."""
    return _DIRECT[op][x.device.type]


def refuse_second_derivative(op: str) -> NoReturn:
    """Raise NotImplementedError: `op` has no second derivative."""
    raise NotImplementedError(f"{op} has no second derivative")


class TritonSides(TorchDispatchMode):
    """Context in which ops run what they would run on a GPU with Triton, on tensors of any device.

    It serves to note launches on meta tensors (`launching.recording`), or to interpret them on the CPU.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "vtp":
            return func(*args, **(kwargs or {}))
        with self:  # which is off within its own method
            return TRITON_SIDES[func.overloadpacket.__name__](*args)


def empty_for_none(like: torch.Tensor, *gradients: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The gradients, with an empty tensor on the device of `like` for each None: what an op can return."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled for `device`; False for meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # which refuses "meta"


def without_autocast(function: Callable) -> Callable:
    """`function`, made to run with autocast off on the device of its first argument.

    Where it is off already that costs nothing.
    """

    @functools.wraps(function)
    def wrapped(x, *args):
        if not autocast_is_on(x.device):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return wrapped


def _on_gpu(plain: Callable, triton: Callable) -> Callable:
    @functools.wraps(triton)
    def chosen(x, *args):
        reason = triton_unsupported_reason(x.device)
        if reason is None:
            return triton(x, *args)
        _warn_once(reason)
        return plain(x, *args)

    return chosen


@functools.cache
def triton_unsupported_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on the CUDA device `device`, or None if they can."""
    if not launching.HAS_TRITON:
        return "Triton is not installed"
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    if capability is not None and capability < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if capability == (9, 0) and (reason := launching.unsound_assembler()) is not None:
        return f"{torch.cuda.get_device_name(device)}: {reason}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"vtp_kernels: {reason}; its ops run on plain PyTorch operators on this GPU. Results are the same;"
        " gates and compact models are slower than with the fused kernels.",
        stacklevel=2,
    )
