"""Tensors between protected pages: a stray access ends the process, one within the slack shows as NaN."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class CanaryError(AssertionError):
    """The kernel wrote to bytes that belong to no element."""


PAGE = mmap.PAGESIZE
# Longer regions keep their zeros: filling the gaps of a stride of gigabytes would make them real memory.
LONGEST_FILLED = 2**28
_MAP_NORESERVE = 0x4000  # `mmap` does not name it
_numbers = itertools.count()
_live = weakref.WeakValueDictionary()


def poison(dtype: torch.dtype) -> float | int | bool:
    """What stands where nothing was written: NaN, or an integer too large to be an index."""
    if dtype.is_floating_point:
        return math.nan
    return True if dtype == torch.bool else 0x5A5A5A5A5A5A5A5A >> (64 - 8 * dtype.itemsize)


def guarded(
    tensor: torch.Tensor,
    side: str = "end",
    *,
    offset_elements: int = 0,
    align: int | None = None,
    row_stride: int | None = None,
) -> torch.Tensor:
    """A copy of `tensor`, strides and all, next to a protected page.

    side: "end": the last element ends at the page; "begin": the first element starts after it. There is a
        protected page on the other side too, less than a page of slack away.
    offset_elements: moves the data away from the page by so many elements: a misaligned view.
    align: moves the data away from the page to a multiple of so many bytes. Without it a base at "end" is
        aligned to its element only.
    row_stride: elements from row to row (of the last axis); the other strides follow. Else `tensor`'s own.

    Slack, and the gaps between rows, are poisoned (NaN, or large integers): reading them shows in the result,
    writing them is found by `check_canaries`.
    """
    strides = tensor.stride()
    if row_stride is not None:
        outer = [row_stride * math.prod(tensor.shape[i:-1]) for i in range(1, tensor.dim())]
        strides = (*outer, 1)
    out = _guarded_empty(tensor.shape, strides, tensor.dtype, side, offset_elements, align)
    # A broadcast axis is one element of memory.
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    out[index].copy_(tensor.detach()[index])
    return out.requires_grad_(tensor.requires_grad)


def _guarded_empty(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    side: str,
    offset_elements: int = 0,
    align: int | None = None,
) -> torch.Tensor:
    size = dtype.itemsize
    extent = 0 if 0 in shape else size * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    slack = size * offset_elements
    length = -(-(extent + slack + (align or 0)) // PAGE) * PAGE
    begin = slack if side == "begin" else length - extent - slack
    begin = begin if align is None else (-(-begin // align) if side == "begin" else begin // align) * align
    memory = mmap.mmap(-1, length + 2 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + length):
        if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    # The tensor's storage keeps the mapping alive. `set_`, so that the result is no view to autograd.
    region = _nothing(dtype)
    if length:
        region = torch.frombuffer(memory, dtype=dtype, offset=PAGE, count=length // size)
    if length <= LONGEST_FILLED:
        region.fill_(poison(dtype))
    out = _nothing(dtype).set_(region.untyped_storage(), begin // size, shape, strides)
    _live[next(_numbers)] = out
    return out


_libc = ctypes.CDLL(None, use_errno=True)
_empty = torch.empty


def _nothing(dtype: torch.dtype) -> torch.Tensor:
    return _empty(0, dtype=dtype)


def check_canaries(*tensors: torch.Tensor) -> None:
    """Raise unless all bytes around and between the elements (of all guarded tensors) are still poison."""
    for tensor in tensors or tuple(_live.values()):
        storage = tensor.untyped_storage()
        if storage.nbytes() > LONGEST_FILLED:
            continue
        now = _nothing(tensor.dtype).set_(storage)
        expected = torch.full_like(now, poison(tensor.dtype))
        if tensor.numel():
            index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
            place = expected.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            place[index].copy_(tensor.detach()[index])
        changed = (now.view(torch.uint8) != expected.view(torch.uint8)).nonzero()
        if len(changed):
            first = changed[0].item() // tensor.itemsize - tensor.storage_offset()
            raise CanaryError(
                f"memory of no element was written, {first} from the base of a {tuple(tensor.shape)}"
            )


@contextlib.contextmanager
def guarded_outputs(side: str = "end", align: int | None = 16) -> Iterator[None]:
    """`torch.empty` and its relatives give guarded memory full of poison; canaries are checked on leaving.

    The attributes are replaced, rather than a TorchFunctionMode pushed: a mode is off inside a custom op's
    own Python code. `align` is 16 because real allocators promise at least that, and launchers rely on it.
    """
    made = []

    def guard(function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            plain = function(*args, **kwargs)
            if not plain.numel() or plain.device.type != "cpu" or plain.layout != torch.strided:
                return plain
            out = _guarded_empty(plain.shape, plain.stride(), plain.dtype, side, align=align)
            made.append(out)
            return out.requires_grad_(plain.requires_grad)

        return wrapper

    owners = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    owners += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with replaced([(owner, name, guard(getattr(owner, name))) for owner, name in owners]):
        yield
    if made:
        check_canaries(*made)


@contextlib.contextmanager
def replaced(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
