"""bench/gpu.py at toy size, without a GPU: what it lets through, counts and writes. No speed is asserted."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from bench import gpu as bench
from vtp_kernels.gated_linear import FUSED_ROWS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Toys gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toys():
    """A case of each precision, forward and with backward."""
    return [
        bench.Case("toy", "fc1", 24, 40, 2, precision, backward, tokens=tokens)
        for precision, tokens in (("autocast", 9), ("bf16", 30), ("float32", 30))
        for backward in (False, True)
    ]


def quick():
    """The peers without the one that calls a compiler."""
    return {name: peer for name, peer in bench.PEERS.items() if name != "naive compiled"}


def rehearse(out: Path, *arguments: str, **keywords) -> int:
    keywords = {"cases": toys(), "peers": quick(), **keywords}
    return bench.main(["--out", str(out), "--rounds", "3", *arguments], device=CPU, **keywords)


def results(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert bench.main(["--out", str(out)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_measures_every_case_and_names_what_it_did_not_measure(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert rehearse(out, "--parts", "gated_linear") == 0
    written = results(out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "a temporary file is left"
    assert {"torch", "timm", "triton", "python", "gpu", "driver", "date"} <= written["place"].keys()
    assert {"commit", "modified"} <= written.keys() and written["arguments"]["rounds"] == 3
    assert written["numerics"]["status"] == written["step"]["status"] == "not measured"
    assert written["sanitizer"] == {
        "memcheck": {"status": "not measured"},
        "racecheck": {"status": "not measured"},
    }
    part = written["gated_linear"]
    assert part["fused_rows"] == {str(size): rows for size, rows in FUSED_ROWS.items()}
    assert set(part["advice"].values()) == {"not measured"}
    assert len(part["cases"]) == 6
    for case in part["cases"]:
        assert case["faster"] == "not measured" and case["rounds"] == 3
        mixed = case["precision"] == "autocast" and case["backward"]
        assert case["taken"] == ("folded" if mixed else "fused")
        assert case["rows"] == 2 * case["tokens"]
        assert list(case["peers"]) == list(quick())
        for name, record in case["peers"].items():
            if name in bench.FORCED_PATHS:
                assert record == {"status": "not measured: there are paths on a GPU only"}
                continue
            assert record["status"] == "measured" and "gpu" not in record, (case, name)
            figures = record["call"]
            assert figures["median_seconds"] > 0
            assert figures["ratio"]["q1"] <= figures["ratio"]["median"] <= figures["ratio"]["q3"]
        assert case["peers"]["ungated"]["call"]["ratio"]["median"] == 1
    printed = capsys.readouterr().out
    assert "gated_linear, autocast, forward + backward" in printed and "toy fc1" in printed
    assert "numerics: not measured" in printed and "memcheck: not measured" in printed
    assert "FUSED_ROWS[2]: not measured" in printed


def test_parts_that_were_not_asked_for_are_written_as_not_measured(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(bench, "step", lambda: {"status": "measured", "cases": []})
    assert rehearse(out, "--parts", "step") == 0
    written = results(out)
    assert written["step"]["status"] == "measured"
    for case in written["gated_linear"]["cases"]:
        assert {record["status"] for record in case["peers"].values()} == {"not measured"}


def test_what_was_measured_before_a_crash_is_in_the_file(tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"

    def crash():
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "step", crash)
    with pytest.raises(KeyboardInterrupt):
        rehearse(out, "--parts", "gated_linear", "step", cases=toys()[:1])
    written = results(out)
    assert written["gated_linear"]["cases"][0]["peers"]["gated_linear"]["status"] == "measured"
    assert written["step"] == {"status": "not measured"}
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_folder_that_is_not_there_is_found_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure", None)
    assert rehearse(tmp_path / "missing" / "gpu.json", "--parts", "gated_linear") == 2
    assert "missing" in capsys.readouterr().err


# Each computes something else; in which result it must be found.
def doubled_gate_gradient(x, weight, gate, bias):
    return F.linear(x * (2 * gate - gate.detach()), weight, bias)


def gate_forgotten(x, weight, gate, bias):
    return F.linear(x, weight, bias) + 0 * gate.sum()


def bias_forgotten(x, weight, gate, bias):
    return F.linear(x * gate, weight) + 0 * bias.sum()


def no_gradient_of_weight(x, weight, gate, bias):
    return F.linear(x * gate, weight.detach(), bias) + 0 * weight.sum()


def not_a_number(x, weight, gate, bias):
    return F.linear(x * gate, weight, bias) * torch.nan


def raises(x, weight, gate, bias):
    raise RuntimeError("no such kernel\nand a long explanation")


WRONG = {
    doubled_gate_gradient: "dgate: relative error 1,",
    gate_forgotten: "y: relative error",
    bias_forgotten: "y: relative error",
    no_gradient_of_weight: "dweight: relative error 1,",
    not_a_number: "y: relative error nan",
    raises: "RuntimeError: no such kernel",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_peer_that_computes_something_else_gets_no_figure(tmp_path, capsys, wrong):
    peers = {"ungated": bench.PEERS["ungated"], "wrong": bench.Peer(lambda: wrong)}
    cases = [case for case in toys() if case.backward]
    out = tmp_path / "gpu.json"
    assert rehearse(out, "--parts", "gated_linear", cases=cases, peers=peers) == 1
    for case in results(out)["gated_linear"]["cases"]:
        record = case["peers"]["wrong"]
        assert record.keys() == {"status"} and record["status"].startswith(f"failed: {WRONG[wrong]}")
        assert case["peers"]["ungated"]["status"] == "measured"
    printed = capsys.readouterr()
    assert "failed" in printed.out and printed.err.count("wrong failed") == len(cases)


def test_without_a_right_reference_there_are_no_ratios(tmp_path):
    peers = {"ungated": bench.Peer(lambda: not_a_number, gated=False), "naive": bench.PEERS["naive"]}
    out = tmp_path / "gpu.json"
    assert rehearse(out, "--parts", "gated_linear", cases=toys()[:1], peers=peers) == 1
    statuses = [record["status"] for record in results(out)["gated_linear"]["cases"][0]["peers"].values()]
    assert statuses[0].startswith("failed") and statuses[1] == "not measured: ungated failed"


def test_a_case_that_does_not_fit_is_not_measured_and_the_others_are(tmp_path, monkeypatch):
    first, second = toys()[:2]
    real = bench.operands

    def operands(case, device):
        if case == first:
            raise torch.OutOfMemoryError("too large")
        return real(case, device)

    monkeypatch.setattr(bench, "operands", operands)
    out = tmp_path / "gpu.json"
    assert rehearse(out, "--parts", "gated_linear", cases=[first, second]) == 0
    cases = results(out)["gated_linear"]["cases"]
    assert cases[0]["peers"]["naive"]["status"] == "not measured: out of GPU memory"
    assert cases[1]["peers"]["naive"]["status"] == "measured"


def with_ratio(tokens: int, median: float, spread: float = 0.01, precision: str = "bf16") -> dict:
    """The record of a case whose fused path takes `median` times as long as the other."""
    case = bench.Case("toy", "fc1", 24, 40, 1, precision, False, tokens=tokens)
    ratio = {"median": median, "q1": median - spread, "q3": median + spread}
    found = {"fused_over_vendor": ratio, "faster": bench.faster(ratio)}
    return bench.pending(case, quick()) | found


def test_the_advised_bound_is_the_one_that_loses_least(monkeypatch):
    monkeypatch.setitem(FUSED_ROWS, 2, 3000)
    cases = [with_ratio(*c) for c in ((200, 0.5), (1600, 0.8), (2500, 1.25), (9000, 2.0))]
    assert [case["faster"] for case in cases] == ["fused", "fused", "vendor", "vendor"]
    assert [case["taken"] for case in cases] == ["fused", "fused", "fused", "vendor"]
    assert bench.faster({"median": 1.02, "q1": 0.99, "q3": 1.03}) == "equal"
    found = bench.advice(cases)
    assert found["4"] == "not measured"
    assert (found["2"]["least_rows"], found["2"]["rows_below"], found["2"]["loss"]) == (1600, 2500, 1)
    assert math.isclose(found["2"]["loss_now"], 1.25**0.25)
    (line, other) = bench.advice_lines(found)
    assert "FUSED_ROWS[2] = 3000 loses 5.7%" in line and "best: 1600 to 2499 loses 0.0%" in line
    assert other == "FUSED_ROWS[4]: not measured"
    always = bench.advice([with_ratio(200, 0.5, precision="float32")])
    assert (always["4"]["least_rows"], always["4"]["rows_below"]) == (200, None)
    assert bench.advice([with_ratio(200, 2.0)])["2"]["least_rows"] == 0


def test_the_table_marks_where_the_slower_path_is_taken(monkeypatch):
    monkeypatch.setitem(FUSED_ROWS, 2, 3000)
    cases = [with_ratio(*c) for c in ((200, 0.5), (2500, 1.25), (2600, 1.0))]
    cases[0]["peers"]["naive"] = {
        "status": "measured",
        "gpu": {"median_seconds": 2e-6, "ratio": {"median": 1.5, "q1": 1.4, "q3": 1.6}},
    }
    console = Console(width=200, file=io.StringIO())
    for shown in bench.tables(cases, list(quick())):
        console.print(shown)
    lines = console.file.getvalue().splitlines()
    assert sum("(slower)" in line for line in lines) == 1
    assert any("2500" in line and "fused (slower)" in line for line in lines)
    assert any("1.50x (not measured)" in line for line in lines)


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
    tests.write_text(TESTS + "\n\ndef test_wrong(): assert False\n")
    record = bench.run_tests(tests=tests)
    assert record.pop("seconds") > 0
    assert record == {
        "status": "failed: 1 of 3 tests, exit status 1",
        "passed": 1,
        "failed": ["test_toy::test_wrong"],
        "skipped": 1,
        "skipped_because": ["no second GPU"],
    }


def test_tests_that_were_all_skipped_have_measured_nothing(tests):
    record = bench.run_tests("-k", "skipped", tests=tests)
    assert record["status"] == "not measured: all tests were skipped"
    assert record["skipped_because"] == ["no second GPU"]


def test_a_test_run_that_dies_is_a_failure(tests):
    tests.write_text("import os\nos._exit(3)\n")
    assert bench.run_tests(tests=tests) == {"status": "failed: pytest wrote no report, exit status 3"}


def test_without_compute_sanitizer_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert bench.sanitize("memcheck") == {"status": "not measured: compute-sanitizer: not installed"}


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
    record = bench.sanitize("memcheck", tests)
    assert record["passed"] == 1 and record["skipped"] == 0, "tests that are not marked have run"
    assert record["log"] == [f"========= ERROR SUMMARY: {errors} errors"]
    assert record["status"] == ("failed: compute-sanitizer gave no clean summary" if errors else "measured")
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--tool memcheck --error-exitcode 1") and asked.split()[-1] == "1"


def test_whole_steps_are_taken_from_the_other_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "assert sys.argv[1:4] == ['--device', 'cuda', '--out']\n"
        "open(sys.argv[4], 'w').write('{\"cases\": [1]}')\n"
    )
    assert bench.step(script) == {"status": "measured", "cases": [1]}
    script.write_text("raise SystemExit(2)")
    assert bench.step(script) == {"status": "failed: gating_cost.py wrote no results, exit status 2"}


def test_cases_are_the_linears_of_the_models():
    cases = bench.deit_cases(["base"], [1, 8], ["bf16"])
    assert len(cases) == 16 and len({str(case) for case in cases}) == 16
    assert {(c.linear, c.inputs, c.outputs) for c in cases} == {
        ("qkv", 768, 2304),
        ("proj", 768, 768),
        ("fc1", 768, 3072),
        ("fc2", 3072, 768),
    }
    assert {c.rows for c in cases} == {197, 1576}
    assert dataclasses.asdict(cases[0])["tokens"] == 197


def test_a_name_of_a_gpu_becomes_a_name_of_a_file():
    assert bench.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert bench.slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"
