"""`vtp bench` and `vtp export`."""

import json
import re
import shutil
from importlib.metadata import version

import pytest
import torch

import vtp
from tests.support.command_line import run
from vtp.comparison import own_model


def bench(*arguments):
    return run("bench", *arguments, "--rounds", 3, "--seconds", 0.1, "--threads", 1)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("ours", "ours (repeat)", "PyTorch eager"), id="ours-and-eager"),
        pytest.param(None, id="all", marks=pytest.mark.thorough),  # exports to ONNX
    ],
)
def test_bench_times_a_compact_model_and_says_whether_pruning_paid(
    files, names, tmp_path, monkeypatch, capsys
):
    chosen = [runtime for runtime in own_model.RUNTIMES if names is None or runtime.name in names]
    monkeypatch.setattr(own_model, "RUNTIMES", chosen)
    assert bench(files / "compact.safetensors", "--json", tmp_path / "times.json") == 0
    printed = capsys.readouterr().out
    assert re.search(r"PyTorch eager, float32 .*\n dense: ours, float32 ", printed, re.DOTALL)
    assert re.search(
        r"^ours, float32: pruning .* fewer MACs, .* the speed of the dense model", printed, re.MULTILINE
    )
    written = json.loads((tmp_path / "times.json").read_text())
    assert {"environment", "hardware", "file", "models"} <= written.keys()
    assert written["file"] == "compact.safetensors"
    for label in (
        "ours, float32",
        "ours (repeat), float32",
        "PyTorch eager, float32",
        "dense: ours, float32",
    ):
        runtime = written["models"]["runtimes"][label]
        assert runtime["status"] == "measured" and len(runtime["seconds"]) >= 3
        assert runtime["error"] <= runtime["error_bound"]


def test_bench_refuses_bad_input_before_it_measures(files, tmp_path, refused, monkeypatch, capsys):
    compact, profile = files / "compact.safetensors", ("bench", "deit_tiny_patch16_224", "--profile-widths")
    refused(
        r"MODEL: .*gated.safetensors is a gated model, expected a compact model; `vtp prune ",
        "bench",
        files / "gated.safetensors",
    )
    refused("no file", "bench", tmp_path / "missing.safetensors")
    refused("--json: .*cannot write", "bench", compact, "--json", tmp_path / "missing" / "times.json")
    refused("--json: .*is a folder", "bench", compact, "--json", tmp_path)
    refused("--json, --compile: without effect", *profile, "--compile")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "file"))
    refused("cache: cannot make", *profile)
    with pytest.raises(SystemExit):
        run("bench", compact, "--threads", 100_000)
    assert "argument --threads: got 100000, expected at most" in capsys.readouterr().err


@pytest.mark.thorough  # each step of it has a test of its own
def test_profiled_widths_give_a_plan_for_a_latency(files, tmp_path, monkeypatch, refused, capsys):
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "small.safetensors"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        refused("--latency-ms: there is no latency table", "prune", files / "gated.safetensors",
                "--latency-ms", 1, "--out", out)  # fmt: skip
        assert bench(files / "gated.safetensors", "--profile-widths") == 0
        printed = capsys.readouterr().out
        dense = float(re.search(r"the dense model takes (\S+) ms", printed)[1])
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
        assert run("prune", files / "gated.safetensors", "--latency-ms", 2 * dense + 1, "--out", out) == 0
        assert vtp.load(out).plan.rate == 0, "the dense model meets it"
    finally:
        torch.set_num_threads(threads)


def test_bench_takes_a_model_with_narrow_queries_and_keys(files, tmp_path, monkeypatch, capsys):
    chosen = [runtime for runtime in own_model.RUNTIMES if runtime.name in ("ours", "PyTorch eager")]
    monkeypatch.setattr(own_model, "RUNTIMES", chosen)
    monkeypatch.setattr(own_model, "PAID", 1e9)
    model = vtp.load(files / "gated.safetensors")
    small = vtp.compact(model, vtp.make_plan(model, rate=0.2, key_width=2), images=torch.randn(8, 1, 8, 8))
    vtp.save(small, tmp_path / "narrow.safetensors")
    assert bench(tmp_path / "narrow.safetensors") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ours, float32: .* the speed of the dense model", printed, re.MULTILINE)
    assert "keys 2" in " ".join(printed.split())


def test_export_writes_a_checked_file_and_shows_it_beside_the_dense_one(files, tmp_path, capsys):
    out = tmp_path / "small.pt2"
    arguments = ("--to", "pt2", "--out", out, "--seconds", 0.01, "--batch", 3, "--data", files / "images")
    assert run("export", files / "compact.safetensors", *arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(
        rf"wrote {out}: [\d,]+ bytes; relative error \d.\de-\d+ against float64, .* of images", printed
    )
    assert f"torch.export {version('torch')}, float32" in printed and "ms, batch 3" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if "MB" in line}
    assert list(rows) == ["dense", "compact"] and rows["dense"][-1] == "1.00x"
    assert "speed: median of the ratios of two times of one round" in printed
    assert rows["compact"][2:4] == [f"{out.stat().st_size / 1e6:.2f}", "MB"]
    small = vtp.load(files / "compact.safetensors")
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(out).module()(x), small(x))


def test_export_of_a_dense_model_lies_beside_its_file_and_checks_on_the_embedded_data(
    files, tmp_path, capsys
):
    shutil.copy(files / "dense.safetensors", tmp_path / "dense.v2.safetensors")
    assert run("export", tmp_path / "dense.v2.safetensors", "--to", "pt2", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'dense.v2.pt2'}: " in printed and "images of fashion-mnist" in printed
    assert "dense  " not in printed  # nothing to compare with
    assert torch.export.load(tmp_path / "dense.v2.pt2").module()(
        torch.zeros(1, 1, 8, 8).bfloat16()
    ).shape == (1, 2)


def test_export_refuses_bad_input_and_leaves_no_file(files, tmp_path, refused, monkeypatch):
    small, out = files / "compact.safetensors", ("--out", tmp_path / "out")
    refused(
        "--opset: ONNX alone has one, got it with --to pt2",
        "export",
        small,
        "--to",
        "pt2",
        "--opset",
        20,
        *out,
    )
    refused(
        "MODEL: .*gated.safetensors is a gated model, expected a dense model or a compact model; `vtp prune ",
        "export",
        files / "gated.safetensors",
        "--to",
        "pt2",
        *out,
    )
    refused("--out: cannot write into", "export", small, "--to", "pt2", "--out", tmp_path / "missing" / "out")
    refused("no such folder|expected", "export", small, "--to", "pt2", "--data", tmp_path / "missing", *out)
    monkeypatch.setattr("vtp.runtime.export.checked.find_spec", lambda name: None)
    refused(
        r"--to: export for OpenVINO needs openvino: pip install 'vtp\[openvino\]'",
        "export",
        small,
        "--to",
        "openvino",
        *out,
    )
    monkeypatch.undo()
    monkeypatch.setattr("vtp.runtime.export.pt2.exported", lambda *_: 1 / 0)
    refused("torch.export cannot convert it", "export", small, "--to", "pt2", *out)
    assert not list(tmp_path.iterdir())


def test_bench_names_the_branches_where_time_is_lost(files, monkeypatch, capsys):
    monkeypatch.setattr(
        own_model, "RUNTIMES", [p for p in own_model.RUNTIMES if p.name in ("ours", "PyTorch eager")]
    )
    monkeypatch.setattr(own_model, "PAID", 1e9)  # a share that no cut reaches
    assert bench(files / "compact.safetensors") == 0
    printed = capsys.readouterr().out
    assert "Where our engine loses most of what MACs promise" in printed
    assert re.search(r"blocks\.\d+\.(attn|mlp) .* (into fc1|into qkv)", printed)
