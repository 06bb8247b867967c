"""The process that cases run in: what a case does to it is not done to the run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe

import pytest

from bench.gpu import worker as module
from bench.gpu.cases import TIME_IS_UP, Part
from bench.gpu.worker import ROOT, Worker

PART = Part("toys", "tests.support.gpu_part", 1.0)


@pytest.fixture
def worker(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        worker = Worker(PART, True, log)
        yield worker
        worker.close()


def test_cases_after_one_that_breaks_its_process_run_in_a_fresh_one(worker, tmp_path):
    noted = {}
    found = {
        name: worker.run(name, 60, noted.update) for name in ("first", "raises", "second", "exits", "third")
    }
    assert {name: record["status"] for name, record in found.items()} == {
        "first": "measured",
        "raises": "failed: RuntimeError: no such kernel",
        "second": "measured",
        "exits": "failed: exit status 3",
        "third": "measured",
    }
    assert found["first"]["pid"] == found["second"]["pid"] != found["third"]["pid"]
    assert noted == {"before": "noted"}, "what a case has noted is lost with its process"
    log = (tmp_path / "log.txt").read_text()
    assert "--- exits" in log and "no such kernel" in log


def test_a_case_that_hangs_is_ended_and_one_that_is_killed_named(worker):
    noted = {}
    assert worker.run("first", 60, noted.update)["status"] == "measured"  # its process is there
    assert worker.run("hangs", 1.0, noted.update)["status"] == "failed: not done after 1 s"
    with pytest.raises(ProcessLookupError):
        os.kill(noted["pid"], 0)
    assert worker.run("is killed", 60, noted.update)["status"] == "failed: the process died of SIGSEGV"


def slow_start(monkeypatch, seconds):
    """Have processes that take longer to be ready for a case."""

    def start(self):
        self._connection, other_end = Pipe()
        self._ready_by = time.monotonic() + module.START_SECONDS
        code = f"""
import sys, time
from multiprocessing.connection import Connection
connection = Connection({other_end.fileno()})
time.sleep({seconds})
connection.send("ready")
while True:
    name, seconds = connection.recv()
    if name != "hangs":
        connection.send(("record", {{"status": "measured", "seconds": seconds}}, False))
"""
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[other_end.fileno()], start_new_session=True
        )
        other_end.close()

    monkeypatch.setattr(Worker, "_start", start)


def test_the_start_of_a_process_is_of_the_time_of_its_case(worker, monkeypatch):
    slow_start(monkeypatch, 1.2)
    began = time.monotonic()
    assert worker.run("first", 0.2, print)["status"] == TIME_IS_UP, "the case is not at fault"
    assert time.monotonic() - began < 1.0
    found = worker.run("second", 60, print)  # in the process that had begun to start
    assert found["status"] == "measured" and found["seconds"] < 59.9
    worker.close()
    found = worker.run("hangs", 2.5, print)["status"]
    assert re.fullmatch(r"failed: not done after 2 s, [12] of them until its process was there", found)


def test_a_process_that_never_is_ready_is_a_failure(worker, monkeypatch):
    slow_start(monkeypatch, 600)
    monkeypatch.setattr(module, "START_SECONDS", 0.3)
    assert worker.run("first", 60, print)["status"].startswith("failed: no process for it")
    assert worker._process is None


COMMAND = f"""
from bench.gpu.__main__ import main
from bench.gpu.cases import Part
raise SystemExit(main({{arguments}}, [Part("ops", {PART.module!r}, 1.0)]))
"""


@pytest.mark.thorough
def test_a_run_that_is_ended_keeps_what_it_measured_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    arguments = ["--rehearse", "--out", str(out), "--cache", str(tmp_path / "none")]
    code = COMMAND.format(arguments=arguments)
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until, cases = time.monotonic() + 120, {}
    while cases.get("exits", {}).get("status") != "failed: exit status 3" and time.monotonic() < until:
        assert run.poll() is None, "the run is over already"
        time.sleep(0.1)
        if (out / "results.json").exists():
            cases = json.loads((out / "results.json").read_text())["parts"]["ops"]["cases"]
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    results = json.loads((out / "results.json").read_text())
    cases = results["parts"]["ops"]["cases"]
    assert cases["first"]["status"] == cases["second"]["status"] == "measured"
    assert cases["last"]["status"] == "not measured"
    with pytest.raises(ProcessLookupError):
        os.kill(cases["first"]["pid"], 0)
    assert "raises: failed: RuntimeError: no such kernel" in printed
    assert (out / "table.txt").read_text() == printed
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.json", "table.txt"]
