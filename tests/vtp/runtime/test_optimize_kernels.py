"""Whole models on their kernels: in the interpreter, and their launches on the meta device."""

import contextlib
import copy
import functools
import importlib

import pytest
import timm
import torch

import vtp
from tests.support.engine_cases import (
    OPS,
    NotedOperators,
    assert_gradients_close_to_float64,
    compact_model,
    noted_launches,
    references,
    with_dead_parts,
)
from tests.support.guarded_memory import replaced
from tests.support.models import image
from tests.support.numerics import assert_close_to_float64
from tests.support.triton_harness import check_canaries, guarded, guarded_outputs
from vtp.runtime.optimize import pack_for_ops
from vtp_kernels import launching
from vtp_kernels.library import TritonSides

triton = pytest.importorskip("triton")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEAD_PARTS = ("0.attn.qkv", "1.attn.proj.1", "1.mlp.fc1", "2.attn.proj.0", "2.attn.proj.2")


def make(name, changes, dtype=torch.float32):
    if name == "dead-parts":
        return with_dead_parts(DEAD_PARTS, dtype, **changes)
    return compact_model(name, dtype, **changes)


# -- In the worker ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_kernels(side="end"):
    """Ops run their kernels, between protected pages, on outputs full of NaN."""
    with noted_launches() as names, guarded_outputs(side), TritonSides():
        yield names
    check_canaries()


def guard(module, side):
    """Move the tensors of a module between protected pages, and its input at every call."""
    for owner in module.modules():
        for tensors in (owner._buffers, owner._parameters):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = guarded(tensor, side, align=16).requires_grad_(tensor.requires_grad)

    def guard_input(_, arguments):
        (x,) = arguments
        return None if x.requires_grad else (guarded(x, side, align=16),)  # a copy has no history

    module.register_forward_pre_hook(guard_input)


@torch.no_grad()
def check_inference(name, changes, dtype, batch, side, in_attention=False):
    small = make(name, changes)
    images = image(small, batch)
    exact, same_dtype = references(small, images, dtype)
    fast = pack_for_ops(small, dtype)
    guard(fast.vit.blocks, side)
    rotated = launching.forced_path("rotated_linear", "attention")
    with rotated if in_attention else contextlib.nullcontext(), on_kernels(side) as launched:
        features = fast.vit.forward_features(images.to(dtype))
    assert launched and not (in_attention and "_rotate_heads_kernel" in launched), launched
    assert_close_to_float64(fast.vit.forward_head(features), exact, same_dtype, "logits")


# -- In the interpreter -------------------------------------------------------------------------------------

INFERENCE = {
    "deit-tiny": ("deit-tiny", {"depth": 2}, 2),
    "deit-small-17-tokens": ("deit-small", {"img_size": 64, "depth": 1}, 1),
    "deit-base-block": ("deit-base", {}, 1),
    "dinov2-layer-scale": ("dinov2-layer-scale", {"depth": 1, "embed_dim": 128, "num_heads": 2}, 2),
    "registers": ("dinov2-registers", {"depth": 1, "embed_dim": 128, "num_heads": 2}, 2),
    "qk-norm": ("qk-norm", {"depth": 1}, 2),
    "quick-gelu": ("pre-norm-quick-gelu", {}, 1),
    "rotary-swiglu": ("rotary-swiglu", {}, 2),
    "rotary-mixed": ("rotary-mixed", {"depth": 1}, 2),
    "rotary-qk-norm": ("rotary-qk-norm", {}, 2),
    "rotary-inner-norms": ("rotary-inner-norms", {"depth": 1}, 2),
    "dead-heads-and-branches": ("dead-parts", {"depth": 3}, 3),
    "deit-tiny-block-197-tokens": ("deit-tiny", {"img_size": 224, "depth": 1}, 1),
}
# More of the same, wider, longer.
WIDE = ("deit-tiny", "deit-small-17-tokens", "deit-base-block", "deit-tiny-block-197-tokens")


@pytest.mark.covering(1)
@pytest.mark.parametrize(("dtype", "side"), [("f32", "end"), ("bf16", "begin")])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough if case in WIDE else ()) for case in INFERENCE]
)
def test_packed_model_on_its_kernels_is_as_close_to_float64_as_pytorch(interpreter, case, dtype, side):
    name, changes, batch = INFERENCE[case]
    interpreter.run(check_inference, name, changes, DTYPES[dtype], batch, side)


@pytest.mark.parametrize(("name", "dtype"), [("rotary-swiglu", "bf16"), ("rotary-mixed", "f32")])
def test_packed_model_whose_attention_rotates(interpreter, name, dtype):
    interpreter.run(check_inference, name, {"depth": 1}, DTYPES[dtype], 2, "end", in_attention=True)


def test_packed_model_in_float16(interpreter):
    interpreter.run(check_inference, "deit-tiny", {"depth": 1}, torch.float16, 2, "end")


def step(model, images, autocast):
    """The loss of one step and the gradient of every parameter."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(images).float().square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def check_fine_tuning(name, changes, batch, side, autocast, path):
    small = make(name, changes)
    images = image(small, batch)
    exact = step(copy.deepcopy(small).double(), images.double(), False)
    same_dtype = step(copy.deepcopy(small), images, autocast)
    guard(small.blocks, side)
    everywhere = [(importlib.import_module("vtp.pruning.compact"), "_on_kernels", lambda x: True)]
    forced = launching.forced_path("compact_training", path)
    with replaced(everywhere), forced, on_kernels(side) as launched:
        got = step(small, images, autocast)
    assert any("bwd" in kernel for kernel in launched), launched
    assert_gradients_close_to_float64(got, exact, same_dtype)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("autocast", "side", "path"),
    [(False, "end", "narrow"), (True, "begin", "narrow"), (True, "begin", "padded")],
    ids=["f32", "autocast-bf16", "autocast-bf16-padded"],
)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dead-parts", {"depth": 3, "init_values": 0.1}),
        ("deit-tiny", {"depth": 1}),
        ("rotary-swiglu", {"depth": 1}),
        ("rotary-mixed", {"depth": 1}),
        ("rotary-inner-norms", {"depth": 1}),
    ],
    ids=["dead-parts", "deit-tiny", "rotary-swiglu", "rotary-mixed", "rotary-inner-norms"],
)
def test_fine_tuning_on_the_kernels_has_the_gradients_of_pytorch(
    interpreter, name, changes, autocast, side, path
):
    interpreter.run(check_fine_tuning, name, changes, 2, side, autocast, path)


# -- On the meta device -------------------------------------------------------------------------------------


@torch.no_grad()
def recorded(small, dtype, batch, target="sm_90"):
    """What warm blocks would launch on `target`: kernels in order, their variants, and other operators."""
    fast = pack_for_ops(small, dtype).to("meta")
    x = torch.empty(batch, 197, fast.vit.embed_dim, device="meta", dtype=dtype)
    rotary = small.plan.architecture.rotary
    tokens, width = 197 - small.num_prefix_tokens, 2 * small.plan.head_dim
    keywords = {"rope": torch.empty(tokens, width, device="meta")} if rotary else {}

    def run():
        for block in fast.vit.blocks:
            block(x, **keywords)

    with launching.recording("engine", target), TritonSides():
        run()  # fills caches, as warmup does
    noted = NotedOperators()
    with (
        launching.recording("engine", target) as variants,
        noted_launches() as launched,
        noted,
        TritonSides(),
    ):
        run()
    return launched, variants, noted.names


# Operators that make a view, or memory, and launch nothing.
FREE = {
    "aten::alias",
    "aten::as_strided",
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::promote_types",
    "aten::reshape",
    "aten::slice.Tensor",
    "aten::t",
    "aten::to.dtype",
    "aten::view",
}
VENDOR = {"aten::mm.out", "aten::addmm.out", "aten::addmm_", "aten::gelu_", "aten::add.out"}
MANY_ROWS = 1024  # from which a product is the vendor's, with GELU in a pass of its own


def launches_of_blocks(rows, blocks=1):
    """With many rows GELU is a launch more, and so is the residual of the last branch."""
    return 8 * blocks + 1 if rows >= MANY_ROWS else 7 * blocks


@pytest.mark.parametrize("way", ["epilogue", "pass"])
@pytest.mark.parametrize("batch", [1, 64])
def test_rotation_and_swiglu_are_launches_only_of_many_rows_or_where_forced(batch, way):
    small = compact_model("rotary-swiglu", depth=1)
    with launching.forced_path("rotated_linear", way), launching.forced_path("swiglu", way):
        launched, _, noted = recorded(small, torch.bfloat16, batch)
    others = [name for name in noted if name not in FREE and not name.startswith("vtp::")]
    passes = 197 * batch >= MANY_ROWS or way == "pass"
    assert launched.count("_rotate_heads_kernel") == launched.count("_swiglu_fwd_kernel") == passes
    assert set(others) <= VENDOR, others
    # Of many rows SwiGLU takes the place of GELU, which is a pass too.
    more = passes + (passes and 197 * batch < MANY_ROWS)
    assert len(launched) + len(others) == launches_of_blocks(197 * batch) + more


@pytest.mark.parametrize("batch", [1, 64])
def test_attention_rotates_where_forced_and_saves_the_pass(batch):
    small = compact_model("rotary-swiglu", depth=1)
    default, _, _ = recorded(small, torch.bfloat16, batch)
    with launching.forced_path("rotated_linear", "attention"):
        launched, _, _ = recorded(small, torch.bfloat16, batch)
    rows = 197 * batch
    assert [name for name in default if name != "_rotate_heads_kernel"] == launched
    assert default.count("_rotate_heads_kernel") == (rows >= MANY_ROWS)


@functools.cache
def whole_deit_base():
    model = vtp.insert_gates(timm.create_model("deit_base_patch16_224", depth=2))
    return vtp.compact(model, vtp.make_plan(model, rate=0.0))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_a_block_of_a_whole_deit_base_is_seven_launches_or_eight(batch, dtype, target):
    """Nothing is split that need not be: its 3,072 hidden units at batch 1 are one product."""
    small = whole_deit_base()
    assert small.blocks[0].mlp.fc2.in_features == 3072
    launched, _, operators = recorded(small, DTYPES[dtype], batch, target)
    everything = launched + [operator for operator in operators if operator not in FREE]
    assert len(everything) == launches_of_blocks(197 * batch, 2), everything
    assert set(everything) - set(launched) <= VENDOR


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("name", ["deit-tiny", "deit-small", "deit-base"])
def test_a_block_is_at_most_seven_launches_or_nine(name, batch, dtype, target):
    launched, _, operators = recorded(compact_model(name, depth=1), DTYPES[dtype], batch, target)
    everything = launched + [operator for operator in operators if operator not in FREE]
    assert 5 <= len(everything) <= launches_of_blocks(197 * batch), everything
    assert set(everything) - set(launched) <= VENDOR


@pytest.mark.parametrize("dtype", DTYPES)
def test_twelve_blocks_at_any_batch_need_few_compilations_and_all_were_made_ahead_of_time(dtype):
    small = compact_model("deit-tiny", depth=12)
    ahead = {
        variant.key()
        for op in OPS
        for variant in importlib.import_module(f"vtp_kernels.{op}").variants("sm_90")
    }
    found = {}
    for batch in (1, 2, 8, 64, 256):
        found |= recorded(small, DTYPES[dtype], batch)[1]
    assert found.keys() <= ahead
    assert len(found) <= 12, sorted(variant.name for variant in found.values())


def test_a_dead_branch_launches_nothing():
    small = with_dead_parts(("0.mlp.fc1", "1.attn.qkv"), embed_dim=24, mlp_hidden=40, depth=2)
    fewer, _, others = recorded(small, torch.float32, 2)
    more, _, _ = recorded(with_dead_parts((), embed_dim=24, mlp_hidden=40, depth=2), torch.float32, 2)
    assert len(fewer) == len(more) // 2
    assert set(others) <= FREE
