"""The examples run as a user runs them: a process of their own, no network, a toy model."""

import subprocess
import sys
from pathlib import Path

import vtp

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_prune_deit_cuts_to_its_budget_and_writes_a_file_that_loads(tmp_path):
    out = tmp_path / "pruned.safetensors"
    command = [sys.executable, str(EXAMPLES / "prune_deit.py"), "--toy", "--epochs", "1", "--out", str(out)]
    subprocess.run(command, check=True, timeout=300)
    small = vtp.load(out)
    assert small.plan.cost == vtp.count(small)
    dense = small.plan.architecture.build("meta", weight_init="skip")
    assert 0.4 * vtp.count(dense).macs < vtp.count(small).macs <= 0.55 * vtp.count(dense).macs


def test_prune_deit_asks_for_data(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "prune_deit.py")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "--data" in done.stderr
