"""Triton's cache for a run: what was compiled ahead is found by launches, also after the folder was moved."""

import functools
import importlib.util
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: there is nothing to compile kernels with", allow_module_level=True)

from bench.gpu import cache
from bench.gpu.table import _cache_line
from tests.support.processes import forks
from tests.support.stand_in_driver import gpu, launch
from vtp_kernels import launching
from vtp_kernels.compact_linear import compact_linear
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.library import TritonSides


def call() -> None:
    """A norm and a product that loads by descriptor, on meta tensors."""
    x = torch.empty(64, 768, dtype=torch.bfloat16, device="meta")
    index = torch.empty(461, dtype=torch.int64, device="meta")
    weight = torch.empty(768, 464, dtype=torch.bfloat16, device="meta")[:, :461]
    kept = layer_norm_gather(x, None, None, index, 1e-6)
    compact_linear(kept, weight, None, activation="gelu")


@pytest.fixture(scope="module")
def names():
    """Of what `call` launches, in the list of what a run needs."""
    with launching.recording("", cache.TARGET) as found, TritonSides(), torch.inference_mode():
        call()
    keys = {variant.key() for variant in found.values()}
    chosen = [name for name, variant in cache.needed(cache.TARGET).items() if variant.key() in keys]
    assert len(chosen) == len(keys) == 2
    return chosen


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


@pytest.fixture(scope="module")
def filled(names, tmp_path_factory):
    """A cache with these two, as it was filled."""
    folder = tmp_path_factory.mktemp("cache") / "here"
    folder.mkdir()
    # Processes that need not import PyTorch and Triton first, in the environment of spawned ones.
    context = forks()
    environment = {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    pool = functools.partial(cache.ProcessPoolExecutor, initializer=set_environment, initargs=(environment,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.multiprocessing, "get_context", lambda method: context)
        patch.setattr(cache, "ProcessPoolExecutor", pool)
        patch.setenv("TRITON_CACHE_DIR", "")  # and as before after the test
        patch.setenv("TRITON_STORE_BINARY_ONLY", "")
        record = cache.fill(folder, 1, names)
    assert (record["compiled"], record["found"], record["failed"]) == (2, 0, {})
    return folder


def launches(monkeypatch) -> list[bool]:
    """Of every kernel that `call` loads on its real way to a GPU, whether Triton's cache had it."""
    for module in ("compact_linear", "layer_norm_gather"):
        for name, kernel in vars(importlib.import_module(f"vtp_kernels.{module}")).items():
            if name.endswith("_kernel"):  # nothing that this process has loaded already
                monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    assert launching.unsound_assembler() is None  # asked before the first launch on such a GPU, as it chooses
    with (
        gpu(cache.TARGET),
        launching.recording("", cache.TARGET, launch),
        TritonSides(),
        torch.inference_mode(),
        cache.compilations_noted() as noted,
    ):
        call()
    return noted


def repacked(filled, tmp_path, without: str):
    """The packed cache again, without the files that match a pattern."""
    folder = tmp_path / "less"
    shutil.unpack_archive(cache.packed(filled), folder)
    for file in folder.glob(without):
        file.unlink()
    return shutil.make_archive(str(tmp_path / "less"), "gztar", folder)


def test_a_cache_that_was_moved_is_hit_by_every_launch(filled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    elsewhere = filled.rename(filled.with_name("elsewhere"))  # whose paths are noted in what was packed
    try:
        made = cache.take_over(cache.packed(filled), tmp_path / "there")
        assert made["target"] == "sm_90" and made["kernels"] == 2 and {"commit", "versions"} <= made.keys()
        assert launches(monkeypatch) == [True, True]
        assert sorted({file.suffix for file in (tmp_path / "there").rglob("*.*")}) == [".cubin", ".json"]
    finally:
        elsewhere.rename(filled)


def test_without_its_kernels_a_launch_compiles_and_is_counted(filled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    archive = repacked(filled, tmp_path, "*/__grp___layer_norm*")
    cache.take_over(Path(archive), tmp_path / "there")
    assert sorted(launches(monkeypatch)) == [False, True]


@pytest.mark.thorough
def test_what_is_missing_is_compiled_and_counted_and_what_does_not_compile_named(
    names, filled, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    archive = repacked(filled, tmp_path, "*/__grp___layer_norm*")
    cache.take_over(Path(archive), tmp_path / "there")
    record = cache.complete(1, None, [*names, "no such kernel"])
    failed = record.pop("failed")
    assert record == {"kernels": 3, "found": 1, "compiled": 1, "left": 0}
    assert failed == {"no such kernel": "KeyError: 'no such kernel'"}


def test_a_missing_file_is_taken_as_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    assert cache.take_over(tmp_path / "none.tar.gz", tmp_path / "there") is None


def whole(path, **files):
    """An archive with a kernel and a note of what it was made of, or with other contents of these."""
    folder = path.with_name("contents")
    (folder / "kernel").mkdir(parents=True)
    (folder / "kernel" / "one.cubin").write_bytes(bytes(range(256)) * 400)
    made = {"target": cache.TARGET, "versions": {}, "commit": None, "modified": None}
    for name, text in {
        "kernel/__grp__one.json": '{"child_paths": {}}',
        cache.MADE: json.dumps(made),
        **files,
    }.items():
        if text is not None:
            (folder / name).write_text(text)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, ".")
    shutil.rmtree(folder)


def flip(path):
    """Bytes in the middle that are others."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 16] = b"\xff" * 16
    path.write_bytes(content)


DAMAGES = {
    "junk": lambda path: path.write_bytes(b"no archive at all" * 99),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: (whole(path), path.write_bytes(path.read_bytes()[:-300])),
    "flipped": lambda path: (whole(path), flip(path)),
    "without its note": lambda path: whole(path, **{cache.MADE: None}),
    "a note that is no JSON": lambda path: whole(path, **{cache.MADE: "{"}),
    "the note of another program": lambda path: whole(path, **{cache.MADE: "{}"}),
    "a note that is a list": lambda path: whole(path, **{cache.MADE: "[1]"}),
    "a group of another program": lambda path: whole(path, **{"kernel/__grp__one.json": "{}"}),
}


def test_a_whole_archive_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    whole(tmp_path / "file.tar.gz")
    reasons = []
    assert cache.take_over(tmp_path / "file.tar.gz", tmp_path / "there", reasons.append)["target"] == "sm_90"
    assert not reasons and (tmp_path / "there" / "kernel" / "one.cubin").is_file()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_taken_as_empty_and_the_table_says_why(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")
    DAMAGES[damage](tmp_path / "file.tar.gz")
    reasons = []
    assert cache.take_over(tmp_path / "file.tar.gz", tmp_path / "there", reasons.append) is None
    assert not list((tmp_path / "there").iterdir()), "half a kernel would be launched"
    (reason,) = reasons
    record = {"found": 0, "kernels": 1, "compiled": 1, "failed": {}, "seconds": 1.0, "damaged": reason}
    assert f"damaged ({reason}): ignored" in _cache_line(record)
