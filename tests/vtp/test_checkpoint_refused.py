"""vtp.checkpoint: a file that is not whole, not ours, newer or altered is refused with the reason."""

import dataclasses
import json
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vtp
from tests.support.models import TINY, assert_same, image, prepared
from vtp.files import fingerprint


@pytest.fixture(scope="module")
def small():
    model = prepared(TINY)
    return vtp.compact(model, vtp.make_plan(model, rate=0.4))


@pytest.fixture
def saved(small, tmp_path):
    vtp.save(small, tmp_path / "model.safetensors", metadata={"top1": 87.5})
    return tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------- damaged, foreign


def assert_refused(path, message=""):
    """Both readers name the file and the reason; the second only notices what is outside the tensors."""
    with pytest.raises(vtp.FileError, match=message or None) as refusal:
        vtp.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_truncated_file_is_refused_wherever_it_is_cut_off(saved, tmp_path):
    content, cut = saved.read_bytes(), tmp_path / "cut.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    lengths = {0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) - 1}
    lengths |= {generator.randrange(len(content)) for _ in range(40)}
    for length in lengths:
        cut.write_bytes(content[:length])
        assert_refused(cut, "cut off")
        with pytest.raises(vtp.FileError, match="cut off"):
            vtp.read_metadata(cut)


def test_bytes_after_the_end_are_refused(saved):
    with open(saved, "ab") as file:
        file.write(b"x")
    assert_refused(saved)


def test_any_flipped_bit_is_refused(saved, tmp_path):
    content, damaged = saved.read_bytes(), tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(1)
    places = [generator.randrange(header, len(content)) for _ in range(25)]
    places += [generator.randrange(header) for _ in range(60)] + list(range(8)) + [len(content) - 1]
    original = vtp.load(saved)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        damaged.write_bytes(changed)
        try:
            again = vtp.load(damaged)
        except vtp.FileError as error:
            assert str(damaged) in str(error)
        else:  # padding, or the name of the "format" entry: nothing that says anything about the model
            assert place < header
            assert_same(again, original)
            assert again.plan == original.plan


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\0" * 8,
        b"\xff" * 100,
        b"hello world, this is text\n" * 10,
        b"PK\x03\x04" + b"\0" * 100,
        b"{}",
    ],
    ids=["empty", "one-byte", "zeros", "ones", "text", "zip", "json"],
)
def test_foreign_bytes_are_refused(tmp_path, content):
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(content)
    assert_refused(file, "no safetensors file" if content else "is an empty file")


def test_random_bytes_are_refused(tmp_path):
    generator, file = random.Random(0), tmp_path / "noise.safetensors"
    for size in (9, 100, 10_000):
        file.write_bytes(generator.randbytes(size))
        assert_refused(file, "no safetensors file")


def test_header_that_claims_to_be_huge_is_refused_without_reading_it(tmp_path):
    file = tmp_path / "huge.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert_refused(file, "no safetensors file")


def test_safetensors_file_of_others_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}, {"format": "pt", "modelspec.title": "x"}):
        save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors", metadata=metadata)
        assert_refused(tmp_path / "other.safetensors", "is weights alone, expected a model")


class _Planted:
    """Its pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pickle_is_refused_and_never_run(tmp_path, writer, suffix):
    trap, file = tmp_path / "trap", tmp_path / f"model{suffix}"
    with open(file, "wb") as handle:
        if writer == "pickle":
            pickle.dump(_Planted(trap), handle)
        else:
            torch.save(_Planted(trap), handle, _use_new_zipfile_serialization=writer == "torch")
    with open(file, "rb") as handle:
        torch.load(handle, weights_only=False) if writer != "pickle" else pickle.load(handle)
    assert trap.exists()  # the trap works
    trap.unlink()
    # By the ending, or as PyTorch's own zip files are.
    known = suffix == ".pth" or writer == "torch"
    assert_refused(file, "is weights alone, expected a model" if known else "no safetensors file")
    with pytest.raises(vtp.FileError):
        vtp.read_metadata(file)
    with pytest.raises((vtp.PlanError, vtp.FileError)):
        vtp.PruningPlan.load(file)
    assert not trap.exists()


def test_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "none.safetensors", "no file")


def test_folder_in_place_of_a_file_is_refused(tmp_path):
    assert_refused(tmp_path, "is a folder, expected a model")


# ------------------------------------------------------------------------------------------------- tampering


def tamper(path, *, text=None, description=None, tensors=None, rehash=True):
    """Rewrite a file with changes to the description (parsed, or its text) or the tensors."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if description is not None:
        fields = json.loads(header["vtp"])
        description(fields)
        header["vtp"] = json.dumps(fields)
    if text is not None:
        header["vtp"] = text(header["vtp"])
    if tensors is not None:
        tensors(content)
    if rehash:
        header["vtp_sha256"] = fingerprint(content, header["vtp"])
    save_file(content, path, metadata=header)


def test_careful_rewriting_without_a_change_is_accepted(small, saved):
    tamper(saved)
    assert_same(vtp.load(saved), small)


def test_changed_tensor_is_noticed(saved):
    tamper(saved, tensors=lambda t: t["head.bias"][0].add_(1), rehash=False)
    assert_refused(saved, "changed after it was written .*SHA-256")


def test_changed_description_is_noticed(saved):
    tamper(saved, description=lambda d: d["user"].update(top1=99.9), rehash=False)
    assert vtp.read_metadata(saved)["user"] == {"top1": 99.9}  # which does not read the tensors
    assert_refused(saved, "changed after it was written .*SHA-256")


@pytest.mark.parametrize("version", [2, 99, 0, "1", None, [1]])
def test_other_format_version_is_refused_with_both_versions(saved, version):
    tamper(saved, description=lambda d: d.update(format_version=version))
    assert_refused(saved, rf"has format version {re.escape(str(version))}, this vtp reads 1")


@pytest.mark.parametrize(
    "text",
    [
        lambda t: t[:-1],
        lambda t: "",
        lambda t: "[]",
        lambda t: "null",
        lambda t: "1",
        lambda t: "[" * 100_000,
    ],
    ids=["cut", "empty", "list", "null", "number", "deep"],
)
def test_description_that_is_no_json_object_is_refused(saved, text):
    tamper(saved, text=text)
    assert_refused(saved, "description in .* is damaged")


@pytest.mark.parametrize("field", ["kind", "architecture", "plan", "pretrained_cfg", "versions", "user"])
@pytest.mark.parametrize("value", ["missing", 7, "odd", [1]], ids=str)
def test_field_that_is_missing_or_of_another_type_is_refused(saved, field, value):
    tamper(saved, description=lambda d: d.pop(field) if value == "missing" else d.update({field: value}))
    assert_refused(saved)
    if not (field == "kind" and value == "odd"):
        with pytest.raises(vtp.FileError, match=f"is damaged: {field}"):
            vtp.read_metadata(saved)


ARCHITECTURE_FIELDS = [field.name for field in dataclasses.fields(vtp.Architecture)]


@pytest.mark.parametrize("field", ARCHITECTURE_FIELDS)
def test_nonsense_in_the_architecture_is_refused(small, saved, tmp_path, field):
    changed = tmp_path / "changed.safetensors"
    true = dataclasses.asdict(small.plan.architecture)[field]
    for value in (None, "odd", -1, 0, 7, 1.5, [0, 0], [4], {}, True, 10**30):
        if (type(value) is type(true) and value == true) or (field == "depth" and value == 10**30):
            continue
        shutil.copy(saved, changed)
        tamper(changed, description=lambda d, v=value: d["architecture"].update({field: v}))
        try:
            model = vtp.load(changed)
        except vtp.FileError as error:
            assert str(changed) in str(error)
        else:  # another model that the same tensors fit; a value of the wrong kind is never taken
            assert type(value) in (int, float, bool) or (value is None and "None" in str(type_of(field)))
            assert model(image(model)).shape == (2, 10)


def type_of(field):
    return next(each.type for each in dataclasses.fields(vtp.Architecture) if each.name == field)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(kind="dense"),
        lambda d: d.update(kind="gated"),
        lambda d: d.update(kind="larger"),
        lambda d: d.update(plan=None),
        lambda d: d["plan"].update(plan_version=3),
        lambda d: d["plan"]["kept"].update({"blocks.0.mlp.fc1": [0, 99]}),
        lambda d: d["plan"]["kept"].update({"blocks.0.mlp.fc1": [1, 0]}),
        lambda d: d["plan"]["kept"].update({"blocks.0.mlp.fc2": [0]}),
        lambda d: d["plan"]["kept"].pop("blocks.0.mlp.fc2"),
        lambda d: d["plan"].pop("kept"),
        lambda d: d["architecture"].pop("depth"),
        lambda d: d["architecture"].update(depth=3),
        lambda d: d["architecture"].update(num_classes=11),
        lambda d: d["architecture"].update(img_size=[16, 16]),
        lambda d: d["architecture"].update(unknown=1),
    ],
)
def test_tampered_description_with_a_new_hash_is_refused(saved, change):
    tamper(saved, description=change)
    assert_refused(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), r"tensors \['head.bias'\] .* missing"),
        (lambda t: t.update(extra=torch.ones(1)), r"tensors \['extra'\] .* not part of"),
        (
            lambda t: t.update({"head.bias": torch.ones(9)}),
            r"head.bias .* has shape \(9,\), expected \(10,\)",
        ),
        (lambda t: t.update({"head.bias": torch.ones(10, 1)}), r"shape \(10, 1\)"),
        (lambda t: t.update({"head.bias": torch.ones(10, dtype=torch.int64)}), "has dtype torch.int64"),
        (
            lambda t: t["blocks.0.norm1.index"].__setitem__(0, 12),
            r"blocks.0.norm1.index .* not within \[0, 12\)",
        ),
        (
            lambda t: t["blocks.0.norm1.index"].__setitem__(0, -1),
            r"blocks.0.norm1.index .* not within \[0, 12\)",
        ),
        (lambda t: t.update({"blocks.0.norm1.index": t["blocks.0.norm1.index"].int()}), "norm1.index"),
        (lambda t: t.update({"blocks.0.norm1.index": t["blocks.0.norm1.index"].float()}), "norm1.index"),
        (lambda t: t.clear(), "missing"),
    ],
    ids=[
        "missing",
        "extra",
        "short",
        "shape",
        "dtype",
        "index-high",
        "index-low",
        "index-32",
        "index-float",
        "none",
    ],
)
def test_tampered_tensors_with_a_new_hash_are_refused(saved, change, message):
    tamper(saved, tensors=change)
    assert_refused(saved, message)
