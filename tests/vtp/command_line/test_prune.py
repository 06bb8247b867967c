"""`vtp prune`, by gates and on images."""

import contextlib
import io
import re

import pytest
import timm
import torch

import vtp
from tests.support.command_line import run
from vtp import commands
from vtp.model.images import class_names
from vtp.pipeline import fit_data
from vtp.training.data import open_data
from vtp.training.evaluation import evaluate
from vtp.training.loaders import calibration_images


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
        (["--round-to", "0"], "--round-to: got 0"),
        (["--min-keep", "-1"], r"--min-keep: got -1\.0"),
        (["--min-keep", "1.5"], r"--min-keep: got 1\.5"),
        (["--min-keep", "nan"], "--min-keep: got nan"),
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
    file = files / f"{name}.safetensors"
    refused(
        rf"MODEL: {file} is a {name} model, expected a gated model; .*`vtp prune {file} --calibrate DATA` ",
        *("prune", file, "--out", tmp_path / "small.safetensors"),
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fashion-deit", "deit_tiny_patch16_224", "hf:facebook/dino-vits16"])
def test_prune_of_a_name_without_images_says_what_to_add(tmp_path, refused, name):
    refused(f"MODEL: {name} is no file, .*`vtp prune {name} --calibrate DATA` cuts it on unlabelled images",
            "prune", name, "--macs", 5e6, "--out", tmp_path / "small.safetensors")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_prune_refuses_folders_that_cannot_be_written(files, tmp_path, refused):
    source = files / "gated.safetensors"
    refused(
        "--out: cannot write into .*none: No such file", "prune", source, "--out", tmp_path / "none" / "a"
    )
    refused("--out: .* is a folder", "prune", source, "--out", tmp_path)
    plan = ["--plan", tmp_path / "none" / "plan.json"]
    refused("--plan: cannot write into .*none", "prune", source, "--out", tmp_path / "small", *plan)
    assert list(tmp_path.iterdir()) == []
    refused("cannot write into /proc", "prune", source, "--out", "/proc/small.safetensors")


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
    monkeypatch.setattr(commands, "calibrate", None)  # not to be called again
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
        (["--min-keep", "1.5"], "--min-keep: got 1.5"),
        (["--per-mac"], "--per-mac: got True"),
        (["--key-width", "2"], r"--key-width: got 2\.0, expected none as scope='optimal'"),
        (["--score", "gate"], "the model has no gates"),
        (["--calibrate", "/none/such"], "--calibrate: '/none/such' is neither a folder"),
        (["--calibrate", "fashion-mnist-10k"], "10 classes.*--no-eval looks at no labels"),
        (["--out", "/proc/small.safetensors"], "--out: cannot write into /proc"),
        (["--plan", "/proc/plan.json"], "--plan: cannot write into /proc"),
        (["--statistics", "/proc/none/file"], "--statistics: cannot write into /proc/none"),
        (["--plan", "9" * 300], "--plan: cannot write into .*: File name too long"),
    ],
    ids=" ".join,
)
def test_prune_on_images_refuses_what_cannot_be_before_it_calibrates(
    files, tmp_path, refused, monkeypatch, options, message
):
    monkeypatch.setattr(commands, "calibrate", None)
    usual = ["--calibrate", files / "images", "--out", tmp_path / "small.safetensors"]
    refused(message, "prune", files / "dense.safetensors", *usual, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "{out}"], "--plan: .* is --out too, expected a file of its own"),
        (["--plan", "{folder}/../{name}/small.safetensors"], "--plan: .* is --out too"),
        (["--statistics", "{out}"], "--statistics: .* is --out too"),
        (["--out", "{model}"], "--out: .* is MODEL too"),
    ],
    ids=str,
)
def test_a_file_is_not_written_twice_nor_over_the_model(
    files, tmp_path, refused, monkeypatch, options, message
):
    monkeypatch.setattr(commands, "calibrate", None)
    model, out = files / "dense.safetensors", tmp_path / "small.safetensors"
    names = dict(out=out, folder=tmp_path, name=tmp_path.name, model=model)
    written = [option.format(**names) for option in options]
    before = model.read_bytes()
    refused(message, "prune", model, "--calibrate", files / "images", "--out", out, *written)
    assert list(tmp_path.iterdir()) == []
    assert model.read_bytes() == before


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
        r"--rate: 0\.9 cannot be met: \d+ dimensions remain when all is removed but min_keep and protected "
        r"parts, more than the \d+ that may",
        *known,
        "--rate",
        0.9,
    )
    refused(r"error: --keep: got 'head'", *known, "head")
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
    refused(
        f"give the name of the timm model that they are of as the model, and --checkpoint {file}",
        "eval",
        "--model",
        file,
        *known,
    )
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


@pytest.mark.parametrize("calibrated", [[], ["--calibrate", "images", "--images", 10, "--no-eval"]])
def test_a_note_on_the_budget_stands_behind_the_plan_that_it_is_about(
    files, tmp_path, monkeypatch, calibrated
):
    monkeypatch.chdir(files)
    said, known = io.StringIO(), ["--macs", "5e9", "--out", tmp_path / "small.safetensors"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert run("prune", "gated.safetensors", *calibrated, *known) == 0
    *_, wrote, note = said.getvalue().splitlines()
    assert wrote.startswith("wrote ") and note.startswith("vtp: note: --macs: got 5e+09")


def test_prune_says_that_a_budget_above_the_model_cuts_nothing(files, tmp_path, capsys):
    out = ["--out", tmp_path / "small.safetensors"]
    images = ["--calibrate", files / "images", "--images", 12, "--no-eval"]
    for command in (("gated.safetensors",), ("dense.safetensors", *images), ("compact.safetensors", *images)):
        usual = ["prune", files / command[0], *command[1:], *out]
        assert run(*usual, "--macs", "5e9") == 0
        error = capsys.readouterr().err
        assert re.search(
            r"note: --macs: got 5e\+09, which the model, of \S+ MACs and .*: nothing is cut", error
        )
        assert error.count("nothing is cut") == 1
        assert run(*usual, "--rate", "0.45") == 0
        assert "nothing is cut" not in capsys.readouterr().err
