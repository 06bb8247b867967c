"""vtp.files: a file is whole or absent, and a fingerprint sees every bit."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

from vtp import files
from vtp.files import FileError, fingerprint, write_atomic


def write(text):
    return lambda path: path.write_text(text)


def test_new_file_has_its_content_and_nothing_else_is_left(tmp_path):
    write_atomic(tmp_path / "a.txt", write("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_existing_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old" * 1000)
    seen = []

    def slow(temporary):
        temporary.write_text("n")
        seen.append(path.read_text())
        temporary.write_text("new")

    write_atomic(path, slow)
    assert seen == ["old" * 1000]
    assert path.read_text() == "new"


def test_open_handle_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with open(path) as handle:
        write_atomic(path, write("new"))
        assert handle.read() == "old"


def test_path_may_be_a_string_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomic("a.txt", write("new"))
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_file_has_the_permissions_of_an_ordinary_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a.txt", write("new"))
        assert os.umask(mask) == mask  # and the mask of the process is what it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FileError, r"a\.txt: No space left on device"),
        (OSError("quota of a kind"), FileError, r"a\.txt: quota of a kind"),
        (FileError("path: own reason"), FileError, "own reason"),
        (RuntimeError("bug"), RuntimeError, "bug"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk-full", "os-error", "file-error", "bug", "ctrl-c"],
)
def test_failure_while_writing_leaves_what_was_there(tmp_path, existing, raised, expected, message):
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise raised

    with pytest.raises(expected, match=message):
        write_atomic(path, fail)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * existing


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_while_flushing_or_renaming_leaves_what_was_there(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(FileError, match=r"cannot write .*a\.txt: Input/output error"):
        write_atomic(path, write("new"))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_content_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, n=name, r=real: (order.append(n), r(*a)))
    write_atomic(tmp_path / "a.txt", write("new"))
    assert order == ["fsync", "replace", "fsync"]  # the content, the rename, the folder


def test_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileError, match=r"cannot write into .*/none: No such file or directory"):
        write_atomic(tmp_path / "none" / "a.txt", write("new"))


def test_file_in_place_of_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match=r"cannot write into .*/file: Not a directory"):
        write_atomic(tmp_path / "file" / "a.txt", write("new"))


def test_folder_in_place_of_a_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", "", "."):
        with pytest.raises(FileError, match="is a folder, expected a file name"):
            write_atomic(path, lambda _: pytest.fail("was called"))
    assert list((tmp_path / "folder").iterdir()) == []


def test_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(FileError, match="File name too long"):
        write_atomic(tmp_path / ("a" * 255), write("new"))
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    path, errors = tmp_path / "a.txt", []

    def many(text):
        with contextlib.suppress(BaseException):
            for _ in range(20):
                write_atomic(path, write(text))
            return
        errors.append(text)

    threads = [threading.Thread(target=many, args=(letter * 5000,)) for letter in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert errors == []
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


_KILLED = """
import sys
sys.modules["torch"] = type(sys)("torch")  # the writer needs none of it, and the start is quicker
sys.modules["torch"].Tensor = object
import importlib.util, time
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

files.write_atomic(sys.argv[2], write)
"""


def test_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    command = [sys.executable, "-c", _KILLED, files.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    write_atomic(path, write("new"))  # what the dead writer left does not stand in the way
    assert path.read_text() == "new"


# --------------------------------------------------------------------------------------------- fingerprint


@pytest.fixture
def tensors():
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int64)}


def test_fingerprint_does_not_depend_on_order_layout_or_time(tensors):
    expected = fingerprint(tensors, "text")
    time.sleep(0.01)
    assert fingerprint(dict(reversed(tensors.items())), "text") == expected
    transposed = {**tensors, "a": tensors["a"].T.contiguous().T}
    assert not transposed["a"].is_contiguous()
    assert fingerprint(transposed, "text") == expected
    assert (
        fingerprint({n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}, "text")
        == expected
    )
    assert len(expected) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["a"].view(torch.int32)[1, 2].bitwise_xor_(1),
        lambda t: t["a"].__setitem__((0, 0), -0.0),
        lambda t: t.update(a=t["a"].reshape(3, 2)),
        lambda t: t.update(a=t["a"].double()),
        lambda t: t.update(b=t["b"].view(torch.float64)),
        lambda t: t.update(c=t.pop("a")),
        lambda t: t.pop("b"),
        lambda t: t.update(c=torch.zeros(0)),
        lambda t: t.update(a=t["a"].flip(0)),
    ],
    ids=["one-bit", "minus-zero", "shape", "dtype", "same-bytes", "name", "missing", "empty-extra", "order"],
)
def test_fingerprint_sees_every_change(tensors, change):
    expected = fingerprint(tensors)
    change(tensors)
    assert fingerprint(tensors) != expected


def test_fingerprint_sees_the_text(tensors):
    assert len({fingerprint(tensors, text) for text in ("", "a", "b", "ä")}) == 4


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.bool,
        torch.uint8,
        torch.complex64,
        torch.float8_e4m3fn,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)], ids=str)
def test_fingerprint_takes_any_dtype_and_shape(dtype, shape):
    tensor = torch.zeros(shape).to(dtype)
    assert fingerprint({"a": tensor}) == fingerprint({"a": tensor.clone()})
    assert fingerprint({"a": tensor}) != fingerprint({"a": torch.zeros(7).to(dtype)})


def test_fingerprint_sees_nan_payloads_as_bytes():
    a, b = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert fingerprint({"x": a}) != fingerprint({"x": b})
