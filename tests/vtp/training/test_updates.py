"""An update is the same however it is shared out: among processes, in passes, with sharded weights.

Losses are compared to 1e-6 of their values: in float32, sums over processes and passes are rounded in another
order. What one step rounds otherwise, later steps amplify; hence plain gradient descent with momentum where
many steps are compared, as AdamW divides gradients of rounding errors by their own size.
"""

from __future__ import annotations

import json
import os
import shutil
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
from tests.support.models import FAMILIES
from tests.vtp.training.test_loop import images, make_data, make_model, one_thread, start  # noqa: F401
from vtp.model.images import set_image_config
from vtp.pruning.compact import compact
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.selection import make_plan
from vtp.training.config import OPTIMIZERS, TrainConfig
from vtp.training.data import open_data
from vtp.training.loop import TrainingInterrupted, train
from vtp.training.sharding import NOT_SHARDED, wants_sharding
from vtp.training.state import ResumeError, write_state
from vtp.training.transforms import Augment

EPOCHS, STEPS = 2, 3
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


def family(name: str) -> torch.nn.Module:
    """A gated model of one of the families, for the images of this file."""
    changes = {"img_size": (16, 16), "num_classes": 4, "in_chans": 1, "embed_dim": 12, "num_heads": 3}
    torch.manual_seed(0)
    model = replace(FAMILIES[name], **changes).build()
    set_image_config(model, mean=(0.3,), std=(0.3,))  # as the teacher expects
    return insert_gates(model)


# Two heads of which one learns from the teacher; learned angles, and buffers that are in no file.
OTHERS = ("distilled", "rotary-mixed", "rotary")
MODELS = {"gated": gated_model, "compact": compact_model}
MODELS |= {name: partial(family, name) for name in OTHERS}


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
    drop_path = getattr(result.model.blocks[-1].drop_path1, "drop_prob", 0.0)
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
        process.join(timeout=300)
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
        assert record.keys() == other.keys()
        for name in record.keys() - {"stage", "seconds", "images_per_second", "loader_wait"}:
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


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(FSDP, grad_checkpointing=False)],
    ids=["on one process", "with fsdp asked for, which one process has no use for"],
)
def test_the_checkpoint_of_sharded_training_is_continued_on_one_process(
    folder, tmp_path, alone, on_two, config
):
    losses, out = on_two
    assert list(losses[0]["stopped"]["losses"]) == list(range(1, STEPS + 3))
    shutil.copytree(out / "stopped", tmp_path / "stopped")
    found = trained(folder, tmp_path / "stopped", config, resume=True)
    assert_same(found, alone["plain"], since=STEPS + 3)


def test_the_checkpoint_of_sharded_training_is_that_of_replicated_training(on_two, alone):
    _, out = on_two
    whole, sharded = (
        load_file(out / name / "checkpoints" / "stage.safetensors") for name in ("plain", "fsdp")
    )
    assert {n: (v.shape, v.dtype) for n, v in whole.items()} == {
        n: (v.shape, v.dtype) for n, v in sharded.items()
    }


def test_a_checkpoint_with_other_images_in_an_update_is_refused_saying_what_to_set(folder, tmp_path, on_two):
    shutil.copytree(on_two[1] / "stopped", tmp_path / "stopped")
    expected = r"effective_batch: checkpoint 16, now 8.* --effective-batch 16$"
    with pytest.raises(ResumeError, match=expected):
        trained(folder, tmp_path / "stopped", replace(CONFIG, effective_batch=8), resume=True)


def test_a_checkpoint_that_knows_processes_and_the_images_of_each_is_continued(
    folder, tmp_path, on_two, alone
):
    shutil.copytree(on_two[1] / "stopped", tmp_path / "stopped")
    file = tmp_path / "stopped" / "checkpoints" / "stage.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["vtp-training-state"])
    identity = header["identity"]
    assert identity.pop("effective_batch") == IMAGES
    write_state(
        file, load_file(file), header | {"identity": identity | {"processes": 2, "config.batch_size": 8}}
    )
    found = trained(folder, tmp_path / "stopped", CONFIG, resume=True)
    assert_same(found, alone["plain"], since=STEPS + 3)


def test_passes_of_one_process_are_the_update_of_one_pass(folder, tmp_path, alone):
    found = trained(folder, tmp_path, replace(CONFIG, batch_size=5))  # 4 passes of 4
    assert_same(found, alone["plain"])


def test_blocks_that_are_computed_again_give_the_same_weights_bit_for_bit(folder, tmp_path):
    config = replace(RANDOM, epochs=1, warmup_epochs=0)
    found, expected = (
        trained(folder, tmp_path / str(again), replace(config, grad_checkpointing=again))
        for again in (True, False)
    )
    assert found["losses"] == expected["losses"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in found["weights"].items())
    assert found["is"] == expected["is"]


@pytest.mark.parametrize(
    ("images", "batch_size", "processes", "mixup", "expected"),
    [
        (None, 128, 4, 0.0, (128, 1)),
        (1024, 128, 4, 0.0, (128, 2)),
        (1024, 128, 1, 0.8, (128, 8)),
        (96, 64, 1, 0.0, (48, 2)),
        (8, 128, 4, 0.8, (2, 1)),
    ],
)
def test_an_update_takes_as_few_passes_as_the_batch_size_allows(
    images, batch_size, processes, mixup, expected
):
    config = TrainConfig(effective_batch=images, batch_size=batch_size, mixup=mixup)
    assert config.split(processes) == expected


@pytest.mark.parametrize(
    ("images", "batch_size", "processes", "mixup", "fitting"),
    [
        (1000, 128, 3, 0.0, "999 or 1008 for 3 processes"),
        (100, 40, 1, 0.0, "99 or 102 for 1 process and 40 images"),
        (2, 128, 4, 0.0, "4 for 4 processes"),
        (12, 128, 4, 0.8, "8 or 16 for 4 processes and 128 images .* in pairs"),
    ],
)
def test_images_that_processes_cannot_share_are_refused_with_what_they_could(
    images, batch_size, processes, mixup, fitting
):
    config = TrainConfig(effective_batch=images, batch_size=batch_size, mixup=mixup)
    with pytest.raises(ValueError, match=rf"effective_batch: got {images}, expected {fitting}"):
        config.split(processes)


def test_the_rate_and_the_images_of_an_update_are_said_once(folder, tmp_path, capsys):
    config = replace(CONFIG, epochs=1, batch_size=8, warmup_epochs=0)
    train(
        gated_model(), open_data(folder), config, stage="sparse", run_dir=tmp_path, teacher=make_model(),
        augment=Augment.preset("none"),
    )  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if "lr" in line]
    assert said == [
        f"stage sparse: lr 0.02 for updates of 16 images (2 passes x 8), {STEPS} an epoch; the rate is not "
        "scaled by their number"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "sgdp"}, "config.opt: got 'sgdp' with fsdp"),
        ({"precision": "fp16"}, "config.precision: got 'fp16' with fsdp"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        wants_sharding(replace(FSDP, **changes), processes=2)


def test_sharding_by_accelerate_is_refused(monkeypatch, folder, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP: got true, expected it unset"):
        trained(folder, tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["fsdp", "grad_checkpointing", "compile"])
def test_a_switch_takes_true_or_false(field):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field}: got 1, expected true or false"):
        TrainConfig(**{field: 1})


# ---------------------------------------------------------------------------------------------------------
# Slower: four processes, cut models, every optimizer, torch.compile


@pytest.mark.thorough
def test_four_processes_take_the_updates_of_one_and_continue_what_two_have_begun(
    folder, tmp_path, alone, on_two
):
    shutil.copytree(on_two[1] / "stopped", tmp_path / "stopped")
    shutil.copytree(on_two[1] / "stopped", tmp_path / "sharded")
    four = replace(RANDOM, batch_size=4)
    jobs = {
        "plain": partial(trained, folder, tmp_path / "plain", CONFIG),
        "random": partial(trained, folder, tmp_path / "random", four),
        "stopped": partial(trained, folder, tmp_path / "stopped", CONFIG, resume=True),
        "sharded": partial(trained, folder, tmp_path / "sharded", FSDP, resume=True),
    }
    found = on_processes(4, tmp_path, jobs)[0]
    expected = alone | {"random": trained(folder, tmp_path / "alone", four)}
    for name in ("plain", "random"):
        assert_same(found[name], expected[name])
    for name in ("stopped", "sharded"):
        assert_same(found[name], alone["plain"], since=STEPS + 3)


@pytest.mark.thorough
def test_a_cut_model_of_odd_widths_is_sharded_and_continued_elsewhere(folder, tmp_path):
    config = replace(RANDOM, l1=0.0, distill_type="hard")
    fsdp = replace(config, fsdp=True, grad_checkpointing=True)
    expected = trained(folder, tmp_path / "alone", config, model="compact")
    jobs = {
        "fsdp": partial(trained, folder, tmp_path / "fsdp", fsdp, model="compact"),
        "stopped": partial(trained, folder, tmp_path / "stopped", fsdp, model="compact", stop_at=STEPS + 1),
    }
    assert_same(on_processes(2, tmp_path, jobs)[0]["fsdp"], expected)
    found = trained(folder, tmp_path / "stopped", config, model="compact", resume=True)
    assert_same(found, expected, since=STEPS + 2)


@pytest.mark.thorough
def test_models_of_other_families_are_sharded(folder, tmp_path):
    base = replace(CONFIG, epochs=1, warmup_epochs=0)
    fsdp = replace(base, fsdp=True, batch_size=4, grad_checkpointing=True)
    jobs = {name: partial(trained, folder, tmp_path / name, fsdp, model=name) for name in OTHERS}
    found = on_processes(2, tmp_path, jobs)[0]
    for name in OTHERS:
        assert_same(found[name], trained(folder, tmp_path / "alone" / name, base, model=name))


@pytest.mark.thorough
def test_every_optimizer_takes_the_same_steps_with_sharded_weights(folder, tmp_path):
    chosen = [name for name in OPTIMIZERS if name not in NOT_SHARDED]
    base = replace(CONFIG, epochs=1, warmup_epochs=0, lr=1e-3, distill_alpha=0.0)
    jobs = {
        name: partial(trained, folder, tmp_path / name, replace(base, opt=name, fsdp=True)) for name in chosen
    }
    found = on_processes(2, tmp_path, jobs)[0]
    for name in chosen:
        expected = trained(folder, tmp_path / "alone" / name, replace(base, opt=name))
        for update in (1, 2, 3):  # what is rounded otherwise grows with the steps
            assert found[name]["losses"][update] == pytest.approx(expected["losses"][update], rel=1e-5), name


@pytest.mark.thorough
def test_a_compiled_model_takes_the_updates_of_one_that_is_not_and_writes_its_checkpoint(
    folder, tmp_path, alone
):
    config = replace(CONFIG, compile=True, grad_checkpointing=True)
    stopped = trained(folder, tmp_path / "stopped", config, stop_at=STEPS + 1)
    assert list(stopped["losses"]) == list(range(1, STEPS + 2))
    assert stopped["losses"] == pytest.approx(
        {n: alone["plain"]["losses"][n] for n in stopped["losses"]}, rel=1e-6
    )
    found = trained(folder, tmp_path / "stopped", CONFIG, resume=True)
    assert_same(found, alone["plain"], since=STEPS + 2)


def traced(*arguments, **options) -> dict:
    """`trained` with graphs that are traced as usual but run by PyTorch: to make code of them takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        return trained(*arguments, **options)


@pytest.mark.thorough
def test_cut_models_are_compiled_and_what_bf16_wraps_is_unwrapped(folder, tmp_path, alone):
    config = replace(CONFIG, l1=0.0)
    expected = trained(folder, tmp_path / "eager", config, model="compact")
    found = traced(folder, tmp_path / "traced", replace(config, compile=True), model="compact")
    assert_same(found, expected)
    half = traced(folder, tmp_path / "half", replace(CONFIG, compile=True, precision="bf16"))
    assert half["losses"] == pytest.approx(alone["plain"]["losses"], rel=1e-2)
    assert half["is"] == alone["plain"]["is"]
    assert {value.dtype for value in half["weights"].values()} == {torch.float32, torch.int64}


@pytest.mark.thorough
def test_compiled_models_train_on_two_processes_as_one_that_is_not_on_one(folder, tmp_path, alone):
    jobs = {
        "plain": partial(traced, folder, tmp_path / "plain", replace(CONFIG, compile=True)),
        "fsdp": partial(traced, folder, tmp_path / "fsdp", replace(FSDP, compile=True)),
    }
    found = on_processes(2, tmp_path, jobs)[0]
    for name in jobs:
        assert_same(found[name], alone["plain"])
