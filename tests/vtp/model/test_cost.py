"""vtp.model.cost: what is counted equals the real tensors and the products of a real forward pass."""

import copy
import dataclasses

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vtp
from tests.support.models import TINY, build, gated, image
from vtp.model.cost import block_cost

ARCHITECTURES = {
    "class-token": TINY,
    "average-pool": dataclasses.replace(TINY, class_token=False, global_pool="avg"),
    "map-pool": dataclasses.replace(TINY, class_token=False, global_pool="map"),
    "registers": dataclasses.replace(TINY, reg_tokens=3, no_embed_class=True),
    "distilled": dataclasses.replace(TINY, distilled=True),
    "qk-norm-layer-scale": dataclasses.replace(TINY, qk_norm=True, init_values=0.1),
    "no-biases": dataclasses.replace(TINY, qkv_bias=False, proj_bias=False),
    "pre-norm-fc-norm": dataclasses.replace(TINY, pre_norm=True, fc_norm=True, global_pool="avg"),
    "no-head": dataclasses.replace(TINY, num_classes=0),
    "oblong-colour": dataclasses.replace(TINY, img_size=(8, 16), in_chans=3),
    "padded": dataclasses.replace(TINY, img_size=(9, 7), dynamic_img_pad=True, dynamic_img_size=True),
    "one-head": dataclasses.replace(TINY, num_heads=1),
    "inner-norms": dataclasses.replace(TINY, scale_attn_norm=True, scale_mlp_norm=True),
    "inner-norms-swiglu": dataclasses.replace(TINY, scale_mlp_norm=True, glu=True),
    "head-dim-one": dataclasses.replace(TINY, num_heads=12),
}


def really(model, images):
    """Parameters summed over the tensors, MACs counted on a forward pass with numbers."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    # Not every PyTorch counts its fused attention on a CPU; written out, its products are counted as such.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    params = sum(tensor.numel() for name, tensor in model.state_dict().items() if not _is_buffer(model, name))
    return vtp.Cost(params, counter.get_total_flops() // 2)


def _is_buffer(model, name):
    return name in dict(model.named_buffers())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_count_is_what_a_real_forward_pass_does(name):
    # One kind has several blocks: the others are counted in half the time.
    depth = 2 if name == "class-token" else 1
    dense = build(dataclasses.replace(ARCHITECTURES[name], depth=depth), dtype=torch.float32)
    model = gated(dense)
    plans = [vtp.make_plan(model, rate=0.7, min_keep=min_keep) for min_keep in (0.2, 0)]
    cuts = [vtp.compact(model, plan) for plan in plans]
    for each in (dense, model, *cuts):
        assert vtp.count(each) == really(each, image(each, batch=1))
    for plan, small in zip(plans, cuts, strict=True):
        assert plan.cost == vtp.count(small)
        assert plan.dense_cost == vtp.count(dense)


@pytest.mark.parametrize("glu", [False, True], ids=["gelu", "swiglu"])
def test_a_column_behind_a_norm_is_all_that_a_removed_input_of_proj_or_fc2_saves(glu):
    normed = dataclasses.replace(TINY, scale_attn_norm=True, scale_mlp_norm=True, glu=glu)
    full, width = normed.dense_widths, normed.embed_dim
    column = vtp.Cost(width + 2, normed.num_tokens * width)  # of the weight, and two of the norm
    for less in ({"fc2": full.fc2 - 1}, {"values": (*full.values[:-1], full.values[-1] - 1)}):
        assert block_cost(normed, dataclasses.replace(full, **less)) + column == block_cost(normed, full)
    gone = dataclasses.replace(full, values=(*full.values[:-1], 0))  # a head that proj does not read
    saved = vtp.Cost(normed.head_dim * column.params, normed.head_dim * column.macs)
    assert block_cost(normed, gone) + saved == block_cost(normed, full)


def test_gates_add_their_own_number_of_parameters_and_no_macs():
    dense = build(dtype=torch.float32)
    cost, with_gates = vtp.count(dense), vtp.count(vtp.insert_gates(dense))
    assert with_gates == vtp.Cost(cost.params + 2 * (12 + 12 + 12 + 20), cost.macs)


def test_plain_attention_counts_as_fused_attention_does():
    model = build(dtype=torch.float32)
    expected = vtp.count(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert vtp.count(model) == expected == really(model, image(model, batch=1))


@pytest.mark.parametrize("size", [(16, 12), (4, 4), (8, 32)], ids=str)
def test_other_image_size_changes_the_tokens(size):
    model = gated(build(dataclasses.replace(TINY, dynamic_img_size=True), dtype=torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.5))
    for each in (model, small):
        assert vtp.count(each, size) == really(each, torch.zeros(1, 1, *size))
        assert vtp.count(each, size) != vtp.count(each)


def test_image_size_that_the_model_cannot_take_is_an_error():
    with pytest.raises(AssertionError, match="Input height"):
        vtp.count(build(), (16, 16))


def test_count_of_a_known_model_by_hand():
    # 4 patches of 16 pixels and a class token, width 12, 3 heads of 4, hidden 20, ten classes.
    embedding, block = 4 * 16 * 12, 5 * (36 * 12 + 12 * 12 + 2 * 12 * 20) + 2 * 3 * 5 * 5 * 4
    assert vtp.count(build()).macs == embedding + 2 * block + 12 * 10


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("deit_base_patch16_224", "86.57M params, 17.56G MACs"),
        ("deit_tiny_patch16_224", "5.72M params, 1.25G MACs"),
    ],
)
def test_count_of_timm_model(name, printed):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert str(vtp.count(model)) == printed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_does_not_matter(dtype):
    assert vtp.count(build(dtype=dtype)) == vtp.count(build(dtype=torch.float32))


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(training):
    model = gated(build(dtype=torch.float32)).train(training)
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    before = {name: (id(t), t.clone(), t.device) for name, t in model.state_dict(keep_vars=True).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    vtp.count(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity, values, device = before[name]
        assert id(tensor) == identity
        assert torch.equal(tensor, values)
        assert tensor.device == device
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.head.weight.requires_grad
    assert model.head.bias.grad.sum() == 10
    assert torch.equal(torch.get_rng_state(), random_state)


def test_hooks_of_the_caller_stay_and_are_not_called():
    model, calls = build(dtype=torch.float32), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append("before"))
    vtp.count(model)
    assert calls == []
    model(image(model))
    assert sorted(calls) == ["after", "before"]


def test_shared_parameters_count_once():
    model = build(dataclasses.replace(TINY, distilled=True), dtype=torch.float32)
    expected = vtp.count(model).params - model.head.weight.numel()
    model.head_dist.weight = model.head.weight
    assert vtp.count(model).params == expected


class _NoStorage(TorchDispatchMode):
    """Refuse every operation that would make a tensor with storage."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.detach.default:
            return out  # a view
        for tensor in torch.utils._pytree.tree_leaves(out):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", function
        return out


def test_weights_are_neither_read_nor_copied():
    model = gated(build(dtype=torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.5))
    with _NoStorage():
        vtp.count(model)
        vtp.count(small)


def test_model_larger_than_memory_can_be_counted():
    huge = dataclasses.replace(TINY, embed_dim=48_000, num_heads=375, mlp_hidden=192_000, depth=3)
    assert vtp.count(huge.build("meta", weight_init="skip")).params > 80e9


def test_costs_add_compare_and_print():
    assert vtp.Cost(1, 2) + vtp.Cost(10, 20) == vtp.Cost(11, 22)
    assert sorted([vtp.Cost(2, 1), vtp.Cost(1, 5)])[0] == vtp.Cost(1, 5)
    assert str(vtp.Cost(86_567_656, 17_564_000_000)) == "86.57M params, 17.56G MACs"


def test_parameters_of_a_module_added_by_the_caller_count():
    model = build(dtype=torch.float32)
    expected = vtp.count(model).params + 12
    model.extra = nn.Parameter(torch.zeros(12))
    assert vtp.count(model).params == expected
