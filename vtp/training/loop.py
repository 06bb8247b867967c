"""One training loop for the three stages: dense, sparse (a gated model) and finetune (a compact model).

What sparse training does to gates is in `sparsity.py`, what a teacher is asked and teaches in `teacher.py`.

An update is shared out in passes: every process takes as many, all of as many images, and what they find is
averaged. Runs are reproducible: all that is random in a pass is seeded from (seed, stage, epoch, step, number
of the pass in the update) when it begins, whichever process takes it, and the data from (seed, stage, epoch,
sample). Hence a checkpoint needs no state of any random generator, training can go on from any step and on
another number of processes, and with passes of as many images it takes the same updates there.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import get_int_from_env
from timm.data import Mixup
from timm.layers import DropPath, calculate_drop_path_rates
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vtp.group import Group, first_makes, place, world
from vtp.runtime.optimize import OptimizedViT
from vtp.training.config import TrainConfig
from vtp.training.data import Data, is_multi_label
from vtp.training.identity import stage_identity
from vtp.training.loaders import (
    Augment,
    calibration_loader,
    epoch_in_words,
    prepared,
    set_epoch,
    test_loader,
    train_loader,
)
from vtp.training.multi_label import mean_average_precision
from vtp.training.progress import (
    LoaderWait,
    StageProgress,
    append_metrics,
    loader_warning,
    rewrite_metrics,
    tensorboard,
)
from vtp.training.ranks import accelerator, begun_by_this_job, note_begun
from vtp.training.sharding import average_gradients, clip_gradients, copy_whole, shard, wants_sharding
from vtp.training.signals import deferred_signals, shielded
from vtp.training.sources import labels_of
from vtp.training.sparsity import (
    gate_param_groups,
    gate_statistics,
    gated_linears,
    settle_gates,
    soft_threshold,
)
from vtp.training.state import all_finite, gathered, read_state, restore, state_tensors, write_state
from vtp.training.teacher import Teacher, distillation_loss

CHECK_EVERY = {"cpu": 1}  # steps between looks at the losses; elsewhere a look waits for the device, hence:
CHECK_EVERY_ELSEWHERE = 16
# Where torchrun, accelerate launch and MPI say how many processes they have started on this machine.
LOCAL_WORLD_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


class TrainingInterrupted(RuntimeError):
    """A signal ended training after its current step; the checkpoint was saved. `signum` is the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class NonFiniteLossError(RuntimeError):
    """The loss, a weight or an output is NaN or infinite; training names step and checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """model: the trained model (its moving average where there is one), in eval mode, on the training device;
    top1: its accuracy in percent; history: the lines of metrics.jsonl of this stage."""

    model: nn.Module
    top1: float
    history: list[dict[str, Any]]


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    stage: str,
    run_dir: Path,
    augment: Augment,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
    after_step: Callable[[nn.Module, int], None] | None = None,
) -> TrainResult:
    """Train a copy of `model` and return it; `model` itself stays as it is.

    stage: name of the stage; it names the checkpoint and the lines of metrics.jsonl, and enters every seed.
    run_dir: receives checkpoints/<stage>.safetensors, metrics.jsonl and tensorboard/<stage>.
    data: with the mean and std that the model's images are normalised by.
    teacher: model to distil from, needed where config.distill_alpha > 0; of any architecture, normalisation
        and image size (see `teacher.Teacher`), with the model's classes in the model's order.
    resume: continue from the stage's checkpoint if there is one; a finished stage returns at once. Without
        it, the stage starts anew and its checkpoint and metrics of an earlier run are removed; but where
        torchrun has restarted the processes of one job, what that job has begun is continued.
    after_step: called as after_step(model, updates so far) after every update; under config.fsdp with the
        sharded model.

    Raises TrainingInterrupted (SIGINT, SIGTERM, SIGUSR1), NonFiniteLossError, ResumeError, and ValueError for
    arguments that do not fit together.
    """
    run = _Stage(model, data, config, stage=stage, run_dir=Path(run_dir), augment=augment, teacher=teacher)
    run.begin(resume)
    if run.position.epoch < config.epochs:
        run.run(progress=progress, after_step=after_step)
    return run.result()


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "no",
    process: Accelerator | None = None,
) -> tuple[float, float]:
    """Top-1 accuracy (percent) and mean cross-entropy (nats) of `model` on the test images, on its device;
    among the classes that these have, where they have not all.

    Where an image may be of several classes, it counts as right if one of them has the best score.

    Args:
        process: one of several that share the images, batch by batch in turn; all of them call this, and all
            get the figures of all images, each of which counts once. None: this process reads them all.

    Raises:
        NonFiniteLossError: the model's outputs are NaN or infinite for some of the images.
    """
    loader = test_images(model, data, batch_size=batch_size, workers=workers)
    device = _device(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    shared = {}
    if process is not None:
        loader, shared = prepared(loader, process), {"gather": process.gather_for_metrics}
    found = _evaluate(model, loader, cast, labels=data.labels_present, **shared)
    if not math.isfinite(found["loss"]):
        raise NonFiniteLossError(
            "model: got NaN or infinite outputs on the test images, expected finite ones"
        )
    return found["top1"], found["loss"]


def test_images(model: nn.Module, data: Data, *, batch_size: int = 256, workers: int = 0) -> DataLoader:
    """All test images, in their order, of the model's size and channels: a loader of (images, labels)."""
    return test_loader(data, **_loader_arguments(model, data, batch_size, workers))


test_images.__test__ = False  # not a test case of pytest


def calibration_images(
    model: nn.Module,
    data: Data,
    images: int,
    *,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    group: Group = None,
) -> DataLoader:
    """So many training images, not augmented and of the model's size and channels, for `vtp.calibrate` and
    `vtp.compact`: a loader that draws the same ones, without replacement, each time it is read; of them the
    share of this process, where a group shares them."""
    arguments = _loader_arguments(model, data, min(batch_size, max(images, 1)), workers)
    return calibration_loader(data, images=images, seed=seed, place=place(group), **arguments)


# --------------------------------------------------------------------------------
# The stage


@dataclass
class _Position:
    """How far a stage has come: what a checkpoint has to know beside the tensors."""

    epoch: int = 0  # epoch in progress; equal to config.epochs when the stage is finished
    step: int = 0  # next step of that epoch
    loss_sum: float = 0.0  # over the steps of that epoch
    seconds: float = 0.0  # spent on these steps
    waiting: float = 0.0  # of these seconds, for images
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per finished epoch


class _Stage:
    """State and steps of one stage. `raw` is the bare model, `model` the same compiled and under Accelerate's
    wrappers, `start` the one that was given."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainConfig,
        *,
        stage: str,
        run_dir: Path,
        augment: Augment,
        teacher: nn.Module | None,
    ) -> None:
        if config.distill_alpha > 0 and teacher is None:
            raise ValueError(
                f"teacher: got None, expected a model as distill_alpha is {config.distill_alpha}"
            )
        if data.num_classes not in (None, model.num_classes):
            raise ValueError(
                f"data: {data.name} has {data.num_classes} classes, expected the model's {model.num_classes}"
            )
        self.config, self.stage, self.run_dir = config, stage, run_dir
        self.accelerator = accelerator(config.precision)
        processes = self.accelerator.num_processes
        self.sharded = wants_sharding(config, processes)
        self.pass_images, self.passes = config.split(processes)
        self.images = self.pass_images * self.passes * processes  # of an update
        self.start = model
        self._build_models(teacher, data)
        self._build_loaders(data, augment)
        models = {"model": self.raw, "teacher": self.teacher}
        self.identity = stage_identity(
            data, config, stage, augment, self.steps, self.images, processes, models
        )
        if self.sharded:
            self._shard()
        self._build_optimizer()
        self.multi_label = is_multi_label(data)
        weight = _class_weight(config, data, self.raw.num_classes, self.accelerator.device)
        self.mixup, self.criterion = _criterion(config, self.raw.num_classes, self.multi_label, weight)
        self.position = _Position()
        # The score is wanted for the trained model: in the last third of the steps the learning rate is low
        # and gates and weights are near their final values.
        self.taylor_from = config.epochs * self.steps * 2 // 3

    def _copy(self) -> nn.Module:
        """The model that was given, on the device, as it is to be trained."""
        model = copy.deepcopy(self.start).to(self.accelerator.device)
        model.zero_grad()
        _set_drop_path(model, self.config.drop_path)
        return model

    def _build_models(self, teacher: nn.Module | None, data: Data) -> None:
        """Copies of the model, for its moving average and of the teacher, on the device."""
        config, device = self.config, self.accelerator.device
        self.raw = self._copy()
        gated = gated_linears(self.raw)
        self.gated = [linear for linear in gated if linear.gate.requires_grad]
        if config.l1 > 0 and not self.gated:
            none = "all of the model's gates are frozen" if gated else "the model has no gates"
            raise ValueError(f"config.l1: got {config.l1}, expected 0 as {none}")
        self.gates = [linear.gate for linear in self.gated]
        for linear in gated:  # the statistics are to be of this stage
            linear.taylor.zero_()
            linear.taylor_steps.zero_()
        self.ema = self.teacher = None
        if config.ema_decay is not None:
            # Buffers are counts and statistics here (those of the gates' Taylor score): copied, not averaged.
            # Tensor by tensor where some are sharded: PyTorch takes no lists of both kinds.
            self.ema = ModelEmaV3(
                self.raw,
                decay=config.ema_decay,
                use_warmup=True,
                exclude_buffers=True,
                foreach=not self.sharded,
            )
        if teacher is not None and config.distill_alpha > 0:
            takes = _loader_arguments(self.raw, data, config.batch_size, config.workers)
            shape = (takes["in_chans"], *takes["image_size"])
            self.teacher = Teacher(teacher, data, shape=shape, num_classes=self.raw.num_classes).to(device)
        if hasattr(self.raw, "set_distilled_training"):  # a head for the labels and one for the teacher
            self.raw.set_distilled_training(self.teacher is not None)
        if config.grad_checkpointing:
            self.raw.set_grad_checkpointing(True)

    def _shard(self) -> None:
        """Shard the model, its moving average and the teacher over the processes."""
        if self.config.compile:  # block by block, between the gathering of weights and their giving back
            for block in self.raw.blocks:
                block.compile()
        average, teacher = self._average(), None if self.teacher is None else self.teacher.model
        for model in (self.raw, average, teacher):
            if model is not None:
                shard(model, self.accelerator.device)

    def _build_optimizer(self) -> None:
        """Optimizer and schedule; Accelerate wraps optimizer and model."""
        config = self.config
        # The fused kernel takes 1.6 ms, the default 8.7 ms (0.7M parameters on a CPU, where a step takes
        # 170 ms). Under fp16 it would hide from Accelerate which steps were skipped.
        fused = {"fused": True} if config.opt == "adamw" and config.precision != "fp16" else {}
        optimizer = create_optimizer_v2(
            self.raw,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            param_group_fn=lambda m: gate_param_groups(m, self.gates, config),
            **fused,
        )
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.lr / 100,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        if self.sharded:
            self.model, self.optimizer = self.raw, self.accelerator.prepare(optimizer)
        else:
            model = torch.compile(self.raw) if config.compile else self.raw
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _build_loaders(self, data: Data, augment: Augment) -> None:
        config = self.config
        arguments = _loader_arguments(self.raw, data, config.batch_size, config.workers)
        seed = _seed_of(config.seed, self.stage)
        of_a_pass = arguments | {"batch_size": self.pass_images}
        train_images = shielded(train_loader(data, augment=augment, seed=seed, **of_a_pass))
        self.loader = prepared(train_images, self.accelerator)
        self.test_loader = prepared(shielded(test_loader(data, **arguments)), self.accelerator)
        self.steps = len(self.loader) // self.passes
        if self.steps == 0:
            name, given = "batch_size", config.batch_size
            if config.effective_batch is not None:
                name, given = "effective_batch", config.effective_batch
            raise ValueError(f"config.{name}: got {given}, expected no more than there are training images")

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / f"{self.stage}.safetensors"

    @property
    def updates(self) -> int:
        """Updates of the weights so far."""
        return self.position.epoch * self.steps + self.position.step

    def begin(self, resume: bool) -> None:
        """Load the checkpoint, or remove what an earlier run left of this stage."""
        if first_makes(world(), lambda: self._clear_unless(resume)):
            self._load_state()
        metrics, history = self.run_dir / "metrics.jsonl", self.position.history
        first_makes(world(), lambda: rewrite_metrics(metrics, self.stage, history))

    def _clear_unless(self, resume: bool) -> bool:
        """Whether there is a checkpoint to continue from; one that is not to be continued is removed."""
        job_has_begun = f"stage {self.checkpoint.resolve()}"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if not (resume or begun_by_this_job(job_has_begun)):
            self.checkpoint.unlink(missing_ok=True)
        note_begun(job_has_begun)
        return self.checkpoint.exists()

    def run(self, *, progress: bool, after_step: Callable[[nn.Module, int], None] | None) -> None:
        """Train from the present position to the end, saving after each epoch and on a signal."""
        main = self.accelerator.is_main_process
        last = self.position.history[-1] if self.position.history else {}
        self.after_step = after_step
        if progress and main:
            print(self._update_in_words(), flush=True)
        with (
            deferred_signals() as self.signals,
            StageProgress(
                self.stage, self.config.epochs, self.steps, self.updates, last, enabled=progress and main
            ) as self.progress,
            tensorboard(self.run_dir / "tensorboard" / self.stage, self.updates, enabled=main) as self.board,
        ):
            self.progress.note(epoch_in_words(self.loader, self.steps, self.images))
            while self.position.epoch < self.config.epochs:
                self._train_epoch()
                record = self._finish_epoch()
                history = [*self.position.history, record]
                self.position = _Position(epoch=self.position.epoch + 1, history=history)
                self._save_state()
                self._stop_if_asked(saved=True)

    def _update_in_words(self) -> str:
        """Images of an update and its learning rate, which is as given however many they are."""
        processes = self.accelerator.num_processes
        shares = [f"{processes} processes"] * (processes > 1) + [f"{self.passes} passes"] * (self.passes > 1)
        shared_out = f" ({' x '.join([*shares, str(self.pass_images)])})" if shares else ""
        return (
            f"stage {self.stage}: lr {self.config.lr:g} for updates of {self.images} images{shared_out}, "
            f"{self.steps} an epoch; the rate is not scaled by their number"
        )

    def result(self) -> TrainResult:
        """The trained model with its accuracy and history."""
        model = self._average() or self.raw
        if self.sharded:
            model, shards = self._copy(), model
            copy_whole(shards, model)
        else:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.raw.__dict__.pop(
                "forward", None
            )  # Accelerate leaves the method of the class as an attribute
            if self.config.grad_checkpointing:
                self.raw.set_grad_checkpointing(False)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(False)
        history = self.position.history
        return TrainResult(model.eval(), history[-1]["test_top1"], history)

    # -- an epoch

    def _train_epoch(self) -> None:
        """The steps of the current epoch that are left."""
        position = self.position
        if position.step == self.steps:  # interrupted between the last step and the end of the evaluation
            return
        set_epoch(self.loader, position.epoch, position.step * self.passes)
        self.model.train()
        check_every = CHECK_EVERY.get(self.accelerator.device.type, CHECK_EVERY_ELSEWHERE)
        losses: list[Tensor] = []
        of_passes: list[Tensor] = []  # of the update in progress
        waited, before = LoaderWait(self.accelerator.device), position.waiting
        started = time.perf_counter()
        passes = (self.steps - position.step) * self.passes
        for images, targets in itertools.islice(waited.batches(self.loader), passes):
            of_passes.append(self._pass(images, targets, len(of_passes)))
            if len(of_passes) < self.passes:
                continue
            self._update()
            losses.append(torch.stack(of_passes).mean())
            of_passes.clear()
            position.step += 1
            if self.after_step is not None:
                self.after_step(self.raw, self.updates)
            if position.step % check_every == 0 or position.step == self.steps or self._signalled():
                now = time.perf_counter()
                position.seconds += now - started
                position.waiting = before + waited.seconds
                started = now
                self._settle(losses)
                self._stop_if_asked()
            self.progress.step(self.updates)

    def _pass(self, images: Tensor, targets: Tensor, number: int) -> Tensor:
        """Add the gradients of images [B, C, H, W] and targets [B] to those of the update in progress.

        number: of the pass among those of this process. Returns the loss less penalty, 0-dim.
        """
        config, accelerator = self.config, self.accelerator
        in_update = number * accelerator.num_processes + accelerator.process_index
        _seed_everything(
            _seed_of(config.seed, self.stage, self.position.epoch, self.position.step, in_update)
        )
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        # Sharded gradients are shared out in every pass, as each process has no room for them all.
        wait = number < self.passes - 1 and not self.sharded
        with accelerator.no_sync(self.model) if wait else nullcontext():
            loss = self._loss(images, targets)
            accelerator.backward(loss / self.passes)
        return loss.detach()

    def _update(self) -> None:
        """Update the weights from the gradients of all passes."""
        config, accelerator = self.config, self.accelerator
        self.scheduler.step_update(self.updates)
        accelerator.unscale_gradients()
        if self.sharded:
            average_gradients(self.gates)
        if self.gates:
            # Gradients that the loss scaler will drop are no statistics.
            overflow = accelerator.scaler is not None and not all_finite(g.grad for g in self.gates)
            settle_gates(self.gated, config, self.updates >= self.taylor_from and not overflow)
        if config.clip_grad is not None:
            clip = clip_gradients if self.sharded else nn.utils.clip_grad_norm_
            clip(self.raw.parameters(), config.clip_grad)
        self.optimizer.step()
        if config.l1 > 0 and config.l1_mode == "proximal" and not accelerator.optimizer_step_was_skipped:
            soft_threshold(self.gates, config.l1 * self._lr() * config.gate_lr)
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.raw, step=self.updates + 1)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Task loss, with the teacher's share where there is one; 0-dim float32."""
        config = self.config
        with self.accelerator.autocast():
            out = self.model(images)
        for_labels, for_teacher = (each.float() for each in (out if isinstance(out, tuple) else (out, out)))
        loss = self.criterion(for_labels, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(images).float()
        distilled = distillation_loss(
            for_teacher, taught, config.distill_temperature, config.distill_type, self.multi_label
        )
        return (1 - config.distill_alpha) * loss + config.distill_alpha * distilled

    def _settle(self, losses: list[Tensor]) -> None:
        """Add the losses of the last steps to the epoch's sum; refuse to go on if one is not finite."""
        own = torch.stack(losses)
        values = self.accelerator.reduce(own, "mean").tolist()
        first = self.position.step - len(values)
        losses.clear()
        for index, value in enumerate(values):
            if not math.isfinite(value):
                what = f"the loss is {value}{self._on_ranks(own[index])}"
                raise self._non_finite(what, self.position.epoch * self.steps + first + index)
            self.position.loss_sum += value
        self.progress.settled(values[-1], self._images_per_second(), self._share_waiting())
        self.board.step(values[-1], self.updates)

    def _on_ranks(self, loss: Tensor) -> str:
        """On which of several ranks a loss is not finite, which all of them ask."""
        if self.accelerator.num_processes == 1:
            return ""
        odd = (~self.accelerator.gather(loss[None]).isfinite()).nonzero().flatten().tolist()
        return f" on rank {', '.join(map(str, odd))}" if len(odd) < self.accelerator.num_processes else ""

    def _finish_epoch(self) -> dict[str, Any]:
        """Evaluate, and write the epoch's record to metrics.jsonl and TensorBoard."""
        position, config = self.position, self.config
        model = self._average() or self.raw
        accelerator = self.accelerator
        found = _evaluate(
            model, self.test_loader, accelerator.autocast, accelerator.gather_for_metrics, self._stop_if_asked
        )
        share = torch.tensor([self._share_waiting()], device=accelerator.device)
        waiting = accelerator.gather(share).max().item()  # the others wait for the slowest
        record = {
            "stage": self.stage,
            "epoch": position.epoch + 1,
            "epochs": config.epochs,
            "step": self.updates,
            "train_loss": position.loss_sum / self.steps,
            **{f"test_{name}": value for name, value in found.items()},
            **(gate_statistics(self.gates, config.l1) if self.gates else {}),
            "lr": self._lr(),
            "images_per_second": round(self._images_per_second(), 1),
            "seconds": round(position.seconds, 3),
            "loader_wait": round(waiting, 4),
        }
        if accelerator.is_main_process:
            append_metrics(self.run_dir / "metrics.jsonl", record)
        self.board.epoch(record, self.updates)
        self.progress.epoch(record)
        local = get_int_from_env(LOCAL_WORLD_SIZES, accelerator.num_processes)
        if warning := loader_warning(waiting, position.seconds, position.epoch + 1, config.workers, local):
            self.progress.note(warning)
        return record

    def _images_per_second(self) -> float:
        """Images per second in the steps of this epoch, over all processes."""
        return self.position.step * self.images / max(self.position.seconds, 1e-9)

    def _share_waiting(self) -> float:
        """Share of the time of this epoch's steps that this process spent waiting for images."""
        return self.position.waiting / max(self.position.seconds, 1e-9)

    def _lr(self) -> float:
        """Learning rate of the last update, that of the gates being gate_lr times this."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    # -- checkpoints

    def _signalled(self) -> bool:
        """Whether to look for a signal at once; one process of several must not do so alone."""
        return self.signals.received is not None and self.accelerator.num_processes == 1

    def _stop_if_asked(self, saved: bool = False) -> None:
        """End training on a signal to any process: save, if that is not done, and raise
        TrainingInterrupted."""
        number = self.signals.received or 0
        if self.accelerator.num_processes > 1:
            number = int(
                self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max()
            )
        if number == 0:
            return
        if not saved:
            self._save_state()
        epoch, step = self._place(self.updates - 1)
        raise TrainingInterrupted(
            f"{signal.Signals(number).name}: stage {self.stage} stopped after step {step} of {self.steps} of "
            f"epoch {epoch} of {self.config.epochs}; saved {self.checkpoint}; run the same command with "
            "--resume to continue",
            number,
        )

    def _place(self, update: int) -> tuple[int, int]:
        """Epoch, and step in the epoch, of an update that is counted from 0; they are counted from 1."""
        epoch, step = divmod(update, self.steps)
        return epoch + 1, step + 1

    def _non_finite(self, what: str, update: int) -> NonFiniteLossError:
        epoch, step = self._place(update)
        saved = self.checkpoint if self.checkpoint.exists() else "none was written yet"
        return NonFiniteLossError(
            f"{what} at step {step} of epoch {epoch} of stage {self.stage} "
            f"(learning rate {self._lr():.3g}); last good checkpoint: {saved}"
        )

    def _save_state(self) -> None:
        """Write the checkpoint. Raises NonFiniteLossError where it would hold a NaN or an infinity."""
        main = self.accelerator.is_main_process
        tensors, bad = gathered(state_tensors(self.raw, self._average(), self.optimizer), keep=main)
        if bad is not None:
            raise self._non_finite(f"{bad} is not finite", self.updates - 1)
        scaler = self.accelerator.scaler
        header = {
            "identity": self.identity,
            "position": asdict(self.position),
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        # All wait for it: if one ended by a signal before, torchrun would end rank 0 in the middle of it.
        first_makes(world(), lambda: write_state(self.checkpoint, tensors, header))

    def _load_state(self) -> None:
        """Continue from the checkpoint. Raises ResumeError."""
        tensors, header = read_state(self.checkpoint, self.identity)
        restore(tensors, header["param_groups"], self.raw, self._average(), self.optimizer)
        if header["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.position = _Position(**header["position"])

    def _average(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module


# --------------------------------------------------------------------------------
# Pieces of a step


def _criterion(
    config: TrainConfig, num_classes: int, multi_label: bool, weight: Tensor | None
) -> tuple[Mixup | None, Callable[[Tensor, Tensor], Tensor]]:
    """Mixup or None, and the loss that takes what it returns. weight: [classes], or None."""
    mixup = None
    if config.mixup > 0 or config.cutmix > 0:
        options = {"multi_label": True} if multi_label else {}
        try:
            mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
                **options,
            )
        except TypeError as error:
            raise ValueError(
                f"config.mixup, config.cutmix: got {config.mixup} and {config.cutmix}, expected 0: timm "
                "mixes labels of several classes from 1.0.31 on"
            ) from error
    smoothing = 0.0 if mixup is not None else config.label_smoothing  # mixup has smoothed them
    if multi_label:
        binary = BinaryCrossEntropy(smoothing=0.0, weight=weight)
        return mixup, lambda logits, targets: binary(logits, targets * (1 - smoothing) + 0.5 * smoothing)
    if weight is not None:
        return mixup, nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    if mixup is not None:
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


def _class_weight(config: TrainConfig, data: Data, num_classes: int, device: torch.device) -> Tensor | None:
    """The weight of each class in the task loss, float32 [classes], or None."""
    given = config.class_weight
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) != num_classes:
            raise ValueError(f"config.class_weight: got {len(given)} weights, expected {num_classes}")
        return torch.tensor(given, dtype=torch.float32, device=device)
    labels = labels_of(data.train)
    if labels is None:
        raise ValueError(
            f"config.class_weight: got {given!r}, expected a list of weights as {data.name} does not say how "
            "often it has a class"
        )
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=num_classes)
    weight = 1.0 / torch.tensor(counts, dtype=torch.float64).clamp(min=1.0)
    return (weight / weight.mean()).to(device, torch.float32)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Set stochastic depth in model.blocks as timm does: linear from 0 at the first block to rate."""
    blocks = list(getattr(model, "blocks", ()))
    branches = [
        (i, b, n) for i, b in enumerate(blocks) for n in ("drop_path1", "drop_path2") if hasattr(b, n)
    ]
    if rate > 0 and not branches:
        raise ValueError(
            f"config.drop_path: got {rate}, expected 0 as {type(model).__name__} has no drop path"
        )
    rates = calculate_drop_path_rates(rate, len(blocks)) if branches else []
    for i, block, name in branches:
        depth_rate = rates[i]
        setattr(block, name, DropPath(depth_rate) if depth_rate > 0 else nn.Identity())


def _seed_of(*key: object) -> int:
    """A 32-bit seed that depends on all of key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _loader_arguments(model: nn.Module, data: Data, batch_size: int, workers: int) -> dict[str, Any]:
    """What both loaders take, with image size (pixels) and channels as the model expects them."""
    edge = data.image_size
    if isinstance(model, OptimizedViT):
        channels, size = model.images.channels, model.images.size
    else:
        embed = model.patch_embed
        channels, size = embed.proj.in_channels, embed.img_size or (edge, edge)
    if None in size:
        raise ValueError("model: takes images of any size, and the data's are of several; expected one size")
    return {
        "image_size": tuple(size),
        "in_chans": channels,
        "batch_size": batch_size,
        "workers": workers,
    }


def _device(model: nn.Module) -> torch.device:
    """The device that a model is on; a packed one has no parameters."""
    return next(itertools.chain(model.parameters(), model.buffers())).device


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    cast: Callable[[], AbstractContextManager],
    gather: Callable[[Tensor], Tensor] = lambda scores: scores,
    poll: Callable[[], None] = lambda: None,
    labels: Sequence[int] | None = None,
) -> dict[str, float]:
    """Of the model on the images of a loader: "loss", the mean cross-entropy, and "top1" in percent.

    Where an image may be of several classes the entropy is that of each class by itself, "top1" the share of
    images of whose classes one has the best score, and "map" the mean average precision.

    labels: the classes among which predictions are made; None for all.
    gather: joins the scores of several processes, one row for each image; poll: called after each batch.
    """
    was_training, device = model.training, _device(model)
    model.eval()
    rows = []
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        with cast():
            logits = model(images)
        logits = logits.float()
        if labels is not None:
            others = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
            others[list(labels)] = False
            logits = logits.masked_fill(others, -torch.inf)
        best = logits.argmax(dim=-1)
        if targets.ndim == 2:
            own = slice(None) if labels is None else list(labels)
            loss = F.binary_cross_entropy_with_logits(logits[:, own], targets[:, own], reduction="none").mean(
                -1
            )
            right, more = targets.gather(1, best[:, None])[:, 0], [logits[:, own], targets[:, own]]
        else:
            loss = F.cross_entropy(logits, targets, reduction="none")
            right, more = (best == targets).float(), []
        rows.append(gather(torch.cat([torch.stack([loss, right], dim=1), *more], dim=1)))
        poll()
    model.train(was_training)
    scores = torch.cat(rows).cpu().double()
    loss, right = scores[:, :2].mean(dim=0).tolist()
    found = {"loss": loss, "top1": 100.0 * right}
    if scores.shape[1] > 2:
        found["map"] = mean_average_precision(*scores[:, 2:].chunk(2, dim=1))
    return found
