"""Checkpoints of transformers by name: what is opened, what is refused and why, and what commands do."""

import json
import pickle
import sys

import pytest
import torch

import vtp
from tests.support.folders import write_classes
from tests.support.hugging_face import DINO2, DINO3, VIT, made, transformers
from tests.support.models import relative_error
from vtp import hugging_face_checkpoints
from vtp.cli import main
from vtp.model.images import class_names, image_config
from vtp.training.sources import open_images
from vtp.training.transforms import image_pipeline
from vtp.zoo import open_model, open_teacher


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

    monkeypatch.setattr(hugging_face_checkpoints, "hf_hub_download", fetched)
    monkeypatch.setattr(
        hugging_face_checkpoints,
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

    monkeypatch.setattr(hugging_face_checkpoints, "hf_hub_download", offline)
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
    made("DINOv3ViT", "Model", DINO3).float().save_pretrained(tmp_path / "dinov3")
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
