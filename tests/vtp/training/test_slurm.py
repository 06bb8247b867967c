"""What srun says to its tasks makes them the ranks of one run."""

from __future__ import annotations

import os

import pytest

from vtp import cli, commands
from vtp.training.ranks import WORLD_SIZES
from vtp.training.slurm import first_host

# As Slurm 22.05 sets them for the last of two tasks each on two machines.
TASK = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3",
}  # fmt: skip
# As it sets them for the script that sbatch has sent.
SCRIPT = {
    "SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
}  # fmt: skip
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK = dict(zip(NAMES, ("3", "1", "4", "2", "gpu07", "64341"), strict=True))


@pytest.fixture
def told(monkeypatch):
    """What a command finds of its rank in an environment."""

    def told(environment: dict[str, str]) -> dict[str, str]:
        found = {}
        monkeypatch.setattr(
            commands,
            "run",
            lambda *_, **__: found.update({n: os.environ[n] for n in NAMES if n in os.environ}),
        )
        with monkeypatch.context() as context:
            for name in [n for n in os.environ if n in (*NAMES, *WORLD_SIZES) or n.startswith("SLURM_")]:
                context.delenv(name)
            for name, value in environment.items():
                context.setenv(name, value)
            before = set(os.environ)
            try:
                assert cli.main(["run", "--out", "unused"]) == 0
            finally:
                for name in set(os.environ) - before:
                    del os.environ[name]
        return found

    return told


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        pytest.param({}, RANK, id="srun"),
        pytest.param({"PMI_SIZE": "4", "PMI_RANK": "3"}, RANK, id="srun --mpi=pmi2"),
        pytest.param(
            {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "29500"},
            RANK | {"MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "29500"},
            id="what the user sets stays",
        ),
        pytest.param({"SLURM_STEP_NUM_TASKS": "1"}, {}, id="one task"),
        pytest.param({"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}, id="tasks that are to be runs of their own"),
        pytest.param(
            {"RANK": "9", "WORLD_SIZE": "16"}, {"RANK": "9", "WORLD_SIZE": "16"}, id="torchrun under srun"
        ),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "16"}, {}, id="mpirun under srun"),
    ],
)
def test_tasks_of_srun_are_ranks_of_one_run_unless_another_launcher_is_between(told, more, expected):
    assert told(TASK | more) == expected


@pytest.mark.parametrize(
    ("without", "tasks", "message"),
    [
        ("SLURM_STEP_ID", "2", "got '2' and no SLURM_STEP_ID; WORLD_SIZE=1 makes"),
        ("SLURM_GTIDS", "2", "got '2' and no SLURM_GTIDS"),
        ("", "two", "got 'two' and no number"),
        ("", "", "got '' and no number"),
    ],
)
def test_what_srun_has_not_said_is_named(monkeypatch, capsys, without, tasks, message):
    for name in (*NAMES, *WORLD_SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in (TASK | {"SLURM_STEP_NUM_TASKS": tasks}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(without, raising=False)
    assert cli.main(["run", "--out", "unused"]) == 2
    assert f"vtp: error: SLURM_STEP_NUM_TASKS: {message}" in capsys.readouterr().err


def test_the_script_of_sbatch_is_no_rank_and_waits_for_none(told):
    assert told(SCRIPT) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("gpu[3,5-7]", "gpu3"),
        ("gpu[07-08]-ib,gpu[09-10]-ib", "gpu07-ib"),
        ("rack[2-3]node[01-04,9]", "rack2node01"),
        ("a.example.org,b[1-2].example.org", "a.example.org"),
    ],
)
def test_the_first_machine_of_a_list_is_that_of_rank_0(nodes, first):
    assert first_host(nodes) == first
