"""A device beside the CPU on any machine, as strict as a GPU: its numbers are kept in the memory of the CPU.

An operation on tensors of both devices raises, as on a GPU. It has no kernels of its own: those of the CPU
compute, so that results are the CPU's where the code takes the same way. PyTorch has one such device in a
process and then takes it for an accelerator, so run what uses it in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretended"
aten = torch.ops.aten


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Context in which there is another device, which it gives. Tensors of it are of no use behind it."""
    # Part of what PyTorch's own tests of such devices use; the name is given once in a process.
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters change their class
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks the mode below
    try:
        with _Mode():
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


class _Elsewhere(Tensor):
    """A tensor of the other device; `numbers` is the one of the CPU behind it."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "_Elsewhere":
        shape = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, **shape, device=torch.device(NAME, 0))
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"{self.numbers} on {self.device}"

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor of {self.device} is no NumPy array; copy it to the CPU first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
_INDEX_FROM_THE_CPU = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _Elsewhere)]
    # Of the CPU a GPU takes numbers, and indices.
    here = [tensor for tensor in tensors if not isinstance(tensor, _Elsewhere) and tensor.ndim > 0]
    if there and here and func not in _BETWEEN_DEVICES | _INDEX_FROM_THE_CPU:
        shapes = [[tuple(tensor.shape) for tensor in some] for some in (there, here)]
        raise RuntimeError(f"{func}: {shapes[0]} on {NAME}:0, {shapes[1]} on cpu: expected one device")
    to = kwargs.get("device")
    on_other = bool(there) if to is None else torch.device(to).type == NAME
    if to is not None and on_other:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    given = {id(_numbers(tensor)): tensor for tensor in tensors}  # operations in place return what they got

    def found(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in given:
            return given[id(leaf)]
        return _Elsewhere(leaf) if on_other else leaf

    return tree_map(found, result)


def _numbers(leaf: Any) -> Any:
    return leaf.numbers if isinstance(leaf, _Elsewhere) else leaf
