"""The accounting of a compact model: counts made by hand, the claims on waste, and the committed file."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to account for")

import vtp
from bench import compact_accounting as bench
from tests.support.models import TINY, build, gated
from vtp.files import FileError
from vtp.runtime.optimize import pack_for_ops
from vtp.runtime.packed import PackedLinear
from vtp_kernels import launching
from vtp_kernels.compact_linear import compact_linear
from vtp_kernels.compact_mlp import compact_mlp
from vtp_kernels.launching import cdiv
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.proofs.roofline import Recorder, total
from vtp_kernels.ragged_attention import ragged_attention
from vtp_kernels.rotary import rotate_heads, rotate_heads_, rotated_attention, rotated_linear


def half(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def recorded(function):
    recorder = Recorder()
    with torch.no_grad(), recorder.noting():
        function()
    return recorder.records


def test_a_linear_layer_moves_padded_rows_and_multiplies_its_tiles():
    M, N, K = 197, 461, 115
    x, weight, bias, residual = half(M, 120)[:, :K], half(N, 120)[:, :K], half(N), half(M, 464)[:, :N]
    (found,) = recorded(lambda: compact_linear(x, weight, bias, residual=residual))
    assert found.dram_bytes == 2 * (M * 120 + N * 120 + N + M * 464 + M * 464)
    # Three tiles of 64 rows and one of 8; three of 128 columns and three of 32, the last rows by 64; K by 16.
    columns, bottom = 3 * 128 + 3 * 32, cdiv(N, 64) * 64
    assert found.flops == 2 * M * N * K
    assert found.tiled_flops == 2 * (3 * 64 * columns + 8 * bottom) * 128


def test_a_product_that_is_split_is_charged_its_partial_sums():
    M, N, K = 64, 192, 4096
    records = recorded(lambda: compact_linear(half(M, K), half(N, K), half(N)))
    parts = records[0].partial_bytes // (4 * M * N)
    assert parts > 1 and [r.partial_bytes for r in records] == [4 * parts * M * N] * 2
    assert records[0].dram_bytes == 2 * (M * K + N * K) + 4 * parts * M * N
    assert records[1].dram_bytes == 4 * parts * M * N + 2 * (N + M * N)


def test_a_norm_reads_whole_rows_and_writes_the_kept_columns():
    x, index = half(197, 768), torch.empty(461, dtype=torch.int64, device="meta")
    (found,) = recorded(lambda: layer_norm_gather(x, None, None, index, 1e-6))
    assert found.dram_bytes == 2 * 197 * (768 + 464) + 8 * 461
    assert found.flops == found.tiled_flops == 0


def test_attention_multiplies_what_its_heads_keep_rounded_up_to_32():
    B, N, d, values = 2, 197, 64, (32, 48)  # start at multiples of 8: nothing of a neighbour comes along
    (found,) = recorded(lambda: ragged_attention(half(B, N, 4 * d + 80), d, values, d**-0.5))
    assert found.flops == 2 * B * N * N * (2 * d + 80)
    assert found.tiled_flops == 2 * B * 208 * 208 * (2 * d + 32 + 64)
    assert found.dram_bytes == 2 * B * N * (4 * d + 80 + 80) + 4 * 2 * 7  # and the table of heads


def test_attention_multiplies_of_each_head_its_own_keys():
    B, N, keys, values = 2, 197, (16, 16, 8), (32, 16, 32)
    arguments = keys, values, 32**-0.5
    (found,) = recorded(lambda: ragged_attention(half(B, N, 160), *arguments))
    assert found.flops == 2 * B * N * N * (40 + 80)
    assert found.tiled_flops == 2 * B * 208 * 208 * (3 * 16 + 3 * 32)
    assert found.dram_bytes == 2 * B * N * (160 + 80) + 4 * 3 * 7
    (equal,) = recorded(lambda: ragged_attention(half(B, N, 2 * 96 + 80), 32, *arguments[1:]))
    assert equal.tiled_flops == 2 * B * 208 * 208 * (3 * 32 + 3 * 32)
    # The queries once for each of 128, 64 and 16 keys, and all keys and values for each of 4 tiles of rows.
    loaded = 3 * 208 * 48 + 4 * 208 * (48 + sum(-(-(w + 8) // 16) * 16 for w in values))
    assert found.tile_bytes - equal.tile_bytes == 2 * B * (loaded - 208 * 96 - 4 * 208 * (96 + 48 + 32 + 48))


def test_a_fused_branch_moves_no_hidden_activation():
    M, K, hidden, N = 64 * 70, 115, 461, 192
    x, fc1, fc2 = half(M, 120)[:, :K], half(hidden, 120)[:, :K], half(N, 464)[:, :hidden]
    (found,) = recorded(lambda: compact_mlp(x, fc1, half(hidden), fc2, half(N), None))
    assert found.dram_bytes == 2 * (M * 120 + hidden * 120 + hidden + N * 464 + N + M * N)
    assert found.flops == 2 * M * hidden * (K + N)
    assert found.tiled_flops == 2 * M * 480 * (128 + 192)


def test_swiglu_reads_both_halves_and_writes_one_between_its_products():
    M, K, hidden, N = 2000, 120, 461, 64
    x, fc1, fc2 = half(M, K), half(2 * hidden, K), half(N, 464)[:, :hidden]
    records = recorded(lambda: compact_mlp(x, fc1, None, fc2, None, None, "swiglu"))
    (found,) = (record for record in records if record.name == "swiglu_fwd")
    assert [record.name for record in records].count("mm") == 2
    assert found.dram_bytes == 2 * M * (928 + 464)  # 922 and 461, rows padded to multiples of 8
    assert found.flops == 0 and sum(record.flops for record in records) >= 2 * M * hidden * (2 * K + N)


def test_swiglu_as_an_epilogue_writes_half_of_what_the_product_makes_and_no_more():
    M, K, hidden = 201, 384, 1536
    x, weight, bias = half(M, K), half(2 * hidden, K), half(2 * hidden)
    (found,) = recorded(lambda: compact_linear(x, weight, bias, activation="swiglu"))
    product = 2 * (M * K + 2 * hidden * (K + 1))
    assert found.dram_bytes == product + 2 * M * hidden
    assert found.flops == 2 * M * 2 * hidden * K
    with launching.forced_path("swiglu", "pass"):
        records = recorded(lambda: compact_linear(x, weight, bias, activation="swiglu"))
    assert [r.name for r in records] == ["compact_linear_fwd", "swiglu_fwd"]
    assert total(records) == found.dram_bytes + 2 * 2 * M * 2 * hidden  # z written and read
    assert records[0].tiled_flops == found.tiled_flops


@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
def test_rotation_as_an_epilogue_moves_the_table_alone(own_tables):
    N, K, H, d = 201, 384, 6, 64
    x, weight = half(1, N, K), half(3 * H * d, K)
    rope = torch.empty(*(H,) * own_tables, N - 5, 2 * d, device="meta")
    arguments = x, weight, None, rope, (d,) * H, 5, True
    (found,) = recorded(lambda: rotated_linear(*arguments))
    (product,) = recorded(lambda: compact_linear(x, weight))
    assert found.dram_bytes - product.dram_bytes == rope.numel() * 4
    assert found.flops == product.flops and found.tiled_flops == product.tiled_flops
    # A tile of 128 columns is of two heads, which find a table that they share in L1 the second time.
    assert found.tile_bytes - product.tile_bytes == 4 * N * 2 * d * (2 * H if own_tables else H)
    with launching.forced_path("rotated_linear", "pass"):
        records = recorded(lambda: rotated_linear(*arguments))
    assert [r.name for r in records] == ["compact_linear_fwd", "rotate_heads"]
    assert total(records) - found.dram_bytes == 8 * H * d * N  # queries and keys read and written again


@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
def test_rotation_in_attention_moves_the_table_alone_and_loads_it_beside_every_key(own_tables):
    B, N, H, d = 128, 201, 12, 64
    qkv = half(B, N, 3 * H * d)
    rope = torch.empty(*(H,) * own_tables, N - 5, 2 * d, device="meta")
    arguments = qkv, (d,) * H, (d,) * H, d**-0.5
    (found,) = recorded(lambda: rotated_attention(*arguments, rope, 5, True))
    (alone,) = recorded(lambda: ragged_attention(*arguments))
    assert found.dram_bytes - alone.dram_bytes == rope.numel() * 4
    assert found.flops == alone.flops and found.tiled_flops == alone.tiled_flops
    # Four tiles of rows load the 208 keys of a head, and each its own queries: what `rotary.py` counts.
    assert found.tile_bytes - alone.tile_bytes == B * H * (208 + 4 * 208) * 2 * d * 4
    (rotation,) = recorded(lambda: rotate_heads_(qkv, rope, (d,) * H, 5, True))
    assert rotation.dram_bytes - rope.numel() * 4 == 8 * H * d * B * N


@pytest.mark.parametrize("own_tables", [False, True], ids=["one-table", "own-tables"])
def test_rotation_moves_queries_and_keys_in_place_and_all_in_a_copy(own_tables):
    B, N, H, d, V = 8, 201, 12, 64, 461
    qkv = half(B, N, 2 * H * d + 464)[..., : 2 * H * d + V]
    rope = torch.empty(*(H,) * own_tables, N - 5, 2 * d, device="meta")
    table = rope.numel() * 4
    (found,) = recorded(lambda: rotate_heads_(qkv, rope, (d,) * H, 5, True))
    assert found.dram_bytes == 8 * H * d * B * N + table
    # Thirteen tiles of 16 tokens, prefix tokens not among them; a table is loaded for two heads or for one.
    rows = B * 13 * 16
    tables = rows * 2 * d * 4 * (H if own_tables else H // 2)
    assert found.tile_bytes == 2 * 2 * H * d * rows + tables + 4 * H * d * B * N
    (copy,) = recorded(lambda: rotate_heads(qkv, rope, (d,) * H, 5, True))
    assert copy.dram_bytes == 2 * 2 * (2 * H * d + 464) * B * N + table
    assert found.flops == copy.flops == 0


def test_operators_of_pytorch_are_counted_without_views_and_outputs_given():
    x, weight, out = half(4, 8), half(8, 8), half(4, 8)
    (found,) = recorded(lambda: torch.mm(x, weight.t(), out=out))
    assert found.dram_bytes == 2 * (32 + 64 + 32) and found.flops == 2 * 4 * 8 * 8
    assert [r.name for r in recorded(lambda: torch.cat([x.detach(), out[:2]]).view(-1) + 1)] == ["cat", "add"]


# ---- a whole model ----


@pytest.fixture(scope="module")
def base():
    return bench.random_model("deit_base_patch16_224", 0.4)


@pytest.mark.parametrize("batch", [1, 8, 128])
def test_a_compact_model_costs_what_it_keeps(base, batch):
    found = bench.account(base, batch)
    kept, packed = found["kept"], found["packed"]
    assert kept["flops"] <= packed["flops"] <= 1.01 * kept["flops"]  # widths are multiples of 8
    assert packed["tiled_flops"] <= 1.06 * kept["flops"] < found["padded"]["flops"]
    # Of many rows GELU is a pass of its own, and so is the residual of the last branch.
    of_many_rows = batch > 5
    moved = packed["dram_bytes"] - packed["partial_bytes"]
    assert moved <= (1.5 if of_many_rows else 1.1) * kept["dram_bytes"]
    assert packed["dram_bytes"] < found["eager"]["dram_bytes"]
    launches = 8 * len(base.blocks) + 1 if of_many_rows else 7 * len(base.blocks)
    assert packed["launches"] == launches
    assert found["folded"]["launches"] == launches - 2 * len(base.blocks)
    for who in ("packed", "eager"):
        layers = [sums[who] for sums in found["layers"].values()]
        assert all(sums["launches"] for sums in layers)
        assert sum(sums["dram_bytes"] for sums in layers) == found[who]["dram_bytes"]

    content = json.loads(bench.RESULTS.read_text())
    assert content["batches"][str(batch)] == json.loads(json.dumps(found)), "run bench/compact_accounting.py"


@pytest.mark.thorough  # one of another run has given the figures of the committed file
def test_the_models_of_every_run_are_one(base):
    again = bench.random_model("deit_base_patch16_224", 0.4)
    assert bench.widths(again) == bench.widths(base)


def test_the_heads_of_the_model_are_unequal(base):
    values = [widths.values for widths in bench.widths(base)]
    assert len({width for each in values for width in each}) > 10


def test_flops_of_the_packed_model_are_those_of_the_compact_one_with_multiples_of_8():
    model = gated(build(TINY, torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.4)).to("meta", torch.bfloat16)
    fast = pack_for_ops(small)
    rows = 2 * small.pos_embed.shape[1]
    linears = [layer for block in small.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    wider = [layer for layer in fast.modules() if isinstance(layer, PackedLinear)]
    assert len(wider) == len(linears)
    more = sum(len(layer.storage) * layer.in_features for layer in wider)
    more -= sum(layer.weight.numel() for layer in linears)
    found = total(bench.launches(fast, bench.PACKED, 2), amount="flops")
    assert more > 0 and found == bench.ideal(small, 2)["flops"] + 2 * rows * more


def test_markdown_has_a_table_of_the_waste_and_one_for_each_batch(capsys):
    assert bench.main(["--markdown"]) == 0
    text = capsys.readouterr().out
    assert text.count("| layer |") == 3 and "predicted" in text


def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "random_model", lambda *_: SimpleNamespace(blocks=[], patch_embed=None))
    monkeypatch.setattr(bench, "account", lambda *_: {})
    monkeypatch.setattr(bench, "widths", lambda _: [])

    def is_full(path, write):
        raise FileError(f"path: cannot write {path}: No space left on device")

    monkeypatch.setattr(bench, "write_atomic", is_full)
    assert bench.main(["--out", str(tmp_path / "a")]) == 2
    assert "error: path: cannot write" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("--batch", "0", "expected an integer of at least 1"),
        ("--rate", "1.2", "argument --rate: got 1.2, expected a share"),
        ("--rate", "nan", "argument --rate: got nan, expected a share"),
        ("--out", "missing/a", "argument --out: got missing/a, expected a file name"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, value, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main([option, value])
    assert says in capsys.readouterr().err


def test_a_model_that_is_unknown_and_a_missing_compiler_are_said(tmp_path, capsys, monkeypatch):
    options = ["--out", str(tmp_path / "a")]
    assert bench.main([*options, "--model", "no_such_model"]) == 2
    assert "argument --model: got 'no_such_model'" in capsys.readouterr().err
    monkeypatch.setattr(bench.launching, "HAS_TRITON", False)
    assert bench.main(options) == 2
    assert "Triton is not installed" in capsys.readouterr().err
