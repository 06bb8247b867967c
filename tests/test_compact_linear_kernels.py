"""What the kernels of compact_linear compute, proved in the interpreter, and proof that the proofs bite.

The first half runs the kernels, through their launchers and through both whole passes, next to protected
pages, with poisoned outputs and NaN in the padding of every input, and compares with float64. The second half
plants defects and expects each to be caught by the proof that its id names.
"""

import functools
import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from guarded_memory import replaced
from numerics import assert_close_to_float64
from test_compact_linear import DTYPES, EPILOGUES, inputs, leaves, run
from test_gated_linear_kernels import PROOFS, assert_like, crash_of, precision, to_tf32
from triton_harness import check_canaries, guarded, guarded_outputs, mutated, programs

from vtp_kernels._library import TritonSides

triton = pytest.importorskip("triton")

MODULE = "vtp_kernels.compact_linear"
op_module = importlib.import_module(MODULE)

DTYPES = {**DTYPES, "tf32": DTYPES["f32"]}
# What makes small problems take the ways of large ones.
SPLIT = {"_LEAST_INPUTS": 64}
VENDOR = {"_VENDOR_ROWS": 0}
AMD = {"_is_amd": lambda device: True}
PATHS = {"whole": {}, "split": SPLIT, "vendor": VENDOR, "amd": AMD}
FAR = 2**29  # elements from row to row: beyond 32 bits in the fifth


@dataclass(frozen=True)
class Case:
    """x [M, K], W [N, K]: their dtypes, how they lie in memory, and which end of it is at the page."""

    M: int
    K: int
    N: int
    dtypes: str
    epilogue: str = "none"
    layout: str = "padded"
    side: str = "end"
    bias: bool = True

    def __str__(self):
        flags = [self.layout] * (self.layout != "padded") + ["nobias"] * (not self.bias)
        return "-".join([f"M{self.M}-K{self.K}-N{self.N}-{self.dtypes}-{self.epilogue}-{self.side}", *flags])


# -- In the worker ------------------------------------------------------------------------------------------


def place(t, layout, side):
    """`t` in guarded memory: in padded rows with NaN behind the width, unless the layout says otherwise."""
    if t is None or t.dim() == 1:
        return None if t is None else guarded(t, side, align=16)
    if layout == "misaligned":
        return guarded(t, side, offset_elements=1)
    if layout == "tight":
        return guarded(t, side)
    if layout == "transposed":
        return guarded(t.T.contiguous(), side).T
    width = t.shape[1]
    full = F.pad(t, (0, -width % 8), value=torch.nan)
    row_stride = {"padded": full.shape[1], "wide": full.shape[1] + 8, "far": FAR}[layout]
    return guarded(full, side, align=16, row_stride=row_stride)[:, :width]


class Data:
    """The tensors of a case, and what the op should make of them."""

    def __init__(self, case):
        self.case = case
        self.activation, has_residual = EPILOGUES[case.epilogue]
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
        if self.case.layout == "images":  # [3, M / 3, width]; the weight stays a matrix
            weight = self.tensors[1]
            placed = [place(t, "tight", self.case.side) for t in tensors]
            return [
                t if t is None or t.dim() == 1 or t.shape == weight.shape else t.unflatten(0, (3, -1))
                for t in placed
            ]
        return [place(t, self.case.layout, self.case.side) for t in tensors]


def prove(check, case, *args, replacements=(), descriptors=False, attributes=(), **kwargs):
    """`check(op, data, ...)` under the case's conditions; returns keys of the variants that it launched.

    op: the module, or a copy with `replacements`. attributes: names and values to set in it meanwhile.
    """
    op = mutated(MODULE, replacements) if replacements else op_module
    data = Data(case)
    recorder = op._triton._Recording("compact_linear", "")
    launch = op.launch

    def recorded_launch(kernel, grid, arguments, config, **constants):
        recorder.add(kernel, arguments, config, constants)
        launch(kernel, grid, arguments, config, **constants)

    attributes = PATHS[attributes] if isinstance(attributes, str) else dict(attributes)
    patches = [(op, "launch", recorded_launch), (op._triton, "has_descriptors", lambda device: descriptors)]
    patches += [(op, name, value) for name, value in attributes.items()]
    # Rows gigabytes apart are too much memory to note every element of.
    with (
        replaced(patches),
        precision("high" if case.dtypes == "tf32" else "highest"),
        programs(races=case.layout != "far"),
    ):
        with guarded_outputs(case.side):
            check(op, data, *args, **kwargs)
        check_canaries()
    return set(recorder.variants)


def assert_padding_is_zero(t):
    padding = -t.shape[-1] % 8
    if padding:
        rows = t.reshape(-1, t.shape[-1])
        behind = rows.as_strided((len(rows), padding), rows.stride(), rows.storage_offset() + t.shape[-1])
        assert torch.equal(behind, torch.zeros_like(behind)), "padding is not 0 (NaN: never written)"


def check_forward(op, data, save=False):
    """The whole pass: the result, and z where it is saved."""
    x, weight, bias, residual = data.placed(*data.tensors)
    arguments = x, weight, bias, data.gelu, residual, save
    found = op._forward_triton(*arguments)
    assert_like(found, op._forward_fake(*arguments))
    out = found[0].reshape(-1, data.case.N)
    assert_close_to_float64(out, data.exact[0], data.same_dtype[0], "out")
    if op._VENDOR_ROWS > 0:  # what the vendor's GEMM leaves in the padding is undefined
        assert_padding_is_zero(found[0])
    if save:
        assert_close_to_float64(found[1].reshape(out.shape), *data.z, "z")
        assert_padding_is_zero(found[1])


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
    out = op._triton.empty_rows(case.M, case.N, dtype=dtype, device=bias.device)
    z = op._triton.empty_rows(case.M, case.N, dtype=data.tensors[0].dtype, device=bias.device)
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
        assert_padding_is_zero(got)


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
            assert_padding_is_zero(dz)
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


@functools.cache
def compiled_ahead_of_time(target):
    return {variant.key() for variant in op_module.variants(target)}


def run_in(interpreter, check, case, *args, descriptors=False, attributes=(), **kwargs):
    """Prove it in the worker; all that it launched is in the list that is compiled ahead of time."""
    launched = interpreter.run(
        prove, check, case, *args, descriptors=descriptors, attributes=attributes, **kwargs
    )
    target = "gfx942" if attributes == "amd" else "sm_90" if descriptors else "sm_80"
    missing = launched - compiled_ahead_of_time(target)
    assert not missing, f"launched, but not compiled ahead of time: {missing}"
    return launched


def kernels(launched):
    return {key[0].removeprefix("_compact_linear_").removesuffix("_kernel") for key in launched}


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


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_forward_at_odd_widths(interpreter, case, descriptors):
    run_in(interpreter, check_forward, case, descriptors=descriptors)


@pytest.mark.parametrize("attributes", ["whole", "split"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtypes", _NAMES)
def test_every_epilogue_in_one_piece_and_split(interpreter, dtypes, epilogue, attributes):
    case = Case(21, 197, 171, dtypes, epilogue, side="begin", bias=epilogue != "residual")
    save = epilogue == "gelu"
    descriptors = dtypes in ("bf16", "f32")
    launched = run_in(
        interpreter, check_forward, case, save=save, attributes=attributes, descriptors=descriptors
    )
    assert kernels(launched) == ({"fwd", "parts"} if attributes == "split" else {"fwd"})


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_inputs_are_split_where_there_are_many_and_few_tiles(interpreter, descriptors):
    launched = run_in(interpreter, check_forward, Case(5, 2061, 61, "bf16", "both"), descriptors=descriptors)
    assert kernels(launched) == {"fwd", "parts"}


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("M", "N"), [(581, 165), (583, 293)])
def test_more_rows_of_tiles_than_share_their_operands(interpreter, M, N, descriptors):
    """Groups of eight rows of tiles, in the interior and in the right border, with a bottom border."""
    run_in(interpreter, check_forward, Case(M, 17, N, "bf16"), descriptors=descriptors)


@pytest.mark.parametrize("case", [Case(5, 61, 37, "bf16"), Case(80, 61, 165, "f16", "gelu")], ids=str)
def test_bottom_border_of_sixteen_rows_for_amd(interpreter, case):
    run_in(interpreter, check_forward, case, attributes="amd")


LAYOUTS = ["tight", "wide", "misaligned", "transposed", "images"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
@pytest.mark.parametrize("attributes", ["whole", "vendor"])
def test_both_passes_of_any_layout(interpreter, layout, dtypes, attributes):
    case = Case(21, 37, 61, dtypes, "gelu" if layout in ("tight", "images") else "residual", layout)
    run_in(interpreter, check_passes, case, attributes=attributes)


@pytest.mark.parametrize("attributes", ["whole", "split", "vendor"])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "f16-f32"])
def test_both_passes_for_every_subset_of_gradients(interpreter, dtypes, epilogue, attributes):
    launched = run_in(interpreter, check_passes, Case(36, 137, 61, dtypes, epilogue), attributes=attributes)
    assert ("fwd" in kernels(launched)) == (attributes != "vendor" or epilogue != "none")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", ["f32", "bf16-f32"])
def test_the_vendors_product(interpreter, dtypes, bias):
    case = Case(36, 37, 64, dtypes, "none", bias=bias)
    assert not run_in(interpreter, check_forward, case, attributes="vendor")


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
        op_module._triton.recording("compact_linear", target, lambda *a, **k: found.append(a)) as variants,
        TritonSides(),
    ):
        call(empty)
    return found, variants


def waste(M, N, K):
    """Multiplications as tiled over those there are, of what is launched on an H100."""
    found, _ = launches(lambda empty: op_module.compact_linear(empty(M, K), empty(N, K)))
    _, (tiles, _), arguments, config = found[0]
    assert tiles == op_module._grid(M, N, config).tiles
    assert (arguments["M"], arguments["N"], arguments["K"]) == (M, N, K)
    return op_module.tiled_flops(M, N, K, config) / (2 * M * N * K)


@pytest.mark.parametrize(("M", "most"), [(4032, 1.035), (197, 1.05)])
def test_widths_cost_what_they_keep(M, most):
    widths = range(64, 3073)
    config = op_module._TILES["16"]
    exact = 2 * M * 64 * 64
    by_K = [op_module.tiled_flops(M, 64, K, config) * 64 / K for K in widths]
    by_N = [op_module.tiled_flops(M, N, 64, config) * 64 / N for N in widths]
    alone = op_module.tiled_flops(M, 64, 64, config) / exact
    # The tiles of the two axes are independent of each other.
    average = sum(by_K) / len(by_K) / exact * (sum(by_N) / len(by_N) / exact) / alone
    assert average <= most
    assert waste(M, 1411, 461) <= most


def test_no_tile_is_counted_that_is_not_needed():
    config = op_module._TILES["16"]
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
    for target in op_module._triton.TARGETS:
        names = [variant.name for variant in op_module.variants(target)]
        assert len(set(names)) == len(names)


def test_many_rows_take_the_vendors_product_unless_something_follows_it():
    def calls(M, **options):
        found, _ = launches(lambda e: op_module.compact_linear(e(M, 768), e(64, 768), **options))
        return bool(found)

    assert calls(197) and not calls(25216)
    assert calls(25216, activation="gelu")


# -- Each planted defect is caught, by the proof that is meant to -------------------------------------------

PROOFS = {
    **PROOFS,
    "zero-padding": (AssertionError, "padding is not 0"),
    "overflow-check": (AssertionError, "int32 overflow"),
}
READ, WRITE, MASK, PADDING, OTHER, RACE, UNWRITTEN, OFFSET, RAW, VALUE = KINDS = (
    "read past the end",
    "write past the end",
    "padding of an input used",
    "padding of a result not zero",
    "missing other",
    "race",
    "unwritten",
    "32-bit offset",
    "raw bfloat16",
    "wrong value",
)
# A tile of each kind, two of the right border, a full block of inputs and a tail; no width a multiple of 8.
SMALL = Case(37, 37, 101, "f32")
SMALL16 = Case(69, 77, 141, "bf16")
WIDE = Case(37, 165, 101, "f32")  # of several blocks of inputs
BOTH, RESIDUAL, NO_BIAS = (
    Case(37, 37, 101, "f32", epilogue, bias=epilogue != "none") for epilogue in ("both", "residual", "none")
)
FAR_APART = Case(5, 17, 15, "f32", "both", "far")


@dataclass(frozen=True)
class Defect:
    """`old` becomes `new` in the source of a kernel, or of its launcher: of which kind that is, and the proof
    that finds it; `old` and `new` may be several texts. argument: the one whose memory is overrun."""

    kernel: str
    kind: str
    what: str
    proof: str
    old: str | tuple
    new: str | tuple
    options: tuple = (("case", SMALL),)
    argument: str = ""

    def __str__(self):
        return f"{self.kernel}-{self.what}-{self.proof}"

    @property
    def replacements(self):
        pairs = (
            zip(self.old, self.new, strict=True) if isinstance(self.old, tuple) else [(self.old, self.new)]
        )
        return list(pairs)


def options(case=SMALL, **kwargs):
    return tuple({"case": case, **kwargs}.items())


def in_kernel(kernel, *rows):
    return [Defect(kernel, *row) for row in rows]


SPLIT_UP = options(WIDE, attributes="split")
GELU_LINES = "    if gelu:\n        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))\n"
ADD_BIAS = "    acc += tl.load(bias + o_n, mask=o_n < bias_width, other=0.0).to(tl.float32)[None, :]\n"
ADD_RESIDUAL = "        acc += tl.load(p_residual, mask=m_tile, other=0.0).to(tl.float32)\n"
TILE_MASK = "m_tile = (o_m[:, None] < M) & (o_n[None, :] < (N + 7) // 8 * 8)\n"
RESULT_MASK, PARTIAL_MASK = f"    {TILE_MASK}    m_padding", f"        {TILE_MASK}        tl.store(partial"
STORE_OUT = "tl.store(out + o_out, tl.where(m_padding, 0.0, acc).to(out.dtype.element_ty), mask=m_tile)"
STORE_Z = "tl.store(z + o_out, tl.where(m_padding, 0.0, acc).to(z.dtype.element_ty), mask=m_tile)"
TAIL_MASK = "mask=(o_k[None, :] < (K + 7) // 8 * 8) & (o_row[:, None] >= 0), other=0.0"
PRODUCT = "return tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)"
TRANSPOSED = "return tl.dot(b_w, tl.trans(b_x), acc, input_precision=PRECISION)"
PART_ROW = "row = i_part.to(tl.int64) * M + o_m[:, None]"
LOAD_PART = "acc += tl.load(partial + row * stride_out + o_n[None, :], mask=m_tile, other=0.0)"
PARTS_COLUMNS = f"o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)\n    {TILE_MASK}    acc"
DZ_LOAD = "b_dz = tl.load(p_dy, mask=m_tile, other=0.0)"
DZ_MASK = "m_tile = (o_m[:, None] < M) & (o_n[None, :] < width)"
DZ_PADDING = "        b_dz = tl.where(o_n[None, :] < N, b_dz, 0.0)\n"
DZ_STORE = "tl.store(p_dz, b_dz.to(dz.dtype.element_ty), mask=m_tile)"
DZ_PARTIAL = "partial + tl.program_id(0).to(tl.int64) * width + o_n, b_db, mask=o_n < width"
DB_MASK = "mask=(o_r[:, None] < rows) & (o_n[None, :] < width), other=0.0"
DB_STORE = "tl.store(db + o_n, tl.sum(acc, axis=0).to(db.dtype.element_ty), mask=o_n < N)"
ONLY_DB = (("wanted", ((True, False, True),)),)
ROWS_OF_DZ = Case(261, 1, 37, "f32")

# fmt: off
DEFECTS = [
    *in_kernel(
        "fwd",
        (READ, "row-clamp-of-x-removed", "guard-page", "tl.minimum(i_m + tl.arange(0, TILE_M), M - 1)",
         "i_m + tl.arange(0, TILE_M)", options(), "x"),
        (READ, "row-clamp-of-weight-removed", "guard-page", "tl.minimum(i_n + tl.arange(0, TILE_N), N - 1)",
         "i_n + tl.arange(0, TILE_N)", options(), "weight"),
        (READ, "no-mask-on-the-tail", "guard-page", f", {TAIL_MASK}", "", options(), "weight"),
        (READ, "no-mask-on-bias", "guard-page", "bias + o_n, mask=o_n < bias_width, other=0.0", "bias + o_n",
         options(), "bias"),
        (READ, "no-mask-on-residual", "guard-page", "p_residual, mask=m_tile, other=0.0", "p_residual",
         options(RESIDUAL), "residual"),
        (WRITE, "row-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("< M", ">= 0"), options(), "out"),
        (WRITE, "column-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("(o_n[None, :] < (N + 7) // 8 * 8)", "(o_n[None, :] >= 0)"), options(), "out"),
        (WRITE, "row-mask-of-parts-removed", "guard-page", PARTIAL_MASK, PARTIAL_MASK.replace("< M", ">= 0"),
         SPLIT_UP, "partial"),
        (MASK, "padding-of-inputs-multiplied", "poison", "return tl.where(o_k[None, :] < K, b_tile, 0.0)",
         "return b_tile"),
        (MASK, "padding-of-one-inputs-multiplied", "poison", "return tl.where(o_k[None, :] < K, b_tile, 0.0)",
         "return tl.where(o_k[None, :] <= K, b_tile, 0.0)"),
        (PADDING, "columns-behind-the-width-kept", "zero-padding", STORE_OUT,
         STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc")),
        (PADDING, "columns-behind-the-width-of-z-kept", "zero-padding", STORE_Z,
         STORE_Z.replace("tl.where(m_padding, 0.0, acc)", "acc"), options(BOTH, save=True)),
        (PADDING, "columns-behind-the-width-not-written", "zero-padding", STORE_OUT,
         STORE_OUT.replace("=m_tile", "=m_tile & (o_n[None, :] < N)")),
        (OTHER, "no-other-on-a-bias-that-there-is-not", "poison", "mask=o_n < bias_width, other=0.0",
         "mask=o_n < bias_width", options(NO_BIAS)),
        (RACE, "tiles-of-the-border-all-the-first", "race-detection",
         "columns * BLOCK_N + i_n * BORDER_N", "columns * BLOCK_N + i_n * 0"),
        (RACE, "border-begins-inside-the-interior", "race-detection",
         "columns * BLOCK_N + i_n * BORDER_N", "columns * BLOCK_N - 8 + i_n * BORDER_N"),
        (RACE, "bottom-begins-inside-the-interior", "race-detection",
         "rows * BLOCK_M + i_tile // bottom", "rows * BLOCK_M - 4 + i_tile // bottom"),
        (RACE, "tiles-of-the-bottom-all-the-first", "race-detection", "i_tile % bottom_columns * BOTTOM_N",
         "i_tile % bottom_columns * 0"),
        (RACE, "parts-all-in-one-place", "race-detection", PART_ROW, "row = o_m[:, None].to(tl.int64)",
         SPLIT_UP),
        (UNWRITTEN, "last-tile-of-the-border-missed", "poison",
         'triton.cdiv(N % block["BLOCK_N"], block["BORDER_N"])', 'N % block["BLOCK_N"] // block["BORDER_N"]'),
        (UNWRITTEN, "bottom-border-missed", "poison", 'triton.cdiv(bottom, block["BOTTOM_M"])',
         'bottom // block["BOTTOM_M"]'),
        (UNWRITTEN, "last-column-of-the-bottom-missed", "poison", 'triton.cdiv(N, block["BOTTOM_N"])',
         'N // block["BOTTOM_N"]'),
        (UNWRITTEN, "last-tile-not-launched", "poison", "(grid.tiles, parts)", "(grid.tiles - 1, parts)"),
        (UNWRITTEN, "last-part-not-launched", "poison", "(grid.tiles, parts)", "(grid.tiles, 1)",
         SPLIT_UP),
        (OFFSET, "rows-of-inputs", "overflow-check", "o_row[:, None].to(tl.int64) * stride",
         "o_row[:, None] * stride", options(FAR_APART)),
        (OFFSET, "rows-of-the-residual", "overflow-check", "o_m[:, None].to(tl.int64) * stride_residual",
         "o_m[:, None] * stride_residual", options(FAR_APART)),
        (OFFSET, "rows-of-the-result", "overflow-check", "o_m[:, None].to(tl.int64) * stride_out",
         "o_m[:, None] * stride_out", options(FAR_APART)),
        (RAW, "residual-added-in-bfloat16", "bfloat16-check", ADD_RESIDUAL,
         "        acc = (acc.to(tl.bfloat16) + tl.load(p_residual, mask=m_tile, other=0.0)).to(tl.float32)\n",
         options(Case(5, 17, 15, "bf16", "residual"))),
        (VALUE, "tail-of-inputs-dropped", "error-rule", "range(full, end, TAIL_K)",
         "range(end, end, TAIL_K)"),
        (VALUE, "first-block-of-inputs-dropped", "error-rule", "range(begin, full, BLOCK_K)",
         "range(begin + BLOCK_K, full, BLOCK_K)"),
        (VALUE, "bias-not-added", "error-rule", ADD_BIAS, ""),
        (VALUE, "gelu-not-applied", "error-rule", GELU_LINES, "", options(BOTH)),
        (VALUE, "gelu-by-tanh", "error-rule", "tl.erf(acc * 0.7071067811865476)",
         "2 * tl.sigmoid(1.5957691216 * (acc + 0.044715 * acc * acc * acc)) - 1", options(BOTH)),
        (VALUE, "gelu-before-bias", "error-rule", (GELU_LINES, ADD_BIAS), ("", GELU_LINES + ADD_BIAS),
         options(BOTH)),
        (VALUE, "residual-before-gelu", "error-rule", (GELU_LINES, ADD_RESIDUAL),
         ("", ADD_RESIDUAL + GELU_LINES), options(BOTH)),
        (VALUE, "residual-not-added", "error-rule", ADD_RESIDUAL, "        acc += 0.0\n", options(RESIDUAL)),
        (VALUE, "z-without-bias", "error-rule", (ADD_BIAS, "    if SAVE:\n        " + STORE_Z + "\n"),
         ("", "    if SAVE:\n        " + STORE_Z + "\n" + ADD_BIAS), options(BOTH, save=True)),
        (VALUE, "parts-overlap", "error-rule", "end = tl.minimum(begin + inputs_per_part, K)", "end = K",
         SPLIT_UP),
        (VALUE, "parts-in-the-wrong-rows", "error-rule", PART_ROW,
         "row = i_part.to(tl.int64) * M + (M - 1 - o_m)[:, None]", SPLIT_UP),
        (VALUE, "tiles-by-descriptor-all-of-the-first-inputs", "error-rule", "w_tiles.load([i_n, k])",
         "w_tiles.load([i_n, 0])", options(WIDE, descriptors=True)),
        (VALUE, "tf32-in-ieee", "error-rule", PRODUCT, PRODUCT.replace("=PRECISION", '="tf32"')),
        (VALUE, "tf32-in-ieee-in-the-bottom-border", "error-rule", TRANSPOSED,
         TRANSPOSED.replace("=PRECISION", '="tf32"'), options(Case(5, 101, 101, "f32"))),
        (VALUE, "sums-in-bfloat16", "error-rule", PRODUCT, PRODUCT + ".to(tl.bfloat16).to(tl.float32)",
         options(Case(64, 525, 45, "bf16"))),
    ),
    *in_kernel(
        "parts",
        (READ, "mask-of-parts-removed", "guard-page", LOAD_PART,
         LOAD_PART.replace(", mask=m_tile, other=0.0", ""), options(), "partial"),
        (WRITE, "row-mask-of-store-removed", "guard-page", RESULT_MASK,
         RESULT_MASK.replace("< M", ">= 0"), options(), "z"),
        (PADDING, "columns-behind-the-width-kept", "zero-padding", STORE_OUT,
         STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc")),
        (OTHER, "no-other-on-bias", "zero-padding",
         ("mask=o_n < bias_width, other=0.0", STORE_OUT),
         ("mask=o_n < bias_width", STORE_OUT.replace("tl.where(m_padding, 0.0, acc)", "acc"))),
        (RACE, "columns-all-the-first", "race-detection", PARTS_COLUMNS,
         PARTS_COLUMNS.replace("tl.program_id(1) * BLOCK_N", "tl.program_id(1) * 8"),
         options(Case(5, 1, 141, "f32"))),
        (UNWRITTEN, "last-rows-not-launched", "poison", 'triton.cdiv(M, _PARTS.blocks["BLOCK_M"])',
         'M // _PARTS.blocks["BLOCK_M"]'),
        (OFFSET, "rows-of-the-residual", "overflow-check", "o_m[:, None].to(tl.int64) * stride_residual",
         "o_m[:, None] * stride_residual", options(Case(5, 1, 15, "f32", "both", "far"))),
        (RAW, "residual-added-in-bfloat16", "bfloat16-check", ADD_RESIDUAL,
         "        acc = (acc.to(tl.bfloat16) + tl.load(p_residual, mask=m_tile, other=0.0)).to(tl.float32)\n",
         options(Case(5, 1, 15, "bf16", "residual"))),
        (VALUE, "first-part-dropped", "error-rule", "range(parts)", "range(1, parts)"),
        (VALUE, "last-part-dropped", "error-rule", "range(parts)", "range(parts - 1)"),
        (VALUE, "bias-added-with-every-part", "error-rule", LOAD_PART, f"{LOAD_PART}\n    {ADD_BIAS}"),
        (VALUE, "parts-summed-in-bfloat16", "error-rule", LOAD_PART,
         f"{LOAD_PART}\n        acc = acc.to(tl.bfloat16).to(tl.float32)", options(SMALL16)),
    ),
    *in_kernel(
        "dz",
        (READ, "row-mask-removed", "guard-page", DZ_MASK, DZ_MASK.replace("< M", ">= 0"), options(), "dy"),
        (READ, "no-mask-on-z", "guard-page", "b_z = tl.load(p_z, mask=m_tile, other=0.0)",
         "b_z = tl.load(p_z)", options(), "z"),
        (WRITE, "mask-of-store-removed", "guard-page", DZ_STORE, DZ_STORE.replace(", mask=m_tile", ""),
         options(), "dz"),
        (PADDING, "columns-behind-the-width-kept", "zero-padding", DZ_PADDING, ""),
        (OTHER, "no-other-on-dy", "poison", DZ_LOAD, DZ_LOAD.replace(", other=0.0", ""),
         options(SMALL, **dict(ONLY_DB))),
        (RACE, "partial-sums-all-in-row-0", "race-detection", DZ_PARTIAL,
         "partial + o_n, b_db, mask=o_n < width", options(ROWS_OF_DZ, **dict(ONLY_DB))),
        (UNWRITTEN, "last-columns-not-launched", "poison", 'triton.cdiv(N, _DZ.blocks["BLOCK_N"])',
         'max(1, N // _DZ.blocks["BLOCK_N"])', options(Case(5, 1, 141, "f32"))),
        (OFFSET, "rows-of-dy", "overflow-check", "o_m[:, None].to(tl.int64) * stride_dy",
         "o_m[:, None] * stride_dy", options(Case(5, 1, 15, "f32", layout="far"))),
        (OFFSET, "rows-of-z", "overflow-check", "o_m[:, None].to(tl.int64) * stride_z",
         "o_m[:, None] * stride_z", options(Case(5, 1, 15, "f32", layout="far"))),
        (RAW, "dy-in-bfloat16", "bfloat16-check", f"{DZ_LOAD}.to(tl.float32)", DZ_LOAD,
         options(Case(5, 1, 15, "bf16"))),
        (VALUE, "density-forgotten", "error-rule", " + b_z * density", ""),
        (VALUE, "distribution-of-z-halved", "error-rule", "tl.erf(b_z * 0.7071067811865476)",
         "tl.erf(b_z * 0.5)"),
        (VALUE, "gelu-forgotten", "error-rule", "        if GELU:\n", "        if False:\n"),
        (VALUE, "sums-of-the-last-rows-alone", "error-rule", "b_db += tl.sum", "b_db = tl.sum",
         options(ROWS_OF_DZ, **dict(ONLY_DB))),
        (VALUE, "sums-of-rows-of-the-next-program", "error-rule", "tl.minimum(M, first + rows_per_program)",
         "M", options(ROWS_OF_DZ, wanted=((True, False, True),))),
    ),
    *in_kernel(
        "db",
        (READ, "row-mask-removed", "guard-page", DB_MASK, DB_MASK.replace("< rows", ">= 0"), options(),
         "partial"),
        (WRITE, "mask-of-store-removed", "guard-page", DB_STORE, DB_STORE.replace(", mask=o_n < N", ""),
         options(), "db"),
        (OTHER, "no-other-on-partial-sums", "poison", DB_MASK, DB_MASK.replace(", other=0.0", "")),
        (RACE, "programs-overlap", "race-detection", "o_n = tl.program_id(0) * BLOCK_N",
         "o_n = tl.program_id(0) * (BLOCK_N // 2)"),
        (UNWRITTEN, "last-columns-not-launched", "poison", 'triton.cdiv(N, _DB.blocks["BLOCK_N"])',
         'N // _DB.blocks["BLOCK_N"]'),
        (VALUE, "tail-of-rows-dropped", "error-rule", "range(0, rows, BLOCK_R)",
         "range(0, rows // BLOCK_R * BLOCK_R, BLOCK_R)"),
    ),
]
# fmt: on
PLANTED_IN = {
    "fwd": check_forward,
    "parts": check_parts,
    "dz": check_dz,
    "db": functools.partial(check_db, rows=37),
}


def plant(defect):
    """The check passes without the defect, so that it is the defect which is found."""
    chosen = dict(defect.options)
    far = chosen["case"].layout == "far"
    check = check_far if far and defect.kernel == "fwd" else PLANTED_IN[defect.kernel]
    prove(check, **chosen)
    planted = functools.partial(prove, check, **chosen, replacements=defect.replacements)
    return crash_of(planted) if defect.proof == "guard-page" else planted()


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_planted_defect(interpreter, defect):
    if defect.proof == "guard-page":
        report = interpreter.run(plant, defect)
        where = f"past the end of the memory of `{defect.argument}`"
        assert report.startswith("SIGSEGV") and where in report and "_kernel" in report, report
        return
    error, says = PROOFS[defect.proof]
    with pytest.raises(error, match=says) as caught:
        interpreter.run(plant, defect)
    assert type(caught.value) is error


def test_every_kernel_has_planted_defects_of_every_kind():
    kernels = {
        name.removeprefix("_compact_linear_").removesuffix("_kernel")
        for name, value in vars(op_module).items()
        if isinstance(value, triton.runtime.jit.KernelInterface) and name.startswith("_compact_linear_")
    }
    missing = {(kernel, kind) for kernel in kernels for kind in KINDS}
    missing -= {(defect.kernel, defect.kind) for defect in DEFECTS}
    # Sums keep columns apart, and what lies behind the width is dropped where they are stored; what is
    # 64-bit in these two follows from sizes that no test can have; `db` is 1-D and reads float32 alone.
    assert missing == {
        ("parts", MASK), ("dz", MASK), ("db", MASK), ("db", PADDING), ("db", OFFSET), ("db", RAW)
    }  # fmt: skip


def test_ids_of_planted_defects_are_distinct():
    assert len(set(map(str, DEFECTS))) == len(DEFECTS)
