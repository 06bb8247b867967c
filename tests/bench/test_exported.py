"""bench.exported: dense and cut in turns, in each runtime."""

import json

import pytest

from bench import exported
from vtp.runtime.export import TARGETS, ExportError


@pytest.fixture
def toy(monkeypatch):
    """A toy of a model, and no runtime but torch.export, as the others take seconds each."""
    monkeypatch.setattr(exported, "MODELS", {"vit_tiny_patch16_224": {"img_size": 32, "depth": 1}})
    monkeypatch.setattr(exported, "BATCHES", (1,))

    def refuses(model, file):
        raise ExportError("model: takes none")

    for target, (about, _) in TARGETS.items():
        if target != "pt2":
            monkeypatch.setitem(TARGETS, target, (about, refuses))


def test_the_command_writes_times_of_every_runtime_or_why_there_are_none(toy, tmp_path, capsys):
    out = tmp_path / "exported.json"
    assert exported.main(["--out", str(out), "--seconds", "0.2"]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert set(case["runtimes"]) == {"PyTorch eager", "vtp.optimize", "pt2"}
    assert set(case["reasons"]) == set(TARGETS) - {"pt2"}
    for own in case["runtimes"].values():
        assert own["dense_ms"] > 0
        assert 0 < own["share"]["q1"] <= own["share"]["median"] <= own["share"]["q3"]
    assert case["macs"]["cut"] < case["macs"]["dense"]
    capsys.readouterr()
    assert exported.main(["--out", str(out), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "vit_tiny_patch16_224, batch 1: " in table
    assert "model: takes none" in table
