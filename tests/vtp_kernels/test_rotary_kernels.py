"""What the kernels of rotate_heads compute, proved in the interpreter.

The kernels run, through their launchers and through whole passes, next to protected pages, with poisoned
outputs and NaN in the padding of every input, and are compared with float64.
"""

import contextlib
import importlib
from dataclasses import dataclass

import pytest
import torch

from tests.support.guarded_memory import guarded
from tests.support.kernel_proofs import (
    assert_compiled_ahead_of_time,
    assert_like,
    assert_padding_is_zero,
    loaded,
    place,
    run_check,
)
from tests.support.numerics import assert_close_to_float64
from tests.vtp_kernels.test_rotary import DTYPES, NAMES, inputs, references
from vtp_kernels.library import TritonSides

MODULE = "vtp_kernels.rotary"
op_module = importlib.import_module(MODULE)


@dataclass(frozen=True)
class Case:
    """qkv [B, N, 2 H d + V]; how it lies in memory, and which end of that is at the page."""

    B: int
    N: int
    prefix: int
    H: int
    d: int
    V: int
    dtypes: str = "f32"
    own_tables: bool = False
    rotate_half: bool = False
    layout: str = "padded"
    side: str = "end"

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded")
        flags += ["own-tables"] * self.own_tables + ["halves"] * self.rotate_half
        sizes = f"B{self.B}-N{self.N}-P{self.prefix}-H{self.H}-d{self.d}-V{self.V}"
        return "-".join([sizes, self.dtypes, self.side, *flags])


# -- In the worker ------------------------------------------------------------------------------------------


class Data:
    """The tensors of a case, and what the kernels should make of them."""

    def __init__(self, case):
        self.case = case
        shape = case.B, case.N, case.prefix, case.H, case.d, case.V
        tensors = inputs(*shape, case.dtypes, case.own_tables)
        self.tensors = dict(zip(("qkv", "rope", "dout"), tensors, strict=True))
        exact, same_dtype = references(*tensors, case.H, case.prefix, case.rotate_half)
        self.expected = dict(zip(NAMES, zip(exact, same_dtype, strict=True), strict=True))
        self.arguments = case.H, case.prefix, case.rotate_half

    def rows(self, name):
        """qkv or dout as [B * N, columns]."""
        return place(self.tensors[name].flatten(0, 1), self.case.layout, self.case.side)

    def images(self, name):
        return self.rows(name).unflatten(0, (self.case.B, self.case.N))

    def rope(self):
        return guarded(self.tensors["rope"], self.case.side, align=16)

    def compare(self, name, out):
        exact, same_dtype = self.expected[name]
        assert_close_to_float64(out.reshape(exact.shape).to(same_dtype.dtype), exact, same_dtype, name)


def prove(check, case, replacements=(), **conditions):
    """`check(op, data)`; keys of the variants that it launched."""
    return run_check(check, loaded(MODULE, replacements), Data(case), **conditions)


def _check_copy(op, data, name, result, adjoint):
    source = data.rows(name)
    target = op.empty_rows_like(source, *source.shape)
    H, prefix, rotate_half = data.arguments
    op._launch_rotation(source, data.rope(), target, data.case.N, H, prefix, rotate_half, adjoint)
    data.compare(result, target)
    assert_padding_is_zero(result, target)


def check_copy(op, data):
    _check_copy(op, data, "qkv", "out", False)


def check_adjoint(op, data):
    _check_copy(op, data, "dout", "dqkv", True)


def check_in_place(op, data):
    """And prefix tokens, values and what lies behind a row are left."""
    rows, before = data.rows("qkv"), data.tensors["qkv"]
    op._launch_rotation(rows, data.rope(), None, data.case.N, *data.arguments)
    data.compare("out", rows)
    assert torch.equal(
        rows.unflatten(0, before.shape[:2])[:, : data.case.prefix], before[:, : data.case.prefix]
    )
    if data.case.layout == "padded" and rows.stride(0) > rows.shape[1]:
        assert rows.as_strided((len(rows), rows.stride(0)), rows.stride())[:, rows.shape[1] :].isnan().all()


def check_drope(op, data):
    dout, qkv = data.rows("dout"), data.rows("qkv")
    H, prefix, rotate_half = data.arguments
    drope = op._launch_drope(dout, qkv, data.rope(), data.case.N, H, prefix, rotate_half)
    assert drope.dtype == torch.float32
    data.compare("drope", drope if data.case.own_tables else drope.sum(0))


def check_passes(op, data):
    """Forward, in place and backward, as the op runs them."""
    qkv, rope, dout = data.images("qkv"), data.rope(), data.images("dout")
    out = op._forward_triton(qkv, rope, *data.arguments)
    assert_like([out], [op._forward_fake(qkv, rope, *data.arguments)])
    data.compare("out", out)
    assert torch.equal(qkv, data.tensors["qkv"])
    for need_qkv, x in ((True, qkv), (True, None), (False, qkv)):
        arguments = dout, rope, x, *data.arguments, need_qkv
        gradients = op._backward_triton(*arguments)
        assert_like(gradients, op._backward_fake(*arguments))
        for name, gradient, need in zip(NAMES[1:], gradients, (need_qkv, x is not None), strict=True):
            assert bool(gradient.numel()) == need
            if need:
                data.compare(name, gradient)
    op._rotate_triton(qkv, rope, *data.arguments)
    assert torch.equal(qkv, out)


def check_that_a_second_run_is_equal(op, data):
    """Bit for bit: sums are made in a fixed order."""
    arguments = data.images("dout"), data.rope(), data.images("qkv"), *data.arguments, True
    first, second = (op._backward_triton(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CHECKS = {"copy": check_copy, "adjoint": check_adjoint, "in_place": check_in_place, "drope": check_drope}

# -- Correct kernels pass -----------------------------------------------------------------------------------

# Images, tokens, prefix tokens, heads, their width, columns of values: an odd number of heads, and of pairs;
# tokens and columns of values in several tiles, in one, and none but prefix tokens in the first tile.
SHAPES = [
    (2, 1, 0, 1, 2, 1),
    (3, 17, 1, 2, 6, 15),
    (2, 70, 5, 3, 16, 137),
    (1, 61, 1, 3, 30, 61),
    (2, 37, 35, 2, 32, 115),
    (1, 197, 1, 3, 64, 197),
    (1, 37, 5, 2, 80, 0),
]
# Every shape meets both layouts of pairs, tables and ends of memory.
CASES = [
    Case(*shape, list(DTYPES)[(i + turn) % 5], bool((i + turn) % 2), bool(turn), side=("end", "begin")[turn])
    for i, shape in enumerate(SHAPES)
    for turn in (0, 1)
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", CHECKS)
def test_kernel_at_odd_widths(interpreter, kernel, case):
    interpreter.run(prove, CHECKS[kernel], case)


@pytest.mark.covering(1)
@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
@pytest.mark.parametrize("block", op_module.TILES)
@pytest.mark.parametrize("kernel", CHECKS)
def test_every_entry_of_the_tables(interpreter, kernel, block, rotate_half):
    """Two tiles of tokens, and not quite as many pairs as there is room for."""
    tiles = op_module.DROPE_TILES if kernel == "drope" else op_module.TILES
    case = Case(1, tiles[block].blocks["BLOCK_M"] + 3, 1, 3, 2 * block - 2, 9, "bf16-f32", True, rotate_half)
    launched = interpreter.run(prove, CHECKS[kernel], case)
    assert {dict(key[2])["BLOCK_P"] for key in launched} == {block}


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["wide", "far"])
@pytest.mark.parametrize("kernel", CHECKS)
def test_strided_rows_and_rows_beyond_32_bits(interpreter, kernel, layout):
    interpreter.run(prove, CHECKS[kernel], Case(3, 3, 1, 2, 6, 5, "bf16-f32", layout=layout))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["padded", "tight", "misaligned", "transposed"])
@pytest.mark.parametrize(
    ("dtypes", "own_tables", "rotate_half"),
    [("f32", True, False), ("bf16-f32", False, True), ("f16", True, True), ("bf16", False, False)],
)
def test_passes_in_every_layout(interpreter, dtypes, own_tables, rotate_half, layout):
    interpreter.run(prove, check_passes, Case(2, 9, 1, 3, 6, 5, dtypes, own_tables, rotate_half, layout))


@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32", "bf16", "f16-f32"])
def test_all_launches_of_usual_models_are_compiled_ahead_of_time(interpreter, dtypes):
    launched = interpreter.run(prove, check_passes, Case(1, 5, 1, 2, 64, 5, dtypes, dtypes != "f32", True))
    assert_compiled_ahead_of_time(launched, MODULE, "sm_80")


def test_a_second_run_is_equal_bit_for_bit(interpreter):
    interpreter.run(prove, check_that_a_second_run_is_equal, Case(5, 9, 1, 2, 6, 5, "bf16"))


def test_models_of_any_widths_of_values_and_batches_of_any_size_share_two_compilations():
    with op_module.launching.recording("rotary", "sm_90") as found:
        for B, N, prefix, H, V in ((1, 37, 0, 1, 5), (8, 201, 5, 12, 461), (128, 1025, 1, 16, 768)):
            qkv = torch.empty(B, N, 128 * H + V, dtype=torch.bfloat16, device="meta")
            rope = torch.empty(N - prefix, 128, device="meta")
            op_module._rotate_triton(qkv, rope, H, prefix, True)
            op_module._backward_triton(qkv, rope, None, H, prefix, True, True)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("images", "dtype", "forced", "expected"),
    [
        (1, torch.bfloat16, (), ["_compact_linear_fwd_kernel"]),
        (5, torch.float32, (), ["_compact_linear_fwd_kernel"]),
        (
            5,
            torch.bfloat16,
            ("rotated_linear", "pass"),
            ["_compact_linear_fwd_kernel", "_rotate_heads_kernel"],
        ),
        (6, torch.bfloat16, (), ["_rotate_heads_kernel"]),
        (6, torch.bfloat16, ("rotated_linear", "epilogue"), ["_rotate_heads_kernel"]),
        (6, torch.bfloat16, ("compact_linear", "kernel"), ["_compact_linear_fwd_kernel"]),
        (1, torch.float64, (), []),
    ],
)
def test_the_product_rotates_where_it_is_the_ops_own(images, dtype, forced, expected):
    """As from 1,024 rows on it is not."""
    x, weight = (torch.empty(s, dtype=dtype, device="meta") for s in ((images, 201, 64), (420, 64)))
    rope, launching = torch.empty(196, 128, device="meta"), op_module.launching
    path = launching.forced_path(*forced) if forced else contextlib.nullcontext()
    with path, launching.recording("rotary", "sm_90") as found, TritonSides():
        out = op_module.rotated_linear(x, weight, None, rope, (64, 64), 5, True)
    assert [key[0] for key in found] == expected
    assert out.shape == (images, 201, 420) and out.dtype == dtype


def test_what_the_kernels_do_not_take_is_left_to_pytorch():
    """Wider heads, float64, no tokens to rotate; nothing is launched, or it would fail here."""
    for dtype, N, d in ((torch.float32, 3, 258), (torch.float64, 3, 6), (torch.float32, 1, 6)):
        qkv, rope = torch.randn(2, N, 2 * d + 5, dtype=dtype), torch.randn(N - 1, 2 * d, dtype=dtype)
        out = op_module._forward_triton(qkv, rope, 1, 1, True)
        torch.testing.assert_close(out, op_module.rotate_heads_ref(qkv, rope, (d,), 1, True))
        dqkv, drope = op_module._backward_triton(qkv, rope, qkv, 1, 1, True, True)
        assert dqkv.shape == qkv.shape and drope.shape == rope.shape
        op_module._rotate_triton(qkv, rope, 1, 1, True)
        assert torch.equal(qkv, out)
