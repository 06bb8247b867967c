"""The example prunes a backbone, searches with it, and says how much was lost."""

import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

import vtp
from tests.examples.test_prune_deit import EXAMPLES, example

COST = r": [\d.]+M params, ([\d.]+)M MACs; \d+ images/s; "
RECALL = r"recall@1 ([\d.]+), recall@5 ([\d.]+)"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images of each of three classes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / name).mkdir()
        pattern = random.integers(0, 156, (28, 28, 3))
        for i in range(12):
            pixels = pattern + random.integers(0, 100, pattern.shape)
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


def test_a_backbone_is_cut_to_its_budget_and_still_finds_its_images(tmp_path):
    out = tmp_path / "backbone.safetensors"
    done = example("retrieve_with_dinov2.py", "--toy", "--out", str(out))
    assert done.returncode == 0, done.stderr
    dense = re.search(f"dense{COST}{RECALL}\n", done.stdout)
    pruned = re.search(f"pruned{COST}{RECALL}, ([\\d.]+)% of the 10 nearest as before\n", done.stdout)
    small = vtp.load(out)
    assert small.num_classes == 0 and small.plan.cost == vtp.count(small)
    assert (
        small.plan.cost.macs
        <= 0.6 * vtp.count(small.plan.architecture.build("meta", weight_init="skip")).macs
    )
    assert float(pruned[1]) <= 0.61 * float(dense[1])
    assert 30 < float(pruned[4]) < 100
    for found in (dense, pruned):
        assert 50 < float(found[2]) <= float(found[3])  # by chance 12


def test_a_folder_is_searched_by_a_query(photos, tmp_path):
    arguments = ["--toy", "--images", str(photos), "--out", str(tmp_path / "x.safetensors")]
    done = example("retrieve_with_dinov2.py", *arguments, "--query", str(photos / "dog" / "3.png"))
    assert done.returncode == 0, done.stderr
    first, *others = re.findall(r"^  ([\d.]+)  (.*)$", done.stdout, re.MULTILINE)
    assert first == ("1.000", str(photos / "dog" / "3.png"))
    assert len(others) == 4


def test_neighbours_are_those_of_a_full_table_of_similarities():
    script = runpy.run_path(str(EXAMPLES / "retrieve_with_dinov2.py"))
    index = torch.nn.functional.normalize(torch.randn(1500, 8))
    table = (index @ index.T).fill_diagonal_(-2)
    assert torch.equal(script["nearest"](index, 3), table.argsort(dim=1, descending=True)[:, :3])


@pytest.mark.parametrize("case", ["no images", "too few", "out"])
def test_bad_input_is_refused_before_anything_is_done(case, photos, tmp_path):
    arguments, message = {
        "no images": ([], "--images: name a folder"),
        "too few": (
            ["--toy", "--images", str(tmp_path), "--out", str(tmp_path / "x")],
            "--images: got 5 images",
        ),
        "out": (["--toy", "--out", str(tmp_path)], f"--out: got {tmp_path}, expected a file"),
    }[case]
    (tmp_path / "owl").mkdir()
    for i in range(5):
        (tmp_path / "owl" / f"{i}.png").write_bytes((photos / "owl" / f"{i}.png").read_bytes())
    done = example("retrieve_with_dinov2.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert not (tmp_path / "x").exists()
