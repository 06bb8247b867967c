"""An update is the same however it is shared out: among processes, in passes, with sharded weights.

Losses are compared to 1e-6 of their values: in float32, sums over processes and passes are rounded in another
order. What one step rounds otherwise, later steps amplify; hence plain gradient descent with momentum where
many steps are compared, as AdamW divides gradients of rounding errors by their own size.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vtp.training.progress
from tests.vtp.training.test_loop import images, make_data, make_model, one_thread, start  # noqa: F401
from vtp.model.architecture import describe
from vtp.pruning.compact import compact
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.selection import make_plan
from vtp.training.config import OPTIMIZERS, TrainConfig
from vtp.training.data import open_data
from vtp.training.loaders import Augment
from vtp.training.loop import TrainingInterrupted, train
from vtp.training.sharding import NOT_SHARDED
from vtp.training.state import ResumeError, write_state

EPOCHS, STEPS = 4, 5
UPDATES = EPOCHS * STEPS
IMAGES = 16  # of an update
CONFIG = TrainConfig(
    epochs=EPOCHS, batch_size=IMAGES, effective_batch=IMAGES, opt="momentum", lr=2e-2, clip_grad=0.5,
    l1=1e-2, gate_lr=2.0, ema_decay=0.9, distill_alpha=0.5, distill_temperature=2.0,
)  # fmt: skip
# Passes of 8 images, whoever takes them: then the random numbers of a pass are the same too.
RANDOM = replace(
    CONFIG, batch_size=8, mixup=0.4, cutmix=0.5, drop_path=0.3, l1=0.05, l1_mode="proximal", clip_grad=None
)
FSDP = replace(CONFIG, fsdp=True, batch_size=4, grad_checkpointing=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image folder with as many images as make an epoch, and some that are left over."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", STEPS * IMAGES + 9), ("val", 24)):
        for index, (image, label) in enumerate(images(count, 0)):
            path = root / split / f"class{label}"
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{index:03}.png")
    return root


def gated_model() -> torch.nn.Module:
    return insert_gates(make_model(width=30))  # rows that neither 2 nor 4 processes divide: 90, 30, 120


def compact_model() -> torch.nn.Module:
    """A cut model of odd widths, one of whose branches has none left."""
    gated = gated_model()
    generator = torch.Generator().manual_seed(0)
    for name, layer in sites(gated).items():
        layer.gate.data = torch.rand(layer.in_features, generator=generator)
        if name == "blocks.0.mlp.fc2":
            layer.gate.data.zero_()
    return compact(gated, make_plan(gated, rate=0.43, min_keep=0.0))


MODELS = {"gated": gated_model, "compact": compact_model}


def trained(
    data: Path, run_dir: Path, config: TrainConfig, *, stop_at=None, model="gated", **options
) -> dict:
    """What a stage in this process gives: its losses by update, and weights and history, or how it ended."""
    losses: dict[int, float] = {}

    def note(_: object, loss: float, updates: int) -> None:
        losses[updates] = loss

    def stop(_: torch.nn.Module, updates: int) -> None:
        if updates == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vtp.training.progress.Board, "step", note)
        try:
            result = train(
                MODELS[model](), open_data(data), config, stage="stage", run_dir=run_dir, progress=False,
                augment=Augment.preset("light", 16), after_step=stop,
                teacher=make_model() if config.distill_alpha else None, **options,
            )  # fmt: skip
        except TrainingInterrupted:
            return {"losses": losses}
    drop_path = describe(result.model).drop_path_rate
    return {
        "losses": losses,
        "weights": result.model.state_dict(),
        "history": result.history,
        "is": (type(result.model).__name__, drop_path, result.model.grad_checkpointing),
    }


def _rank(rank: int, world: int, port: int, out: Path, jobs: dict) -> None:
    # What torchrun sets, on a machine without a GPU.
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.save({name: job() for name, job in jobs.items()}, out / f"rank{rank}.pt")


def on_processes(world: int, out: Path, jobs: dict) -> list[dict]:
    """What each of so many processes returns for the jobs, which all of them do one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(_rank, rank, world, port, out, jobs) for rank in range(world)]
    for process in ranks:
        process.join(timeout=100)
    for process in ranks:
        process.kill()  # one that waits for another that has failed
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(out / f"rank{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict:
    """One process, in one pass where nothing is random and in two where something is."""
    out = tmp_path_factory.mktemp("alone")
    configs = {"plain": CONFIG, "random": RANDOM}
    return {name: trained(folder, out / name, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def on_two(folder, tmp_path_factory) -> tuple[list[dict], Path]:
    """Two processes, and the folder of what they write."""
    out = tmp_path_factory.mktemp("two")
    jobs = {
        "plain": partial(trained, folder, out / "plain", CONFIG),
        "random": partial(trained, folder, out / "random", RANDOM),
        "fsdp": partial(trained, folder, out / "fsdp", FSDP),
        "stopped": partial(trained, folder, out / "stopped", FSDP, stop_at=STEPS + 2),
    }
    return on_processes(2, out, jobs), out


def assert_same(found: dict, expected: dict, since: int = 1, tolerance: float = 1e-6) -> None:
    """Losses of every update, metrics of every epoch, weights and Taylor statistics."""
    assert list(found["losses"]) == list(range(since, len(expected["losses"]) + 1))
    for update, loss in found["losses"].items():
        assert loss == pytest.approx(expected["losses"][update], rel=tolerance), update
    for record, other in zip(found["history"], expected["history"], strict=True):
        for name in ("train_loss", "test_loss", "test_top1", "l1", "gates_mean", "gates_zero", "lr", "step"):
            assert record[name] == pytest.approx(other[name], rel=1e-5), name
    assert found["is"] == expected["is"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in found["weights"].items():
        assert type(value) is torch.Tensor
        other = expected["weights"][name]
        scale = other.double().abs().max().clamp(min=1e-12)
        difference = (value - other).double().abs().max()
        assert difference <= (1e-4 if name.endswith("taylor") else 1e-5) * scale, name


@pytest.mark.parametrize(("job", "expected"), [("plain", "plain"), ("random", "random"), ("fsdp", "plain")])
def test_two_processes_take_the_updates_of_one(alone, on_two, job, expected):
    first, second = (found[job] for found in on_two[0])
    assert len(first["losses"]) == UPDATES
    assert_same(first, alone[expected])
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    taylor = [value for name, value in first["weights"].items() if name.endswith("taylor")]
    assert all(value.max() > 0 for value in taylor)
