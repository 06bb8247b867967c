"""vtp.from_transformers: each class computes in timm what it does in transformers, or is refused by name."""

import copy
import json
import math
import pickle
import sys

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

import vtp
from tests.support.folders import write_classes
from tests.support.models import relative_error
from vtp import hugging_face
from vtp.cli import main
from vtp.model.images import class_descriptions, class_names, image_config, knows_normalisation
from vtp.runtime.export import export_onnx, export_pt2
from vtp.training.sources import open_images
from vtp.training.transforms import image_pipeline
from vtp.zoo import open_model, open_teacher

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "attn_implementation": "sdpa",  # the eager one has its softmax in float32
}
VIT, DINO2 = {**SMALL, "intermediate_size": 48}, {**SMALL, "mlp_ratio": 2}
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
DINO3 = {**VIT, "num_register_tokens": 3}
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


def made(family, head, settings, seed=0, **more):
    """A model of transformers in float64 and eval mode with weights that make every part matter."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}{head}")(config, **more).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.3)
    return model


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


# ---------------------------------------------------------------------------------------------------------
# Checkpoints by name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of three channels and three classes, as its owner saved it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small-vit"
    labels = {0: "cat", 1: "dog", 2: "tree"}
    model = made("ViT", "ForImageClassification", {**VIT, "id2label": labels}).float()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.25] * 3)
    processor.save_pretrained(folder)
    return folder


def original(folder):
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def test_a_folder_is_opened_by_name(folder, capfd):
    images = torch.randn(2, 3, 24, 24)
    model = open_model(f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        assert relative_error(model(images), original(folder)(images).logits) < 1e-6
    assert not model.training
    assert class_names(model) == ("cat", "dog", "tree")
    assert image_config(model)["mean"] == (0.25,) * 3
    assert model.pretrained_cfg["architecture"] == "hf:small-vit"


def test_a_folder_of_several_files_of_weights_is_opened_too(folder, tmp_path):
    original(folder).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    expected = open_model(f"hf:{folder}").state_dict()
    got = open_model(f"hf:{tmp_path / 'shards'}").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_name_of_the_hub_fetches_json_and_safetensors_alone(folder, monkeypatch):
    asked = []

    def fetched(name, file):
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(hugging_face, "hf_hub_download", fetched)
    monkeypatch.setattr(
        hugging_face,
        "snapshot_download",
        lambda name, allow_patterns: asked.append(allow_patterns) or str(folder),
    )
    model = open_model("hf:owner/small-vit")
    assert model.pretrained_cfg["architecture"] == "hf:owner/small-vit"
    assert asked[0] == ("owner/small-vit", "config.json")
    patterns = next(each for each in asked if isinstance(each, list))
    assert all(each.endswith((".json", ".safetensors")) for each in patterns)


def test_a_hub_that_fails_is_our_own_error(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(hugging_face, "hf_hub_download", offline)
    with pytest.raises(vtp.FileError, match=r"cannot open hf:owner/name \(ConnectionError: no network\)"):
        open_model("hf:owner/name")


def test_new_weights_and_a_new_head(folder):
    model = open_model(f"hf:{folder}", from_scratch=True, seed=3)
    again = open_model(f"hf:{folder}", from_scratch=True, seed=3)
    assert torch.equal(model.head.weight, again.head.weight)
    assert not torch.equal(model.head.weight, open_model(f"hf:{folder}").head.weight)
    assert class_names(model) is None
    assert open_model(f"hf:{folder}", num_classes=7).head.out_features == 7


def test_a_teacher_may_be_of_transformers_also_one_that_is_not_pruned(folder, tmp_path):
    assert class_names(open_teacher(f"hf:{folder}")) == ("cat", "dog", "tree")
    made(*BACKBONES["dinov3"]).float().save_pretrained(tmp_path / "dinov3")
    assert not open_teacher(f"hf:{tmp_path / 'dinov3'}").training


def test_a_folder_alone_is_told_its_name(folder):
    with pytest.raises(vtp.FileError, match=rf"of transformers: hf:{folder}"):
        open_model(str(folder))


class Executed:
    """What a pickle that is executed would do."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_pickle_is_never_read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Executed()))
    with pytest.raises(
        vtp.FileError, match=r"pytorch_model\.bin, a pickle, which is not read; .*safetensors"
    ):
        open_model("hf:pickled")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("shard", ["weights.bin", "../weights.safetensors", "/weights.safetensors"])
def test_a_list_of_weights_that_names_other_files_is_refused(folder, tmp_path, shard):
    original(folder).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["classifier.weight"] = shard
    index.write_text(json.dumps(fields))
    with pytest.raises(vtp.FileError, match=rf"index\.json of .* names {shard}, expected safetensors files"):
        open_model(f"hf:{tmp_path / 'shards'}")


def broken(folder, target, **config):
    """A copy of the folder with fields of its config changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**fields, **config}))
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["ViTForMaskedImageModeling"]},
            r"is a ViTForMaskedImageModeling, expected one of",
        ),
        ({"architectures": None}, r"is a model whose config\.json names no class"),
        ({"model_type": "of next year"}, r"transformers cannot open .*of next year"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized"),
        ({"hidden_act": "gelu_fast"}, r"timm has no 'gelu_fast'"),
        ({"hidden_act": "of next year"}, r"transformers cannot open .*of next year"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: got 0, expected at least 1"),
        ({"num_hidden_layers": 3}, r"has no vit\..*, which a ViTForImageClassification needs"),
        ({"intermediate_size": 64}, r"cannot open|has another shape of"),
        (
            {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}},
            r"transformers cannot open",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_the_reason(folder, tmp_path, config, message):
    target = broken(folder, tmp_path / "other", **config)
    (target / "code.py").write_text("open('executed', 'w')")
    with pytest.raises(ValueError, match=message):
        open_model(f"hf:{target}")
    assert not (target / "executed").exists()


def test_a_checkpoint_that_is_cut_off_or_an_adapter_is_refused(folder, tmp_path):
    target = broken(folder, tmp_path / "cut")
    whole = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(vtp.FileError, match=r"cannot open hf:.*cut"):
        open_model(f"hf:{target}")
    target = broken(folder, tmp_path / "adapter")
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(vtp.UnsupportedModelError, match=r"adapter_config\.json.*merge_and_unload"):
        open_model(f"hf:{target}")


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "name", ""])
def test_a_name_that_is_neither_is_told_what_is_expected(name):
    with pytest.raises(vtp.FileError, match=rf"got hf:{name}, expected hf:FOLDER .*or hf:OWNER/NAME"):
        open_model(f"hf:{name}")


def test_a_folder_without_config_says_so(tmp_path):
    with pytest.raises(vtp.FileError, match=r"has no config\.json"):
        open_model(f"hf:{tmp_path}")


def test_a_checkpoint_beside_it_is_refused(folder, tmp_path):
    with pytest.raises(vtp.FileError, match="expected the name of its timm model alone"):
        open_model(f"hf:{folder}", checkpoint=tmp_path / "w.pth")


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(vtp.FileError, match=r"pip install 'vtp\[transformers\]'"):
        open_model(f"hf:{folder}")


# ---------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("data"), {"tree": 2, "cat": 0, "dog": 1})


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_commands_take_it_as_a_model_and_files_say_where_they_came_from(folder, data, tmp_path, capsys):
    name, small = f"hf:{folder}", tmp_path / "small.safetensors"
    with torch.no_grad():
        model = open_model(name)
        image = next((data / "val" / "cat").iterdir())
        pipeline = image_pipeline(image_config(model))
        logits = model(pipeline.batch([pipeline.pixels(open_images([image])[0])]))
        predicted = class_names(model)[int(logits.argmax())]
    assert run("predict", name, image) == 0
    first = capsys.readouterr().out.splitlines()[1]
    assert first.split() == [first.split()[0], predicted]
    assert run("eval", "--model", name, "--data", data) == 0
    assert str(vtp.count(model)) in capsys.readouterr().out
    assert run("inspect", name) == 0
    printed = capsys.readouterr().out
    assert str(vtp.count(model)) in printed and "classes: 3: cat, dog, tree" in printed
    assert "how they are normalised is not known" in printed  # preprocessor_config.json is not read
    command = ("prune", name, "--calibrate", data, "--macs", 0.5 * vtp.count(model).macs, "--out", small)
    assert run(*command) == 0
    capsys.readouterr()
    assert vtp.count(vtp.load(small)).macs <= 0.5 * vtp.count(model).macs
    assert run("inspect", small) == 0
    printed = capsys.readouterr().out
    assert "baseline: hf:small-vit\n" in printed
    assert "mean 0.25/0.25/0.25" in printed
    assert "classes: 3: cat, dog, tree" in printed


def test_export_takes_it_and_calls_the_file_by_its_name(folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("export", f"hf:{folder}", "--to", "pt2", "--data", data) == 0
    assert "wrote small-vit.pt2" in capsys.readouterr().out
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        got = torch.export.load("small-vit.pt2").module()(images)
        assert relative_error(got, original(folder)(images).logits) < 1e-5


@pytest.mark.filterwarnings("default")
def test_what_is_left_out_is_a_note_of_a_command(data, tmp_path, capsys):
    model = made("Dinov2", "ForImageClassification", {**DINO2, "num_labels": 3}).float()
    model.save_pretrained(tmp_path / "dino")
    capsys.readouterr()
    assert run("eval", "--model", f"hf:{tmp_path / 'dino'}", "--data", data) == 2
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("vtp: note: Dinov2ForImageClassification: its head was left out, and outputs are")
    assert "--new-head" in error


def test_a_command_that_cannot_open_it_says_why_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run("prune", "hf:no/such/folder", "--calibrate", "fashion-mnist-10k", "--out", out) == 2
    assert "got hf:no/such/folder, expected hf:FOLDER" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "command", ["run", "train", "finetune", "eval", "prune", "predict", "export", "inspect"]
)
def test_help_names_it(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "hf:" in capsys.readouterr().out
