"""Images of several classes at once, and weights of classes: how they are given, and what is learnt."""

import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.support.models import TINY, build
from tests.vtp.training.test_loop import CONFIG, images, make_data, make_model, one_thread, run  # noqa: F401
from vtp import Statistics, pipeline, save
from vtp.cli import main
from vtp.training.config import TrainConfig
from vtp.training.criterion import class_weight
from vtp.training.data import DataError, check_data, match_classes, open_data
from vtp.training.evaluation import evaluate
from vtp.training.loaders import test_loader as evaluation_loader
from vtp.training.multi_label import mean_average_precision
from vtp.training.teacher import distillation_loss
from vtp.training.transforms import Augment

CLASSES = ("bright", "left", "never said")
ONE_STEP = replace(CONFIG, epochs=1, batch_size=96, warmup_epochs=0.0)
AS_THEY_ARE = Augment.preset("none", 16)


def several(count: int, seed: int) -> list[tuple[Image.Image, np.ndarray]]:
    """Grey images that are bright or not, and brighter on the left or not; each label one number a class."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        bright, left = index % 2, index // 2 % 2
        pixels = rng.integers(0, 60, (16, 16)) + 90 * bright
        pixels[:, :8] += 90 * left
        samples.append((Image.fromarray(pixels.astype(np.uint8)), np.array([bright, left, index % 5 == 0])))
    return samples


def multi_label_data():
    return make_data(num_classes=3, class_names=CLASSES, train=several(96, 0), test=several(40, 1))


def three_classes() -> nn.Module:
    model = make_model()
    torch.manual_seed(1)
    model.reset_classifier(3)
    return model


@pytest.fixture
def folder(tmp_path):
    """An image folder with a metadata.csv in each split, and images at two depths."""
    for split, count in (("train", 24), ("val", 8)):
        root = tmp_path / "images" / split
        (root / "more").mkdir(parents=True)
        lines = ["file_name," + ",".join(CLASSES)]
        for index, (image, label) in enumerate(several(count, count)):
            name = f"more/{index}.png" if index % 3 == 0 else f"{index}.png"
            image.save(root / name)
            lines.append(",".join([name, *map(str, label.astype(int))]))
        (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "images"


def test_each_class_is_learnt_by_itself(tmp_path):
    data = multi_label_data()
    config = replace(CONFIG, epochs=10, label_smoothing=0.0)
    result = run(tmp_path, config, model=three_classes(), data=data, augment=AS_THEY_ARE)
    batches = list(evaluation_loader(data, image_size=16, in_chans=1, batch_size=40))
    (pixels, labels), model = batches[0], result.model
    assert labels.dtype == torch.float32 and labels.shape == (40, 3)
    with torch.no_grad():
        logits = model(pixels)
    assert ((logits > 0) == labels.bool())[:, :2].float().mean() > 0.9  # bright and left are both found
    assert evaluate(model, data) == pytest.approx(
        (result.top1, F.binary_cross_entropy_with_logits(logits, labels).item()), rel=1e-5
    )
    assert result.history[-1]["test_map"] == pytest.approx(mean_average_precision(logits, labels))


@pytest.mark.parametrize("weight", [None, (1.0, 2.0, 5.0)])
def test_the_loss_is_timms_with_smoothed_labels_and_weights(tmp_path, weight):
    data, model = multi_label_data(), three_classes()
    config = replace(ONE_STEP, label_smoothing=0.2, class_weight=weight)
    history = run(tmp_path, config, model=model, data=data, augment=AS_THEY_ARE).history
    pixels, labels = next(iter(evaluation_loader(replace(data, test=data.train), image_size=16, in_chans=1,
                                                 batch_size=96)))  # fmt: skip
    with torch.no_grad():
        expected = F.binary_cross_entropy_with_logits(
            model(pixels), 0.8 * labels + 0.1, weight=None if weight is None else torch.tensor(weight)
        )
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_mixup_mixes_the_labels_of_several_classes(tmp_path):
    config = replace(ONE_STEP, mixup=0.8, label_smoothing=0.0)
    assert run(tmp_path, config, model=three_classes(), data=multi_label_data()).history


def test_a_teacher_of_several_classes_answers_each():
    student, teacher = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -1.0]])
    p = (teacher / 2).sigmoid()
    q = (student / 2).sigmoid()
    expected = -4 * (p * q.log() + (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, "soft", True), expected)
    hard = -(student.sigmoid()[0, 0].log() + (-student).sigmoid()[0, 1].log()) / 2
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, "hard", True), hard)


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.2, 0.5]])
    targets = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]])
    # First class: right at ranks 1 and 3; second: at ranks 2 and 3.
    assert mean_average_precision(scores, targets) == pytest.approx(
        100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    )
    absent = torch.cat([targets, torch.zeros(4, 1, dtype=torch.int64)], dim=1)
    assert mean_average_precision(torch.rand(4, 3), absent) >= 0


def test_train_takes_a_folder_with_a_table_of_labels(folder, tmp_path, capsys):
    model = build(replace_architecture(num_classes=3), torch.float32)
    save(model, tmp_path / "dense.safetensors")
    command = ["train", "dense", "--model", str(tmp_path / "dense.safetensors"), "--data", str(folder)]
    command += ["--batch-size", "8", "--augment", "none", "--set", "dense.epochs=1", "--set"]
    command += [
        "dense.warmup_epochs=0",
        "--set",
        "dense.class_weight=inv_freq",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 0
    assert "mean average precision" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < record["test_map"] <= 100
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize("command", ["prune", "run"])
def test_calibration_measures_the_answer_for_each_class(folder, tmp_path, command, monkeypatch):
    save(build(replace_architecture(num_classes=3), torch.float32), tmp_path / "dense.safetensors")
    statistics = tmp_path / "run" / "statistics.safetensors"
    if command == "prune":
        (tmp_path / "run").mkdir()
        arguments = ["prune", tmp_path / "dense.safetensors", "--calibrate", folder, "--no-eval"]
        arguments += ["--statistics", statistics, "--out", tmp_path / "small.safetensors"]
    else:
        arguments = ["run", "--one-shot", "--model", tmp_path / "dense.safetensors", "--data", folder]
        arguments += ["--batch-size", "8", "--workers", "0", "--out", tmp_path / "run"]
        monkeypatch.setattr(pipeline, "train", lambda *_, **__: 1 / 0)  # all is measured before
    with suppress(ZeroDivisionError):
        assert main([*map(str, arguments), "--images", "24", "--rate", "0.3"]) == 0
    assert Statistics.load(statistics).change == "binary KL"


def replace_architecture(**changes):
    return replace(TINY, img_size=(16, 16), **changes)


def test_a_table_of_labels_is_read_as_it_is(folder):
    data = open_data(folder)
    assert data.class_names == CLASSES and data.num_classes == 3
    assert [tuple(label) for _, label in (data.train[i] for i in range(6))] == [
        tuple(label) for _, label in several(6, 0)
    ]
    check_data(data, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,a,b\n0.png,1,0\n", r"got columns \['name', 'a', 'b'\], expected file_name and one for each"),
        ("file_name,a,a\n", "expected file_name and one for each class"),
        (
            "file_name,a,b\n1.png,1\n",
            r"line 2: got \['1.png', '1'\], expected a file name and 2 times 0 or 1",
        ),
        ("file_name,a,b\n1.png,1,0\n2.png,yes,0\n", "line 3: got"),
        ("file_name,a,b\nnone.png,1,0\n", "line 2: there is no image .*none.png"),
        ("file_name,a,b\n", "lists no image"),
        ("file_name,a,b\n1.png,1,0\n", "got columns .*bright.*, expected those of"),
    ],
)
def test_a_table_that_is_not_one_is_refused_with_line_and_reason(folder, text, message):
    (folder / "train" / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(folder)


def test_labels_are_given_the_order_of_the_models_classes(folder):
    names = ("never said", "other", "bright", "left")
    data = match_classes(open_data(folder, train=False), names, subset=True)
    assert data.labels_present == (0, 2, 3)
    for index, (_, (bright, left, third)) in enumerate(several(8, 8)):
        assert data.test[index][1] == (third, 0, bright, left)


def test_a_class_that_no_image_has_is_named(folder):
    table = folder / "train" / "metadata.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *(row[:-1] + "0" for row in rows)]))
    with pytest.raises(DataError, match="train: no image in 1 of 3 classes: never said"):
        check_data(open_data(folder), 3)


# ---------------------------------------------------------------------------------------------------------
# Weights of classes


def test_class_weights_are_pytorchs_and_inv_freq_is_timms(tmp_path):
    weight = (1.0, 2.0, 0.5, 3.0)
    data, model = make_data(), make_model()
    config = replace(ONE_STEP, class_weight=weight, label_smoothing=0.1)
    history = run(tmp_path, config, model=model, augment=AS_THEY_ARE).history
    pixels, labels = next(iter(evaluation_loader(replace(data, test=data.train), image_size=16, in_chans=1,
                                                 batch_size=96)))  # fmt: skip
    with torch.no_grad():
        expected = F.cross_entropy(model(pixels), labels, torch.tensor(weight), label_smoothing=0.1)
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)

    class Labelled(list):
        targets = [0] * 6 + [1] * 3 + [2] * 1 + [3] * 2

    skewed = replace(data, train=Labelled(images(12, 0)))
    got = class_weight(replace(config, class_weight="inv_freq"), skewed, 4, torch.device("cpu"))
    inverse = torch.tensor([1 / 6, 1 / 3, 1.0, 1 / 2])
    torch.testing.assert_close(got, inverse / inverse.mean())


def test_class_weights_that_do_not_fit_are_refused(tmp_path):
    for value in ("balanced", [], [1.0, 0.0], [1.0, "2"], [True, 1.0], 3.0):
        with pytest.raises(
            ValueError, match=r"TrainConfig\.class_weight: got .* expected None, 'inv_freq', or a"
        ):
            TrainConfig(class_weight=value)
    with pytest.raises(ValueError, match=r"config\.class_weight: got 2 weights, expected 4"):
        run(tmp_path / "run", replace(CONFIG, class_weight=[1.0, 2.0]))
    with pytest.raises(ValueError, match="expected a list of weights as greys does not say how often"):
        run(tmp_path / "run", replace(CONFIG, class_weight="inv_freq"))
    assert not (tmp_path / "run").exists()
