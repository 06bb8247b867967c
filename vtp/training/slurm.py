"""Tasks that Slurm's srun has started: they are told of each other as torchrun tells its processes."""

from __future__ import annotations

import os
import re

from vtp.training.ranks import WORLD_SIZES

# Ports above those that Linux gives to clients; as for jobs that share a machine, each step has its own.
FIRST_PORT, PORTS = 61000, 4500
_OF_A_STEP = [
    f"SLURM_{name}" for name in ("JOB_ID", "STEP_ID", "PROCID", "LOCALID", "GTIDS", "STEP_NODELIST")
]


def join_tasks() -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, those that are not
    set, where srun has started this process as one of several tasks.

    Nothing is set where these are no ranks: in processes of another launcher under srun, whose number is
    another one, with WORLD_SIZE=1, and in the script of sbatch, which is in no step.

    Raises:
        ValueError: srun has not said all that ranks are told.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or any(os.environ.get(name, tasks) != tasks for name in WORLD_SIZES):
        return
    missing = [name for name in _OF_A_STEP if not os.environ.get(name)]
    if missing or not tasks.isdecimal():
        what = f"no {', '.join(missing)}" if missing else "no number"
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS: got {tasks!r} and {what}; WORLD_SIZE=1 makes a run of its own"
        )
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    for name, value in {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": str(len(os.environ["SLURM_GTIDS"].split(","))),
        "MASTER_ADDR": first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (10 * job + step) % PORTS),
    }.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first of a list of machines as Slurm writes it: gpu007 of "gpu[007-012,20],login1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)
