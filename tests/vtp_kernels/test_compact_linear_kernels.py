"""What the kernels of compact_linear compute, proved in the interpreter, and what their launches cost.

The kernels run, through their launchers and through both whole passes, next to protected pages, with poisoned
outputs and NaN in the padding of every input, and are compared with float64. That these proofs bite is in
test_compact_linear_kernel_defects.py.
"""

import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.support.guarded_memory import guarded, replaced
from tests.support.kernel_proofs import (
    assert_compiled_ahead_of_time,
    assert_like,
    assert_padding_is_zero,
    loaded,
    place,
    run_check,
    to_tf32,
)
from tests.support.numerics import assert_close_to_float64
from tests.support.triton_harness import programs
from tests.vtp_kernels import test_rotary
from tests.vtp_kernels.test_compact_linear import DTYPES, EPILOGUES, inputs, leaves, run
from vtp_kernels.library import TritonSides
from vtp_kernels.rotary import rotate_heads_ref
from vtp_kernels.rows import empty_rows

MODULE = "vtp_kernels.compact_linear"
op_module = importlib.import_module(MODULE)

DTYPES = {**DTYPES, "tf32": DTYPES["f32"]}
# What makes small problems take the ways of large ones, and of another GPU.
PATHS = {
    "whole": {},
    "split": {"forced": ("compact_linear", "split")},
    "vendor": {"forced": ("compact_linear", "vendor")},
    "amd": {"attributes": {"is_amd": lambda device: True}},
    "pass": {"forced": ("swiglu", "pass")},
}


@dataclass(frozen=True)
class Case:
    """x [M, K], W [N, K]: their dtypes, how they lie in memory, and which end of it is at the page."""

    M: int
    K: int
    N: int
    dtypes: str
    epilogue: str = "none"  # one of EPILOGUES, or "swiglu", which takes the two halves of N
    layout: str = "padded"
    side: str = "end"
    bias: bool = True

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded") + ["nobias"] * (not self.bias)
        return "-".join([f"M{self.M}-K{self.K}-N{self.N}-{self.dtypes}-{self.epilogue}-{self.side}", *flags])


@dataclass(frozen=True)
class Rotated:
    """A product that makes qkv [B, N, 2 H d + V] of K inputs, and how it is rotated."""

    B: int
    N: int
    prefix: int
    H: int
    d: int
    V: int
    K: int
    dtypes: str = "f32"
    own_tables: bool = False
    rotate_half: bool = False
    layout: str = "padded"
    side: str = "end"
    bias: bool = True

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded") + ["nobias"] * (not self.bias)
        flags += ["own-tables"] * self.own_tables + ["halves"] * self.rotate_half
        sizes = f"B{self.B}-N{self.N}-P{self.prefix}-H{self.H}-d{self.d}-V{self.V}-K{self.K}"
        return "-".join([sizes, self.dtypes, self.side, *flags])


# -- In the worker ------------------------------------------------------------------------------------------


class Data:
    """The tensors of a case, and what the op should make of them."""

    def __init__(self, case):
        self.case = case
        self.activation, has_residual = EPILOGUES.get(case.epilogue, (None, False))
        *tensors, self.dy = inputs(case.M, case.K, case.N, *DTYPES[case.dtypes])
        tensors[2] = tensors[2] if case.bias else None
        tensors[3] = tensors[3] if has_residual else None
        self.tensors = tensors
        self.dy = self.dy.to(tensors[0].dtype)
        multiplied = tensors
        if case.dtypes == "tf32":
            multiplied = [*map(to_tf32, tensors[:2]), *tensors[2:]]
        doubles = [None if t is None else t.double() for t in tensors]
        ref = op_module.compact_linear_ref
        self.exact = run(ref, leaves(doubles), self.dy, self.activation)
        self.same_dtype = run(ref, leaves(multiplied), self.dy, self.activation)
        self.z = F.linear(*doubles[:3]), F.linear(*multiplied[:3])

    @property
    def gelu(self):
        return self.activation == "gelu"

    def placed(self, *tensors):
        layout, side, weight = self.case.layout, self.case.side, self.tensors[1]
        of_weight = "tight" if layout == "images" else layout
        layouts = (of_weight if t is not None and t.shape == weight.shape else layout for t in tensors)
        return [place(t, layout, side, align_vectors=16) for t, layout in zip(tensors, layouts, strict=True)]


class RotatedData:
    """The tensors of a product whose queries and keys are rotated, and what should come out."""

    def __init__(self, case):
        self.case, is_tf32 = case, case.dtypes == "tf32"
        dtype, table = test_rotary.DTYPES["f32" if is_tf32 else case.dtypes]
        M, outputs = case.B * case.N, 2 * case.H * case.d + case.V
        x, weight, bias, *_ = inputs(M, case.K, outputs, dtype, dtype)
        bias = bias if case.bias else None
        self.tensors = x, weight, bias
        shape = *(case.H,) * case.own_tables, case.N - case.prefix, 2 * case.d
        self.rope = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(table)
        multiplied = (*map(to_tf32, (x, weight)), bias) if is_tf32 else self.tensors
        doubles = [None if t is None else t.double() for t in self.tensors]
        self.exact = self._defined(doubles, self.rope.double())
        self.same_dtype = self._defined(multiplied, self.rope)

    def _defined(self, tensors, rope):
        case = self.case
        qkv = F.linear(*tensors).unflatten(0, (case.B, case.N))
        rotated = rotate_heads_ref(qkv, rope, (case.d,) * case.H, case.prefix, case.rotate_half)
        return rotated.flatten(0, 1)

    def placed(self):
        return [place(t, self.case.layout, self.case.side, align_vectors=16) for t in self.tensors]


def prove(check, case, *args, replacements=(), path="whole", **conditions):
    """`check(op, data, ...)` under the case's conditions; keys of the variants that it launched."""
    op = loaded(MODULE, replacements)
    conditions = dict(conditions, **PATHS[path], tf32=case.dtypes == "tf32")
    data = RotatedData(case) if isinstance(case, Rotated) else Data(case)
    # Rows gigabytes apart are too much memory to note every element of.
    with programs(races=case.layout != "far"):
        return run_check(check, op, data, *args, **conditions)


def check_forward(op, data, save=False):
    """The whole pass: the result, and z where it is saved."""
    x, weight, bias, residual = data.placed(*data.tensors)
    arguments = x, weight, bias, data.gelu, residual, save
    found = op._forward_triton(*arguments)
    assert_like(found, op._forward_fake(*arguments))
    out = found[0].reshape(-1, data.case.N)
    assert_close_to_float64(out, data.exact[0], data.same_dtype[0], "out")
    assert_padding_is_zero("out", found[0])
    if save:
        assert_close_to_float64(found[1].reshape(out.shape), *data.z, "z")
        assert_padding_is_zero("z", found[1])


def check_swiglu(op, data):
    """The whole pass with SwiGLU: N / 2 hidden units."""
    x, weight, bias, _ = data.placed(*data.tensors)
    arguments = x, weight, bias, False, None, False, True
    found = op._forward_triton(*arguments)
    assert_like(found, op._forward_fake(*arguments))
    exact, same_dtype = (op.activated(z, "swiglu") for z in data.z)
    assert_close_to_float64(found[0].reshape(exact.shape), exact, same_dtype, "out")
    assert_padding_is_zero("out", found[0])


def check_rotated(op, data):
    """The product with rotation as its epilogue; prefix tokens and values are those without."""
    case, (x, weight, bias) = data.case, data.placed()
    rope = guarded(data.rope, case.side, align=16)
    rotation = op.Rotation(rope, case.H, case.N, case.prefix, case.rotate_half)
    if case.layout == "far":
        out = place(torch.full_like(data.same_dtype, torch.nan), "far", case.side)
        op._launch_fwd(x, weight, bias, False, None, out, None, rotation=rotation)
    else:
        out = op.rotated_product(x, weight, bias, rotation)
        assert_like([out], [empty_rows(*data.exact.shape, dtype=x.dtype, device=x.device)])
        assert_padding_is_zero("out", out)
    assert_close_to_float64(out, data.exact, data.same_dtype, "out")
    product, _ = op._forward_triton(x, weight, bias, False, None, False)
    left = (t.unflatten(0, (case.B, case.N)) for t in (out, product))
    for a, b in zip(*((t[:, : case.prefix], t[..., 2 * case.H * case.d :]) for t in left), strict=True):
        assert torch.equal(a, b)


def halves_of_z(data):
    """z [M, N], which here need not come from any product, with N / 2 gates and as many values.

    Values are of like size: silu has a zero, where what PyTorch rounds depends on whether it was compiled to
    fused multiply-adds, and the product must not be far larger there than elsewhere.
    """
    g = torch.Generator().manual_seed(1)
    gate, value = torch.randn(2, data.case.M, data.case.N // 2, generator=g)
    value = value.sign() * (0.5 + torch.rand(value.shape, generator=g))
    return torch.cat([gate, value], dim=-1).to(data.tensors[0].dtype)


def check_swiglu_fwd(op, data):
    """The pass of its own."""
    z = halves_of_z(data)
    h = op.launch_swiglu(place(z, data.case.layout, data.case.side))
    exact, same_dtype = (op.activated(t, "swiglu") for t in (z.double(), z))
    assert_close_to_float64(h, exact, same_dtype, "h")
    assert_padding_is_zero("h", h)


def check_add(op, data):
    """`add_linear_` where the residual is: only its N columns are written."""
    x, weight, _, residual = data.placed(*data.tensors)
    exact, same_dtype = (
        tensors[3] + F.linear(*tensors[:2])
        for tensors in ([t.double() for t in data.tensors if t is not None], [*data.tensors])
    )
    between = residual.new_empty(0).set_(residual.untyped_storage()).isnan().sum()
    op._add_triton(residual, x, weight)
    assert_close_to_float64(residual.reshape(exact.shape), exact, same_dtype, "residual")
    assert residual.new_empty(0).set_(residual.untyped_storage()).isnan().sum() == between


def check_far(op, data):
    """Every matrix has rows so far apart that 32 bits do not reach."""
    x, weight, bias, residual = data.placed(*data.tensors)
    like = [torch.full_like(data.same_dtype[0], torch.nan), torch.full_like(data.z[1], torch.nan)]
    out, z = data.placed(*like)
    op._launch_fwd(x, weight, bias, data.gelu, residual, out, z)
    assert_close_to_float64(out, data.exact[0], data.same_dtype[0], "out")
    assert_close_to_float64(z, *data.z, "z")


def check_parts(op, data, parts=3):
    """The second stage of a product whose inputs are split."""
    case = data.case
    _, _, bias, residual = data.placed(*data.tensors)
    width = -(-case.N // 8) * 8
    partial = torch.randn(parts, case.M, width, generator=torch.Generator().manual_seed(1))
    products = partial[..., : case.N].clone()
    partial[..., case.N :] = torch.nan
    dtype = data.tensors[0].dtype if residual is None else residual.dtype
    out = empty_rows(case.M, case.N, dtype=dtype, device=bias.device)
    z = empty_rows(case.M, case.N, dtype=data.tensors[0].dtype, device=bias.device)
    finish = op._epilogue(bias, data.gelu, residual, z, out, bias)
    op._launch_parts(guarded(partial, case.side, align=16), case.M, case.N, finish)

    def expected(dtype):
        total = products.to(dtype).sum(0) + data.tensors[2].to(dtype)
        made = F.gelu(total) if data.gelu else total
        return total, made if residual is None else made + data.tensors[3].to(dtype)

    for name, got, exact, torchs in zip(
        ("z", "out"), (z, out), expected(torch.float64), expected(torch.float32), strict=True
    ):
        assert_close_to_float64(got, exact, torchs.to(got.dtype), name)
        assert_padding_is_zero(name, got)


# With GELU or not, and which of dz and the first stage of db. Without GELU dY is dz but for its dtype.
WITH_GELU = ((True, True, True), (True, True, False), (True, False, True))
WITHOUT_GELU = tuple((False, *which) for _, *which in WITH_GELU)
DZ = (*WITH_GELU, WITHOUT_GELU[-1])


def check_dz(op, data, wanted=DZ, dy32=False):
    dy = data.dy.float() if dy32 else data.dy
    dtype = data.tensors[0].dtype
    z = data.z[1].to(dtype)
    for has_z, need_dz, need_db in wanted:
        placed_dy, placed_z = data.placed(dy, z if has_z else None)
        dz, partial = op._launch_dz(placed_dy, placed_z, dtype, need_dz, need_db)
        assert (dz is not None, partial is not None) == (need_dz, need_db)

        def expected(dtype, has_z=has_z):
            return torch.ops.aten.gelu_backward(dy.to(dtype), z.to(dtype)) if has_z else dy.to(dtype)

        exact = expected(torch.float64)
        if need_dz:
            assert_close_to_float64(dz, exact, expected(dtype), "dz")
            assert_padding_is_zero("dz", dz)
        if need_db:
            total = expected(torch.float32).sum(0)
            assert_close_to_float64(partial.sum(0)[: data.case.N], exact.sum(0), total, "db")


def check_db(op, data, rows):
    width = -(-data.case.N // 8) * 8
    partial = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    exact = partial[:, : data.case.N].double().sum(0)
    partial[:, data.case.N :] = torch.nan
    dtype = data.tensors[0].dtype
    db = op._launch_db(guarded(partial, data.case.side, align=16), data.case.N, dtype)
    assert_close_to_float64(db, exact, partial[:, : data.case.N].sum(0).to(dtype), "db")


SUBSETS = [needs for needs in itertools.product((False, True), repeat=3) if any(needs)]


def check_passes(op, data, subsets=SUBSETS):
    """Both whole passes, the backward one for subsets of the gradients."""
    check_forward(op, data, save=data.gelu)
    x, weight = data.placed(*data.tensors[:2])
    out = data.same_dtype[0]
    z = place(data.z[1], "padded", data.case.side) if data.gelu else None
    (dy,) = data.placed(data.dy.to(out.dtype))
    z = z.view(dy.shape) if data.gelu and data.case.layout == "images" else z
    for needs in subsets:
        found = op._backward_triton(dy, x, weight, z, *needs)
        assert_like(found, op._backward_fake(dy, x, weight, z, *needs))
        for i, (got, need) in enumerate(zip(found, needs, strict=True), 1):
            if need:
                shape = data.exact[i].shape
                assert_close_to_float64(
                    got.reshape(shape), data.exact[i], data.same_dtype[i], f"gradient {i}"
                )


def check_expanded_gradient(op, data):
    """dy is one row for all: `out.mean(0).backward(row)` gives such a gradient, with a row stride of 0."""
    x, weight = data.placed(*data.tensors[:2])
    for dy in (data.dy[:1].expand(data.case.M, -1), data.dy[0, 0].expand(data.case.M, data.case.N)):
        got, expected = (
            op._backward_triton(d, x, weight, None, True, True, True) for d in (dy, dy.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def check_nothing_is_copied(op, data):
    """Operands in padded rows are what the kernel reads."""
    placed = data.placed(*data.tensors)
    launch, seen = op.launch, []
    with replaced([(op, "launch", lambda kernel, grid, arguments, *a, **k: seen.append(arguments))]):
        op._forward_triton(*placed[:3], data.gelu, placed[3], False)
    assert launch is op.launch
    (arguments,) = seen
    for name, t in zip(("x", "weight", "bias", "residual"), placed, strict=True):
        assert arguments[name].data_ptr() == t.data_ptr(), name


# -- Correct kernels pass -----------------------------------------------------------------------------------


def run_in(interpreter, check, case, *args, descriptors=False, path="whole", **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time."""
    conditions = dict(descriptors=descriptors, path=path)
    launched = interpreter.run(prove, check, case, *args, **conditions, **kwargs)
    target = "gfx942" if path == "amd" else "sm_90" if descriptors else "sm_80"
    assert_compiled_ahead_of_time(launched, MODULE, target)
    return launched


def kernels(launched):
    """Names of the kernels among the keys of variants."""
    return {key[0].strip("_").removeprefix("compact_linear_").removesuffix("_kernel") for key in launched}


# Rows of one image and of few, and the odd widths of pruned models on both other axes: full tiles of each
# kind, none of a kind, borders of one tile and of several.
ODD = [
    (1, 461, 197),
    (5, 37, 461),
    (8, 197, 37),
    (17, 115, 115),
    (64, 61, 61),
    (69, 17, 461),
    (197, 115, 197),
    (69, 461, 1),
    (197, 15, 15),
    (5, 1, 17),
    (8, 8, 8),
    (69, 128, 160),
]
_NAMES = ["f32", "tf32", "bf16", "f16", "bf16-f32", "f16-f32"]
ODD_CASES = [
    Case(
        *shape,
        _NAMES[(i + 3 * turn + i // 6) % 6],
        epilogue=list(EPILOGUES)[(i + turn) % 4],
        side="begin" if (i + turn) % 2 else "end",
        bias=(i + turn) % 3 > 0,
    )
    for i, shape in enumerate(ODD)
    for turn in range(2)
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_forward_at_odd_widths(interpreter, case, descriptors):
    run_in(interpreter, check_forward, case, descriptors=descriptors)


# Hidden units of SwiGLU are half of the outputs: values that start at 16 bytes, and that do not; columns of
# results in tiles of each kind, in several of them, and padding behind the last.
SWIGLU_CASES = [
    Case(*shape, _NAMES[i % 4], "swiglu", side=("end", "begin")[i % 2], bias=i % 3 > 0)
    for i, shape in enumerate(
        [
            (1, 17, 2),
            (5, 461, 2 * 37),
            (8, 37, 2 * 61),
            (17, 115, 2 * 15),
            (69, 61, 2 * 115),
            (64, 15, 2 * 64),
            (69, 197, 2 * 17),
            (197, 1, 2 * 197),
            (37, 115, 2 * 461),
            (9, 64, 2 * 136),
        ]
    )
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", SWIGLU_CASES, ids=str)
def test_swiglu_at_odd_widths(interpreter, case, descriptors):
    launched = run_in(interpreter, check_swiglu, case, descriptors=descriptors)
    assert kernels(launched) == {"fwd"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", ["tight", "wide", "misaligned", "transposed", "images"])
@pytest.mark.parametrize("path", ["whole", "split", "vendor", "amd", "pass"])
def test_swiglu_on_every_path_in_every_layout(interpreter, path, layout):
    """Where the product is not the op's own, or a pass is forced, there is a pass over z behind it."""
    case = Case(69, 37, 2 * 61, ("f32", "bf16", "f16")[len(layout) % 3], "swiglu", layout)
    launched = run_in(interpreter, check_swiglu, case, path=path)
    expected = {"vendor": {"swiglu_fwd"}, "pass": {"fwd", "swiglu_fwd"}}
    assert kernels(launched) == expected.get(path, {"fwd"})


@pytest.mark.covering(1)
@pytest.mark.parametrize("case", [*SWIGLU_CASES, Case(9, 1, 2 * 61, "bf16", layout="wide"),
                                  Case(9, 1, 2 * 64, "bf16", layout="far")], ids=str)  # fmt: skip
def test_pass_of_swiglu(interpreter, case):
    run_in(interpreter, check_swiglu_fwd, case)


# As in test_rotary_kernels.py, with heads whose width is no multiple of a tile's, pairs in every kind of
# tile, and values that begin within one; batches whose images begin within a tile of rows.
_ROTATED = [
    (2, 1, 0, 1, 2, 1, 17),
    (3, 17, 1, 2, 6, 15, 37),
    (2, 37, 5, 3, 16, 61, 115),
    (1, 61, 1, 3, 30, 197, 61),
    (3, 15, 0, 2, 32, 17, 461),
    (1, 197, 1, 1, 64, 15, 15),
    (2, 37, 5, 2, 80, 0, 197),
]
ROTATED_CASES = [
    Rotated(*shape, [*test_rotary.DTYPES, "tf32"][(i + 3 * turn) % 6], bool((i + turn) % 2), bool(turn),
            side=("end", "begin")[turn], bias=(i + turn) % 3 > 0)
    for i, shape in enumerate(_ROTATED)
    for turn in (0, 1)
]  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", ROTATED_CASES, ids=str)
def test_rotation_at_odd_widths(interpreter, case, descriptors):
    interpreter.run(prove, check_rotated, case, descriptors=descriptors)


@pytest.mark.covering(1)
@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
@pytest.mark.parametrize("layout", ["tight", "wide", "misaligned", "transposed"])
def test_rotation_in_every_layout(interpreter, layout, rotate_half):
    case = Rotated(2, 9, 1, 3, 6, 5, 37, "bf16-f32", True, rotate_half, layout)
    interpreter.run(prove, check_rotated, case, path="amd")


@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
def test_rotation_of_rows_too_far_apart_for_32_bits(interpreter, rotate_half):
    case = Rotated(1, 5, 1, 1, 2, 3, 5, rotate_half=rotate_half, layout="far")
    interpreter.run(prove, check_rotated, case)


@pytest.mark.covering(1)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "halves"])
@pytest.mark.parametrize("dtypes", ["f32", "tf32", "bf16-f32", "bf16", "f16-f32"])
def test_rotation_of_usual_models_is_compiled_ahead_of_time(interpreter, dtypes, rotate_half, descriptors):
    case = Rotated(1, 70, 5, 2, 64, 40, 70, dtypes, rotate_half=rotate_half)
    run_in(interpreter, check_rotated, case, descriptors=descriptors)


@pytest.mark.parametrize("path", ["whole", "split"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtypes", _NAMES)
def test_every_epilogue_in_one_piece_and_split(interpreter, dtypes, epilogue, path):
    case = Case(21, 197, 171, dtypes, epilogue, side="begin", bias=epilogue != "residual")
    save = epilogue == "gelu"
    descriptors = dtypes in ("bf16", "f32")
    launched = run_in(interpreter, check_forward, case, save=save, path=path, descriptors=descriptors)
    assert kernels(launched) == ({"fwd", "parts"} if path == "split" else {"fwd"})


@pytest.mark.parametrize("N", [168, 171], ids=["in-place", "copied"])
@pytest.mark.parametrize("path", ["whole", "split", "vendor"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
def test_a_product_is_added_in_place(interpreter, dtypes, path, N):
    for layout in ("tight", "wide"):
        case = Case(21, 197, N, dtypes, "residual", layout, bias=True)
        run_in(interpreter, check_add, case, path=path, descriptors=dtypes == "bf16")


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_inputs_are_split_where_there_are_many_and_few_tiles(interpreter, descriptors):
    launched = run_in(interpreter, check_forward, Case(5, 4109, 61, "bf16", "both"), descriptors=descriptors)
    assert kernels(launched) == {"fwd", "parts"}


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("M", "N"), [(581, 165), (583, 293)])
def test_more_rows_of_tiles_than_share_their_operands(interpreter, M, N, descriptors):
    """Groups of eight rows of tiles, in the interior and in the right border, with a bottom border."""
    run_in(interpreter, check_forward, Case(M, 17, N, "bf16"), descriptors=descriptors)


@pytest.mark.parametrize("case", [Case(5, 61, 37, "bf16"), Case(80, 61, 165, "f16", "gelu")], ids=str)
def test_bottom_border_of_sixteen_rows_for_amd(interpreter, case):
    run_in(interpreter, check_forward, case, path="amd")


LAYOUTS = ["tight", "wide", "misaligned", "transposed", "images"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
@pytest.mark.parametrize("path", ["whole", "vendor"])
def test_both_passes_of_any_layout(interpreter, layout, dtypes, path):
    case = Case(21, 37, 61, dtypes, "gelu" if layout in ("tight", "images") else "residual", layout)
    run_in(interpreter, check_passes, case, path=path)


@pytest.mark.parametrize("path", ["whole", "split", "vendor"])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16-f32"])
def test_both_passes_for_every_subset_of_gradients(interpreter, dtypes, epilogue, path):
    launched = run_in(interpreter, check_passes, Case(36, 137, 61, dtypes, epilogue), path=path)
    assert ("fwd" in kernels(launched)) == (path != "vendor")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_the_vendors_product(interpreter, dtypes, bias):
    case = Case(36, 37, 64, dtypes, "none", bias=bias)
    assert not run_in(interpreter, check_forward, case, path="vendor")


@pytest.mark.parametrize("case", [Case(5, 17, 15, "bf16", "both"), Case(21, 17, 15, "f32", "both")], ids=str)
def test_rows_too_far_apart_for_32_bits(interpreter, case):
    interpreter.run(prove, check_far, Case(**(vars(case) | {"layout": "far"})))


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16-f32"])
def test_parts(interpreter, dtypes, parts):
    case = Case(17, 1, 141, dtypes, "both", side="begin" if parts == 2 else "end")
    interpreter.run(prove, check_parts, case, parts)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("M", "N"), [(1, 197), (17, 15), (137, 141), (261, 37)])
def test_dz(interpreter, M, N, dtypes):
    case = Case(M, 1, N, dtypes, side="begin" if M % 3 else "end")
    run_in(interpreter, check_dz, case)
    if dtypes != "f32":
        run_in(interpreter, check_dz, case, wanted=WITHOUT_GELU, dy32=True)


def test_dz_of_rows_too_far_apart_for_32_bits(interpreter):
    run_in(interpreter, check_dz, Case(5, 1, 15, "f32", layout="far"))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(("rows", "N"), [(1, 461), (15, 197), (16, 64), (37, 61), (197, 1)])
def test_db(interpreter, rows, N, dtypes):
    run_in(interpreter, check_db, Case(1, 1, N, dtypes, side="begin" if N % 3 else "end"), rows)


def test_gradient_of_the_result_that_is_one_row_or_one_number_expanded(interpreter):
    run_in(interpreter, check_expanded_gradient, Case(36, 40, 48, "bf16"))


@pytest.mark.parametrize("layout", ["padded", "wide"])
def test_operands_in_padded_rows_are_not_copied(interpreter, layout):
    interpreter.run(prove, check_nothing_is_copied, Case(5, 37, 61, "bf16-f32", "both", layout))


# -- What is launched, and what it costs --------------------------------------------------------------------


def launches(call, target="sm_90"):
    """Kernel, grid, arguments and configuration of each launch that `call(empty)` asks for."""
    found = []

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    with (
        op_module.launching.recording("compact_linear", target, lambda *a, **k: found.append(a)) as variants,
        TritonSides(),
    ):
        call(empty)
    return found, variants


def waste(M, N, K):
    """Multiplications as tiled over those there are, of what is launched on an H100."""
    found, _ = launches(lambda empty: op_module.compact_linear(empty(M, K), empty(N, K)))
    _, (tiles, _), arguments, config = found[0]
    assert tiles == op_module.tile_grid(M, N, config).tiles
    assert (arguments["M"], arguments["N"], arguments["K"]) == (M, N, K)
    return op_module.tiled_flops(M, N, K, config) / (2 * M * N * K)


@pytest.mark.parametrize(("M", "most"), [(960, 1.035), (197, 1.05)])
def test_widths_cost_what_they_keep(M, most):
    widths = range(64, 3073)
    config = op_module.TILES["16"]
    exact = 2 * M * 64 * 64
    by_K = [op_module.tiled_flops(M, 64, K, config) * 64 / K for K in widths]
    by_N = [op_module.tiled_flops(M, N, 64, config) * 64 / N for N in widths]
    alone = op_module.tiled_flops(M, 64, 64, config) / exact
    # The tiles of the two axes are independent of each other.
    average = sum(by_K) / len(by_K) / exact * (sum(by_N) / len(by_N) / exact) / alone
    assert average <= most
    assert waste(M, 1411, 461) <= most


def test_no_tile_is_counted_that_is_not_needed():
    config = op_module.TILES["16"]
    assert op_module.tiled_flops(64, 128, 64, config) == 2 * 64 * 128 * 64
    assert op_module.tiled_flops(64, 1411, 461, config) == 2 * 64 * 1440 * 464
    assert op_module.tiled_flops(197, 128, 64, config) == 2 * 200 * 128 * 64
    assert op_module.tiled_flops(8, 64, 16, config) == 2 * 8 * 64 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_of_any_widths_needs_five_compilations(dtype):
    def model(empty):
        def linear(M, N, K, **options):
            x, weight = empty(M, K, dtype=dtype), empty(N, K, dtype=dtype)
            op_module.compact_linear(x, weight, empty(N, dtype=dtype), **options)

        for M in (1, 5, 8, 64, 197, 394, 1576):
            for width in (61, 197, 461, 701, 768, 2080):
                residual = empty(M, 768, dtype=dtype)
                linear(M, 3 * width, width)
                linear(M, 768, width, residual=residual)
                linear(M, 4 * width, width, activation="gelu")
                linear(M, 768, 4 * width, residual=residual)
                linear(M, 192, 4 * width)

    _, variants = launches(model)
    assert len(variants) == 5, [variant.name for variant in variants.values()]


def test_names_of_variants_are_distinct():
    for target in op_module.launching.TARGETS:
        names = [variant.name for variant in op_module.variants(target)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_many_rows_take_the_vendors_product(activation):
    def calls(M):
        found, _ = launches(lambda e: op_module.compact_linear(e(M, 768), e(64, 768), activation=activation))
        return bool(found)

    assert calls(197) and not calls(25216)
