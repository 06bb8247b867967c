"""The examples run as a user runs them: a process of their own, no network, a toy model."""

import subprocess
from pathlib import Path

import vtp
from tests.support.processes import python

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: str) -> subprocess.CompletedProcess:
    script = str(EXAMPLES / name)
    run = f"runpy.run_path({script!r}, run_name='__main__')"
    return python(f"import runpy, sys; sys.argv = {[script, *arguments]}; {run}")


def test_prune_deit_cuts_to_its_budget_and_writes_a_file_that_loads(tmp_path):
    out = tmp_path / "pruned.safetensors"
    done = example("prune_deit.py", "--toy", "--epochs", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    small = vtp.load(out)
    assert small.plan.cost == vtp.count(small)
    dense = small.plan.architecture.build("meta", weight_init="skip")
    assert 0.4 * vtp.count(dense).macs < vtp.count(small).macs <= 0.55 * vtp.count(dense).macs


def test_prune_deit_asks_for_data():
    done = example("prune_deit.py")
    assert done.returncode == 2
    assert "--data" in done.stderr


def test_prune_deit_refuses_a_file_that_cannot_be_written_before_it_trains(tmp_path):
    for out in (tmp_path, tmp_path / "none" / "pruned.safetensors"):
        done = example("prune_deit.py", "--toy", "--out", str(out))
        assert done.returncode == 2
        assert f"--out: got {out}, expected a file in a folder that can be written" in done.stderr
        assert done.stdout == ""
