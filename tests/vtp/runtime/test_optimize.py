"""A model packed for the ops against the compact model that it was made from, on plain PyTorch."""

import copy
import dataclasses
import os
import shutil
import sys

import pytest
import timm
import torch
from torch import nn

import vtp
from tests.support.engine_cases import (
    MODELS,
    NotedOperators,
    compact_model,
    references,
    with_dead_parts,
    with_narrow_keys,
)
from tests.support.models import FAMILIES, TINY, build, gated, image, relative_error
from tests.support.numerics import assert_close_to_float64
from vtp.pruning.compact import ConstantBranch
from vtp.runtime import cpu
from vtp.runtime.optimize import pack_for_ops
from vtp.runtime.packed import PackedAttention, PackedBlock, PackedLinear, PatchProduct
from vtp_kernels import launching
from vtp_kernels.rows import has_padded_rows

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(autouse=True)
def without_the_cpp_engine(monkeypatch):
    monkeypatch.setattr(cpu, "cpp_unsupported_reason", lambda: "switched off")


@pytest.fixture(scope="module")
def tiny():
    """A compact model of odd widths in float32."""
    return compact_model("tiny")


# -- What it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", *MODELS])
def test_packing_changes_nothing_in_float64(name):
    small = compact_model(name, torch.float64)
    images = image(small)
    assert relative_error(vtp.optimize(small)(images), small(images)) <= 1e-12


def test_packing_narrow_keys_changes_nothing_in_float64():
    small = with_narrow_keys(compact_model("deit-tiny", torch.float64))
    images = image(small)
    assert relative_error(vtp.optimize(small)(images), small(images)) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["deit-tiny", "deit-small", "deit-base", "dinov2-layer-scale", "deit-distilled"]
)
def test_packed_model_is_as_close_to_float64_as_pytorch(name, dtype):
    small = compact_model(name)
    images = image(small, batch=3)
    exact, same_dtype = references(small, images, DTYPES[dtype])
    assert_close_to_float64(vtp.optimize(small, DTYPES[dtype])(images), exact, same_dtype, "logits")


# Sites of two or three blocks that keep nothing. (A site of attention or of the MLP kills its branch.)
DEAD = {
    "first-attention": ("0.attn.qkv",),
    "first-mlp": ("0.mlp.fc2",),
    "first-block": ("0.attn.proj", "0.mlp.fc1"),
    "first-two-blocks": ("0.attn.qkv", "0.mlp.fc1", "1.attn.proj", "1.mlp.fc2"),
    "middle-attention": ("1.attn.proj",),
    "middle-mlp": ("1.mlp.fc1",),
    "middle-block": ("1.attn.qkv", "1.mlp.fc2"),
    "last-attention": ("2.attn.qkv",),
    "last-mlp": ("2.mlp.fc2",),
    "last-block": ("2.attn.proj", "2.mlp.fc1"),
    "attention-everywhere": ("0.attn.qkv", "1.attn.qkv", "2.attn.qkv"),
    "mlp-everywhere": ("0.mlp.fc1", "1.mlp.fc1", "2.mlp.fc1"),
    "everything": tuple(f"{i}.{site}" for i in range(3) for site in ("attn.qkv", "mlp.fc1")),
    "heads": ("0.attn.proj.1", "1.attn.proj.0", "1.attn.proj.2", "2.attn.proj.2"),
}


@pytest.mark.parametrize("scale", [None, 0.1], ids=["plain", "layer-scale"])
@pytest.mark.parametrize("dead", DEAD)
def test_constants_of_dead_branches_are_kept(dead, scale):
    small = with_dead_parts(DEAD[dead], torch.float64, depth=3, init_values=scale)
    images = image(small)
    fast = vtp.optimize(small)
    assert relative_error(fast(images), small(images)) <= 1e-12
    exact, same_dtype = references(small.float(), images, torch.float32)
    assert_close_to_float64(vtp.optimize(small)(images.float()), exact, same_dtype, "logits")
    first_is_dead = isinstance(small.blocks[0].attn, ConstantBranch)
    assert [block.offset is not None for block in fast.vit.blocks] == [first_is_dead, False, False]


def test_a_bias_gets_its_constants_before_it_is_rounded():
    """Each of 20 constants would be lost beside a bias of 1 in bfloat16; their sum is not."""
    dead = [f"{i}.{site}" for i in range(1, 11) for site in ("attn.qkv", "mlp.fc1")]
    small = with_dead_parts(tuple(dead), depth=11)
    with torch.no_grad():
        small.blocks[0].attn.proj.bias.zero_()  # it comes with that of fc2
        small.blocks[0].mlp.fc2.bias.fill_(1.0)
        for block in small.blocks[1:]:
            block.attn.bias.fill_(0.003)
            block.mlp.bias.fill_(0.003)
    bias = vtp.optimize(small, torch.bfloat16).vit.blocks[0].mlp.fc2.bias
    assert torch.equal(bias, torch.full((12,), 1.06).bfloat16())


@pytest.mark.parametrize("dead", ["middle-block", "last-mlp", "last-block", "everything", "heads"])
def test_constants_are_kept_where_branches_add_in_place(dead):
    """As they do in models wider than what `compact_mlp` makes in one kernel."""
    small = with_dead_parts(DEAD[dead], torch.float64, depth=3, embed_dim=264)
    images = image(small)
    fast = vtp.optimize(small)
    assert relative_error(fast(images), small(images)) <= 1e-12


def test_biases_are_left_to_the_norms_behind_them_and_to_the_last_branch():
    blocks = pack_for_ops(compact_model("deit-small", depth=3)).vit.blocks
    linears = [linear for block in blocks for linear in (block.attn.proj, block.mlp.fc2)]
    norms = [norm for block in blocks for norm in (block.attn.norm, block.mlp.norm)]
    assert [linear.bias is None for linear in linears] == [True] * 5 + [False]
    assert [norm.shift is None for norm in norms] == [True] + [False] * 5


@torch.no_grad()
def test_blocks_that_give_features_leave_what_they_read():
    small = compact_model("deit-small", torch.float64, depth=2)
    x = torch.randn(2, 5, small.embed_dim, dtype=torch.float64)
    for features in (True, False):
        given = x.clone()
        pack_for_ops(small, features=features).vit.blocks[0](given)
        assert torch.equal(given, x) == features


@pytest.fixture
def padded_heads(monkeypatch):
    """Heads are filled up for PyTorch's fused attention, where they can be."""

    def always(self, tokens):
        return not self.heads.is_normed

    monkeypatch.setattr(PackedAttention, "is_faster_padded", always)


@pytest.mark.parametrize("narrow", [False, True], ids=["whole-keys", "narrow-keys"])
@pytest.mark.parametrize("name", ["tiny", "deit-tiny", "dinov2-layer-scale", "rotary-swiglu", "qk-norm"])
def test_padded_heads_change_nothing_in_float64(padded_heads, name, narrow):
    small = compact_model(name, torch.float64)
    if narrow:
        if small.plan.architecture.whole_keys:
            pytest.skip("its keys stay whole")
        small = with_narrow_keys(small)
    images = image(small)
    fast = pack_for_ops(small)
    attn = fast.vit.blocks[0].attn
    assert bool(attn.padded_head) == (name != "qk-norm")
    assert relative_error(fast(images), small(images)) <= 1e-12


@pytest.mark.parametrize("mask", ["causal", "boolean", "additive"])
def test_masks_act_on_padded_heads_too(padded_heads, mask):
    test_attention_masks_act_as_in_the_compact_model("tiny", mask)


def test_heads_are_padded_where_that_is_predicted_to_be_faster():
    """Of 16 bits on a GPU: values of half a head yes; one wide head beside many narrow ones not."""
    small = compact_model("deit-base", torch.bfloat16, depth=1)
    attn = PackedBlock(small.blocks[0], torch.bfloat16).attn
    assert not attn.is_faster_padded(197), "on a CPU"
    attn.to("meta")
    assert attn.is_faster_padded(197)
    with launching.forced_path("packed_attention", "ragged"):
        assert not attn.is_faster_padded(197)
    attn.heads.key_widths = attn.heads.value_widths = (64, *(4,) * 11)
    assert not attn.is_faster_padded(197)
    assert not attn.float().is_faster_padded(197), "in float32"


@pytest.mark.parametrize(
    ("patch", "size"), [(16, (32, 48)), (14, (28, 42)), (7, (30, 23))], ids=["16", "14", "with-a-rest"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_times_a_matrix_are_their_convolution(patch, size, bias):
    conv = nn.Conv2d(3, 10, patch, patch, bias=bias).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for given in (images, images.contiguous(memory_format=torch.channels_last), images[:0]):
        torch.testing.assert_close(PatchProduct(conv)(given), conv(given), rtol=0, atol=1e-12)


def test_other_convolutions_are_left():
    assert PatchProduct.takes(nn.Conv2d(3, 8, 4, 4))
    for other in (
        nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, 1), nn.Conv2d(4, 8, 4, 4, groups=2),
        nn.Conv2d(3, 8, 4, 4, dilation=2), nn.Identity(),
    ):  # fmt: skip
        assert not PatchProduct.takes(other)


@pytest.mark.parametrize("mask", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("name", ["tiny", "qk-norm"])
def test_attention_masks_act_as_in_the_compact_model(name, mask):
    small = compact_model(name, torch.float64)
    tokens = small.pos_embed.shape[1]
    arguments = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.ones(tokens, tokens, dtype=torch.bool).tril(1)},
        "additive": {"attn_mask": torch.randn(tokens, tokens, dtype=torch.float64)},
    }[mask]
    fast, images = vtp.optimize(small), image(small)
    expected = small(images, **arguments)
    assert relative_error(fast(images, **arguments), expected) <= 1e-12
    assert relative_error(fast(images), expected) > 1e-3


@pytest.fixture
def rotated_in_attention():
    with launching.forced_path("rotated_linear", "attention"):
        yield


def ops_of(noted):
    return {name.removeprefix("vtp::") for name in noted.names if name.startswith("vtp::rotate")}


class TestRotationInAttention:
    """Forced, since it is nobody's default."""

    @pytest.mark.parametrize("name", ["rotary-swiglu", "rotary-mixed", "rotary-qk-norm"])
    def test_it_changes_nothing_in_float64(self, rotated_in_attention, name):
        small = compact_model(name, torch.float64)
        images = image(small)
        with NotedOperators() as noted:
            out = pack_for_ops(small)(images)
        assert relative_error(out, small(images)) <= 1e-12
        behind_norms = name == "rotary-qk-norm"  # where PyTorch rotates
        assert ops_of(noted) == (set() if behind_norms else {"rotated_attention"})

    def test_under_a_mask_queries_and_keys_are_rotated_before(self, rotated_in_attention):
        small = compact_model("rotary-swiglu", torch.float64)
        images = image(small)
        with NotedOperators() as noted:
            out = pack_for_ops(small)(images, is_causal=True)
        assert relative_error(out, small(images, is_causal=True)) <= 1e-12
        assert ops_of(noted) == {"rotate_heads"}

    def test_padded_heads_are_rotated_behind_the_product(self, rotated_in_attention, padded_heads):
        small = compact_model("rotary-swiglu", torch.float64)
        images = image(small)
        with NotedOperators() as noted:
            out = pack_for_ops(small)(images)
        assert relative_error(out, small(images)) <= 1e-12
        assert ops_of(noted) == {"rotated_linear"}

    def test_a_compact_model_in_training_keeps_the_pass(self, rotated_in_attention, monkeypatch):
        monkeypatch.setattr("vtp.pruning.compact._on_kernels", lambda x: True)
        small = compact_model("rotary-swiglu", depth=1).train()
        with NotedOperators() as noted:
            small(image(small)).sum().backward()
        assert ops_of(noted) == {"rotate_heads", "rotate_heads_backward"}

    @torch.no_grad()
    def test_it_compiles_without_breaks(self, rotated_in_attention):
        small = compact_model("rotary-swiglu", depth=1)
        fast, images = pack_for_ops(small), image(small)
        torch.compiler.reset()
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(images), fast(images))


def test_heads_too_wide_for_the_op_are_computed_by_pytorch():
    small = compact_model("tiny", torch.float64, embed_dim=540, num_heads=2, mlp_hidden=8, depth=1)
    assert small.blocks[0].attn.head_dim == 270
    images = image(small)
    assert relative_error(vtp.optimize(small)(images), small(images)) <= 1e-12


def test_it_may_be_made_of_a_model_of_16_bits(tiny):
    half = copy.deepcopy(tiny).bfloat16()
    images = image(tiny)
    exact, same_dtype = references(half, images.bfloat16(), torch.bfloat16)
    fast = vtp.optimize(half)
    assert fast(images).dtype == torch.bfloat16
    assert_close_to_float64(fast(images), exact, same_dtype, "logits")


def test_an_empty_batch_gives_empty_logits(tiny):
    assert vtp.optimize(tiny)(image(tiny, batch=0)).shape == (0, 10)


@pytest.mark.parametrize("family", ["plain", "rotary"])
@pytest.mark.parametrize("pack", [vtp.optimize, pack_for_ops], ids=["engine", "ops"])
def test_an_empty_batch_of_any_image_size_gives_empty_results(pack, family):
    model = gated(build(dataclasses.replace(FAMILIES[family], dynamic_img_size=True), torch.float32))
    fast = pack(vtp.compact(model, vtp.make_plan(model, rate=0.4)), features=True)
    for size in ((8, 8), (12, 16)):
        some, none = (torch.zeros(batch, 1, *size) for batch in (2, 0))
        assert fast(none).shape == (0, 10)
        assert fast.forward_features(none).shape == (0, *fast.forward_features(some).shape[1:])
        (last, found), (of_some, shapes) = (fast.forward_intermediates(images) for images in (none, some))
        assert last.shape == (0, *of_some.shape[1:])
        assert [each.shape for each in found] == [(0, *each.shape[1:]) for each in shapes]
    with pytest.raises(ValueError, match="expected multiples of"):
        fast(torch.zeros(0, 1, 9, 8))


def test_channels_last_images_give_the_same_logits():
    small = compact_model("deit-tiny", depth=2)
    fast, images = vtp.optimize(small), image(small)
    torch.testing.assert_close(fast(images.to(memory_format=torch.channels_last)), fast(images))


def test_other_image_sizes_where_the_model_takes_them():
    small = compact_model("any-image-size", torch.float64)
    images = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    assert relative_error(vtp.optimize(small)(images), small(images)) <= 1e-12


def test_a_changed_head_and_input_size_are_those_of_the_packed_model():
    small = compact_model("deit-tiny", torch.float64, depth=1)
    small.reset_classifier(7)
    small.head.double()
    small.set_input_size((48, 32))
    images = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    assert relative_error(vtp.optimize(small)(images), small(images)) <= 1e-12


# -- What it is ---------------------------------------------------------------------------------------------


def packed_linears(fast):
    return [module for module in fast.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_weights_start_at_16_bytes_and_are_padded_with_zeros(tiny, dtype):
    fast = vtp.optimize(tiny, DTYPES[dtype])
    layers = packed_linears(fast)
    assert len(layers) == 8
    assert any(layer.in_features % 8 for layer in layers)
    assert all(has_padded_rows(layer.weight) for layer in layers)
    assert not any(layer.storage[:, layer.in_features :].any() for layer in layers)


@pytest.mark.parametrize("changes", [{}, {"embed_dim": 20, "mlp_hidden": 37, "num_heads": 2}], ids=str)
def test_packing_a_model_that_keeps_everything_changes_nothing_at_odd_widths(changes):
    for inner in ({}, {"scale_attn_norm": True, "scale_mlp_norm": True}):
        model = vtp.insert_gates(build(dataclasses.replace(TINY, **changes, **inner)))
        small = vtp.compact(model, vtp.make_plan(model, rate=0.0))
        fast = pack_for_ops(small)
        assert relative_error(fast(image(small)), small(image(small))) <= 1e-12


@pytest.mark.parametrize("name", ["deit-tiny", "rotary-inner-norms"])
def test_for_the_ops_of_a_gpu_every_product_takes_and_makes_a_multiple_of_8(name):
    small = compact_model(name, depth=2).double()
    blocks, fast = small.blocks, pack_for_ops(small)
    assert any(block.attn.qkv.in_features % 8 and block.mlp.fc2.in_features % 8 for block in blocks)
    layers = packed_linears(fast)
    assert not any(layer.in_features % 8 or len(layer.storage) % 8 for layer in layers)
    assert relative_error(fast(image(small)), small(image(small))) <= 1e-12


def test_everything_but_indices_is_in_its_dtype(tiny):
    fast = vtp.optimize(tiny, torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in fast.state_dict().items()}
    odd = {name for name, dtype in kinds.items() if dtype != torch.bfloat16}
    assert odd == {name for name in kinds if name.endswith(".index")}
    assert all(kinds[name] == torch.int64 for name in odd)


def test_it_shares_no_memory_with_the_compact_model(tiny):
    small = copy.deepcopy(tiny)
    fast, images = vtp.optimize(small), image(small)
    expected = fast(images)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert torch.equal(fast(images), expected)


def test_the_compact_model_is_left_as_it_was():
    small = compact_model("tiny").train()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    vtp.optimize(small, torch.bfloat16)
    assert small.training
    assert all(p.requires_grad for p in small.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_it_is_for_inference_only():
    small = compact_model(
        "tiny", proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5, pos_drop_rate=0.5
    )
    fast, images = vtp.optimize(small.train()), image(small)
    expected = small.eval()(images)
    torch.testing.assert_close(fast(images), expected)
    student = nn.ModuleList([fast]).train()
    assert not fast.training
    torch.testing.assert_close(student[0](images), expected)
    assert not fast(images.requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in fast.parameters())


def test_autocast_changes_no_bits(tiny):
    fast, images = vtp.optimize(tiny), image(tiny)
    expected = fast(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), expected)


def test_images_of_another_float_dtype_are_cast(tiny):
    fast, images = vtp.optimize(tiny, torch.bfloat16), image(tiny)
    assert torch.equal(fast(images), fast(images.bfloat16()))
    assert torch.equal(fast(images.half()), fast(images.half().bfloat16()))


def test_a_copy_computes_the_same_and_shares_nothing(tiny):
    fast, images = vtp.optimize(tiny), image(tiny)
    expected = fast(images)
    again = copy.deepcopy(fast)
    with torch.no_grad():
        for tensor in fast.state_dict().values():
            tensor.zero_()
    assert torch.equal(again(images), expected)
    assert all(has_padded_rows(layer.weight) for layer in packed_linears(again))


def test_its_state_dict_goes_into_another_of_the_same_plan(tiny, tmp_path):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    fast, again, images = vtp.optimize(tiny), vtp.optimize(other), image(tiny)
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    again.load_state_dict(torch.load(tmp_path / "fast.pt"))
    assert torch.equal(again(images), fast(images))


def test_a_dtype_chosen_later_keeps_rows_padded(tiny):
    fast = vtp.optimize(tiny).to(torch.bfloat16)
    assert all(has_padded_rows(layer.weight) for layer in packed_linears(fast))
    assert fast(image(tiny)).dtype == torch.bfloat16


def test_warmup_runs_every_batch_size_and_changes_nothing(tiny):
    fast, images = vtp.optimize(tiny), image(tiny)
    expected, before = fast(images), copy.deepcopy(fast.state_dict())
    seen = []
    handle = fast.vit.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    assert fast.warmup((1, 4)) is None
    handle.remove()
    assert seen == [(1, 1, 8, 8), (4, 1, 8, 8)]
    assert torch.equal(fast(images), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fast.state_dict().items())


@pytest.mark.parametrize("sizes", [3, [-1], [1.5], [True]], ids=str)
def test_warmup_refuses_what_is_no_list_of_batch_sizes(tiny, sizes):
    with pytest.raises(ValueError, match=r"batch_sizes: got .* expected integers from 0"):
        vtp.optimize(tiny).warmup(sizes)


def test_warmup_at_another_image_size():
    vtp.optimize(compact_model("any-image-size")).warmup(image_size=(48, 16))


# -- Compilation and export ---------------------------------------------------------------------------------


def variety():
    """Odd widths, a dead head, dead branches at either end of the stream, LayerScale."""
    dead = ("0.attn.qkv", "1.attn.proj.1", "1.mlp.fc1")
    return with_dead_parts(dead, depth=2, init_values=0.1)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(variety, "f32"), (lambda: compact_model("qk-norm", depth=1), "bf16")],
    ids=["tiny-f32", "qk-norm-bf16"],
)
def test_compiles_without_breaks_and_without_recompiling_for_the_batch(make, dtype):
    small = make()
    fast = vtp.optimize(small, DTYPES[dtype])
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate((2, 5, 8)):
        images = image(small, batch)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(images), fast(images))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_exports_with_a_dynamic_batch(dtype, tmp_path):
    small = variety()
    fast = vtp.optimize(small, DTYPES[dtype])
    program = torch.export.export(
        fast, (image(small),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    torch.export.save(program, tmp_path / "fast.pt2")
    again = torch.export.load(tmp_path / "fast.pt2").module()
    for batch in (1, 7):
        images = image(small, batch)
        torch.testing.assert_close(again(images), fast(images))


@pytest.mark.thorough  # compiles for a minute; the exported program that it starts from has quick tests
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="packages are tested on Linux")
def test_packages_with_aotinductor(tmp_path):
    small = variety()
    fast = vtp.optimize(small)
    program = torch.export.export(
        fast, (image(small),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "fast.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (1, 2, 7):
        images = image(small, batch)
        torch.testing.assert_close(loaded(images), fast(images))


# -- What is refused ----------------------------------------------------------------------------------------


def wrapped_linear():
    small = compact_model("tiny")
    small.blocks[1].mlp.fc1 = nn.Sequential(small.blocks[1].mlp.fc1)
    return small


def other_block():
    small = compact_model("tiny")
    small.blocks[1] = nn.Identity()
    return small


REFUSED = {
    "dense": (lambda: build(), r"model: got VisionTransformer, expected a compact model: .*vtp\.compact"),
    "gated": (lambda: gated(build()), r"model: got VisionTransformer, expected a compact model"),
    "timm-model-of-another-kind": (
        lambda: timm.create_model("resnet18"), r"model: got ResNet, expected a compact model",
    ),
    "packed": (lambda: vtp.optimize(compact_model("tiny")), r"model: got OptimizedViT"),
    "adapter": (wrapped_linear, r"blocks\.1\.mlp\.fc1: got torch\..*Sequential, expected torch\.nn\.Linear"),
    "block": (other_block, r"model\.blocks\.1: got Identity, expected CompactBlock"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_packed_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        vtp.optimize(make())


def test_a_dtype_without_kernels_is_refused(tiny):
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8, expected one of torch\.float32"):
        vtp.optimize(tiny, torch.int8)


BAD_IMAGES = {
    "not-a-tensor": ([[1.0]], TypeError, r"images: got list, expected a tensor"),
    "uint8": (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), TypeError, r"images: got torch\.uint8"),
    "float64": (torch.zeros(1, 1, 8, 8, dtype=torch.float64), TypeError, r"images: got torch\.float64"),
    "rank": (torch.zeros(1, 8, 8), ValueError, r"got shape \(1, 8, 8\), expected \[B, 1, H, W\]"),
    "channels": (torch.zeros(1, 3, 8, 8), ValueError, r"got shape \(1, 3, 8, 8\), expected \[B, 1, H, W\]"),
    "size": (torch.zeros(1, 1, 8, 12), ValueError, r"height and width \(8, 12\), expected \(8, 8\)"),
    "device": (torch.zeros(1, 1, 8, 8, device="meta"), ValueError, r"images: on meta, expected cpu"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_by_name(tiny, case):
    images, error, message = BAD_IMAGES[case]
    with pytest.raises(error, match=message):
        vtp.optimize(tiny)(images)


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match=r"height and width \(32, 40\), expected multiples of \(16, 16\)"):
        vtp.optimize(compact_model("any-image-size"))(torch.zeros(1, 3, 32, 40))
