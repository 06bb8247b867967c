"""The training loop: reproducible, resumable, and doing to gates and weights what it says."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vtp.training.progress
from tests.support.processes import forks
from vtp.model.architecture import describe
from vtp.pruning.compact import compact
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.selection import make_plan
from vtp.training.config import TrainConfig
from vtp.training.data import Data, open_data
from vtp.training.evaluation import NonFiniteLossError, evaluate
from vtp.training.loop import TrainingInterrupted, train
from vtp.training.ranks import accelerator
from vtp.training.sparsity import gate_statistics, soft_threshold
from vtp.training.state import ResumeError, write_state
from vtp.training.teacher import distillation_loss
from vtp.training.transforms import Augment

AUGMENT = Augment.preset("light", 16)
STEPS = 6  # of an epoch: 96 images in batches of 16
CONFIG = TrainConfig(epochs=3, batch_size=16, lr=3e-3)
EVERYTHING = replace(CONFIG, mixup=0.2, cutmix=0.5, drop_path=0.2, ema_decay=0.9, clip_grad=1.0)
SPARSE = replace(CONFIG, l1=1e-2, gate_lr=5.0, distill_alpha=0.5, distill_temperature=2.0)
KINDS = {
    "everything": EVERYTHING,
    "subgradient": SPARSE,
    "proximal": replace(SPARSE, l1=1.0, l1_mode="proximal", ema_decay=0.9),
    "bf16": replace(SPARSE, precision="bf16"),
}


def images(count: int, seed: int) -> list[tuple[Image.Image, int]]:
    """Grey images of 16x16 noise, as bright as their class says."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (count, 16, 16), dtype=np.uint8)
    return [(Image.fromarray(pixels + index % 4 * 60), index % 4) for index, pixels in enumerate(noise)]


def make_data(**changes) -> Data:
    data = Data(
        name="greys",
        num_classes=4,
        class_names=("a", "b", "c", "d"),
        in_chans=1,
        image_size=16,
        mean=(0.3,),
        std=(0.3,),
        train=images(STEPS * 16, 0),
        test=images(40, 1),
    )
    return replace(data, **changes)


def make_model(width: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        num_classes=4,
        embed_dim=width,
        depth=2,
        num_heads=2,
        pretrained_cfg_overlay={"mean": (0.3,), "std": (0.3,)},  # what it expects is what make_data gives
    )


def run(folder: Path, config: TrainConfig = CONFIG, *, model=None, **options):
    """Train a stage that suits the config, silently."""
    if model is None:
        model = insert_gates(make_model()) if config.l1 else make_model()
    arguments = {"data": make_data(), "stage": "stage", "augment": AUGMENT, "progress": False, **options}
    if config.distill_alpha:
        arguments.setdefault("teacher", make_model())
    return train(model, config=config, run_dir=folder, **arguments)


def send(number: int, at: int):
    """An after_step that sends this process the signal after `at` updates."""

    def after_step(_: torch.nn.Module, updates: int) -> None:
        if updates == at:
            os.kill(os.getpid(), number)

    return after_step


def untimed(history: list[dict]) -> list[dict]:
    timed = ("seconds", "images_per_second", "loader_wait")
    return [{k: v for k, v in r.items() if k not in timed} for r in history]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(result, expected) -> None:
    ours, theirs = result.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert untimed(result.history) == untimed(expected.history)


def start(function, *arguments) -> ForkServerProcess:
    """Start function in a new process, with one thread as in this one."""
    process = forks().Process(target=_with_one_thread, args=(function, *arguments))
    process.start()
    return process


def _with_one_thread(function, *arguments) -> None:
    torch.set_num_threads(1)
    function(*arguments)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What makes results of several processes comparable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """Uninterrupted runs, by kind, with their folders; made when first asked for."""
    made = {}

    def get(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = run(folder, KINDS[kind]), folder
        return made[kind]

    return get


# ---------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", True),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("weight_decay", -1),
        ("warmup_epochs", 11),
        ("min_lr", 1.0),
        ("label_smoothing", 1.0),
        ("mixup", -0.1),
        ("clip_grad", 0.0),
        ("drop_path", 1.0),
        ("ema_decay", 1.0),
        ("distill_alpha", 1.1),
        ("distill_temperature", 0.0),
        ("distill_type", "harder"),
        ("l1", float("inf")),
        ("l1_mode", "lasso"),
        ("gate_lr", 0.0),
        ("precision", "int8"),
        ("seed", -1),
        ("workers", -1),
        ("opt", "newton"),
        ("sched", "plateau"),
    ],
)
def test_config_refuses_a_value_and_names_field_value_and_what_was_expected(field, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field}: got .*, expected") as error:
        TrainConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_config_refuses_mixup_with_an_odd_batch_size():
    with pytest.raises(ValueError, match=r"TrainConfig\.batch_size: got 15, expected an even number"):
        TrainConfig(batch_size=15, mixup=0.2)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            replace(CONFIG, l1=1e-4),
            {"model": make_model()},
            "config.l1: got 0.0001, expected 0 as .* no gates",
        ),
        (SPARSE, {"teacher": None}, "teacher: got None, expected a model"),
        (CONFIG, {"data": make_data(num_classes=5)}, "greys has 5 classes, expected the model's 4"),
        (replace(CONFIG, batch_size=97), {}, "batch_size: got 97, expected at most 96"),
    ],
    ids=["l1 without gates", "distillation without teacher", "classes", "batch larger than the data"],
)
def test_arguments_that_do_not_fit_together_are_refused(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, config, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on this machine")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.precision: got 'fp16'"):
        run(tmp_path, replace(CONFIG, precision="fp16"))


# ---------------------------------------------------------------------------------------------------------
# Reproducing and resuming


def test_the_loop_learns_and_writes_what_it_promises(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    result = run(tmp_path, replace(CONFIG, epochs=10), model=model, augment=Augment.preset("none"))
    assert result.top1 >= 75
    assert not result.model.training
    assert evaluate(result.model, make_data()) == pytest.approx(
        (result.top1, result.history[-1]["test_loss"]), abs=1e-6
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert read_metrics(tmp_path) == result.history
    first = result.history[0]
    expected = {"stage", "epoch", "epochs", "step", "train_loss", "test_loss", "test_top1", "lr"}
    assert first.keys() == expected | {"images_per_second", "seconds", "loader_wait"}
    assert (first["stage"], first["epoch"], first["epochs"], first["step"]) == ("stage", 1, 10, STEPS)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, whole):
    result, _ = whole("everything")
    assert_same_run(run(tmp_path / "same", EVERYTHING), result)
    other = run(tmp_path / "other", replace(EVERYTHING, seed=1))
    assert other.history[-1]["train_loss"] != result.history[-1]["train_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_by_sigterm_in_mid_epoch_resumes_to_the_same_end(tmp_path, whole, kind):
    expected, _ = whole(kind)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        TrainingInterrupted, match=r"after step 3 of 6 of epoch 2 of 3; .*--resume"
    ) as stopped:
        run(tmp_path, KINDS[kind], after_step=send(signal.SIGTERM, STEPS + 3))
    assert stopped.value.signum == signal.SIGTERM
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = []
    result = run(tmp_path, KINDS[kind], resume=True, after_step=lambda _, updates: seen.append(updates))
    assert seen == list(range(STEPS + 4, 3 * STEPS + 1))
    assert_same_run(result, expected)
    assert read_metrics(tmp_path) == result.history


def _killed(folder: Path) -> None:
    run(folder, EVERYTHING, after_step=send(signal.SIGKILL, 2 * STEPS + 3))


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_end(tmp_path, whole):
    expected, _ = whole("everything")
    process = start(_killed, tmp_path)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "a") as file:  # as if it had died while it wrote the third line
        file.write('[1]\n{"stage": "stage", "epo')
    time.sleep(1)  # TensorBoard orders its files by a time in whole seconds
    result = run(tmp_path, EVERYTHING, resume=True)
    assert_same_run(result, expected)
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert_one_event_a_step(tmp_path / "tensorboard" / "stage", 3 * STEPS)


def assert_one_event_a_step(folder: Path, steps: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/step")] == list(range(1, steps + 1))
    assert [event.step for event in events.Scalars("epoch/test_top1")] == list(range(STEPS, steps + 1, STEPS))


def _stopped_with_its_workers(folder: Path, config: TrainConfig, name: str) -> None:
    def signal_all(_: torch.nn.Module, updates: int) -> None:
        if updates == 3:  # from another process: a worker takes that of its parent for its end
            workers = [str(child.pid) for child in psutil.Process().children(recursive=True)]
            all_of_them = [f"-{os.getpgrp()}"] if name == "INT" else [str(os.getpid()), *workers]
            assert len(workers) == 1
            subprocess.run(["kill", "-s", name, "--", *all_of_them])
            time.sleep(0.5)  # in which a worker that was hit would die

    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # for workers that begin in this group
    try:
        run(folder, config, after_step=signal_all)
    except TrainingInterrupted as stopped:
        os._exit(128 + stopped.signum)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("INT", id="Ctrl-C to the group of the process"),
        pytest.param("TERM", id="SIGTERM to each process"),  # as Slurm may
    ],
)
def test_a_signal_to_workers_too_does_not_break_the_step_by_killing_them(tmp_path, name):
    config = replace(CONFIG, epochs=1, workers=1)
    process = start(_stopped_with_its_workers, tmp_path, config, name)
    process.join(timeout=120)
    assert process.exitcode == 128 + getattr(signal, f"SIG{name}")
    assert_same_run(run(tmp_path, config, resume=True), run(tmp_path / "whole", config))


def test_a_run_stopped_during_evaluation_evaluates_when_resumed(tmp_path, whole):
    class Signalling(list):
        def __getitem__(self, index):
            if index == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    expected, _ = whole("subgradient")
    with pytest.raises(TrainingInterrupted, match="SIGINT: stage stage stopped after step 6 of 6 of epoch 1"):
        run(tmp_path, SPARSE, data=make_data(test=Signalling(images(40, 1))))
    assert read_metrics(tmp_path) == []
    assert_same_run(run(tmp_path, SPARSE, resume=True), expected)


def test_what_sparse_training_returns_can_be_cut_and_the_cut_model_trained_and_resumed(tmp_path, whole):
    sparse, _ = whole("proximal")
    small = compact(sparse.model, make_plan(sparse.model, rate=0.4, score="taylor"))
    config = replace(EVERYTHING, distill_alpha=0.5, distill_temperature=2.0)
    expected = run(tmp_path / "whole", config, model=small)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "stopped", config, model=small, after_step=send(signal.SIGTERM, STEPS + 1))
    assert_same_run(run(tmp_path / "stopped", config, model=small, resume=True), expected)
    assert expected.history[-1]["train_loss"] < expected.history[0]["train_loss"]


def test_a_finished_stage_returns_at_once_and_a_new_start_forgets_it(tmp_path, whole):
    expected, folder = whole("everything")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def fail(*_):
        raise AssertionError("took a step")

    assert_same_run(run(tmp_path, EVERYTHING, resume=True, after_step=fail), expected)
    with pytest.raises(AssertionError, match="took a step"):
        run(tmp_path, EVERYTHING, after_step=fail)
    assert read_metrics(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_stages_share_a_folder_without_touching_each_other(tmp_path):
    config = replace(CONFIG, epochs=1)
    run(tmp_path, config, stage="dense")
    run(tmp_path, config, stage="finetune")
    run(tmp_path, config, stage="dense")
    assert sorted(record["stage"] for record in read_metrics(tmp_path)) == ["dense", "finetune"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["dense.safetensors", "finetune.safetensors"]


def test_resuming_with_other_settings_is_refused_naming_them(tmp_path, whole):
    _, folder = whole("everything")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ResumeError, match=r"config\.lr: checkpoint 0\.003, now 0\.1; config\.seed"):
        run(tmp_path, replace(EVERYTHING, lr=0.1, seed=3), resume=True)
    with pytest.raises(ResumeError, match=r"augment\.hflip: checkpoint 0\.5, now 0\.0"):
        run(tmp_path, EVERYTHING, resume=True, augment=replace(AUGMENT, hflip=0.0))
    with pytest.raises(ResumeError, match="model: checkpoint"):
        run(tmp_path, EVERYTHING, resume=True, model=make_model(width=16))


def test_a_stage_is_resumed_with_its_images_elsewhere_and_refused_with_others(tmp_path):
    for split, count in (("train", 16), ("val", 4)):
        for index, (image, label) in enumerate(images(count, 0)):
            path = tmp_path / "images" / split / f"class{label}"
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{index}.png")
    config, folder = replace(CONFIG, epochs=1), tmp_path / "run"
    first = run(folder, config, data=open_data(tmp_path / "images"))
    (tmp_path / "images").rename(tmp_path / "moved")
    again = run(folder, replace(config, workers=1), data=open_data(tmp_path / "moved"), resume=True)
    assert_same_run(again, first)
    folder_of_class = tmp_path / "moved" / "train" / "class0"
    (folder_of_class / "12.png").rename(folder_of_class / "13.png")  # the last one still
    with pytest.raises(ResumeError, match=r"data\.train: checkpoint '16 images, \w+', now '16 images, \w+'$"):
        run(folder, config, data=open_data(tmp_path / "moved"), resume=True)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _replace_by_noise(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all")


def _replace_by_a_foreign_file(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def _change_one_weight(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["optimizer/exp_avg/head.bias"][0] += 1e-3
    save_file(tensors, path, metadata)


def _make_of_version(version: int, path: Path) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["vtp-training-state"])
    write_state(path, load_file(path), {**header, "version": version})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "truncated, damaged or not a safetensors file"),
        (_replace_by_noise, "truncated, damaged or not a safetensors file"),
        (_replace_by_a_foreign_file, "not a training checkpoint"),
        (_change_one_weight, "was changed after it was written"),
        (partial(_make_of_version, 99), "version 99, expected 2"),
        (partial(_make_of_version, 1), "version 1, expected 2: .* without --resume"),
    ],
)
def test_a_checkpoint_that_is_not_ours_or_not_whole_is_refused_with_the_reason(
    tmp_path, whole, damage, reason
):
    _, folder = whole("everything")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "stage.safetensors")
    with pytest.raises(ResumeError, match=reason) as error:
        run(tmp_path, EVERYTHING, resume=True)
    assert "stage.safetensors" in str(error.value)


def _rank(rank: int, port: int, folder: Path) -> None:
    # What torchrun sets, on a machine without a GPU.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {**shared, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    result = run(folder, replace(SPARSE, epochs=2, ema_decay=0.9, drop_path=0.2))
    torch.save((result.model.state_dict(), untimed(result.history)), folder / f"rank{rank}.pt")


def test_two_processes_stay_equal_bit_for_bit_and_one_of_them_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(_rank, rank, port, tmp_path) for rank in (0, 1)]
    for process in ranks:
        process.join(timeout=120)
    assert [process.exitcode for process in ranks] == [0, 0]
    (weights, history), (other_weights, other_history) = (
        torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)
    )
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert history == other_history == untimed(read_metrics(tmp_path))
    assert history[-1]["step"] == 2 * STEPS // 2  # the processes share the images of an epoch


def test_processes_that_accelerate_does_not_see_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    accelerator()  # which has seen one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: 2 processes were started, but Accelerate sees 1 on"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------
# What is not finite


def poison(at: int, value: float = float("nan")):
    """An after_step that puts `value` into a weight after `at` updates."""

    def after_step(model: torch.nn.Module, updates: int) -> None:
        if updates == at:
            with torch.no_grad():
                model.blocks[0].mlp.fc1.weight[0, 0] = value

    return after_step


def test_a_nan_loss_stops_the_run_naming_step_epoch_stage_and_last_good_checkpoint(tmp_path, whole):
    checkpoint = tmp_path / "checkpoints" / "stage.safetensors"
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, EVERYTHING, after_step=poison(STEPS + 2))
    assert "the loss is nan at step 3 of epoch 2 of stage stage" in str(error.value)
    assert str(error.value).endswith(f"last good checkpoint: {checkpoint}")
    assert_same_run(run(tmp_path, EVERYTHING, resume=True), whole("everything")[0])


def test_losses_looked_at_every_few_steps_give_the_same_run_and_name_the_same_step(
    tmp_path, whole, monkeypatch
):
    monkeypatch.setitem(vtp.training.loop.CHECK_EVERY, "cpu", 4)
    assert_same_run(run(tmp_path, EVERYTHING), whole("everything")[0])
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 2 of epoch 2"):
        run(tmp_path, EVERYTHING, after_step=poison(STEPS + 1))


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"mlp\.fc1\.weight is not finite at step 6 of epoch 1"
    ) as error:
        run(tmp_path, after_step=poison(STEPS, float("inf")))
    assert "none was written yet" in str(error.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# Gates, weights, losses


def one_step(tmp_path: Path, **changes) -> torch.nn.Module:
    """A gated model after its first update, by plain gradient descent unless changed."""
    config = replace(CONFIG, epochs=1, opt="momentum", lr=1e-2, min_lr=1e-5, warmup_epochs=0, **changes)
    taken = {}

    def keep(model: torch.nn.Module, updates: int) -> None:
        if updates == 1:
            taken["model"] = copy.deepcopy(model)

    run(tmp_path, config, model=insert_gates(make_model()), after_step=keep)
    return taken["model"]


def test_the_subgradient_adds_lambda_times_the_sign_to_the_gradient_of_gates_alone(tmp_path):
    plain, pulled = one_step(tmp_path, gate_lr=2.0), one_step(tmp_path, gate_lr=2.0, l1=0.5)
    for (name, before), (_, after) in zip(plain.named_parameters(), pulled.named_parameters(), strict=True):
        if name.endswith(".gate"):
            torch.testing.assert_close(after, before - 1e-2 * 2.0 * 0.5, rtol=0, atol=1e-6)
        else:
            assert torch.equal(after, before)


def test_the_proximal_step_soft_thresholds_gates_by_lambda_times_their_learning_rate(tmp_path):
    common = {"gate_lr": 2.0, "opt": "adamw", "lr": 1e-2}
    config = replace(CONFIG, epochs=1, warmup_epochs=0, **common)
    models = []
    for mode, l1 in (("subgradient", 0.0), ("proximal", 40.0)):
        steps = []
        run(
            tmp_path,
            replace(config, l1=l1, l1_mode=mode),
            model=insert_gates(make_model()),
            after_step=lambda model, _, steps=steps: steps.append(copy.deepcopy(model)),
        )
        models.append(steps)
    for name, linear in sites(models[0][0]).items():
        expected = F.softshrink(linear.gate, 40.0 * 1e-2 * 2.0)
        assert torch.equal(sites(models[1][0])[name].gate, expected)
    gates = [linear.gate for linear in sites(models[1][-1]).values()]
    assert gate_statistics(gates, 40.0)["gates_zero"] > 0.1


def test_soft_threshold_and_gate_statistics_by_hand():
    gate = torch.tensor([1.0, -0.75, 0.25, -0.25])
    soft_threshold([gate], 0.25)
    assert gate.tolist() == [0.75, -0.5, 0.0, 0.0]
    assert gate_statistics([gate], 2.0) == {
        "l1": 1.25,
        "l1_penalty": 2.5,
        "gates_mean": 0.3125,
        "gates_zero": 0.5,
        "gates_below": 0.5,
    }


def test_groups_give_gates_their_rate_without_decay_and_heed_what_the_model_exempts(monkeypatch, tmp_path):
    made = {}
    create = vtp.training.loop.create_optimizer_v2

    def spy(model, **options):
        made["names"] = {id(p): name for name, p in model.named_parameters()}
        made["optimizer"] = create(model, **options)
        return made["optimizer"]

    monkeypatch.setattr(vtp.training.loop, "create_optimizer_v2", spy)
    config = replace(SPARSE, epochs=2, warmup_epochs=1, sched="constant")
    rates = []
    run(
        tmp_path,
        config,
        after_step=lambda *_: rates.append([g["lr"] for g in made["optimizer"].param_groups]),
    )
    decay = {
        made["names"][id(p)]: group["weight_decay"]
        for group in made["optimizer"].param_groups
        for p in group["params"]
    }
    assert len(decay) == len(list(insert_gates(make_model()).parameters()))
    assert decay["blocks.0.attn.qkv.weight"] == config.weight_decay
    exempt = ("blocks.1.mlp.fc2.gate", "pos_embed", "cls_token", "norm.weight", "head.bias")
    assert [decay[name] for name in exempt] == [0.0] * 5
    assert all(gates == pytest.approx(5.0 * first) for first, *_, gates in rates)
    assert rates[0][0] < rates[STEPS - 1][0] < rates[-1][0] == pytest.approx(config.lr)


def test_taylor_statistics_are_of_the_last_third_and_of_the_task_loss_alone(tmp_path):
    scores = []
    for l1 in (0.0, 1.0):  # so small a step that both runs see the same gradients
        config = replace(CONFIG, opt="momentum", lr=1e-9, min_lr=0.0, l1=l1, weight_decay=0.0)
        result = run(tmp_path, config, model=insert_gates(make_model()))
        scores.append(torch.cat([linear.taylor for linear in sites(result.model).values()]))
        steps = {int(linear.taylor_steps) for linear in sites(result.model).values()}
        assert steps == {STEPS}
    assert scores[0].max() > 0
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-12)


def test_frozen_gates_stay_as_they_are_and_the_others_train(tmp_path):
    model = insert_gates(make_model())
    layers = sites(model)
    frozen = {name for name in layers if name.startswith("blocks.0.")}
    for name in frozen:
        layers[name].gate.requires_grad_(False)
        layers[name].gate.data.fill_(0.75)
    for mode in ("subgradient", "proximal"):
        config = replace(SPARSE, epochs=1, l1_mode=mode)
        trained = sites(run(tmp_path / mode, config, model=model).model)
        for name, layer in trained.items():
            changed = not torch.equal(layer.gate, layers[name].gate)
            assert changed == (name not in frozen), name
            assert bool(layer.taylor_steps) == (name not in frozen)
    for name in layers:
        layers[name].gate.requires_grad_(False)
    all_frozen = run(tmp_path / "all", replace(CONFIG, epochs=1), model=model)
    assert all(torch.equal(layer.gate, layers[name].gate) for name, layer in sites(all_frozen.model).items())
    with pytest.raises(
        ValueError, match=r"config\.l1: got 0\.01, expected 0 as all of the model's gates are"
    ):
        run(tmp_path / "none", SPARSE, model=model)


def test_distillation_loss_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)
    assert distillation_loss(teacher, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_distillation_alone_leaves_a_student_at_its_teacher(tmp_path):
    config = replace(CONFIG, epochs=1, distill_alpha=1.0, lr=1e-7, min_lr=0.0)
    history = run(tmp_path, config, model=make_model(), teacher=make_model()).history
    assert history[-1]["train_loss"] == pytest.approx(0.0, abs=1e-5)


def test_the_moving_average_is_what_is_evaluated_and_returned(tmp_path):
    average, decay = {}, 0.8

    def follow(model: torch.nn.Module, updates: int) -> None:
        k = max(updates - 1, 0)
        now = 0.0 if k == 0 else min(decay, 1 - (1 + k) ** (-2 / 3))
        for name, value in model.state_dict().items():
            average[name] = value.clone().lerp(average.get(name, value), now)

    result = run(tmp_path, replace(CONFIG, ema_decay=decay), after_step=follow)
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    assert evaluate(result.model, make_data())[0] == pytest.approx(result.top1)


def test_gates_and_weights_stay_float32_under_bf16(whole):
    result, _ = whole("bf16")
    assert {value.dtype for value in result.model.parameters()} == {torch.float32}
    assert "forward" not in vars(result.model)


def test_gates_of_another_dtype_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv\.gate: got torch\.float16, expected torch\.float32"
    ):
        run(tmp_path, SPARSE, model=insert_gates(make_model()).half())


# ---------------------------------------------------------------------------------------------------------
# Progress


def test_without_a_terminal_progress_is_plain_lines_and_can_be_silenced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vtp.training.progress, "LINE_SECONDS", 0.0)
    run(tmp_path, replace(SPARSE, epochs=1), stage="sparse", progress=True)
    output = capsys.readouterr().out
    assert "sparse 1/1 step 1/6  loss" in output
    for part in ("done", "top-1", "|g| ", "zero", "img/s", "left"):
        assert part in output.splitlines()[-1]
    assert "\x1b" not in output
    run(tmp_path, replace(CONFIG, epochs=1), progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_progress_is_a_bar_if_there_is_room_and_shows_all_figures(tmp_path, monkeypatch, width):
    screen = io.StringIO()
    console = Console(force_terminal=True, file=screen, width=width, color_system=None)
    monkeypatch.setattr(vtp.training.progress, "get_console", lambda: console)
    run(tmp_path, replace(SPARSE, epochs=2), stage="sparse", progress=True)
    last = screen.getvalue().replace("\r", "\n").split("sparse 2/2")[-1].splitlines()[0]
    assert all(part in last for part in ("loss", "top-1", "zero", "0:00 left", "img/s"))
    assert ("\u2501" in last) == (width == 120)


# ---------------------------------------------------------------------------------------------------------
# What does not belong together


def test_another_model_or_teacher_does_not_continue_a_stage(tmp_path):
    run(tmp_path, replace(SPARSE, epochs=1))
    with pytest.raises(ResumeError, match="model: checkpoint"):
        other = insert_gates(make_model())
        other.blocks[0].mlp.fc1.bias.data += 1
        run(tmp_path, replace(SPARSE, epochs=1), model=other, resume=True)
    with pytest.raises(ResumeError, match="teacher: checkpoint"):
        teacher = make_model()
        teacher.head.bias.data += 1
        run(tmp_path, replace(SPARSE, epochs=1), teacher=teacher, resume=True)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    teacher = make_model()
    teacher.reset_classifier(5)
    with pytest.raises(ValueError, match="teacher: classes 5, expected the model's 4"):
        run(tmp_path, SPARSE, teacher=teacher)


def test_an_optimizer_that_cannot_be_resumed_is_refused():
    with pytest.raises(ValueError, match=r"TrainConfig\.opt: got 'madgrad', expected one of adamw"):
        TrainConfig(opt="madgrad")


@pytest.mark.parametrize("rate", [0.0225, 0.045, 0.1075])
def test_a_model_trained_with_any_drop_path_can_be_described(tmp_path, rate):
    trained = run(tmp_path, replace(CONFIG, epochs=1, drop_path=rate)).model
    assert describe(trained).drop_path_rate == pytest.approx(rate)
