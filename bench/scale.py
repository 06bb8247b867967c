"""What several processes cost: training steps a second with 1, 2 and 4 of them here, and bytes between GPUs.

Measured: a whole training step (forward, cross-entropy, backward, mean over the processes, Taylor statistics
and penalty of gates, AdamW) of one model on the same images, however many processes share them, each with one
CPU thread, connected by gloo: without gates, with gates, and with gates and sharded weights. All groups of
processes live side by side and take turns round by round; one that is not asked waits. A variant is timed
only if the loss of its first step is that of one process. More processes than cores can show what
communication costs, not what it gains.

Predicted: from the bytes of the gradients with and without gates, counted from the models themselves, the
time that they take between 8 and 64 GPUs at the bandwidth of the slowest link, a ring: nothing of latencies,
of what computing hides, or of any measurement.

    python -m bench.scale
    python -m bench.scale --markdown      # the tables of docs/scale.md, from a run's file
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vtp
from bench.results_file import (
    add_results_file,
    check_results_file,
    markdown_table,
    print_results,
    write_results,
)
from vtp.files import FileError
from vtp.machine import commit, environment, hardware, in_one_line
from vtp.options import positive
from vtp.timing import pairwise_ratio, turns
from vtp.training.config import TrainConfig
from vtp.training.sharding import average_gradients, shard
from vtp.training.sparsity import gate_param_groups, gated_linears, settle_gates

RESULTS = Path(__file__).parent / "results" / "scale.json"
PROCESSES = (1, 2, 4)
DENSE, GATED, SHARDED = "no gates", "gates", "gates, sharded"
TOLERANCE = 1e-5  # relative, of the loss of the first step
CONFIG = TrainConfig(lr=1e-5, l1=1e-4)

MODELS = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of 8, and the bytes a second that rings through all of them carry over the slowest link.

    As many rings as a node has network adapters run side by side, each leaving the node by another one.
    """

    gpus: int
    bandwidth: float
    link: str


# NVIDIA DGX H100, data sheet: NVLink 4 with 900 GB/s per GPU, both directions together; eight ConnectX-7
# adapters of 400 Gbit/s (NDR InfiniBand) in a node. And a node with one adapter of 100 Gbit/s.
CLUSTERS = (
    Cluster(8, 450e9, "NVLink 4"),
    Cluster(64, 400e9, "8 x 400 Gbit/s a node"),
    Cluster(64, 12.5e9, "100 Gbit/s a node"),
)

# --------------------------------------------------------------------------------
# Predicted


def gradient_bytes(name: str) -> dict[str, int]:
    """Of timm's model: bytes of its float32 gradients without gates, and of those of the gates."""
    with torch.device("meta"):
        gated = vtp.insert_gates(timm.create_model(name))
    gates = {id(layer.gate) for layer in gated_linears(gated)}
    found = {"weights": 0, "gates": 0}
    for parameter in gated.parameters():
        if parameter.requires_grad:
            found["gates" if id(parameter) in gates else "weights"] += 4 * parameter.numel()
    return found


def all_reduce_seconds(size: int, cluster: Cluster) -> float:
    """Of so many bytes in a ring: each GPU sends 2 (n - 1) / n of them."""
    return 2 * (cluster.gpus - 1) / cluster.gpus * size / cluster.bandwidth


def sharded_seconds(size: int, cluster: Cluster) -> float:
    """Weights gathered for the forward and for the backward pass, gradients scattered: 3 (n - 1) / n."""
    return 1.5 * all_reduce_seconds(size, cluster)


def predict(models: Mapping[str, str] = MODELS) -> list[dict[str, Any]]:
    """Bytes and predicted milliseconds for each model and cluster."""
    rows = []
    for title, name in models.items():
        size = gradient_bytes(name)
        row: dict[str, Any] = {"model": title, **size, "predicted": []}
        for cluster in CLUSTERS:
            row["predicted"].append(
                {
                    "gpus": cluster.gpus,
                    "link": cluster.link,
                    "replicated_ms": 1e3 * all_reduce_seconds(size["weights"], cluster),
                    "sharded_ms": 1e3 * sharded_seconds(size["weights"], cluster),
                    "gates_ms": 1e3 * all_reduce_seconds(size["gates"], cluster),
                }
            )
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------
# Measured: in each process of a group


class _Variant:
    """A model with its optimizer, and this process's share of the images."""

    def __init__(self, name: str, build: Callable[[], nn.Module], images: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)  # the same weights and images in every process
        model = build().train()
        size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
        self.images = torch.randn(images, *size)[rank::world]
        self.labels = (torch.arange(images) % model.num_classes)[rank::world]
        self.bare = model if name == DENSE else vtp.insert_gates(model)
        self.sharded = name == SHARDED
        if self.sharded:
            shard(self.bare, torch.device("cpu"))
        self.model = self.bare if self.sharded or world == 1 else DistributedDataParallel(self.bare)
        self.gated = gated_linears(self.bare)
        gates = [layer.gate for layer in self.gated]
        self.optimizer = create_optimizer_v2(
            self.bare,
            opt=CONFIG.opt,
            lr=CONFIG.lr,
            param_group_fn=lambda model: gate_param_groups(model, gates, CONFIG),
            fused=True,
        )

    def step(self) -> Tensor:
        """One training step. Returns the loss of this process's images."""
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        if self.sharded:
            average_gradients(layer.gate for layer in self.gated)
        if self.gated:
            settle_gates(self.gated, CONFIG, take_taylor=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _work(
    rank: int, world: int, port: int, build: Callable[[], nn.Module], images: int, orders: Connection
) -> None:
    """One process: prepares each variant it is asked for, and steps when it is told to."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    variants: dict[str, _Variant] = {}
    while (order := orders.recv()) is not None:
        name, steps = order
        if name not in variants:
            variants[name] = _Variant(name, build, images)
            loss = variants[name].step()
            dist.all_reduce(loss)
            orders.send(loss.item() / world)
            continue
        dist.barrier()
        started = perf_counter()
        for _ in range(steps):
            variants[name].step()
        dist.barrier()
        orders.send(perf_counter() - started)
    dist.destroy_process_group()


# --------------------------------------------------------------------------------
# Measured: the groups, from outside


class _Group:
    """So many processes, each with a pipe to it."""

    def __init__(self, world: int, build: Callable[[], nn.Module], images: int) -> None:
        context = multiprocessing.get_context("forkserver")  # PyTorch is imported once for them all
        context.set_forkserver_preload(["torch", "timm"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, port, build, images, theirs)
            self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that the end of the process ends the pipe
            self.pipes.append(ours)

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):  # it has ended
                pipe.send(None)
            process.join(timeout=10)
            process.kill()

    def ask(self, variant: str, steps: int) -> float:
        """Seconds of so many steps, or at a variant's first call its loss: the slowest process's answer."""
        for pipe in self.pipes:
            pipe.send((variant, steps))
        return max(pipe.recv() for pipe in self.pipes)


def deit_tiny() -> nn.Module:
    """DeiT-T with random weights."""
    return timm.create_model("deit_tiny_patch16_224")


def measure(build: Callable[[], nn.Module], *, images: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds of a step in each round for each variant and number of processes.

    Raises:
        RuntimeError: the loss of a first step is not that of one process without gates.
    """
    groups = {world: _Group(world, build, images) for world in PROCESSES}
    try:
        cases = {
            f"{variant} on {world}": (variant, world)
            for world in PROCESSES
            for variant in (DENSE, GATED, SHARDED)
            if world > 1 or variant != SHARDED
        }
        losses = {name: groups[world].ask(variant, 0) for name, (variant, world) in cases.items()}
        expected = losses[f"{DENSE} on {PROCESSES[0]}"]
        wrong = {n: loss for n, loss in losses.items() if abs(loss - expected) > TOLERANCE * abs(expected)}
        if wrong:
            raise RuntimeError(
                f"losses of the first step: got {wrong}, expected {expected} as of one process"
            )
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(rounds):
            for name in turns(list(cases), number):
                variant, world = cases[name]
                seconds[name].append(groups[world].ask(variant, steps) / steps)
        rows = []
        for name, (variant, world) in cases.items():
            alone = seconds[f"{DENSE if variant == DENSE else GATED} on {PROCESSES[0]}"]
            row = {"processes": world, "variant": variant, "seconds": seconds[name]}
            row["steps_per_second"] = 1 / statistics.median(seconds[name])
            row["speedup"] = pairwise_ratio(alone, seconds[name])
            row["to_ungated"] = pairwise_ratio(seconds[name], seconds[f"{DENSE} on {world}"])
            rows.append(row)
        return rows
    finally:
        for group in groups.values():
            group.end()


# --------------------------------------------------------------------------------
# Command line


def predicted_table(predicted: Sequence[Mapping[str, Any]]) -> str:
    """What `predict` gives, as Markdown."""
    rows = [["model", "gradients, MB", "of gates, MB", "share"]]
    rows[0] += [f"{c.gpus} GPUs, {c.link}: ms" for c in CLUSTERS]
    for row in predicted:
        line = [row["model"], f"{row['weights'] / 1e6:.1f}", f"{row['gates'] / 1e6:.3f}"]
        line.append(f"{row['gates'] / row['weights']:.2%}")
        for cell in row["predicted"]:
            line.append(f"{cell['replicated_ms']:.2f} / {cell['sharded_ms']:.2f} / {cell['gates_ms']:.4f}")
        rows.append(line)
    return markdown_table(rows)


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of docs/scale.md."""
    arguments = results["arguments"]
    cores = results["hardware"]["cores"]
    measured = [["processes", "weights", "steps a second", "times one process", "time / no gates"]]
    for row in results["measured"]:
        ratios = (row["speedup"], row["to_ungated"])
        measured.append(
            [
                str(row["processes"]),
                row["variant"],
                f"{row['steps_per_second']:.2f}",
                *(f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" for ratio in ratios),
            ]
        )
    return (
        f"Measured: {arguments['images']} images an update, one thread for each process, gloo, {cores} cores "
        f"(more processes than those take turns on them); {in_one_line(results)}.\n\n"
        f"{markdown_table(measured)}\n**Predicted**, not measured, from bytes and bandwidth alone: "
        "milliseconds for the weights replicated / sharded / what gates add:\n\n"
        f"{predicted_table(results['predicted'])}"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        "python -m bench.scale", description="Training steps a second with 1, 2 and 4 processes."
    )
    parser.add_argument("--images", type=positive(int), default=16, help="of an update (default 16)")
    parser.add_argument("--rounds", type=positive(int), default=9, help="default 9")
    parser.add_argument("--steps", type=positive(int), default=2, help="of a turn (default 2)")
    add_results_file(parser, RESULTS)
    options = parser.parse_args(argv)
    if options.images % max(PROCESSES):
        parser.error(f"argument --images: got {options.images}, expected a multiple of {max(PROCESSES)}")
    check_results_file(parser, options)
    return options


def main(
    argv: Sequence[str] | None = None,
    build: Callable[[], nn.Module] = deit_tiny,
    models: Mapping[str, str] = MODELS,
) -> int:
    """Run the command line. Returns the exit status: 1 where a first step was wrong, 2 where there is no file
    to read or write. build: the model that is trained; models: whose bytes are counted."""
    options = parse_arguments(argv)
    if options.markdown:
        return print_results(options.out, markdown)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "environment": environment(),
        "hardware": hardware(torch.device("cpu")),
        **commit(),
        "arguments": {**vars(options), "out": options.out.name},
        "predicted": predict(models),
    }
    cores = os.cpu_count() or 1
    if cores < max(PROCESSES):
        print(f"note: {max(PROCESSES)} processes share {cores} cores", file=sys.stderr)
    try:
        results["measured"] = measure(
            build, images=options.images, rounds=options.rounds, steps=options.steps
        )
        write_results(options.out, results)
    except (RuntimeError, FileError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    print(markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
