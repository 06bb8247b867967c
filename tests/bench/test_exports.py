"""bench/exports.py at toy size: what it writes, and what its tables say of a target that refuses."""

import json

import pytest

from bench import exports
from vtp.runtime.export import TARGETS, ExportError


def test_errors_nodes_and_reasons_are_written_and_printed_again(tmp_path, monkeypatch, capsys):
    def refuse(model, path):
        raise ExportError("no such operator")

    toy = {"vit_tiny_patch16_224": {"img_size": 32, "num_classes": 3}}
    monkeypatch.setattr(exports, "MODELS", toy)
    monkeypatch.setattr(exports, "_COUNT", {"pt2": lambda file: {"Attention": int(file.is_file())}})
    monkeypatch.setattr(exports, "_NODES", {"pt2": ("Attention",)})
    targets = {"pt2": TARGETS["pt2"], "executorch": (TARGETS["executorch"][0], refuse)}
    monkeypatch.setattr(exports, "TARGETS", targets)
    out = tmp_path / "out.json"
    assert exports.main(["--out", str(out)]) == 0
    written = json.loads(out.read_text())["models"]
    titles = [f"vit_tiny_patch16_224, {form}" for form in ("dense", "cut", "cut, keys narrowed")]
    assert list(written) == titles
    assert all(0 < found["pt2"]["error"] < 1e-5 for found in written.values())
    capsys.readouterr()
    assert exports.main(["--out", str(out), "--markdown"]) == 0
    printed = capsys.readouterr().out
    error = f"{written[titles[1]]['pt2']['error']:.0e}"
    assert f"| {titles[1]} | {error} | refused: no such operator |" in printed
    assert f"| {titles[1]} | 1 Attention |" in printed


def test_narrowed_keys_are_of_unequal_widths(monkeypatch):
    monkeypatch.setattr(exports, "MODELS", {"vit_tiny_patch16_224": {"img_size": 32}})
    *_, narrowed = exports.models().values()
    assert all(len(set(block.attn.key_widths)) > 1 for block in narrowed.blocks)


@pytest.mark.thorough  # by other means in test_export.py
@pytest.mark.parametrize(
    "kind, count", [("onnx", exports.nodes_in_onnx_runtime), ("openvino", exports.nodes_in_openvino)]
)
def test_nodes_are_those_that_run(tmp_path, monkeypatch, kind, count):
    target, export = TARGETS[kind]
    for package in target.packages:
        pytest.importorskip(package)
    monkeypatch.setattr(exports, "MODELS", {"vit_tiny_patch16_224": {"img_size": 32}})
    small = exports.models()["vit_tiny_patch16_224, cut"]
    export(small, tmp_path / f"model{target.suffix}")
    nodes = count(tmp_path / f"model{target.suffix}")
    fused = {"onnx": "Attention", "openvino": "Subgraph"}[kind]
    assert nodes[fused] == sum(block.attn.num_heads for block in small.blocks)
    assert nodes["Softmax"] == 0
