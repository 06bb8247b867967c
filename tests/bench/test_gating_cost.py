"""bench/gating_cost.py at toy size: what it lets through, counts and writes. No speed is asserted."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vtp
from bench import gating_cost as bench
from tests.support import models
from vtp.timing import turns

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Toys gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy(depth: int) -> nn.Module:
    return models.build(dataclasses.replace(models.TINY, depth=depth), torch.float32)


def run(out: Path, *arguments: str, **keywords) -> int:
    few = ["--batch", "2", "--rounds", "2", "--seconds", "2", "--threads", "1", "--device", "cpu"]
    return bench.main([*few, "--out", str(out), *arguments], toy, **keywords)


def results(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def doubled_gate_gradient():
    def make(dense: nn.Module):
        variant = bench.gated(dense)

        def after_backward() -> None:
            variant.after_backward()
            for gate in variant.gates:
                gate.grad.mul_(2)

        return dataclasses.replace(variant, after_backward=after_backward)

    return make


def without_taylor():
    def make(dense: nn.Module):
        variant = bench.gated(dense)

        def l1_alone() -> None:
            for gate in variant.gates:
                gate.grad.add_(gate.detach().sign(), alpha=bench.CONFIG.l1)

        return dataclasses.replace(variant, after_backward=l1_alone)

    return make


def without_penalty():
    return lambda dense: dataclasses.replace(bench.naive(dense), penalty=None)


def not_a_number():
    def make(dense: nn.Module):
        variant = bench.ungated(dense)
        variant.model.norm.weight.data[0] = torch.nan
        return variant

    return make


def one_gate_short():
    def make(dense: nn.Module):
        variant = bench.naive(dense)
        gated = variant.model.blocks[0].mlp.fc1
        plain = nn.Linear(gated.weight.shape[1], gated.weight.shape[0])
        plain.weight, plain.bias = gated.weight, gated.bias
        variant.model.blocks[0].mlp.fc1 = plain
        gates = [gate for gate in variant.gates if gate is not gated.gate]
        penalty = lambda: bench.CONFIG.l1 * sum(gate.abs().sum() for gate in gates)  # noqa: E731
        return dataclasses.replace(variant, gates=gates, penalty=penalty)

    return make


def frozen_weight():
    def make(dense: nn.Module):
        variant = bench.ungated(dense)
        variant.model.blocks[0].attn.qkv.weight.requires_grad_(False)
        return variant

    return make


def test_a_run_measures_every_case_and_writes_it(tmp_path, capsys):
    out = tmp_path / "gating_cost.json"
    assert run(out) == 0
    written = results(out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert {"torch", "timm", "python", "cpu", "threads", "date"} <= written["environment"].keys()
    assert written["hardware"]["flags"].keys() == {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    assert {"commit", "modified"} <= written.keys() and written["arguments"]["rounds"] == 2
    assert [case["dtype"] for case in written["cases"]] == ["float32", "bfloat16"]
    for case in written["cases"]:
        assert case["variants"].keys() == bench.VARIANTS.keys() and case["rounds"] == 2
        for name, record in case["variants"].items():
            assert record["failed"] is None, (case["dtype"], name)
            assert len(record["seconds"]) == 2 and len(record["warm_up_seconds"]) >= 2
            assert record["peak_bytes"] > record["persistent_bytes"] > 0
        again = case["variants"]["ungated (repeat)"]
        assert again["peak_ratio"] == 1, "an equal model has another peak: the count is not exact"
    printed = capsys.readouterr().out
    assert "float32, batch 2, depth 2" in printed and "naive" in printed

    assert run(out, "--markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("|---") and lines[2].startswith("| float32 | 2 | 2 | 2 |")
    assert {line.count("|") for line in lines[:4]} == {12}
    assert "torch" in lines[-1]


@pytest.mark.parametrize(
    "wrong, where",
    [
        (doubled_gate_gradient, ".gate"),
        (without_taylor, ".taylor"),
        (without_penalty, ".gate"),
        (one_gate_short, "blocks.0.mlp.fc1.gate"),
        (frozen_weight, "blocks.0.attn.qkv.weight"),
        (not_a_number, ""),
    ],
)
def test_a_variant_that_computes_something_else_gets_no_figure(wrong, where):
    variants = {"ungated": bench.ungated, "gated": wrong()}
    case = bench.Case("float32", 2, 1)
    record = bench.measure(case, toy, device=CPU, rounds=1, seconds=1.0, variants=variants)
    assert record["variants"]["gated"].keys() == {"failed", "error", "error_at"}
    assert where in record["variants"]["gated"]["failed"]
    assert record["variants"]["ungated"]["seconds"]


def test_a_failed_variant_is_reported_as_failed_everywhere(tmp_path, capsys):
    out = tmp_path / "out.json"
    variants = {**bench.VARIANTS, "gated": doubled_gate_gradient()}
    assert run(out, "--dtype", "float32", variants=variants) == 1
    printed = capsys.readouterr()
    assert "float32, batch 2: gated failed: blocks." in printed.err
    gated = next(line for line in printed.out.splitlines() if line.strip().startswith("gated"))
    assert gated.split()[1:5] == ["-", "failed", "-", "-"]
    assert results(out)["cases"][0]["variants"]["gated"]["error"] == pytest.approx(1, abs=1e-3)

    assert run(out, "--markdown") == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert cells.count("failed") == 2 and cells[6] == "failed" and cells[10] == "failed"


def test_gated_is_measured_with_all_that_sparse_training_does():
    variant = bench.gated(toy(1))
    trainee = bench.Trainee(variant, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), "float32")
    trainee.step()
    layers = vtp.sites(variant.model).values()
    assert all(layer.taylor_steps == 1 and layer.taylor.any() for layer in layers)
    groups = trainee.optimizer.param_groups
    assert [id(p) for p in groups[-1]["params"]] == [id(layer.gate) for layer in layers]
    assert groups[-1]["weight_decay"] == 0


def test_naive_gates_the_activation():
    linear = nn.Linear(3, 2)
    gated = bench.NaiveGatedLinear(linear)
    gated.gate.data = torch.tensor([2.0, 0.0, -1.0])
    x = torch.randn(4, 3)
    expected = F.linear(x * torch.tensor([2.0, 0.0, -1.0]), linear.weight, linear.bias)
    assert torch.equal(gated(x), expected)


def test_peak_is_that_of_the_sequence_of_allocations():
    def sequence() -> None:
        a = torch.empty(1_000, dtype=torch.uint8)  # live 1,000
        b = torch.empty(50_000, dtype=torch.uint8)  # 51,000
        del a  # 50,000
        c = torch.empty(3_000, dtype=torch.float32)  # 62,000: the peak
        del b  # 12,000
        d = torch.empty(30_000, dtype=torch.uint8)  # 42,000
        del c, d

    assert bench.peak_rise(sequence, CPU) == 62_000
    assert bench.peak_rise(sequence, CPU) == 62_000, "what an earlier profile counted is counted again"


def test_peak_includes_what_an_operator_frees_before_it_returns():
    logits, targets = torch.randn(64, 1_000), torch.zeros(64, dtype=torch.int64)
    # log-probabilities within the operator, the loss and the sum of the class weights, float32
    assert bench.peak_rise(lambda: F.cross_entropy(logits, targets), CPU) == 4 * (64 * 1_000 + 2)


def test_peak_includes_the_backward_pass():
    weight = torch.ones(1_000, requires_grad=True)
    # exp(w), the incoming gradient and, while both live, their product
    assert bench.peak_rise(lambda: weight.exp().backward(torch.ones(1_000)), CPU) == 3 * 4 * 1_000
    assert weight.grad is not None


def test_persistent_bytes_count_what_lives_between_steps_once():
    model = nn.Linear(3, 5)  # 20 parameters
    model.register_buffer("alias", model.weight.detach())  # the same memory
    model.register_buffer("steps", torch.zeros(2, dtype=torch.int64))  # 16 bytes
    images, targets = torch.randn(2, 3), torch.tensor([0, 1])  # 24 and 16 bytes
    trainee = bench.Trainee(bench.Variant(model), images, targets, "float32")
    assert bench.persistent_bytes(trainee) == 4 * 20 + 16 + 24 + 16
    trainee.step()  # gradients, two moments and, for each of two parameters, a step count of 4 bytes
    assert bench.persistent_bytes(trainee) == 4 * 4 * 20 + 2 * 4 + 16 + 24 + 16


def test_ratios_are_taken_within_rounds():
    reference = [1.0, 10.0, 2.0, 4.0, 5.0]
    own = [1.5, 10.0, 4.0, 5.0, 5.5]  # ratios 1.5, 1, 2, 1.25, 1.1
    assert bench.pairwise_ratio(own, reference) == pytest.approx({"median": 1.25, "q1": 1.1, "q3": 1.5})
    assert bench.pairwise_ratio([3.0], [2.0]) == {"median": 1.5, "q1": 1.5, "q3": 1.5}
    with pytest.raises(ValueError, match="zip"):
        bench.pairwise_ratio([1.0, 2.0], [1.0])


def test_every_round_has_every_variant_and_all_follow_all():
    names = list(bench.VARIANTS)
    orders = [turns(names, number) for number in range(60)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert orders == [turns(names, number) for number in range(60)], "another run has the same"
    assert {order[0] for order in orders} == set(names)
    followed = {pair for order in orders for pair in itertools.pairwise(order)}
    assert followed == set(itertools.permutations(names, 2))


class Clock:
    """Stands for a trainee; a step takes `seconds` of a clock that nobody waits for."""

    now = 0.0

    def __init__(self, seconds: float) -> None:
        self.seconds = [seconds, seconds]

    def step(self) -> None:
        Clock.now += self.seconds[0]
        self.seconds.append(self.seconds[0])


@pytest.mark.parametrize("budget, rounds", [(1e9, 15), (1.0, 5), (80.0, 8), (79.0, 7)])
def test_rounds_fit_the_budget_but_are_enough_for_quartiles(monkeypatch, budget, rounds):
    monkeypatch.setattr(bench.time, "perf_counter", lambda: Clock.now)
    trainees = {name: Clock(2.5) for name in bench.VARIANTS}  # a round takes 10 s
    assert bench.take_turns(trainees, 15, budget) == rounds
    assert all(len(trainee.seconds) == 2 + rounds for trainee in trainees.values())


def test_rounds_end_when_enough_are_precise(monkeypatch):
    monkeypatch.setattr(bench.time, "perf_counter", lambda: Clock.now)
    asked = []

    def precise(done: int) -> bool:
        asked.append(done)
        return done == 12

    assert bench.take_turns({"one": Clock(1.0)}, 15, 1e9, precise) == 12 and asked == [10, 11, 12]


def test_warm_up_goes_on_until_steps_settle():
    class Cooling(Clock):
        def step(self) -> None:
            self.seconds.append(max(1.0, self.seconds[-1] / 2))

    hot, cold = Cooling(8.0), Cooling(1.0)
    hot.seconds[0] = 20.0
    bench.warm_up({"hot": hot, "cold": cold}, 60.0)
    assert hot.seconds == [20.0, 8.0, 4.0, 2.0, 1.0, 1.0] and len(cold.seconds) == 6
    hot.seconds.append(5.0)
    bench.warm_up({"hot": hot}, 0.0)  # no time left
    assert hot.seconds[-1] == 5.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "argument --rounds: got '0', expected an integer of at least 1"),
        (["--batch", "16", "x"], "argument --batch: got 'x', expected an integer of at least 1"),
        (["--depth", "1.5"], "argument --depth: got '1.5', expected an integer of at least 1"),
        (["--threads", "-1"], "argument --threads: got '-1', expected an integer of at least 1"),
        (["--seconds", "nan"], "argument --seconds: got 'nan', expected a positive number"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--out", "missing/x.json"], "argument --out: got missing/x.json, expected a file name in a folder"),
        (["--out", "."], "argument --out: got ., expected a file name"),
        (["--markdown", "--out", "x.json"], "argument --out: x.json is not there; run without --markdown"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_foreign_file_is_no_results_file(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[1]")
    assert run(tmp_path / "x.json", "--markdown") == 2
    assert "is no results file" in capsys.readouterr().err
