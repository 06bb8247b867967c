"""What a model says of its images and classes: timm reads it, files and packed models carry it."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import vtp
from tests.support.folders import write_classes
from tests.support.models import TINY, build, gated
from vtp.model.images import (
    awaits_classes,
    class_descriptions,
    class_names,
    image_config,
    knows_normalisation,
    new_head,
    set_image_config,
    set_imagenet_names,
)
from vtp.pipeline import fit_data
from vtp.training.data import DataError, open_data
from vtp.training.evaluation import evaluate
from vtp.training.sources import IdxImages
from vtp.zoo import open_model

SAID = {"mean": (0.1,), "std": (0.2,), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
NAMES = tuple("abcdefghij")


def says_all(dtype=torch.float32):
    model = build(TINY, dtype)
    set_image_config(model, **SAID, label_names=NAMES)
    return model


def test_timms_own_helper_serves_the_shipped_baseline_as_it_was_trained():
    model, data = open_model("fashion-deit").eval(), open_data()
    data = dataclasses.replace(data, test=IdxImages(data.test.images[:300], data.test.labels[:300]))
    transform = create_transform(**resolve_model_data_config(model))
    images = torch.stack([transform(data.test[index][0]) for index in range(len(data.test))])
    with torch.inference_mode():
        found = model(images).argmax(dim=1)
    top1 = 100 * float((found == torch.tensor(data.test.labels)).double().mean())
    assert top1 == evaluate(model, data)[0] and top1 > 85
    assert class_names(model) == data.class_names


def test_every_model_and_file_made_of_one_says_what_it_says(tmp_path):
    dense, file = says_all(), tmp_path / "model.safetensors"
    with_gates = gated(dense)
    small = vtp.compact(with_gates, vtp.make_plan(with_gates, rate=0.4))
    expected = {"input_size": (1, 8, 8), **SAID}
    for model in (dense, with_gates, small):
        vtp.save(model, file)
        again = vtp.load(file)
        assert resolve_model_data_config(again) == image_config(again) == expected
        assert class_names(again) == NAMES
    packed = vtp.optimize(small)
    assert resolve_model_data_config(packed) == image_config(packed) == expected


def test_size_and_channels_are_those_of_the_model_and_not_of_the_weights_it_began_with():
    model = timm.create_model("deit_tiny_patch16_224", img_size=(32, 64), in_chans=1, depth=1)
    config = image_config(model)
    assert config["input_size"] == (1, 32, 64)
    assert config["mean"] == (pytest.approx(np.mean((0.485, 0.456, 0.406))),) and len(config["std"]) == 1
    create_transform(**config)


def test_any_model_of_timm_says_what_images_it_expects():
    with torch.device("meta"):
        model = timm.create_model("regnety_002.pycls_in1k")
        inception = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert image_config(model) == resolve_model_data_config(model)
    assert image_config(inception)["mean"] == (0.5, 0.5, 0.5)


def test_what_is_not_known_is_not_made_up(tmp_path):
    model = build(TINY, torch.float32)
    assert not knows_normalisation(model) and class_names(model) is None
    vtp.save(model, tmp_path / "model.safetensors")
    assert vtp.read_metadata(tmp_path / "model.safetensors")["pretrained_cfg"] == {
        "input_size": [1, 8, 8], "num_classes": 10,
    }  # fmt: skip
    again = vtp.load(tmp_path / "model.safetensors")
    assert not knows_normalisation(again) and class_names(again) is None
    assert image_config(again)["crop_pct"] == 1.0


def test_another_head_has_no_names_of_the_old_one(tmp_path):
    model = says_all()
    new_head(model, 10)
    assert class_names(model) is None and awaits_classes(model)
    model = says_all()
    model.reset_classifier(3)
    assert class_names(model) is None
    vtp.save(model, tmp_path / "model.safetensors")
    said = vtp.read_metadata(tmp_path / "model.safetensors")["pretrained_cfg"]
    assert "label_names" not in said and said["num_classes"] == 3


def test_released_weights_have_imagenets_classes_and_new_ones_have_none():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
        other = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    set_imagenet_names(model)
    set_imagenet_names(other)
    assert class_names(model) == tuple(ImageNetInfo().label_names())
    assert class_descriptions(model)[281] == "tabby, tabby cat"
    assert class_names(other) is None
    fresh = open_model("fashion-deit", from_scratch=True)
    assert class_names(fresh) is None and awaits_classes(fresh)


def test_a_model_of_timms_that_does_not_name_its_classes_is_imagenets_if_the_data_are(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=16, depth=1, embed_dim=12, num_heads=3)
    write_classes(tmp_path, {"n02123045": 1, "n01440764": 2})
    data = fit_data(open_data(tmp_path), model, subset=True)
    assert "taken to be ImageNet's" in data.notes[0] and data.labels_present == (0, 281)
    assert class_names(model) == tuple(ImageNetInfo().label_names())
    other = timm.create_model("deit_tiny_patch16_224", img_size=16, depth=1, embed_dim=12, num_heads=3)
    pets = open_data(write_classes(tmp_path / "pets", {"cat": 1, "dog": 2}))
    with pytest.raises(DataError, match="the head has 1,000 outputs, but"):
        fit_data(pets, other, subset=True)


def test_names_by_index_as_hubs_have_them_are_in_order():
    model = says_all()
    set_image_config(model, label_names={str(9 - i): name for i, name in enumerate(NAMES)})
    assert class_names(model) == NAMES[::-1]
