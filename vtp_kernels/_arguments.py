"""What the public functions of the ops ask of their tensors, and how autocast casts them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_kernels.library import autocast_is_on


def as_autocast_casts(x: Any, *others: Any) -> tuple[Any, ...]:
    """Cast the tensors among the arguments to autocast's dtype, if autocast is on for the device of `x`.

    Nothing is cast beside a float64 x. What is no tensor is returned as it is: None, or something that
    `check_tensors` will refuse.
    """
    if not isinstance(x, Tensor) or not autocast_is_on(x.device) or x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in (x, *others))


def check_tensors(
    required: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Check that the arguments of an op are tensors on one device, and that the first has a dtype ops take.

    Args:
        required: arguments by name, the first of which sets the device.
        optional: more of them, each of which may be None.

    Returns:
        By name, those that are not None.

    Raises:
        TypeError: one is not a tensor, or the first is not float32, bfloat16, float16 or float64.
        ValueError: one is on another device than the first.
    """
    tensors = {**required, **{name: t for name, t in (optional or {}).items() if t is not None}}
    first, x = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, expected {x.device}, where {first} is")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{first}: got {x.dtype}, expected float32, bfloat16, float16 or float64")
    return tensors


def check_dtypes(tensors: Mapping[str, Tensor], or_float32: Collection[str] = ()) -> None:
    """Check that all tensors have the dtype of the first, which is x.

    Those named in `or_float32` may also be float32, beside a 16-bit x.

    Raises:
        TypeError: one has another dtype.
    """
    x = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        allowed = {x.dtype, torch.float32} if name in or_float32 and x.element_size() == 2 else {x.dtype}
        if tensor.dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"{name}: got {tensor.dtype}, expected {expected} beside x of {x.dtype}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless the argument `name` has the shape `expected`."""
    if tensor.shape != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {list(map(int, expected))}")


def check_inputs(x: Tensor, weight: Tensor, name: str = "weight", axes: str = "[N, K]") -> None:
    """Check that x [..., K] can be multiplied by the matrix `weight` [N, K].

    Args:
        name, axes: what the weight and its shape are called in messages.

    Raises:
        ValueError: the weight is not a matrix, or x has not its number of inputs.
    """
    if weight.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {axes}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {K}], as {name} is [{N}, {K}]")


def check_written(name: str, tensor: Tensor, **read: Tensor) -> None:
    """Check that an op can write the argument `name`, without changing what it reads meanwhile.

    Raises:
        ValueError: elements of it share an address, or it shares memory with one of those that are read.
    """
    if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected no two elements at one address: it is written"
        )
    for other, found in read.items():
        if not torch.compiler.is_compiling() and torch._C._is_alias_of(tensor, found):
            raise ValueError(f"{name}: shares memory with {other}, expected its own: it is written")


def note_written(tensor: Tensor) -> None:
    """Let whoever saved a tensor for a backward pass notice that an op has written it."""
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)
