"""A Slurm of two machines, each a network namespace with a name of its own, as long as a test needs it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=toy
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
NodeName=node[1-2] CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Each with a name of its own and the addresses of all, which /etc/hosts gives to it alone.
ON_NODE = 'mount --bind {root}/hosts /etc/hosts && hostname node{number} && exec "$@"'


class Slurm:
    """The cluster. root: the folder of its files."""

    def __init__(self, root: Path, namespaces: list[str]) -> None:
        self.root, self.namespaces = root, namespaces

    def command(self, *arguments: str, node: int = 1, **environment: str) -> str:
        """What a command prints on a machine. Raises CalledProcessError, with all its output, if it fails."""
        inside = ["unshare", "--uts", "--mount", "bash", "-c", ON_NODE.format(root=self.root, number=node)]
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespaces[node - 1], *inside, "-", *arguments],
            env=os.environ | {"SLURM_CONF": str(self.root / "slurm.conf")} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=True,
        )  # fmt: skip
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job, such as PENDING or COMPLETED."""
        found = re.search(r"JobState=(\w+)", self.command("scontrol", "show", "job", job))
        return found[1] if found else "unknown"


@contextmanager
def slurm(namespaces: list[str], addresses: list[str]) -> Iterator[Slurm]:
    """Slurm on two network namespaces that reach each other by these addresses; needs DAEMONS, and root."""
    root = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds a socket
    (root / "slurm.conf").write_text(CONFIG.format(root=root))
    for number in range(8):  # GPUs, in name
        (root / f"gpu{number}").touch()
    (root / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={root}/gpu[0-7]\n")
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")  # of which none is used
    names = "".join(f"{address} node{number}\n" for number, address in enumerate(addresses, start=1))
    (root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for name in ("state", "node1", "node2"):
        (root / name).mkdir()
    cluster = Slurm(root, namespaces)
    try:
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        munged = ["munged", "--force", *(f"--{f}={root}/munge.{f.removesuffix('-file')}" for f in files)]
        subprocess.run(munged, check=True, capture_output=True, timeout=30)
        cluster.command("slurmctld")
        for node in (1, 2):
            cluster.command("slurmd", node=node)
        _until_idle(cluster)
        yield cluster
    finally:
        for file in root.glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        for namespace in namespaces:  # what the daemons have started
            pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout
            for pid in pids.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)


def _until_idle(cluster: Slurm) -> None:
    deadline = time.monotonic() + 30
    while cluster.command("sinfo", "-h", "-N", "-o", "%T").split() != ["idle", "idle"]:
        if time.monotonic() > deadline:
            raise RuntimeError("".join(log.read_text() for log in cluster.root.glob("*.log")))
        time.sleep(0.2)
