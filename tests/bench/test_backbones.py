"""bench.backbones: everything that is promised of a backbone, for timm's models by their names."""

import json

import pytest

from bench import backbones
from bench.backbones import (
    ALIKE,
    CHECKS,
    MODELS,
    REFUSED,
    TRANSFORMERS,
    BrokenPromiseError,
    check_pruned,
    refusal,
    toy,
)
from vtp.runtime.export import TARGETS

WITHOUT_RUNTIMES = [column for column in CHECKS if column not in TARGETS]


@pytest.mark.parametrize("name", [name for name in (*MODELS, *TRANSFORMERS) if name not in ALIKE])
def test_every_promise_holds(name, tmp_path):
    """Of timm's models with all their traits but widths and third blocks, which take the time."""
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
        every_promise_holds(toy(name), tmp_path)
    else:
        depth = min(MODELS[name].get("depth", 2), 2)
        every_promise_holds(toy(name, embed_dim=128, num_heads=2, depth=depth), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_every_promise_holds_at_the_width_of_the_table(name, tmp_path):
    every_promise_holds(toy(name), tmp_path)


def every_promise_holds(model, folder):
    small = check_pruned(model)
    for column in WITHOUT_RUNTIMES:
        CHECKS[column](small, folder)


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*MODELS, *TRANSFORMERS])
def test_every_runtime_computes_the_same(name, target, tmp_path):
    for package in (*TARGETS[target][0].packages, *(["transformers"] if name in TRANSFORMERS else [])):
        pytest.importorskip(package)
    CHECKS[target](check_pruned(toy(name)), tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(name):
    assert refusal(name)


def test_a_supported_model_is_not_called_refused():
    with pytest.raises(BrokenPromiseError, match="is not refused"):
        refusal("deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("part", "message"),
    [("compact", "not exact"), ("count", "counted"), ("insert_gates", "gates of 1"), ("expand", "expanded")],
)
def test_a_broken_promise_is_seen(part, message, monkeypatch):
    honest = getattr(backbones.vtp, part)

    def broken(*arguments, **keywords):
        result = honest(*arguments, **keywords)
        if part == "count":
            return None
        result.blocks[0].attn.proj.bias.data[0] += 1e-3
        return result

    monkeypatch.setattr(backbones.vtp, part, broken)
    with pytest.raises(BrokenPromiseError, match=message):
        check_pruned(toy("vit_tiny_patch16_224"))


def test_the_command_writes_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "MODELS", {"vit_tiny_patch16_224": {"img_size": 32, "depth": 1}})
    monkeypatch.setattr(backbones, "TRANSFORMERS", {})
    monkeypatch.setattr(backbones.timm, "list_models", lambda module: ["test_vit", "test_vit4"])
    monkeypatch.setattr(backbones, "REFUSED", ("vit_base_patch16_rpn_224",))
    for target in TARGETS:
        monkeypatch.setitem(CHECKS, target, lambda small, folder: "works")
    out = tmp_path / "backbones.json"
    assert backbones.main(["--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert set(content["models"]["vit_tiny_patch16_224"]) == {"prune", *CHECKS}
    assert content["names"] == ["test_vit", "test_vit", "test_vit"]  # the other one has RMSNorm
    assert "ResPostBlock" in content["refused"]["vit_base_patch16_rpn_224"]
    capsys.readouterr()
    assert backbones.main(["--out", str(out), "--markdown"]) == 0
    assert "| vit_tiny_patch16_224 | works | works |" in capsys.readouterr().out
