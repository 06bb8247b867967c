"""The op `ragged_attention` as users call it: values, gradients, layouts, and PyTorch's transforms."""

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import check_compilation, with_layout
from vtp_kernels.ragged_attention import (
    _GROUP,
    _round_up,
    _units,
    key_columns,
    ragged_attention,
    ragged_attention_ref,
    row_tiles,
    tiled_flops,
)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WIDTHS = [(37, 1, 64, 15), (16, 48), (61, 3, 17), (200, 7), (16, 16, 16), (1,)]
SCALE = 0.17


def inputs(B, N, key_widths, widths, dtype=torch.float32, seed=0):
    """qkv, and a gradient of out."""
    generator = torch.Generator().manual_seed(seed)
    keys = key_widths * len(widths) if isinstance(key_widths, int) else sum(key_widths)
    qkv = torch.randn(B, N, 2 * keys + sum(widths), generator=generator)
    dout = torch.randn(B, N, sum(widths), generator=generator)
    return qkv.to(dtype), dout.to(dtype)


def run(function, qkv, dout, *arguments):
    """out and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *arguments)
    out.backward(dout)
    return out.detach(), qkv.grad


def check(qkv, dout, key_widths, widths):
    arguments = key_widths, widths, SCALE
    exact = run(ragged_attention_ref, qkv.double(), dout.double(), *arguments)
    same_dtype = run(ragged_attention_ref, qkv, dout, *arguments)
    found = run(ragged_attention, qkv, dout, *arguments)
    for name, out, ref64, torchs in zip(("out", "dqkv"), found, exact, same_dtype, strict=True):
        assert_close_to_float64(out, ref64, torchs, name)
    with torch.no_grad():
        out = ragged_attention(qkv, *arguments)
    assert_close_to_float64(out, exact[0], same_dtype[0], "out without gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(("B", "N", "head_dim"), [(1, 1, 16), (2, 17, 64), (3, 77, 20)])
def test_values_and_gradients_are_within_the_error_rule(B, N, head_dim, widths, dtype):
    check(*inputs(B, N, head_dim, widths, DTYPES[dtype]), head_dim, widths)


# Key widths as a cut to a low rank leaves them: odd, unequal, around 16, and no more than one.
KEY_WIDTHS = [(16, 1, 7, 64), (15, 17, 37, 16), (8, 24, 16, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(37, 1, 64, 15), (16, 16, 16, 16)], ids=str)
@pytest.mark.parametrize("key_widths", KEY_WIDTHS, ids=str)
@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 17), (3, 77)])
def test_heads_with_key_widths_of_their_own_are_within_the_error_rule(B, N, key_widths, widths, dtype):
    check(*inputs(B, N, key_widths, widths, DTYPES[dtype]), key_widths, widths)


def test_one_key_width_stands_for_equal_ones():
    qkv, dout = inputs(2, 9, 16, (5, 12))
    one, each = (run(ragged_attention, qkv, dout, keys, (5, 12), SCALE) for keys in (16, (16, 16)))
    assert all(map(torch.equal, one, each))


def test_each_head_reads_its_own_queries_and_keys():
    keys, widths, N = (16, 3, 9), (5, 12, 2), 9
    qkv, _ = inputs(2, N, keys, widths)
    out = ragged_attention(qkv, keys, widths, SCALE).split(widths, dim=-1)
    parts = qkv.split((*keys, *keys, *widths), dim=-1)
    for head, (q, k, v) in enumerate(zip(parts[:3], parts[3:6], parts[6:], strict=True)):
        alone = ragged_attention(torch.cat([q, k, v], dim=-1), keys[head], (widths[head],), SCALE)
        torch.testing.assert_close(out[head], alone)


@pytest.mark.parametrize("keys", [4, (1, 4, 6)], ids=str)
@pytest.mark.parametrize("widths", [(3, 1, 5), (2, 2, 2)], ids=str)
def test_gradients_are_those_of_finite_differences(keys, widths):
    qkv, _ = inputs(2, 5, keys, widths, torch.float64)
    qkv.requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: ragged_attention(qkv, keys, widths, SCALE), (qkv,))


@pytest.mark.parametrize(
    "kind",
    [pytest.param("strided-rows", id="padded"), "transposed", "misaligned", "every-other-column"],
)
@pytest.mark.parametrize(
    ("keys", "widths"), [(16, (37, 1, 15)), (16, (16, 16)), ((17, 3, 12), (37, 1, 15))], ids=str
)
def test_layouts_of_qkv_and_of_the_gradient_change_nothing(kind, keys, widths):
    qkv, dout = inputs(2, 9, keys, widths)
    expected = run(ragged_attention, qkv, dout, keys, widths, SCALE)
    got = run(ragged_attention, with_layout(kind, qkv), with_layout(kind, dout), keys, widths, SCALE)
    for name, a, b in zip(("out", "dqkv"), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize(("keys", "widths"), [(16, (3, 1, 5)), (16, (4, 4)), ((2, 16), (4, 4))], ids=str)
def test_no_images_or_no_tokens(B, N, keys, widths):
    qkv, dout = inputs(B, N, keys, widths)
    out, dqkv = run(ragged_attention, qkv, dout, keys, widths, SCALE)
    assert out.shape == dout.shape and dqkv.shape == qkv.shape


def test_rows_of_the_results_start_at_16_bytes():
    for keys, widths in (
        ((16,) * 3, (37, 1, 15)),
        ((16, 16), (16, 16)),
        ((16,), (13,)),
        ((5, 16), (3, 4)),
    ):
        qkv, dout = inputs(2, 9, keys, widths)
        saved = torch.ops.vtp.ragged_attention(qkv, keys, widths, SCALE, True)
        dqkv = torch.ops.vtp.ragged_attention_backward(dout, qkv, *saved, keys, widths, SCALE)
        for t in (ragged_attention(qkv, keys, widths, SCALE), saved[0], dqkv):
            row = _round_up(t.shape[-1], 8)
            assert t.stride() == (9 * row, row, 1)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [3, 32 + 5, 64 + 40], ids=["query", "key", "value"])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_infinities_and_nan_go_through_as_in_pytorch(column, special, needs_gradient):
    qkv, _ = inputs(2, 9, 16, (37, 12))
    qkv[1, 4, column] = special
    expected = ragged_attention_ref(qkv, 16, (37, 12), SCALE)
    got = ragged_attention(qkv.requires_grad_(needs_gradient), 16, (37, 12), SCALE).detach()
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("keys", [(16, 16), (21, 11)], ids=str)
def test_the_log_sum_exp_is_that_of_the_scores_in_base_2(keys):
    qkv, _ = inputs(2, 9, keys, (5, 12))
    _, lse = torch.ops.vtp.ragged_attention(qkv, keys, (5, 12), SCALE, True)
    queries, keys = (t.split(keys, dim=-1) for t in qkv[..., :64].split(32, dim=-1))
    for head, (q, k) in enumerate(zip(queries, keys, strict=True)):
        expected = (q @ k.transpose(-2, -1) * SCALE).logsumexp(-1) / math.log(2)
        torch.testing.assert_close(lse[:, head], expected)


@pytest.mark.parametrize("keys", [(16, 16), (21, 11)], ids=str)
def test_the_scale_is_the_one_given(keys):
    qkv, _ = inputs(1, 9, keys, (5, 12))
    torch.testing.assert_close(
        ragged_attention(qkv, keys, (5, 12), 0.0)[0], qkv[0, :, 64:].mean(0).expand(9, -1)
    )


def test_there_is_no_second_derivative_and_it_says_so():
    qkv, _ = inputs(1, 5, 16, (5, 12))
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(ragged_attention(qkv, 16, (5, 12), SCALE).sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("keys", "columns"), [(16, 32), ((16, 7), 23)], ids=str)
def test_flops_are_those_of_the_products_that_are_kept(keys, columns):
    qkv, dout = inputs(2, 9, keys, (5, 12))
    with FlopCounterMode(display=False) as forward:
        out = ragged_attention(qkv.requires_grad_(), keys, (5, 12), SCALE)
    with FlopCounterMode(display=False) as backward:
        out.backward(dout)
    assert forward.get_total_flops() == 2 * 2 * 9 * 9 * (columns + 17)
    assert backward.get_total_flops() == 2 * 2 * 9 * 9 * (3 * columns + 2 * 17)


class TestTiling:
    """What is launched is near what is kept."""

    @pytest.mark.parametrize("N", [1, 5, 16, 17, 48, 49, 64, 77, 197, 208, 256, 577, 1025, 4097])
    @pytest.mark.parametrize("block", [16, 32, 64])
    def test_rows_are_rounded_up_to_sixteen(self, N, block):
        tiles = row_tiles(N, block)
        assert sum(tiles) == _round_up(N, 16)
        assert tiles == sorted(tiles, reverse=True) and set(tiles) <= {block, 16}

    @pytest.mark.parametrize("widths", [*WIDTHS, (256, 256, 255, 1, 80, 8, 73), (64,) * 12], ids=str)
    @pytest.mark.parametrize("grouped", [False, True])
    def test_units_have_every_column_once_and_no_more_than_accumulators(self, widths, grouped):
        V = sum(widths)
        for padded in {_round_up(V, 8), V + 5}:
            units = _units((7,) * len(widths), widths, grouped, padded)
            reached = [
                (h, c)
                for h, first, end, *_ in units
                for c in range(first, padded if end == V else end)
                if not grouped or c < first // 8 * 8 + _GROUP
            ]
            expected = [(h, c) for h, w in enumerate(widths) for c in range(w)]
            starts = [0, *itertools.accumulate(widths)]
            expected = [(h, starts[h] + c) for h, c in expected]
            expected += [(len(widths) - 1, c) for c in range(V, padded)]
            assert sorted(reached) == expected

    @pytest.mark.parametrize("grouped", [False, True])
    def test_units_have_the_key_of_their_head(self, grouped):
        keys, widths = (16, 1, 37), (100, 3, 17)
        found = {(h, begin, end) for h, *_, begin, end in _units(keys, widths, grouped, 120)}
        assert found == {(0, 0, 16), (1, 16, 17), (2, 17, 54)}

    def test_heavy_heads_come_first(self):
        assert [unit[0] for unit in _units((8, 8, 8), (3, 61, 17), False, 88)] == [1, 2, 0]
        assert [unit[0] for unit in _units((64, 8, 8), (3, 61, 17), False, 88)] == [1, 0, 2]

    @pytest.mark.parametrize(
        ("keys", "columns"),
        [
            ((16, 16, 8), [16, 16, 16]),
            ((32, 32, 32), [32, 32, 32]),
            ((40, 40), [64, 64]),  # of equal widths one product takes all, a power of two
            ((40, 16, 64), [48, 16, 64]),
            ((1, 16, 37), [16, 32, 48]),  # 16 columns from the second on are 17 from a multiple of 8
        ],
        ids=str,
    )
    def test_work_on_keys_is_that_of_each_head_rounded_up_to_sixteen(self, keys, columns):
        assert key_columns(keys) == columns
        values = (32,) * len(keys)
        flops = tiled_flops(2, 197, keys, values)
        assert flops == 2 * 2 * 208 * 208 * (sum(columns) + sum(values))

    def test_work_at_197_tokens_is_that_of_208(self):
        widths = (64,) * 12
        kept = 2 * 8 * 197 * 197 * (64 + 64) * 12
        assert tiled_flops(8, 197, (64,) * 12, widths) / kept == pytest.approx((208 / 197) ** 2)


class TestTransforms:
    """Autocast, compilation and export."""

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("keys", [(16, 16), (16, 7)], ids=str)
    @pytest.mark.parametrize("widths", [(5, 12), (8, 8)], ids=str)
    def test_opcheck(self, keys, widths):
        qkv, dout = inputs(2, 9, keys, widths)
        for need_lse in (False, True):
            torch.library.opcheck(torch.ops.vtp.ragged_attention, (qkv, keys, widths, SCALE, need_lse))
        leaf = qkv.clone().requires_grad_()
        torch.library.opcheck(torch.ops.vtp.ragged_attention, (leaf, keys, widths, SCALE, True))
        saved = torch.ops.vtp.ragged_attention(qkv, keys, widths, SCALE, True)
        backward = (dout, qkv, *saved, keys, widths, SCALE)
        torch.library.opcheck(torch.ops.vtp.ragged_attention_backward, backward)

    def test_autocast_computes_in_its_dtype(self):
        qkv, dout = inputs(2, 9, 16, (5, 12))
        leaf = qkv.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = ragged_attention(leaf, 16, (5, 12), SCALE)
        assert out.dtype == torch.bfloat16
        out.backward(dout.bfloat16())
        assert leaf.grad.dtype == torch.float32
        expected = run(ragged_attention, qkv.bfloat16(), dout.bfloat16(), 16, (5, 12), SCALE)
        assert torch.equal(out, expected[0]) and torch.equal(leaf.grad, expected[1].float())

    @pytest.mark.parametrize("keys", [16, (16, 7)], ids=str)
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, keys):
        def results(f, batch):
            return run(f, *inputs(batch, 9, keys, (5, 12)))

        check_compilation(lambda qkv: ragged_attention(qkv, keys, (5, 12), SCALE), results)

    @pytest.mark.parametrize("keys", [16, (16, 7)], ids=str)
    def test_export_with_any_batch(self, keys):
        class Attention(torch.nn.Module):
            def forward(self, qkv):
                return ragged_attention(qkv, keys, (5, 12), SCALE)

        qkv, _ = inputs(3, 9, keys, (5, 12))
        batch = torch.export.Dim("batch")
        with torch.no_grad():
            program = torch.export.export(Attention(), (qkv,), dynamic_shapes=({0: batch},))
        other, _ = inputs(7, 9, keys, (5, 12), seed=1)
        assert torch.equal(program.module()(other), ragged_attention(other, keys, (5, 12), SCALE))


BAD = {
    "qkv-not-a-tensor": (dict(qkv=[1.0]), TypeError, r"qkv: got list, expected a tensor"),
    "qkv-integers": (dict(qkv=torch.ones(2, 5, 49).int()), TypeError, r"qkv: got torch.int32"),
    "qkv-rank": (dict(qkv=torch.ones(5, 49)), ValueError, r"qkv: got shape \(5, 49\), expected \[B, N, 49\]"),
    "qkv-width": (dict(qkv=torch.ones(2, 5, 50)), ValueError, r"qkv: got shape \(2, 5, 50\)"),
    "keys-zero": (dict(key_widths=0), ValueError, r"key_widths: got 0, expected a positive number"),
    "keys-none": (dict(key_widths=()), ValueError, r"key_widths: got \(\), expected .* each of 2 heads"),
    "keys-too-few": (dict(key_widths=(16,)), ValueError, r"key_widths: got \(16,\), .* each of 2 heads"),
    "keys-one-zero": (dict(key_widths=(16, 0)), ValueError, r"key_widths: got \(16, 0\)"),
    "keys-one-negative": (dict(key_widths=(17, -1)), ValueError, r"key_widths: got \(17, -1\)"),
    "keys-float": (dict(key_widths=8.0), TypeError, r"key_widths: got 8.0, expected an integer or a tuple"),
    "keys-floats": (dict(key_widths=(8.0, 8)), TypeError, r"key_widths: got \(8.0, 8\)"),
    "keys-of-another-sum": (dict(key_widths=(8, 9)), ValueError, r"expected \[B, N, 51\] .* 17 columns"),
    "widths-none": (dict(value_widths=()), ValueError, r"value_widths: got \(\)"),
    "widths-zero": (dict(value_widths=(17, 0)), ValueError, r"value_widths: got \(17, 0\)"),
    "widths-257": (dict(value_widths=(257,)), ValueError, r"value_widths: got \(257,\)"),
    "widths-float": (dict(value_widths=(5.0, 12)), TypeError, r"value_widths: got \(5.0, 12\)"),
    "widths-number": (dict(value_widths=17), TypeError, r"value_widths: got 17"),
    "scale-nan": (dict(scale=float("nan")), ValueError, r"scale: got nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD[case]
    arguments = dict(qkv=torch.ones(2, 5, 49), key_widths=8, value_widths=(5, 12), scale=SCALE) | change
    with pytest.raises(error, match=message):
        ragged_attention(**arguments)
