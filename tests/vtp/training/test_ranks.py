"""Several processes: when one ends, all end soon, and one message says which it was and why."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import vtp
from tests.support.processes import ROOT, forks
from tests.support.slurm import DAEMONS, slurm
from vtp import cli, commands, pipeline
from vtp.files import FileError
from vtp.group import first_makes, world
from vtp.recipes import STAGES
from vtp.training import loop, ranks, state
from vtp.training.ranks import accelerator

SOON = 20  # seconds in which all processes have to end here, with a short GRACE and a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes, 48 to train and 16 to test, and a tiny model for them."""
    root, rng = tmp_path_factory.mktemp("ranks"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for label in range(2):
            path = root / "images" / split / f"class{label}"
            path.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (16, 16)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path / f"{i}.png")
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1, num_classes=2, embed_dim=24, depth=1,
        num_heads=2, pretrained_cfg_overlay={"mean": (0.4,), "std": (0.3,)},
    )  # fmt: skip
    vtp.save(model, root / "model.safetensors")
    return root


EPOCHS, STEPS = 3, 6  # of an epoch: 48 images in batches of 4 on each of two ranks


def train_command(folder: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--batch-size", "4", f"--set=dense.epochs={EPOCHS}", "--set=dense.warmup_epochs=0.5"]
    names = ["--model", str(folder / "model.safetensors"), "--data", str(folder / "images")]
    return ["train", "dense", *names, "--out", str(out), *sizes, *more]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Group:
    """Processes of one group that each call function(rank, *arguments)."""

    def __init__(self, log: Path, function, *arguments, size: int = 2) -> None:
        port = free_port()
        log.mkdir(exist_ok=True)
        self.logs = [log / f"{rank}.txt" for rank in range(size)]
        self.processes = [
            forks().Process(target=_begin, args=(rank, size, port, self.logs[rank], function, *arguments))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self, seconds: float = 90) -> list[int | None]:
        """Exit statuses, None of those that had to be ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_for(self, text: str, rank: int = 0) -> None:
        deadline = time.monotonic() + 90
        while not (self.logs[rank].exists() and text in self.text(rank)):
            assert time.monotonic() < deadline, [self.text(each) for each in range(len(self.logs))]
            time.sleep(0.02)


def _begin(rank: int, size: int, port: int, log: Path, function, *arguments) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {**shared, **own, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    ranks.GRACE = 1.0
    function(rank, *arguments)


# ---------------------------------------------------------------------------------------------------------
# A rank that is gone


def _works_for_long(rank: int, victim: int) -> None:
    def work() -> None:
        print("at work")
        time.sleep(600)

    def run(*_, **__) -> None:
        accelerator()
        print("formed")
        if rank == victim:
            time.sleep(600)
        first_makes(world(), work)

    commands.run = run
    sys.exit(cli.main(["run", "--out", "unused"]))


def test_a_rank_killed_while_rank_0_works_for_long_ends_all_others_with_its_name(tmp_path):
    group = Group(tmp_path, _works_for_long, 1, size=3)
    group.wait_for("at work")
    for rank in (1, 2):
        group.wait_for("formed", rank)
    group.processes[1].kill()
    assert group.codes(SOON) == [1, -signal.SIGKILL, 1]
    name = f"rank 1 (process {group.processes[1].pid} on {socket.gethostname()}) is gone without a word"
    assert f"vtp: error: {name}; rank 0 ends too" in group.text(0)  # which is ended in its work
    assert f"vtp: error: {name}; rank 2 ends too" in group.text(2)  # which waits for rank 0


@pytest.mark.thorough
def test_others_that_wait_for_rank_0_hear_of_its_end(tmp_path):
    group = Group(tmp_path, _works_for_long, None)
    group.wait_for("at work")
    group.processes[0].kill()
    assert group.codes(SOON) == [-signal.SIGKILL, 1]
    assert f"vtp: error: rank 0 (process {group.processes[0].pid} on " in group.text(1)


def _works_beyond_the_limit(rank: int) -> None:
    ranks.TIMEOUT = timedelta(seconds=10)
    _works_for_long(rank, -1)


@pytest.mark.thorough
def test_others_wait_for_rank_0_no_longer_than_a_collective_may_take(tmp_path):
    group = Group(tmp_path, _works_beyond_the_limit)
    group.wait_for("at work")
    assert group.codes(SOON) == [1, 1]
    assert "vtp: rank 1: " in group.text(1) and "Timed out" in group.text(1)
    assert "vtp: error: rank 1 " in group.text(0) and "rank 0 ends too" in group.text(0)


def _ends_well(rank: int, log: Path) -> None:
    accelerator()
    (log / f"result{rank}").write_text(json.dumps(first_makes(world(), lambda: {"from": rank})))
    if rank == 0:  # as it compares the models of a run, when the others have ended
        time.sleep(ranks.GRACE + 1)


@pytest.mark.thorough
def test_what_rank_0_returns_reaches_all_and_a_rank_that_ends_well_is_not_missed(tmp_path):
    assert Group(tmp_path, _ends_well, tmp_path).codes() == [0, 0]
    assert [json.loads((tmp_path / f"result{rank}").read_text()) for rank in (0, 1)] == [{"from": 0}] * 2


def _stranger(rank: int) -> None:
    if rank == 0:
        listener = ranks._listener

        def with_strangers() -> socket.socket:
            opened = listener()
            address = ("127.0.0.1", opened.getsockname()[1])
            socket.create_connection(address).close()
            socket.create_connection(address).sendall(b'{"rank": 1, "who": "nobody", "token": 3}\n[]\n')
            return opened

        ranks._listener = with_strangers
    accelerator()
    first_makes(world(), lambda: None)


@pytest.mark.thorough
def test_connections_of_strangers_are_no_ranks(tmp_path):
    assert Group(tmp_path, _stranger).codes() == [0, 0]


# ---------------------------------------------------------------------------------------------------------
# An error on one rank


def _command(rank: int, who: str, error: type[Exception]) -> None:
    def fail(*_, **__) -> None:
        accelerator()
        if who in ("all", str(rank)):
            raise error("no such thing")
        torch.distributed.barrier()

    commands.run = fail
    sys.exit(cli.main(["run", "--out", "unused"]))


@pytest.mark.parametrize(
    ("who", "error", "status"),
    [
        pytest.param("1", KeyError, 1, id="unexpected on rank 1"),
        pytest.param("1", FileError, 2, id="input of rank 1"),
        pytest.param("0", FileError, 2, id="input of rank 0"),
        pytest.param("all", FileError, 2, id="input of all"),
    ],
)
@pytest.mark.thorough
def test_an_error_is_said_once_with_its_rank_and_ends_all(tmp_path, who, error, status):
    group = Group(tmp_path, _command, who, error)
    assert group.codes(SOON) == [status, status]
    said = [group.text(rank) for rank in (0, 1)]
    if who == "all":
        assert sorted(said)[0] == "" and "error: no such thing" in max(said)
        return
    text = "error: no such thing" if status == 2 else "KeyError: 'no such thing'"
    assert f"vtp: rank {who}: {text}" in said[int(who)]
    assert sum(each.count("Traceback") for each in said) == (status == 1)
    if who == "1":
        assert (
            f"rank 1 (process {group.processes[1].pid} on " in said[0]
            and f"failed: {text}; rank 0" in said[0]
        )


# ---------------------------------------------------------------------------------------------------------
# Training


def _train(rank: int, command: list[str], victim: int | None, what: str, when: str) -> None:
    """`vtp train` in which something happens to one rank, or to all, a third into its second epoch."""

    def happen() -> None:
        if victim in (rank, -1):
            if what == "disk":
                raise FileError("path: cannot write it: No space left on device")
            if what == "nan":
                return
            time.sleep(0.3 * rank)
            os.kill(os.getpid(), getattr(signal, what))

    step, evaluate = loop._Stage._pass, loop.evaluate_batches
    seen = {"steps": 0, "evaluations": 0}

    def counting_step(stage, images, targets, number):
        seen["steps"] += 1
        if when in ("step", "saving") and seen["steps"] == STEPS + 2:
            happen()
            if what == "nan" and victim == rank:
                images = images * torch.nan
        return step(stage, images, targets, number)

    def counting_evaluate(*arguments):
        seen["evaluations"] += 1
        if when == "evaluation" and seen["evaluations"] == 2:
            happen()
        return evaluate(*arguments)

    loop._Stage._pass, loop.evaluate_batches = counting_step, counting_evaluate
    write = state.write_state

    def failing_write(path: Path, *arguments) -> None:
        if when == "checkpoint" and path.exists():
            happen()
        if when == "saving" and seen["steps"] > STEPS:
            print("saving")
            time.sleep(3)
        write(path, *arguments)

    state.write_state = failing_write
    sys.exit(cli.main(command))


def end_of(out: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and metrics, without times, of a run that has ended."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    history = [
        {
            k: v
            for k, v in json.loads(line).items()
            if k not in ("seconds", "images_per_second", "loader_wait")
        }
        for line in lines
    ]
    return vtp.load(out / "dense.safetensors").state_dict(), history


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    group = Group(out.parent, _train, train_command(folder, out), None, "", "")
    assert group.codes() == [0, 0], [group.text(rank) for rank in (0, 1)]
    return end_of(out)


def assert_resumes_to(undisturbed, folder: Path, log: Path, out: Path) -> None:
    group = Group(log, _train, train_command(folder, out, "--resume"), None, "", "")
    assert group.codes() == [0, 0], [group.text(rank) for rank in (0, 1)]
    assert_same_end(out, undisturbed)


def assert_same_end(out: Path, undisturbed) -> None:
    (weights, history), (expected, metrics) = end_of(out), undisturbed
    assert history == metrics
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [path.name for path in out.rglob(".*")] == []


def place(out: Path) -> tuple[int, int]:
    """Epochs done, and steps of the next, by the checkpoint."""
    with safe_open(out / "checkpoints" / "dense.safetensors", "pt") as file:
        position = json.loads(file.metadata()["vtp-training-state"])["position"]
    return position["epoch"], position["step"]


SIGNALS = [
    (1, "SIGUSR1", "step"),
    (0, "SIGTERM", "step"),
    (-1, "SIGTERM", "step"),
    (-1, "SIGTERM", "evaluation"),
]
SIGNALS += [(1, "SIGTERM", "evaluation")]


@pytest.mark.parametrize(
    ("victim", "name", "when"),
    SIGNALS,
)
@pytest.mark.thorough
def test_a_signal_to_any_ranks_stops_all_at_one_step_and_the_run_resumes_to_the_same_end(
    folder, tmp_path, undisturbed, victim, name, when
):
    out = tmp_path / "run"
    group = Group(tmp_path / "log", _train, train_command(folder, out), victim, name, when)
    assert group.codes(SOON) == [128 + getattr(signal, name)] * 2
    epoch, step = place(out)
    assert epoch == 1 and (2 <= step < STEPS if when == "step" else step == STEPS)
    said = "".join(group.text(rank) for rank in (0, 1))
    assert said.count(f"vtp: {name}: stage dense stopped after step {step} of {STEPS} of epoch 2 of 3") == 1
    assert "Traceback" not in said and "vtp: error" not in said
    assert_resumes_to(undisturbed, folder, tmp_path / "again", out)


@pytest.mark.thorough
def test_no_rank_ends_by_a_signal_while_rank_0_saves(folder, tmp_path):
    group = Group(tmp_path / "log", _train, train_command(folder, tmp_path / "run"), 1, "SIGTERM", "saving")
    group.wait_for("saving")
    time.sleep(1)  # the other one would have ended: torchrun would then end rank 0
    assert all(process.is_alive() for process in group.processes)
    assert group.codes(SOON) == [128 + signal.SIGTERM] * 2
    assert place(tmp_path / "run")[0] == 1


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["step", "evaluation", "checkpoint"])
def test_a_rank_killed_in_training_ends_the_other_and_the_run_resumes_to_the_same_end(
    folder, tmp_path, undisturbed, victim, when
):
    if (victim, when) == (1, "checkpoint"):
        pytest.skip("rank 0 writes it")
    out = tmp_path / "run"
    group = Group(tmp_path / "log", _train, train_command(folder, out), victim, "SIGKILL", when)
    codes = group.codes(SOON)
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1)
    name = f"rank {victim} (process {group.processes[victim].pid} on {socket.gethostname()})"
    last = group.text(1 - victim).splitlines()[-1]
    assert last == f"vtp: error: {name} is gone without a word; rank {1 - victim} ends too"
    assert "Traceback" not in group.text(1 - victim)
    assert_resumes_to(undisturbed, folder, tmp_path / "again", out)


@pytest.mark.thorough
def test_a_full_disk_on_rank_0_ends_all_with_one_error_and_leaves_the_checkpoint_of_before(
    folder, tmp_path, undisturbed
):
    out = tmp_path / "run"
    group = Group(tmp_path / "log", _train, train_command(folder, out), 0, "disk", "checkpoint")
    codes = group.codes(SOON)
    assert codes[0] == 2 and codes[1] in (1, 2)
    said = [group.text(rank) for rank in (0, 1)]
    assert "vtp: rank 0: error: path: cannot write it: No space left on device" in said[0]
    assert "error" not in said[1] and "Traceback" not in said[0] + said[1]
    assert place(out) == (1, 0)
    assert_resumes_to(undisturbed, folder, tmp_path / "again", out)


@pytest.mark.thorough
def test_a_loss_that_is_nan_on_one_rank_names_it(folder, tmp_path):
    group = Group(tmp_path / "log", _train, train_command(folder, tmp_path / "run"), 1, "nan", "step")
    assert group.codes(SOON) == [1, 1]
    said = "".join(group.text(rank) for rank in (0, 1))
    assert said.count("the loss is nan on rank 1 at step 2 of epoch 2") == 1 and "Traceback" not in said


# ---------------------------------------------------------------------------------------------------------
# torchrun's restarts

# `vtp` with its arguments, in which the given rank is killed in its second epoch unless it was restarted.
SCRIPT = """
import os, signal, sys
from vtp import cli, pipeline
from vtp.training import loop

step, steps = loop._Stage._pass, 0

def killing(stage, images, targets, number):
    global steps
    steps += 1
    if steps == {at} and os.environ["RANK"] == "{victim}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(stage, images, targets, number)

loop._Stage._pass = killing
sys.exit(cli.main())
"""


def torchrun(script: Path, victim: int | None, *options: str) -> list[str]:
    script.write_text(SCRIPT.format(at=STEPS + 3, victim=victim))
    return [sys.executable, "-m", "torch.distributed.run", *options, str(script)]


ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_that_torchrun_restarts_continue_without_being_told_to(
    folder, tmp_path, undisturbed, victim
):
    out = tmp_path / "run"
    command = torchrun(
        tmp_path / "command.py", victim, "--standalone", "--nproc-per-node=2", "--max-restarts=1"
    )
    done = subprocess.run(
        [*command, *train_command(folder, out)],
        env=os.environ | ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_end(out, undisturbed)


@pytest.mark.thorough
def test_a_node_that_disappears_and_comes_back_continues_the_run(folder, tmp_path, undisturbed):
    out, port = tmp_path / "run", free_port()
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=job"]
    command = torchrun(tmp_path / "command.py", None, *options, f"--rdzv-endpoint=127.0.0.1:{port}")
    command += train_command(folder, out, "--resume")
    # Else the agent of a node that comes back waits for an address that nobody tells it (PyTorch 2.14).
    environment = os.environ | ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def node(log: str) -> subprocess.Popen:
        with open(tmp_path / log, "w") as file:
            return subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT
            )

    first = node("first.log")
    time.sleep(2)  # the first one to come holds the rendezvous
    second = node("second.log")
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline and first.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.01)
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()
    second.wait()
    again = node("again.log")
    try:
        assert (first.wait(200), again.wait(60)) == (0, 0), (tmp_path / "first.log").read_text()
    finally:
        for process in (first, again):
            process.kill()
    assert "is gone without a word" in (tmp_path / "first.log").read_text()
    assert_same_end(out, undisturbed)


@pytest.fixture
def job(monkeypatch):
    """This process as one that torchrun's agent has started."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_a_job_continues_what_it_has_begun_itself_and_nothing_that_it_found(
    folder, tmp_path, job, monkeypatch
):
    done = []

    def count(stage, images, targets, number):
        done.append(stage.updates)
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(stage, images, targets, number)

    step = loop._Stage._pass
    monkeypatch.setattr(loop._Stage, "_pass", count)
    command, stop = train_command(folder, tmp_path, "--set=dense.epochs=1"), None
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert cli.main(command) == 0 and done == list(range(12))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    done.clear()
    stop = 5
    assert cli.main(command) == 128 + signal.SIGTERM and done == list(range(5))  # another job's: begun anew
    done.clear()
    stop = None
    assert cli.main(command) == 0 and done == list(range(5, 12))


# ---------------------------------------------------------------------------------------------------------
# Between the stages


def _cuts(rank: int, command: list[str]) -> None:
    def write(*_) -> None:
        if rank == 0:
            print("cutting")
            time.sleep(600)

    pipeline._Cut.write = write
    sys.exit(cli.main(command))


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_while_rank_0_cuts_ends_all_and_names_the_rank_that_got_it(folder, tmp_path, victim):
    command = train_command(folder, tmp_path / "run", "--new-head", "--latency-batch=1")[2:]
    command += [f"--set={stage}.epochs=1" for stage in STAGES]
    command += [f"--set={stage}.warmup_epochs=0" for stage in STAGES]
    group = Group(tmp_path / "log", _cuts, ["run", *command])
    group.wait_for("cutting")
    time.sleep(1)
    os.kill(group.processes[victim].pid, signal.SIGTERM)
    assert group.codes(SOON) == [128 + signal.SIGTERM] * 2
    said = [group.text(rank) for rank in (0, 1)]
    text = "interrupted by SIGTERM; a run continues with --resume"
    assert said[victim].splitlines()[-1] == f"vtp: rank {victim}: {text}"
    assert "Traceback" not in "".join(said)
    if victim == 1:
        assert f"rank 1 (process {group.processes[1].pid} on " in said[0] and f"failed: {text}" in said[0]
    assert (tmp_path / "run" / "sparse.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------
# A machine that is gone

REDUCE = """
import time, torch
from vtp import cli, commands
from vtp.training.ranks import accelerator

def run(*_, **__):
    accelerator()
    print("formed", flush=True)
    while True:
        torch.distributed.all_reduce(torch.ones(3))
        time.sleep(0.1)

commands.run = run
raise SystemExit(cli.main(["run", "--out", "unused"]))
"""


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them, by name, with the address and interface of each."""

    def ip(*arguments: str) -> None:
        if shutil.which("ip") is None or subprocess.run(["ip", *arguments], capture_output=True).returncode:
            pytest.skip("making network namespaces is not allowed here")

    names = [f"vtp{os.getpid()}{letter}" for letter in "ab"]
    with contextlib.ExitStack() as undo:
        for name in names:
            ip("netns", "add", name)
            undo.callback(subprocess.run, ["ip", "netns", "del", name])
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("cable", "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield names, lambda: ip("-n", names[1], "link", "set", "cable", "down")


@pytest.mark.thorough
def test_ranks_on_a_machine_that_the_network_has_lost_end_within_the_stated_time(tmp_path, machines):
    names, cut_cable = machines
    (tmp_path / "command.py").write_text(REDUCE)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "cable",
    }
    processes, logs = [], [tmp_path / f"{rank}.txt" for rank in (0, 1)]
    for rank, (name, log) in enumerate(zip(names, logs, strict=True)):
        command = ["ip", "netns", "exec", name, sys.executable, str(tmp_path / "command.py")]
        own = {"RANK": str(rank), "LOCAL_RANK": "0"}
        with open(log, "w") as file:
            environment = os.environ | ENVIRONMENT | shared | own
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    deadline = time.monotonic() + 90
    try:
        while not all("formed" in log.read_text() for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.1)
        cut_cable()
        limit = ranks.IDLE + ranks.INTERVAL * ranks.PROBES + ranks.GRACE
        assert [process.wait(limit + 5) for process in processes] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    for rank, log in enumerate(logs):
        assert f"vtp: error: rank {1 - rank} (process {processes[1 - rank].pid} on " in log.read_text()


# ---------------------------------------------------------------------------------------------------------
# Slurm

# `vtp` of its arguments, in which the second task has Slurm signal the job, in the second epoch, unless the
# job was queued again.
SIGNALLED = """
import os, subprocess, sys, time
from vtp import cli
from vtp.training import loop

step, steps = loop._Stage._pass, 0

def signalling(stage, images, targets, number):
    global steps
    steps += 1
    if steps == {at} and os.environ["SLURM_PROCID"] == "1" and "SLURM_RESTART_COUNT" not in os.environ:
        subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(2)  # until it has come, to the data workers too
    return step(stage, images, targets, number)

loop._Stage._pass = signalling
sys.exit(cli.main())
"""


@pytest.mark.thorough
@pytest.mark.skipif(not all(map(shutil.which, DAEMONS)), reason="no Slurm is installed here")
def test_the_script_for_slurm_queues_a_stopped_run_again_which_continues_to_the_same_end(
    folder, tmp_path, undisturbed, machines
):
    page = (ROOT / "docs" / "scale.md").read_text()
    script = "#!/bin/bash\n" + page.split("```\n#!/bin/bash\n")[1].split("```")[0]
    (tmp_path / "command.py").write_text(SIGNALLED.format(at=STEPS + 3))
    program = f"{sys.executable} {tmp_path / 'command.py'}"
    command = shlex.join(train_command(folder, tmp_path / "run", "--resume", "--workers=1"))
    assert script.count("-m vtp.cli run ...") == 1
    script = re.sub(r"python -m vtp.cli run \.\.\. .*", f"{program} {command}", script)
    (tmp_path / "job").write_text(script)
    size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"]
    output = tmp_path / "output"
    with slurm(machines[0], ["10.77.0.1", "10.77.0.2"]) as cluster:
        job = cluster.command(
            "sbatch", "--parsable", f"--output={output}", *size, str(tmp_path / "job"), **ENVIRONMENT
        ).strip()
        deadline = time.monotonic() + 240
        while (state := cluster.state(job)) in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
    said = output.read_text()
    assert state == "COMPLETED", said
    assert said.count(f"vtp: SIGTERM: stage dense stopped after step 3 of {STEPS} of epoch 2 of 3") == 1, said
    assert "Traceback" not in said
    assert_same_end(tmp_path / "run", undisturbed)
