"""bench/ops at toy size: every case runs and is right, and what is wrong has no figure. No speed counts."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.processes import python

ROOT = Path(__file__).parents[2]
OPS = ROOT / "bench" / "ops"
FILES = sorted(path.stem for path in OPS.glob("bench_*.py"))

PLANTED = """
import torch
from bench.ops.bench_gated_linear import BACKWARD, gated_linear_ref, operands
from bench.ops.shapes import plain

SITES = ("fc2",)


def changed(change):
    return plain(lambda **operands: change(gated_linear_ref(**operands)))


def changed_gate(change):
    return plain(lambda x, weight, gate, bias: gated_linear_ref(x, weight, change(gate), bias))


def implementations(case):
    found = {
        "right": changed(lambda out: out),
        "scaled": changed(lambda out: out * 1.1),
        "nan": changed(lambda out: out * torch.nan),
        "images exchanged": changed(lambda out: out.flip(0)),
    }
    if case.backward:  # of which the outputs are right
        found["gradient doubled"] = changed_gate(lambda gate: 2 * gate - gate.detach())
        found["gradient missing"] = changed_gate(lambda gate: gate.detach())
    return found


def test_planted(measure, case, implementation):
    measure(case, implementations(case)[implementation], operands, gated_linear_ref)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, dict]:
    """By id, of all cases and the planted ones: file, implementation, message of a failure, times."""
    folder = tmp_path_factory.mktemp("bench") / "ops"
    shutil.copytree(OPS, folder, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    (folder / "bench_planted.py").write_text(PLANTED)
    report, figures = folder / "report.xml", folder / "figures.json"
    options = ["-q", str(folder), f"--rootdir={folder}", "--toy"]
    options += ["-p", "no:cacheprovider", f"--junitxml={report}", f"--benchmark-json={figures}"]
    code = f"import pytest, sys; sys.exit(pytest.main({options}))"
    # In a worker of pytest-xdist pytest-benchmark measures nothing; a GPU is what tests/gpu is for.
    done = python(code, PYTEST_XDIST_WORKER=None, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and report.is_file(), done.stdout + done.stderr
    found = {}
    for test in ElementTree.parse(report).iter("testcase"):
        identity = f"{test.get('classname')}.py::{test.get('name')}"
        implementation = test.get("name").partition(
            f"-{'bfloat16' if 'bfloat16' in identity else 'float32'}-"
        )[2]
        other = test.find("error") if test.find("skipped") is None else test.find("skipped")
        assert other is None, f"{identity}: {other.get('message')}"
        failure = test.find("failure")
        found[identity] = {
            "file": test.get("classname"),
            "implementation": implementation.removesuffix("]"),
            "failure": None if failure is None else failure.get("message"),
            "timed": None,
        }
    for benchmark in json.loads(figures.read_text())["benchmarks"]:
        found[benchmark["fullname"]]["timed"] = benchmark
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_case_of_an_op_computes_the_same_and_has_a_figure(ran, file):
    cases = {identity: test for identity, test in ran.items() if test["file"] == file}
    assert {i: test["failure"] for i, test in cases.items() if test["failure"] or not test["timed"]} == {}
    assert all(test["timed"]["stats"]["rounds"] >= 1 for test in cases.values())
    seen = [test["timed"]["extra_info"] for test in cases.values() if test["implementation"] == "ours"]
    assert {info["widths"] for info in seen} == {"dense", "compact"}
    assert {info["dtype"] for info in seen} == {"float32", "bfloat16"}
    assert all(info["threads"] == 1 and info["device"] == "cpu" for info in seen)
    groups = [test["timed"]["group"] for test in cases.values()]
    assert all(groups.count(group) >= 3 for group in groups), "ours has implementations in each"


def test_what_is_wrong_fails_and_has_no_figure(ran):
    planted = [test for test in ran.values() if test["file"] == "bench_planted"]
    assert len(planted) == 2 * 2 * (4 + 6), "dense and compact, in two dtypes, forward and with backward"
    for test in planted:
        if test["implementation"] == "right":
            assert test["failure"] is None and test["timed"] is not None
        else:
            wrong = "dgate" if test["implementation"].startswith("gradient") else "output"
            assert test["failure"].startswith(f"Failed: wrong {wrong}: relative error "), test
            assert test["timed"] is None, test["implementation"]


def test_multiply_adds_are_those_of_the_products(ran):
    info = next(
        test["timed"]["extra_info"]
        for identity, test in ran.items()
        if "gated_linear[toy-compact-fc2-forward+backward-b2-float32-ours" in identity
    )
    assert info["macs"] == 3 * 2 * 7 * 37 * 32, "y, dx and dweight: 2 images of 7 tokens, 37 to 32 dimensions"
