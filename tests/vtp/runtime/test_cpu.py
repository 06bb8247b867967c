"""`vtp.optimize` on the CPU engine in C++ (`csrc/cpu`), on every instruction set of this machine."""

import copy
import ctypes
import dataclasses
import functools
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.cpp_extension import include_paths

import vtp
from tests.support.engine_cases import (
    MODELS,
    compact_model,
    irregular_plan,
    references,
    with_dead_parts,
    with_narrow_keys,
)
from tests.support.models import TINY, build, gated, image
from tests.support.numerics import assert_close_to_float64
from tests.support.processes import python
from vtp.runtime.cpu import CpuBlocks, CpuViT, activations, panels
from vtp.training.data import open_data
from vtp.training.loaders import test_loader
from vtp.zoo import FASHION_DEIT, open_model
from vtp_kernels.library import cpp_unsupported_reason

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
ROOT = Path(__file__).parents[3]
EXTENSION = ROOT / "vtp_kernels" / "_cpu.abi3.so"

missing = cpp_unsupported_reason()
built = pytest.mark.skipif(missing is not None, reason=str(missing))


def unbuilt_reason() -> str | None:
    """Why the extension need not be there."""
    if os.environ.get("VTP_BUILD_CPP") == "0":
        return "VTP_BUILD_CPP is 0"
    if os.name == "nt" or shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler"
    if not any((Path(path) / "torch/csrc/stable/library.h").is_file() for path in include_paths()):
        return "PyTorch came without headers"
    return None


def test_the_extension_is_there_where_it_can_be_built():
    if unbuilt_reason():
        pytest.skip(unbuilt_reason())
    assert missing is None, f"{missing}; `python setup.py build_ext --inplace` builds it"


# -- What it computes ---------------------------------------------------------------------------------------

# Changes to a tiny model: what is odd about it. With 64 classes four images have all that `check` needs.
SHAPES = {
    "577-tokens": {"img_size": (96, 96), "depth": 1, "num_classes": 64},
    "1025-tokens": {"img_size": (128, 128), "depth": 1, "num_classes": 64},
    "one-patch": {"img_size": (4, 4)},
    "no-square": {"img_size": (8, 20)},
    "no-square-patch": {"img_size": (9, 10), "patch_size": (3, 5)},
    "odd-patch": {"img_size": (21, 14), "patch_size": (7, 7), "in_chans": 3},
    "odd-head-width": {"embed_dim": 111, "mlp_hidden": 61},
    "one-head": {"embed_dim": 37, "num_heads": 1},
    "head-width-1": {"embed_dim": 12, "num_heads": 12},
    "distilled": {"distilled": True},
    "register-tokens": {"reg_tokens": 2},
    "no-class-position": {"no_embed_class": True},
    "qk-norm-of-odd-width": {"embed_dim": 45, "qk_norm": True},
    "layer-scale": {"init_values": 0.1},
    "no-biases": {"qkv_bias": False, "proj_bias": False},
    "one-class": {"num_classes": 1},
    "average-of-tokens": {"global_pool": "avg", "fc_norm": True, "final_norm": False},
}


def in_batches(model: nn.Module, images: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([model(part) for part in images.split(list(sizes))])


def check(small: vtp.CompactViT, dtype: torch.dtype, sizes: Sequence[int] = (1, 3)) -> vtp.OptimizedViT:
    """The error rule in batches of `sizes`, repeated until there are 256 logits: fewer would need luck."""
    fast = vtp.optimize(small, dtype)
    logits = fast(image(small, 1)).shape[1]
    sizes = list(sizes) * max(1, -(-256 // (sum(sizes) * logits)))
    images = image(small, sum(sizes))
    exact, same_dtype = references(small, images, dtype)
    assert_close_to_float64(in_batches(fast, images, sizes), exact, same_dtype, "logits")
    return fast


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_a_model_is_as_close_to_float64_as_pytorch(name, dtype):
    fast = check(compact_model(name), DTYPES[dtype])
    assert fast.engine.startswith("plain PyTorch" if name == "pre-norm-quick-gelu" else "C++, ")


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_odd_shape_is_computed(shape, dtype):
    fast = check(compact_model("tiny", **SHAPES[shape]), DTYPES[dtype])
    assert isinstance(fast.vit, CpuViT) == (shape != "average-of-tokens")


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_of_197_tokens_is_as_close_to_float64_as_pytorch(dtype):
    check(compact_model("deit-tiny", depth=2, img_size=224), DTYPES[dtype], (1, 2))


NARROW = {
    "odd": ("tiny", {"embed_dim": 111, "mlp_hidden": 61}),
    "no-biases": ("tiny", {"embed_dim": 45, "qkv_bias": False, "proj_bias": False}),
    "577-tokens": ("tiny", {"embed_dim": 96, "img_size": (96, 96), "depth": 1}),
    "heads-of-64": ("deit-small", {}),
    "blocks-alone": ("map-pool-no-class-token", {}),
}


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NARROW)
def test_heads_with_key_widths_of_their_own_are_computed(case, dtype):
    name, changes = NARROW[case]
    small = with_narrow_keys(compact_model(name, **changes))
    widths = [block.attn.key_widths for block in small.blocks]
    assert all(len(set(each)) > 1 for each in widths)
    assert check(small, DTYPES[dtype]).engine.startswith("C++, ")


DEAD = {
    "first-block": ("0.attn.proj", "0.mlp.fc1"),
    "middle-attention": ("1.attn.proj",),
    "last-mlp": ("2.mlp.fc2",),
    "attention-everywhere": ("0.attn.qkv", "1.attn.qkv", "2.attn.qkv"),
    "everything": tuple(f"{i}.{site}" for i in range(3) for site in ("attn.qkv", "mlp.fc1")),
    "heads": ("0.attn.proj.1", "1.attn.proj.0", "1.attn.proj.2", "2.attn.proj.2"),
}


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dead", DEAD)
def test_what_dead_parts_leave_behind_is_kept(dead, dtype):
    check(with_dead_parts(DEAD[dead], depth=3, init_values=0.1), DTYPES[dtype])


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_single_value_are_computed(dtype):
    model = gated(build(dataclasses.replace(TINY, embed_dim=24)))
    plan = irregular_plan(model)
    kept = dict(plan.kept) | {"blocks.0.attn.proj": (0, 8, 16), "blocks.1.attn.proj": (7, *range(8, 16), 23)}
    check(vtp.compact(model, dataclasses.replace(plan, kept=kept)).float(), DTYPES[dtype])


@built
def test_images_of_16_bits_into_a_model_of_32_are_widened_and_logits_rounded_once():
    small = compact_model("deit-tiny")
    fast, images = vtp.optimize(small).vit, image(small, 3).bfloat16()
    assert torch.equal(fast(images), fast(images.float()).bfloat16())


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1), (7, 38, 45), (401, 770, 61), (0, 8, 5)], ids=str)
def test_one_layer_alone_is_computed(shape, dtype):
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(DTYPES[dtype])
    bias, x = torch.randn(outputs), activations(x, DTYPES[dtype])
    weight = F.pad(weight, (0, x.shape[1] - inputs))
    packed = panels(weight, DTYPES[dtype]).flatten().view(torch.uint8)
    padded = F.pad(bias, (0, -outputs % 16))
    got = torch.ops.vtp.cpu_linear(x, packed, padded, outputs, dtype == "bf16")[:, :outputs]
    exact, same_dtype = (F.linear(x.to(d), weight.to(d), bias.to(d)) for d in (torch.float64, torch.float32))
    assert_close_to_float64(got, exact, same_dtype)


def random_model(seed: int) -> vtp.CompactViT:
    choose = random.Random(seed)
    heads, patch = choose.randint(1, 4), (choose.randint(1, 5), choose.randint(1, 5))
    architecture = dataclasses.replace(
        TINY,
        embed_dim=heads * choose.randint(8, 40),
        num_heads=heads,
        mlp_hidden=choose.randint(1, 150),
        depth=choose.randint(1, 3),
        patch_size=patch,
        img_size=(patch[0] * choose.randint(1, 6), patch[1] * choose.randint(1, 6)),
        in_chans=choose.randint(1, 3),
        num_classes=choose.randint(1, 40),
        qkv_bias=choose.random() < 0.7,
        qk_norm=choose.random() < 0.3,
        init_values=choose.choice([None, 0.3]),
        distilled=choose.random() < 0.2,
    )
    model = gated(build(architecture, seed=seed), seed)
    small = vtp.compact(model, irregular_plan(model, seed, choose.uniform(0.05, 0.8))).float()
    return with_narrow_keys(small, seed) if seed % 2 and not architecture.qk_norm else small


def check_random_models(count: int) -> None:
    for seed in range(count):
        small = random_model(seed)
        for name, dtype in DTYPES.items():
            try:
                check(small, dtype, (1, 2, 3))
            except AssertionError as error:
                raise AssertionError(f"random model {seed} in {name}") from error


@built
@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.thorough)])
def test_random_widths_are_computed(count):
    check_random_models(count)


# -- Instruction sets ---------------------------------------------------------------------------------------


@functools.cache
def refusal_of_a_wrong_set() -> str:
    return python("import vtp_kernels.library as l; l.cpp_unsupported_reason()", VTP_CPU_ISA="avx1024").stderr


@functools.cache
def sets_here() -> tuple[str, ...]:
    named = re.search(r"expected one of (.*), the instruction sets of this machine", refusal_of_a_wrong_set())
    return tuple(named[1].split(", ")) if named else ()


@built
def test_a_wrong_instruction_set_is_refused_with_those_that_run_here():
    assert 'VTP_CPU_ISA: got "avx1024", expected one of portable' in refusal_of_a_wrong_set()
    assert sets_here() == SETS[: len(sets_here())]


@built
@pytest.mark.skipif("VTP_CPU_ISA" in os.environ, reason="a set is forced")
def test_the_engine_says_which_set_was_taken_for_a_dtype_and_why():
    """Those that a machine with dot products of bfloat16 has to choose from are the last of its sets."""
    small = compact_model("tiny")
    single, half = (vtp.optimize(small, dtype).engine for dtype in DTYPES.values())
    chosen, best = torch.ops.vtp.cpu_isa(), sets_here()[-1]
    if best in SETS[:3]:
        assert single == half == f"C++, {best}" == f"C++, {chosen}"
    else:
        assert single == "C++, avx512"
        assert re.fullmatch(rf"C\+\+, {chosen}: .*\d\.\dx as fast as avx512.* in a trial.*", half)
        assert half == vtp.optimize(small, torch.bfloat16).engine


def check_models(names: Sequence[str], shapes: Sequence[str], random_models: int) -> None:
    """What one instruction set has to pass, in a process of its own; prints its name."""
    torch.set_num_threads(1)
    for dtype in DTYPES.values():
        for name in names:
            check(compact_model(name), dtype)
        for shape in shapes:
            check(compact_model("tiny", **SHAPES[shape]), dtype)
        assert vtp.optimize(compact_model("tiny"), dtype).engine.endswith(": as VTP_CPU_ISA has it")
    check_random_models(random_models)
    print(torch.ops.vtp.cpu_isa())


# Kernels differ by instruction set and the engine does not: a few models meet all of them.
FEW = (["tiny"], ["odd-head-width", "one-head", "qk-norm-of-odd-width"], 4)
EVERY = (["tiny", *MODELS], list(SHAPES), 30)
NATIVE = ("avx2", "avx512")  # whose every kernel test_cpu_native.py compares with plain loops


@built
@pytest.mark.parametrize(
    "models", [pytest.param(FEW, id="few"), pytest.param(EVERY, id="every", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name in NATIVE else ()) for name in SETS]
)
def test_every_instruction_set_of_this_machine_is_as_close_to_float64_as_pytorch(name, models):
    if name == torch.ops.vtp.cpu_isa():
        pytest.skip("it is the one that all other tests run on")
    if name not in sets_here():
        pytest.skip(f"this machine has no {name}")
    code = f"from tests.vtp.runtime import test_cpu as t; t.check_models(*{models!r})"
    run = python(code, VTP_CPU_ISA=name)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [name]


# -- Determinism --------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", ["197-tokens", "577-tokens", "blocks-alone"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(make, dtype, threads):
    small = {
        "197-tokens": lambda: compact_model("deit-tiny", depth=1, img_size=224),
        "577-tokens": lambda: compact_model("tiny", **SHAPES["577-tokens"]),
        "blocks-alone": lambda: compact_model("map-pool-no-class-token"),
    }[make]()
    fast, images = vtp.optimize(small, DTYPES[dtype]).vit, image(small, 5).to(DTYPES[dtype])
    if make == "blocks-alone":  # the rest is PyTorch's
        fast, images = fast.blocks[0], torch.randn(5, 37, small.embed_dim).to(DTYPES[dtype])
    torch.set_num_threads(1)
    expected = fast(images)
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        for sizes in ((5,), (1, 1, 1, 1, 1), (2, 3)):
            assert torch.equal(in_batches(fast, images, sizes), expected), f"{count} threads, batches {sizes}"


@built
def test_threads_that_call_models_at_once_get_the_same_bits():
    smalls = [
        compact_model("tiny"),
        compact_model("deit-tiny"),
        random_model(1),
        with_dead_parts(DEAD["heads"], depth=3),
    ]
    calls = [
        (vtp.optimize(small, dtype), image(small, batch))
        for small in smalls
        for dtype in DTYPES.values()
        for batch in (1, 4)
    ]
    expected = [fast(images) for fast, images in calls]
    order = [i for i in range(len(calls)) for _ in range(12)]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda i: calls[i][0](calls[i][1]), order))
    assert all(torch.equal(out, expected[i]) for i, out in zip(order, got, strict=True))


# -- Memory -------------------------------------------------------------------------------------------------


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost",
    )]  # fmt: skip


def memory_in_use() -> int:
    """Bytes that malloc has given out."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("mallinfo2 is of glibc 2.33 and later")
    mallinfo2.restype = Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@built
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_steady_stream_of_calls_keeps_no_memory():
    small = compact_model("deit-tiny", depth=2)
    fast, batches = vtp.optimize(small), [image(small, batch) for batch in (1, 8, 1)]
    for images in batches * 3:
        fast(images)
    before = memory_in_use(), resident()
    for images in batches:
        for _ in range(50):
            fast(images)
    after = memory_in_use(), resident()
    assert after[0] - before[0] < 32 << 10
    assert after[1] - before[1] < 1 << 20


def weights_of(model: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


@pytest.fixture(scope="module")
def deit_small():
    torch.manual_seed(0)
    model = vtp.insert_gates(timm.create_model("deit_small_patch16_224", depth=3))
    return vtp.compact(model, irregular_plan(model))


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_take_hardly_more_memory_than_the_compact_model(deit_small, dtype):
    fast = vtp.optimize(deit_small, DTYPES[dtype])
    assert len(fast.vit.weights) <= 1.1 * weights_of(deit_small, DTYPES[dtype])
    assert sum(t.nbytes for t in fast.state_dict().values()) <= len(fast.vit.weights) + 8192


# -- Copies, compilation and export -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return compact_model("tiny")


@built
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["tiny", "map-pool-no-class-token"])
def test_a_copy_computes_the_same_and_shares_nothing(name, again):
    small = compact_model(name)
    fast, images = vtp.optimize(small, torch.bfloat16), image(small)
    expected, other = fast(images), again(fast)
    for tensor in fast.state_dict().values():
        tensor.zero_()
    assert torch.equal(other(images), expected)
    assert other.engine.startswith("C++")


@built
def test_a_state_dict_goes_into_another_of_the_same_plan(tiny, tmp_path):
    other = copy.deepcopy(tiny)
    for parameter in other.parameters():
        parameter.data.normal_()
    fast, again, images = vtp.optimize(tiny), vtp.optimize(other), image(tiny)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    again.load_state_dict(torch.load(tmp_path / "fast.pt"))
    assert torch.equal(again(images), fast(images))


@built
@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiny", "map-pool-no-class-token"])
def test_compiles_without_breaks_and_without_recompiling_for_the_batch(name, dtype):
    small = compact_model(name)
    fast = vtp.optimize(small, DTYPES[dtype])
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate((2, 5, 8)):
        images = image(small, batch)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(images), fast(images))


@built
@pytest.mark.parametrize("name", ["tiny", "map-pool-no-class-token"])
def test_exports_with_a_dynamic_batch(name, tmp_path):
    small = compact_model(name)
    fast, batch = vtp.optimize(small, torch.bfloat16), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (image(small),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "fast.pt2")
    again = torch.export.load(tmp_path / "fast.pt2").module()
    for size in (1, 7):
        assert torch.equal(again(image(small, size)), fast(image(small, size)))


def operator_calls() -> dict[str, tuple]:
    """An operator and what it is called with, for a whole model and for blocks alone."""
    small, blocks = compact_model("tiny"), compact_model("map-pool-no-class-token")
    vit, part = vtp.optimize(small).vit, vtp.optimize(blocks).vit.blocks[0]
    assert isinstance(part, CpuBlocks)
    ops = torch.ops.vtp
    return {
        "cpu_vit": (ops.cpu_vit.default, (image(small), vit.weights, vit.layout, vit.outputs)),
        "cpu_blocks": (ops.cpu_blocks.default, (torch.randn(2, 5, 192), part.weights, part.layout)),
    }


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cpu_vit", "cpu_blocks"])
def test_an_operator_keeps_the_rules_of_torch_library(name, dtype):
    operator, (x, *others) = operator_calls()[name]
    torch.library.opcheck(operator, (x.to(DTYPES[dtype]), *others))


# -- Images -------------------------------------------------------------------------------------------------


def layouts(images: Tensor) -> dict[str, Tensor]:
    padded = torch.full((*images.shape[:-1], images.shape[-1] + 3), torch.nan)
    padded[..., :-3] = images
    return {
        "channels-last": images.contiguous(memory_format=torch.channels_last),
        "strided-rows": padded[..., :-3],
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "every-other": torch.stack([images, images * torch.nan], 1).flatten(0, 1)[::2],
        "misaligned": torch.cat([images.new_zeros(1), images.flatten()])[1:].view(images.shape),
    }


@built
@pytest.mark.parametrize("kind", ["channels-last", "strided-rows", "transposed", "every-other", "misaligned"])
def test_images_in_any_memory_layout_give_the_same_logits(kind):
    small = compact_model("deit-tiny", depth=1)
    fast, images = vtp.optimize(small), image(small, 3)
    assert torch.equal(fast(layouts(images)[kind]), fast(images))
    assert torch.equal(fast(images[:1].expand(3, -1, -1, -1)), fast(images[:1].repeat(3, 1, 1, 1)))


@built
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_that_is_no_number_spoils_its_own_logits_alone(dtype, value):
    for small in (compact_model("tiny"), compact_model("deit-tiny", depth=1)):
        fast, images = vtp.optimize(small, DTYPES[dtype]), image(small, 3)
        expected = fast(images)
        images[1, 0, 3, 4] = value
        got = fast(images)
        assert got[1].isnan().all()
        assert torch.equal(got[::2], expected[::2])


@built
def test_an_empty_batch_gives_empty_results(tiny):
    fast = vtp.optimize(tiny)
    assert fast(image(tiny, 0)).shape == (0, 10)
    operator, (_, *others) = operator_calls()["cpu_blocks"]
    for shape in ((0, 5, 192), (2, 0, 192)):
        assert operator(torch.zeros(shape), *others).shape == shape


# -- What is refused ----------------------------------------------------------------------------------------

BAD_INPUTS = {
    "rank": (torch.zeros(1, 8, 8), r"images: got shape \[1, 8, 8\], expected 4 dimensions"),
    "channels": (torch.zeros(1, 3, 8, 8), r"images: got shape \[1, 3, 8, 8\], expected \[B, 1, 8, 8\]"),
    "size": (torch.zeros(2, 1, 8, 9), r"images: got shape \[2, 1, 8, 9\], expected \[B, 1, 8, 8\]"),
    "integers": (torch.zeros(1, 1, 8, 8, dtype=torch.int32), r"images: expected float32 or bfloat16"),
    "float64": (torch.zeros(1, 1, 8, 8, dtype=torch.float64), r"images: expected float32 or bfloat16"),
    "float16": (torch.zeros(1, 1, 8, 8, dtype=torch.float16), r"images: expected float32 or bfloat16"),
}


@built
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_images_that_are_not_the_models_are_refused_by_the_operator(case):
    images, message = BAD_INPUTS[case]
    operator, (_, *others) = operator_calls()["cpu_vit"]
    with pytest.raises(RuntimeError, match=message):
        operator(images, *others)


@built
def test_images_elsewhere_are_refused(tiny):
    with pytest.raises(ValueError, match=r"images: on meta, expected cpu"):
        vtp.optimize(tiny)(image(tiny).to("meta"))


@built
@pytest.mark.parametrize("name", ["tiny", "map-pool-no-class-token"])
@pytest.mark.parametrize(
    "mask", [{"is_causal": True}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}], ids=str
)
def test_masks_are_refused_with_what_to_do_instead(name, mask):
    small = compact_model(name)
    with pytest.raises(ValueError, match=r"attn_mask, is_causal: .* call the compact model itself"):
        vtp.optimize(small)(image(small), **mask)


@built
def test_memory_that_is_no_packed_model_is_refused():
    calls = operator_calls()
    (vit, (images, weights, layout, outputs)), (blocks, (tokens, *of_blocks)) = calls.values()
    for bad, message in (
        ((images, weights, layout, outputs + 1), r"outputs: got 11, expected 10"),
        ((images, weights.float(), layout, outputs), r"weights: .* expected a contiguous vector of uint8"),
        ((images, weights[None], layout, outputs), r"weights: .* expected a contiguous vector of uint8"),
        ((images, weights[::2], layout, outputs), r"weights: .* expected a contiguous vector of uint8"),
        ((images, weights, layout.int(), outputs), r"layout: .* expected a contiguous vector of int64"),
        ((images, weights, layout[:0], outputs), r"layout: it ends too early"),
        ((images, weights, torch.cat([layout, layout]), outputs), r"layout: it goes on behind its end"),
        ((images, weights[:-64], layout, outputs), r"layout: .* lies at byte"),
        ((images, *of_blocks, outputs), r"layout: it is not that of a whole model"),
    ):
        with pytest.raises(RuntimeError, match=message):
            vit(*bad)
    with pytest.raises(RuntimeError, match=r"layout: it is not that of blocks alone"):
        blocks(tokens, weights, layout)
    with pytest.raises(RuntimeError, match=r"tokens: got shape \[2, 5, 191\], expected \[B, N, 192\]"):
        blocks(tokens[..., :-1], *of_blocks)


@built
def test_weights_at_an_odd_address_are_computed_or_refused():
    vit, (images, weights, layout, outputs) = operator_calls()["cpu_vit"]
    odd = torch.cat([weights[:1], weights])[1:]
    try:
        got = vit(images, odd, layout, outputs)
    except RuntimeError:
        return
    assert torch.equal(got, vit(images, weights, layout, outputs))


def garbled(numbers: list[int], choose: random.Random) -> list[int]:
    """With one to three numbers changed, put in, taken out, or everything behind one cut off."""
    out = list(numbers)
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(out)) if out else 0
        old = out[at] if out else 0
        odd = [
            0,
            1,
            -1,
            2,
            old + 1,
            old - 1,
            old ^ 4,
            -old,
            1 << 24,
            1 << 31,
            1 << 62,
            -(1 << 63),
            choose.randrange(100),
        ]
        number = max(-(1 << 63), min((1 << 63) - 1, choose.choice(odd)))
        out[at : at + 1] = choose.choice([[number], [number], [number, old], [old, number], []])
        if choose.random() < 0.1:
            del out[at:]
    return out


def call_with_garbled_memory(count: int) -> None:
    """Prints how many of `count` lists and blocks of weights, five to one, each operator refused."""
    choose, refused = random.Random(0), 0
    for operator, (x, weights, layout, *rest) in operator_calls().values():
        for i in range(count):
            bytes_, numbers = weights.clone(), layout.tolist()
            if i % 6:
                numbers = garbled(numbers, choose)
            else:
                start = choose.randrange(len(bytes_))
                bytes_[start : start + choose.randrange(1, 4096)] = choose.randrange(256)
                bytes_ = bytes_[: choose.choice([len(bytes_), start])]
            try:
                operator(x, bytes_, torch.tensor(numbers, dtype=torch.int64), *rest)
            except RuntimeError:
                refused += 1
    print(refused)


@built
@pytest.mark.parametrize("count", [120, pytest.param(600, marks=pytest.mark.thorough)])
def test_a_garbled_packed_model_is_refused_or_computed_but_nothing_crashes(count):
    run = python(f"from tests.vtp.runtime import test_cpu as t; t.call_with_garbled_memory({count})")
    assert run.returncode == 0, (run.returncode, run.stderr[-3000:])
    assert count * 5 // 6 < int(run.stdout) <= 2 * count


# -- Accuracy -----------------------------------------------------------------------------------------------


@functools.cache
def cut_baseline() -> vtp.CompactViT:
    """The baseline that ships, with the weakest 40% of its dimensions gone: input columns by their norm."""
    model = vtp.insert_gates(open_model(FASHION_DEIT).eval())
    scores = {name: layer.weight.detach().norm(dim=0) for name, layer in vtp.sites(model).items()}
    return vtp.compact(model, vtp.make_plan(model, rate=0.4, score=scores)).eval()


def agreement() -> float:
    """Share of test images with the same best class in bfloat16 and in float32."""
    small = cut_baseline()
    one, other = (vtp.optimize(small, dtype) for dtype in DTYPES.values())
    same = total = 0
    for images, _ in test_loader(open_data(), image_size=28, in_chans=1, batch_size=250):
        same += int((one(images).argmax(1) == other(images).argmax(1)).sum())
        total += len(images)
    return same / total


@built
def test_bfloat16_names_the_same_class_as_float32():
    assert agreement() >= 0.995


# -- Without the extension ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_extension_it_runs_on_pytorch_and_says_why(monkeypatch, dtype):
    monkeypatch.setattr("vtp.runtime.cpu.cpp_unsupported_reason", lambda: "the C++ extension is not built")
    fast = check(compact_model("tiny"), DTYPES[dtype])
    assert fast.engine == "plain PyTorch: the C++ extension is not built"
    assert "plain PyTorch: the C++ extension is not built" in repr(fast)


WITHOUT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, vtp
    from tests.support.engine_cases import compact_model
    for _ in range(3):
        fast = vtp.optimize(compact_model("tiny"))
print(fast.engine)
print(*[w.message for w in caught if "vtp_kernels" in str(w.message)], sep="\\n")
"""


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (None, "the C++ extension is not built"),
        pytest.param("foreign", "the C++ extension does not load", marks=pytest.mark.thorough),
        pytest.param("cut", "vtp_kernels/_cpu.abi3.so is truncated (", marks=[built, pytest.mark.thorough]),
    ],
    ids=["missing", "foreign", "truncated"],
)
def test_an_extension_that_is_missing_or_broken_is_said_once(tmp_path, file, reason):
    shutil.copytree(ROOT / "vtp_kernels", tmp_path / "vtp_kernels", ignore=shutil.ignore_patterns("*.so"))
    if file is not None:
        content = b"no library" if file == "foreign" else EXTENSION.read_bytes()[:300_000]
        (tmp_path / "vtp_kernels" / EXTENSION.name).write_bytes(content)
    run = python(WITHOUT, first_path=tmp_path)
    assert run.returncode == 0, run.stderr
    engine, *warned = run.stdout.splitlines()
    assert engine.startswith(f"plain PyTorch: {reason}")
    assert len([line for line in warned if reason in line and "setup.py build_ext" in line]) == 1


TRUNCATED = """
import os
from pathlib import Path
from vtp_kernels.library import _load_cpp
copy = Path(os.environ["COPY"])
whole = copy.stat().st_size
for length in [whole - 1, *range(whole // 4096 * 4096, 0, -4096), 64, 63, 0]:
    os.truncate(copy, length)
    print(length, _load_cpp(copy.parent), flush=True)
"""


@built
def test_an_extension_whose_end_is_missing_is_refused_with_its_length(tmp_path):
    """The system ends a process that loads one."""
    shutil.copytree(ROOT / "vtp_kernels", tmp_path / "vtp_kernels", ignore=shutil.ignore_patterns("*.so"))
    run = python(TRUNCATED, first_path=tmp_path, COPY=str(shutil.copy(EXTENSION, tmp_path)))
    assert run.returncode == 0, f"{run.stdout[-100:]}{run.stderr}"
    *long, no_header, empty = [line.split(" ", 1) for line in run.stdout.splitlines()]
    assert len(long) > 100
    for length, reason in long:
        expected = f" is truncated ({int(length):,} bytes of {EXTENSION.stat().st_size:,}): build it again"
        assert reason.endswith(expected)
    for _, reason in (no_header, empty):
        assert reason.startswith("the C++ extension does not load: ")


@built
@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("tiny", torch.float16, r"computes in float32 and bfloat16, not in torch\.float16"),
        ("tiny", torch.float64, r"computes in float32 and bfloat16, not in torch\.float64"),
        (
            "pre-norm-quick-gelu",
            torch.float32,
            r"the activation of block 0, QuickGELU, is not the exact GELU",
        ),
    ],
    ids=["f16", "f64", "quick-gelu"],
)
def test_what_the_engine_cannot_do_is_said(name, dtype, reason):
    assert re.search(reason, vtp.optimize(compact_model(name), dtype).engine)
