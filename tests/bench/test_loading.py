"""bench.loading: both loaders read the same shards in turns, and the page says what its command prints."""

import json
import re
from pathlib import Path

import pytest

from bench import loading

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.thorough  # each loader has a process of its own, which imports PyTorch
def test_the_command_writes_speed_and_memory_of_both_loaders(tmp_path, monkeypatch, capsys):
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    monkeypatch.setattr(loading, "TURN", 4)
    out, images = tmp_path / "loading.json", 4 * loading.TURN * loading.BATCH
    arguments = ["--images", str(images), "--shard", str(images // 4), "--workers", "1"]
    assert loading.main(["--out", str(out), *arguments]) == 0
    content = json.loads(out.read_text())
    assert content["turns"] >= 2 and content["shards"]["count"] == 4
    for own in content["loaders"].values():
        assert own["images_per_second"] > 0 and len(own["memory"]) == content["turns"] + 1
        assert all(memory is None or memory > 30e6 for memory in own["memory"])
    capsys.readouterr()
    assert loading.main(["--out", str(out), "--markdown"]) == 0
    assert "| vtp, by place | " in capsys.readouterr().out


def test_too_few_images_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        loading.main(["--out", str(tmp_path / "loading.json"), "--images", "100"])
    assert "argument --images: got 100, expected at least" in capsys.readouterr().err


def test_figures_of_the_page_are_what_the_command_prints(capsys):
    assert loading.main(["--markdown"]) == 0
    printed = capsys.readouterr().out
    section = PAGE.read_text().partition("\n## Data\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?:loader|vtp, by|timm, in).*$", section, re.MULTILINE)
    assert len(rows) == 3 and all(row in printed for row in rows)
