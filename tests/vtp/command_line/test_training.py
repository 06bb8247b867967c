"""`vtp train`, `vtp finetune`, and what `vtp run` refuses at once."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

import vtp
from tests.support.command_line import run
from tests.support.models import TINY, build
from vtp import commands, pipeline
from vtp.model.images import class_names
from vtp.training.data import open_data
from vtp.training.loop import TrainingInterrupted, TrainResult
from vtp.training.teacher import Teacher
from vtp.zoo import open_teacher


def test_sparse_training_takes_a_compact_model(files, tmp_path):
    quick = [f"--set=sparse.{setting}" for setting in ("epochs=1", "warmup_epochs=0", "lr=1e-3")]
    known = ["--data", files / "images", "--augment", "none", "--batch-size", 4, "--workers", 0, *quick]
    assert run("train", "sparse", "--model", files / "compact.safetensors", "--out", tmp_path, *known) == 0
    once = vtp.load(files / "compact.safetensors")
    plan = vtp.make_plan(vtp.load(tmp_path / "sparse.safetensors"), rate=0.5)
    assert all(set(kept) <= set(once.plan.kept[name]) for name, kept in plan.kept.items())


def test_trained_model_says_what_its_classes_are(pets, tmp_path, capsys):
    options = ["--set=dense.epochs=1", "--set=dense.warmup_epochs=0", "--batch-size", 2, "--new-head"]
    usual = ["--model", pets / "model.safetensors", "--data", pets / "images", "--out", tmp_path]
    assert run("train", "dense", *usual, *options) == 0
    assert class_names(vtp.load(tmp_path / "dense.safetensors")) == ("ape", "cat", "dog")
    teacher = ["--teacher", pets / "model.safetensors", "--set=dense.distill_alpha=0.5"]
    capsys.readouterr()
    assert run("train", "dense", *usual, *options, *teacher) == 2
    assert "the teacher has dog, cat, ape; the model has ape, cat, dog" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """Sparse training and fine-tuning of one epoch each, from the command line."""
    folder, data = tmp_path_factory.mktemp("trained"), ["--data", files / "images", "--augment", "none"]
    quick = ["--batch-size", "2", "--effective-batch", "4", "--workers", "0", "--seed", "3"]
    quick += ["--fsdp", "--grad-checkpointing"]  # without effect, and without effect on what is learned
    for stage in ("sparse", "finetune"):
        for field, value in (("epochs", 1), ("warmup_epochs", 0), ("lr", 1e-3)):
            quick += ["--set", f"{stage}.{field}={value}"]
    sparse, small, tuned = folder / "sparse", folder / "small.safetensors", folder / "tuned"
    dense = files / "dense.safetensors"
    assert run("train", "sparse", "--model", dense, "--out", sparse, *data, *quick) == 0
    assert run("prune", sparse / "sparse.safetensors", "--out", small, "--score", "taylor") == 0
    assert run("finetune", small, "--teacher", dense, "--out", tuned, *data, *quick) == 0
    return folder


def test_sparse_model_from_the_command_line_can_be_cut_and_fine_tuned(trained):
    sparse = vtp.load(trained / "sparse" / "sparse.safetensors")
    assert all(layer.taylor_steps > 0 for layer in vtp.sites(sparse).values())
    small = vtp.load(trained / "tuned" / "compact.safetensors")
    assert isinstance(small, vtp.CompactViT)
    assert small.plan == vtp.load(trained / "small.safetensors").plan
    assert vtp.read_metadata(trained / "tuned" / "compact.safetensors")["user"].keys() >= {"top1"}


def test_inspect_shows_a_training_checkpoint(trained, capsys):
    capsys.readouterr()
    assert run("inspect", trained / "sparse" / "checkpoints" / "sparse.safetensors") == 0
    out = capsys.readouterr().out
    assert "training state of stage sparse: 1 of 1 epoch done, finished" in out
    identity = json.loads(out[out.index("{") :])
    assert identity["config.seed"] == 3
    assert identity["effective_batch"] == 4  # in two passes


def test_damaged_training_checkpoint_is_refused(trained, tmp_path, refused):
    content = (trained / "sparse" / "checkpoints" / "sparse.safetensors").read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (tmp_path / "state.safetensors").write_bytes(content[:length])
        refused("cut off", "inspect", tmp_path / "state.safetensors")


def test_images_that_make_no_even_passes_are_refused_before_anything_is_written(files, tmp_path, refused):
    for command in (["train", "sparse"], ["run"]):
        usual = ["--model", files / "dense.safetensors", "--data", files / "images"]
        usual += ["--out", tmp_path / "run"]
        for images, update, expected in (
            (4, 7, r"--effective-batch: got 7, expected 6 or 8 for 1 process and 4 images"),
            (3, 16, r"--effective-batch: got 16, expected 15 for 1 process"),  # 18 there are not
            (4, 26, r"--effective-batch: got 26, expected at most 16, as there are 16 images to train on"),
        ):
            given = ["--batch-size", images, "--effective-batch", update]
            refused(f"vtp: error: {expected}", *command, *usual, *given)
        too_many = "vtp: error: --batch-size: got 17, expected at most 16,"
        refused(too_many, *command, *usual, "--batch-size", 17)
    assert list(tmp_path.iterdir()) == []


def test_notes_on_the_data_are_told_by_the_first_process_alone(pets, tmp_path, capsys, monkeypatch):
    first, joined = True, commands.accelerator
    monkeypatch.setattr(commands._console, "quiet", False)
    monkeypatch.setattr(
        commands,
        "accelerator",
        lambda *precision: SimpleNamespace(
            is_main_process=first, num_processes=joined(*precision).num_processes
        ),
    )
    cut = vtp.compact(vtp.load(pets / "model.safetensors"), vtp.make_plan(pets_gated(pets), rate=0.2))
    vtp.save(cut, tmp_path / "cut.safetensors")
    usual = ["--data", pets / "images", *QUICK, "--set=dense.epochs=1", "--set=dense.warmup_epochs=0"]
    for command in (
        ["train", "dense", "--model", pets / "model.safetensors", *usual, "--batch-size", "2"],
        ["finetune", tmp_path / "cut.safetensors", *usual, "--batch-size", "2"],
    ):
        for first in (True, False):
            assert run(*command, "--out", tmp_path / f"{command[0]}-{first}") == 0
            assert ("mapped by name" in capsys.readouterr().err) == first


def pets_gated(pets):
    return vtp.insert_gates(vtp.load(pets / "model.safetensors"))


def test_run_refuses_a_model_that_is_cut_and_says_what_takes_it(files, tmp_path, refused):
    file = files / "compact.safetensors"
    gated = files / "gated.safetensors"
    message = (
        f"--model: {gated} is a gated model, expected a dense model; `vtp prune {gated}` cuts it, "
        f"`vtp train sparse --model {gated}` trains its gates further; .*--resume"
    )
    refused(message, "run", "--model", gated, "--data", files / "images", "--out", tmp_path / "run")
    message = f"--model: {file} is cut already, .*`vtp finetune {file}` .*`vtp prune {file} --calibrate DATA`"
    refused(message, "run", "--model", file, "--data", files / "images", "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_run_distils_from_the_teacher_that_is_named(files, tmp_path, monkeypatch, refused):
    taught = {}

    def train(model, data, config, *, stage, teacher, **rest):
        taught[stage] = teacher
        if stage == "finetune":
            raise TrainingInterrupted("stopped", signal.SIGTERM)
        return TrainResult(model, 0.0, [])

    monkeypatch.setattr(pipeline, "train", train)
    other = build(replace(TINY, num_classes=2), torch.float32, seed=5)
    vtp.save(other, tmp_path / "other.safetensors")
    dense = files / "dense.safetensors"
    command = ["run", "--model", dense, "--data", files / "images", "--no-refit", "--batch-size", 4]
    named = ["--teacher", tmp_path / "other.safetensors"]
    for out, given, teacher in (("named", named, other), ("itself", [], vtp.load(dense))):
        assert run(*command, *given, "--out", tmp_path / out) == 143
        assert taught.keys() == {"sparse", "finetune"}
        for model in taught.values():
            assert torch.equal(model.head.weight, teacher.head.weight)
    vtp.save(build(dtype=torch.float32), tmp_path / "ten.safetensors")
    command += ["--out", tmp_path / "refused", "--teacher"]
    idle = ["--set=sparse.distill_alpha=0", "--set=finetune.distill_alpha=0"]
    refused("vtp: error: --teacher: .*finetune.distill_alpha are 0", *command, dense, *idle)
    refused("vtp: error: --teacher: classes 10, expected", *command, tmp_path / "ten.safetensors")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed: got -1"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--workers", "-2"], "workers: got -2"),
        (["--rate", "1.2"], r"rate: got 1\.2"),
        (["--macs", "1"], "macs: 1 cannot be met"),
        (["--model", "resnet18"], "timm.models.resnet.ResNet"),
        (["--model", "none-such"], "got 'none-such', expected"),
        (["--data", "/none/such"], "none"),
        (["--scope", "optimal"], "scope: got 'optimal', which takes a calibration"),
        (["--score", "obs"], "score: got 'obs', which takes a calibration"),
        (["--no-refit", "--key-width", "8"], r"--key-width: got 8\.0, which takes a refit"),
        (["--one-shot", "--macs", "1"], "macs: 1 cannot be met"),
        (["--one-shot", "--score", "gate"], "the model has no gates"),
        (["--one-shot", "--images", "50000"], "images: got 50000, expected 1 to 16384"),
    ],
    ids=" ".join,
)
def test_run_refuses_what_cannot_be_before_it_makes_the_run_folder(tmp_path, refused, arguments, message):
    refused(message, "run", "--out", tmp_path / "run", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_train_and_finetune_refuse_the_wrong_kind_of_model(files, tmp_path, refused):
    data = ["--data", files / "images", "--out", tmp_path / "run"]
    refused("is a dense model, expected a compact model", "finetune", files / "dense.safetensors", *data)
    refused("is a gated model, expected a compact model", "finetune", files / "gated.safetensors", *data)
    refused("no file", "finetune", tmp_path / "none.safetensors", *data)
    assert list(tmp_path.iterdir()) == []


QUICK = ("--augment", "none", "--batch-size", "4", "--set", "finetune.epochs=1", "--set",
         "finetune.warmup_epochs=0")  # fmt: skip


def test_finetune_gives_a_compact_model_a_new_head_as_its_message_advises(files, tmp_path, refused):
    small = vtp.load(files / "compact.safetensors")
    small.reset_classifier(7)  # one of other classes
    vtp.save(small, tmp_path / "small.safetensors")
    command = ["finetune", tmp_path / "small.safetensors", "--data", files / "images", *QUICK, "--out"]
    refused("7 outputs, .* has 2 classes.*--new-head", *command, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for out in ("run", "again"):
        assert run(*command, tmp_path / out, "--new-head", "--seed", 4) == 0
    tuned, again = (vtp.load(tmp_path / out / "compact.safetensors") for out in ("run", "again"))
    assert tuned.num_classes == 2 and tuned.plan == small.plan
    assert torch.equal(tuned.head.weight, again.head.weight)


def test_a_teacher_may_be_any_model_that_timm_has_released(files, tmp_path, refused, monkeypatch):
    command = ["finetune", files / "compact.safetensors", "--data", files / "images", *QUICK, "--out"]
    command += [tmp_path / "run", "--teacher"]
    refused("teacher: got 'none-such', expected", *command, "none-such")
    create, asked = vtp.zoo.timm.create_model, []

    def without_network(name, pretrained=False):
        asked.append((name, pretrained))
        overlay = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        return create(name, num_classes=2, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(vtp.zoo.timm, "create_model", without_network)
    assert run(*command, "regnety_002") == 0
    assert asked == [("regnety_002", True)]


class Executed:
    """What no file may bring to run."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_teacher_may_have_weights_of_ones_own(files, tmp_path, refused):
    teacher = timm.create_model("regnety_002", num_classes=2)
    weights = teacher.state_dict()
    torch.save({"model": weights, "epoch": 3}, tmp_path / "deit.pth")
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save({"state_dict": weights, "args": Executed()}, tmp_path / "pickle.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "other.pth")
    for name in ("deit.pth", "plain.safetensors"):
        opened = open_teacher("timm/regnety_002", checkpoint=tmp_path / name)
        assert not opened.training
        assert all(torch.equal(value, weights[key]) for key, value in opened.state_dict().items())
    command = ["finetune", files / "compact.safetensors", "--data", files / "images", *QUICK]
    command += ["--out", tmp_path / "run", "--teacher-checkpoint"]
    refused("--teacher-checkpoint: without effect without --teacher", *command, tmp_path / "deit.pth")
    refused(
        "--teacher: .*deit.pth is weights alone, expected a model; give the name of the timm model that they "
        "are of as the teacher, and --teacher-checkpoint .*deit.pth$",
        *(*command[:-1], "--teacher", tmp_path / "deit.pth"),
    )
    for name, reason in (
        ("pickle", "{file} holds objects of Python"),
        ("other", "the weights in {file} are not those of regnety_002 .*Missing key"),
        ("none", "no file {file}"),
    ):
        message = f"--teacher-checkpoint: {reason.format(file=tmp_path / f'{name}.pth')}"
        refused(message, *command, tmp_path / f"{name}.pth", "--teacher", "regnety_002")
    refused(
        "--teacher-checkpoint: .* expected it with a timm name",
        *command,
        tmp_path / "deit.pth",
        "--teacher",
        files / "dense.safetensors",
    )
    assert not (tmp_path / "run").exists()


def test_what_a_stage_refuses_leaves_no_folder(files, tmp_path, capsys, refused):
    vtp.save(build(dtype=torch.float32), tmp_path / "ten.safetensors")
    usual = ["--data", files / "images", "--out", tmp_path / "runs" / "new", *QUICK]
    tune = ["finetune", files / "compact.safetensors", *usual]
    assert run(*tune, "--teacher", tmp_path / "ten.safetensors", "--set=finetune.distill_alpha=0.5") == 2
    assert "teacher: classes 10, expected the model's 2" in capsys.readouterr().err
    refused("class_weight: got 1 weight, expected 2", *tune, "--set=finetune.class_weight=[1]")
    dense = ["train", "dense", "--model", files / "dense.safetensors", *usual]
    refused("class_weight: got 1 weight, expected 2", *dense, "--set=dense.class_weight=[1]")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_ours_sees_the_pixels_of_the_data_whatever_the_student_expects(
    files, tmp_path, monkeypatch
):
    shown = []
    original = Teacher.images
    monkeypatch.setattr(
        Teacher, "images", lambda self, x: shown.append((x, original(self, x))) or shown[-1][1]
    )
    small = vtp.load(files / "compact.safetensors")
    small.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    vtp.save(small, tmp_path / "small.safetensors")
    command = ["finetune", tmp_path / "small.safetensors", "--data", files / "images", *QUICK, "--out"]
    assert run(*command, tmp_path / "run", "--teacher", files / "dense.safetensors") == 0
    data = open_data(files / "images")
    students, teachers = shown[-1]
    pixels = students * 0.5 + 0.5
    torch.testing.assert_close(teachers, (pixels - data.mean[0]) / data.std[0])


def test_training_cannot_write_over_a_file_or_into_a_read_only_place(files, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    usual = ["--data", files / "images", "--batch-size", 4]
    sparse = ["train", "sparse", "--model", files / "dense.safetensors", *usual]
    tune = ["finetune", files / "compact.safetensors", *usual]
    for command in (sparse, tune):
        refused(
            f"run folder: {tmp_path}/file is a file, expected a folder", *command, "--out", tmp_path / "file"
        )
        refused("run folder: cannot make /proc/run: ", *command, "--out", "/proc/run")
