"""Processes that start at once: forks of a server that has imported what takes seconds, and run nothing yet.

A fork of the test's own process would start as soon, but hangs where its parent has used threads before; a
process from scratch imports PyTorch again.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Nothing of the project. With timm comes Triton: the interpreter of kernels starts from scratch, as it has to
# set TRITON_INTERPRET before.
PRELOADED = ["torch", "torchvision", "timm"]


def forks() -> ForkServerContext:
    """The context whose processes are such forks. They have the environment of the first one's start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def on_ranks(count: int, function: Callable, *arguments: Any, timeout: float = 120.0) -> list[int | None]:
    """Run `function(rank, *arguments)`, of the top of a module, on so many ranks, as torchrun would start
    them on a machine without a GPU, with a thread each: their exit statuses, None of one that hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        forks().Process(target=_rank, args=(rank, count, port, function, arguments)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return statuses


def _rank(rank: int, count: int, port: int, function: Callable, arguments: tuple) -> None:
    import torch  # the server has

    torch.set_num_threads(1)
    shared = {
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",
    }
    own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in (shared | own).items()}
    function(rank, *arguments)


def python(
    code: str, first_path: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess:
    """Run `code` in such a fork, as `python -c` would at the root of the repository: exit status (minus the
    number of a signal) and output.

    first_path: where imports look first. environment: what is set, or with None unset, before `code` runs;
        PyTorch, which is imported already, has read its own.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = Path(name) / "out", Path(name) / "err"
        process = forks().Process(target=_run, args=(code, first_path, environment, outputs))
        process.start()
        process.join()
        out, err = (path.read_text(encoding="utf-8") for path in outputs)
        return subprocess.CompletedProcess(code, process.exitcode, out, err)


def _run(
    code: str, first_path: Path | None, environment: dict[str, str | None], outputs: tuple[Path, ...]
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if first_path is not None:
        sys.path.insert(0, str(first_path))
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
