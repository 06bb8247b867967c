"""vtp.cli: what it imports before it knows what to do, the exit status, and what is said."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vtp
from tests.support.processes import python
from vtp import choices, cli, commands
from vtp.arguments import make_parser
from vtp.comparison.runtimes import DTYPES
from vtp.files import FileError
from vtp.pipeline import RunConfig
from vtp.recipes import RECIPES
from vtp.runtime.export import TARGETS
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
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "vtp: error: DataLoader worker (pid 7) is killed by signal: Killed. Where memory is short, give "
            "fewer --workers; continue with --resume",
        ),
    ],
    ids=["sigterm", "sigint", "ctrl-c", "not-finite", "bad-input", "killed-worker"],
)
def test_exit_status_and_last_line_say_why_a_run_ended(monkeypatch, tmp_path, capsys, error, status, says):
    def end(*_, **__):
        raise error

    monkeypatch.setattr(commands, "run", end)
    assert cli.main(["run", "--out", str(tmp_path / "run")]) == status
    assert capsys.readouterr().err.strip() == says


ROOT = Path(__file__).parents[3]
# As the script that pip makes of the entry point.
PROGRAM = str(Path(sys.executable).parent / "vtp")
SCRIPT = f"import sys; sys.argv[0] = {PROGRAM!r}; from vtp.cli import main; sys.exit(main())"


def started(*arguments, first_path=None):
    """A Python process of its own, as a user starts one, with what it imported after what it said."""
    path = os.pathsep.join(map(str, filter(None, (first_path, ROOT))))
    return subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("how", [("-m", "vtp.cli"), ("-c", SCRIPT)], ids=["module", "script"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--version"], 0), (["prune", "--help"], 0), (["run", "--rate", "x"], 2), ([], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_version_and_wrong_arguments_do_not_wait_for_pytorch(how, arguments, status):
    done = started(*how, *arguments)
    assert done.returncode == status
    assert "usage: vtp" in done.stdout + done.stderr or done.stdout == f"vtp {vtp.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"vtp", "argparse"} <= imported
    assert not imported & {"torch", "timm", "numpy", "rich", "PIL", "accelerate", "matplotlib"}


def test_a_command_imports_what_draws_the_report_only_where_there_is_one():
    code = "import sys, vtp.execution; print({'torch', 'matplotlib', 'transformers'} & sys.modules.keys())"
    assert python(code).stdout == "{'torch'}\n"


def test_ctrl_c_while_pytorch_is_imported_ends_without_a_traceback(tmp_path):
    interrupting = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    (tmp_path / "torch.py").write_text(interrupting)
    done = started("-m", "vtp.cli", "inspect", "fashion-deit", first_path=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, said, done.stdout) == (130, ["vtp: interrupted"], "")


def test_names_that_options_offer_are_those_there_are():
    assert tuple(TARGETS) == choices.TARGETS
    assert tuple(DTYPES) == choices.TIMED_DTYPES
    assert set(commands.COMMANDS) == set(
        re.findall(r"^    (\w+) ", make_parser().format_help(), re.MULTILINE)
    )


def test_a_run_stands_at_the_same_settings_by_command_and_by_function():
    options, config = make_parser().parse_args(["run", "--out", "x"]), RunConfig(RECIPES["small"]())
    shared = vars(options).keys() & vars(config).keys() - {"recipe"}
    assert {"refit", "images", "model", "data", "one_shot"} <= shared
    assert {name: getattr(options, name) for name in shared} == {
        name: getattr(config, name) for name in shared
    }


def test_import_vtp_gives_every_public_name():
    assert all(hasattr(vtp, name) for name in vtp.__all__)


@pytest.mark.parametrize(
    ("argv", "python", "expected"),
    [
        (["-m", "eval"], ["-u", "-m", "vtp.cli", "eval"], True),
        (["/usr/bin/vtp", "eval"], ["python", "/usr/bin/vtp", "eval"], True),
        (["/home/me/vtp", "eval"], ["python", "/home/me/vtp", "eval"], False),  # somebody's own
        (["-m"], ["-m", "pytest", "-m", "vtp"], False),
        (["-m"], ["-um", "vtp.cli"], False),  # which is right, and slow
        (["train.py", "-m", "vtp.cli"], ["train.py", "-m", "vtp.cli"], False),
        (["vtp/serve.py"], ["vtp/serve.py"], False),
        ([""], [], False),
        ([], [], False),
    ],
    ids=str,
)
def test_only_the_command_line_begins_without_the_public_names(monkeypatch, argv, python, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", *python])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    assert vtp._is_command_line() == expected
