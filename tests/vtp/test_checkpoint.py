"""vtp.checkpoint: what is saved comes back bit for bit, and a save that fails leaves nothing."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import DropPath
from torch import nn

import vtp
from tests.support.models import TINY, assert_same, build, gated, image
from tests.support.processes import forks

DISTILLED = dataclasses.replace(TINY, distilled=True)


def compacted(model, **settings):
    return vtp.compact(model, vtp.make_plan(model, **(settings or {"rate": 0.4})))


def with_nothing_in(model, *sites):
    """A cut in which these sites (or, written `site/head`, heads) keep nothing."""
    plan = vtp.make_plan(model, rate=0.3)
    kept = dict(plan.kept)
    for site in sites:
        name, _, head = site.partition("/")
        kept[name] = tuple(i for i in kept[name] if head and i // plan.head_dim != int(head))
    return vtp.compact(model, dataclasses.replace(plan, kept=kept))


def round_trip(model, path):
    vtp.save(model, path)
    return vtp.load(path)


@pytest.fixture(scope="module")
def dense():
    return build(dtype=torch.float32)


@pytest.fixture(scope="module")
def model(dense):
    """A gated model with statistics, as sparse training leaves it."""
    model = gated(dense)
    for layer in vtp.sites(model).values():
        layer.taylor.uniform_()
        layer.taylor_steps.fill_(5)
    return model


@pytest.fixture(scope="module")
def small(model):
    return compacted(model)


@pytest.fixture
def saved(small, tmp_path):
    vtp.save(small, tmp_path / "model.safetensors", metadata={"top1": 87.5})
    return tmp_path / "model.safetensors"


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "gated", "compact"])
def test_round_trip_is_bit_equal(kind, dtype, tmp_path):
    model = build(dtype=dtype)
    if kind != "dense":
        model = gated(model)
    if kind == "compact":
        model = compacted(model)
    again = round_trip(model, tmp_path / "model.safetensors")
    assert_same(again, model)
    assert vtp.read_metadata(tmp_path / "model.safetensors")["kind"] == kind


VARIANTS = {
    "distilled": DISTILLED,
    "registers": dataclasses.replace(TINY, reg_tokens=2, no_embed_class=True),
    "map-pool": dataclasses.replace(TINY, class_token=False, global_pool="map"),
    "layer-scale-qk-norm": dataclasses.replace(TINY, init_values=0.1, qk_norm=True),
    "no-biases-relu": dataclasses.replace(TINY, qkv_bias=False, proj_bias=False, act_layer="relu"),
    "dropouts": dataclasses.replace(TINY, drop_rate=0.1, patch_drop_rate=0.2, drop_path_rate=0.3),
    "dynamic-size": dataclasses.replace(TINY, dynamic_img_size=True, img_size=(8, 12)),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_of_a_variant_is_bit_equal_in_all_three_forms(variant, tmp_path):
    model = build(VARIANTS[variant], dtype=torch.float32)
    with_gates = gated(model)
    for each in (model, with_gates, compacted(with_gates)):
        again = round_trip(each, tmp_path / "model.safetensors")
        assert_same(again, each)
        drops = [m.p for m in each.modules() if isinstance(m, nn.Dropout)]
        assert [m.p for m in again.modules() if isinstance(m, nn.Dropout)] == drops


@pytest.mark.parametrize(
    "gone",
    [
        ["blocks.0.attn.proj/1"],
        ["blocks.0.attn.proj/0", "blocks.0.attn.proj/2", "blocks.1.attn.proj/1"],
        ["blocks.0.attn.qkv"],
        ["blocks.1.attn.proj"],
        ["blocks.0.mlp.fc1", "blocks.1.mlp.fc2"],
        [f"blocks.{i}.{site}" for i in (0, 1) for site in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    ],
    ids=["head", "heads", "attention-input", "attention-output", "mlps", "everything"],
)
def test_round_trip_of_dead_heads_and_branches_is_bit_equal(model, gone, tmp_path):
    small = with_nothing_in(model, *gone)
    again = round_trip(small, tmp_path / "model.safetensors")
    assert_same(again, small)
    assert again.plan.kept == small.plan.kept


def test_widths_that_are_kept_whole_come_back(model, tmp_path):
    small = compacted(model, rate=0.0)
    assert small.blocks[0].norm1.index is None
    assert_same(round_trip(small, tmp_path / "model.safetensors"), small)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("pool", [None, "avg", ""])
@pytest.mark.parametrize("kind", ["dense", "gated", "compact"])
def test_head_that_was_replaced_by_timm_comes_back(dense, model, small, kind, pool, classes, tmp_path):
    changed = copy.deepcopy({"dense": dense, "gated": model, "compact": small}[kind])
    changed.reset_classifier(classes, pool)
    again = round_trip(changed, tmp_path / "model.safetensors")
    assert_same(again, changed)
    assert again.num_classes == classes


def test_both_heads_of_a_distilled_model_come_back(tmp_path):
    small = compacted(gated(build(DISTILLED, dtype=torch.float32)))
    small.reset_classifier(4)
    again = round_trip(small, tmp_path / "model.safetensors")
    assert_same(again, small)
    assert again.head_dist.out_features == 4


def test_input_size_that_was_changed_by_timm_comes_back(small, tmp_path):
    changed = copy.deepcopy(small)
    changed.set_input_size((16, 12))
    assert_same(round_trip(changed, tmp_path / "model.safetensors"), changed)


def test_model_with_another_drop_path_than_it_was_cut_with_comes_back(small, tmp_path):
    changed = copy.deepcopy(small)
    changed.blocks[1].drop_path1 = DropPath(0.5).eval()
    assert_same(round_trip(changed, tmp_path / "model.safetensors"), changed)


def test_loaded_gated_model_gives_the_same_plan_and_goes_on_collecting(model, tmp_path):
    again = round_trip(model, tmp_path / "model.safetensors")
    assert vtp.make_plan(again, rate=0.4, score="taylor") == vtp.make_plan(model, rate=0.4, score="taylor")
    layer = vtp.sites(again)["blocks.0.mlp.fc1"]
    layer.gate.grad = torch.ones(12)
    layer.accumulate_taylor()
    assert layer.taylor_steps == 6


def test_loaded_models_are_in_eval_mode_and_trainable(dense, model, small, tmp_path):
    for each in (dense, model, small):
        again = round_trip(copy.deepcopy(each).train(), tmp_path / "model.safetensors")
        assert not any(module.training for module in again.modules())
        again(image(again)).square().sum().backward()
        assert all(p.grad is not None for p in again.parameters())


def test_loaded_model_does_not_depend_on_the_file(small, tmp_path):
    again = round_trip(small, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    file.unlink()
    assert_same(again, small)
    with torch.no_grad():
        again.head.bias.add_(1)


def test_saving_changes_neither_the_model_nor_the_random_state(small, tmp_path):
    changed = copy.deepcopy(small).train()
    before, state = copy.deepcopy(changed.state_dict()), torch.get_rng_state()
    vtp.save(changed, tmp_path / "model.safetensors")
    vtp.load(tmp_path / "model.safetensors")
    assert changed.training
    assert all(torch.equal(before[name], tensor) for name, tensor in changed.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def parts(path):
    """Header and tensors of a safetensors file; the library puts the header in no certain order."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_same_model_gives_the_same_file_in_every_generation(small, tmp_path):
    vtp.save(small, tmp_path / "a")
    vtp.save(small, tmp_path / "b")
    again = round_trip(vtp.load(tmp_path / "b"), tmp_path / "c")
    assert_same(again, small)
    assert parts(tmp_path / "a") == parts(tmp_path / "b") == parts(tmp_path / "c")


def test_weights_that_are_views_come_back(dense, tmp_path):
    changed = copy.deepcopy(dense)
    changed.head.weight = nn.Parameter(torch.randn(12, 40).T[::4])
    assert not changed.head.weight.is_contiguous()
    again = round_trip(changed, tmp_path / "model.safetensors")
    assert torch.equal(again.head.weight, changed.head.weight)
    torch.testing.assert_close(again(image(again)), changed(image(changed)))


# ------------------------------------------------------------------------------------------------- metadata


def test_metadata_describes_the_model_and_holds_what_the_caller_added(small, saved):
    description = vtp.read_metadata(saved)
    assert description["format_version"] == 1
    assert description["kind"] == "compact"
    assert description["user"] == {"top1": 87.5}
    assert description["architecture"]["embed_dim"] == 12
    assert vtp.PruningPlan.from_dict(description["plan"]) == small.plan
    assert description["versions"].keys() == {"vtp", "torch", "timm"}
    assert description["versions"]["timm"] == timm.__version__
    assert vtp.load(saved).plan == small.plan


def test_metadata_of_models_that_were_not_cut_has_no_plan(dense, model, tmp_path):
    for each in (dense, model):
        vtp.save(each, tmp_path / "model.safetensors")
        description = vtp.read_metadata(tmp_path / "model.safetensors")
        assert (description["plan"], description["user"]) == (None, {})


def test_other_tools_can_read_the_tensors(small, saved):
    with safe_open(saved, framework="pt") as file:
        assert set(file.keys()) == set(small.state_dict())
        assert torch.equal(file.get_tensor("head.weight"), small.head.weight)
        assert file.metadata()["format"] == "pt"


def test_timm_configuration_survives_the_cut_and_the_file(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    # timm itself forgets the size that it was asked for.
    expected = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    with_gates = vtp.insert_gates(model)
    for each in (model, with_gates, compacted(with_gates)):
        again = round_trip(each, tmp_path / "model.safetensors")
        assert timm.data.resolve_model_data_config(again) == expected
        assert again.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"
        assert isinstance(again.pretrained_cfg["mean"], tuple)


def test_configuration_values_that_are_no_plain_data_stay_outside(dense, tmp_path):
    changed = copy.deepcopy(dense)
    changed.pretrained_cfg = {"mean": (0.5,), "state_dict": {"a": torch.ones(1)}, "fn": print, "url": None}
    again = round_trip(changed, tmp_path / "model.safetensors")
    assert again.pretrained_cfg == {
        "mean": (0.5,), "url": None, "input_size": (1, 8, 8), "num_classes": changed.num_classes,
    }  # fmt: skip


def test_file_holds_no_pickle(saved):
    header, content = parts(saved)
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert spans[0][0] == 0  # after the JSON header there are tensors, back to back, and nothing else
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert spans[-1][1] == len(content)


@pytest.mark.parametrize(
    "metadata", [{"a": object()}, {"a": {1, 2}}, [1], "x"], ids=["object", "set", "list", "word"]
)
def test_metadata_that_is_no_json_is_refused_before_anything_is_written(small, tmp_path, metadata):
    with pytest.raises(TypeError):
        vtp.save(small, tmp_path / "model.safetensors", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------- models that no file could bring back


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 10))), "head"),
        (lambda m: setattr(m, "head", nn.Linear(12, 4)), "head"),
        (lambda m: setattr(m.blocks[0].mlp, "act", nn.Tanh()), r"blocks\.0\.mlp\.act"),
        (lambda m: setattr(m.blocks[1], "norm1", nn.LayerNorm(12)), r"blocks\.1\.norm1"),
        (lambda m: setattr(m.norm, "eps", 0.5), "norm is LayerNorm"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), "extra"),
        (lambda m: m.register_buffer("extra", torch.ones(1)), "extra"),
    ],
    ids=["head", "classes", "activation", "norm", "eps", "module", "buffer"],
)
@pytest.mark.parametrize("kind", ["dense", "gated", "compact"])
def test_model_with_a_foreign_part_is_refused_instead_of_saved(
    dense, model, small, kind, change, part, tmp_path
):
    changed = copy.deepcopy({"dense": dense, "gated": model, "compact": small}[kind])
    change(changed)
    with pytest.raises(vtp.UnsupportedModelError, match=part if kind == "compact" else None):
        vtp.save(changed, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_model_with_gates_at_some_sites_only_is_refused(dense, tmp_path):
    changed = copy.deepcopy(dense)
    changed.blocks[1].mlp.fc1 = vtp.GatedLinear.from_linear(changed.blocks[1].mlp.fc1)
    with pytest.raises(vtp.UnsupportedModelError, match="a file could not bring back"):
        vtp.save(changed, tmp_path / "model.safetensors")


def test_other_model_is_refused_by_name(tmp_path):
    with pytest.raises(vtp.UnsupportedModelError, match="Linear"):
        vtp.save(nn.Linear(2, 2), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- where to write fails


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_missing_folder_is_refused(small, tmp_path):
    with pytest.raises(vtp.FileError, match=r"cannot write into .*/none: No such file or directory"):
        vtp.save(small, tmp_path / "none" / "model.safetensors")


def test_folder_as_path_is_refused(small, tmp_path):
    with pytest.raises(vtp.FileError, match="is a folder, expected a file name"):
        vtp.save(small, tmp_path)
    assert entries(tmp_path) == []


def _mount(folder, options):
    """Mount a small file system in memory on a folder; skip the test where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")


@pytest.fixture
def disk(tmp_path):
    """A folder that is a disk of 64 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=64k")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["dense", "gated", "compact"])
def test_full_disk_leaves_the_old_file_and_nothing_else(dense, model, small, kind, disk):
    each = {"dense": dense, "gated": model, "compact": small}[kind]
    path = disk / "model.safetensors"
    path.write_text("old")
    (disk / "ballast").write_bytes(bytes(60 * 1024 - 4096))
    with pytest.raises(vtp.FileError, match=r"cannot write .*model\.safetensors: .*No space left on device"):
        vtp.save(each, path)
    assert entries(disk) == ["ballast", "model.safetensors"]
    assert path.read_text() == "old"
    (disk / "ballast").unlink()
    if kind == "compact":
        assert_same(round_trip(each, path), each)


def test_full_disk_leaves_the_old_plan_and_nothing_else(small, disk):
    path = disk / "plan.json"
    path.write_text("old")
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1024)):
            pass
    with pytest.raises(vtp.FileError, match=r"plan\.json: No space left on device|cannot write into"):
        small.plan.save(path)
    assert entries(disk) == ["ballast", "plan.json"]
    assert path.read_text() == "old"


def test_error_of_the_disk_while_writing_tensors_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vtp.checkpoint, "save_file", fail)
    with pytest.raises(vtp.FileError, match=r"cannot write .*model\.safetensors: No space left on device"):
        vtp.save(small, tmp_path / "model.safetensors")
    assert entries(tmp_path) == []


def test_read_only_disk_is_refused(small, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "ro")
    try:
        for save in (lambda path: vtp.save(small, path), small.plan.save):
            with pytest.raises(vtp.FileError, match=r"cannot write into .*/disk: Read-only file system"):
                save(folder / "model")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_folder_without_write_permission_is_refused(small, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/proc")  # permissions do not stop root; this does
        if not folder.is_dir():
            pytest.skip("there is no folder that root cannot write into")
    with pytest.raises(vtp.FileError, match=f"cannot write into {folder}: "):
        vtp.save(small, folder / "model.safetensors")


def save_slowly(path, connection):
    """Run in a process of its own: saves other weights, and stops half-way."""
    real = vtp.checkpoint.save_file

    def slow(tensors, path, metadata):
        real(tensors, path, metadata)
        with open(path, "r+b") as file:
            file.truncate(1000)
        connection.send("writing")
        time.sleep(60)

    model = vtp.load(path)
    nn.init.zeros_(model.head.weight)
    vtp.checkpoint.save_file = slow
    vtp.save(model, path)


def test_kill_in_the_middle_of_a_save_leaves_the_old_file(small, saved):
    context = forks()
    connection, other_end = context.Pipe()
    process = context.Process(target=save_slowly, args=(saved, other_end))
    process.start()
    other_end.close()
    assert connection.recv() == "writing"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_same(vtp.load(saved), small)
    assert_same(round_trip(small, saved), small)


def test_failed_save_leaves_the_old_file(small, saved):
    changed = copy.deepcopy(small)
    changed.head = nn.Linear(3, 4)
    with pytest.raises(vtp.UnsupportedModelError):
        vtp.save(changed, saved)
    assert_same(vtp.load(saved), small)
    assert entries(saved.parent) == ["model.safetensors"]


def test_tied_parameters_are_refused_instead_of_untied(tmp_path):
    model = build(dataclasses.replace(TINY, distilled=True))
    model.head_dist.weight = model.head.weight
    with pytest.raises(
        vtp.UnsupportedModelError, match=r"head_dist\.weight is the same parameter as head\.weight"
    ):
        vtp.save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
