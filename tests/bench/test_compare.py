"""bench/compare.py at toy size: what it lets through, counts, writes and takes up. No speed counts."""

import copy
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vtp
from bench import cases, products, tables
from bench import compare as bench
from vtp.comparison import comparison
from vtp.comparison import runtimes as runtime_module
from vtp.comparison.comparison import relative_error
from vtp.comparison.runtimes import DTYPES, RUNTIMES, Run, Runtime, own_code, prepare_eager
from vtp.machine import RUNTIME_PACKAGES, vector_flags
from vtp.pruning.compact import ConstantBranch
from vtp.timing import standard_error

TOY = "models, toy, batch 1"


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_nobody_slow():
    """Toys gain nothing from threads, and on a busy machine wait for them for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "SLOW_CALL", 1e9)
        patch.setattr(comparison, "MOST_CALLS", 1)  # of a turn
        yield
    torch.set_num_threads(threads)


def named(*names: str, dtypes: tuple[str, ...] = ("float32",)) -> list[Runtime]:
    return [runtime for runtime in RUNTIMES if runtime.name in names and runtime.dtype in dtypes]


OURS = named("ours", "ours (repeat)", dtypes=tuple(DTYPES))
FEW = [*OURS, *named("PyTorch eager", dtypes=tuple(DTYPES))]


def run(out: Path, *arguments: str, using: list[Runtime] = FEW) -> int:
    few = ["--quick", "--rounds", "3", "--seconds", "2", "--threads", "1"]
    return bench.main([*few, "--out", str(out), *arguments], using)


def results(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def cells(printed: str, title: str) -> list[dict[str, str]]:
    """The rows of one Markdown table, by the names of its columns."""
    lines = printed.split(f"{title}:\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def toy() -> comparison.Subject:
    return cases.TOYS["toy"].subject(cases.TOYS["toy"].cut(cases.RATE), 2)


def changed(change, dtype: str = "float32", name: str = "wrong") -> Runtime:
    """A runtime whose logits are those of PyTorch after `change`."""

    def prepare(model: nn.Module, images: Tensor) -> Run:
        right = prepare_eager(model, images, dtype=dtype)
        return lambda: change(right())

    return Runtime(name, dtype, prepare)


def record_of(**runtimes: tuple[str, list[float]]) -> dict:
    """A case with times made up; `_repeat` stands for " (repeat)" in a label."""
    named = {
        f"{name.replace('_repeat', ' (repeat)').replace('_', ' ')}, {dtype}": {
            "dtype": dtype,
            "status": "measured",
            "reason": None,
            "seconds": s,
        }
        for name, (dtype, s) in runtimes.items()
    }
    return {"case": "models", "model": "toy", "batch": 1, "macs": 10**9, "rounds": 4, "runtimes": named}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out.json"
    assert run(out, "--cases", *bench.CASES) == 0
    return out


def test_a_run_measures_every_case_and_writes_it(measured):
    written = results(measured)
    plots = [f"out-{name}.png" for name in ("speed", "throughput", "layers")]
    assert {path.name for path in measured.parent.iterdir()} == {measured.name, *plots}
    assert list(written["cases"]) == [
        TOY, "compilers, toy, blocks 1", "place, toy", "planted, toy", "sweep, toy, batch 1",
        "sweep, toy, batch 2", "heads, toy, batch 1", "training, toy, batch 2", "layers, embed_dim 48",
        "widths, dtype float32", "widths, dtype bfloat16", "rate, size 64",
        "gemm, shape 7x37x61",
    ]  # fmt: skip
    assert {"cpu", "threads", "torch", "date"} <= written["environment"].keys()
    assert written["hardware"]["isa"] == vector_flags()
    assert written["versions"].keys() == set(RUNTIME_PACKAGES)
    assert all({"commit", "modified", "asked", "wall_seconds"} <= r.keys() for r in written["cases"].values())
    for key in (TOY, "place, toy", "compilers, toy, blocks 1"):
        runtimes = written["cases"][key]["runtimes"]
        assert {"ours, float32", "ours (repeat), float32"} <= runtimes.keys()
        for label, runtime in runtimes.items():
            if "Torch-Pruning" in label and runtime["status"] == "absent":
                continue
            assert runtime["status"] == "measured" and runtime["error"] <= runtime["error_bound"], label
            assert len(runtime["seconds"]) == 3
            assert (
                runtime["warm_up_seconds"] and runtime["prepare_seconds"] > runtime["first_call_seconds"] > 0
            )


def test_what_stands_in_place_of_the_compact_model_is_what_it_says():
    model = cases.TOYS["toy"]
    plan = vtp.make_plan(model.gated(), rate=cases.RATE, min_keep=0)
    compact = model.subject(model.cut(cases.RATE), 1)
    entries = cases.in_its_place(model, plan, compact, named("ours", "PyTorch eager"))
    subjects = {label.partition(": ")[0]: subject for label, (_, subject) in entries.items()}
    assert subjects.keys() >= {"padded to 16", "zeros in place", "dense", "dense of the same MACs"}
    for name in ("padded to 16", "padded for SDPA", "zeros in place"):
        with torch.no_grad():
            exact = copy.deepcopy(subjects[name].model).double()(compact.images.double())
        assert relative_error(exact, compact.exact) < 1e-12, name
        assert subjects[name].exact is not compact.exact and torch.equal(subjects[name].exact, compact.exact)
    padded = subjects["padded to 16"].model
    for before, after in zip(compact.model.blocks, padded.blocks, strict=True):
        widths = [*after.attn.value_widths, *after.mlp.fc1.weight.shape, after.attn.qkv.in_features]
        assert all(width % 16 == 0 for width in widths)
        assert after.attn.value_widths == tuple(-(-w // 16) * 16 for w in before.attn.value_widths)
    for block in subjects["padded for SDPA"].model.blocks:
        assert set(block.attn.value_widths) == {plan.head_dim}
    dense_macs = plan.dense_cost.macs
    assert subjects["zeros in place"].macs == subjects["dense"].macs == dense_macs
    assert compact.macs < subjects["padded to 16"].macs < dense_macs
    assert subjects["dense of the same MACs"].macs == pytest.approx(compact.macs, rel=0.05)
    assert not any(runtime.ours for runtime, _ in entries.values()), (
        "only the compact model is what others meet"
    )


def test_the_same_macs_by_torch_pruning():
    pytest.importorskip("torch_pruning")
    gated = cases.TOYS["toy"].gated()
    dense = cases.zeros_in_place(gated, vtp.make_plan(gated, rate=0.0))
    wanted = vtp.make_plan(gated, rate=cases.RATE).cost.macs
    found = cases.torch_pruning(dense, wanted)
    assert vtp.count(found).macs == pytest.approx(wanted, rel=0.05)
    assert vtp.count(dense).macs == vtp.make_plan(gated, rate=cases.RATE).dense_cost.macs, "it is a copy"


def test_a_large_batch_repeats_images_and_all_of_it_is_checked():
    subject = cases.TOYS["toy"].subject(cases.TOYS["toy"].cut(cases.RATE), 2 * cases.IMAGES)
    assert len(subject.images) == len(subject.exact) == 2 * cases.IMAGES
    assert torch.equal(subject.exact[0], subject.exact[cases.IMAGES])

    def wrong(logits: Tensor) -> Tensor:
        return torch.cat([logits[:-1], logits[-1:] * 1.01])

    record, call = comparison.ready(changed(wrong), subject, 60.0)
    assert call is None and record["status"] == "failed"


def test_planted_defects_are_seen(measured):
    record = results(measured)["cases"]["planted, toy"]
    wrong = record["runtimes"][f"{cases.WRONG}, float32"]
    assert wrong["status"] == "failed" and "seconds" not in wrong
    assert bench.failures(results(measured)) == []
    wrong["status"] = "measured"
    assert bench.failures({"cases": {"planted, toy": record}}) == [
        f"planted, toy: {cases.WRONG}, float32: {wrong['reason']}"
    ]
    slow = comparison.slowed(lambda: time.sleep(0.02) or torch.zeros(()), 0.5)
    started = time.perf_counter()
    slow()
    assert time.perf_counter() - started >= 0.03


def test_figures_follow_from_the_raw_times(measured, capsys):
    record = results(measured)["cases"]["sweep, toy, batch 2"]
    assert run(measured, "--markdown") == 0
    printed = capsys.readouterr().out
    row = cells(printed, "Speed-up over the dense model on our engine, of what MACs promise: the share")[2]
    assert [row[key] for key in ("batch", "dtype", "rounds")] == ["2", "float32", "3"]
    dense, cut, again = (
        record["runtimes"][f"{name}, float32"]["seconds"]
        for name in ("dense: ours", "unequal 40%: ours", "unequal 40%: ours (repeat)")
    )
    macs = record["macs"]["dense"] / record["macs"]["unequal 40%"]
    speedup = statistics.median(a / b for a, b in zip(dense, cut, strict=True))
    assert row["dense ms"] == f"{1e3 * statistics.median(dense):.2f}"
    assert row["unequal 40%"].startswith(f"{speedup:.2f}x of {macs:.2f}x: {speedup / macs:.2f} (")
    noise = statistics.median(a / b for a, b in zip(again, cut, strict=True))
    assert row["noise"].startswith(f"{noise:.2f}x (")
    record = results(measured)["cases"]["heads, toy, batch 1"]
    assert record["macs"]["q, k, uniform"] == record["macs"]["v, unequal"] < record["macs"]["dense"]
    row = cells(printed, "The same with nothing but parts of heads at a quarter of their width")[0]
    promised = record["macs"]["dense"] / record["macs"]["q, k, v, unequal"]
    assert f"x of {promised:.2f}x: " in row["q, k, v, unequal"]
    gemm = results(measured)["cases"]["rate, size 64"]
    best = cells(printed, "Rate of a large square product, and inside our engine")[0]
    rates = [
        p.get("flops", 2 * 64**3) / statistics.median(p["seconds"]) / 1e9
        for p in gemm["runtimes"].values()
        if p["status"] == "measured"
    ]
    assert best["GFLOP/s, median"] == f"{max(rates):,.0f}"
    training = results(measured)["cases"]["training, toy, batch 2"]["variants"]
    gated, plain = training["gated"]["seconds"], training["ungated"]["seconds"]
    cost = statistics.median(a / b for a, b in zip(gated, plain, strict=True))
    shown = cells(printed, "Step of sparse training over a step without gates")[0]
    assert shown["gated"].startswith(f"{cost:.2f}x (")
    assert "Measured on" in printed.splitlines()[-1]


def test_the_realised_share_compares_rates_with_the_widest_layer():
    runtimes = {
        f"{w}: ours, float32": {"status": "measured", "seconds": [s]} for w, s in ((10, 2.0), (40, 4.0))
    }
    record = {"case": "layers", "macs": {"10": 100, "40": 400}, "runtimes": runtimes}
    assert tables.realised(record, "ours") == {10: 0.5, 40: 1.0}, "a quarter of the MACs in half of the time"


def test_the_fastest_runtime_of_bfloat16_may_be_of_any_dtype_and_of_float32_not():
    record = record_of(
        ours=("float32", [1.0, 2.0, 1.0, 4.0]),
        eager=("float32", [2.0, 3.0, 2.0, 4.0]),
        quick=("bfloat16", [0.5, 0.5, 0.5, 0.5]),
    )
    record["runtimes"]["ours, bfloat16"] = {**record["runtimes"]["ours, float32"], "dtype": "bfloat16"}
    record["runtimes"]["ours, bfloat16"]["seconds"] = [0.4, 0.5, 0.25, 1.0]
    header, *rows = tables.fastest_table({"cases": {"x": record}})
    single, half = (dict(zip(header, row, strict=True)) for row in rows)
    assert single["fastest runtime"] == "eager, float32" and single["ours ms"] == "1500.00"
    assert single["runtime / ours"] == "1.75x (1.38-2.00)", "ratios 2, 1.5, 2, 1 of the same rounds"
    assert single["p95 ms"] == "4000.00"
    assert half["fastest runtime"] == "quick, bfloat16" and half["runtime / ours"] == "1.12x (0.88-1.44)"
    record["runtimes"]["quick, bfloat16"]["seconds"] = [0.8, 1.0, 0.5, 9.0]  # times ours: 2, 2, 2, 9
    steady = [0.84, 1.05, 0.525, 0.84]  # 2.1, 2.1, 2.1, 0.84, although the median of these times is less
    record["runtimes"]["steady, bfloat16"] = record["runtimes"]["quick, bfloat16"] | {"seconds": steady}
    assert tables.fastest(record, "bfloat16") == "quick, bfloat16"
    del record["runtimes"]["quick, bfloat16"], record["runtimes"]["steady, bfloat16"]
    assert dict(zip(header, tables.fastest_table({"cases": {"x": record}})[2], strict=True))[
        "fastest runtime"
    ] == ("eager, float32")


def test_a_runtime_that_goes_wrong_or_breaks_in_the_rounds_has_no_figure_and_harms_nobody():
    def later(name: str, change) -> Runtime:
        def prepare(model: nn.Module, images: Tensor) -> Run:
            right, calls = prepare_eager(model, images, dtype="float32"), []

            def call() -> Tensor:
                calls.append(None)
                return change(right()) if len(calls) > 20 else right()

            return call

        return Runtime(name, "float32", prepare)

    def breaks(logits: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    subject = toy()
    using = [*named("ours"), later("stale", lambda logits: logits * 5), later("broken", breaks)]
    entries = {runtime.label: (runtime, subject) for runtime in using}
    record = comparison.compare_runtimes(entries, comparison.Budget(rounds=30, warm_up_seconds=0.001))
    assert record["rounds"] == 30 and len(record["runtimes"]["ours, float32"]["seconds"]) == 30
    stale, broken = (record["runtimes"][f"{name}, float32"] for name in ("stale", "broken"))
    assert stale["status"] == broken["status"] == "failed" and not {"seconds"} & (
        stale.keys() | broken.keys()
    )
    assert "relative error 4" in stale["reason"] and broken["reason"] == "RuntimeError: out of memory"


def test_the_standard_error_is_how_far_medians_of_rounds_scatter():
    generator = torch.Generator().manual_seed(0)
    ratios = 1 + 0.03 * torch.randn(2000, 25, generator=generator, dtype=torch.float64)
    medians, ones = ratios.median(dim=1).values, [1.0] * 25
    errors = [standard_error(row.tolist(), ones) for row in ratios]
    assert statistics.mean(errors) == pytest.approx(medians.std().item(), rel=0.1)


@pytest.mark.parametrize("precision, rounds", [(0.02, 10), (0.003, 30)])
def test_rounds_end_when_noise_is_known_and_not_before(monkeypatch, precision, rounds):
    times = {"ours": [1.0], "ours (repeat)": [1.0, 1.03], "PyTorch eager": [1.0, 3.0]}

    def step(self: comparison.Runner) -> None:
        own = times[self.run.name]
        self.outputs = self.run()
        self.seconds.append(own[len(self.seconds) % len(own)])

    def renamed(runtime: Runtime) -> Runtime:
        def prepare(model: nn.Module, images: Tensor) -> Run:
            run = runtime.prepare(model, images)

            def call() -> Tensor:
                return run()

            call.name = runtime.name
            return call

        return dataclasses.replace(runtime, prepare=prepare)

    monkeypatch.setattr(comparison.Runner, "step", step)
    subject = toy()
    entries = {p.label: (renamed(p), subject) for p in named(*times)}
    budget = comparison.Budget(rounds=30, warm_up_seconds=0.001, precision=precision)
    assert comparison.compare_runtimes(entries, budget)["rounds"] == rounds


def test_a_turn_of_short_calls_is_their_median(monkeypatch):
    monkeypatch.setattr(comparison, "MOST_CALLS", 20)

    def runner(usual: float, times: list[float]) -> comparison.Runner:
        found, left = comparison.Runner(lambda: None, warm_up=[usual, 9.0]), iter(times)
        found.call = lambda: next(left)
        found.step()
        assert next(left, None) is None
        return found

    assert runner(0.003, [7.0, 1.0, 5.0, 2.0, 3.0]).seconds == [2.5]  # the first wakes things up
    assert runner(0.2, [7.0, 1.0]).seconds == [1.0]
    assert runner(0.3, [1.0]).seconds == [1.0]
    assert runner(1e-9, [7.0, *[2.0] * 20]).seconds == [2.0]


def test_time_that_a_case_leaves_goes_to_later_ones_by_halves(tmp_path, monkeypatch):
    given = {}

    def measured(name: str, used: float, budget: comparison.Budget, _: dict) -> dict:
        given[name] = budget.seconds
        return {"rounds": 5, "rounds_seconds": used, "runtimes": {}}

    def jobs(*_: object) -> list[bench.Job]:
        budget = comparison.Budget(seconds=10.0)
        used = {"there": 10.0, "quick": 2.0, "noisy": 19.0, "last": 10.0}
        return [
            bench.Job({"case": "models", "model": name}, functools.partial(measured, name, seconds), budget)
            for name, seconds in used.items()
        ]

    monkeypatch.setattr(bench, "jobs", jobs)
    monkeypatch.setattr(bench, "show", lambda *_: None)
    monkeypatch.setattr(bench, "draw", lambda *_: [])
    done = iter([True, False, False, False])
    monkeypatch.setattr(bench, "is_done", lambda *_: next(done))
    assert run(tmp_path / "out.json") == 0
    assert given == {"quick": 15.0, "noisy": 19.0, "last": 14.5}


def test_a_planted_slow_down_that_is_not_seen_is_a_failure():
    record = record_of(
        ours=("float32", [1.0, 1.0, 1.0, 1.0]),
        ours_repeat=("float32", [1.0, 1.0, 1.01, 1.0]),
    ) | {"case": "planted", "asked": {"quick": False}}
    slow = record["runtimes"]["ours, float32"] | {"seconds": [1.1, 1.1, 1.2, 0.9]}
    wrong = {"dtype": "float32", "status": "failed", "reason": "wrong logits"}
    record["runtimes"] |= {f"{cases.SLOWED}, float32": slow, f"{cases.WRONG}, float32": wrong}
    assert bench.failures({"cases": {"x": record}}) == []
    slow["seconds"] = [1.1, 0.9, 1.2, 0.9]
    assert bench.failures({"cases": {"x": record}}) == ["x: a slow-down of 10% was not seen"]


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.0001,
        lambda logits: logits.flip(0),
        lambda logits: logits[:1],
        lambda logits: torch.full_like(logits, torch.nan),
    ],
    ids=["scaled", "images exchanged", "an image short", "not a number"],
)
def test_a_runtime_that_gives_wrong_logits_gets_no_figure(change):
    subject, wrong = toy(), changed(change)
    entries = {runtime.label: (runtime, subject) for runtime in [*named("ours"), wrong]}
    record = comparison.compare_runtimes(entries, comparison.Budget(rounds=2))
    assert record["runtimes"]["ours, float32"]["status"] == "measured"
    found = record["runtimes"]["wrong, float32"]
    assert found["status"] == "failed" and "relative error" in found["reason"]
    assert "seconds" not in found and "warm_up_seconds" not in found


def test_a_failed_runtime_is_shown_with_its_reason_and_never_the_fastest(tmp_path, capsys):
    def broken(model: nn.Module, images: Tensor) -> Run:
        raise RuntimeError("no such operator\nand a long trace")

    def wrong(logits: Tensor) -> Tensor:
        return logits * 2

    using = [
        *named("ours", "PyTorch eager"),
        changed(wrong),
        Runtime("broken", "float32", broken),
    ]
    out = tmp_path / "out.json"
    assert run(out, "--cases", "models", using=using) == 1
    capsys.readouterr()
    assert run(out, "--markdown") == 0
    printed = capsys.readouterr().out
    assert cells(printed, "Fastest runtime over ours")[0]["fastest runtime"] == "PyTorch eager, float32"
    shown = cells(printed, "All runtimes, and how many times ours of the same dtype")
    assert {row["runtime"]: row["toy, batch 1"] for row in shown}["wrong, float32"] == "failed"
    assert "- broken, float32: failed: RuntimeError: no such operator (models, toy, batch 1)" in printed
    assert "- wrong, float32: failed: wrong logits: relative error 1, at most " in printed


def test_a_missing_library_is_shown_with_its_reason(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    without = lambda name: None if name in ("onnxruntime", "openvino") else there(name)  # noqa: E731
    monkeypatch.setattr(runtime_module, "find_spec", without)
    using = [*named("ours"), *named("ONNX Runtime", "OpenVINO", dtypes=tuple(DTYPES))]
    prepared = [dataclasses.replace(p, prepare=None) if not p.ours else p for p in using]
    assert run(tmp_path / "out.json", "--cases", "models", using=prepared) == 0
    printed = capsys.readouterr().out
    assert "ONNX Runtime, float32: absent: " in printed and "pip install 'vtp[bench]'" in printed
    assert "OpenVINO, bfloat16: absent: " in printed
    written = results(tmp_path / "out.json")["cases"][TOY]["runtimes"]
    assert written["ours, float32"]["status"] == "measured"
    assert "openvino" in written["OpenVINO, float32"]["reason"]


@pytest.mark.thorough  # what is exported computes the same in test_export.py
@pytest.mark.parametrize("package, name", [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_an_installed_library_computes_the_compact_model(package, name):
    pytest.importorskip(package)
    (runtime,) = named(name)
    if reason := runtime.unsupported_reason():
        pytest.skip(reason)
    record, call = comparison.ready(runtime, shared_toy(), 120.0)
    assert record["status"] == "measured" and call is not None, record["reason"]


@functools.cache
def shared_toy() -> comparison.Subject:
    """One model, so that it is exported once."""
    return toy()


def test_compiled_models_of_one_class_do_not_recompile_for_each_other():
    torch._dynamo.reset()
    subject = toy()
    calls = [
        torch.compile(own_code(subject.model), dynamic=False, backend="eager", fullgraph=True)
        for _ in range(3)
    ]
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=1):
        for call in calls:
            call(subject.images)
        with torch.compiler.set_stance("fail_on_recompile"):
            for call in calls:
                assert relative_error(call(subject.images), subject.exact) < 1e-5


@pytest.mark.thorough
def test_what_is_measured_is_taken_up_and_fresh_measures_again(measured, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    out.write_text(measured.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(cases, "compare_runtimes", None)
        assert run(out, "--cases", *bench.CASES) == 0
    assert results(out) == results(measured)
    assert f"{TOY}: is in " in capsys.readouterr().out
    content = results(out)
    content["cases"][TOY]["runtimes"]["ours, float32"]["status"] = "unready"
    del content["cases"]["rate, size 64"]
    out.write_text(json.dumps(content))
    assert run(out, "--cases", "models", "sweep") == 0, "a runtime that was not ready gets another chance"
    again = results(out)["cases"]
    assert again[TOY]["runtimes"]["ours, float32"]["status"] == "measured" and "rate, size 64" not in again
    assert again["sweep, toy, batch 1"] == content["cases"]["sweep, toy, batch 1"]
    assert run(out, "--cases", "sweep", "--fresh") == 0
    assert results(out)["cases"].keys() == {"sweep, toy, batch 1", "sweep, toy, batch 2"}


def test_other_options_measure_a_case_again(measured, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(measured.read_text())
    assert run(out, "--cases", "rate", "--rounds", "2") == 0
    assert results(out)["cases"]["rate, size 64"]["rounds"] == 2
    assert results(out)["cases"][TOY] == results(measured)["cases"][TOY]


@pytest.mark.parametrize("again, noisy", [(1.019, False), (1.021, True), (0.979, True)])
def test_a_case_whose_noise_is_too_large_is_measured_again(again, noisy):
    times = {"ours": ("float32", [1.0] * 5), "ours_repeat": ("float32", [again] * 5)}
    asked = {"quick": False}
    record = record_of(**times) | {"asked": asked}
    assert bench.is_done(record, asked) is not noisy
    variants = {name: {"seconds": [2.0, 3.0]} for name in ("ungated", "gated")}
    variants["ungated (repeat)"] = {"seconds": [2 * again, 3 * again]}
    record = {"case": "training", "asked": asked, "variants": variants}
    assert bench.is_done(record, asked) is not noisy
    assert bench.is_done(record | {"asked": {"quick": True}}, {"quick": True})


def test_results_of_another_machine_are_not_mixed_in(measured, tmp_path, capsys):
    out = tmp_path / "out.json"
    content = results(measured)
    content["environment"]["date"] = "2020-01-01"
    assert bench.same_machine(content, results(measured))
    content["environment"]["threads"] += 1
    assert not bench.same_machine(content, results(measured))
    content["environment"]["threads"] -= 1
    content["hardware"]["isa"] = ["avx"]
    out.write_text(json.dumps(content))
    assert run(out) == 2
    assert "is of another machine, other versions or threads" in capsys.readouterr().err
    assert results(out) == content


def test_cases_before_one_that_breaks_are_in_the_file(tmp_path, monkeypatch):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "measure_sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.json", "--cases", "models", "sweep", using=named("ours"))
    assert list(results(tmp_path / "out.json")["cases"]) == [TOY]


def test_a_slow_runtime_leaves_the_rounds_and_larger_cases(monkeypatch):
    monkeypatch.setattr(comparison, "SLOW_CALL", 0.3)

    def slow(logits: Tensor) -> Tensor:
        time.sleep(0.5)
        return logits

    subject, snail = toy(), changed(slow, name="snail")
    entries = {runtime.label: (runtime, subject) for runtime in [*named("ours"), snail]}
    record = comparison.compare_runtimes(entries, comparison.Budget(rounds=2))
    found = record["runtimes"]["snail, float32"]
    assert found["status"] == "slow" and len(found["seconds"]) == 2 and found["times_ours"] > comparison.SLOW
    assert "in 2 calls, then left the rounds" in found["reason"]
    record |= {"case": "models", "model": "toy", "batch": 2, "macs": 100}
    content = {"cases": {"models, toy, batch 2": record}}
    assert tables.fastest(record, "float32") is None
    assert any(f"about {found['times_ours']:.0f}x, 2 calls" in row for row in tables.runtimes_table(content))
    assert cases.too_slow(content, 200) == {}, "it was not measured on less than that"
    skip = cases.too_slow(content, 201)
    assert skip == {"snail, float32": f"{found['times_ours']:.0f} times ours in models, toy, batch 2"}
    never = {snail.label: (dataclasses.replace(snail, prepare=None), subject)}
    assert (
        comparison.compare_runtimes(never, comparison.Budget(), skip)["runtimes"][snail.label]["status"]
        == "skipped"
    )


def test_a_runtime_that_is_not_ready_in_time_is_given_up():
    def prepare(model: nn.Module, images: Tensor) -> Run:
        try:
            time.sleep(30)
        except Exception:  # as a compiler would
            return lambda: images
        raise AssertionError("it was not interrupted")

    never = Runtime("never", "float32", prepare)
    after = dataclasses.replace(never, name="after")
    subject = toy()
    entries = {runtime.label: (runtime, subject) for runtime in [*named("ours"), never, after]}
    record = comparison.compare_runtimes(entries, comparison.Budget(rounds=2, prepare_seconds=0.5))[
        "runtimes"
    ]
    assert record["never, float32"]["status"] == record["after, float32"]["status"] == "unready"
    assert record["ours, float32"]["status"] == "measured"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_limit_that_was_lost_in_a_destructor_comes_again():
    class Slow:
        def __del__(self) -> None:
            time.sleep(0.5)  # what is raised here is printed and forgotten

    with pytest.raises(comparison.OutOfTime), comparison.time_limit(0.2):
        Slow()
        time.sleep(30)


def test_warm_up_goes_on_until_times_settle(monkeypatch):
    def runner(times: list[float]) -> comparison.Runner:
        found, left = comparison.Runner(lambda: None), iter(times)
        monkeypatch.setattr(found, "call", lambda: next(left))
        return found

    cooling = runner([8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    cooling.settle(1e9)
    assert cooling.warm_up == [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], "2, 1, 1 and 1, 1, 1 have one median"
    restless = runner([1.0, 2.0, 4.0, 8.0, 16.0])
    restless.settle(10.0)
    assert restless.warm_up == [1.0, 2.0, 4.0, 8.0]


def test_time_per_mac_is_the_median_over_the_products():
    seconds = {"15": [1e-9, 3e-9, 9e-9], "16": [2.56e-9], "17": [2.89e-8]}
    runtimes = {width: {"status": "measured", "seconds": times} for width, times in seconds.items()}
    macs = {"15": 2250, "16": 2560, "17": 2890}
    record = {"case": "widths", "dtype": "float32", "rounds": 3, "macs": macs, "runtimes": runtimes}
    assert tables.picoseconds_per_mac(record) == pytest.approx({15: 3e3 / 2250, 16: 1.0, 17: 10.0})
    header, row = tables.widths_table({"cases": {"x": record}})
    shown = dict(zip(header, row, strict=True))
    mean = (3e3 / 2250 + 11) / 3
    assert shown["ps per MAC"] == f"{mean:.2f}" and shown["multiples of 16"] == f"{1 / mean:.3f}x"
    assert shown["most"] == f"{10 / mean:.3f}x" and shown["at"] == "17"


def test_a_feed_forward_branch_has_the_widths_asked_for():
    model = products.FeedForward(48, 37, 61, depth=2)
    assert model.macs_per_token == 2 * (37 * 61 + 61 * 48)
    for block in model.vit.blocks:
        assert (block.mlp.fc1.weight.shape, block.mlp.fc2.weight.shape) == ((61, 37), (48, 61))
        assert isinstance(block.attn, ConstantBranch)


def test_quick_times_never_replace_the_results(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--quick"])
    assert "toy sizes must not replace the results" in capsys.readouterr().err


def test_a_foreign_file_is_no_results_file(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[1]")
    assert run(tmp_path / "x.json", "--markdown") == 2
    assert run(tmp_path / "x.json") == 2
    assert capsys.readouterr().err.count("is no results file") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda"], "argument --device: got 'cuda', but PyTorch sees no GPU"),
        (["--dtypes", "bfloat16", "--cases", "models", "sweep"], "expected float32 among them for sweep"),
        (
            ["--markdown", "--device", "cuda", "--cases", "rate"],
            "--cases: on a GPU expected some of",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main([*arguments, "--out", str(tmp_path / "x.json")])
    assert message in capsys.readouterr().err


def test_on_a_gpu_cases_compare_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = bench.parse_arguments(["--device", "cuda"])
    assert options.out.name == "compare-cuda.json"
    named = {job.what["case"] for job in bench.jobs(options, RUNTIMES)}
    assert named == {"models", "compilers", "place", "planted", "sweep", "heads", "training"}
    model = dataclasses.replace(cases.TOYS["toy"], device="cuda")
    on_cpu = functools.partial(cases.Model.subject, cases.TOYS["toy"])
    monkeypatch.setattr(cases.Model, "subject", lambda self, *arguments: on_cpu(*arguments))
    asked = {}
    monkeypatch.setattr(
        cases, "compare_runtimes", lambda entries, *_: asked.update(entries) or {"runtimes": {}}
    )
    cases.measure_place(model, RUNTIMES, comparison.Budget(), {})
    cases.measure_planted(model, RUNTIMES, comparison.Budget(), {})
    assert {runtime.dtype for runtime, _ in asked.values()} <= {"bfloat16", cases.TORCH_PRUNING.dtype}
    assert {"padded for SDPA: PyTorch eager, bfloat16", f"{cases.SLOWED}, bfloat16"} <= asked.keys()
