"""`vtp inspect`."""

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

import vtp
from tests.support.command_line import run


def test_inspect_shows_images_and_classes(files, pets, capsys):
    out = inspected(capsys, pets / "model.safetensors")
    assert (
        "images: 1x8x8 (channels, height, width), mean 0.449, std 0.226, center crop of 100.0%, bicubic"
        in out
    )
    assert "classes: 3: dog, cat, ape\n" in out
    out = inspected(capsys, files / "dense.safetensors")
    assert "images: 1x8x8 (channels, height, width); how they are normalised is not known\n" in out
    assert "classes: not known\n" in out


def inspected(capsys, file):
    assert run("inspect", file) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


def test_inspect_shows_a_dense_model(files, capsys):
    out = inspected(capsys, files / "dense.safetensors")
    model = vtp.load(files / "dense.safetensors")
    assert "dense model, format 1, vtp " in out
    assert str(vtp.count(model)) in out
    assert '"embed_dim": 12' in out


def test_inspect_shows_the_gates_of_a_gated_model(files, capsys):
    out = inspected(capsys, files / "gated.safetensors")
    assert "gated model" in out
    for name, layer in vtp.sites(vtp.load(files / "gated.safetensors")).items():
        assert re.search(rf"{re.escape(name)} .* {layer.gate.abs().mean():.4f} ", out)


def test_inspect_shows_the_plan_and_the_notes_of_a_compact_model(files, capsys):
    out = inspected(capsys, files / "compact.safetensors")
    plan = vtp.PruningPlan.load(files / "plan.json")
    assert "compact model" in out
    assert "top1: 87.5" in out
    assert str(plan) in out
    assert plan.parent[:16] in out
    assert f"{(files / 'compact.safetensors').stat().st_size:,} bytes" in out


def test_inspect_shows_a_plan(files, capsys):
    assert inspected(capsys, files / "plan.json").strip() == str(vtp.PruningPlan.load(files / "plan.json"))


def test_inspect_takes_names_and_reads_no_weights(files, tmp_path, capsys, refused):
    small = vtp.load(files / "compact.safetensors")
    vtp.save_pretrained(small, tmp_path / "small")
    for file in (tmp_path / "small").glob("*.safetensors"):
        file.unlink()
    out = inspected(capsys, f"local-dir:{tmp_path / 'small'}")
    assert str(vtp.count(small)) in out and small.plan.parent[:16] in out
    assert str(small.plan).splitlines()[1:] == out.splitlines()[-len(str(small.plan).splitlines()) + 1 :]
    dense = inspected(capsys, "vit_tiny_patch16_224")
    assert "5.72M params" in dense and '"embed_dim": 192' in dense and "classes: 1000" in dense
    assert "0.68M params" in inspected(capsys, "fashion-deit")
    refused("FILE: got 'nonsense', expected 'fashion-deit'", "inspect", "nonsense")
    refused("timm cannot open local-dir:none", "inspect", "local-dir:none")
    refused("timm.models.resnet.ResNet", "inspect", "resnet18")
    refused("no file none.safetensors", "inspect", "none.safetensors")


def test_inspect_shows_statistics_and_tables_of_latencies(files, tmp_path, capsys):
    dense = vtp.load(files / "dense.safetensors")
    statistics = vtp.calibrate(dense, torch.randn(4, 1, 8, 8))
    statistics.save(tmp_path / "statistics.safetensors")
    table = vtp.profile_widths(vtp.describe(dense), seconds=0.01)
    table.save(tmp_path / "table.json")
    out = inspected(capsys, tmp_path / "statistics.safetensors")
    assert out.startswith("statistics of 4 images; changes are KL, measured on 4 of them\n")
    assert f"fingerprint {statistics.parent[:16]}: 2 blocks of width 12, 3 heads\n" in out
    out = inspected(capsys, tmp_path / "table.json")
    assert out.startswith(
        f"time against width for a batch of 1 in float32 on {table.engine}, {table.rounds} "
    )
    assert "of models of width 12 with 3 heads, of any depth\n" in out


def test_inspect_shows_key_widths_where_a_plan_narrows_them(files, tmp_path, capsys):
    model = vtp.load(files / "gated.safetensors")
    vtp.make_plan(model, rate=0.3, key_width=2).save(tmp_path / "plan.json")
    out = inspected(capsys, tmp_path / "plan.json")
    assert "key and value width of each head" in out
    assert re.search(r"^ +0 .* 2/\d 2/\d 2/\d$", out, re.MULTILINE)


def write_foreign(path, kind):
    if kind == "plan.json":
        path.write_text("{}")
    elif kind == "cut.json":
        path.write_text('{"plan_version": 1, "kept"')
    elif kind == "others.safetensors":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "state.safetensors":
        save_file({"a": torch.ones(2)}, path, metadata={"vtp-training-state": '{"version": 1}'})
    elif kind == "broken-state.safetensors":
        save_file({"a": torch.ones(2)}, path, metadata={"vtp-training-state": "{"})
    elif kind == "weights.pth":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("plan.json", r"FILE: .*plan\.json: not a pruning plan"),
        ("cut.json", "not JSON, or it is cut off"),
        (
            "others.safetensors",
            r"FILE: .*is weights alone, expected a model; give the name of the timm model",
        ),
        ("state.safetensors", r"training state in .* is damaged"),
        ("broken-state.safetensors", r"training state in .* is damaged"),
        ("weights.pth", "is weights alone, expected a model"),
        ("empty.safetensors", "is an empty file, .*expected a model"),
    ],
)
def test_inspect_refuses_foreign_files_with_the_reason(tmp_path, refused, kind, message):
    write_foreign(tmp_path / kind, kind)
    refused(message, "inspect", tmp_path / kind)


def test_inspect_refuses_missing_files_folders_and_damaged_files(files, tmp_path, refused):
    refused(r"no file .*none\.safetensors", "inspect", tmp_path / "none.safetensors")
    refused(r"cannot read .*none\.json: No such file", "inspect", tmp_path / "none.json")
    refused(f"FILE: {tmp_path} is a folder, expected a model", "inspect", tmp_path)
    damaged = tmp_path / "damaged.safetensors"
    shutil.copy(files / "compact.safetensors", damaged)
    with open(damaged, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    refused("SHA-256 does not match", "inspect", damaged)
