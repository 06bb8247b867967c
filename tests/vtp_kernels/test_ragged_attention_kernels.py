"""What the Triton kernels of ragged_attention compute, proved in the interpreter; and that the proofs bite.

The first half runs the launchers next to protected pages, with poisoned outputs and NaN in the padding of
rows, and compares with float64. The second half plants defects and expects each to be caught by the proof
that its id names.
"""

import functools
import importlib
import math
from dataclasses import dataclass

import pytest
import torch

from tests.support.guarded_memory import guarded
from tests.support.kernel_proofs import (
    KINDS,
    Defect,
    assert_compiled_ahead_of_time,
    assert_defect_is_caught,
    assert_defects_of_every_kind,
    assert_like,
    assert_padding_is_zero,
    loaded,
    place,
    run_check,
    to_tf32,
)
from tests.support.numerics import assert_close_to_float64
from vtp_kernels import launching

MODULE = "vtp_kernels.ragged_attention"
ragged_attention = importlib.import_module(MODULE)

DTYPES = {
    "f32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """N tokens of B images, the widths of the heads, and how the inputs lie in memory.

    widths: of values; head_dim: of the keys of all heads, or of each.
    """

    N: int
    widths: tuple[int, ...]
    dtype: str
    head_dim: int | tuple[int, ...] = 16
    B: int = 1
    layout: str = "padded"
    side: str = "end"

    def __str__(self):
        keys = self.head_dim if isinstance(self.head_dim, int) else ".".join(map(str, self.head_dim))
        widths = ".".join(map(str, self.widths))
        return f"B{self.B}-N{self.N}-d{keys}-v{widths}-{self.dtype}-{self.layout}-{self.side}"

    @property
    def keys(self):
        return ragged_attention._each(self.head_dim, self.widths)

    @property
    def scale(self):
        """Not the one that any width of the head would give."""
        return 1.3 * max(self.keys) ** -0.5


# -- In the worker ------------------------------------------------------------------------------------------


class Data:
    """The tensors of a case, and what the kernels should make of them."""

    def __init__(self, case):
        self.case = case
        K, V = sum(case.keys), sum(case.widths)
        self.parts = [K, K, V]
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]
        self.qkv = torch.randn(case.B, case.N, sum(self.parts), generator=generator).to(dtype)
        self.dout = torch.randn(case.B, case.N, V, generator=generator).to(dtype)
        self.exact = self.by_autograd(torch.float64)
        self.as_flash = self.as_flash_attention(dtype)
        self.same_dtype = self.less_exact(self.by_autograd(dtype), self.as_flash)

    def operand(self, t):
        """What a matrix product reads of `t`."""
        return to_tf32(t) if self.case.dtype == "tf32" and t.dtype == torch.float32 else t

    def heads(self, dtype):
        """q, k, v and dout of each head as products read them."""
        qkv, dout = self.operand(self.qkv.to(dtype)), self.operand(self.dout.to(dtype))
        parts = ragged_attention._split(qkv, self.case.keys, self.case.widths)
        return zip(*parts, dout.split(self.case.widths, dim=-1), strict=True)

    def by_autograd(self, dtype):
        """out, lse, dq, dk and dv of the definition."""
        found = []
        for head in self.heads(dtype):
            q, k, v = (t.detach().requires_grad_() for t in head[:3])
            scores = q @ k.transpose(-2, -1) * self.case.scale
            out = scores.softmax(-1) @ v
            gradients = torch.autograd.grad(out, (q, k, v), head[3])
            found.append((out.detach(), base2_lse(scores.detach(), dtype), *gradients))
        return self.joined(found)

    def as_flash_attention(self, dtype):
        """The same as PyTorch's flash attention computes it: weights rounded before they are divided by their
        sum, made again from the log-sum-exp, and delta from the rounded out."""
        found, wide = [], torch.promote_types(dtype, torch.float32)
        for q, k, v, dout in self.heads(dtype):
            scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * self.case.scale
            lse = scores.logsumexp(-1)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            rounded = self.operand(weights.to(dtype)).to(wide)
            out = (rounded @ v.to(wide) / weights.sum(-1, keepdim=True)).to(dtype)
            weights = (scores - lse[..., None]).exp()
            delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)
            dscores = weights * (dout.to(wide) @ v.to(wide).transpose(-2, -1) - delta)
            dscores, weights = (self.operand(t.to(dtype)) for t in (dscores, weights))
            dq, dk = dscores @ k * self.case.scale, dscores.transpose(-2, -1) @ q * self.case.scale
            saved = base2_lse(scores, dtype)
            found.append((out, saved, dq, dk, weights.transpose(-2, -1) @ dout))
        return self.joined(found)

    def joined(self, found):
        """The tensors of all heads, as the op lays them out."""
        out, lse, dq, dk, dv = zip(*found, strict=True)
        return dict(
            out=torch.cat(out, -1),
            lse=torch.stack(lse, 1),
            **{name: torch.cat(t, -1) for name, t in (("dq", dq), ("dk", dk), ("dv", dv))},
        )

    def less_exact(self, *ways):
        """Of each number the one that is further from float64."""
        first, second = ways
        return {
            name: torch.where((a.double() - e).abs() > (second[name].double() - e).abs(), a, second[name])
            for (name, a), e in zip(first.items(), self.exact.values(), strict=True)
        }

    def compare(self, **found):
        for name, out in found.items():
            assert_close_to_float64(out, self.exact[name], self.same_dtype[name], name)


def assert_padded_rows(name, t):
    _, N, width = t.shape
    row = -(-width // 8) * 8
    assert t.stride() == (N * row, row, 1), name
    assert_padding_is_zero(name, t)


def prove(check, case, replacements=(), make=Data, **kwargs):
    """`check(op, make(case), ...)` under the case's conditions; keys of the variants that it launched."""
    op = loaded(MODULE, replacements)
    units = op._units

    def guarded_table(*arguments):
        table = torch.tensor(units(*arguments[:-1]), dtype=torch.int32)
        return guarded(table, case.side)

    attributes = {"_table": guarded_table}
    return run_check(check, op, make(case), attributes=attributes, tf32=case.dtype == "tf32", **kwargs)


def check_forward(op, data, needs=(True, False)):
    case = data.case
    for need_lse in needs:
        qkv = place(data.qkv, case.layout, case.side)
        out, lse = op._forward_triton(qkv, case.keys, case.widths, case.scale, need_lse)
        assert_like((out, lse), op._forward_fake(qkv, case.keys, case.widths, case.scale, need_lse))
        data.compare(out=out, **({"lse": lse} if need_lse else {}))
        assert_padded_rows("out", out)


def check_backward(op, data):
    """From what a forward pass would save; PyTorch makes it here, so that only these kernels are judged."""
    case = data.case
    tensors = data.dout, data.qkv, data.as_flash["out"]
    dout, qkv, out = (place(t, case.layout, case.side) for t in tensors)
    lse = guarded(data.as_flash["lse"], case.side)
    arguments = dout, qkv, out, lse, case.keys, case.widths, case.scale
    dqkv = op._backward_triton(*arguments)
    assert_like([dqkv], [op._backward_fake(*arguments)])
    data.compare(**dict(zip(("dq", "dk", "dv"), dqkv.split(data.parts, dim=-1), strict=True)))
    if case.dtype != "f32":  # whose backward pass is PyTorch's: it leaves the padding as it is
        assert_padded_rows("dqkv", dqkv)


def check_specials(op, data, column, special):
    """NaN and infinities are where they are in PyTorch, forward and backward."""
    case = data.case
    data.qkv[0, case.N - 1, column] = special
    leaf = data.qkv.clone().requires_grad_()
    expected = op.ragged_attention_ref(leaf, case.keys, case.widths, case.scale)
    expected.backward(data.dout)
    qkv, dout = (place(t, case.layout, case.side) for t in (data.qkv, data.dout))
    out, lse = op._forward_triton(qkv, case.keys, case.widths, case.scale, True)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(out), test(expected))
    finite = out.isfinite()
    torch.testing.assert_close(out[finite], expected.detach()[finite], rtol=1e-3, atol=1e-3)
    dqkv = op._backward_triton(dout, qkv, out, lse, case.keys, case.widths, case.scale)
    assert torch.equal(dqkv.isfinite(), leaf.grad.isfinite())


def base2_lse(scores, dtype):
    """What the forward pass saves, in the dtype of statistics beside `dtype`."""
    exact = scores.double().logsumexp(-1) * math.log2(math.e)
    return exact.to(torch.promote_types(dtype, torch.float32))


# -- Correct kernels pass -----------------------------------------------------------------------------------

# Tokens around the tiles; those beyond 256 go online in every dtype, float32 always does.
FORWARD = [
    Case(1, (37, 1, 64, 15), "f32", B=3),
    Case(1, (16, 48), "bf16", head_dim=64, side="begin"),
    Case(5, (61, 3, 17), "f16", head_dim=32, B=2),
    Case(16, (200, 7), "bf16", head_dim=80, side="begin"),
    Case(17, (37, 1, 64, 15), "tf32", head_dim=64, B=2),
    Case(17, (200, 7), "f16"),
    Case(64, (16, 48), "bf16", head_dim=32, B=2, side="begin"),
    Case(64, (61, 3, 17), "f32", side="begin"),
    Case(77, (37, 1, 64, 15), "bf16", head_dim=64, B=2),
    Case(77, (61, 3, 17), "tf32", head_dim=80),
    Case(197, (37, 1, 64, 15), "bf16", head_dim=64),
    Case(197, (200, 7), "f16", side="begin"),
    Case(240, (37,), "bf16"),
    Case(256, (9,), "f16"),
    Case(257, (61, 3), "bf16", side="begin"),
    Case(300, (17,), "tf32", head_dim=32),
]


# What the kernels distinguish of a case: the dtype, its side of memory, and whether it has many keys.
def traits(case):
    return case.dtype, case.side, case.N > 256


# The backward kernels are the same for any number of keys.
def traits_of_backward(case):
    return case.dtype, case.side


@pytest.mark.covering(by=traits)
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(interpreter, case):
    interpreter.run(prove, check_forward, case)


def test_forward_of_many_tokens(interpreter):
    interpreter.run(prove, check_forward, Case(577, (37,), "bf16"), needs=(True,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_wide_heads_with_the_online_kernel(interpreter, dtype):
    case = Case(81, (13, 75, 64, 150, 3), dtype)
    interpreter.run(prove, check_forward, case, needs=(True,), forced=("ragged_attention", "online"))


BACKWARD = [
    Case(1, (37, 1, 64, 15), "bf16", B=3),
    Case(5, (16, 48), "f32", side="begin"),
    Case(17, (61, 3, 17), "f16", head_dim=64, B=2),
    Case(64, (200, 7), "tf32", head_dim=32),
    Case(77, (37, 1, 64, 15), "bf16", head_dim=80, side="begin"),
    Case(77, (13, 75, 150), "tf32"),
    Case(197, (37,), "bf16", head_dim=64),
    Case(257, (3,), "tf32"),
]


@pytest.mark.covering(by=traits_of_backward)
@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(interpreter, case):
    interpreter.run(prove, check_backward, case)


@pytest.mark.parametrize("check", [check_forward, check_backward])
@pytest.mark.parametrize(
    "case",
    [
        Case(21, (37, 15), "bf16", layout="tight"),
        Case(21, (37, 15), "f32", layout="misaligned", side="begin"),
        Case(21, (37, 15), "bf16", head_dim=17),
        Case(21, (1, 86), "bf16", head_dim=17, side="begin"),
        Case(22, (1, 78), "f32", head_dim=18),
    ],
    ids=str,
)
def test_rows_and_heads_that_do_not_start_at_16_bytes(interpreter, check, case):
    interpreter.run(prove, check, case)


# Key widths that begin and end within 16 bytes, around the blocks of 16, narrower and wider than all others.
RAGGED_FORWARD = [
    Case(1, (37, 1, 64, 15), "bf16", head_dim=(16, 1, 7, 64), B=2),
    Case(1, (3, 5), "f32", head_dim=(15, 17), side="begin"),
    Case(17, (61, 3, 17), "f16", head_dim=(8, 24, 16), B=2, side="begin"),
    Case(17, (16, 48), "tf32", head_dim=(37, 3), side="begin"),
    Case(37, (16, 48, 9), "bf16", head_dim=(40, 16, 64), B=2),
    Case(37, (16, 9), "f32", head_dim=(64, 1), B=2),
    Case(64, (200, 7, 16), "tf32", head_dim=(16, 16, 8)),
    Case(77, (37, 1, 64, 15), "bf16", head_dim=(15, 17, 37, 16), side="begin"),
    Case(197, (9, 12), "f16", head_dim=(7, 64)),
    Case(257, (5, 3), "bf16", head_dim=(1, 47)),
]


@pytest.mark.covering(by=traits)
@pytest.mark.parametrize("case", RAGGED_FORWARD, ids=str)
def test_forward_of_heads_with_keys_of_their_own(interpreter, case):
    interpreter.run(prove, check_forward, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_such_heads_with_the_online_kernel(interpreter, dtype):
    case = Case(81, (13, 75, 3), dtype, head_dim=(17, 104, 16))
    interpreter.run(prove, check_forward, case, needs=(True,), forced=("ragged_attention", "online"))


RAGGED_BACKWARD = [
    Case(1, (37, 1, 64, 15), "bf16", head_dim=(16, 1, 7, 64), B=2),
    Case(17, (61, 3, 17), "f16", head_dim=(8, 24, 16), B=2, side="begin"),
    Case(17, (16, 48), "tf32", head_dim=(37, 3), side="begin"),
    Case(37, (16, 48, 9), "bf16", head_dim=(40, 16, 64), side="begin"),
    Case(37, (5, 9), "tf32", head_dim=(32, 16), B=2),
    Case(53, (200, 7), "f16", head_dim=(16, 8)),
    Case(53, (8, 101, 3), "bf16", head_dim=(15, 17, 37)),
    Case(53, (5, 16), "tf32", head_dim=(104, 16)),
    Case(257, (3, 4), "bf16", head_dim=(1, 23)),
]


@pytest.mark.covering(by=traits_of_backward)
@pytest.mark.parametrize("case", RAGGED_BACKWARD, ids=str)
def test_backward_of_heads_with_keys_of_their_own(interpreter, case):
    interpreter.run(prove, check_backward, case)


@pytest.mark.parametrize("check", [check_forward, check_backward])
@pytest.mark.parametrize(
    "case",
    [
        Case(21, (37, 15), "bf16", head_dim=(17, 7), layout="tight"),
        Case(21, (37, 15), "tf32", head_dim=(1, 7), layout="misaligned", side="begin"),
        Case(21, (1, 1), "bf16", head_dim=(2, 1), layout="tight"),
    ],
    ids=str,
)
def test_rows_of_such_heads_that_do_not_start_at_16_bytes(interpreter, check, case):
    interpreter.run(prove, check, case)


@pytest.mark.parametrize("dtype", ["f32", "f16"], ids=["online", "one-pass"])
@pytest.mark.parametrize("column", [19, 24 + 19], ids=["query", "key"])
def test_nan_in_one_head_does_not_reach_another_within_16_bytes(interpreter, dtype, column):
    case = Case(19, (37, 12, 3), dtype, head_dim=(17, 3, 4))
    interpreter.run(prove, check_specials, case, column=column, special=float("nan"))


@pytest.mark.parametrize("dtype", ["f32", "f16"], ids=["online", "one-pass"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [3, 32 + 5, 64 + 40], ids=["query", "key", "value"])
def test_infinities_and_nan_go_through_as_in_pytorch(interpreter, column, special, dtype):
    case = Case(19, (37, 12), dtype)
    interpreter.run(prove, check_specials, case, column=column, special=special)


@pytest.mark.parametrize(("widths", "keys"), [((5,), (64,)), ((5, 3), (64, 40))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_launched_is_compiled_ahead_of_time(dtype, widths, keys):
    """Of the forward kernels one is compiled for the number of tokens, of the backward kernels none."""
    launched = {}
    with launching.matmul_precision("high" if dtype == "tf32" else "highest"):
        for tokens in (197, 21):
            qkv = torch.empty(1, tokens, 2 * sum(keys) + sum(widths), dtype=DTYPES[dtype], device="meta")
            with launching.recording(MODULE, "sm_90") as launched[f"forward, {tokens} tokens"]:
                ragged_attention._forward_triton(qkv, keys, widths, 0.1, False)
                out, lse = ragged_attention._forward_triton(qkv, keys, widths, 0.1, True)
        with launching.recording(MODULE, "sm_90") as launched["backward"]:
            ragged_attention._backward_triton(out, qkv, out, lse, keys, widths, 0.1)
    assert len(launched["backward"]) == (0 if dtype == "f32" else 2)  # which is PyTorch's
    for of in ("forward, 197 tokens", "backward"):
        assert_compiled_ahead_of_time(set(launched[of]), MODULE, "sm_90")


def test_on_amd_the_backward_pass_of_wide_keys_of_their_own_is_pytorchs():
    qkv = torch.empty(1, 21, 2 * 80 + 32, dtype=torch.bfloat16, device="meta")
    for keys, kernels in (((32, 48), 0), ((24, 56), 0), ((40, 40), 2), ((16, 64), 0), ((17, 63), 0)):
        with launching.recording(MODULE, "gfx942") as found:
            out, lse = ragged_attention._forward_triton(qkv, keys, (16, 16), 0.1, True)
            assert len(found) == 1
            ragged_attention._backward_triton(out, qkv, out, lse, keys, (16, 16), 0.1)
            assert len(found) == 1 + kernels, keys
    narrow = torch.empty(1, 21, 2 * 48 + 32, dtype=torch.bfloat16, device="meta")
    for target in ("gfx942", "sm_90"):
        with launching.recording(MODULE, target) as found:
            ragged_attention._backward_triton(out, narrow, out, lse, (16, 32), (16, 16), 0.1)
            assert len(found) == 2, target


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

READ, WRITE, MASK, OTHER, RACE, UNWRITTEN, RAW, VALUE = KINDS
# Tails of rows, keys and columns; the second head begins within 16 bytes of the first.
ONE_PASS = Case(37, (13, 5), "bf16")
TILES = Case(53, (13, 5), "f32")
TILES16 = Case(53, (13, 5), "bf16")
TILES32 = Case(77, (13, 5), "tf32")  # for the backward kernels, which float32 takes on tensor cores only
ONE_HEAD32 = Case(53, (5,), "tf32")
WIDE = Case(19, (3, 101), "f32")
WIDE32 = Case(19, (3, 101), "tf32")


def planted(kernel, kind, what, proof, old, new, *, case, **extra):
    return Defect(kernel, kind, what, proof, old, new, (("case", case),), **extra)


def defects_of(kernel, case, *rows):
    return [planted(kernel, *row[:5], **{"case": case, **(row[5] if row[5:] else {})}) for row in rows]


# In helpers that all kernels have in common.
COMMON = [
    (OTHER, "no-other", "poison", "& (o_column[None, :] < readable), other=0.0)",
     "& (o_column[None, :] < readable))"),
]  # fmt: skip
SMALL_TILES = [
    (RACE, "small-tiles-overlap", "race-detection", "tl.maximum(i_tile - full, 0) * 16",
     "tl.maximum(i_tile - full, 0) * 8"),
]  # fmt: skip
FULL_TILES = [
    (RACE, "full-tiles-overlap", "race-detection", "tl.minimum(i_tile, full) * BLOCK_M",
     "tl.minimum(i_tile, full) * (BLOCK_M - 16)"),
]  # fmt: skip
LAST = "last = tl.where(end == V, padded, end)"
STORE_ROWS = [
    (WRITE, "row-mask-of-store-removed", "guard-page", "m_row = o_row[:, None] < N",
     "m_row = o_row[:, None] >= 0"),
    (UNWRITTEN, "last-column-not-stored", "poison", LAST, LAST + " - 1"),
    (UNWRITTEN, "whole-16-bytes-not-stored", "poison", "mask=m_row & whole)",
     "mask=m_row & (own & (own == 0)))"),
    (UNWRITTEN, "shared-16-bytes-not-stored", "poison", "(own & (whole == 0))", "(own & (own == 0))"),
    (RACE, "columns-of-the-neighbour-stored", "race-detection", "own = (o_column[None, :] >= begin)",
     "own = (o_column[None, :] >= 0)"),
    (RACE, "first-shared-16-bytes-as-whole", "race-detection", "(begin + 7) // 8 * 8", "begin // 8 * 8"),
    (RACE, "last-shared-16-bytes-as-whole", "race-detection", "last // 8 * 8", "(last + 7) // 8 * 8"),
    (VALUE, "padding-not-written", "zero-padding", LAST, "last = end"),
]  # fmt: skip
STORE_HEAD = "m_tile = (o_row[:, None] < target.rows) & (o_d[None, :] < HEAD.DIM)"
STORE_BLOCK = "mask=(o_row[:, None] < target.rows) & own)"
OWN_OF_BLOCK = "own = (o_c[None, :] >= unit.key_begin) & (o_c[None, :] < unit.key_end)"
OWN = "own = (o_column[None, :] - begin).to(tl.uint32) < (end - begin)"
CLAMP = "r_m = tl.minimum(o_m, N - 1)"
LSE = "highest + tl.log2(total)"
FACTOR = "            factor=scale * math.log2(math.e),\n"
NO_LSE_MASK = "b_lse = tl.load(lse + o_m)\n"
ONLINE_VALUES = "b_v = load_tile(values.source, o_n, o_wide, N, readable, stride_qkv, MASK, True)"
CHUNKS = "for c in range(begin // 8 * 8, end, CHUNK):"


# In heads with keys of their own: the second begins within 16 bytes of the first, and within a block of it.
OWN_KEYS, OWN_KEYS16, OWN_KEYS32 = (Case(37, (13, 5), d, head_dim=(20, 12)) for d in ("f32", "bf16", "tf32"))
# Rows that are over soon after their last key: what is loaded beyond it would be beyond the row.
SHORT, SHORT16 = (Case(21, (1, 1), dtype, head_dim=(2, 1)) for dtype in ("f32", "bf16"))
SHORT32 = Case(21, (1, 1), "tf32", head_dim=(2, 6))
READABLE = "return (end + 7) // 8 * 8 if HEAD.ALIGNED else end"
OF_KEYS = [
    (VALUE, "queries-taken-for-keys", "error-rule", "qkv.p + sizes.K, ", "qkv.p, "),
    (VALUE, "scale-of-the-key-that-is-left", "error-rule", "scale * math.log2(math.e)",
     "min(key_widths) ** -0.5 * math.log2(math.e)", dict(count=2)),
]  # fmt: skip
OF_KEYS_FORWARD = [
    *OF_KEYS,
    (VALUE, "key-begins-where-values-do", "error-rule", "tl.load(p_unit + 5)", "tl.load(p_unit + 1)"),
    (VALUE, "key-of-the-next-head-counts", "error-rule", OWN, "own = o_column[None, :] >= begin"),
    (VALUE, "key-of-the-head-before-counts", "error-rule", OWN, "own = o_column[None, :] < end"),
    (VALUE, "last-columns-of-the-key-dropped", "error-rule", CHUNKS, CHUNKS.replace("end,", "end - CHUNK,")),
]
HELD = "unit.key_begin, unit.key_end, MASK)\n            b_blocks"
OF_KEYS_BACKWARD = [
    *OF_KEYS,
    (RACE, "key-begins-where-values-do", "race-detection", "tl.load(p_unit + 5)", "tl.load(p_unit + 1)"),
    (VALUE, "key-of-the-next-head-counts", "error-rule", HELD, HELD.replace("end,", "end + 3,")),
    (VALUE, "key-of-the-head-before-counts", "error-rule", HELD, HELD.replace("begin,", "begin - 3,")),
    (VALUE, "blocks-but-the-first-dropped", "error-rule", "(i + 1) * HEAD.BLOCK)", "i * HEAD.BLOCK)"),
    (READ, "columns-beyond-the-key-loaded", "guard-page", "sizes.K, sizes.N, _readable(unit.key_end, HEAD)",
     "sizes.K, sizes.N, 80", dict(case=SHORT32, argument="qkv")),
    (WRITE, "row-mask-of-block-removed", "guard-page", STORE_BLOCK, STORE_BLOCK.replace("] <", "] >= 0 *"),
     dict(argument="dqkv")),
    (UNWRITTEN, "last-column-of-block-not-stored", "poison", OWN_OF_BLOCK,
     OWN_OF_BLOCK.replace("key_end)", "key_end - 1)")),
    (RACE, "columns-of-the-head-before-stored", "race-detection", OWN_OF_BLOCK,
     OWN_OF_BLOCK.replace(">= unit.key_begin", ">= 0")),
    (RACE, "columns-of-the-next-head-stored", "race-detection", OWN_OF_BLOCK,
     OWN_OF_BLOCK.replace("< unit.key_end", "< unit.key_end + 9")),
]  # fmt: skip


def columns_beyond_the_key(case):
    return (READ, "columns-beyond-the-key-loaded", "guard-page", READABLE, READABLE + " + 16",
            dict(case=case, argument="qkv"))  # fmt: skip


def overrun(rows, argument):
    """Rows with the argument that is overrun, where a page is touched."""
    return [(*row, {"argument": argument}) if row[2] == "guard-page" else row for row in rows]


# fmt: off
DEFECTS = [
    *defects_of(
        "fwd", ONE_PASS, *COMMON, *SMALL_TILES, *overrun(STORE_ROWS, "out"),
        (READ, "query-clamp-removed", "guard-page", CLAMP, "r_m = o_m", dict(count=3, argument="qkv")),
        (MASK, "no-mask-on-keys", "guard-page", "KEYS % (256 >> i) == 0) * factor", "False) * factor",
         dict(argument="qkv")),
        (MASK, "no-mask-on-values", "guard-page", "values.stride, KEYS % (256 >> i) == 0, True)",
         "values.stride, False, True)", dict(argument="qkv")),
        (UNWRITTEN, "tail-of-columns-dropped", "poison", "for c in range(column, last, 32):",
         "for c in range(column, last - 31, 32):"),
        (RAW, "sum-of-rounded-weights", "bfloat16-check", "total += tl.sum(b_p, axis=1)",
         "total += tl.sum(b_p.to(b_q[0].dtype), axis=1)"),
        (VALUE, "keys-beyond-the-end-count", "error-rule",
         'b_s = tl.where(o_n[None, :] < N, b_s, float("-inf"))\n            h', "b_s = b_s\n            h"),
        (VALUE, "padding-not-zeroed", "zero-padding", "acc = tl.where(o_column[None, :] < V, acc, 0.0)",
         "acc = acc"),
        (VALUE, "weights-not-normalised", "error-rule", "acc = acc / total[:, None]", "acc = acc"),
        (VALUE, "scale-of-the-head-that-is-left", "error-rule", FACTOR,
         FACTOR.replace("=scale", "=value_widths[0] ** -0.5")),
        (VALUE, "log-sum-exp-without-the-maximum", "error-rule", LSE, "tl.log2(total)", dict(count=2)),
        (VALUE, "log-sum-exp-in-base-e", "error-rule", LSE, f"({LSE}) * 0.6931471805599453", dict(count=2)),
    ),
    *defects_of("fwd", OWN_KEYS16, *OF_KEYS_FORWARD, columns_beyond_the_key(SHORT16)),
    *defects_of("online", OWN_KEYS, *OF_KEYS_FORWARD, columns_beyond_the_key(SHORT)),
    *defects_of("dq", OWN_KEYS32, *OF_KEYS_BACKWARD),
    *defects_of("dkdv", OWN_KEYS32, *OF_KEYS_BACKWARD),
    *defects_of(
        "online", TILES, *COMMON, *FULL_TILES, *overrun(STORE_ROWS, "out"),
        (READ, "query-clamp-removed", "guard-page", CLAMP, "r_m = o_m", dict(count=3, argument="qkv")),
        (MASK, "no-mask-on-keys", "guard-page", "rope, HEAD, MASK) * factor", "rope, HEAD, False) * factor",
         dict(argument="qkv")),
        (MASK, "no-mask-on-values", "guard-page", ONLINE_VALUES, ONLINE_VALUES.replace("MASK", "False"),
         dict(argument="qkv")),
        (RACE, "log-sum-exp-by-every-group", "race-detection",
         "tl.where(begin == unit.head_begin, N, 0)", "N", dict(case=WIDE)),
        (RAW, "sum-of-rounded-weights", "bfloat16-check", "total * shrink + tl.sum(b_p, axis=1)",
         "total * shrink + tl.sum(b_p.to(b_q[0].dtype), axis=1)", dict(case=Case(257, (5,), "bf16"))),
        (VALUE, "keys-beyond-the-end-count", "error-rule",
         'b_s = tl.where(o_n[None, :] < N, b_s, float("-inf"))\n    h', "b_s = b_s\n    h"),
        (VALUE, "tail-of-keys-dropped", "error-rule", "range(full, N, 16):\n        acc_wide",
         "range(full, full, 16):\n        acc_wide"),
        (VALUE, "older-values-not-shrunk", "error-rule", "acc_wide * shrink[:, None]", "acc_wide"),
        (VALUE, "weights-not-normalised", "error-rule", "acc_wide / total[:, None]", "acc_wide"),
        (VALUE, "second-group-of-columns-not-launched", "poison", "tuple(value_widths), not one_pass",
         "tuple(value_widths), False", dict(case=WIDE)),
        (VALUE, "scale-of-the-head-that-is-left", "error-rule", FACTOR,
         FACTOR.replace("=scale", "=value_widths[0] ** -0.5")),
        (VALUE, "log-sum-exp-without-the-maximum", "error-rule", LSE, "tl.log2(total)", dict(count=2)),
    ),
    *defects_of(
        "dq", TILES32, *COMMON, *FULL_TILES,
        (READ, "row-clamp-removed", "guard-page", CLAMP, "r_m = o_m", dict(count=3, argument="dout")),
        (MASK, "no-mask-on-keys", "guard-page", "keys, o_n, unit, HEAD, MASK", "keys, o_n, unit, HEAD, False",
         dict(argument="qkv")),
        (WRITE, "row-mask-of-store-removed", "guard-page", STORE_HEAD,
         STORE_HEAD.replace("] < target.rows", "] >= 0"), dict(argument="dqkv")),
        (WRITE, "mask-of-delta-removed", "guard-page", "tl.store(delta + o_m, b_delta, mask=o_m < N)",
         "tl.store(delta + o_m, b_delta)", dict(argument="delta", case=ONE_HEAD32)),
        (UNWRITTEN, "last-column-not-stored", "poison", STORE_HEAD, STORE_HEAD.replace("M)", "M - 1)")),
        (RAW, "delta-in-bfloat16", "bfloat16-check",
         "b_delta = tl.sum(b_do_wide.to(tl.float32) * b_o.to(tl.float32), axis=1)",
         "b_delta = tl.sum(b_do_wide * b_o, axis=1)", dict(case=TILES16)),
        (VALUE, "columns-of-the-neighbour-summed", "error-rule", OWN, "own = o_column[None, :] < end"),
        (VALUE, "delta-not-subtracted", "error-rule", "(b_dp - b_delta[:, None])", "b_dp"),
        (VALUE, "gradient-not-scaled", "error-rule", "dq, scale, o_m", "dq, 1.0, o_m"),
        (VALUE, "log-sum-exp-in-base-e", "error-rule", "b_lse = tl.load(lse + r_m)",
         "b_lse = tl.load(lse + r_m) * 0.6931471805599453"),
        (VALUE, "tail-of-keys-dropped", "error-rule", "range(full, N, 16):\n        dq =",
         "range(full, full, 16):\n        dq ="),
        (VALUE, "columns-beyond-the-accumulators-dropped", "error-rule", CHUNKS,
         CHUNKS.replace("end,", "begin // 8 * 8 + 64,"), dict(case=WIDE32)),
    ),
    *defects_of(
        "dkdv", TILES32, *COMMON, *FULL_TILES, *overrun(STORE_ROWS, "dqkv"),
        (READ, "row-clamp-removed", "guard-page", "r_n = tl.minimum(o_n, N - 1)", "r_n = o_n",
         dict(argument="qkv")),
        (MASK, "no-mask-on-queries", "guard-page", "(queries, o_m, unit, HEAD, MASK)",
         "(queries, o_m, unit, HEAD, False)", dict(argument="qkv")),
        (MASK, "no-mask-on-log-sum-exp", "guard-page",
         "b_lse = tl.load(lse + o_m, mask=o_m < N, other=0.0) if MASK else tl.load(lse + o_m)\n", NO_LSE_MASK,
         dict(argument="lse")),
        (RAW, "weights-in-bfloat16", "bfloat16-check", "b_ds = b_p * (b_dp - b_delta[None, :])",
         "b_ds = b_p.to(b_q[0].dtype) * (b_dp - b_delta[None, :]).to(b_q[0].dtype)", dict(case=TILES16)),
        (VALUE, "columns-of-the-neighbour-summed", "error-rule", OWN, "own = o_column[None, :] < end"),
        (VALUE, "delta-not-subtracted", "error-rule", "(b_dp - b_delta[None, :])", "b_dp"),
        (VALUE, "gradient-not-scaled", "error-rule", "dk, scale, o_n", "dk, 1.0, o_n"),
        (VALUE, "tail-of-queries-dropped", "error-rule", "range(full, N, 16):\n        dk",
         "range(full, full, 16):\n        dk"),
        (VALUE, "columns-beyond-the-accumulators-dropped", "error-rule",
         CHUNKS, CHUNKS.replace("end,", "begin // 8 * 8 + 64,"), dict(case=WIDE32)),
    ),
]
# fmt: on
PLANTED_IN = {
    "fwd": functools.partial(check_forward, needs=(True,)),
    "online": functools.partial(check_forward, needs=(True,)),
    "dq": check_backward,
    "dkdv": check_backward,
}


@pytest.mark.covering(1, by=lambda defect: (defect.kernel, defect.kind))
@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    assert_defect_is_caught(interpreter, prove, PLANTED_IN[defect.kernel], defect)


def test_every_kernel_has_planted_defects_of_every_kind():
    assert_defects_of_every_kind(DEFECTS, ragged_attention, KINDS)


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
