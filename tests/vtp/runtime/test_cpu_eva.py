"""Rotary embeddings and SwiGLU on the CPU engine in C++: timm's `Eva`, cut."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.config
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor

import vtp
from tests.support.engine_cases import irregular_plan, references
from tests.support.models import gated, image, randomize
from tests.support.numerics import assert_close_to_float64
from tests.support.processes import python
from tests.vtp.runtime.test_cpu import DTYPES, NATIVE, SETS, built, in_batches, sets_here, threads
from vtp.runtime.cpu import CpuBlocks, rotary_table
from vtp.runtime.optimize import packed_model

__all__ = ["threads"]  # a fixture

# -- Models -------------------------------------------------------------------------------------------------

# What differs from an Eva of two blocks with 3 heads of 20, images of 20 x 24 pixels in patches of 4.
CASES = {
    "dinov3": {"rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "qkv_bias": False},
    "dinov3-swiglu": {
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
        "dynamic_img_size": True,
    },
    "eva02": {"swiglu_mlp": True},
    "eva02-base": {"swiglu_mlp": True, "scale_mlp": True},
    "eva02-clip": {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "init_values": None},
    "gelu-inner-norms": {"scale_mlp": True, "scale_attn_inner": True, "use_rot_pos_emb": False},
    "rope-mixed": {"rope_type": "mixed", "attn_type": "rope", "class_token": False, "global_pool": "avg"},
    "qk-norm": {"attn_type": "rope", "qk_norm": True},
    "qk-norm-half": {"attn_type": "rope", "qk_norm": True, "rope_rotate_half": True},
    "heads-of-64": {"embed_dim": 128, "num_heads": 2, "mlp_ratio": 1.3},
    "heads-of-4": {"embed_dim": 12, "swiglu_mlp": True, "mlp_ratio": 0.5},
    "swiglu-without-rotation": {"use_rot_pos_emb": False, "swiglu_mlp": True, "init_values": None},
}


@functools.cache
def dense(case: str) -> Eva:
    """An Eva with random weights in its blocks, in float64."""
    arguments = {"img_size": (20, 24), "patch_size": 4, "in_chans": 1, "num_classes": 64, "embed_dim": 60}
    arguments |= {"depth": 2, "num_heads": 3, "mlp_ratio": 1.7, "init_values": 0.1, "use_rot_pos_emb": True}
    torch.manual_seed(0)
    model = Eva(**arguments | {"global_pool": "token"} | CASES[case]).eval()
    randomize(model.blocks)
    return model.double()


@functools.cache
def compact_eva(case: str) -> vtp.CompactEva:
    """One of CASES cut to an irregular plan, without a head in each block."""
    model = gated(dense(case))
    plan = irregular_plan(model)
    heads, width = model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim
    kept = dict(plan.kept)
    for i in range(len(model.blocks)):
        name, gone = f"blocks.{i}.attn.proj", i % heads
        kept[name] = tuple(j for j in kept[name] if j // width != gone)
    return vtp.compact(model, dataclasses.replace(plan, kept=kept)).float()


def without_attention(case: str, *blocks: int) -> vtp.CompactEva:
    """One of CASES, of which these blocks have lost their heads."""
    model = gated(dense(case))
    plan = irregular_plan(model)
    kept = dict(plan.kept) | {f"blocks.{i}.attn.proj": () for i in blocks}
    return vtp.compact(model, dataclasses.replace(plan, kept=kept)).float()


def fast_blocks(case: str, dtype: torch.dtype = torch.float32) -> CpuBlocks:
    with torch.no_grad():
        return CpuBlocks(packed_model(compact_eva(case), dtype), dtype)


def rope_of(model: Eva) -> Tensor | None:
    """The rotary embedding of the model's own image size in float32; a mixed one for all blocks."""
    return None if model.rope is None else model.rope.get_embed(model.patch_embed.grid_size).detach().float()


def tokens(model: Eva, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    count = model.num_prefix_tokens + model.patch_embed.num_patches
    return torch.randn(batch, count, model.embed_dim, generator=generator)


def through_blocks(model: Eva, x: Tensor, rope: Tensor | None) -> Tensor:
    """As timm goes through the blocks; a mixed embedding has a part for each."""
    for i, block in enumerate(model.blocks):
        x = block(x, rope=rope[i] if model.rope_mixed else rope)
    return x


# -- What it computes ---------------------------------------------------------------------------------------


@torch.no_grad()
def check(case: str, dtype: torch.dtype) -> None:
    """The error rule on the blocks alone, with an embedding that is in float32 for all."""
    small = compact_eva(case)
    x, rope = tokens(small).to(dtype), rope_of(small)
    got = fast_blocks(case, dtype)(x, rope=rope)
    exact = through_blocks(copy.deepcopy(small).double(), x.double(), None if rope is None else rope.double())
    assert_close_to_float64(got, exact, through_blocks(copy.deepcopy(small).to(dtype), x, rope), case)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_as_close_to_float64_as_pytorch(case, dtype):
    check(case, DTYPES[dtype])


def check_cases() -> None:
    """What one instruction set has to pass, in a process of its own; prints its name."""
    torch.set_num_threads(1)
    for case in CASES:
        for dtype in DTYPES.values():
            check(case, dtype)
    print(torch.ops.vtp.cpu_isa())


@built
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name in NATIVE else ()) for name in SETS]
)
def test_every_instruction_set_of_this_machine_is_as_close_to_float64_as_pytorch(name):
    if name == torch.ops.vtp.cpu_isa():
        pytest.skip("it is the one that all other tests run on")
    if name not in sets_here():
        pytest.skip(f"this machine has no {name}")
    run = python("from tests.vtp.runtime import test_cpu_eva as t; t.check_cases()", VTP_CPU_ISA=name)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == [name]


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_model_is_as_close_to_float64_as_pytorch(case, dtype):
    small = compact_eva(case)
    fast, images = vtp.optimize(small, DTYPES[dtype]), image(small, 4)
    assert fast.engine.startswith("C++, ")
    assert_close_to_float64(fast(images), *references(small, images, DTYPES[dtype]), "logits")
    features = fast.forward_features(images.to(DTYPES[dtype]))
    assert torch.equal(fast.forward_head(features), fast(images))


@built
@pytest.mark.parametrize("case", ["dinov3-swiglu", "rope-mixed"])
def test_single_blocks_are_rotated_by_their_own_angles(case):
    small = without_attention(case, 0)
    fast, images = vtp.optimize(small, features=True), image(small, 3)
    got, exact, same = (
        model.forward_intermediates(images.to(dtype), intermediates_only=True)
        for model, dtype in (
            (fast, torch.float32), (copy.deepcopy(small).double(), torch.float64), (small, torch.float32)
        )
    )  # fmt: skip
    assert fast.engine.startswith("C++, ") and len(got) == 2
    for i, (a, b, c) in enumerate(zip(got, exact, same, strict=True)):
        assert_close_to_float64(a, b, c, f"block {i}")


@built
def test_one_model_takes_images_of_any_size():
    small = compact_eva("dinov3-swiglu")
    fast = vtp.optimize(small)
    for size in ((8, 12), (28, 20), (20, 24), (4, 4)):
        images = torch.randn(4, 1, *size)
        assert_close_to_float64(fast(images), *references(small, images, torch.float32), str(size))


@pytest.mark.parametrize("rotate_half", [False, True], ids=["interleaved", "half"])
def test_the_table_is_timms_rotation_and_leaves_prefix_tokens_alone(rotate_half):
    torch.manual_seed(0)
    angles = torch.randn(2, 3, 7, 4).double()  # two blocks, three heads
    twice = torch.cat([angles, angles], -1) if rotate_half else angles.repeat_interleave(2, -1)
    x = torch.randn(6, 2 + 7, 8).double()
    rotated = apply_rot_embed_cat(
        x[:, 2:], torch.cat([twice.sin(), twice.cos()], -1).flatten(0, 1), rotate_half
    )
    table = rotary_table(torch.cat([twice.sin(), twice.cos()], -1), 2, rotate_half)
    assert table.shape == (6, 9, 8) and table.dtype == torch.float32 and table.is_contiguous()
    cosines, sines = table.double().chunk(2, -1)
    assert (cosines[:, :2] == 1).all() and (sines[:, :2] == 0).all()
    order = slice(None) if rotate_half else [0, 2, 4, 6, 1, 3, 5, 7]
    first, second = x[..., order].chunk(2, -1)
    got = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
    torch.testing.assert_close(got[:, 2:], rotated[..., order], rtol=0, atol=1e-6)
    assert torch.equal(got[:, :2], x[:, :2][..., order])


# -- Determinism, compilation and export --------------------------------------------------------------------


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["dinov3-swiglu", "rope-mixed"])
def test_bits_depend_neither_on_threads_nor_on_the_batch(case, dtype, threads):
    small = compact_eva(case)
    blocks, rope, x = fast_blocks(case, DTYPES[dtype]), rope_of(small), tokens(small, 5).to(DTYPES[dtype])
    fast = functools.partial(blocks, rope=rope)
    torch.set_num_threads(1)
    expected = fast(x)
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        for sizes in ((5,), (1, 1, 1, 1, 1), (2, 3)):
            assert torch.equal(in_batches(fast, x, sizes), expected), f"{count} threads, batches {sizes}"


@built
@pytest.mark.parametrize("case", ["dinov3-swiglu", pytest.param("rope-mixed", marks=pytest.mark.thorough)])
def test_compiles_without_breaks_and_without_recompiling_for_the_batch(case):
    small = compact_eva(case)
    fast = vtp.optimize(small)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate((4, 5, 8)):
        images = image(small, batch)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(images), fast(images))


@built
@pytest.mark.parametrize("case", ["dinov3-swiglu", "rope-mixed"])
def test_exports_with_a_dynamic_batch(case, tmp_path):
    small = compact_eva(case)
    fast, batch = vtp.optimize(small, torch.bfloat16), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (image(small),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "fast.pt2")
    again = torch.export.load(tmp_path / "fast.pt2").module()
    for size in (1, 7):
        assert torch.equal(again(image(small, size)), fast(image(small, size)))


# -- What is refused ----------------------------------------------------------------------------------------


def operator_call(case: str = "rope-mixed") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights, layout and tables."""
    small, blocks = compact_eva(case), fast_blocks(case)
    table = rotary_table(rope_of(small), small.num_prefix_tokens, blocks.rotate_half)
    return tokens(small), blocks.weights, blocks.layout, table


@built
def test_the_operator_keeps_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.vtp.cpu_blocks.default, operator_call())
    plain, x = fast_blocks("swiglu-without-rotation"), tokens(dense("swiglu-without-rotation"))
    torch.library.opcheck(torch.ops.vtp.cpu_blocks.default, (x, plain.weights, plain.layout, None))


@built
def test_an_empty_batch_gives_an_empty_result():
    x, *others = operator_call()
    assert torch.ops.vtp.cpu_blocks(x[:0], *others).shape == (0, *x.shape[1:])


@built
def test_tables_that_are_not_the_models_are_refused_by_the_operator():
    x, weights, layout, table = operator_call()
    # The last head of the last block is left, so all tables are needed.
    most, *size = table.shape
    wanted = rf"expected contiguous float32 \[T, {size[0]}, {size[1]}\] with T at least {most}"
    for bad, got in (
        (None, "got none"),
        (table[:-1], rf"got shape \[{most - 1}, {size[0]}, {size[1]}\]"),
        (table[:, :-1].contiguous(), rf"got shape \[{most}, {size[0] - 1}, {size[1]}\]"),
        (table[..., :-2].contiguous(), rf"got shape \[{most}, {size[0]}, {size[1] - 2}\]"),
        (table[0], rf"got shape \[{size[0]}, {size[1]}\]"),
        (table.double(), "got another dtype or memory format"),
        (table.bfloat16(), "got another dtype or memory format"),
        (table.mT.contiguous().mT, "got another dtype or memory format"),
    ):
        with pytest.raises(RuntimeError, match=f"rotary: {got}, {wanted}"):
            torch.ops.vtp.cpu_blocks(x, weights, layout, bad)
    plain = fast_blocks("swiglu-without-rotation")
    with pytest.raises(RuntimeError, match=r"rotary: got shape .* expected none: the layout has no head"):
        torch.ops.vtp.cpu_blocks(x, plain.weights, plain.layout, table)


def refusing(case: str) -> tuple[Callable, Tensor]:
    """Blocks of `case` on tokens, to be called with an embedding, and the one that is right."""
    small, blocks = compact_eva(case), fast_blocks(case)
    return lambda rope: blocks(tokens(small), rope=rope), rope_of(small)


@built
def test_an_embedding_of_another_shape_is_refused():
    fast, rope = refusing("dinov3")
    for bad, got in (
        (None, "None"),
        (rope[:-1], r"shape \(29, 40\)"),
        (rope[:, :-4], r"shape \(30, 36\)"),
        (rope.expand(3, 1, -1, -1), r"shape \(3, 1, 30, 40\)"),  # as patch dropout has it
    ):
        with pytest.raises(ValueError, match=rf"rope: got {got}, expected shape \(30, 40\)"):
            fast(bad)
    fast, mixed = refusing("rope-mixed")
    for bad in (mixed[0], mixed[:1], mixed[:, :1], mixed[:, None].expand(-1, 3, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"rope: got shape \(.*\), expected shape \(2, 3, 30, 40\)"):
            fast(bad)
    fast, _ = refusing("swiglu-without-rotation")
    with pytest.raises(ValueError, match=r"rope: got shape .* expected None: the model has no rotary"):
        fast(rope)


@built
@pytest.mark.parametrize("case", ["dinov3", "rope-mixed"])
def test_an_embedding_for_which_no_head_is_left_is_of_no_use(case):
    small = without_attention(case, 0, 1)
    fast, images = vtp.optimize(small), image(small, 4)
    assert fast.engine.startswith("C++, ")
    assert_close_to_float64(fast(images), *references(small, images, torch.float32))
