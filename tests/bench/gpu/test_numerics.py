"""Tests and sanitizers that a GPU run starts: what they are asked, counted and believed."""

import sys

import pytest
import torch

from bench.gpu import numerics
from bench.gpu.cases import Context

CONTEXT = Context(torch.device("cpu"), True, 100.0, lambda content: None)
TESTS = """
import pytest

@pytest.mark.sanitizer
def test_right(): pass

@pytest.mark.skipif(True, reason="no second GPU")
def test_skipped(): pass
"""


@pytest.fixture
def tests(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins take most of the time of such a run
    path = tmp_path / "tests" / "test_toy.py"
    path.parent.mkdir()
    path.write_text(TESTS)
    (path.parent / "pytest.ini").write_text("[pytest]\nmarkers = sanitizer\n")
    return path


def test_tests_are_counted_and_failed_ones_named(tests):
    tests.write_text(TESTS + "\n\ndef test_wrong(): assert False, 'no good'\n")
    record = numerics.run_tests(tests=tests, seconds=100)
    assert record.pop("test_seconds") > 0
    assert record == {
        "status": "failed: 1 of 3 tests, exit status 1",
        "passed": 1,
        "failed": {"test_toy::test_wrong": "AssertionError: no good"},
        "skipped": 1,
        "skipped_because": ["no second GPU"],
    }


def test_tests_that_were_all_skipped_have_measured_nothing(tests):
    record = numerics.run_tests("-k", "skipped", tests=tests, seconds=100)
    assert record["status"] == "not measured: all tests were skipped"
    assert record["skipped_because"] == ["no second GPU"]


def test_a_run_without_any_test_has_measured_nothing(tests):
    record = numerics.run_tests("-k", "nothing", tests=tests, seconds=100)
    assert record["status"] == "not measured: there are no such tests"


def test_a_test_run_that_dies_is_a_failure(tests):
    tests.write_text("import os\nos._exit(3)\n")
    record = numerics.run_tests(tests=tests, seconds=100)
    assert record == {"status": "failed: pytest wrote no report, exit status 3"}


def test_without_compute_sanitizer_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    record = numerics.sanitize("memcheck", CONTEXT)
    assert record == {"status": "not measured: compute-sanitizer: not installed"}


# In place of compute-sanitizer: notes what it is asked for, runs the program, writes a log like the real one.
STAND_IN = """#!/bin/sh
echo "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING" > {folder}/asked
while [ "$1" != {python} ]; do
    if [ "$1" = --log-file ]; then log=$2; fi
    shift
done
echo "========= ERROR SUMMARY: {errors} errors" > "$log"
"$@"
"""


@pytest.mark.parametrize("errors", [0, 2])
def test_compute_sanitizer_runs_the_marked_tests_and_its_summary_counts(tests, tmp_path, monkeypatch, errors):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(STAND_IN.format(folder=tmp_path, python=sys.executable, errors=errors))
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    record = numerics.sanitize("memcheck", CONTEXT, tests)
    assert record["passed"] == 1 and record["skipped"] == 0, "tests that are not marked have run"
    assert record["log"] == [f"========= ERROR SUMMARY: {errors} errors"]
    assert record["status"] == ("failed: compute-sanitizer gave no clean summary" if errors else "measured")
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--tool memcheck --error-exitcode 1") and asked.split()[-1] == "1"
