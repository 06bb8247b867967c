"""The accounting of kernels: counts made by hand, sums that must agree, and the claim that gating is free."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to account for")

from torch.utils.flop_counter import FlopCounterMode

from vtp_kernels.launching import Config
from vtp_kernels.proofs import gating_roofline, roofline
from vtp_kernels.proofs.gating_roofline import CHOSEN, LEAST, PARTS, PATHS, PLAIN, extra, step, total

op = importlib.import_module("vtp_kernels.gated_linear")  # the package has a function of that name

MIXED = "bf16+fp32"


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def half(*shape):
    return empty(*shape, dtype=torch.bfloat16)


# M, N, K = 5, 3, 7 in tiles of 4, 2, 4: two tiles along each, so 8, 4, 8 with padding.
SIZES = dict(M=5, N=3, K=7)
TILES = dict(BLOCK_M=4, BLOCK_N=2, BLOCK_K=4)
X, DY, WEIGHT, GATE, BIAS = half(5, 7), half(5, 3), empty(3, 7), empty(7), empty(3)
PARTIAL = empty(2, 7)
UNFOLD = dict(
    product=half(3, 7), weight=WEIGHT, folded=half(3, 7), gate=GATE, dw=WEIGHT, partial=PARTIAL,
    N=3, K=7, rows_per_program=2, FOLDED=True, WEIGHT_GRADIENT=True, GATE_GRADIENT=True,
)  # fmt: skip
DW = dict(dy=DY, x=X, weight=WEIGHT, gate=GATE, dw=WEIGHT, partial=PARTIAL, **SIZES)
FLOPS = (2 * 5 * 3 * 7, 2 * 8 * 4 * 8)

# Kernel, grid, blocks, arguments; bytes with each operand once; bytes loaded by tiles and stored; FLOPs.


def four(**arguments):
    """The arguments of a launch for four linears that are alike."""
    return {f"{name}_{i}": value for i in range(4) for name, value in arguments.items()}


LAUNCHES = {
    "fwd": (
        op._gated_linear_fwd_kernel, (4,), TILES,
        dict(x=X, weight=WEIGHT, gate=GATE, bias=BIAS, y=DY, **SIZES),
        70 + 84 + 28 + 12 + 30, 8 * (32 + 32 + 16) + 4 * 8 + 30, *FLOPS,
    ),
    "dx": (
        op._gated_linear_dx_kernel, (4,), TILES,
        dict(dy=DY, weight=WEIGHT, gate=GATE, x=X, dx=X, partial=PARTIAL, **SIZES),
        30 + 84 + 28 + 70 + 70 + 56, 8 * (16 + 32) + 4 * (16 + 32) + 70 + 56, *FLOPS,
    ),
    "dx without the gate's gradient": (
        op._gated_linear_dx_kernel, (4,), TILES,
        dict(dy=DY, weight=WEIGHT, gate=GATE, x=None, dx=X, partial=None, **SIZES),
        30 + 84 + 28 + 70, 8 * (16 + 32) + 4 * 16 + 70, *FLOPS,
    ),
    "dw": (
        op._gated_linear_dw_kernel, (4,), TILES,
        dict(DW, WEIGHT_GRADIENT=True, GATE_GRADIENT=True),
        30 + 70 + 84 + 28 + 84 + 56, 8 * (16 + 32) + 4 * (32 + 16) + 84 + 56, *FLOPS,
    ),
    "dw without the gate's gradient": (
        op._gated_linear_dw_kernel, (4,), TILES,
        dict(DW, partial=None, WEIGHT_GRADIENT=True, GATE_GRADIENT=False),
        30 + 70 + 28 + 84, 8 * (16 + 32) + 4 * 16 + 84, *FLOPS,
    ),
    "fold": (
        op._fold_kernel, (2, 2), dict(BLOCK_N=2, BLOCK_K=4),
        dict(weight=WEIGHT, gate=GATE, folded=half(3, 7), N=3, K=7),
        84 + 28 + 42, 4 * (32 + 16) + 42, 0, 0,
    ),
    "unfold": (
        op._unfold_kernel, (2, 2), dict(BLOCK_N=2, BLOCK_K=4), UNFOLD,
        42 + 42 + 28 + 84 + 56, 4 * (16 + 16 + 16) + 84 + 56, 0, 0,
    ),
    # Four linears of the same sizes, each in four programs; in the second launch, in two.
    "fold of four": (
        op._fold_gates_kernel, (16,), dict(BLOCK_N=2, BLOCK_K=4),
        four(weight=WEIGHT, gate=GATE, bias=torch.empty(3), folded=half(3, 7), cast=half(3), N=3, K=7),
        4 * (84 + 28 + 12 + 42 + 6), 4 * (4 * (32 + 16) + 2 * 8 + 42 + 6), 0, 0,
    ),
    "unfold of four": (
        op._unfold_gates_kernel, (8,), dict(BLOCK_N=2, BLOCK_K=4),
        four(product=half(3, 7), weight=WEIGHT, gate=GATE, db=half(3), dw=WEIGHT, dg=GATE,
             dbias=torch.empty(3), N=3, K=7),
        4 * (42 + 84 + 28 + 6 + 84 + 28 + 12), 4 * (2 * (32 + 64 + 16) + 8 + 84 + 28 + 12), 0, 0,
    ),
    "gate gradient": (
        op._gate_gradient_kernel, (2,), dict(BLOCK_R=16, BLOCK_K=4),
        dict(partial=PARTIAL, gate=GATE, dg=GATE, rows=2, K=7),
        56 + 28 + 28, 2 * (16 * 16 + 16) + 28, 0, 0,
    ),
}  # fmt: skip


def record(kernel, grid, blocks, arguments, small_gates=False):
    recorder = roofline.Recorder(small_gates)
    recorder.launch(kernel, grid, arguments, Config(blocks, num_warps=4, num_stages=1))
    return recorder.records[0]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_moves_and_multiplies_what_one_counts_by_hand(name):
    *launch, dram_bytes, tile_bytes, flops, tiled_flops = LAUNCHES[name]
    found = record(*launch)
    assert found[2:6] == (dram_bytes, tile_bytes, flops, tiled_flops)


def test_every_kernel_is_counted_by_hand():
    own = {name for name in roofline.KERNELS if hasattr(op, name)}
    assert {launch[0].__name__ for launch in LAUNCHES.values()} == own


def test_with_small_gates_unfold_reads_the_weight_itself():
    launch = LAUNCHES["unfold"][:4]
    assert record(*launch, small_gates=True).dram_bytes - record(*launch).dram_bytes == 84 - 42


def test_a_launch_that_is_not_accounted_for_is_an_error_not_a_gap():
    with pytest.raises(roofline.AccountingError, match="_new_kernel: launched, but not in KERNELS"):
        record(SimpleNamespace(__name__="_new_kernel"), (1,), TILES, {})
    kernel, _, blocks, arguments = LAUNCHES["fwd"][:4]
    with pytest.raises(roofline.AccountingError, match="accounted for 4 programs, launched 5"):
        record(kernel, (5,), blocks, arguments)


# ---- a step ----


def test_the_plain_linear_moves_what_autocast_moves():
    M, N, K = 40, 24, 16
    forward = 6 * N * K + 6 * N + 2 * (M * K + N * K + N + M * N)  # casts of W and b, product
    backward = 2 * 2 * (M * N + N * K + M * K) + 6 * N * K  # two products, cast of dW
    bias = 2 * M * N + 2 * N + 6 * N  # sum, cast of db
    records = step(PLAIN, M, N, K, MIXED)
    assert total(records) == forward + backward + bias
    assert total(records, "db") == bias


@pytest.mark.parametrize("path", PATHS)
def test_flops_are_those_that_pytorch_counts(path):
    M, N, K = 40, 24, 16
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((M, K), (N, K), (N,)))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(x, weight, bias).sum().backward()
    for dtype in gating_roofline.DTYPES:
        assert total(step(path, M, N, K, dtype), amount="flops") == counter.get_total_flops() == 6 * M * N * K


@pytest.mark.parametrize("dtype", gating_roofline.DTYPES)
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_sums_agree_and_no_path_is_below_the_least(batch, dtype):
    block = gating_roofline.account("deit_small", batch, dtype)
    for paths in block.values():
        for path, records in paths.items():
            assert all(r.tile_bytes >= r.dram_bytes and r.tiled_flops >= r.flops for r in records)
            assert total(records) >= total(paths[LEAST])
            assert total(records, amount="flops") == total(paths[LEAST], amount="flops")
            if path != LEAST:
                assert sum(total(records, part) for part in PARTS) == total(records)
                assert sum(extra(paths, path, part) for part in PARTS) == extra(paths, path)
    for path in PATHS:
        assert total(block["block"][path]) == sum(
            total(block[linear][path]) for linear in gating_roofline.LINEARS
        )


@pytest.fixture(scope="module")
def base():
    return gating_roofline.account("deit_base", 128, MIXED)


@pytest.mark.parametrize("path", [CHOSEN, "vendor GEMMs", "fused"])
def test_gating_adds_at_most_one_percent_to_the_bytes_of_a_plain_linear(base, path):
    for linear, paths in base.items():
        assert 100 * extra(paths, path) <= total(paths[PLAIN]) - total(paths[PLAIN], "db"), linear


def test_the_choice_adds_one_read_of_the_folded_weight_and_vectors(base):
    N, K = 4 * 768, 768
    rows = -(-N // op._UNFOLD_ROWS)  # partial sums, written and read; the gate, read three times; dg
    assert extra(base["fc1"], CHOSEN) == 2 * N * K + 4 * K * (2 * rows + 4)
    taken = "forward: fold, _to_copy, addmm; dX: mm; dW: mm, unfold; dg: gate_gradient; db: sum, _to_copy"
    assert gating_roofline.taken(base["fc1"][CHOSEN]) == taken


def test_a_pass_over_the_activations_that_creeps_in_is_counted(base, monkeypatch):
    M, N, K = 128 * 197, 768, 768
    fold = op._launch_fold

    def with_a_copy(*arguments):
        torch.empty((M, K), dtype=torch.bfloat16, device="meta").clone()
        return fold(*arguments)

    monkeypatch.setattr(op, "_launch_fold", with_a_copy)
    paths = base["proj"] | {CHOSEN: step(CHOSEN, M, N, K, MIXED)}
    assert extra(paths, CHOSEN) - extra(base["proj"], CHOSEN) == 2 * 2 * M * K
    assert gating_roofline.percent(paths, CHOSEN) > gating_roofline.CLAIM


def test_the_choice_of_paths_and_the_default_precision_are_as_before_after_a_step():
    chosen = step(CHOSEN, 40, 24, 16, "fp32")
    torch.set_float32_matmul_precision("high")
    try:
        precise = step("fused", 40, 24, 16, "fp32")
        assert chosen == step(CHOSEN, 40, 24, 16, "fp32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precise == step("fused", 40, 24, 16, "fp32")


# ---- the floors, the file, the command ----


def test_a_floor_is_the_longer_of_moving_and_multiplying():
    moving = roofline.Record("", "", 2039 * 10**6, 0, 0, 0, 2)
    multiplying = roofline.Record("", "", 0, 0, 0, 312 * 10**9, 2)
    assert moving.floors()[0] == multiplying.floors()[0] == pytest.approx(1000)  # us on an A100
    assert multiplying._replace(itemsize=4).floors()[0] == pytest.approx(16000)
    assert roofline.floors([moving, multiplying])[0] == 2000


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gating_roofline, "MODELS", {"deit_tiny": 192})
    monkeypatch.setattr(gating_roofline, "BATCHES", (2,))
    monkeypatch.setattr(gating_roofline, "DTYPES", {MIXED: gating_roofline.DTYPES[MIXED]})
    return ["--model", "deit_tiny", "--batch", "2"]


def test_the_file_is_the_same_every_time_one_row_per_line(small, tmp_path, capsys):
    for name in ("a", "b"):
        assert gating_roofline.main([*small, "--out", str(tmp_path / name)]) == 0
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    content = json.loads(text)
    columns, *rows = content["paths"]
    assert len(rows) == 5 * (1 + len(PATHS)) and all(len(row) == len(columns) for row in rows)
    assert len(text.splitlines()) > len(rows) and "predicted, not measured" in content["label"]
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    shown = capsys.readouterr().out
    assert "predicted" in shown and all(path in shown for path in PATHS)


def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing(small, tmp_path, capsys):
    assert gating_roofline.main([*small, "--out", str(tmp_path / "missing" / "a")]) == 2
    assert "error: cannot write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_markdown_is_one_table_that_marks_what_is_above_the_claim(capsys, base):
    assert gating_roofline.main(["--markdown"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") and {row.count("|") for row in rows} == {header.count("|")}
    cells = {row.split(" | ")[0].strip("| "): row for row in rows}
    assert "!" not in cells[CHOSEN] and "!" in cells["naive x * g"]


def test_the_committed_file_is_of_this_code(base):
    content = json.loads(gating_roofline.RESULTS.read_text())
    columns, *rows = content["paths"]
    stored = {tuple(row[:5]): dict(zip(columns, row, strict=True)) for row in rows}
    amounts = ("dram_bytes", "tile_bytes", "flops", "tiled_flops")
    for linear, paths in base.items():
        for path, records in paths.items():
            row = stored["deit_base", MIXED, 128, linear, path]
            now = {amount: total(records, amount=amount) for amount in amounts}
            assert {a: row[a] for a in amounts} == now, "run `python -m vtp_kernels.proofs.gating_roofline`"
