"""Files that commands take, and what is asked of those that refuse."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import vtp
from tests.support.command_line import run
from tests.support.folders import knows, write_classes
from tests.support.models import TINY, build, gated
from vtp.pipeline import fit_data
from vtp.training.data import open_data


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
