"""The op `rotate_heads` as users call it, in place, of a product: values, gradients, layouts, transforms."""

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.numerics import assert_close_to_float64
from tests.support.op_checks import LAYOUTS, check_compilation, check_export, leaves, saved_by, with_layout
from vtp_kernels import (
    compact_linear,
    ragged_attention,
    rotate_heads,
    rotate_heads_,
    rotated_attention,
    rotated_linear,
)
from vtp_kernels.rotary import rotate_heads_ref, rotated_attention_ref

NAMES = ("out", "dqkv", "drope")
# Of qkv, and of rope.
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}
# Images, tokens, prefix tokens, heads, width of each, columns of values.
SHAPES = [
    (2, 1, 0, 1, 2, 1),
    (3, 17, 1, 2, 6, 15),
    (2, 15, 5, 3, 16, 37),
    (1, 61, 1, 3, 30, 61),
    (2, 15, 0, 2, 32, 115),
    (1, 197, 1, 2, 64, 15),
    (1, 17, 5, 2, 80, 0),
]


def inputs(B, N, prefix, H, d, V, dtypes="f32", own_tables=False, seed=0):
    """qkv, rope of any numbers, dout."""
    g = torch.Generator().manual_seed(seed)
    dtype, table = DTYPES[dtypes]
    qkv, dout = (torch.randn((B, N, 2 * H * d + V), generator=g).to(dtype) for _ in range(2))
    rope = torch.randn((*(H,) * own_tables, N - prefix, 2 * d), generator=g).to(table)
    return qkv, rope, dout


def run(function, qkv, rope, dout, H, prefix, rotate_half):
    """out and the gradients of qkv and rope."""
    qkv, rope = leaves((qkv, rope))
    out = function(qkv, rope, (rope.shape[-1] // 2,) * H, prefix, rotate_half)
    out.backward(dout)
    return out.detach(), qkv.grad, rope.grad


def references(qkv, rope, dout, *arguments):
    """The definition in float64, and in the dtypes given."""
    yield run(rotate_heads_ref, qkv.double(), rope.double(), dout.double(), *arguments)
    yield run(rotate_heads_ref, qkv, rope, dout, *arguments)


@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_all_gradients_are_within_the_error_rule(shape, dtypes, own_tables, rotate_half):
    _, _, prefix, H, _, _ = shape
    tensors = inputs(*shape, dtypes, own_tables)
    arguments = H, prefix, rotate_half
    results = run(rotate_heads, *tensors, *arguments)
    for name, out, ref64, torchs in zip(NAMES, results, *references(*tensors, *arguments), strict=True):
        assert out.dtype == torchs.dtype, name
        assert_close_to_float64(out, ref64, torchs, name)


@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
def test_it_is_what_timm_computes(own_tables, rotate_half):
    B, N, prefix, H, d, V = 2, 20, 4, 3, 16, 24
    qkv, rope, _ = inputs(B, N, prefix, H, d, V, own_tables=own_tables)
    query, key, value = qkv.split((H * d, H * d, V), dim=-1)
    expected = []
    for x in (query, key):
        x = x.unflatten(-1, (H, d)).transpose(1, 2).clone()
        x[:, :, prefix:] = apply_rot_embed_cat(x[:, :, prefix:], rope, half=rotate_half)
        expected.append(x.transpose(1, 2).flatten(-2))
    out = rotate_heads(qkv, rope, (d,) * H, prefix, rotate_half)
    torch.testing.assert_close(out, torch.cat([*expected, value], dim=-1))


ROTATE_HALF = pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
OWN_TABLES = pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])


@ROTATE_HALF
@OWN_TABLES
def test_gradients_are_those_of_finite_differences(own_tables, rotate_half):
    qkv, rope, _ = (t.double() for t in inputs(2, 3, 1, 2, 4, 3, own_tables=own_tables))

    def function(qkv, rope):
        return rotate_heads(qkv, rope, (4, 4), 1, rotate_half)

    assert torch.autograd.gradcheck(function, leaves((qkv, rope)))


@ROTATE_HALF
@pytest.mark.parametrize("dtypes", ["f32", "bf16"])
def test_prefix_tokens_and_values_are_the_same_bit_for_bit(dtypes, rotate_half):
    qkv, rope, _ = inputs(2, 7, 3, 2, 6, 5, dtypes)
    qkv[:, 0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    out = rotate_heads(qkv, rope, (6, 6), 3, rotate_half)
    bits = torch.int32 if dtypes == "f32" else torch.int16
    for part in (lambda t: t[:, :3], lambda t: t[..., 24:]):
        assert torch.equal(part(out).contiguous().view(bits), part(qkv).contiguous().view(bits))


@ROTATE_HALF
def test_a_table_of_zero_angles_changes_nothing(rotate_half):
    qkv, _, _ = inputs(2, 7, 1, 2, 6, 5)
    rope = torch.cat([torch.zeros(6, 6), torch.ones(6, 6)], dim=-1)
    assert torch.equal(rotate_heads(qkv, rope, (6, 6), 1, rotate_half), qkv)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["qkv", "rope"])
def test_a_gradient_alone_is_that_beside_the_other(needs):
    *tensors, dout = inputs(2, 9, 1, 2, 6, 5)
    expected = run(rotate_heads, *tensors, dout, 2, 1, True)[1:]
    given = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    rotate_heads(*given, (6, 6), 1, True).backward(dout)
    for t, need, gradient in zip(given, needs, expected, strict=True):
        assert (t.grad is not None) == need
        assert not need or torch.equal(t.grad, gradient)


def test_qkv_is_saved_only_for_the_gradient_of_rope():
    qkv, rope, _ = inputs(2, 9, 1, 2, 6, 5)
    (qkv,) = leaves((qkv,))
    assert set(saved_by(rotate_heads, qkv, rope, (6, 6), 1, False)) == {rope.data_ptr()}
    (rope,) = leaves((rope,))
    saved = set(saved_by(rotate_heads, qkv, rope, (6, 6), 1, False))
    assert saved == {qkv.data_ptr(), rope.data_ptr()}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_of_inputs_and_of_the_gradient_change_nothing(kind):
    qkv, rope, dout = inputs(3, 9, 1, 2, 6, 5)
    expected = run(rotate_heads, qkv, rope, dout, 2, 1, False)
    qkv, rope = (with_layout(kind, t).detach().requires_grad_() for t in (qkv, rope))
    out = rotate_heads(qkv, rope, (6, 6), 1, False)
    out.backward(with_layout(kind, dout))
    for name, a, b in zip(NAMES, (out.detach(), qkv.grad, rope.grad), expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,), (2, 0)], ids=str)
def test_any_leading_shape_even_an_empty_one(lead):
    g = torch.Generator().manual_seed(1)
    qkv, dout = torch.randn((2, *lead, 7, 29), generator=g)
    rope = torch.randn(6, 12, generator=g)
    got, expected = (run(f, qkv, rope, dout, 2, 1, True) for f in (rotate_heads, rotate_heads_ref))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@OWN_TABLES
@pytest.mark.parametrize("N", [0, 3], ids=["no-tokens", "prefix-tokens-only"])
def test_without_tokens_to_rotate(N, own_tables):
    qkv, rope, dout = inputs(2, N, N, 2, 6, 5, own_tables=own_tables)
    out, dqkv, drope = run(rotate_heads, qkv, rope, dout, 2, N, True)
    assert torch.equal(out, qkv) and torch.equal(dqkv, dout) and drope.shape == rope.shape


@pytest.mark.parametrize("V", [0, 5, 8])
def test_rows_of_results_start_at_multiples_of_eight(V):
    qkv, rope, dout = inputs(2, 3, 1, 2, 6, V)
    width = 24 + V + 7 & ~7
    out = rotate_heads(qkv, rope, (6, 6), 1, False)
    assert out.stride() == (3 * width, width, 1)
    assert not out.as_strided((2, 3, width), out.stride())[..., 24 + V :].any()
    dqkv, _ = torch.ops.vtp.rotate_heads_backward(dout, rope, None, 2, 1, False, True)
    assert dqkv.stride() == out.stride()


def test_there_is_no_second_derivative_and_it_says_so():
    qkv, rope, _ = inputs(2, 3, 1, 2, 6, 5)
    (qkv,) = leaves((qkv,))
    out = rotate_heads(qkv, rope, (6, 6), 1, False)
    (dqkv,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="rotate_heads has no second derivative"):
        dqkv.sum().backward()


class TestInPlace:
    """`rotate_heads_`."""

    @ROTATE_HALF
    @OWN_TABLES
    @pytest.mark.parametrize("dtypes", DTYPES)
    def test_it_is_rotate_heads_and_returns_what_it_was_given(self, dtypes, own_tables, rotate_half):
        qkv, rope, _ = inputs(2, 17, 3, 2, 30, 37, dtypes, own_tables)
        expected = rotate_heads(qkv, rope, (30, 30), 3, rotate_half)
        assert rotate_heads_(qkv, rope, (30, 30), 3, rotate_half) is qkv
        assert torch.equal(qkv, expected)

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_in_any_layout_and_what_lies_between_the_rows_is_left(self, kind):
        qkv, rope, _ = inputs(3, 9, 1, 2, 6, 5)
        expected = rotate_heads(qkv, rope, (6, 6), 1, False)
        given = with_layout(kind, qkv)
        before = given.untyped_storage().nbytes() // 4 - given.numel()
        rotate_heads_(given, rope, (6, 6), 1, False)
        assert torch.equal(given, expected)
        assert given.new_empty(0).set_(given.untyped_storage()).isnan().sum() == before

    def test_a_gradient_is_refused_by_name(self):
        qkv, rope, _ = inputs(2, 3, 1, 2, 6, 5)
        with pytest.raises(RuntimeError, match="qkv: needs a gradient"):
            rotate_heads_(qkv.clone().requires_grad_(), rope, (6, 6), 1, False)
        with pytest.raises(RuntimeError, match="rope: needs a gradient"):
            rotate_heads_(qkv, rope.clone().requires_grad_(), (6, 6), 1, False)
        with torch.no_grad():
            rotate_heads_(qkv, rope.clone().requires_grad_(), (6, 6), 1, False)

    def test_who_has_saved_it_for_a_backward_pass_notices(self):
        qkv, rope, _ = inputs(2, 3, 1, 2, 6, 5)
        factor = torch.ones((), requires_grad=True)
        product = (qkv * factor).sum()  # saves qkv
        rotate_heads_(qkv, rope, (6, 6), 1, False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    def test_in_inference_mode(self):
        with torch.inference_mode():
            qkv, rope, _ = inputs(2, 3, 1, 2, 6, 5)
            expected = rotate_heads(qkv, rope, (6, 6), 1, False)
            assert torch.equal(rotate_heads_(qkv, rope, (6, 6), 1, False), expected)

    def test_elements_that_share_memory_are_refused(self):
        qkv, rope, _ = inputs(1, 3, 1, 2, 6, 5)
        with pytest.raises(ValueError, match=r"qkv: got strides \(0, 29, 1\)"):
            rotate_heads_(qkv.expand(2, -1, -1), rope, (6, 6), 1, False)


def operands(B, N, prefix, H, d, V, dtypes="f32", own_tables=False, K=17):
    """x, weight, bias and rope of a product that makes such a qkv."""
    g = torch.Generator().manual_seed(1)
    dtype, _ = DTYPES[dtypes]
    _, rope, _ = inputs(B, N, prefix, H, d, V, dtypes, own_tables)
    shapes = (B, N, K), (2 * H * d + V, K), (2 * H * d + V,)
    return *(torch.randn(shape, generator=g).to(dtype) for shape in shapes), rope


class TestOfAProduct:
    """`rotated_linear`."""

    @ROTATE_HALF
    @OWN_TABLES
    @pytest.mark.parametrize("dtypes", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
    def test_it_is_a_product_and_its_rotation(self, shape, dtypes, own_tables, rotate_half):
        x, weight, bias, rope = operands(*shape, dtypes, own_tables)
        _, _, prefix, H, d, _ = shape
        for given in (bias, None):
            expected = rotate_heads(
                compact_linear(x, weight, given), rope, (d,) * H, prefix, rotate_half
            )  # fmt: skip
            out = rotated_linear(x, weight, given, rope, (d,) * H, prefix, rotate_half)
            assert torch.equal(out, expected) and out.stride() == expected.stride()

    @pytest.mark.parametrize("lead", [(), (2, 3), (0,)], ids=str)
    def test_any_leading_shape_even_an_empty_one(self, lead):
        _, weight, bias, rope = operands(1, 7, 1, 2, 6, 5)
        x = torch.ones(*lead, 7, 17)
        expected = rotate_heads(compact_linear(x, weight, bias), rope, (6, 6), 1, True)
        assert torch.equal(rotated_linear(x, weight, bias, rope, (6, 6), 1, True), expected)

    def test_a_gradient_is_refused_by_name(self):
        given = operands(1, 7, 1, 2, 6, 5)
        for i, name in enumerate(("x", "weight", "bias", "rope")):
            leaf = [t.clone().requires_grad_(i == j) for j, t in enumerate(given)]
            with pytest.raises(RuntimeError, match=f"{name}: needs a gradient"):
                rotated_linear(*leaf, (6, 6), 1, True)
            with torch.no_grad():
                rotated_linear(*leaf, (6, 6), 1, True)

    @OWN_TABLES
    def test_opcheck(self, own_tables):
        given = operands(2, 7, 1, 2, 6, 5, "bf16-f32", own_tables)
        torch.library.opcheck(torch.ops.vtp.rotated_linear, (*given, 2, 1, True))

    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self):
        def results(f, batch):
            return (f(*operands(batch, 7, 1, 2, 6, 5), (6, 6), 1, True),)

        check_compilation(rotated_linear, results)

    @torch.no_grad()
    def test_exports_with_a_dynamic_batch(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                _, *tensors = operands(1, 7, 1, 2, 6, 5)
                for name, tensor in zip(("weight", "bias", "rope"), tensors, strict=True):
                    self.register_buffer(name, tensor)

            def forward(self, x):
                return rotated_linear(x, self.weight, self.bias, self.rope, (6, 6), 1, True)

        check_export(Layer(), (7, 17))

    def test_autocast_computes_in_its_dtype(self):
        x, weight, bias, rope = operands(2, 7, 1, 2, 6, 5)
        with torch.autocast("cpu", torch.bfloat16):
            out = rotated_linear(x, weight, bias, rope, (6, 6), 1, True)
        expected = rotated_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), rope, (6, 6), 1, True)
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)

    def test_its_product_is_counted(self):
        with FlopCounterMode(display=False) as counter:
            rotated_linear(*operands(2, 7, 1, 2, 6, 5), (6, 6), 1, True)
        assert counter.get_total_flops() == 2 * 14 * 17 * 29

    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            (dict(x=[1.0]), TypeError, "x: got list, expected a tensor"),
            (dict(x=torch.ones(17)), ValueError, r"x: got shape \(17,\), expected \[..., N, 17\]"),
            (dict(x=torch.ones(2, 7, 16)), ValueError, r"x: got shape \(2, 7, 16\), expected \[..., 17\]"),
            (dict(weight=torch.ones(29, 17).half()), TypeError, "weight: got torch.float16"),
            (dict(weight=torch.ones(23, 17), bias=None), ValueError, r"x @ weight.T: got shape \(2, 7, 23\)"),
            (dict(bias=torch.ones(28)), ValueError, r"bias: got shape \(28,\), expected \[29\]"),
            (dict(rope=torch.ones(7, 12)), ValueError, r"rope: got shape \(7, 12\), expected \[6, 12\]"),
            (dict(key_widths=(5, 5)), ValueError, r"key_widths: got \(5, 5\)"),
            (dict(prefix_tokens=8), ValueError, "prefix_tokens: got 8, expected 0 to 7"),
        ],
    )
    def test_bad_input_is_refused_by_name(self, change, error, says):
        names = "x", "weight", "bias", "rope", "key_widths", "prefix_tokens", "rotate_half"
        good = dict(zip(names, (*operands(2, 7, 1, 2, 6, 5), (6, 6), 1, True), strict=True))
        with pytest.raises(error, match=says):
            rotated_linear(**good | change)


# Columns of values of each head.
VALUES = {1: (1,), 2: (9, 6), 3: (20, 1, 16)}


def of_attention(B, N, prefix, H, d, dtypes="f32", own_tables=False):
    """What `rotated_attention` takes, but for rotate_half."""
    widths = VALUES[H]
    qkv, rope, _ = inputs(B, N, prefix, H, d, sum(widths), dtypes, own_tables)
    return qkv, (d,) * H, widths, 0.3 * d**-0.5, rope, prefix


class TestOfAttention:
    """`rotated_attention`."""

    @ROTATE_HALF
    @OWN_TABLES
    @pytest.mark.parametrize("dtypes", DTYPES)
    @pytest.mark.parametrize("shape", [(2, 1, 0, 1, 2), (3, 17, 1, 2, 6), (2, 15, 5, 3, 16)], ids=str)
    def test_it_is_attention_behind_the_rotation(self, shape, dtypes, own_tables, rotate_half):
        qkv, keys, widths, scale, rope, prefix = given = of_attention(*shape, dtypes, own_tables)
        out = rotated_attention(*given, rotate_half)
        rotated = rotate_heads(qkv, rope, keys, prefix, rotate_half)
        expected = ragged_attention(rotated, keys, widths, scale)
        assert torch.equal(out, expected) and out.stride() == expected.stride()
        exact = rotated_attention_ref(qkv.double(), keys, widths, scale, rope.double(), prefix, rotate_half)
        assert_close_to_float64(out, exact, rotated_attention_ref(*given, rotate_half))

    @pytest.mark.parametrize(("B", "N", "prefix"), [(0, 7, 1), (2, 0, 0), (2, 3, 3)], ids=str)
    def test_without_images_tokens_or_any_that_is_rotated(self, B, N, prefix):
        qkv, keys, widths, scale, *rotation = of_attention(B, N, prefix, 2, 6)
        out = rotated_attention(qkv, keys, widths, scale, *rotation, True)
        assert torch.equal(out, ragged_attention(qkv, keys, widths, scale))

    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_layouts_of_qkv_change_nothing(self, kind):
        qkv, *others = of_attention(3, 9, 1, 2, 6)
        expected = rotated_attention(qkv, *others, False)
        torch.testing.assert_close(rotated_attention(with_layout(kind, qkv), *others, False), expected)

    def test_a_gradient_is_refused_by_name(self):
        given = of_attention(1, 7, 1, 2, 6)
        for i, name in ((0, "qkv"), (4, "rope")):
            leaf = [t.clone().requires_grad_() if i == j else t for j, t in enumerate(given)]
            with pytest.raises(RuntimeError, match=f"{name}: needs a gradient"):
                rotated_attention(*leaf, True)
            with torch.no_grad():
                rotated_attention(*leaf, True)

    @OWN_TABLES
    def test_opcheck(self, own_tables):
        given = of_attention(2, 7, 1, 2, 6, "bf16-f32", own_tables)
        torch.library.opcheck(torch.ops.vtp.rotated_attention, (*given, True))

    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self):
        def results(f, batch):
            return (f(*of_attention(batch, 7, 1, 2, 6), True),)

        check_compilation(rotated_attention, results)

    @torch.no_grad()
    def test_exports_with_a_dynamic_batch(self):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                _, *self.how, rope, self.prefix = of_attention(1, 7, 1, 2, 6)
                self.register_buffer("rope", rope)

            def forward(self, qkv):
                return rotated_attention(qkv, *self.how, self.rope, self.prefix, True)

        check_export(Layer(), (7, 39))

    def test_autocast_computes_in_its_dtype(self):
        qkv, *others = of_attention(2, 7, 1, 2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            out = rotated_attention(qkv, *others, True)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, rotated_attention(qkv.bfloat16(), *others, True))

    def test_its_products_are_counted(self):
        with FlopCounterMode(display=False) as counter:
            rotated_attention(*of_attention(2, 7, 1, 2, 6), True)
        assert counter.get_total_flops() == 2 * 2 * 7 * 7 * (2 * 6 + 15)

    @pytest.mark.parametrize(
        ("change", "error", "says"),
        [
            (dict(qkv=[1.0]), TypeError, "qkv: got list, expected a tensor"),
            (dict(qkv=torch.ones(7, 39)), ValueError, r"qkv: got shape \(7, 39\), expected \[B, N, 39\]"),
            (dict(qkv=torch.ones(2, 7, 38)), ValueError, r"qkv: got shape \(2, 7, 38\), expected \[B, N, 3"),
            (dict(key_widths=6), TypeError, "key_widths: got 6, expected a tuple of integers"),
            (dict(key_widths=(8, 4)), ValueError, r"key_widths: got \(8, 4\), expected one even width"),
            (dict(key_widths=(6,)), ValueError, r"key_widths: got \(6,\), expected a positive number"),
            (dict(value_widths=(15, 0)), ValueError, r"value_widths: got \(15, 0\)"),
            (dict(scale=float("nan")), ValueError, "scale: got nan"),
            (dict(rope=None), TypeError, "rope: got NoneType"),
            (dict(rope=torch.ones(7, 12)), ValueError, r"rope: got shape \(7, 12\), expected \[6, 12\]"),
            (dict(prefix_tokens=8), ValueError, "prefix_tokens: got 8, expected 0 to 7"),
            (dict(rotate_half=1), TypeError, "rotate_half: got 1, expected a bool"),
        ],
    )
    def test_bad_input_is_refused_by_name(self, change, error, says):
        names = "qkv", "key_widths", "value_widths", "scale", "rope", "prefix_tokens", "rotate_half"
        good = dict(zip(names, (*of_attention(2, 7, 1, 2, 6), True), strict=True))
        with pytest.raises(error, match=says):
            rotated_attention(**good | change)


class Rotation(nn.Module):
    """A product in front, so that what is written in place is no input of the model."""

    def __init__(self, function):
        super().__init__()
        _, rope, _ = inputs(1, 7, 1, 2, 6, 5)
        self.register_buffer("rope", rope)
        self.qkv, self.function = nn.Linear(11, 29), function

    def forward(self, x):
        return self.function(self.qkv(x), self.rope, (6, 6), 1, True) * 2


class TestTransforms:
    """opcheck, autocast, compilation, export."""

    @pytest.mark.covering(1)
    @pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
    @OWN_TABLES
    def test_opcheck(self, own_tables, dtypes):
        qkv, rope, dout = inputs(2, 7, 1, 2, 6, 5, dtypes, own_tables)
        for rotate_half in (False, True):
            arguments = 2, 1, rotate_half
            torch.library.opcheck(torch.ops.vtp.rotate_heads, (*leaves((qkv, rope)), *arguments))
            torch.library.opcheck(torch.ops.vtp.rotate_heads_, (qkv.clone(), rope, *arguments))
            for x, need in ((qkv, True), (None, True), (qkv, False)):
                given = dout, rope, x, *arguments, need
                torch.library.opcheck(torch.ops.vtp.rotate_heads_backward, given)

    def test_autocast_changes_nothing(self):
        qkv, rope, dout = inputs(2, 7, 1, 2, 6, 5)
        expected = run(rotate_heads, qkv, rope, dout, 2, 1, False)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(rotate_heads, qkv, rope, dout, 2, 1, False)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @OWN_TABLES
    def test_compiles_without_breaks_and_without_recompiling_for_the_batch(self, own_tables):
        def results(f, batch):
            return run(f, *inputs(batch, 7, 1, 3, 6, 5, own_tables=own_tables), 3, 1, True)

        check_compilation(rotate_heads, results)

    def test_in_place_compiles_without_breaks_and_is_written(self):
        def function(qkv, rope):
            rotate_heads_(qkv, rope, (6, 6), 1, True)
            return qkv + 1

        def results(f, batch):
            qkv, rope, _ = inputs(batch, 7, 1, 2, 6, 5)
            return f(qkv, rope), qkv

        check_compilation(function, results)

    @pytest.mark.parametrize("function", [rotate_heads, rotate_heads_], ids=["copy", "in-place"])
    @torch.no_grad()
    def test_exports_with_a_dynamic_batch(self, function):
        check_export(Rotation(function), (7, 11))


BAD = {
    "qkv-not-a-tensor": (dict(qkv=[1.0]), TypeError, r"qkv: got list, expected a tensor"),
    "qkv-integers": (dict(qkv=torch.ones(2, 7, 29).int()), TypeError, r"qkv: got torch.int32"),
    "qkv-vector": (dict(qkv=torch.ones(29)), ValueError, r"qkv: got shape \(29,\), expected \[\.\.\., N"),
    "qkv-narrow": (
        dict(qkv=torch.ones(2, 7, 23)), ValueError,
        r"qkv: got shape \(2, 7, 23\), .* 12 columns of queries",
    ),
    "qkv-device": (dict(qkv=torch.ones(2, 7, 29, device="meta")), ValueError, r"rope: on cpu, expected meta"),
    "rope-none": (dict(rope=None), TypeError, r"rope: got NoneType"),
    "rope-dtype": (dict(rope=torch.ones(6, 12).int()), TypeError, r"rope: got torch.int32"),
    "rope-tokens": (
        dict(rope=torch.ones(7, 12)), ValueError,
        r"rope: got shape \(7, 12\), expected \[6, 12\], or \[2, 6, 12\]",
    ),
    "rope-width": (dict(rope=torch.ones(6, 6)), ValueError, r"rope: got shape \(6, 6\)"),
    "rope-heads": (dict(rope=torch.ones(3, 6, 12)), ValueError, r"rope: got shape \(3, 6, 12\)"),
    "rope-of-images": (dict(rope=torch.ones(2, 1, 6, 12)), ValueError, r"rope: got shape \(2, 1, 6, 12\)"),
    "widths-integer": (dict(key_widths=6), TypeError, r"key_widths: got 6, expected a tuple of integers"),
    "widths-float": (dict(key_widths=(6.0, 6.0)), TypeError, r"key_widths: got \(6.0, 6.0\)"),
    "widths-unequal": (
        dict(key_widths=(6, 4)), ValueError,
        r"key_widths: got \(6, 4\), expected one even width",
    ),
    "widths-odd": (dict(key_widths=(5, 5)), ValueError, r"key_widths: got \(5, 5\)"),
    "widths-none": (dict(key_widths=()), ValueError, r"key_widths: got \(\)"),
    "prefix-many": (dict(prefix_tokens=8), ValueError, r"prefix_tokens: got 8, expected 0 to 7"),
    "prefix-negative": (dict(prefix_tokens=-1), ValueError, r"prefix_tokens: got -1"),
    "prefix-float": (dict(prefix_tokens=1.0), TypeError, r"prefix_tokens: got 1.0, expected an int"),
    "half-none": (dict(rotate_half=None), TypeError, r"rotate_half: got None, expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize("function", [rotate_heads, rotate_heads_], ids=["copy", "in-place"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case, function):
    change, error, message = BAD[case]
    good = dict(
        qkv=torch.ones(2, 7, 29), rope=torch.ones(6, 12), key_widths=(6, 6), prefix_tokens=1,
        rotate_half=False,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        function(**good | change)
