"""One run in a folder at a time, and none that a killed one keeps out."""

import errno
import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support.processes import forks, python
from vtp import cli
from vtp.files import FileError
from vtp.training import progress, run_lock


def _hold(folder: Path) -> None:
    with run_lock.run_lock(folder):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()  # as a data worker: it outlives the run, with all that was open
        (folder / "held").write_text(str(worker.pid))
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path, and a fork of it."""
    process = forks().Process(target=_hold, args=(tmp_path,))
    process.start()
    held, deadline = tmp_path / "held", time.monotonic() + 60
    while not (held.exists() and held.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process
    process.kill()
    os.kill(int(held.read_text()), signal.SIGKILL)


def test_a_second_run_is_refused_with_process_and_machine_and_a_killed_one_is_no_hindrance(tmp_path, holder):
    owner = f"process {holder.pid} on {re.escape(socket.gethostname())} since 20"
    with (
        pytest.raises(FileError, match=rf"run folder: {tmp_path} is in use by {owner}"),
        run_lock.run_lock(tmp_path),
    ):
        pass
    holder.kill()
    holder.join()
    left = [
        tmp_path / ".plan.json.abcd0_12.tmp",
        tmp_path / "checkpoints" / ".dense.safetensors.12345678.tmp",
    ]
    mine = tmp_path / ".notes.tmp"
    left[1].parent.mkdir()
    for path in (*left, mine):
        path.write_text("half")
    with run_lock.run_lock(tmp_path):
        assert not any(path.exists() for path in left) and mine.exists()
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_commands_in_a_folder_that_is_in_use_end_before_they_write(tmp_path, holder, capsys):
    for command in (["run"], ["train", "dense"]):
        assert cli.main([*command, "--new-head", "--out", str(tmp_path)]) == 2
        assert f"is in use by process {holder.pid} on " in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "held"]


def test_who_waited_for_a_lock_that_was_removed_meanwhile_takes_the_new_one(tmp_path, monkeypatch):
    class Flock:
        LOCK_EX, LOCK_NB = 2, 4
        calls = 0

        def flock(self, file, _) -> None:
            self.calls += 1
            if self.calls == 1:  # the run that had it ends, and another one begins
                (tmp_path / ".lock").unlink()
                (tmp_path / ".lock").write_text("")

    monkeypatch.setattr(run_lock, "fcntl", Flock())
    with run_lock.run_lock(tmp_path):
        assert run_lock.fcntl.calls == 2


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    class NoLocks:
        LOCK_EX, LOCK_NB = 2, 4

        def flock(self, file, _) -> None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock, "fcntl", NoLocks())
    with (
        pytest.warns(UserWarning, match="without locks .*: nothing keeps a second run out"),
        run_lock.run_lock(tmp_path),
    ):
        pass


def test_without_fcntl_as_on_windows_the_commands_still_import():
    code = "import sys\nsys.modules['fcntl'] = None\nimport vtp.commands\n"
    code += "from vtp.training.run_lock import fcntl\nassert fcntl is None"
    assert python(code).returncode == 0


def test_metrics_on_a_full_disk_name_the_file(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(progress.os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        progress.append_metrics(tmp_path / "metrics.jsonl", {"epoch": 1})
