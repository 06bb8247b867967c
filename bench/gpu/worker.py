"""The process that a part's cases run in, and the handle that the run has of it.

A case may hang, end its process, or leave behind a GPU on which nothing runs any more: so the run never
touches the GPU itself, kills what outlasts its time with all its children, and goes on in a fresh process.

    python -m bench.gpu.worker MODULE FILE_DESCRIPTOR [--toy]      # as `Worker` starts it
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TextIO

from bench.gpu.cases import MEASURED, NOT_DONE, NOT_MEASURED, TIME_IS_UP, Context, Part, Record, first_line

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0  # in which a process has imported all that it needs
END_SECONDS = 5.0  # in which a process that was asked to end has to


class Worker:
    """A process for the cases of one part. It starts with its first case, and anew after one broke it."""

    def __init__(self, part: Part, toy: bool, log: TextIO) -> None:
        self.part, self.toy, self.log = part, toy, log
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._ready, self._ready_by = False, 0.0  # whether it can be given a case; when it has to be

    def run(self, name: str, seconds: float, note: Callable[[Mapping[str, Any]], None]) -> Record:
        """The record of a case; `note` is given what the case notes on its way.

        What its process takes to start is of the same `seconds`. A process that has not started by then is
        kept for the next case.
        """
        began = time.monotonic()
        until = began + seconds
        try:
            if self._process is None:
                self._start()
            if not self._ready:
                ready_by = min(until, self._ready_by)
                if not self._connection.poll(max(0.0, ready_by - time.monotonic())):
                    # Imports are not the case's fault, and would be repeated if they were to end the process.
                    if until < self._ready_by:
                        return {"status": TIME_IS_UP}
                    self.close()
                    return {"status": f"failed: no process for it in {START_SECONDS:.0f} s"}
                self._connection.recv()
                self._ready = True
            starting = time.monotonic() - began
            self._connection.send((name, max(0.0, seconds - starting)))
            while self._connection.poll(max(0.0, until - time.monotonic())):
                kind, content, broken = self._connection.recv()
                if kind == "note":
                    note(content)
                    continue
                if broken:
                    self.close()
                return content
        except (EOFError, ConnectionError):
            return {"status": f"failed: {self._cause_of_death()}"}
        self.close()
        imports = f", {starting:.0f} of them until its process was there" * (starting >= 1)
        return {"status": f"{NOT_DONE} after {seconds:.0f} s{imports}"}

    def close(self) -> None:
        """End the process and all that it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._process = self._connection = None
        self._ready = False

    def _start(self) -> None:
        self._connection, other_end = Pipe()
        self._ready_by = time.monotonic() + START_SECONDS
        command = [sys.executable, "-m", "bench.gpu.worker", self.part.module, str(other_end.fileno())]
        self._process = subprocess.Popen(
            [*command, "--toy"] if self.toy else command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[other_end.fileno()],
            start_new_session=True,
        )
        other_end.close()

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is None:
            return "the process closed its connection"
        return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def serve(module: str, connection: Connection, toy: bool) -> None:
    """Run cases as they are asked for, until nobody asks any more."""
    import torch

    device = torch.device("cpu" if toy else "cuda")
    if toy:
        torch.set_num_threads(1)  # toys gain nothing from more, and on a busy machine wait for them
    cases = {case.name: case for case in importlib.import_module(module).cases(toy)}

    def note(content: Mapping[str, Any]) -> None:
        connection.send(("note", dict(content), False))

    connection.send("ready")
    while True:
        try:
            name, seconds = connection.recv()
        except EOFError:
            return
        print(f"--- {name}", flush=True)
        try:
            record = {"status": MEASURED, **cases[name].run(Context(device, toy, seconds, note))}
        except torch.OutOfMemoryError as error:
            record = {"status": f"{NOT_MEASURED}: out of GPU memory", "message": first_line(error)}
        except Exception as error:  # the other cases have their figures
            traceback.print_exc()
            record = {"status": f"failed: {first_line(error)}"}
        connection.send(("record", record, is_broken(device)))


def is_broken(device: Any) -> bool:
    """Whether the GPU takes no more work of this process, as after a stray access of a kernel."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"this process is of no more use: {first_line(error)}", flush=True)
        return True
    return False


if __name__ == "__main__":
    serve(sys.argv[1], Connection(int(sys.argv[2])), "--toy" in sys.argv[3:])
