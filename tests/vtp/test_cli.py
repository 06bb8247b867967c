"""vtp.cli: every command on good and bad input, in process; the exit status and what is said."""

import contextlib
import json
import re
import shutil
import signal
from importlib.metadata import version

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vtp
from tests.support.folders import knows, write_classes
from tests.support.models import TINY, build, gated
from vtp import cli
from vtp.cli import main
from vtp.comparison import own_model
from vtp.files import FileError
from vtp.model.images import class_names
from vtp.pipeline import fit_data
from vtp.training.data import open_data
from vtp.training.evaluation import NonFiniteLossError, evaluate
from vtp.training.loaders import calibration_images
from vtp.training.loop import TrainingInterrupted
from vtp.training.teacher import Teacher
from vtp.zoo import open_teacher

COMMANDS = ("run", "train", "prune", "finetune", "eval", "predict", "bench", "export", "inspect")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dense, a gated and a compact model, a plan, and an image folder with two classes."""
    folder = tmp_path_factory.mktemp("files")
    architecture = TINY.__class__(**{**TINY.__dict__, "num_classes": 2})
    dense = build(architecture, dtype=torch.float32)
    model = gated(dense)
    plan = vtp.make_plan(model, rate=0.4)
    vtp.save(dense, folder / "dense.safetensors")
    vtp.save(model, folder / "gated.safetensors")
    vtp.save(vtp.compact(model, plan), folder / "compact.safetensors", metadata={"top1": 87.5})
    plan.save(folder / "plan.json")
    generator = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 100, (8, 8)) + 150 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / "images" / split / name / f"{i}.png")
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def refused(capsys):
    """A function that runs a command that must be refused: status 2, one line that matches, no traceback;
    before it there may be notes on the data."""

    def check(message, *arguments):
        capsys.readouterr()
        assert run(*arguments) == 2
        out, error = capsys.readouterr()
        assert out == ""
        *notes, last = error.splitlines()
        assert last.startswith("vtp: error: ")
        assert all(line.startswith("vtp: note: ") for line in notes)
        assert re.search(message, error), error

    return check


@pytest.fixture
def misused(capsys):
    """A function that runs a command with arguments that do not parse: status 2 and the reason at the end."""

    def check(message, *arguments):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert re.search(message, error.splitlines()[-1]), error

    return check


# ----------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].strip()
    assert example.startswith(f"vtp {command} ")
    vtp.cli._parser().parse_args(example.split()[1:])


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} +\w", text, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["cut"], "invalid choice: 'cut'"),
        (["prune"], "required: file, --out"),
        (["prune", "a", "--out", "b", "--rate", "0.4", "--macs", "1e6"], "not allowed with argument --rate"),
        (["prune", "a", "--out", "b", "--rate", "much"], "--rate: invalid float value: 'much'"),
        (["prune", "a", "--out", "b", "--round-to", "1.5"], "--round-to: invalid int value"),
        (["prune", "a", "--out", "b", "--score", "magnitude"], "--score: invalid choice"),
        (["prune", "a", "--out", "b", "--scope", "head"], "--scope: invalid choice"),
        (["train", "finetune", "--out", "b"], "invalid choice: 'finetune'"),
        (["run"], "required: --out"),
        (["run", "--out", "b", "--recipe", "large"], "--recipe: invalid choice"),
        (["run", "--out", "b", "--precision", "int8"], "--precision: invalid choice"),
        (["inspect"], "required: file"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_parse_are_refused_by_name(misused, arguments, message):
    misused(message, *arguments)


# ---------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"rate": 0.4}),
        (["--rate", "0.25"], {"rate": 0.25}),
        (["--macs", "12e3"], {"macs": 12_000}),
        (["--params", "2000"], {"params": 2000}),
        (["--rate", "0.5", "--scope", "per_layer", "--round-to", "2", "--min-keep", "3"],
         {"rate": 0.5, "scope": "per_layer", "round_to": 2, "min_keep": 3}),
        (["--macs", "12e3", "--per-mac"], {"macs": 12_000, "per_mac": True}),
    ],
)  # fmt: skip
def test_prune_does_what_make_plan_and_compact_do(files, tmp_path, capsys, options, expected):
    out, plan_file = tmp_path / "small.safetensors", tmp_path / "plan.json"
    assert run("prune", files / "gated.safetensors", "--out", out, "--plan", plan_file, *options) == 0
    model = vtp.load(files / "gated.safetensors")
    plan = vtp.make_plan(model, **expected)
    small = vtp.load(out)
    assert small.plan == vtp.PruningPlan.load(plan_file) == plan
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(small(x), vtp.compact(model, plan)(x))
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert str(out) in printed.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.2"], r"rate: got 1\.2, expected a share in \[0, 1\)"),
        (["--rate", "1"], r"rate: got 1\.0"),
        (["--rate", "-0.1"], r"rate: got -0\.1"),
        (["--rate", "nan"], "rate: got nan"),
        (["--macs", "1"], "macs: 1 cannot be met: .* remain"),
        (["--macs", "-5"], r"macs: got -5\.0"),
        (["--params", "inf"], "params: got inf"),
        (["--round-to", "0"], "round_to: got 0"),
        (["--min-keep", "-1"], r"min_keep: got -1\.0"),
        (["--min-keep", "1.5"], r"min_keep: got 1\.5"),
        (["--min-keep", "nan"], "min_keep: got nan"),
        (["--rate", "0.99"], r"rate: 0\.99 cannot be met: .* lower min_keep"),
        (["--score", "taylor"], "'taylor' has no statistics at blocks.0.attn.qkv"),
    ],
    ids=" ".join,
)
def test_prune_refuses_what_cannot_be_and_writes_nothing(files, tmp_path, refused, options, message):
    out = tmp_path / "small.safetensors"
    refused(message, "prune", files / "gated.safetensors", "--out", out, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["dense", "compact"])
def test_prune_refuses_a_model_without_gates(files, tmp_path, refused, name):
    refused("has no gates", "prune", files / f"{name}.safetensors", "--out", tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_prune_refuses_folders_that_cannot_be_written(files, tmp_path, refused):
    source = files / "gated.safetensors"
    refused("cannot write into .*none: No such file", "prune", source, "--out", tmp_path / "none" / "a")
    refused("is a folder", "prune", source, "--out", tmp_path)
    refused("cannot write into /proc", "prune", source, "--out", "/proc/small.safetensors")


# ------------------------------------------------------------------------------------ prune on images


@pytest.fixture(scope="module")
def calibrated(files, tmp_path_factory):
    """A dense model cut by one command, with the statistics it saved; (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("calibrated")
    printed = folder / "printed.txt"
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        command = ["prune", files / "dense.safetensors", "--calibrate", files / "images", "--images", 12]
        out = ["--out", folder / "small.safetensors", "--plan", folder / "plan.json"]
        status = run(*command, "--macs", 11_000, "--statistics", folder / "statistics.safetensors", *out)
    assert status == 0
    return folder, printed.read_text()


def test_pruned_file_says_what_its_images_and_classes_are(calibrated):
    small = vtp.load(calibrated[0] / "small.safetensors")
    assert class_names(small) == ("dark", "light") and small.pretrained_cfg["input_size"] == (1, 8, 8)


def test_prune_cuts_a_dense_model_on_unlabelled_training_images(files, calibrated):
    folder, _ = calibrated
    small, plan = vtp.load(folder / "small.safetensors"), vtp.PruningPlan.load(folder / "plan.json")
    assert isinstance(small, vtp.CompactViT) and small.plan == plan
    assert (plan.scope, plan.score, dict(plan.budget)) == ("optimal", "obs", {"macs": 11_000})
    assert vtp.count(small).macs <= 11_000
    dense = vtp.load(files / "dense.safetensors")
    data = fit_data(open_data(files / "images"), dense)
    images = list(calibration_images(dense, data, 12))
    assert sum(len(batch) for batch, _ in images) == 12
    statistics = vtp.Statistics.load(folder / "statistics.safetensors")
    assert statistics.images == 12
    again = vtp.compact(
        dense, vtp.make_plan(dense, macs=11_000, statistics=statistics, scope="optimal"), images=images
    )
    for name, tensor in again.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


def test_prune_on_images_says_plan_memory_and_accuracy(files, calibrated):
    folder, printed = calibrated
    assert str(vtp.PruningPlan.load(folder / "plan.json")) in printed
    assert re.search(r"^12 training images of 5 tokens: \S+ GB, in memory$", printed, re.MULTILINE)
    before, after = map(float, re.search(r"top-1 (\S+) before, (\S+) after", printed).groups())
    data = fit_data(open_data(files / "images"), vtp.load(files / "dense.safetensors"))
    assert before == pytest.approx(evaluate(vtp.load(files / "dense.safetensors"), data)[0], abs=0.01)
    assert after == vtp.read_metadata(folder / "small.safetensors")["user"]["top1"]


def test_prune_takes_statistics_it_saved_and_refuses_those_of_another_model(
    files, calibrated, tmp_path, capsys, monkeypatch
):
    folder, _ = calibrated
    monkeypatch.setattr(cli, "calibrate", None)  # not to be called again
    known = ["--calibrate", files / "images", "--statistics", folder / "statistics.safetensors", "--no-eval"]
    out = tmp_path / "small.safetensors"
    options = ["--params", 3000, "--images", 9, "--round-to", 2, "--memory", 1e-9, "--out", out]
    assert run("prune", files / "dense.safetensors", *known, *options) == 0
    printed = capsys.readouterr().out
    assert "statistics of 12 images" in printed and "top-1" not in printed
    assert "the rest in a temporary file" in printed
    assert vtp.count(vtp.load(out)).params <= 3000
    assert run("prune", files / "gated.safetensors", *known, "--out", tmp_path / "other.safetensors") == 2
    assert "is of another model than" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_prune_refits_a_gated_model_cut_by_its_gates(files, tmp_path):
    out = tmp_path / "small.safetensors"
    ranked = ["--score", "gate", "--scope", "global", "--key-width", 0.5, "--rate", 0.3, "--no-eval"]
    known = ["--calibrate", files / "images", "--images", 10]
    assert run("prune", files / "gated.safetensors", *known, *ranked, "--out", out) == 0
    model, plan = vtp.load(files / "gated.safetensors"), vtp.load(out).plan
    assert plan.kept == vtp.make_plan(model, rate=0.3).kept
    assert plan.key_widths(0) == (2, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1.2"], r"rate: got 1\.2"),
        (["--macs", "1"], "macs: 1 cannot be met"),
        (["--min-keep", "1.5"], "min_keep: got 1.5"),
        (["--per-mac"], "per_mac: got True"),
        (["--key-width", "2"], r"key_width: got 2\.0, expected none as scope='optimal'"),
        (["--score", "gate"], "the model has no gates"),
        (["--calibrate", "/none/such"], "/none/such"),
        (["--calibrate", "fashion-mnist-10k"], "10 classes.*--no-eval looks at no labels"),
        (["--out", "/proc/small.safetensors"], "cannot write into /proc"),
        (["--plan", "/proc/plan.json"], "cannot write into /proc"),
        (["--statistics", "/none/such/file"], "cannot write into /none/such"),
    ],
    ids=" ".join,
)
def test_prune_on_images_refuses_what_cannot_be_before_it_calibrates(
    files, tmp_path, refused, monkeypatch, options, message
):
    monkeypatch.setattr(cli, "calibrate", None)
    usual = ["--calibrate", files / "images", "--out", tmp_path / "small.safetensors"]
    refused(message, "prune", files / "dense.safetensors", *usual, *options)
    assert list(tmp_path.iterdir()) == []


def test_prune_cuts_a_compact_model_again(files, tmp_path, capsys):
    once, out = vtp.load(files / "compact.safetensors"), tmp_path / "smaller.safetensors"
    most = int(0.8 * vtp.count(once).macs)
    known = ["--calibrate", files / "images", "--images", 10, "--macs", most, "--no-eval"]
    assert run("prune", files / "compact.safetensors", *known, "--out", out) == 0
    twice = vtp.load(out)
    assert vtp.count(twice).macs <= most
    for i in range(2):
        ours, before = twice.plan.block_widths(i), once.plan.block_widths(i)
        assert (ours.qkv <= before.qkv, ours.fc1 <= before.fc1, ours.fc2 <= before.fc2) == (True,) * 3
    assert f"is cut already, {vtp.count(once)}" in capsys.readouterr().out


def test_sparse_training_takes_a_compact_model(files, tmp_path):
    quick = [f"--set=sparse.{setting}" for setting in ("epochs=1", "warmup_epochs=0", "lr=1e-3")]
    known = ["--data", files / "images", "--augment", "none", "--batch-size", 4, "--workers", 0, *quick]
    assert run("train", "sparse", "--model", files / "compact.safetensors", "--out", tmp_path, *known) == 0
    once = vtp.load(files / "compact.safetensors")
    plan = vtp.make_plan(vtp.load(tmp_path / "sparse.safetensors"), rate=0.5)
    assert all(set(kept) <= set(once.plan.kept[name]) for name, kept in plan.kept.items())


@pytest.mark.parametrize("calibrated", [[], ["--calibrate", "images", "--images", 10, "--no-eval"]])
def test_what_is_to_be_kept_is_never_cut(files, tmp_path, monkeypatch, calibrated):
    monkeypatch.chdir(files)
    out = tmp_path / "small.safetensors"
    keep = ["--keep", "attn", "--keep", "blocks.0", "--rate", 0.2]
    assert run("prune", "gated.safetensors", *calibrated, "--out", out, *keep) == 0
    plan = vtp.load(out).plan
    assert plan.protect == ("attn", "blocks.0")
    assert plan.rate >= 0.2
    whole = [name for name in plan.widths if "attn" in name or "blocks.0." in name]
    assert all(len(plan.kept[name]) == plan.widths[name] for name in whole)


def test_what_cannot_be_kept_is_refused(files, tmp_path, refused):
    known = ["prune", files / "gated.safetensors", "--out", tmp_path / "small.safetensors", "--keep", "attn"]
    refused(
        r"rate: 0\.9 cannot be met: .* remain when everything but min_keep and protected",
        *known,
        "--rate",
        0.9,
    )
    refused(r"--keep\): got 'head'", *known, "head")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough  # a whole DeiT-T is cut; the way in is tested in test_zoo.py
def test_a_checkpoint_of_ones_own_is_evaluated_and_cut(files, tmp_path, refused, capsys):
    name, file, out = "deit_tiny_patch16_224", tmp_path / "best.pth.tar", tmp_path / "small.safetensors"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, in_chans=1, img_size=32)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, file)
    known = ["--data", files / "images"]
    assert run("eval", "--model", name, "--checkpoint", file, *known) == 0
    assert str(vtp.count(model)) in capsys.readouterr().out
    cut = ["--calibrate", files / "images", "--images", 4, "--no-eval", "--macs", 0.8 * vtp.count(model).macs]
    assert run("prune", name, "--checkpoint", file, *cut, "--out", out) == 0
    small = vtp.load(out)
    assert (small.num_classes, vtp.count(small).macs <= 0.8 * vtp.count(model).macs) == (2, True)
    capsys.readouterr()
    refused(f"give the name of its timm model, and --checkpoint {file}", "eval", "--model", file, *known)
    refused("no weights 'nonsense'", "eval", "--model", f"{name}.nonsense", *known)
    refused("expected the name of its timm model alone", "eval", "--checkpoint", file, *known)


def test_prune_refuses_options_without_effect(files, tmp_path, refused):
    out = ["--out", tmp_path / "small.safetensors"]
    for option in (["--images", 5], ["--no-eval"], ["--key-width", 2], ["--statistics", "x"]):
        refused(
            f"{option[0]}: without effect without --calibrate",
            "prune",
            files / "gated.safetensors",
            *out,
            *option,
        )
    refused(
        "scope: got 'optimal'|statistics", "prune", files / "gated.safetensors", *out, "--scope", "optimal"
    )
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- what a file says


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder of images, a file of a model that knows them, and its classes in an order of their own."""
    folder = tmp_path_factory.mktemp("pets")
    names = {"dog": 1, "cat": 2, "ape": 3}
    write_classes(folder / "images", names)
    (folder / "map.txt").write_text("\n".join(names))
    data = open_data(folder / "images", class_map=folder / "map.txt")
    model = knows(data)
    fit_data(data, model)
    vtp.save(model, folder / "model.safetensors")
    return folder


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


def test_trained_model_says_what_its_classes_are(pets, tmp_path, capsys):
    options = ["--set=dense.epochs=1", "--set=dense.warmup_epochs=0", "--batch-size", 2, "--new-head"]
    usual = ["--model", pets / "model.safetensors", "--data", pets / "images", "--out", tmp_path]
    assert run("train", "dense", *usual, *options) == 0
    assert class_names(vtp.load(tmp_path / "dense.safetensors")) == ("ape", "cat", "dog")
    teacher = ["--teacher", pets / "model.safetensors", "--set=dense.distill_alpha=0.5"]
    capsys.readouterr()
    assert run("train", "dense", *usual, *options, *teacher) == 2
    assert "the teacher has dog, cat, ape; the model has ape, cat, dog" in capsys.readouterr().err


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
    assert error.startswith("vtp: error: ") and all(str(path) in error for path in bad)
    assert str(cat) not in error and error.count("\n") == 1


def test_inspect_shows_images_and_classes(files, pets, capsys):
    out = inspected(capsys, pets / "model.safetensors")
    assert (
        "images: 1x8x8 (channels, height, width), mean 0.449, std 0.226, center crop of 100.0%, bicubic"
        in out
    )
    assert "classes: 3: dog, cat, ape\n" in out
    out = inspected(capsys, files / "dense.safetensors")
    assert "images: 1x8x8 (channels, height, width); how they are normalised is not known\n" in out
    assert "classes: not known\n" in out


# -------------------------------------------------------------------------------------------------- inspect


def inspected(capsys, file):
    assert run("inspect", file) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def test_inspect_shows_a_dense_model(files, capsys):
    out = inspected(capsys, files / "dense.safetensors")
    model = vtp.load(files / "dense.safetensors")
    assert "dense model, format 1, vtp " in out
    assert str(vtp.count(model)) in out
    assert '"embed_dim": 12' in out


def test_inspect_shows_the_gates_of_a_gated_model(files, capsys):
    out = inspected(capsys, files / "gated.safetensors")
    assert "gated model" in out
    for name, layer in vtp.sites(vtp.load(files / "gated.safetensors")).items():
        assert re.search(rf"{re.escape(name)} .* {layer.gate.abs().mean():.4f} ", out)


def test_inspect_shows_the_plan_and_the_notes_of_a_compact_model(files, capsys):
    out = inspected(capsys, files / "compact.safetensors")
    plan = vtp.PruningPlan.load(files / "plan.json")
    assert "compact model" in out
    assert "top1: 87.5" in out
    assert str(plan) in out
    assert plan.parent[:16] in out
    assert f"{(files / 'compact.safetensors').stat().st_size:,} bytes" in out


def test_inspect_shows_a_plan(files, capsys):
    assert inspected(capsys, files / "plan.json").strip() == str(vtp.PruningPlan.load(files / "plan.json"))


def test_inspect_takes_names_and_reads_no_weights(files, tmp_path, capsys, refused):
    small = vtp.load(files / "compact.safetensors")
    vtp.save_pretrained(small, tmp_path / "small")
    for file in (tmp_path / "small").glob("*.safetensors"):
        file.unlink()
    out = inspected(capsys, f"local-dir:{tmp_path / 'small'}")
    assert str(vtp.count(small)) in out and small.plan.parent[:16] in out
    assert str(small.plan).splitlines()[1:] == out.splitlines()[-len(str(small.plan).splitlines()) + 1 :]
    dense = inspected(capsys, "vit_tiny_patch16_224")
    assert "5.72M params" in dense and '"embed_dim": 192' in dense and "classes: 1000" in dense
    assert "0.68M params" in inspected(capsys, "fashion-deit")
    refused("model: got 'nonsense', expected 'fashion-deit'", "inspect", "nonsense")
    refused("timm cannot open local-dir:none", "inspect", "local-dir:none")
    refused("timm.models.resnet.ResNet", "inspect", "resnet18")
    refused("no file none.safetensors", "inspect", "none.safetensors")


def test_inspect_shows_key_widths_where_a_plan_narrows_them(files, tmp_path, capsys):
    model = vtp.load(files / "gated.safetensors")
    vtp.make_plan(model, rate=0.3, key_width=2).save(tmp_path / "plan.json")
    out = inspected(capsys, tmp_path / "plan.json")
    assert "key and value width of each head" in out
    assert re.search(r"^ +0 .* 2/\d 2/\d 2/\d$", out, re.MULTILINE)


def write_foreign(path, kind):
    if kind == "plan.json":
        path.write_text("{}")
    elif kind == "cut.json":
        path.write_text('{"plan_version": 1, "kept"')
    elif kind == "others.safetensors":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "state.safetensors":
        save_file({"a": torch.ones(2)}, path, metadata={"vtp-training-state": '{"version": 1}'})
    elif kind == "broken-state.safetensors":
        save_file({"a": torch.ones(2)}, path, metadata={"vtp-training-state": "{"})
    elif kind == "weights.pth":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("plan.json", "not a pruning plan"),
        ("cut.json", "not JSON, or it is cut off"),
        ("others.safetensors", "not one that vtp wrote"),
        ("state.safetensors", r"training state in .* is damaged"),
        ("broken-state.safetensors", r"training state in .* is damaged"),
        ("weights.pth", "no safetensors file"),
        ("empty.safetensors", "no safetensors file"),
    ],
)
def test_inspect_refuses_foreign_files_with_the_reason(tmp_path, refused, kind, message):
    write_foreign(tmp_path / kind, kind)
    refused(message, "inspect", tmp_path / kind)


def test_inspect_refuses_missing_files_folders_and_damaged_files(files, tmp_path, refused):
    refused(r"no file .*none\.safetensors", "inspect", tmp_path / "none.safetensors")
    refused(r"cannot read .*none\.json: No such file", "inspect", tmp_path / "none.json")
    refused("no file", "inspect", tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    shutil.copy(files / "compact.safetensors", damaged)
    with open(damaged, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    refused("SHA-256 does not match", "inspect", damaged)


# ---------------------------------------------------------------------------- eval, train, finetune on images


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
    refused(
        "k: got 20, expected at most 16, the training", "eval", *usual, files / "dense.safetensors", "--knn"
    )
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
    refused("no safetensors file", "eval", "--model", __file__)


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
    out = inspected(capsys, trained / "sparse" / "checkpoints" / "sparse.safetensors")
    assert "training state of stage sparse: 1 of 1 epochs done, finished" in out
    identity = json.loads(out[out.index("{") :])
    assert identity["config.seed"] == 3
    assert identity["effective_batch"] == 4  # in two passes


def test_damaged_training_checkpoint_is_refused(trained, tmp_path, refused):
    content = (trained / "sparse" / "checkpoints" / "sparse.safetensors").read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (tmp_path / "state.safetensors").write_bytes(content[:length])
        refused("cut off", "inspect", tmp_path / "state.safetensors")


def test_images_that_make_no_even_passes_are_refused_before_anything_is_written(files, tmp_path, refused):
    given = ["--data", files / "images", "--batch-size", "4", "--effective-batch", "7"]
    for command in (["train", "sparse"], ["run"]):
        expected = r"effective_batch: got 7, expected 6 or 8 for 1 process and 4 images"
        refused(expected, *command, "--model", files / "dense.safetensors", *given, "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sparse.epochs", "--set: got 'sparse.epochs', expected STAGE.FIELD=VALUE"),
        ("epochs=3", "expected STAGE.FIELD=VALUE with a stage of dense, sparse, finetune"),
        ("middle.epochs=3", "--set: got 'middle.epochs=3'"),
        ("sparse.epoch=3", r"--set: got 'sparse\.epoch=3'.* epochs, batch_size"),
        ("=3", "--set: got '=3'"),
        ("", "--set: got ''"),
        ("sparse.epochs=", "epochs: got '', expected an integer"),
        ("sparse.epochs=0", "epochs: got 0, expected an integer of at least 1"),
        ("sparse.epochs=2.5", "epochs: got 2.5"),
        ("sparse.epochs=many", "epochs: got 'many'"),
        ("sparse.epochs=true", "epochs: got True"),
        ("sparse.lr=NaN", "lr: got nan"),
        ("sparse.l1=-1", "l1: got -1"),
        ("sparse.precision=int8", "precision: got 'int8'"),
        ("sparse.opt=none-such", "opt: got 'none-such'"),
        ("sparse.clip_grad=[1]", r"clip_grad: got \[1\]"),
    ],
)
@pytest.mark.parametrize("command", ["train", "run"])
def test_bad_setting_is_refused_before_anything_is_opened(
    files, tmp_path, refused, command, setting, message
):
    stage = ["sparse"] if command == "train" else []
    refused(message, command, *stage, "--out", tmp_path / "run", "--set", setting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sparse.epochs=8"], {"epochs": 8}),
        (["sparse.l1=3e-4", "sparse.l1_mode=proximal"], {"l1": 3e-4, "l1_mode": "proximal"}),
        (["sparse.clip_grad=null", "sparse.ema_decay=0.99"], {"clip_grad": None, "ema_decay": 0.99}),
        (["sparse.precision=bf16"], {"precision": "bf16"}),
        (["sparse.epochs=8", "sparse.epochs=9"], {"epochs": 9}),
        (["sparse.seed=5"], {"seed": 5}),
    ],
    ids=str,
)
def test_settings_reach_their_stage_only_and_win_over_common_options(settings, expected):
    arguments = ["run", "--out", "x", "--seed", "7"]
    for setting in settings:
        arguments += ["--set", setting]
    recipe = vtp.cli._recipe(vtp.cli._parser().parse_args(arguments))
    default = vtp.recipes.RECIPES["small"]()
    for name, value in expected.items():
        assert getattr(recipe.sparse, name) == value
    assert recipe.sparse.seed == expected.get("seed", 7)
    for stage in ("dense", "finetune"):
        for name in expected.keys() - {"seed"}:
            assert getattr(getattr(recipe, stage), name) == getattr(getattr(default, stage), name)
        assert getattr(recipe, stage).seed == 7


def test_one_shot_run_takes_the_short_recipe_of_its_kind_of_data(tmp_path):
    def recipe(*more):
        return cli._recipe(cli._parser().parse_args(["run", "--out", "x", *more]))

    assert recipe("--one-shot") == vtp.recipes.RECIPES["short"]()
    assert recipe("--one-shot", "--data", str(tmp_path)) == vtp.recipes.RECIPES["short-deit"]()
    assert recipe("--one-shot", "--recipe", "deit") == vtp.recipes.RECIPES["deit"]()
    assert recipe() == vtp.recipes.RECIPES["small"]()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed: got -1"),
        (["--batch-size", "0"], "batch_size: got 0"),
        (["--workers", "-2"], "workers: got -2"),
        (["--rate", "1.2"], r"rate: got 1\.2"),
        (["--macs", "1"], "macs: 1 cannot be met"),
        (["--model", "resnet18"], "timm.models.resnet.ResNet"),
        (["--model", "none-such"], "got 'none-such', expected"),
        (["--data", "/none/such"], "none"),
        (["--scope", "optimal"], "scope: got 'optimal', which takes a calibration"),
        (["--score", "obs"], "score: got 'obs', which takes a calibration"),
        (["--no-refit", "--key-width", "8"], r"key_width: got 8\.0, which takes a refit"),
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
    refused("no compact model", "finetune", files / "dense.safetensors", *data)
    refused("no compact model", "finetune", files / "gated.safetensors", *data)
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
        opened = open_teacher("regnety_002", checkpoint=tmp_path / name)
        assert not opened.training
        assert all(torch.equal(value, weights[key]) for key, value in opened.state_dict().items())
    command = ["finetune", files / "compact.safetensors", "--data", files / "images", *QUICK]
    command += ["--out", tmp_path / "run", "--teacher-checkpoint"]
    refused("--teacher-checkpoint: without effect without --teacher", *command, tmp_path / "deit.pth")
    for name, reason in (("pickle", "Error"), ("other", "Missing key"), ("none", "no file")):
        message = (
            f"teacher: timm cannot open regnety_002 with the weights in {tmp_path}/{name}.pth .*{reason}"
        )
        refused(message, *command, tmp_path / f"{name}.pth", "--teacher", "regnety_002")
    refused("expected a timm name", *command, tmp_path / "deit.pth", "--teacher", files / "dense.safetensors")
    assert not (tmp_path / "run").exists()


def test_what_a_stage_refuses_leaves_no_folder(files, tmp_path, capsys, refused):
    vtp.save(build(dtype=torch.float32), tmp_path / "ten.safetensors")
    usual = ["--data", files / "images", "--out", tmp_path / "runs" / "new", *QUICK]
    tune = ["finetune", files / "compact.safetensors", *usual]
    assert run(*tune, "--teacher", tmp_path / "ten.safetensors", "--set=finetune.distill_alpha=0.5") == 2
    assert "teacher: classes 10, expected the model's 2" in capsys.readouterr().err
    refused("class_weight: got 1 weights, expected 2", *tune, "--set=finetune.class_weight=[1]")
    dense = ["train", "dense", "--model", files / "dense.safetensors", *usual]
    refused("class_weight: got 1 weights, expected 2", *dense, "--set=dense.class_weight=[1]")
    assert not (tmp_path / "runs").exists()


def test_prune_says_that_a_budget_above_the_model_cuts_nothing(files, tmp_path, capsys):
    out = ["--out", tmp_path / "small.safetensors"]
    images = ["--calibrate", files / "images", "--images", 12, "--no-eval"]
    for command in (("gated.safetensors",), ("dense.safetensors", *images), ("compact.safetensors", *images)):
        usual = ["prune", files / command[0], *command[1:], *out]
        assert run(*usual, "--macs", "5e9") == 0
        error = capsys.readouterr().err
        assert re.search(
            r"note: macs: got 5e\+09, which the model, of \S+ MACs and .*: nothing is cut", error
        )
        assert error.count("nothing is cut") == 1
        assert run(*usual, "--rate", "0.45") == 0
        assert "nothing is cut" not in capsys.readouterr().err


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
    sparse = ["train", "sparse", "--model", files / "dense.safetensors", "--data", files / "images"]
    tune = ["finetune", files / "compact.safetensors", "--data", files / "images"]
    for command in (sparse, tune):
        refused(
            f"run folder: {tmp_path}/file is a file, expected a folder", *command, "--out", tmp_path / "file"
        )
        refused("run folder: cannot make /proc/run: ", *command, "--out", "/proc/run")


# ------------------------------------------------------------------------------------------------ bench


def bench(*arguments):
    return run("bench", *arguments, "--rounds", 3, "--seconds", 1, "--threads", 1)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("ours", "ours (repeat)", "PyTorch eager"), id="ours-and-eager"),
        pytest.param(None, id="all", marks=pytest.mark.thorough),  # exports to ONNX
    ],
)
def test_bench_times_a_compact_model_and_says_whether_pruning_paid(
    files, names, tmp_path, monkeypatch, capsys
):
    chosen = [runtime for runtime in own_model.RUNTIMES if names is None or runtime.name in names]
    monkeypatch.setattr(own_model, "RUNTIMES", chosen)
    assert bench(files / "compact.safetensors", "--json", tmp_path / "times.json") == 0
    printed = capsys.readouterr().out
    assert re.search(r"PyTorch eager, float32 .*\n dense: ours, float32 ", printed, re.DOTALL)
    assert re.search(
        r"^ours, float32: pruning .* fewer MACs, .* the speed of the dense model", printed, re.MULTILINE
    )
    written = json.loads((tmp_path / "times.json").read_text())
    assert {"environment", "hardware", "file", "models"} <= written.keys()
    assert written["file"] == "compact.safetensors"
    for label in (
        "ours, float32",
        "ours (repeat), float32",
        "PyTorch eager, float32",
        "dense: ours, float32",
    ):
        runtime = written["models"]["runtimes"][label]
        assert runtime["status"] == "measured" and len(runtime["seconds"]) >= 3
        assert runtime["error"] <= runtime["error_bound"]


def test_bench_refuses_bad_input_before_it_measures(files, tmp_path, refused, monkeypatch, capsys):
    compact, profile = files / "compact.safetensors", ("bench", "deit_tiny_patch16_224", "--profile-widths")
    refused("model: .*gated.safetensors holds no compact model", "bench", files / "gated.safetensors")
    refused("no file", "bench", tmp_path / "missing.safetensors")
    refused("--json: .*cannot write", "bench", compact, "--json", tmp_path / "missing" / "times.json")
    refused("--json: .*is a folder", "bench", compact, "--json", tmp_path)
    refused("--json, --compile: without effect", *profile, "--compile")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "file"))
    refused("cache: cannot make", *profile)
    with pytest.raises(SystemExit):
        run("bench", compact, "--threads", 100_000)
    assert "argument --threads: got 100000, expected at most" in capsys.readouterr().err


@pytest.mark.thorough  # each step of it has a test of its own
def test_profiled_widths_give_a_plan_for_a_latency(files, tmp_path, monkeypatch, refused, capsys):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "small.safetensors"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        refused("latency_ms: there is no latency table", "prune", files / "gated.safetensors",
                "--latency-ms", 1, "--out", out)  # fmt: skip
        assert bench(files / "gated.safetensors", "--profile-widths") == 0
        printed = capsys.readouterr().out
        dense = float(re.search(r"the dense model takes (\S+) ms", printed)[1])
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
        assert run("prune", files / "gated.safetensors", "--latency-ms", 2 * dense + 1, "--out", out) == 0
        assert vtp.load(out).plan.rate == 0, "the dense model meets it"
    finally:
        torch.set_num_threads(threads)


def test_bench_takes_a_model_with_narrow_queries_and_keys(files, tmp_path, monkeypatch, capsys):
    chosen = [runtime for runtime in own_model.RUNTIMES if runtime.name in ("ours", "PyTorch eager")]
    monkeypatch.setattr(own_model, "RUNTIMES", chosen)
    monkeypatch.setattr(own_model, "PAID", 1e9)
    model = vtp.load(files / "gated.safetensors")
    small = vtp.compact(model, vtp.make_plan(model, rate=0.2, key_width=2), images=torch.randn(8, 1, 8, 8))
    vtp.save(small, tmp_path / "narrow.safetensors")
    assert bench(tmp_path / "narrow.safetensors") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ours, float32: .* the speed of the dense model", printed, re.MULTILINE)
    assert "keys 2" in " ".join(printed.split())


def test_export_writes_a_checked_file_and_shows_it_beside_the_dense_one(files, tmp_path, capsys):
    out = tmp_path / "small.pt2"
    arguments = ("--to", "pt2", "--out", out, "--seconds", 0.01, "--batch", 3, "--data", files / "images")
    assert run("export", files / "compact.safetensors", *arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(
        rf"wrote {out}: [\d,]+ bytes; relative error \d.\de-\d+ against float64, .* of images", printed
    )
    assert f"torch.export {version('torch')}, float32" in printed and "ms, batch 3" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if "MB" in line}
    assert list(rows) == ["dense", "compact"] and rows["dense"][-1] == "1.00x"
    assert rows["compact"][2:4] == [f"{out.stat().st_size / 1e6:.2f}", "MB"]
    small = vtp.load(files / "compact.safetensors")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(out).module()(x), small(x))


def test_export_of_a_dense_model_lies_beside_its_file_and_checks_on_the_embedded_data(
    files, tmp_path, capsys
):
    shutil.copy(files / "dense.safetensors", tmp_path / "dense.v2.safetensors")
    assert run("export", tmp_path / "dense.v2.safetensors", "--to", "pt2", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'dense.v2.pt2'}: " in printed and "images of fashion-mnist" in printed
    assert "dense  " not in printed  # nothing to compare with
    assert torch.export.load(tmp_path / "dense.v2.pt2").module()(
        torch.zeros(1, 1, 8, 8).bfloat16()
    ).shape == (1, 2)


def test_export_refuses_bad_input_and_leaves_no_file(files, tmp_path, refused, monkeypatch):
    small, out = files / "compact.safetensors", ("--out", tmp_path / "out")
    refused(
        "--opset: ONNX alone has one, got it with --to pt2",
        "export",
        small,
        "--to",
        "pt2",
        "--opset",
        20,
        *out,
    )
    refused(
        "file: .*gated.safetensors has gates; cut it first",
        "export",
        files / "gated.safetensors",
        "--to",
        "pt2",
        *out,
    )
    refused("path: cannot write into", "export", small, "--to", "pt2", "--out", tmp_path / "missing" / "out")
    refused("no such folder|expected", "export", small, "--to", "pt2", "--data", tmp_path / "missing", *out)
    monkeypatch.setattr("vtp.runtime.export.checked.find_spec", lambda name: None)
    refused(
        r"--to: export for OpenVINO needs openvino: pip install 'vtp\[openvino\]'",
        "export",
        small,
        "--to",
        "openvino",
        *out,
    )
    monkeypatch.undo()
    monkeypatch.setattr("vtp.runtime.export.pt2.exported", lambda *_: 1 / 0)
    refused("torch.export cannot convert it", "export", small, "--to", "pt2", *out)
    assert not list(tmp_path.iterdir())


def test_bench_names_the_branches_where_time_is_lost(files, monkeypatch, capsys):
    monkeypatch.setattr(
        own_model, "RUNTIMES", [p for p in own_model.RUNTIMES if p.name in ("ours", "PyTorch eager")]
    )
    monkeypatch.setattr(own_model, "PAID", 1e9)  # a share that no cut reaches
    assert bench(files / "compact.safetensors") == 0
    printed = capsys.readouterr().out
    assert "Where our engine loses most of what MACs promise" in printed
    assert re.search(r"blocks\.\d+\.(attn|mlp) .* (into fc1|into qkv)", printed)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (TrainingInterrupted("stopped after step 3", signal.SIGTERM), 143, "vtp: stopped after step 3"),
        (TrainingInterrupted("stopped after step 3", signal.SIGINT), 130, "vtp: stopped after step 3"),
        (KeyboardInterrupt(), 130, "vtp: interrupted; a run continues with --resume"),
        (NonFiniteLossError("the loss is nan"), 1, "vtp: error: the loss is nan"),
        (FileError("no such file"), 2, "vtp: error: no such file"),
    ],
    ids=["sigterm", "sigint", "ctrl-c", "not-finite", "bad-input"],
)
def test_exit_status_and_last_line_say_why_a_run_ended(monkeypatch, tmp_path, capsys, error, status, says):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(cli, "run", end)
    assert cli.main(["run", "--out", str(tmp_path / "run")]) == status
    assert capsys.readouterr().err.strip() == says
