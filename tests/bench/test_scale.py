"""Steps a second of several processes, and the bytes that gates add."""

import json
from pathlib import Path

import pytest
import timm
import torch

from bench import scale


def tiny() -> torch.nn.Module:
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=4
    )


def test_bytes_are_those_of_the_model_and_times_those_of_a_ring():
    found = scale.gradient_bytes("deit_tiny_patch16_224")
    dense = timm.create_model("deit_tiny_patch16_224")
    assert found["weights"] == 4 * sum(parameter.numel() for parameter in dense.parameters())
    assert found["gates"] == 4 * 12 * (192 + 192 + 192 + 768)
    cluster = scale.Cluster(8, 1e9, "a link")
    assert scale.all_reduce_seconds(4 * 10**9, cluster) == pytest.approx(2 * 7 / 8 * 4)
    assert scale.sharded_seconds(4 * 10**9, cluster) == pytest.approx(3 * 7 / 8 * 4)


def test_the_page_has_the_predictions_that_the_models_give():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    assert scale.predicted_table(scale.predict()) in page


@pytest.mark.thorough
def test_groups_take_turns_and_the_tables_are_printed_from_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "PROCESSES", (1, 2))
    out = tmp_path / "scale.json"
    arguments = ["--images", "4", "--rounds", "2", "--steps", "1", "--out", str(out)]
    assert scale.main(arguments, build=tiny, models={"DeiT-T": "deit_tiny_patch16_224"}) == 0
    results = json.loads(out.read_text())
    cases = [(row["processes"], row["variant"]) for row in results["measured"]]
    assert cases == [(1, "no gates"), (1, "gates")] + [
        (2, variant) for variant in ("no gates", "gates", "gates, sharded")
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in results["measured"])
    printed = capsys.readouterr().out
    assert scale.main(["--markdown", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert "**Predicted**, not measured" in printed


@pytest.mark.thorough
def test_a_group_whose_first_loss_is_another_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale, "PROCESSES", (1,))
    monkeypatch.setattr(scale, "TOLERANCE", -1.0)
    arguments = ["--images", "4", "--rounds", "1", "--out", str(tmp_path / "scale.json")]
    assert scale.main(arguments, build=tiny, models={}) == 1
    assert "losses of the first step" in capsys.readouterr().err
    assert not (tmp_path / "scale.json").exists()
