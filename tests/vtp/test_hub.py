"""Compact models in folders and on the hub: timm makes the same model again, from safetensors alone."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models import _hub as timm_hub

import vtp
from tests.support.models import FAMILIES, build, gated, image
from vtp.cli import main
from vtp.hub import ARCHITECTURE, _indices, _runs
from vtp.model.images import set_image_config
from vtp.zoo import open_model

SAID = {"mean": (0.1,), "std": (0.2,), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bilinear"}
NAMES = tuple("abcdefghij")


def compact_model(family: str = "plain") -> vtp.CompactViT:
    model = gated(build(FAMILIES[family], torch.float32))
    return vtp.compact(model, vtp.make_plan(model, rate=0.4)).eval()


@pytest.fixture(scope="module")
def small():
    model = compact_model()
    set_image_config(model, **SAID, label_names=NAMES, architecture="deit_tiny_patch16_224", tag="fb_in1k")
    return model


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "deit"
    vtp.save_pretrained(small, folder, metadata={"top1": 81.25})
    return folder


def create(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def assert_same(made, model):
    x = image(model, batch=3)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))


def test_timm_makes_the_model_again_from_a_folder(small, folder):
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    made = create(folder)
    assert_same(made, small)
    assert made.plan.kept == small.plan.kept and made.plan.parent == small.plan.parent
    config = timm.data.resolve_model_data_config(made)
    assert {name: config[name] for name in SAID} == {**SAID, "mean": [0.1], "std": [0.2]}
    assert made.pretrained_cfg["label_names"] == list(NAMES)


def test_timm_does_not_load_the_dense_models_weights_into_one_that_was_cut(tmp_path):
    dense = build(dtype=torch.float32)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    dense.pretrained_cfg = {"file": str(tmp_path / "dense.safetensors"), "num_classes": 10}
    dense.pretrained_cfg |= {"input_size": (1, 8, 8)}
    whole = vtp.compact(dense, vtp.make_plan(vtp.insert_gates(dense), rate=0.0))  # into which they would fit
    vtp.save_pretrained(whole, tmp_path / "hub")
    plan = json.loads((tmp_path / "hub" / "config.json").read_text())["model_args"]["plan"]
    said = copy.copy(whole)
    said.pretrained_cfg = dense.pretrained_cfg  # as files of before have it
    vtp.save(said, tmp_path / "old.safetensors")
    for model in (whole, vtp.load(tmp_path / "old.safetensors")):
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model(
                ARCHITECTURE, pretrained=True, pretrained_cfg=model.pretrained_cfg, plan=plan, in_chans=1
            )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "plain"])
def test_so_it_does_with_every_kind_of_model(tmp_path, family):
    model = compact_model(family)
    vtp.save_pretrained(model, tmp_path)
    assert_same(create(tmp_path), model)


def test_what_timm_made_is_a_compact_model_in_every_other_way(small, folder, tmp_path):
    made = create(folder)
    vtp.save(made, tmp_path / "again.safetensors")
    assert_same(vtp.load(tmp_path / "again.safetensors"), small)
    vtp.save_pretrained(made, tmp_path / "again")
    again = create(tmp_path / "again")
    assert_same(again, small)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "**Parent:** deit_tiny_patch16_224.fb_in1k " in card
    assert_same(vtp.load(folder / "model.safetensors"), small)
    torch.testing.assert_close(vtp.optimize(made)(image(small)), small(image(small)))
    assert_same(open_model(f"local-dir:{folder}").eval(), small)


def test_the_command_line_takes_the_folder(small, folder, tmp_path):
    out = tmp_path / "small.pt2"
    assert main(["export", f"local-dir:{folder}", "--to", "pt2", "--out", str(out), "--seconds", "0.01"]) == 0
    x = image(small, batch=3)
    torch.testing.assert_close(torch.export.load(out).module()(x), small(x))


def test_arguments_of_create_model_work_as_for_timms_own(small, folder):
    other = create(folder, num_classes=3, in_chans=3, img_size=16, drop_path_rate=0.5)
    assert other(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert other.blocks[1].drop_path1.drop_prob == 0.5
    # All but the head, the stem and the positions are those of the file.
    assert torch.equal(other.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    assert create(folder, num_classes=0)(image(small)).shape == (2, 12)
    features = create(folder, features_only=True, out_indices=(0, 1))(image(small))
    assert [each.shape for each in features] == [(2, 12, 2, 2)] * 2
    fresh = timm.create_model(f"local-dir:{folder}")
    assert not torch.equal(fresh.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    with pytest.raises(TypeError, match=f"{ARCHITECTURE}: got embed_dim, window, expected some of act_layer"):
        create(folder, embed_dim=24, window=7)


def test_a_head_changed_after_the_cut_is_the_heads_that_is_made(tmp_path):
    model = compact_model()
    model.reset_classifier(4)
    vtp.save_pretrained(model, tmp_path)
    assert_same(create(tmp_path), model)


def test_weights_of_a_half_precision_become_float32(small, tmp_path):
    half = copy.deepcopy(small).bfloat16()
    vtp.save_pretrained(half, tmp_path)
    assert_same(create(tmp_path), half.float())


def test_card_and_config_say_what_the_model_is(small, folder):
    card = (folder / "README.md").read_text()
    cost = vtp.count(small)
    for line in (
        "library_name: vtp",
        "license: unknown",  # timm would claim one
        f"(weights {small.plan.parent[:16]})",
        "budget: rate 0.4",
        "top1: 81.25",
        f"GMACs: {cost.macs / 1e9:.3f} of",
        "timm.create_model('local-dir:deit', pretrained=True)",
        str(small.plan),
    ):
        assert line in card
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == ARCHITECTURE and config["num_classes"] == 10
    assert config["vtp"]["macs"] == cost.macs and config["vtp"]["parent"] == "deit_tiny_patch16_224.fb_in1k"
    assert config["model_args"]["plan"]["scores"] == {}


class Hub:
    """Stands for the Hugging Face hub: repositories are folders."""

    def __init__(self, root: Path, **_):
        self.root = root

    def create_repo(self, repo_id, private, exist_ok):
        (self.root / repo_id).mkdir(parents=True)
        return type("Url", (), {"repo_id": repo_id})

    def file_exists(self, repo_id, filename, revision):
        return (self.root / repo_id / filename).exists()

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"uploaded {repo_id}"

    def download(self, repo_id, filename, **_):
        file = self.root / repo_id / filename
        if not file.exists():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    root = tmp_path / "hub"
    monkeypatch.setattr(timm_hub, "HfApi", lambda **options: Hub(root, **options))
    monkeypatch.setattr(
        timm_hub, "hf_hub_download",
        lambda repo_id, filename, **_: Hub(root).download(repo_id, filename),
    )  # fmt: skip
    return root


def test_a_model_goes_to_the_hub_and_back_as_safetensors(small, hub):
    assert vtp.push_to_hub(small, "me/deit", metadata={"top1": 81.25}) == "uploaded me/deit"
    assert {file.name for file in (hub / "me/deit").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    assert "top1: 81.25" in (hub / "me/deit" / "README.md").read_text()
    assert "create_model('hf-hub:me/deit', pretrained=True)" in (hub / "me/deit" / "README.md").read_text()
    made = timm.create_model("hf-hub:me/deit", pretrained=True).eval()
    assert_same(made, small)
    assert made.plan.kept == small.plan.kept


@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_pickled_weights_are_not_read(folder, tmp_path, hub, source):
    place = hub / "me/deit" if source == "hf-hub" else tmp_path / "deit"
    shutil.copytree(folder, place)
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    name = "hf-hub:me/deit" if source == "hf-hub" else f"local-dir:{place}"
    with pytest.raises((vtp.FileError, OSError), match=r"model\.safetensors"):
        timm.create_model(name, pretrained=True)


def test_what_is_no_compact_model_is_refused_and_nothing_is_written(small, tmp_path, hub):
    dense = build(FAMILIES["plain"], torch.float32)
    for model in (dense, vtp.optimize(small)):
        with pytest.raises(TypeError, match=r"model: got .* expected one from vtp\.compact"):
            vtp.save_pretrained(model, tmp_path / "new")
        with pytest.raises(TypeError, match=r"model: got .* expected one from vtp\.compact"):
            vtp.push_to_hub(model, "me/deit")
    with pytest.raises(TypeError, match="metadata: got list"):
        vtp.push_to_hub(small, "me/deit", metadata=[1])
    changed = compact_model()
    changed.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(vtp.UnsupportedModelError, match=r"blocks.0.mlp.act"):
        vtp.push_to_hub(changed, "me/deit")
    (tmp_path / "file").write_text("")
    with pytest.raises(vtp.FileError, match="folder: cannot make"):
        vtp.save_pretrained(small, tmp_path / "file")
    assert {each.name for each in tmp_path.iterdir()} == {"file"}


def test_a_plan_that_was_changed_or_is_missing_is_refused(folder, tmp_path):
    with pytest.raises(vtp.PlanError, match=f"plan: missing; {ARCHITECTURE} is made from what"):
        timm.create_model(ARCHITECTURE)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    for runs, message in (
        ("0-9999999999", "plan: kept is missing or no runs of indices"),
        ("0 x", "plan: kept is missing or no runs of indices"),
        ("0-12", "expected ascending indices in"),
        ([0, 1], "plan: kept is missing or no runs of indices"),
    ):
        config["model_args"]["plan"]["kept"]["blocks.0.attn.qkv"] = runs
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(vtp.PlanError, match=message):
            create(tmp_path)


def test_an_index_out_of_range_in_the_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.0.norm1.index"][-1] = 12
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        vtp.FileError, match=r"blocks.0.norm1.index of model.safetensors is not within \[0, 12\)"
    ):
        create(tmp_path)


def test_runs_are_the_indices():
    for indices in ((), (0,), (0, 1, 2), (1, 3, 4, 5, 9), tuple(range(0, 40, 3))):
        assert tuple(_indices(_runs(indices))) == indices
    assert _runs((0, 1, 2, 5, 7, 8)) == "0-2 5 7-8"
