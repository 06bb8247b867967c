"""The figures of docs/ are those of the results files, as the commands that docs/ names print them.

Code in docs/ runs, on a small model.
"""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch

import vtp
from bench import (
    backbones,
    bfloat16,
    compact_accounting,
    compare,
    exported,
    exports,
    gating_cost,
    latency_budget,
    one_shot,
    scale,
)
from vtp_kernels.proofs import gating_roofline

DOCS = Path(__file__).parents[2] / "docs"


def rows(text: str) -> set[str]:
    return {re.sub(r"\s+", "", line) for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize(
    "page, commands",
    [
        ("speed-cpu", [compare]),
        ("latency-budgets", [latency_budget]),
        ("training-cost", [gating_cost, gating_roofline, compare]),
        ("gpu-proofs", [compact_accounting]),
        ("one-shot", [one_shot]),
        ("export", [exports, exported]),
        ("supported-models", [backbones]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_row_of_figures_is_printed_by_a_command(page, commands, capsys):
    for command in commands:
        assert command.main(["--markdown"]) == 0
    if page == "speed-cpu":  # of another machine
        assert compare.main(["--markdown", "--out", str(compare.FOLDER / "compare-heads.json")]) == 0
        assert bfloat16.main(["--markdown"]) == 0
    printed = rows(capsys.readouterr().out)
    text = (DOCS / f"{page}.md").read_text().partition("## Where the price is decided")[0]
    assert rows(text)
    assert rows(text) <= printed


def test_what_communication_costs_is_as_its_command_prints_it(capsys):
    assert scale.main(["--markdown"]) == 0
    _, _, text = (DOCS / "scale.md").read_text().partition("## What communication costs")
    found = rows(text.partition("\n## ")[0])
    assert len(found) == 17
    assert found <= rows(capsys.readouterr().out)


def code(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


@pytest.fixture
def known(monkeypatch, tmp_path):
    """The names that code in docs/ starts from: any timm name is a small DeiT with random weights."""
    create = timm.create_model

    def small(name: str, **arguments):
        if name.startswith("local-dir:"):
            return create(name, **arguments)
        own = {
            "num_classes": 4,
            **arguments,
            "pretrained": False,
            "img_size": 32,
            "depth": 3,
            "embed_dim": 48,
        }
        return create("deit_tiny_patch16_224", **own).eval()

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return {"torch": torch, "images": torch.randn(16, 3, 32, 32), "labels": torch.arange(16) % 4}


def test_the_code_for_backbones_gives_the_maps_that_it_says(known):
    cut, features, folder = code("features")
    exec(cut, known)
    assert known["model"](known["images"]).shape == (16, 5, 48)
    assert vtp.count(known["small"]).macs <= 0.6 * vtp.count(known["model"]).macs
    for block in (features, folder):
        exec(block, known)
        assert [maps.shape for maps in known["maps"]] == [(16, 48, 2, 2)] * 2


def test_the_code_for_several_processes_runs_in_one(known):
    (shared,) = (block for block in code("scale") if "vtp.calibrate" in block)
    known["model"] = timm.create_model("deit_tiny_patch16_224")
    exec(shared, known)
    assert known["statistics"].images == 16 and known["ranks"] == 1
    assert vtp.count(known["small"]).macs <= 0.6 * vtp.count(known["model"]).macs


def test_the_guides_code_runs_in_order_and_does_what_it_says(known):
    theirs, *ours = code("coming-from")
    assert "torch_pruning" in theirs and not any("torch_pruning" in block for block in ours)
    if importlib.util.find_spec("torch_pruning"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(theirs, dict(known))
        assert Path("small.pth").is_file()
    one_shot, sparse, own_scores, heads = ours
    exec(one_shot, known)
    dense = vtp.count(known["model"])
    assert 0.55 * dense.macs < vtp.count(vtp.load("small.safetensors")).macs <= 0.6 * dense.macs
    exec(sparse, known)
    assert known["small"].plan.rate >= 0.4
    exec(own_scores, known)
    assert all(len(kept) == 48 for name, kept in known["plan"].kept.items() if name.endswith("attn.qkv"))
    exec(heads, known)
    assert [block.attn.num_heads for block in known["small"].blocks] == [2, 3, 1]
    images, head_dim = known["images"], 16
    with torch.no_grad():  # what a pruned head said is gone, the rest as it was
        for block, pruned in known["heads_to_prune"].items():
            for head in pruned:
                own = slice(head * head_dim, (head + 1) * head_dim)
                known["model"].blocks[block].attn.proj.weight[:, own] = 0
        torch.testing.assert_close(known["small"].eval()(images), known["model"].eval()(images))
