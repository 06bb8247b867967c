"""bench/bfloat16.py: that it runs at toy size, and what its table says of figures that are known."""

import json

import pytest

from bench import bfloat16
from tests.support.processes import python
from vtp_kernels.library import cpp_unsupported_reason


def timed(dtype: str, *seconds: float, **more: float) -> dict:
    return {"dtype": dtype, "status": "measured", "seconds": list(seconds), **more}


def results() -> dict:
    """Of a machine on which bfloat16 is twice as fast as float32, and OpenVINO half as fast as ours."""
    models = {
        "ours, float32": timed("float32", 2.0, 2.0),
        "ours, bfloat16": timed("bfloat16", 1.0, 1.0),
        "OpenVINO, bfloat16": timed("bfloat16", 2.0, 2.0),
        "OpenVINO, float32": timed("float32", 3.0, 3.0),
    }
    cuts = {
        "dense: ours, bfloat16": timed("bfloat16", 3.0, 3.0),
        "unequal 40%: ours, bfloat16": timed("bfloat16", 2.0, 2.0),
    }
    rate = {
        "ours, feed-forward of DeiT-B, bfloat16": timed("bfloat16", 1.0, flops=90.0),
        "oneDNN, packed, bfloat16": timed("bfloat16", 1.0),
        "oneDNN, packed, float32": timed("float32", 0.1),
    }
    attention = {
        "blocks.0.attn": timed("bfloat16", 1.0, macs=10),
        "blocks.1.attn": timed("bfloat16", 1.0, macs=10),
        "dense attn": timed("bfloat16", 0.1, macs=99),
        "blocks.0.mlp": timed("bfloat16", 0.1, macs=99),
    }
    found = {
        "models": {"tiny, batch 1": {"runtimes": models}, "base, batch 1": {"runtimes": models}},
        "cuts": {"base": {"macs": {"dense": 20, "unequal 40%": 10}, "runtimes": cuts}},
        "rate": {"flops": 100.0, "runtimes": rate},
        "attention": {"runtimes": attention},
    }
    return {"threads": {"1": found}, "agreement": 0.999}


def test_the_table_sets_what_was_found_beside_what_is_asked():
    found = {row[0]: row[2:] for row in bfloat16.table(results())}
    assert found["tiny, batch 1: fastest other (OpenVINO, bfloat16) / ours in bfloat16"] == [
        "2.00x (2.00-2.00)", "1.5", "yes",
    ]  # fmt: skip
    assert found["tiny, batch 1: fastest other (OpenVINO, float32) / ours in float32"] == [
        "1.50x (1.50-1.50)", "-", "-",
    ]  # fmt: skip
    assert found["tiny, batch 1: ours in float32 / in bfloat16"][1:] == ["1", "yes"]
    assert found["base, batch 1: ours in float32 / in bfloat16"][1:] == ["3", "no"]
    assert found["base: of the multiply-adds removed, as speed"] == ["0.75", "0.9", "no"]
    assert found["feed-forward branches: of the best product's rate"] == ["0.90", "0.85", "yes"]
    assert found["attention branches: of the best product's rate"] == ["0.20", "0.4", "no"]
    assert found["same class as in float32"] == ["99.90%", "0.995", "yes"]


def test_what_was_not_timed_is_not_reached():
    content = results()
    for record in content["threads"]["1"]["models"].values():
        record["runtimes"]["ours, bfloat16"] = {"dtype": "bfloat16", "status": "failed"}
    del content["threads"]["1"]["rate"]["runtimes"]["oneDNN, packed, bfloat16"]
    found = {row[0]: row[2:] for row in bfloat16.table(content)}
    assert found["base, batch 1: ours in float32 / in bfloat16"] == ["-", "3", "not measured"]
    assert found["feed-forward branches: of the best product's rate"] == ["-", "0.85", "not measured"]


@pytest.mark.thorough  # 16 s
@pytest.mark.skipif(cpp_unsupported_reason() is not None, reason="the C++ operators are not built")
def test_it_runs_at_toy_size(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--seconds", "0.5", "--threads", "1", "--out", str(out)]
    run = python(f"from bench import bfloat16; bfloat16.main({arguments})")
    assert run.returncode == 0, run.stderr[-3000:]
    content = json.loads(out.read_text())
    assert content["agreement"] > 0.9 and list(content["threads"]) == ["1"]
    assert "same class as in float32" in run.stdout
