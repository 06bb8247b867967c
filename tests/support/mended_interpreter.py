"""Triton's interpreter, mended where it computes something else than a GPU or does not notice a defect.

Imported by the worker of `triton_harness` only: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from tests.support import launches
from tests.support.guarded_memory import poison
from tests.support.launches import AtomicError, RawBfloat16Error


def install() -> None:
    """Put the mended parts in place, once per process."""
    interpreter.interpreter_builder.__class__ = MendedBuilder
    # int32 arithmetic that overflows is an error in debug mode only, and addresses must be 64-bit.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    interpreter._get_np_dtype = _one_of_each_scalar(interpreter._get_np_dtype)
    tl.block_type.__init__ = _one_of_each_shape(tl.block_type.__init__)
    tl.tensor.__init__ = _one_of_each_type(tl.tensor.__init__)
    interpreter._patch_lang_tensor = _reading_scalars(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    GridExecutor.__call__ = _tracked_launch(GridExecutor.__call__)
    ReduceScanOpInterface.check_tensor = _refusing_bfloat16(
        "reduction or scan", ReduceScanOpInterface.check_tensor
    )


def decode_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Raw bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode_bfloat16(values: np.ndarray, to_nearest: bool = True) -> np.ndarray:
    """float32 to raw bfloat16, to nearest even or towards zero; NaN stays NaN."""
    bits = _without_low_bits(values, 16) if to_nearest else _raw_float32(values)
    return np.where(np.isnan(values), np.uint16(0x7FC0), (bits >> np.uint32(16)).astype(np.uint16))


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest number with 10 bits behind the point, half to even; NaN stays NaN."""
    return np.where(np.isnan(values), values, _without_low_bits(values, 13).view(np.float32))


def _raw_float32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)


def _without_low_bits(values: np.ndarray, count: int) -> np.ndarray:
    """Raw float32, rounded to nearest even and 0 in its last `count` bits."""
    bits, last = _raw_float32(values), np.uint32(count)
    half = np.uint32((1 << (count - 1)) - 1) + ((bits >> last) & np.uint32(1))
    return (bits + half) >> last << last


class MendedBuilder(InterpreterBuilder):
    """What Triton's language is interpreted by: values are NumPy arrays, of uint16 for bfloat16."""

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        # The product would be one of raw bits. Operands become float32, in which tensor cores accumulate;
        # float32 ones lose their last bits where tf32 is asked for, as it is by default.
        def operand(handle: TensorHandle) -> TensorHandle:
            if _is_bfloat16(handle):
                return TensorHandle(decode_bfloat16(handle.data), tl.float32)
            if handle.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
                return TensorHandle(round_to_tf32(handle.data), tl.float32)
            return handle

        return super().create_dot(operand(a), operand(b), acc, input_precision, max_num_imprecise_acc)

    def _cast(self, source, dtype, rounding_mode=None):
        # float32 would be truncated to bfloat16, and an integer keep its bits.
        if _is_bfloat16(source):
            source = TensorHandle(decode_bfloat16(source.data), tl.float32)
        if dtype.scalar != tl.bfloat16:
            return self.cast_impl(source, dtype)
        to_nearest = rounding_mode != ir.ROUNDING_MODE.RTZ
        return TensorHandle(encode_bfloat16(source.data.astype(np.float32), to_nearest), tl.bfloat16)

    create_fp_ext = create_fp_trunc = create_fp_to_si = create_fp_to_ui = create_si_to_fp = (
        create_ui_to_fp
    ) = _cast

    def create_fp_to_fp(self, source, dtype, rounding_mode):
        if _is_bfloat16(source) or dtype.scalar == tl.bfloat16:
            return self._cast(source, dtype, rounding_mode)
        return super().create_fp_to_fp(source, dtype, rounding_mode)

    def get_bf16(self, value):
        # There is none, and a constant would end in an AttributeError.
        return TensorHandle(encode_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)

    def create_masked_load(self, pointers, mask, other, *args, **kwargs):
        # Masked lanes without `other=` would be 0, where a GPU leaves anything.
        dtype = pointers.get_element_ty()
        np_dtype = interpreter._get_np_dtype(dtype)
        if other is None:
            bits = 0x7FC0 if dtype == tl.bfloat16 else poison(getattr(torch, np_dtype.name))
            other = TensorHandle(np.full(pointers.data.shape, bits, dtype=np_dtype), dtype)
        launches.current().access(pointers.data, mask.data, np_dtype.itemsize, is_write=False)
        return super().create_masked_load(pointers, mask, other, *args, **kwargs)

    def create_masked_store(self, pointers, value, mask, *args, **kwargs):
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        launches.current().access(pointers.data, mask.data, itemsize, is_write=True)
        return super().create_masked_store(pointers, value, mask, *args, **kwargs)

    def set_grid_dim(self, *dims):
        assert max(dims[1:]) < 2**16, (
            f"grid {dims}: a GPU takes at most 65535 along the second and third axis"
        )
        super().set_grid_dim(*dims)
        self.order = launches.permutation(math.prod(dims))

    def set_grid_idx(self, *index):
        # One after another and in order, programs would hide that one uses what another has written.
        program = int(self.order[np.ravel_multi_index(index, self.grid_dim)])
        launches.current().start(program)
        super().set_grid_idx(*map(int, np.unravel_index(program, self.grid_dim)))


def _is_bfloat16(value: Any) -> bool:
    value = value.handle if isinstance(value, tl.tensor) else value
    return isinstance(value, TensorHandle) and value.dtype.scalar.name == tl.bfloat16.name


def _refusing_bfloat16(name: str, function: Callable) -> Callable:
    """`function` would compute on raw bits."""

    def wrapper(self, *args, **kwargs):
        for arg in (*args, *kwargs.values()):
            if any(map(_is_bfloat16, arg)) if isinstance(arg, tuple) else _is_bfloat16(arg):
                raise RawBfloat16Error(f"{name} of bfloat16: cast to float32 first")
        return function(self, *args, **kwargs)

    return wrapper


def _refuse(self, *args, **kwargs):
    raise AtomicError("atomics are refused: a reduction is two-stage")


# What may be done to bfloat16 as it is: it is moved, not computed on.
_MOVES = re.findall(
    r"\w+",
    """bitcast broadcast cat descriptor_gather descriptor_load descriptor_scatter descriptor_store expand_dims
    gather join load make_tensor_descriptor print reshape select splat split store trans unsplat""",
)

for _name, _function in list(vars(InterpreterBuilder).items()):
    _operation = _name.removeprefix("create_")
    if _operation.startswith("atomic"):
        setattr(MendedBuilder, _name, _refuse)
    elif _operation != _name and _operation not in _MOVES and _name not in vars(MendedBuilder):
        setattr(MendedBuilder, _name, _refusing_bfloat16(_operation, _function))


def _refuse_overflow(lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable) -> None:
    """What Triton interprets a dozen operations for, a third of the time of a launch."""
    dtype, name = lhs.type.scalar, binary_op.__name__
    if dtype.int_bitwidth < 64:
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        exact = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        assert dtype.get_int_min_value() <= exact.min() and exact.max() <= dtype.get_int_max_value(), (
            f"int{dtype.int_bitwidth} overflow detected for operation {name}"
        )


def _one_of_each_scalar(np_dtype_of: Callable) -> Callable:
    """It would fill a table at each call, hundreds of times in a program."""
    known: dict[str, np.dtype] = {}

    def wrapper(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return wrapper


def _one_of_each_shape(init: Callable) -> Callable:
    """Triton makes several types for each operation, and changes none: those that are equal are copies."""
    known: dict[tuple, dict[str, Any]] = {}

    def wrapper(self, element_ty, shape):
        key = (element_ty.name, *shape)
        if key not in known:
            init(self, element_ty, shape)
            known[key] = vars(self).copy()
        else:
            vars(self).update(known[key])

    return wrapper


def _one_of_each_type(init: Callable) -> Callable:
    """What a value says of its type, which is all but its handle, is the same for all of a type."""
    known: dict[str, dict[str, Any]] = {}

    def wrapper(self, handle, type):
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = vars(self).copy()
        else:
            vars(self).update(known[type.name], handle=handle, type=type)

    return wrapper


def _reading_scalars(patch: Callable) -> Callable:
    """A scalar is an array of one element, which NumPy 2.5 does not take for an integer; Triton 3.6 does not
    unpack it."""

    def wrapper(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return wrapper


def _once_a_launch(patch: Callable) -> Callable:
    """Every call of a helper would patch the language again, which is a third of the time of a launch. What
    the launch has patched stays patched until it ends."""

    @functools.cache
    def languages(function: Callable) -> frozenset[str]:
        """Those that `patch` patches: triton.language, its core or both, by what `function` can see."""
        modules = [value for value in function.__globals__.values() if isinstance(value, types.ModuleType)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def wrapper(function):
        patched = launches.current().patched
        if languages(function) <= patched:
            return None  # it is the launch that restores what it has patched, not the call of a helper
        patched |= languages(function)
        return patch(function)

    return wrapper


def _tracked_launch(call: Callable) -> Callable:
    def wrapper(self, *args, **kwargs):
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        try:
            with launches.launch(arguments), np.errstate(all="ignore"):
                return call(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            # Each level of a nested call wraps what happened in one more InterpreterError.
            while isinstance(error, interpreter.InterpreterError) and error.__cause__:
                error = error.__cause__
            raise error from None

    return wrapper
