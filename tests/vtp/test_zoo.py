"""vtp.zoo and vtp.weights: every way in that timm's users know, and what is said of all others."""

import argparse
import json
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

import vtp
from tests.support.models import randomize
from vtp.weights import read_weights
from vtp.zoo import open_model

DEIT = "deit_tiny_patch16_224"


def made(name=DEIT, **arguments):
    """A small model of a timm name with weights that are all its own."""
    torch.manual_seed(3)
    model = timm.create_model(name, **{"depth": 12, **arguments})
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    return made(num_classes=7, in_chans=1, img_size=64)


@pytest.fixture(scope="module")
def state(trained):
    return trained.state_dict()


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


CHECKPOINTS = {
    "plain": lambda state: state,
    "deit": lambda state: {"model": state, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
    "deit-ema": lambda state: {"model": other(state), "model_ema": state, "args": argparse.Namespace()},
    "timm": lambda state: {"state_dict": state, "arch": DEIT, "version": 2, "metric": 80.1},
    "timm-ema": lambda state: {"state_dict": other(state), "state_dict_ema": state},
    "ddp": lambda state: {"state_dict": {f"module.{name}": t for name, t in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": t for name, t in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{name}": t for name, t in state.items()}},
    "half": lambda state: {"model": {name: t.half() for name, t in state.items()}},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_brings_its_weights_classes_channels_and_size(trained, state, tmp_path, kind):
    file = tmp_path / "checkpoint.pth.tar"
    torch.save(CHECKPOINTS[kind](state), file)
    model = open_model(DEIT, checkpoint=file)
    assert (model.num_classes, model.patch_embed.proj.in_channels, model.patch_embed.img_size) == (
        7,
        1,
        (64, 64),
    )
    for name, tensor in model.state_dict().items():
        expected = state[name].half().float() if kind == "half" else state[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_plain_safetensors_are_known_by_what_is_in_them(state, tmp_path, name):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name)
    model = open_model(DEIT, checkpoint=tmp_path / name)
    assert torch.equal(model.head.weight, state["head.weight"])


@pytest.mark.thorough  # of no small model
def test_the_old_format_of_torch_save_and_of_deit_3_are_read(tmp_path):
    model = made("deit3_small_patch16_224", num_classes=3)
    old = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
           for name, tensor in model.state_dict().items()}  # fmt: skip
    torch.save({"model": old}, tmp_path / "deit3.pth", _use_new_zipfile_serialization=False)
    got = open_model("deit3_small_patch16_224", checkpoint=tmp_path / "deit3.pth").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.thorough  # of no small model
def test_dinov2s_own_checkpoint_is_read(tmp_path):
    model = made("vit_small_patch14_dinov2")
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    got = open_model("vit_small_patch14_dinov2", checkpoint=tmp_path / "dinov2.pth").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


def test_mean_pooled_and_headless_checkpoints_are_taken_as_they_are(tmp_path):
    pooled = made(num_classes=5, global_pool="avg")
    torch.save(pooled.state_dict(), tmp_path / "pooled.pth")
    model = open_model(DEIT, checkpoint=tmp_path / "pooled.pth")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model.eval()(images), pooled(images))
    torch.save(made(num_classes=0).state_dict(), tmp_path / "features.pth")
    assert open_model(DEIT, checkpoint=tmp_path / "features.pth").num_classes == 0
    assert open_model(DEIT, checkpoint=tmp_path / "features.pth", num_classes=4).head.out_features == 4


class Executed:
    """What a pickle that is executed would do."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_pickle_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": Executed()}))
    torch.save({"model": Executed()}, "a.pth")
    warnings.simplefilter("ignore")  # of PyTorch's, about the protocol of the second
    for name in ("a.pth", "b.pkl"):
        for call in (lambda n=name: open_model(DEIT, checkpoint=n), lambda n=name: open_model(n)):
            with pytest.raises(vtp.FileError):
                call()
    assert not (tmp_path / "executed").exists()
    with pytest.raises(vtp.FileError, match=r"holds objects of Python .*open.*would execute"):
        read_weights("a.pth")


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(state, tmp_path):
    cases = {
        "missing": ({n: t for n, t in state.items() if "blocks.11" not in n}, r"12 missing \(blocks\.11"),
        "extra": ({**state, "dist_token": torch.zeros(1)}, r"1 left over \(dist_token\)"),
        "shape": ({**state, "norm.weight": torch.ones(5)}, r"norm\.weight .* \(5,\), expected"),
        "integers": ({**state, "norm.weight": torch.ones(192, dtype=torch.int64)}, r"norm\.weight .*int64"),
        "positions": ({**state, "pos_embed": torch.zeros(1, 4, 192)}, r"pos_embed .*\(1, 4, 192\)"),
        "nested": ({"net": {"inner": state}}, r"has net where tensors were expected"),
        "empty": ({}, r"has nothing where tensors"),
        "tensor": (torch.zeros(3), r"no checkpoint of PyTorch"),
        "transformers": (
            {f"encoder.layer.{i}.attention.query.weight": torch.zeros(2) for i in range(2)}
            | {"pooler.bias": torch.zeros(2)},
            "named as in Hugging Face's transformers",
        ),
        "torchvision": (
            {"class_token": torch.zeros(2), "encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(2)},
            "named as in torchvision",
        ),
        "inside": (
            {**{f"backbone.{n}": t for n, t in state.items()}, "projector.weight": torch.zeros(2)},
            r"Those under 'backbone\.' look like its",
        ),
        "one more token": ({**state, "pos_embed": torch.zeros(1, 18, 192)}, r"pos_embed .*\(1, 18, 192\)"),
    }
    for kind, (content, message) in cases.items():
        torch.save(content, tmp_path / "checkpoint.pth")
        with pytest.raises(vtp.FileError, match=f"checkpoint: .*{message}"):
            open_model(DEIT, checkpoint=tmp_path / "checkpoint.pth")
        assert kind


def test_a_damaged_or_missing_checkpoint_is_refused(state, tmp_path):
    torch.save({"model": state}, tmp_path / "whole.pth")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        for size in (0, 5, len(content) // 2, len(content) - 7):
            cut.write_bytes(content[:size])
            with pytest.raises(vtp.FileError, match="damaged or cut off"):
                open_model(DEIT, checkpoint=cut)
    with pytest.raises(vtp.FileError, match="checkpoint: no file"):
        open_model(DEIT, checkpoint=tmp_path / "none.pth")


def test_a_file_that_does_not_say_of_what_its_weights_are_asks_for_the_name(state, tmp_path):
    torch.save({"model": state}, tmp_path / "deit.pth")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "m.safetensors")
    for name in ("deit.pth", "m.safetensors"):
        file = tmp_path / name
        with pytest.raises(
            vtp.FileError, match=f"give the name of the timm model .* and --checkpoint {file}"
        ):
            open_model(str(file))


def test_a_checkpoint_beside_a_model_that_has_weights_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "deit.pth")
    ours = tmp_path / "ours.safetensors"
    vtp.save(open_model("fashion-deit"), ours)
    for name, more in ((str(ours), {}), ("fashion-deit", {}), (DEIT, {"from_scratch": True})):
        with pytest.raises(vtp.FileError, match="expected the name of its timm model alone"):
            open_model(name, checkpoint=tmp_path / "deit.pth", **more)
    with pytest.raises(vtp.FileError, match="a model that vtp wrote"):
        open_model(DEIT, checkpoint=ours)


def test_a_folder_of_timm_and_a_name_of_the_hub_are_opened(trained, state, tmp_path, monkeypatch):
    config = {"architecture": DEIT, "num_classes": 7, "model_args": {"in_chans": 1, "img_size": 64}}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "pretrained_cfg": {"input_size": [1, 64, 64]}})
    )
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    model = open_model(f"local-dir:{tmp_path}")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, **k: asked.append(n) or create(DEIT))
    open_model("hf-hub:someone/deit")
    open_model("timm/deit_tiny_patch16_224.fb_in1k")
    open_model("timm/deit_tiny_patch16_224.of_next_year")
    assert asked[::2] == [
        "hf-hub:someone/deit",
        "deit_tiny_patch16_224.fb_in1k",
        "hf-hub:timm/deit_tiny_patch16_224.of_next_year",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "deit_small_patch16_224.imagenet",
            r"no weights 'imagenet' of deit_small_patch16_224, it has fb_in1k",
        ),
        (
            "vit_giant_patch14_224",
            r"no released weights of vit_giant_patch14_224; --from-scratch .*--checkpoint",
        ),
        ("deit_smal_patch16_224", r"timm has deit_small_patch16_224"),
        ("someone/my-vit", r"hf-hub:someone/my-vit"),
        ("vit.pth", r"no file vit\.pth"),
        ("local-dir:/no/such/folder", r"timm cannot open local-dir:/no/such/folder .*Config file not found"),
        ("hf-hub:", r"timm cannot open hf-hub:"),
    ],
)
def test_a_name_that_opens_nothing_says_why_and_what_does(name, message):
    with pytest.raises(vtp.FileError, match=message):
        open_model(name)


def test_a_folder_is_told_its_name(tmp_path):
    with pytest.raises(vtp.FileError, match=f"local-dir:{tmp_path}"):
        open_model(str(tmp_path))


def test_weights_that_cannot_be_fetched_are_our_own_error(monkeypatch):
    def offline(*_, **keywords):
        if keywords.get("pretrained"):
            raise ConnectionError("no\nnetwork")
        return create(*_, **keywords)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(vtp.FileError, match=r"timm cannot open deit_tiny.*ConnectionError: no network"):
        open_model(DEIT)
