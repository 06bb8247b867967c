"""Kill a random process of a run at a random moment, continue the run, and see that nothing of it shows.

    python -m bench.kills --kills 50                # some ten minutes on two idle cores
    python -m bench.kills --kills 50 --data DATA    # as `vtp run` takes it, instead of shards that it makes

`vtp run` in all three stages, on two processes (gloo, one thread each), of a tiny DeiT with a new head. One
that is killed by SIGKILL takes the other one with it, within LIMIT seconds and with a message that names its
rank; the folder then has no damaged file. The same command with --resume goes on, is killed again, up to
three times, and ends with the models, metrics and accuracies of a run that nobody has disturbed, bit for bit.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import vtp
from vtp import cli, pipeline
from vtp.files import fingerprint
from vtp.recipes import STAGES
from vtp.timing import interleaved_latency
from vtp.training.ranks import GRACE, IDLE, INTERVAL, PROBES
from vtp.training.state import STATE_FORMAT

RANKS = 2
LIMIT = IDLE + INTERVAL * PROBES + GRACE  # seconds in which the other ranks end, as docs/scale.md says it
WHOLE = 300  # seconds in which a run that is not killed has to end
KILLS_IN_A_RUN = 3
MODELS = ("dense", "sparse", "pruned", "compact")
TIMES = ("seconds", "images_per_second", "loader_wait")  # of metrics.jsonl: what no two runs share


class Damage(AssertionError):
    """Something shows of a kill."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing shows of any kill, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the ranks and moments")
    parser.add_argument("--data", help="data of small grey images (default: made by this program)")
    parser.add_argument("--keep", help="work in this folder, and leave it (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            kill_runs(folder, options.kills, seed=options.seed, data=options.data)
        except Damage as damage:
            print(f"damage: {damage}", file=sys.stderr)
            return 1
    return 0


def kill_runs(folder: Path, kills: int, *, seed: int = 0, data: str | None = None, epochs: int = 2) -> None:
    """Kill so many times, in as many runs as that takes, and print a line about each.

    folder: for the runs and what they need. epochs: of each stage. Raises Damage if anything shows.
    """
    chance = random.Random(seed)
    model = folder / "model.safetensors"
    vtp.save(_tiny(), model)
    if data is None:
        data = str(folder / "shards")
        _make_shards(folder / "shards")
    command = _command(str(model), data, epochs)
    run = _Run(folder / "undisturbed", command)
    seconds = run.to_the_end()
    print(f"undisturbed: {seconds:.1f} s from its first line", flush=True)
    stages, slowest, number, done = Counter(), 0.0, 0, 0
    while done < kills:
        number += 1
        disturbed, resumed = folder / f"run{number}", False
        for _ in range(min(KILLS_IN_A_RUN, kills - done)):
            left = seconds * (1 - _share(disturbed, len(STAGES) * epochs))
            killed = _Run(disturbed, command, resume=resumed)
            stage, rank, took, said = killed.killed(chance.uniform(0, 0.9 * left), chance)
            resumed = True
            if rank is None:
                break  # it was faster
            done += 1
            stages[stage], slowest = stages[stage] + 1, max(slowest, took)
            print(f"kill {done}: run {number}, {stage}, rank {rank}; {took:.1f} s: {said}", flush=True)
            check_files(disturbed)
        _Run(disturbed, command, resume=True).to_the_end()
        check_files(disturbed)
        check_equal(disturbed, folder / "undisturbed")
        print(f"run {number}: ended as the undisturbed one", flush=True)
    counts = ", ".join(f"{count} in {stage}" for stage, count in stages.items())
    print(f"{done} kills in {number} runs ({counts}); the others ended within {slowest:.1f} s; no damage")


# ------------------------------------------------------------------------------------------------ runs


class _Run:
    """The processes of `vtp run`, which have begun."""

    def __init__(self, out: Path, command: list[str], *, resume: bool = False) -> None:
        self.out = out
        self.logs = [out.with_name(f"{out.name}.rank{rank}.log") for rank in range(RANKS)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        arguments = [*command, "--out", str(out), *(["--resume"] if resume else [])]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision", "timm", "vtp.cli"])  # imports that take seconds
        self.processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, port, arguments, log))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()
        self._until(lambda: "model " in self.text(0), "its first line")
        self.began = time.monotonic()

    def text(self, rank: int) -> str:
        """What a process has said."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def to_the_end(self) -> float:
        """Seconds that it took. Raises Damage if it does not end well."""
        self._join(WHOLE)
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            raise Damage(f"{self.out.name} ended with {codes}:\n{self.text(0)}\n{self.text(1)}")
        return time.monotonic() - self.began

    def killed(self, after: float, chance: random.Random) -> tuple[str, int | None, float, str]:
        """Kill a process after so many seconds: the stage, its rank, how long the others lived, what they
        said. Rank None if the run was faster."""
        time.sleep(max(after - (time.monotonic() - self.began), 0))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if 0 not in alive:
            self.to_the_end()
            return "", None, 0.0, ""
        victim = chance.choice(alive)
        os.kill(self.processes[victim].pid or 0, signal.SIGKILL)
        killed = time.monotonic()
        self._join(LIMIT)
        took = time.monotonic() - killed
        lines = [
            line for line in self.text(0).splitlines() if line.startswith(("stage ", "Pruning", "comparing"))
        ]
        stage = lines[-1].split(":")[0] if lines else "start"
        if stage == "comparing" and victim and self.processes[0].exitcode == 0:
            return "", None, took, ""  # it had done its work, and rank 0 did without it what was left
        said = ""
        for rank in set(alive) - {victim}:
            said = self.text(rank).splitlines()[-1]
            if f"rank {victim} " not in said or self.processes[rank].exitcode != 1:
                raise Damage(f"rank {rank} ended with {self.processes[rank].exitcode}:\n{self.text(rank)}")
        return {"PruningPlan": "cut"}.get(stage, stage.split(" ")[-1]), victim, took, said

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self._kill()
        if hanging:
            raise Damage(f"{self.out.name}: ranks {hanging} had not ended after {seconds:.0f} s")

    def _until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + WHOLE
        while not condition():
            if time.monotonic() > deadline or any(process.exitcode for process in self.processes):
                self._kill()
                raise Damage(f"{self.out.name} did not come to {what}:\n{self.text(0)}\n{self.text(1)}")
            time.sleep(0.02)

    def _kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()


def _rank(rank: int, port: int, arguments: list[str], log: Path) -> None:
    """One process of a run, as torchrun would start it."""
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {**shared, **own, "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    pipeline.interleaved_latency = lambda models, x: interleaved_latency(models, x, seconds=0.0)
    sys.exit(cli.main(arguments))


def _command(model: str, data: str, epochs: int) -> list[str]:
    stages = [
        f"--set={stage}.{setting}"
        for stage in STAGES
        for setting in (f"epochs={epochs}", "warmup_epochs=0.5")
    ]
    sizes = ["--batch-size", "8", "--latency-batch", "1", "--images", "48"]
    return ["run", "--model", model, "--data", data, "--new-head", *sizes, *stages]


def _tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=3, embed_dim=48, depth=2,
        num_heads=2, pretrained_cfg_overlay={"mean": (0.4,), "std": (0.3,)},
    )  # fmt: skip


def _make_shards(root: Path) -> None:
    """Four webdataset shards for training and one to test on, of three classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for split, shards, count in (("train", 4, 48), ("val", 1, 48)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard:03d}.tar", "w") as tar:
                for number in range(count):
                    label, image = number % 3, io.BytesIO()
                    pixels = rng.integers(0, 120, (28, 28)) + 60 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(image, "PNG")
                    for ending, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{shard:03d}{number:05d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


# ------------------------------------------------------------------------------------------------ what shows


def check_files(out: Path) -> None:
    """Raises Damage if a file of a run folder is not whole: other than a temporary one, or the last line of
    metrics.jsonl, as long as the run has not ended."""
    for path in out.rglob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            if STATE_FORMAT in header:
                whole = header[f"{STATE_FORMAT}-sha256"] == fingerprint(load_file(path), header[STATE_FORMAT])
            else:
                whole = bool(load_file(path) if path.parent.name == "timm" else vtp.load(path).state_dict())
        except Exception as error:
            raise Damage(f"{path}: {error}") from error
        if not whole:
            raise Damage(f"{path}: its SHA-256 does not match")
    for path in out.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise Damage(f"{path}: {error}") from error


def check_equal(out: Path, expected: Path) -> None:
    """Raises Damage unless a run that has ended left what another one did."""
    names = [
        sorted(str(p.relative_to(each)) for p in each.rglob("*") if _counts(p)) for each in (out, expected)
    ]
    if names[0] != names[1]:
        raise Damage(f"{out.name}: files {sorted(set(names[0]) ^ set(names[1]))} are left over or missing")
    for name in MODELS:
        ours, theirs = (_digest(each / f"{name}.safetensors") for each in (out, expected))
        if ours != theirs:
            raise Damage(f"{out.name}: {name}.safetensors is another one")
    for what, read in (("metrics", _metrics), ("accuracies", _accuracies)):
        if read(out) != read(expected):
            raise Damage(f"{out.name}: {what} are {read(out)}, expected {read(expected)}")


def _digest(path: Path) -> str:
    """Of all that is in a file of safetensors, which writes its metadata in any order."""
    with safe_open(path, "pt") as file:
        return fingerprint(load_file(path), json.dumps(file.metadata(), sort_keys=True))


def _counts(path: Path) -> bool:
    return path.is_file() and "tensorboard" not in path.parts  # which has a file for each start


def _metrics(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if name not in TIMES} for line in lines]


def _accuracies(out: Path) -> list[float]:
    results = json.loads((out / "results.json").read_text())
    return [row["top1"] for name in ("rows", "reslice") for row in results[name]]


def _share(out: Path, epochs: int) -> float:
    """How much of a run is done, by its epochs."""
    with suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_text().count("\n") / (epochs + 1)  # and what follows them
    return 0.0


if __name__ == "__main__":
    from bench import kills  # whose functions the forks find by their module's name

    sys.exit(kills.main())
