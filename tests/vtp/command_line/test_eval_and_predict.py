"""`vtp eval` and `vtp predict`."""

import re
import shutil

import pytest
import torch

import vtp
from tests.support.command_line import run
from tests.support.folders import write_classes
from tests.support.models import TINY, build


def test_eval_maps_classes_by_name_says_so_and_needs_no_training_images(pets, tmp_path, capsys):
    shutil.copytree(pets / "images" / "val", tmp_path / "val")
    for data in (pets / "images", tmp_path, tmp_path / "val"):
        assert run("eval", "--model", pets / "model.safetensors", "--data", data) == 0
        out, error = capsys.readouterr()
        assert out.startswith("top-1 100.00,")
        assert (
            "another order than the model's, and are mapped by name: ape, cat, dog; the model has dog"
            in error
        )


def test_eval_and_training_refuse_other_classes_and_write_nothing(pets, tmp_path, refused):
    images = write_classes(tmp_path / "images", {"dog": 1, "kitten": 2, "ape": 3})
    usual = ["--model", pets / "model.safetensors", "--data", images]
    message = "the data have ape, dog, kitten; the model has dog, cat, ape.*--class-map FILE.*--new-head"
    refused(message, "eval", *usual)
    refused(message, "train", "dense", *usual, "--out", tmp_path / "run")
    refused(message, "run", *usual, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "map.txt").write_text("dog\nkitten\nape\n")
    assert run("eval", *usual, "--class-map", tmp_path / "map.txt") == 0


def test_predict_prints_names_and_probabilities(pets, capsys):
    images = [pets / "images" / "val" / name / "0.png" for name in ("cat", "ape")]
    assert run("predict", pets / "model.safetensors", *images) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{images[0]}:" and lines[4] == f"{images[1]}:" and len(lines) == 8
    for first, name in ((1, "cat"), (5, "ape")):
        shares = [float(line.split("%")[0]) for line in lines[first : first + 3]]
        assert lines[first].endswith(f"%  {name}") and shares[0] > 99
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.02)


def test_predict_says_what_it_does_not_know_and_what_is_no_image(files, pets, tmp_path, capsys, refused):
    image = pets / "images" / "val" / "cat" / "0.png"
    refused(
        "does not say how its images are normalised.*vtp.save", "predict", files / "dense.safetensors", image
    )
    (tmp_path / "notes.png").write_text("x")
    refused(r"notes\.png", "predict", pets / "model.safetensors", tmp_path / "notes.png")
    refused(r"none\.png", "predict", pets / "model.safetensors", tmp_path / "none.png")
    model = vtp.load(pets / "model.safetensors")
    del model.pretrained_cfg["label_names"]
    vtp.save(model, tmp_path / "unnamed.safetensors")
    capsys.readouterr()
    assert run("predict", tmp_path / "unnamed.safetensors", image) == 0
    out, error = capsys.readouterr()
    assert out.splitlines()[1].endswith("%  class 1") and "does not name its classes" in error


def test_predict_predicts_the_others_where_a_file_is_no_image_and_fails_in_the_end(pets, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("x")
    cat, ape = (pets / "images" / "val" / name / "0.png" for name in ("cat", "ape"))
    bad = [tmp_path / "notes.png", tmp_path / "none.png"]
    assert run("predict", pets / "model.safetensors", cat, bad[0], ape, bad[1]) == 2
    out, error = capsys.readouterr()
    assert [line for line in out.splitlines() if line.endswith(":")] == [f"{cat}:", f"{ape}:"]
    first, *lines = error.splitlines()
    assert first == "vtp: error: 2 of 4 images cannot be read:"
    assert all(str(path) in line for line, path in zip(lines, bad, strict=True))


def test_eval_reports_accuracy_and_cost(files, capsys):
    assert run("eval", "--model", files / "compact.safetensors", "--data", files / "images") == 0
    out = capsys.readouterr().out
    found = re.search(r"top-1 (\d+\.\d\d), cross-entropy \d+\.\d{4}; (.*)\n", out)
    assert float(found[1]) % 10 == 0  # of ten images
    assert found[2] == str(vtp.count(vtp.load(files / "compact.safetensors")))


def test_eval_of_frozen_features_takes_other_classes_than_the_models_and_models_without_a_head(
    files, tmp_path, capsys, refused, misused
):
    headless = build(TINY.__class__(**{**TINY.__dict__, "num_classes": 0}), dtype=torch.float32)
    vtp.save(headless, tmp_path / "headless.safetensors")
    vtp.save(build(dtype=torch.float32), tmp_path / "ten.safetensors")
    usual = ["--data", files / "images", "--model"]
    for file in (
        tmp_path / "headless.safetensors",
        tmp_path / "ten.safetensors",
        files / "gated.safetensors",
    ):
        assert run("eval", *usual, file, "--knn", 3, "--linear-probe") == 0
        found = re.search(
            r"k-NN top-1 (\d+\.\d\d) \(k 3\), linear probe top-1 (\d+\.\d\d) \(penalty [\de.-]+\); (.*)\n",
            capsys.readouterr().out,
        )
        assert found[1] == found[2] == "100.00"  # dark and light
        assert found[3] == str(vtp.count(vtp.load(file)))
    assert run("eval", *usual, files / "compact.safetensors", "--linear-probe") == 0
    assert capsys.readouterr().out.startswith("linear probe top-1")
    few = "--knn: got 20, expected at most 16, the training"
    refused(few, "eval", *usual, files / "dense.safetensors", "--knn")
    misused("--knn: got '0', expected an integer of at least 1", "eval", "--knn", "0")
    shutil.copytree(files / "images" / "val", tmp_path / "alone" / "val")
    alone = ["--model", files / "dense.safetensors", "--data", tmp_path / "alone"]
    refused("found nothing to train", "eval", *alone, "--knn", 3)
    assert run("inspect", tmp_path / "headless.safetensors") == 0
    assert "classes: none, its outputs are features\n" in capsys.readouterr().out
    # Where a head is needed, what there is without one is named.
    no_head = "the model has no head, .*vtp eval --knn.*--new-head"
    refused(no_head, "eval", *usual, tmp_path / "headless.safetensors")
    refused(
        f"{no_head}.*--no-eval", "prune", tmp_path / "headless.safetensors", "--calibrate", files / "images",
        "--out", tmp_path / "small.safetensors",
    )  # fmt: skip
    assert not (tmp_path / "small.safetensors").exists()


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_a_model_whose_outputs_are_not_numbers_has_no_accuracy_and_no_predictions(
    command, pets, tmp_path, capsys
):
    broken = vtp.load(pets / "model.safetensors")
    next(broken.head.parameters()).data[0] = torch.nan
    vtp.save(broken, tmp_path / "broken.safetensors")
    given = {
        "eval": ("eval", "--model", tmp_path / "broken.safetensors", "--data", pets / "images"),
        "predict": ("predict", tmp_path / "broken.safetensors", pets / "images" / "val" / "cat" / "0.png"),
    }[command]
    assert run(*given) in (1, 2)
    out, err = capsys.readouterr()
    assert "NaN or infinite outputs" in err and "top-1" not in out and "%" not in out


def test_eval_refuses_what_it_cannot_open(files, tmp_path, refused):
    model = files / "dense.safetensors"
    refused("got 'resnet', expected", "eval", "--model", "resnet")
    refused("timm.models.resnet.ResNet", "eval", "--model", "resnet18", "--data", files / "images")
    refused("none", "eval", "--model", model, "--data", tmp_path / "none")
    refused("10|classes", "eval", "--model", model)  # the embedded data have ten classes
    refused("--model: .* is no safetensors file", "eval", "--model", __file__)
