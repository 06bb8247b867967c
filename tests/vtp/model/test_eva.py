"""timm's Eva: its several forms become one; angles reach every block; what files and cuts make of them."""

import copy
import dataclasses

import pytest
import timm
import torch
from timm.layers import AttentionRope, GluMlp, RmsNorm
from timm.models.eva import Eva

import vtp
from tests.support.models import (
    AXIAL,
    FAMILIES,
    TINY,
    build,
    gated,
    image,
    randomize,
    relative_error,
    with_zeros,
)
from vtp.model.architecture import Architecture, UnsupportedModelError
from vtp.model.eva import EvaArguments, ropes, with_fused_sites
from vtp.weights import load_weights

TOY = {
    "img_size": (8, 12), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5,
    "use_rot_pos_emb": True, "use_abs_pos_emb": False, "mlp_ratio": 2.5,
}  # fmt: skip
# Of each form the arguments of timm's Eva.
FORMS = {
    "one matrix, biases beside it": {},
    "one matrix, biases added afterwards": {"rope_type": "dinov3", "rope_rotate_half": True},
    "one matrix, no biases": {"qkv_bias": False},
    "three matrices": {"qkv_fused": False},
    "three matrices, no biases": {"qkv_fused": False, "qkv_bias": False},
    "three matrices, keys with a bias": {"qkv_fused": False, "attn_type": "rope"},
    "SwiGLU in one matrix": {"swiglu_mlp": True},
    "SwiGLU in two": {"swiglu_mlp": True, "swiglu_align_to": 8},
    "norms of queries and keys": {"qk_norm": True, "attn_type": "rope"},
    "no rotation": {"use_rot_pos_emb": False, "use_abs_pos_emb": True},
    "learned angles": {"rope_type": "mixed", "attn_type": "rope"},
    "LayerScale, registers, average": {"init_values": 0.1, "num_reg_tokens": 2, "use_fc_norm": False},
    "norms before proj and fc2": {"scale_attn_inner": True, "scale_mlp": True},
    "SwiGLU in two, with a norm": {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True},
    "pooled by attention": {"global_pool": "map", "attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 1.5},
}


def made(**arguments):
    torch.manual_seed(0)
    model = Eva(**TOY | arguments).double().eval()
    randomize(model)
    if arguments.get("rope_type") == "dinov3":
        for block in model.blocks:
            block.attn.qkv_bias_separate = True
    return model


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_that_computes_the_same(form, tmp_path):
    model = made(**FORMS[form])
    x, before = image(model), {name: type(module) for name, module in model.named_modules()}
    dense = model(x)
    fused = with_fused_sites(copy.deepcopy(model))
    assert relative_error(fused(x), dense) <= 1e-13
    assert all(type(block.attn) is AttentionRope for block in fused.blocks)
    assert all(isinstance(block.mlp, GluMlp) == ("SwiGLU" in form) for block in fused.blocks)
    assert relative_error(vtp.insert_gates(model)(x), dense) <= 1e-13
    vtp.save(model, tmp_path / "dense.safetensors")
    loaded = vtp.load(tmp_path / "dense.safetensors")
    assert type(loaded) is Eva
    assert relative_error(loaded(x), dense) <= 1e-13
    assert vtp.describe(loaded) == vtp.describe(model)
    assert {name: type(module) for name, module in model.named_modules()} == before, "the model was changed"


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_is_exact_in_every_form(form):
    model = gated(made(**FORMS[form]))
    plan = vtp.make_plan(model, rate=0.5, min_keep=0)
    small, x = vtp.compact(model, plan), image(model)
    assert isinstance(small, vtp.CompactEva)
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12
    assert vtp.count(small) == plan.cost
    assert vtp.count(model).macs == plan.dense_cost.macs


def test_keys_without_a_bias_get_zeros():
    fused = with_fused_sites(made())
    queries, keys, values = fused.blocks[0].attn.qkv.bias.detach().chunk(3)
    assert not keys.any()
    assert queries.all() and values.all()


@pytest.mark.parametrize("form", ["one matrix, biases beside it", "learned angles", "no rotation"])
def test_the_angles_are_those_that_timm_hands_to_its_blocks(form):
    model, given = made(**FORMS[form]), []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["rope"]), with_kwargs=True
        )
    model(image(model))
    for own, timms in zip(ropes(model), given, strict=True):
        assert (own is None and timms is None) or torch.equal(own, timms)


@pytest.mark.parametrize("rope_type", ["cat", "dinov3", "mixed"])
def test_images_of_another_size_are_rotated_as_in_the_dense_model(rope_type):
    half = {"rope_rotate_half": True} if rope_type == "dinov3" else {}
    model = gated(made(rope_type=rope_type, dynamic_img_size=True, **half))
    plan = vtp.make_plan(model, rate=0.4, min_keep=0)
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    small = vtp.compact(model, plan)
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12
    assert relative_error(small.float()(x.float()), with_zeros(model, plan)(x)) <= 1e-4


def test_a_removed_head_takes_its_learned_angles_with_it():
    model = gated(made(rope_type="mixed", attn_type="rope"))
    scores = {name: torch.ones(layer.in_features) for name, layer in vtp.sites(model).items()}
    scores["blocks.0.attn.proj"][:8] = 0  # the first of three heads of width 8
    plan = vtp.make_plan(model, rate=8 / sum(map(len, scores.values())), score=scores, min_keep=0)
    small, x = vtp.compact(model, plan), image(model)
    assert small.blocks[0].attn.kept_heads == (1, 2)
    assert relative_error(small(x), with_zeros(model, plan)(x)) <= 1e-12


@pytest.mark.parametrize("family", ["rotary", "rotary-mixed", "swiglu", "rotary-inner-norms"])
def test_gradients_are_those_of_the_gated_model(family):
    model = gated(build(FAMILIES[family]))
    plan = vtp.make_plan(model, rate=0.4)
    small, zeroed = vtp.compact(model, plan), with_zeros(model, plan)
    found = []
    for each in (small, zeroed):
        x = image(model).requires_grad_()
        each(x).square().sum().backward()
        outside = {n: p.grad for n, p in each.named_parameters() if not n.startswith("blocks.")}
        found.append({"images": x.grad, **outside})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert relative_error(gradient, found[1][name]) <= 1e-11, name


@pytest.mark.parametrize("family", ["rotary", "rotary-mixed"])
def test_patch_dropout_drops_the_angles_too(family):
    model = vtp.insert_gates(build(dataclasses.replace(FAMILIES[family], patch_drop_rate=0.5))).train()
    small = vtp.compact(model, vtp.make_plan(model, rate=0.0))
    outputs = []
    for each in (model, small):
        torch.manual_seed(3)
        outputs.append(each(image(model)))
    assert relative_error(outputs[1], outputs[0]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["rotary", "rotary-mixed"])
def test_a_file_keeps_the_dtype_of_the_angles(family, dtype, tmp_path):
    model = build(FAMILIES[family], dtype=torch.float32)
    small = vtp.compact(model, vtp.make_plan(vtp.insert_gates(model), rate=0.3)).to(dtype)
    vtp.save(small, tmp_path / "small.safetensors")
    loaded = vtp.load(tmp_path / "small.safetensors")
    assert torch.equal(loaded(image(small)), small(image(small)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_post_norm": True}, r"blocks\.0: EvaBlockPostNorm"),
        (
            {"scale_mlp": True, "scale_attn_inner": True, "norm_layer": RmsNorm},
            r"blocks\.0\.norm1: RmsNorm.* expected LayerNorm with weight and bias",
        ),
        (
            {"init_values": 0.1, "attn_only_layer_scale": True},
            r"blocks\.0\.gamma_2: a LayerScale of attention",
        ),
        ({"qkv_fused": False, "attn_type": "rope", "num_kv_heads": 1}, r"blocks\.0\.attn: grouped-query"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(arguments, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vtp.insert_gates(made(**arguments))


def test_changed_parts_are_refused():
    model = made()
    model.rope.grid_offset = 0.5  # another setting than that of any argument at which it was filled
    model.blocks[1].attn.num_prefix_tokens = 0
    with pytest.raises(
        UnsupportedModelError, match=r"blocks\.1\.attn\.num_prefix_tokens: 0 is not supported"
    ):
        vtp.insert_gates(model)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("mlp.act", r"blocks\.0\.mlp\.act: GELU.* expected SiLU"),
        ("mlp.gate_last", r"blocks\.0\.mlp: its last half is the gate"),
    ],
)
def test_other_gated_feed_forwards_are_refused(layer, message):
    model = made(swiglu_mlp=True)
    for block in model.blocks:
        if layer == "mlp.act":
            block.mlp.act = torch.nn.GELU()
        else:
            block.mlp.gate_last = True
    with pytest.raises(UnsupportedModelError, match=message):
        vtp.insert_gates(model)


def test_keys_that_are_rotated_keep_their_width():
    model = build(FAMILIES["rotary"])
    with pytest.raises(vtp.PlanError, match="rotated in pairs"):
        vtp.make_plan(vtp.insert_gates(model), rate=0.2, key_width=2)
    plan = vtp.make_plan(vtp.insert_gates(model), rate=0.2)
    with pytest.raises(vtp.PlanError, match="rotated in pairs"):
        dataclasses.replace(plan, keys={"blocks.0.attn": (2, 4, 4)})


def test_descriptions_from_before_are_read():
    fields = dataclasses.asdict(TINY)
    del fields["glu"], fields["eva"]
    assert Architecture.from_dict(fields) == TINY


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "none"}, "architecture"),
        ({"rope_temperature": "hot"}, r"architecture\.eva\.rope_temperature: got 'hot'"),
        ({"ref_feat_shape": [1]}, r"architecture\.eva\.ref_feat_shape: got \[1\]"),
        ({"attn_pool_num_heads": 0.5}, r"architecture\.eva\.attn_pool_num_heads: got 0\.5"),
        ({"other": 1}, r"architecture\.eva: fields \['other'\]"),
    ],
    ids=str,
)
def test_a_damaged_description_is_refused(fields, message):
    described = dataclasses.asdict(FAMILIES["rotary"])
    described["eva"] |= fields
    with pytest.raises(ValueError, match=message):
        Architecture.from_dict(described)


def test_arguments_are_those_that_made_the_model():
    arguments = dataclasses.replace(
        AXIAL, rope_type="cat", rope_grid_offset=1.0, rope_grid_indexing="xy", ref_feat_shape=(4, 4)
    )
    architecture = dataclasses.replace(TINY, eva=arguments)
    assert EvaArguments.of(architecture.build()) == arguments


def test_metas_own_checkpoint_of_a_dinov3_is_read():
    name = "vit_small_patch16_dinov3"
    model = timm.create_model(name, depth=1)
    state = {
        key.replace("reg_token", "storage_tokens").replace("gamma_", "ls").replace("ls1", "ls1.gamma")
        .replace("ls2", "ls2.gamma"): tensor
        for key, tensor in model.state_dict().items()
    }  # fmt: skip
    state |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    with torch.device("meta"):
        empty = timm.create_model(name, depth=1)
    load_weights(empty, state, name, "dinov3.pth")
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(empty.eval()(x), model.eval()(x))


@pytest.mark.parametrize("change", ["periods", "half precision and back"])
def test_angles_that_no_file_has_are_refused(change, tmp_path):
    model = made() if change != "periods" else made(rope_type="dinov3", rope_rotate_half=True)
    small = vtp.compact(model, vtp.make_plan(vtp.insert_gates(model), rate=0.3)).float()
    if change == "periods":
        small.rope.periods.mul_(1.1)
    else:
        small.bfloat16().float()
    with pytest.raises(
        UnsupportedModelError, match=r"rope\.(periods|pos_embed): it is not what the settings"
    ):
        vtp.save(small, tmp_path / "small.safetensors")
    assert not list(tmp_path.iterdir())
    small.rope.init_non_persistent_buffers()
    vtp.save(small, tmp_path / "small.safetensors")
    assert torch.equal(vtp.load(tmp_path / "small.safetensors")(image(small)), small(image(small)))


def test_a_plan_of_another_kind_of_model_is_refused():
    plans = {
        family: vtp.make_plan(gated(build(FAMILIES[family])), rate=0.3) for family in ("plain", "swiglu")
    }
    with pytest.raises(vtp.PlanError, match="made for a model with glu True, got one with glu False"):
        vtp.compact(build(TINY), plans["swiglu"])
    rotary = build(dataclasses.replace(TINY, eva=AXIAL))
    with pytest.raises(vtp.PlanError, match="made for a model with rotary False, got one with rotary True"):
        vtp.compact(rotary, plans["plain"])


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_module_in_two_blocks_is_refused(part):
    model = made()
    setattr(model.blocks[1], part, getattr(model.blocks[0], part))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.1\.{part} is the same module as blocks\.0"):
        vtp.insert_gates(model)


def test_packed_models_take_no_images_and_say_what_dtype_they_have():
    small = vtp.compact(build(FAMILIES["rotary"], torch.float32), vtp.make_plan(
        vtp.insert_gates(build(FAMILIES["rotary"], torch.float32)), rate=0.3))  # fmt: skip
    fast = vtp.optimize(small)
    assert fast(image(small, 0)).shape == (0, 10)
    fast.warmup([0, 1])
    if fast.engine.startswith("C++"):
        with pytest.raises(TypeError, match=r"tokens: got torch\.float16, expected float32 or bfloat16"):
            fast.half()(image(small).half())
