"""Random kills of a run on two processes: a few of them, and that what they might do would be noticed."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vtp
from bench import kills
from vtp.training.state import write_state


@pytest.mark.thorough
def test_random_kills_leave_nothing_in_a_continued_run(tmp_path, capsys):
    kills.kill_runs(tmp_path, 3, seed=5)
    assert "3 kills in " in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder as far as it is looked at."""
    out = tmp_path_factory.mktemp("kills") / "run"
    (out / "checkpoints").mkdir(parents=True)
    for name in kills.MODELS:
        vtp.save(kills._tiny(), out / f"{name}.safetensors")
    write_state(
        out / "checkpoints" / "dense.safetensors", {"model/weight": torch.zeros(2000)}, {"position": 1}
    )
    (out / "metrics.jsonl").write_text('{"stage": "dense", "epoch": 1, "loss": 0.5, "seconds": 3}\n')
    rows = {"rows": [{"top1": 50.0, "latency_ms": 3.0}], "reslice": [{"top1": 40.0}]}
    (out / "results.json").write_text(json.dumps(rows))
    return out


def _change(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", ["dense", "checkpoints/dense"])
@pytest.mark.parametrize("damage", [_change, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_a_file_that_is_not_whole_is_damage(finished, tmp_path, name, damage):
    out = shutil.copytree(finished, tmp_path / "run")
    kills.check_files(out)
    damage(out / f"{name}.safetensors")
    with pytest.raises(kills.Damage, match=r"dense\.safetensors"):
        kills.check_files(out)


def test_what_differs_from_the_undisturbed_run_is_damage_and_times_are_not(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"seconds": 3', '"seconds": 4'))
    kills.check_equal(out, finished)
    metrics.write_text(metrics.read_text().replace("0.5", "0.6"))
    with pytest.raises(kills.Damage, match="metrics are"):
        kills.check_equal(out, finished)
    shutil.copy(finished / "metrics.jsonl", metrics)
    (out / ".plan.json.abcdefgh.tmp").write_text("")
    with pytest.raises(kills.Damage, match="left over"):
        kills.check_equal(out, finished)
    (out / ".plan.json.abcdefgh.tmp").unlink()
    model = kills._tiny()
    model.head.bias.data += 1
    vtp.save(model, out / "compact.safetensors")
    with pytest.raises(kills.Damage, match=r"compact\.safetensors is another one"):
        kills.check_equal(out, finished)
