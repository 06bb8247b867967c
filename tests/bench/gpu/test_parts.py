"""The real cases of a GPU run at toy size on the CPU: they run, and say what they measured. No speed is
asserted."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import configurations, models, numerics, ops, training
from bench.gpu.__main__ import main
from bench.gpu.cases import MEASURED, NOT_MEASURED, PARTS, Case, Context
from bench.gpu.table import FORMATS, MOST_LINES, failures, table
from vtp_kernels import launching
from vtp_kernels.proofs import compilations

QUICK = {
    "numerics": [
        "optimized DINOv2-S",
        "optimized DINOv3-S+",
        "torch.compile(fullgraph=True)",
        f"fine-tuning, {numerics.STEPS} steps",
        "calibration and refit",
    ],
    "models": [case.name for case in models.cases(True)],
    "training": ["DeiT-S, eager", "DeiT-S, fine-tuning", "DeiT-S, compiled"],
    "ops": [case.name for case in ops.cases(True)],
    "configurations": [case.name for case in configurations.cases(True)],
}
CASES = [(part, name) for part, names in QUICK.items() for name in names]


@pytest.fixture(autouse=True)
def one_thread():
    """Toys gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def context(note=lambda content: None):
    return Context(torch.device("cpu"), True, 100.0, note)


@pytest.mark.covering(1, by=lambda part, name: ((part, name == "ceilings"),))
@pytest.mark.parametrize(("part", "name"), CASES)
def test_a_case_runs_at_toy_size_and_has_a_line(part, name):
    module = next(p.module for p in PARTS if p.name == part)
    (case,) = [case for case in importlib.import_module(module).cases(True) if case.name == name]
    record = {"status": MEASURED, **case.run(context())}
    assert record["status"] == MEASURED
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert FORMATS[part](name, record, {})
    statuses = {label: own["status"] for label, own in record.get("timed", {}).items()}
    assert set(statuses.values()) <= {MEASURED}, statuses
    for own in record.get("timed", {}).values():
        assert own["median_seconds"] > 0 and own["rounds"] >= 3


def test_all_cases_have_names_of_their_own_and_fit_into_the_run():
    for part in PARTS:
        for toy in (False, True):
            cases = importlib.import_module(part.module).cases(toy)
            names = [case.name for case in cases]
            assert len(names) == len(set(names)) >= 4
            assert all(isinstance(case, Case) and 0 < case.seconds <= 90 for case in cases)
    assert abs(sum(part.share for part in PARTS) - 1) < 1e-9


def wrong_by_a_percent(runtime, model, images, toy):
    def call():
        outputs = model.bfloat16()(images).clone()
        outputs[0, 0] += 0.1 * outputs.abs().max()
        return outputs

    return call


def breaks(runtime, model, images, toy):
    raise RuntimeError("the compiler gave up")


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (wrong_by_a_percent, "failed: wrong logits: relative error"),
        (breaks, "failed: RuntimeError: the comp"),
    ],
)
def test_a_runtime_that_is_wrong_or_breaks_has_no_figure_and_the_others_have(monkeypatch, prepare, says):
    real = models.prepare
    by_name = {runtime.name: runtime for runtime in models.RUNTIMES}
    bad, right = by_name["compact, eager"], by_name["dense, compiled"]

    def prepared(runtime, *arguments):
        return (prepare if runtime is bad else real)(runtime, *arguments)

    monkeypatch.setattr(models, "prepare", prepared)
    record = models.measure("DeiT-S", 2, (models.OURS, bad, right), context())
    statuses = {name: own["status"] for name, own in record["timed"].items()}
    assert statuses[bad.name].startswith(says) and "median_seconds" not in record["timed"][bad.name]
    assert statuses["ours"] == statuses["dense, compiled"] == MEASURED
    assert record["timed"]["dense, compiled"]["over_reference"]["median"] > 0
    results = {"parts": {"models": {"cases": {"DeiT-S": {"status": MEASURED, **record}}}}}
    assert [line.partition(":")[0] for line in failures(results)] == [f"DeiT-S, {bad.name}"]


def test_an_op_that_computes_something_else_has_no_figure(monkeypatch):
    case = next(case for case in ops.cases(True) if case.name.startswith("layer_norm_gather"))
    module, _ = ops.OPS["layer_norm_gather"]
    monkeypatch.setitem(ops.OPS, "layer_norm_gather", (module, lambda x, *_, **__: F.relu(x[..., :19])))
    statuses = {name: own["status"] for name, own in case.run(context())["timed"].items()}
    assert all(status.startswith("failed: wrong output: relative error") for status in statuses.values())


def test_a_candidate_is_in_the_table_only_while_it_is_captured():
    for entry in configurations.ENTRIES:
        candidates = configurations.configs(entry)
        assert len(candidates) == len(entry.candidates)
        for config in candidates.values():
            before = configurations.current(entry)
            with pytest.raises(KeyError), configurations.in_place(entry, config):
                assert configurations.current(entry) is config != before
                raise KeyError
            assert configurations.current(entry) is before


def test_every_path_of_an_op_is_timed_on_a_gpu():
    assert {"fused", "vendor"} <= set(ops.paths("gated_linear"))
    assert ops.paths("layer_norm_gather") == []
    for op in ops.OPS:
        for path in ops.paths(op):
            with launching.forced_path(op, path):
                pass


# --------------------------------------------------------------------------------
# The table, and the command


def full_results():
    """Of a run that measured every case there is, as long as can be."""
    timing = {"status": MEASURED, "median_seconds": 1e-3, "over_reference": {"median": 1.5}, "rounds": 9}
    timed = {"ours": timing | {"macs": 10**9}, "dense, compiled": timing | {"macs": 2 * 10**9}, "now": timing}
    variants = {
        name: {"median_seconds": 0.1, "ratio": {"median": 1.01}, "peak_ratio": 1.0}
        for name in training.gating_cost.VARIANTS
    }
    records = {
        "numerics": {"passed": 9, "skipped": 0},
        "models": {"batch": 256, "timed": timed},
        "training": {"variants": variants},
        "ops": {
            "timed": timed,
            "predicted": {"status": "predicted", "seconds_on_h100": 1e-4, "bytes": 1},
            "flops": 9,
        },
        "configurations": {"timed": timed, "now": "64x128x64"},
    }
    parts = {}
    for part in PARTS:
        cases = {
            case.name: {"status": MEASURED, **records[part.name]}
            for case in importlib.import_module(part.module).cases(False)
        }
        parts[part.name] = {"seconds": 100.0, "cases": cases}
    peak = {"flops_per_second": 8e14, "bytes_per_second": 3e12}
    parts["models"]["cases"]["ceilings"] = {"status": MEASURED, **peak}
    return {
        "hardware": {"gpu": "a GPU", "cuda": "13.0", "driver": "580"},
        "environment": {"torch": "2", "date": "today", "cpu": "a CPU"},
        "triton": "3", "rehearsal": False, "commit": "0" * 40, "modified": False,
        "cache": {"kernels": 9, "found": 8, "compiled": 1, "failed": {}, "left": 0, "seconds": 1.0},
        "parts": parts,
    }  # fmt: skip


def test_the_table_of_a_whole_run_has_a_line_for_each_case_and_at_most_110():
    results = full_results()
    lines = table(results)
    cases = sum(len(part["cases"]) for part in results["parts"].values())
    assert len(lines) == 2 + len(PARTS) + cases <= MOST_LINES == 110
    assert "8 of 9 kernels found compiled, 1 compiled" in lines[1]
    (line,) = [line for line in lines if line.startswith("  DeiT-B, batch 256:")]
    # 256 images in 1 ms at 1 GMAC are 0.512 TFLOP in 1 ms: 64% of 800 TFLOP/s.
    assert "256,000 images/s, of peak 0.64 (reaches 0.5), 1.5 (reaches 1.15) times as fast as dense" in line
    assert "0.75 (misses 0.85) of the 2.00 that MACs promise" in line
    results["parts"]["ops"]["cases"] |= {f"more {i}": {"status": NOT_MEASURED} for i in range(40)}
    lines = table(results)
    assert len(lines) == MOST_LINES and lines[-1].startswith("...") and "in the results file" in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--rehearse", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_compiling_ahead_without_a_compiler_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilations, "HAS_TRITON", False)
    assert main(["--compile", "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "Triton is not installed" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not compilations.HAS_TRITON, reason="Triton is not installed")
def test_a_cache_that_cannot_be_written_is_found_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "cache.tar.gz").mkdir()
    for unwritable in ("file", "file/in", "cache"):
        assert main(["--compile", "--cache", str(tmp_path / unwritable)]) == 2
        said = capsys.readouterr().err
        assert unwritable.partition("/")[0] in said and said.count("\n") == 1
