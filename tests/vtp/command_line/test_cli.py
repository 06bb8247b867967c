"""vtp.cli: the exit status, and what is said."""

import signal

import pytest

from vtp import cli, commands
from vtp.files import FileError
from vtp.training.evaluation import NonFiniteLossError
from vtp.training.loop import TrainingInterrupted


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (TrainingInterrupted("stopped after step 3", signal.SIGTERM), 143, "vtp: stopped after step 3"),
        (TrainingInterrupted("stopped after step 3", signal.SIGINT), 130, "vtp: stopped after step 3"),
        (KeyboardInterrupt(), 130, "vtp: interrupted; a run continues with --resume"),
        (NonFiniteLossError("the loss is nan"), 1, "vtp: error: the loss is nan"),
        (FileError("no such file"), 2, "vtp: error: no such file"),
    ],
    ids=["sigterm", "sigint", "ctrl-c", "not-finite", "bad-input"],
)
def test_exit_status_and_last_line_say_why_a_run_ended(monkeypatch, tmp_path, capsys, error, status, says):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(commands, "run", end)
    assert cli.main(["run", "--out", str(tmp_path / "run")]) == status
    assert capsys.readouterr().err.strip() == says
