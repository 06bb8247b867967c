import functools
import gc
import importlib
import itertools
import re
import time

import numpy as np
import pytest
import torch

from tests.support.kernel_proofs import crash_of
from tests.support.numerics import assert_close_to_float64
from tests.support.triton_harness import (
    AtomicError,
    CanaryError,
    KernelCrash,
    KernelTimeout,
    RaceError,
    RawBfloat16Error,
    check_canaries,
    guarded,
    guarded_outputs,
    mutated,
    programs,
)

toy_kernels = pytest.importorskip("tests.support.toy_kernels")  # without Triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = [1, 15, 16, 17, 37, 61, 115, 197, 461]
SIDES = ["begin", "end"]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- Correct kernels pass everything ------------------------------------------------------------------------


def check_copy(toys, dtype, N, side, M=17, **placement):
    x = draw(M, N, dtype=dtype)
    assert torch.equal(toys.copy(guarded(x, side, **placement)), x)


def check_scale_dot(toys, dtype, K, side, **options):
    M, N = 17, 37
    x, g, w = draw(M, K, dtype=dtype), draw(K, dtype=dtype, seed=1), draw(N, K, dtype=dtype, seed=2)
    y = toys.scale_dot(*(guarded(t, side) for t in (x, g, w)), **options)
    assert_close_to_float64(y, (x.double() * g.double()) @ w.double().T, (x * g) @ w.T, "y")


def check_column_sums(toys, dtype, N, side):
    x = draw(61, N, dtype=dtype)
    y = toys.column_sums(guarded(x, side))
    assert_close_to_float64(y, x.double().sum(0), x.sum(0), "y")


def check_toys(dtype, width, side):
    with guarded_outputs(side):
        check_copy(toy_kernels, dtype, width, side)
        check_copy(toy_kernels, dtype, width, side, offset_elements=1)
        check_copy(toy_kernels, dtype, width, side, row_stride=width + 3)
        check_scale_dot(toy_kernels, dtype, width, side)
        check_column_sums(toy_kernels, dtype, width, side)
    check_canaries()


@pytest.mark.covering(1)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda width: f"N{width}")
def test_correct_kernels_pass(interpreter, width, dtype, side):
    interpreter.run(check_toys, DTYPES[dtype], width, side)


def check_order(order):
    with programs(order=order):
        check_copy(toy_kernels, torch.float32, 115, "end")
        check_column_sums(toy_kernels, torch.float32, 115, "end")


@pytest.mark.parametrize("order", ["natural", "reversed", 1, 2])
def test_correct_kernels_do_not_depend_on_the_order_of_programs(interpreter, order):
    interpreter.run(check_order, order)


def check_scale_dot_at(dtype, K):
    check_scale_dot(toy_kernels, dtype, K, "end")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_is_a_dot_of_the_numbers_not_of_their_bits(interpreter, dtype):
    interpreter.run(check_scale_dot_at, DTYPES[dtype], 384)


def check_moves_of_bfloat16():
    moved = "tl.where(m_load, tl.reshape(tl.trans(tl.trans(b_x)), (BLOCK_M, BLOCK_N)), 0.0)"
    toys = mutated("tests.support.toy_kernels", [("b_x, mask=m_store", f"{moved}, mask=m_store")])
    check_copy(toys, torch.bfloat16, 61, "end")


def test_bfloat16_may_be_moved_without_a_cast(interpreter):
    interpreter.run(check_moves_of_bfloat16)


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

LOAD_MASK = "m_load = (o_m < M) & (o_n < N)"
STORE_MASK = "m_store = (o_m < M) & (o_n < N)"
STORE_SUM = "tl.store(p_y, tl.sum(b_x, axis=0).to(y_ptr.dtype.element_ty), mask=o_n < N)"
# What is wrong with a kernel: name, text that is replaced, and which check with which arguments must find it.
CRASHES = {
    "read past the end": ("end", LOAD_MASK, "m_load = o_m < M"),
    "read before the beginning": ("begin", "o_m * stride_xm + o_n,", "o_m * stride_xm + o_n - 1,"),
    "write past the end": ("end", STORE_MASK, "m_store = o_m < M"),
    "write before the beginning": ("begin", "o_m * stride_ym + o_n,", "o_m * stride_ym + o_n - 1,"),
    "no mask on load": ("end", ", mask=m_load, other=0.0", ""),
    "no mask on store": ("end", ", mask=m_store", ""),
}


def plant_and_copy(old, new, side, align=None):
    with guarded_outputs(side, align=align):
        check_copy(mutated("tests.support.toy_kernels", [(old, new)]), torch.float32, 29, side, M=5)


def crash_of_planted(*defect):
    return crash_of(functools.partial(plant_and_copy, *defect))


@pytest.mark.parametrize("defect", CRASHES, ids=lambda defect: defect.replace(" ", "_"))
def test_guard_page_catches(interpreter, defect):
    side, old, new = CRASHES[defect]
    where = {"end": "past the end", "begin": "before the beginning"}[side]
    argument = "x_ptr" if "read" in defect or "load" in defect else "y_ptr"
    report = interpreter.run(crash_of_planted, old, new, side)
    assert re.match(rf"SIGSEGV(.|\n)*{where} of the memory of `{argument}`(.|\n)*_copy_kernel", report)


def test_canary_catches_write_past_the_end_of_an_aligned_output(interpreter):
    _, old, new = CRASHES["write past the end"]
    with pytest.raises(CanaryError):
        # 5 rows of 29 float32 end 12 bytes before a multiple of 16: as many as are written.
        interpreter.run(plant_and_copy, old, new, "end", align=16)


# Name: the exception and what it says; the check, its dtype and width; the text that is replaced.
DEFECTS = {
    "poison catches a load without other": (
        (AssertionError, "elements are NaN"),
        (check_column_sums, "fp32", 115),
        ("mask=mask, other=0.0", "mask=mask"),
    ),
    "poison catches an element never written": (
        (AssertionError, "elements are NaN"),
        (check_column_sums, "fp32", 115),
        (STORE_SUM, STORE_SUM.replace("< N", "< N - 1")),
    ),
    "bfloat16 check catches a product without a cast": (
        (RawBfloat16Error, "mul"),
        (check_scale_dot, "bf16", 115),
        ("b_w.to(tl.float32) * b_g.to(tl.float32)[None, :]", "b_w * b_g[None, :]"),
    ),
    "bfloat16 check catches a comparison without a cast": (
        (RawBfloat16Error, "fcmp"),
        (check_scale_dot, "bf16", 115),
        ("b_w = (", "b_w = tl.where(b_w > b_w, b_w, b_w)\n        b_w = ("),
    ),
    "bfloat16 check catches a reduction without a cast": (
        (RawBfloat16Error, "reduction"),
        (check_column_sums, "bf16", 115),
        (".to(tl.float32)\n    p_y", "\n    p_y"),
    ),
    "race detector catches two programs that write one element": (
        (RaceError, "writes .* wrote"),
        (check_copy, "fp32", 115),
        (
            "tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None",
            "tl.program_id(1) * 29 + tl.arange(0, 32)[None",
        ),
    ),
    "race detector catches accumulation across programs": (
        (RaceError, "reads .* wrote"),
        (check_column_sums, "fp32", 115),
        (
            "i_m * N + o_n\n    tl.store(p_y, ",
            "o_n\n    tl.store(p_y, tl.load(p_y, mask=o_n < N, other=0.0) + ",
        ),
    ),
    "atomics are refused": (
        (AtomicError, "two-stage"),
        (check_column_sums, "fp32", 115),
        ("tl.store(p_y, tl.sum(b_x, axis=0)", "tl.atomic_add(p_y, tl.sum(b_x, axis=0)"),
    ),
    "error rule catches accumulation in bfloat16": (
        (AssertionError, "times PyTorch's"),
        (check_scale_dot, "bf16", 1021),
        ("input_precision=PRECISION)", "input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)"),
    ),
    "error rule catches tf32 in a float32 product": (
        (AssertionError, "times PyTorch's"),
        (check_scale_dot, "fp32", 115),
        ("input_precision=PRECISION", 'input_precision="tf32"'),
    ),
    "error rule catches a last block that is dropped": (
        (AssertionError, "times PyTorch's"),
        (check_scale_dot, "fp32", 115),
        ("range(0, K, BLOCK)", "range(0, K - BLOCK, BLOCK)"),
    ),
}


def plant_and_check(check, dtype, width, old, new):
    with guarded_outputs("end"):
        check(mutated("tests.support.toy_kernels", [(old, new)]), dtype, width, "end")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.replace(" ", "_"))
def test_planted_defect(interpreter, defect):
    (error, says), (check, dtype, width), (old, new) = DEFECTS[defect]
    with pytest.raises(error, match=says) as caught:
        interpreter.run(plant_and_check, check, DTYPES[dtype], width, old, new)
    assert type(caught.value) is error


def shift_rows_in_place(order, races):
    """Each block of rows is copied to the next one: right only if the next was copied before."""
    x = draw(80, 61)
    expected = x[:-16].clone()
    with programs(order=order, races=races):
        toy_kernels.copy(x[:-16], x[16:])
    return torch.equal(x[16:], expected)


def test_race_detector_catches_a_read_of_what_another_program_wrote(interpreter):
    for order in ("natural", "reversed", 0):
        with pytest.raises(RaceError, match="`x_ptr`"):
            interpreter.run(shift_rows_in_place, order, races=True)


def test_shuffled_order_catches_a_read_of_what_another_program_wrote(interpreter):
    results = {
        order: interpreter.run(shift_rows_in_place, order, races=False) for order in ("reversed", 0, 1)
    }
    assert results == {"reversed": True, 0: False, 1: False}


def copy_with_long_stride(replacements):
    x = guarded(torch.ones(17, 5, dtype=torch.int8), row_stride=2**27)
    with programs(races=False):
        return mutated("tests.support.toy_kernels", replacements).copy(x).sum().item()


def test_overflow_check_catches_32_bit_addresses(interpreter):
    assert interpreter.run(copy_with_long_stride, []) == 17 * 5
    with pytest.raises(AssertionError, match="int32 overflow"):
        interpreter.run(copy_with_long_stride, [("BLOCK_M)).to(tl.int64)[:", "BLOCK_M))[:")])


def compare_overflow_checks():
    """The check that stands for Triton's says what Triton's does: how often they refuse something."""
    from triton.language import core as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    def complaint(check, *arguments):
        try:
            check(*arguments)
        except AssertionError as error:
            return str(error)

    mended = interpreter_semantic.binary_op_sanitize_overflow_impl
    of_triton = functools.partial(
        type(interpreter_semantic).binary_op_sanitize_overflow_impl, interpreter_semantic
    )
    refused = 0
    for name in ("int8", "int16", "int32", "uint32", "int64"):
        dtype = getattr(tl, name)
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        for pair in itertools.product((low, low + 1, 0, 1, 2, high // 2, high - 1, high), repeat=2):
            operands = [TensorHandle(np.array([0, value], name), dtype) for value in pair]
            operands = [tl.tensor(operand, tl.block_type(dtype, [2])) for operand in operands]
            for operation in (interpreter_semantic.add, interpreter_semantic.sub, interpreter_semantic.mul):
                expected = complaint(of_triton, *operands, operation)
                assert complaint(mended, *operands, operation) == expected, (name, operation, pair)
                refused += expected is not None
    return refused


def test_overflow_check_refuses_what_that_of_triton_does(interpreter):
    assert interpreter.run(compare_overflow_checks) > 100


# -- Descriptors from the host ------------------------------------------------------------------------------


def check_descriptors(M, N, dtype, side, replacements=()):
    pitch = -(-N // 8) * 8
    x = draw(M, N, dtype=dtype)
    y = guarded(torch.full_like(x, torch.nan), side, row_stride=pitch, align=16)
    toys = mutated("tests.support.toy_kernels", replacements)
    assert torch.equal(toys.descriptor_copy(guarded(x, side, row_stride=pitch, align=16), y), x)
    check_canaries()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 37, 64, 115], ids=lambda N: f"N{N}")
def test_descriptors_pass(interpreter, N, dtype, side):
    interpreter.run(check_descriptors, 37, N, DTYPES[dtype], side)


def test_guard_page_catches_a_descriptor_that_is_too_tall(interpreter):
    too_tall = "TensorDescriptor(t, [M + 1, N], t.stride(), [16, 32])"
    with pytest.raises(KernelCrash, match="`x_desc`"):
        plant = [("TensorDescriptor.from_tensor(t, [16, 32])", too_tall)]
        interpreter.run(check_descriptors, 37, 64, torch.bfloat16, "end", plant)


def test_race_detector_sees_through_descriptors(interpreter):
    with pytest.raises(RaceError, match="`y_desc`"):
        plant = [("tl.program_id(1) * BLOCK_N\n", "tl.program_id(1) * 24\n")]
        interpreter.run(check_descriptors, 37, 56, torch.bfloat16, "end", plant)


# -- Casts --------------------------------------------------------------------------------------------------


def cast_all(bits):
    values = torch.from_numpy(bits).view(torch.float32)
    half = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    sources = {"fp32": values, "bf16": half.view(torch.bfloat16), "fp16": half.view(torch.float16)}
    integers = torch.tensor([0, 1, -1, 257, -257, 2**24 + 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for (name, source), dtype in itertools.product(sources.items(), DTYPES.values()):
        got, expected = toy_kernels.cast(source, dtype), source.to(dtype)
        same = (got == expected) | (got.isnan() & expected.isnan())
        assert same.all(), (
            f"{name} to {dtype}: {source[~same][:5]} gives {got[~same][:5]}, not {expected[~same][:5]}"
        )
    assert torch.equal(toy_kernels.cast(integers, torch.bfloat16), integers.to(torch.bfloat16))
    small = draw(100, dtype=torch.bfloat16) * 100
    assert torch.equal(toy_kernels.cast(small, torch.int32), small.to(torch.int32))


def test_casts_round_to_nearest_even_for_every_exponent_infinity_and_nan(interpreter):
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    interpreter.run(cast_all, (high | low).ravel()[::3].view(np.int32))


# -- The worker ---------------------------------------------------------------------------------------------


def add(a, b=1):
    return a + b


def test_worker_returns_results_and_raises_what_a_function_raised(interpreter):
    assert torch.equal(interpreter.run(add, torch.ones(3), b=2), torch.full((3,), 3.0))
    with pytest.raises(AssertionError, match="TypeError"):
        interpreter.run(add, 1, "2")
    assert interpreter.run(add, 1) == 2


@pytest.mark.thorough  # a start of the worker takes seconds; one that crashes is replaced in the same way
def test_worker_that_does_not_answer_is_ended_and_replaced(interpreter):
    interpreter.run(add, 1)
    with pytest.raises(KernelTimeout):
        interpreter.run(time.sleep, 60, timeout=0.2)
    assert interpreter.run(add, 1) == 2


# -- Mutated copies -----------------------------------------------------------------------------------------


def test_mutated_refuses_text_that_does_not_occur_as_often_as_expected():
    with pytest.raises(AssertionError, match="occurs 0 times"):
        mutated("tests.support.toy_kernels", [("no such text", "")])
    with pytest.raises(AssertionError, match="occurs 2 times, expected 1"):
        mutated("tests.support.toy_kernels", [("(o_m < M) & (o_n < N)", "")])
    assert (
        mutated("tests.support.toy_kernels", [("(o_m < M) & (o_n < N)", "o_m < M", 2)]).copy
        is not toy_kernels.copy
    )


def test_a_defect_in_a_helper_is_in_the_copy_alone():
    module, helper = (importlib.import_module(f"vtp_kernels.{name}") for name in ("gated_linear", "_tiles"))
    defect = ("first + within % height", "within % height")
    copy = mutated(module.__name__, [defect], helpers=[helper.__name__])
    assert copy.grouped_tile is not helper.grouped_tile and module.grouped_tile is helper.grouped_tile
    assert importlib.import_module(helper.__name__) is helper
    assert copy.launching is module.launching
    with pytest.raises(AssertionError, match="expected 1 in one of"):
        mutated(module.__name__, [("from __future__", "from __future__")], helpers=[helper.__name__])


def test_a_defect_in_a_helper_of_a_helper_is_in_the_copy_too():
    names = ("ragged_attention", "_tiles", "ragged_attention_kernels")
    module, *helpers = (importlib.import_module(f"vtp_kernels.{name}") for name in names)
    defect = ("load_tile(\n    source,", "load_tile(\n    source, ")
    copy = mutated(module.__name__, [defect], helpers=[helper.__name__ for helper in helpers])
    kernel, original = copy._ragged_attention_fwd_kernel, module._ragged_attention_fwd_kernel
    assert kernel.fn.__globals__["load_tile"] is not original.fn.__globals__["load_tile"]
    assert original.fn.__globals__["load_tile"] is helpers[0].load_tile
    assert [importlib.import_module(helper.__name__) for helper in helpers] == helpers


OP_MODULE = """
import torch
import torch.utils.flop_counter
toys = torch.library.Library("harness_toy", "DEF")
toys.define("double(Tensor x) -> Tensor")

@torch.library.impl(toys, "double", "CPU")
def double(x):
    return x * 2

@torch.library.register_fake("harness_toy::double")
def _(x):
    return torch.empty_like(x)

@torch.library.custom_op("harness_toy::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).copy_(x * 3)

@triple.register_fake
def _(x):
    return torch.empty_like(x)

triple.register_autograd(lambda ctx, g: g * 3)

@torch.utils.flop_counter.register_flop_formula(torch.ops.harness_toy.triple)
def triple_flops(shape, out_shape=None):
    return 3
"""


def test_mutated_copy_of_an_op_module_registers_nothing(tmp_path, monkeypatch):
    (tmp_path / "harness_toy_ops.py").write_text(OP_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    copy = mutated("harness_toy_ops", [("x * 2", "x * 5"), ("x * 3)", "x * 7)")])
    x = torch.ones(2)
    assert copy.double(x).tolist() == [5, 5] and copy.triple(x).tolist() == [7, 7]
    assert torch.ops.harness_toy.double(x).tolist() == [2, 2]
    with guarded_outputs():
        assert (
            torch.ops.harness_toy.triple(x).untyped_storage().nbytes() == 4096
        )  # guarded inside a custom op


def check_mutated_op():
    from vtp_kernels import library

    before = dict(library.TRITON_SIDES)
    mutated("vtp_kernels.compact_linear", [])
    assert before and before == library.TRITON_SIDES


def test_what_an_op_runs_on_a_gpu_is_not_that_of_a_copy(interpreter):
    interpreter.run(check_mutated_op)


# -- Guarded memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int32, torch.int64], ids=str)
def test_guarded_keeps_values_shape_and_strides(dtype, side):
    base = torch.arange(7 * 61).reshape(7, 61).to(dtype)
    views = [base, base.T, base[1::2, 3:40], base[:, None, :1].expand(7, 5, 1), base[0, 0], base[:0]]
    for view in views:
        out = guarded(view, side)
        assert torch.equal(out, view) and out.stride() == view.stride() and out.dtype == dtype
    out = guarded(base, side)
    assert (out.data_ptr() + (out.numel() * out.itemsize if side == "end" else 0)) % 4096 == 0
    check_canaries()


def test_guarded_places_data_where_asked():
    x = draw(5, 29)
    assert guarded(x, "end", align=16).data_ptr() % 16 == 0
    assert guarded(x, "begin", offset_elements=1).data_ptr() % 4096 == 4
    assert guarded(x, "end", offset_elements=3).storage_offset() + x.numel() + 3 == 1024
    strided = guarded(x, "end", row_stride=32)
    assert strided.stride() == (32, 1) and torch.equal(strided, x)
    assert strided.storage_offset() + 4 * 32 + 29 == 1024
    assert strided.as_strided((4, 3), (32, 1), strided.storage_offset() + 29).isnan().all()
    assert guarded(x.requires_grad_()).is_leaf and guarded(x).requires_grad


def test_canary_catches_a_write_between_rows():
    strided = guarded(draw(5, 29), row_stride=32)
    strided.as_strided((1,), (1,), strided.storage_offset() + 30).zero_()
    with pytest.raises(CanaryError):
        check_canaries(strided)


def test_guarded_memory_lives_as_long_as_its_tensor():
    x = guarded(torch.ones(1000))[10:]
    for _ in range(100):
        guarded(torch.zeros(1000))
    gc.collect()
    assert x.sum() == 990


@pytest.mark.parametrize("side", SIDES)
def test_outputs_are_guarded_and_poisoned(side):
    like = torch.zeros(3, 5, dtype=torch.bfloat16).T
    with guarded_outputs(side):
        outs = [
            torch.empty(3, 5),
            torch.empty_like(like),
            like.new_empty(4),
            torch.empty(3, dtype=torch.float16),
        ]
        index = torch.empty(3, dtype=torch.int64)
        zeros = torch.zeros(7)
    assert all(out.isnan().all() and out.untyped_storage().nbytes() == 4096 for out in outs)
    assert outs[1].stride() == like.stride() and outs[1].dtype == like.dtype
    assert (index > 2**32).all() and zeros.sum() == 0 and torch.empty(3, 5).untyped_storage().nbytes() == 60


# -- The error rule -----------------------------------------------------------------------------------------


def a_product(dtype, rows=64):
    x, w = draw(rows, 61).to(dtype), draw(115, 61, seed=1).to(dtype)
    return x.double() @ w.double().T, x @ w.T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 64])
def test_error_rule_accepts_a_correctly_rounded_result(dtype, rows):
    reference, torchs = a_product(DTYPES[dtype], rows)
    assert_close_to_float64(reference.to(torchs.dtype), reference, torchs)
    assert_close_to_float64(torchs, reference, torchs)


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 1e-2), ("fp16", 2e-3), ("fp32", 1e-5)])
@pytest.mark.parametrize("rows", [1, 64])
def test_error_rule_refuses_a_small_relative_error(dtype, error, rows):
    reference, torchs = a_product(DTYPES[dtype], rows)
    for factor in (1 + error, 1 - error):
        with pytest.raises(AssertionError, match="PyTorch's"):
            assert_close_to_float64((reference * factor).to(torchs.dtype), reference, torchs)


def test_error_rule_refuses_a_single_wrong_element_and_an_error_in_rows_of_small_scale():
    reference, torchs = a_product(torch.float32)
    one = torchs.clone()
    one[3, 5] += 1e-3
    with pytest.raises(AssertionError, match=r"worst at \[3, 5\]"):
        assert_close_to_float64(one, reference, torchs)
    scale = torch.logspace(0, -8, 64)[:, None]
    small_rows = torchs * scale
    small_rows[32:] *= 1 + 1e-3
    with pytest.raises(AssertionError, match="further from float64"):
        assert_close_to_float64(small_rows, reference * scale.double(), torchs * scale)


def test_error_rule_refuses_misplaced_nan_and_infinity_and_wrong_shape_or_dtype():
    reference, torchs = a_product(torch.float16)
    for value in (torch.nan, torch.inf):
        bad = torchs.clone()
        bad[0, 0] = value
        with pytest.raises(AssertionError, match="NaN or infinite"):
            assert_close_to_float64(bad, reference, torchs)
    # An overflow of the dtype is what the reference has as well.
    large = reference * 1e6
    assert_close_to_float64(large.half(), large, large.half())
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_float64(torchs[:1], reference, torchs)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_float64(torchs.float(), reference, torchs)
