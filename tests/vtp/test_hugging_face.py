"""vtp.from_transformers: each class computes in timm what it does in transformers, or is refused by name."""

import copy
import math

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

import vtp
from tests.support.hugging_face import DINO2, DINO3, VIT, made, transformers
from tests.support.models import relative_error
from vtp import hugging_face
from vtp.model.images import class_descriptions, class_names, image_config, knows_normalisation
from vtp.runtime.export import export_onnx, export_pt2

ODD = {"image_size": (16, 40), "patch_size": (8, 10), "num_channels": 1, "layer_norm_eps": 1e-3}
CLASSIFIERS = {
    "vit": ("ViT", "ForImageClassification", {**VIT, "num_labels": 5}),
    "vit-odd": ("ViT", "ForImageClassification", {**VIT, **ODD, "qkv_bias": False, "num_labels": 1}),
    "vit-edges": ("ViT", "ForImageClassification", {**VIT, "image_size": (27, 30)}),
    "vit-no-head": ("ViT", "ForImageClassification", {**VIT, "num_labels": 0}),
    "deit": ("DeiT", "ForImageClassification", {**VIT, "num_labels": 5}),
    "deit-odd": ("DeiT", "ForImageClassification", {**VIT, **ODD, "qkv_bias": False}),
    "teacher": ("DeiT", "ForImageClassificationWithTeacher", {**VIT, "num_labels": 5}),
    "teacher-odd": ("DeiT", "ForImageClassificationWithTeacher", {**VIT, **ODD, "qkv_bias": False}),
    "teacher-no-head": ("DeiT", "ForImageClassificationWithTeacher", {**VIT, "num_labels": 0}),
}
# Earlier ones fail to make such a model.
TAKES_OBLONG_DINO3 = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
BACKBONES = {
    "vit": ("ViT", "Model", VIT),
    "deit": ("DeiT", "Model", VIT),
    "dinov2": ("Dinov2", "Model", DINO2),
    "dinov2-odd": (
        "Dinov2", "Model", {**DINO2, "num_channels": 1, "qkv_bias": False, "layer_norm_eps": 1e-3},
    ),
    "dinov2-patches": ("Dinov2", "Model", {**DINO2, "patch_size": (8, 6), "layerscale_value": 0.0}),
    "dinov2-no-mask": ("Dinov2", "Model", {**DINO2, "use_mask_token": False}),
    "dinov2-swiglu": ("Dinov2", "Model", {**DINO2, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", "Model", DINO2),
    "registers-1-swiglu": (
        "Dinov2WithRegisters", "Model", {**DINO2, "num_register_tokens": 1, "use_swiglu_ffn": True},
    ),
    "registers-0": ("Dinov2WithRegisters", "Model", {**DINO2, "num_register_tokens": 0}),
    "dinov3": ("DINOv3ViT", "Model", DINO3),
    "dinov3-odd": (
        "DINOv3ViT", "Model",
        {**DINO3, "num_channels": 1, "layer_norm_eps": 1e-3, "query_bias": False, "proj_bias": False,
         "mlp_bias": False, "rope_theta": 30.0},
    ),
    "dinov3-no-biases": (
        "DINOv3ViT", "Model",
        {**DINO3, "query_bias": False, "value_bias": False, "num_register_tokens": 0},
    ),
    "dinov3-gated": (
        "DINOv3ViT", "Model",
        {**DINO3, "use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 50},
    ),
    **({"dinov3-oblong": ("DINOv3ViT", "Model", {**DINO3, **ODD})} if TAKES_OBLONG_DINO3 else {}),
    "dinov3-gated-odd": (
        "DINOv3ViT", "Model",
        {**DINO3, "use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False, "value_bias": False},
    ),
}  # fmt: skip


def images_of(model, batch=2):
    config = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, config.num_channels, height, width, dtype=torch.float64)


def converted(model):
    """Its timm model, which nothing has changed in the original."""
    before = copy.deepcopy(model.state_dict())
    ours = vtp.from_transformers(model)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return ours


@pytest.fixture
def equal_rotations(monkeypatch):
    """Both libraries compute the rotations of DINOv3 in float32, rounded in another order: here they share
    those of transformers, so that all that is left can be compared in float64."""

    def shared(ours, model):
        monkeypatch.setattr(
            ours.rope,
            "get_embed",
            lambda shape: torch.cat(
                model.rope_embeddings(torch.empty(1, 1, *grid_size(model, shape), dtype=torch.float64))[::-1],
                -1,
            ),
        )

    return shared


def grid_size(model, shape):
    patch = model.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return shape[0] * height, shape[1] * width


# ---------------------------------------------------------------------------------------------------------
# Equal outputs


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_the_same_logits(name):
    model = made(*CLASSIFIERS[name])
    images = images_of(model)
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True)  # which leaves hooks, that only look on
        ours = converted(model)
        assert relative_error(ours(images), theirs.logits) < 1e-12
        base = getattr(model, model.base_model_prefix)(images).last_hidden_state
        assert relative_error(ours.forward_features(images), base) < 1e-12
    assert ours.num_classes == model.config.num_labels


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_the_same_tokens(name, equal_rotations):
    options = {"add_pooling_layer": False} if BACKBONES[name][0] in ("ViT", "DeiT") else {}
    model = made(*BACKBONES[name], **options)
    ours, images = converted(model), images_of(model)
    if BACKBONES[name][0] == "DINOv3ViT":
        equal_rotations(ours, model)
    with torch.no_grad():
        theirs = model(images).last_hidden_state
        assert relative_error(ours.forward_features(images), theirs) < 1e-12
        assert relative_error(ours(images), theirs[:, 0]) < 1e-12
    assert ours.num_classes == 0


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_rotations_of_dinov3_are_those_of_transformers_at_every_size(size):
    """As they are, in float32: rounded in another order, to a few units in the last place."""
    model = made(*BACKBONES["dinov3"]).float()
    ours, images = vtp.from_transformers(model), torch.randn(2, 3, *size)
    cos, sin = model.rope_embeddings(images)
    theirs = torch.cat([sin, cos], dim=-1)
    shape = (size[0] // 8, size[1] // 8)
    assert (ours.rope.get_embed(shape=shape) - theirs).abs().max() < 4 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        assert relative_error(ours(images), model(images).pooler_output) < 1e-5


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"]
)
@pytest.mark.parametrize(("family", "settings"), [("ViT", VIT), ("Dinov2", DINO2)], ids=["vit", "dinov2"])
def test_an_activation_is_timms_equal(family, settings, name):
    model = made(family, "Model", {**settings, "hidden_act": name}, **NO_POOLER.get(family, {}))
    ours, images = vtp.from_transformers(model), images_of(model)
    with torch.no_grad():
        assert relative_error(ours.forward_features(images), model(images).last_hidden_state) < 1e-12


NO_POOLER = {"ViT": {"add_pooling_layer": False}, "DeiT": {"add_pooling_layer": False}}


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("labels", [5, 0])
def test_the_head_of_dinov2_is_left_out_with_how_to_compute_it(family, labels):
    model = made(family, "ForImageClassification", {**DINO2, "num_labels": labels})
    with pytest.warns(UserWarning, match="its head was left out") as warned:
        ours = vtp.from_transformers(model)
    assert warned[0].filename == __file__
    assert ours.num_classes == 0
    images = images_of(model)
    with torch.no_grad():
        recipe = str(warned[0].message).partition("logits are ")[2]
        names = {"torch": torch, "model": model, "f": ours.forward_features(images)}
        assert relative_error(eval(recipe, names), model(images).logits) < 1e-12


@pytest.mark.parametrize("family", ["ViT", "DeiT"])
def test_a_pooler_is_left_out_with_how_to_compute_it(family):
    model = made(family, "Model", {**VIT, "pooler_output_size": 7}, use_mask_token=True)
    with pytest.warns(UserWarning, match="its pooler was left out") as warned:
        ours = vtp.from_transformers(model)
    images = images_of(model)
    with torch.no_grad():
        recipe = str(warned[0].message).partition("what it computes is ")[2]
        pooled = eval(recipe, {"model": model, "timm_model": ours, "images": images})
        assert relative_error(pooled, model(images).pooler_output) < 1e-12


def test_positions_of_registers_are_resampled_as_transformers_does():
    """Of the others timm resamples with antialiasing and transformers without, as the docs say."""
    for name, same in (("registers", True), ("dinov2", False)):
        model = made(*BACKBONES[name])
        ours, images = vtp.from_transformers(model), torch.randn(2, 3, 16, 16, dtype=torch.float64)
        ours.set_input_size((16, 16))
        with torch.no_grad():
            error = relative_error(ours(images), model(images).pooler_output)
        assert (error < 1e-6) is same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_mode_and_memory_are_those_of_a_copy(dtype):
    for name in ("vit", "registers", "dinov3"):
        model = made(*BACKBONES[name], **NO_POOLER.get(BACKBONES[name][0], {})).to(dtype).train()
        ours = vtp.from_transformers(model)
        assert ours.training
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert all(p.requires_grad for p in ours.parameters())
        own = {p.untyped_storage().data_ptr() for p in ours.parameters()}
        assert not own & {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.no_grad():
            got = ours.eval()(images_of(model).to(dtype)).float()
            expected = model.eval()(images_of(model).to(dtype)).last_hidden_state[:, 0].float()
        assert got.shape == expected.shape
        assert got.isfinite().all()


def test_dropout_which_only_training_uses_is_not_taken_over():
    model = made("ViT", "ForImageClassification", {**VIT, "hidden_dropout_prob": 0.3})
    ours, images = vtp.from_transformers(model).train(), images_of(model)
    with torch.no_grad():
        assert relative_error(ours(images), model(images).logits) < 1e-12


PRUNABLE = {name: CLASSIFIERS[name] for name in ("vit-odd", "deit", "teacher")} | {
    name: BACKBONES[name]
    for name in ("dinov2-odd", "dinov2-swiglu", "registers", "dinov3", "dinov3-odd", "dinov3-gated-odd")
}


@pytest.mark.parametrize("name", PRUNABLE)
def test_the_timm_model_is_gated_cut_and_saved_as_any_other(name, tmp_path):
    model = made(*PRUNABLE[name])
    ours, images = vtp.from_transformers(model), images_of(model)
    with torch.no_grad():
        gated = vtp.insert_gates(ours)
        assert relative_error(gated(images), ours(images)) < 1e-12
        for layer in vtp.sites(gated).values():
            layer.gate.uniform_(0.5, 1.5)
        plan = vtp.make_plan(gated, rate=0.4)
        small = vtp.compact(gated, plan)
        for site, kept in plan.kept.items():
            gate = vtp.sites(gated)[site].gate
            gate[[i for i in range(len(gate)) if i not in set(kept)]] = 0
        expected = gated(images)
        assert relative_error(small(images), expected) < 1e-12
        vtp.save(small, tmp_path / "small.safetensors")
        loaded = vtp.load(tmp_path / "small.safetensors")
        assert relative_error(loaded(images), expected) < 1e-12
        fast = vtp.optimize(loaded.float())
        assert relative_error(fast(images.float()), expected) < 1e-5


@pytest.mark.thorough  # a tracing each
@pytest.mark.parametrize("name", ["vit-odd", "deit", "teacher", "registers", "dinov3-gated-odd"])
def test_what_is_cut_from_it_is_exported_as_any_other(name, tmp_path):
    pytest.importorskip("onnxscript")
    ours = vtp.from_transformers(made(*PRUNABLE[name]).float())
    gated = vtp.insert_gates(ours)
    small = vtp.compact(gated, vtp.make_plan(gated, rate=0.3))
    # Both check outputs against float64 themselves.
    assert export_onnx(small, tmp_path / "small.onnx") < 1e-5
    assert export_pt2(small, tmp_path / "small.pt2") < 1e-5


# ---------------------------------------------------------------------------------------------------------
# What is refused


def refused(model, message):
    with pytest.raises(vtp.UnsupportedModelError, match=message):
        vtp.from_transformers(model)


def test_other_classes_are_refused_by_name():
    refused(
        nn.Linear(2, 2), r"got torch\.nn\.modules\.linear\.Linear, expected one of transformers' ViTModel"
    )
    refused(timm.create_model("vit_tiny_patch16_224"), "got timm.models.vision_transformer.VisionTransformer")
    config = transformers.ViTConfig(**VIT, encoder_stride=8)
    refused(transformers.ViTForMaskedImageModeling(config), "modeling_vit.ViTForMaskedImageModeling")

    class ViTModel(transformers.ViTModel):
        pass

    refused(ViTModel(config), r"<locals>\.ViTModel, expected")


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_10", "mish"])
def test_an_activation_without_equal_in_timm_is_refused_by_name(name):
    model = made("ViT", "ForImageClassification", {**VIT, "hidden_act": name})
    refused(model, rf"config\.hidden_act: timm has no '{name}'")
    refused(
        made("DINOv3ViT", "Model", {**DINO3, "hidden_act": name}),
        rf"hidden_act: got '{name}', expected 'gelu'",
    )
    gated = {**DINO3, "hidden_act": "gelu", "use_gated_mlp": True}
    refused(made("DINOv3ViT", "Model", gated), r"hidden_act: got 'gelu', expected 'silu', .*gated")


def test_a_bias_of_rotated_keys_is_refused_where_it_does_something(equal_rotations):
    model = made("DINOv3ViT", "Model", {**DINO3, "key_bias": True})
    refused(model, r"blocks\.0\.attention\.k_proj\.bias is not zero \(config\.key_bias\)")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.zero_()
        ours, images = vtp.from_transformers(model), images_of(model)
        equal_rotations(ours, model)
        assert relative_error(ours(images), model(images).pooler_output) < 1e-12


def test_a_dinov2_whose_positions_are_resampled_is_refused():
    for family in ("Dinov2", "Dinov2WithRegisters"):
        model = made(family, "Model", {**DINO2, "image_size": (16, 32)})
        refused(model, r"config\.image_size: got \(16, 32\); transformers resamples")


class Adapter(nn.Linear):
    """As PEFT and bitsandbytes put them in the place of nn.Linear."""


def first_layers(model):
    """Attention and MLP of the first block, and the name of its input projection, in every version."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parent, _, leaf = names[0].rpartition(".")
    return model.get_submodule(parent), leaf


def with_adapter(model):
    parent, leaf = first_layers(model)
    setattr(parent, leaf, Adapter(32, 32).double())


def with_hook(model):
    model.vit.layernorm.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_other_eps(model):
    model.vit.layernorm.eps = 0.1


def with_other_scale(model):
    next(m for m in model.modules() if hasattr(m, "scaling")).scaling = 1.0


def with_replaced_forward(model):
    model.vit.layernorm.forward = lambda x: 2 * x


def with_quantization(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def with_integers(model):
    model.classifier.weight = nn.Parameter(torch.ones(5, 32, dtype=torch.int8), requires_grad=False)


def with_another_activation(model):
    model.config.hidden_act = "relu"


def with_a_parametrisation(model):
    nn.utils.parametrizations.weight_norm(model.classifier)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"vit\..*: got .*Adapter\(.*expected torch\.nn\.modules\.linear\.Linear\(.*adapters"),
        (with_hook, r"vit\.layernorm: it has a forward hook"),
        (with_other_eps, r"vit\.layernorm: got .*eps=0\.1.*expected .*eps=1e-12"),
        (with_other_scale, r"vit\..*: got .*scaling=1\.0.*expected .*scaling=0\.35"),
        (with_replaced_forward, r"vit\.layernorm\.forward was replaced"),
        (with_quantization, r"quantized \(config\.quantization_config\)"),
        (with_integers, r"classifier\.weight is Tensor of torch\.int8, expected .* floating point"),
        (with_another_activation, r"got .*GELU.*, expected .*ReLU"),
        (with_a_parametrisation, r"classifier\.weight is parametrised"),
    ],
)
def test_what_class_and_config_do_not_say_is_refused(change, message):
    model = made(*CLASSIFIERS["vit"])
    change(model)
    refused(model, message)


def test_adapters_around_a_model_are_refused_with_what_merges_them():
    class PeftModel(nn.Module):
        def merge_and_unload(self): ...

    refused(PeftModel(), r"PeftModel, expected .*merge_and_unload\(\)")


def test_heads_of_another_width_are_refused():
    model = made("ViT", "ForImageClassification", {**VIT, "num_attention_heads": 4, "head_dim": 4})
    if all(m.weight.shape == (32, 32) for n, m in model.named_modules() if n.endswith(("q_proj", "query"))):
        pytest.skip("this transformers gives heads no width of their own")
    refused(model, r"blocks\.0\.q\.weight: got shape \(16, 32\), expected \(32, 32\)")


# ---------------------------------------------------------------------------------------------------------
# What the model says of its images and classes


def test_names_of_classes_come_along_and_made_up_ones_do_not():
    labels = {0: "cat", 1: "dog", 2: "tree"}
    model = made("ViT", "ForImageClassification", {**VIT, "id2label": labels})
    assert class_names(vtp.from_transformers(model)) == ("cat", "dog", "tree")
    model = made(*CLASSIFIERS["vit"])
    ours = vtp.from_transformers(model)
    assert class_names(ours) is None
    assert not knows_normalisation(ours)
    assert ours.pretrained_cfg["architecture"] == "transformers.vit"


def test_imagenet_in_words_becomes_its_synsets():
    info = ImageNetInfo()
    words = [info.label_descriptions(as_dict=True)[name] for name in info.label_names()]
    assert words[0] == "tench, Tinca tinca"
    for shuffle, expected in ((False, info.label_names()), (True, words[::-1])):
        listed = words[::-1] if shuffle else ["tench", *words[1:]]
        settings = {**VIT, "num_hidden_layers": 1, "id2label": dict(enumerate(listed))}
        ours = vtp.from_transformers(made("ViT", "ForImageClassification", settings))
        assert class_names(ours) == tuple(expected)
    ours = vtp.from_transformers(
        made("ViT", "ForImageClassification", {**settings, "id2label": dict(enumerate(words))})
    )
    assert class_descriptions(ours) == tuple(words)


PROCESSORS = {
    "squash": (
        transformers.ViTImageProcessor, {"size": {"height": 24, "width": 24}, "resample": 2},
        {"interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 1.0, "mean": (0.5,) * 3},
    ),
    "shortest edge": (
        transformers.BitImageProcessor,
        {
            "size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24},
            "image_mean": [0.1, 0.2, 0.3],
        },
        {"interpolation": "bicubic", "crop_mode": "center", "resized": 28, "mean": (0.1, 0.2, 0.3)},
    ),
    "both edges": (
        transformers.DeiTImageProcessor,
        {"size": {"height": 27, "width": 27}, "crop_size": {"height": 24, "width": 24}},
        {"interpolation": "bicubic", "crop_mode": "squash", "resized": 27},
    ),
    "dinov3": (
        transformers.DINOv3ViTImageProcessorFast, {"size": {"height": 24, "width": 24}},
        {"interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 1.0, "mean": (0.485, 0.456, 0.406)},
    ),
    "lanczos": (
        transformers.ViTImageProcessor, {"resample": 1, "do_resize": True}, {"interpolation": "lanczos"},
    ),
    "not resized": (transformers.ViTImageProcessor, {"do_resize": False}, {"mean": (0.5,) * 3}),
    "not normalised": (
        transformers.ViTImageProcessor, {"do_normalize": False, "size": {"height": 24, "width": 24}},
        {"mean": (0.0,) * 3, "std": (1.0,) * 3},
    ),
    "not rescaled": (
        transformers.ViTImageProcessor,
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3},
        {"mean": (0.5,) * 3, "std": (0.2,) * 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_an_image_processor_says_how_images_are_made(kind):
    cls, settings, expected = PROCESSORS[kind]
    ours = vtp.from_transformers(made(*CLASSIFIERS["vit"]), image_processor=cls(**settings))
    got = image_config(ours)
    got["resized"] = math.floor(24 / got["crop_pct"])
    assert knows_normalisation(ours)
    for name, value in expected.items():
        assert got[name] == (pytest.approx(value) if name in ("mean", "std") else value), name


def test_what_is_no_image_processor_is_refused():
    model = made(*CLASSIFIERS["vit"])
    with pytest.raises(TypeError, match="image_processor: got dict without do_rescale"):
        vtp.from_transformers(model, image_processor={"image_mean": [0.5] * 3})


def test_every_crop_is_resized_to_the_pixel():
    for crop in range(16, 300, 7):
        for edge in range(crop + 1, 2 * crop, 5):
            assert math.floor(crop / hugging_face._crop_pct(crop, edge, crop)) == edge
