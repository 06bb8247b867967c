"""vtp.kinds: what a file is, and what every reader says of a file that is for another one."""

import os
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vtp
from tests.support.command_line import run
from tests.support.models import TINY, build, gated
from vtp import kinds
from vtp.kinds import kind_of, other_kind
from vtp.weights import read_weights
from vtp.zoo import open_model, open_teacher

KINDS = {
    "dense.safetensors": kinds.DENSE,
    "gated.safetensors": kinds.GATED,
    "compact.safetensors": kinds.COMPACT,
    "statistics.safetensors": kinds.STATISTICS,
    "training.safetensors": kinds.TRAINING,
    "plan.json": kinds.PLAN,
    "table.json": kinds.LATENCY_TABLE,
    "weights.safetensors": kinds.WEIGHTS,
    "weights.pth": kinds.WEIGHTS,
    "zipped": kinds.WEIGHTS,
    "small.onnx": kinds.EXPORTED,
    "cat.png": kinds.IMAGE,
    "run": kinds.RUN,
    "folder": kinds.FOLDER,
    "nothing": kinds.EMPTY,
}
MODELS = tuple(kinds.MODELS.values())
READERS = {
    "load": (vtp.load, MODELS, "path"),
    "statistics": (vtp.Statistics.load, (kinds.STATISTICS,), "path"),
    "plan": (vtp.PruningPlan.load, (kinds.PLAN,), "path"),
    "latency-table": (vtp.LatencyTable.load, (kinds.LATENCY_TABLE,), "path"),
    "weights": (read_weights, (kinds.WEIGHTS,), "checkpoint"),
    "model": (lambda path: open_model(str(path)), MODELS, "model"),
    "teacher": (lambda path: open_teacher(str(path)), MODELS, "teacher"),
}


@pytest.fixture(scope="module")
def one_of_each(tmp_path_factory):
    """A folder with a file, or folder, of each of KINDS."""
    folder = tmp_path_factory.mktemp("kinds")
    dense = build(TINY, dtype=torch.float32)
    model = gated(dense)
    plan = vtp.make_plan(model, rate=0.4)
    vtp.save(dense, folder / "dense.safetensors")
    vtp.save(model, folder / "gated.safetensors")
    vtp.save(vtp.compact(model, plan), folder / "compact.safetensors")
    plan.save(folder / "plan.json")
    vtp.calibrate(dense, torch.randn(4, 1, 8, 8)).save(folder / "statistics.safetensors")
    vtp.profile_widths(vtp.describe(dense), seconds=0.01).save(folder / "table.json")
    save_file(dense.state_dict(), folder / "weights.safetensors")
    torch.save(dense.state_dict(), folder / "weights.pth", _use_new_zipfile_serialization=False)
    torch.save(dense.state_dict(), folder / "zipped")
    (folder / "small.onnx").write_bytes(b"\x08\x0a")
    Image.new("L", (8, 8)).save(folder / "cat.png")
    (folder / "folder").mkdir()
    (folder / "nothing").touch()
    one_epoch = ["--batch-size", 8, "--set", "dense.epochs=1", "--set", "dense.warmup_epochs=0"]
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), i).save(folder / "images" / split / name / f"{i}.png")
    known = ["--model", folder / "dense.safetensors", "--new-head", "--data", folder / "images"]
    assert run("train", "dense", *known, "--out", folder / "run", *one_epoch) == 0
    shutil.copy(folder / "run" / "checkpoints" / "dense.safetensors", folder / "training.safetensors")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_known_by_what_is_in_it(one_of_each, tmp_path, name):
    assert kind_of(one_of_each / name) == KINDS[name]
    if (one_of_each / name).is_file() and name not in ("weights.pth", "small.onnx"):  # by their endings
        shutil.copy(one_of_each / name, tmp_path / "renamed.bak")
        assert kind_of(tmp_path / "renamed.bak") == KINDS[name]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_refused_with_what_it_is_for(one_of_each, reader, name):
    read, expected, argument = READERS[reader]
    path, kind = one_of_each / name, KINDS[name]
    if kind in expected:
        read(path)
        return
    if kind == kinds.FOLDER and reader in ("model", "teacher"):
        said = "got the folder"
    elif kind in MODELS and reader == "weights":
        said = "which needs no name: give it as the model"
    else:
        use = kind.use.partition(" as the model")[0].replace("FILE", str(path))
        said = rf"{re.escape(f'{path} is {kind.name}')}, expected .*{re.escape(use)}"
    with pytest.raises(vtp.FileError, match=rf"^{argument}: .*{said}"):
        read(path)


def test_what_is_not_known_is_left_to_the_reader(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"plan_version"')
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("notes.txt", "other.json", "cut.json", "cut.safetensors", "missing"):
        assert kind_of(tmp_path / name) is None
        assert other_kind(tmp_path / name, kinds.PLAN) is None


def test_what_no_file_of_ours_is_like_is_told_at_once(tmp_path):
    (tmp_path / "noise.bin").write_bytes(bytes(range(3, 250)))
    (tmp_path / "large.json").write_bytes(b"{")
    os.truncate(tmp_path / "large.json", 2**40)  # without a byte on the disk, and more than fits in memory
    assert [kind_of(tmp_path / name) for name in ("noise.bin", "large.json")] == [None, None]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("load", "statistics", "weights", "model", "teacher"):
        with pytest.raises(ValueError, match=r"no file .*pipe|got '.*pipe', expected .*a file of vtp's"):
            READERS[name][0](tmp_path / "pipe")
