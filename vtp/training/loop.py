"""One training loop for the three stages: dense, sparse (a gated model) and finetune (a compact model).

`stage_models.py` has the models that a stage works on, `criterion.py` the loss of a step, `teacher.py` what
is distilled and `sparsity.py` what sparse training does to gates; an epoch ends with `evaluation.py` and a
checkpoint, `state.py`.

An update is shared out in passes: every process takes as many, all of as many images, and what they find is
averaged. Runs are reproducible: all that is random in a pass is seeded from (seed, stage, epoch, step, number
of the pass in the update) when it begins, whichever process takes it, and the data from (seed, stage, epoch,
sample). Hence a checkpoint needs no state of any random generator, training can go on from any step and on
another number of processes, and with passes of as many images it takes the same updates there.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from vtp.group import first_makes, world
from vtp.training.config import TrainConfig
from vtp.training.criterion import class_weight, mixup_and_criterion
from vtp.training.data import Data, is_multi_label
from vtp.training.evaluation import NonFiniteLossError, evaluate_batches
from vtp.training.identity import stage_identity
from vtp.training.loaders import (
    epoch_in_words,
    loader_arguments,
    prepared,
    set_epoch,
    test_loader,
    train_loader,
)
from vtp.training.progress import (
    LoaderWait,
    StageProgress,
    append_metrics,
    loader_warning,
    rewrite_metrics,
    tensorboard,
)
from vtp.training.ranks import accelerator
from vtp.training.seeding import seed_everything, seed_of
from vtp.training.sharding import average_gradients, clip_gradients, wants_sharding
from vtp.training.signals import deferred_signals, shielded
from vtp.training.sparsity import gate_param_groups, gate_statistics, settle_gates, soft_threshold
from vtp.training.stage_models import StageModels
from vtp.training.state import Position, StageCheckpoint, all_finite
from vtp.training.teacher import distillation_loss
from vtp.training.transforms import Augment
from vtp.words import counted

CHECK_EVERY = {"cpu": 1}  # steps between looks at the losses; elsewhere a look waits for the device, hence:
CHECK_EVERY_ELSEWHERE = 16
# Where torchrun, accelerate launch and MPI say how many processes they have started on this machine.
LOCAL_WORLD_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


class TrainingInterrupted(RuntimeError):
    """A signal ended training after its current step; the checkpoint was saved. `signum` is the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


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


# --------------------------------------------------------------------------------
# The stage


class _Stage:
    """State and steps of one stage."""

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
                f"data: {data.name} has {counted(data.num_classes, 'class', 'classes')}, expected the "
                f"model's {model.num_classes}"
            )
        self.config, self.stage, self.run_dir = config, stage, run_dir
        self.accelerator = accelerator(config.precision)
        processes = self.accelerator.num_processes
        sharded = wants_sharding(config, processes)
        self.pass_images, self.passes = config.split(processes)
        self.images = self.pass_images * self.passes * processes  # of an update
        self.models = StageModels(model, data, config, self.accelerator, teacher=teacher, sharded=sharded)
        self._build_loaders(data, augment)
        whole = {"model": self.models.raw, "teacher": self.models.teacher}
        identity = stage_identity(data, config, stage, augment, self.steps, self.images, processes, whole)
        self.checkpoint = StageCheckpoint(self.run_dir / "checkpoints" / f"{stage}.safetensors", identity)
        self.models.shard()
        self._build_optimizer()
        self.multi_label, classes = is_multi_label(data), self.models.raw.num_classes
        weight = class_weight(config, data, classes, self.accelerator.device)
        self.mixup, self.criterion = mixup_and_criterion(config, classes, self.multi_label, weight)
        self.position = Position()
        # The score is wanted for the trained model: in the last third of the steps the learning rate is low
        # and gates and weights are near their final values.
        self.taylor_from = config.epochs * self.steps * 2 // 3

    def _build_optimizer(self) -> None:
        """Optimizer and schedule; Accelerate wraps optimizer and model."""
        config = self.config
        # The fused kernel takes 1.6 ms, the default 8.7 ms (0.7M parameters on a CPU, where a step takes
        # 170 ms). Under fp16 it would hide from Accelerate which steps were skipped.
        fused = {"fused": True} if config.opt == "adamw" and config.precision != "fp16" else {}
        optimizer = create_optimizer_v2(
            self.models.raw,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            param_group_fn=lambda m: gate_param_groups(m, self.models.gates, config),
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
        self.optimizer = self.models.prepared(optimizer)

    def _build_loaders(self, data: Data, augment: Augment) -> None:
        config = self.config
        arguments = loader_arguments(self.models.raw, data, config.batch_size, config.workers)
        seed = seed_of(config.seed, self.stage)
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
    def updates(self) -> int:
        """Updates of the weights so far."""
        return self.position.epoch * self.steps + self.position.step

    def begin(self, resume: bool) -> None:
        """Load the checkpoint, or remove what an earlier run left of this stage."""
        if self.checkpoint.is_continued(resume):
            self.position = self.checkpoint.load(self.models, self.optimizer, self.accelerator)
        metrics, history = self.run_dir / "metrics.jsonl", self.position.history
        first_makes(world(), lambda: rewrite_metrics(metrics, self.stage, history))

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
                self.position = Position(epoch=self.position.epoch + 1, history=history)
                self._save_state()
                self._stop_if_asked(saved=True)

    def _update_in_words(self) -> str:
        """Images of an update and its learning rate, which is as given however many they are."""
        processes = self.accelerator.num_processes
        shares = [f"{processes} processes"] * (processes > 1) + [f"{self.passes} passes"] * (self.passes > 1)
        shared_out = f" ({' x '.join([*shares, str(self.pass_images)])})" if shares else ""
        return (
            f"stage {self.stage}: lr {self.config.lr:g} for updates of {counted(self.images, 'image')}"
            f"{shared_out}, {self.steps} an epoch; the rate is not scaled by their number"
        )

    def result(self) -> TrainResult:
        """The trained model with its accuracy and history."""
        history = self.position.history
        return TrainResult(self.models.trained(), history[-1]["test_top1"], history)

    # -- an epoch

    def _train_epoch(self) -> None:
        """The steps of the current epoch that are left."""
        position = self.position
        if position.step == self.steps:  # interrupted between the last step and the end of the evaluation
            return
        set_epoch(self.loader, position.epoch, position.step * self.passes)
        self.models.called.train()
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
                self.after_step(self.models.raw, self.updates)
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
        seed_everything(seed_of(config.seed, self.stage, self.position.epoch, self.position.step, in_update))
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        # Sharded gradients are shared out in every pass, as each process has no room for them all.
        wait = number < self.passes - 1 and not self.models.sharded
        with accelerator.no_sync(self.models.called) if wait else nullcontext():
            loss = self._loss(images, targets)
            accelerator.backward(loss / self.passes)
        return loss.detach()

    def _update(self) -> None:
        """Update the weights from the gradients of all passes."""
        config, accelerator, models = self.config, self.accelerator, self.models
        self.scheduler.step_update(self.updates)
        accelerator.unscale_gradients()
        if models.sharded:
            average_gradients(models.gates)
        if models.gates:
            # Gradients that the loss scaler will drop are no statistics.
            overflow = accelerator.scaler is not None and not all_finite(g.grad for g in models.gates)
            settle_gates(models.gated, config, self.updates >= self.taylor_from and not overflow)
        if config.clip_grad is not None:
            clip = clip_gradients if models.sharded else nn.utils.clip_grad_norm_
            clip(models.raw.parameters(), config.clip_grad)
        self.optimizer.step()
        if config.l1 > 0 and config.l1_mode == "proximal" and not accelerator.optimizer_step_was_skipped:
            soft_threshold(models.gates, config.l1 * self._lr() * config.gate_lr)
        self.optimizer.zero_grad()
        models.update_average(self.updates + 1)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """Task loss, with the teacher's share where there is one; 0-dim float32."""
        config, teacher = self.config, self.models.teacher
        with self.accelerator.autocast():
            out = self.models.called(images)
        for_labels, for_teacher = (each.float() for each in (out if isinstance(out, tuple) else (out, out)))
        loss = self.criterion(for_labels, targets)
        if teacher is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            taught = teacher(images).float()
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
        position, config, models = self.position, self.config, self.models
        accelerator = self.accelerator
        found = evaluate_batches(
            models.average or models.raw,
            self.test_loader,
            accelerator.autocast,
            accelerator.gather_for_metrics,
            self._stop_if_asked,
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
            **(gate_statistics(models.gates, config.l1) if models.gates else {}),
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
            f"epoch {epoch} of {self.config.epochs}; saved {self.checkpoint.path}; run the same command with "
            "--resume to continue",
            number,
        )

    def _place(self, update: int) -> tuple[int, int]:
        """Epoch, and step in the epoch, of an update that is counted from 0; they are counted from 1."""
        epoch, step = divmod(update, self.steps)
        return epoch + 1, step + 1

    def _non_finite(self, what: str, update: int) -> NonFiniteLossError:
        epoch, step = self._place(update)
        saved = self.checkpoint.path if self.checkpoint.path.exists() else "none was written yet"
        return NonFiniteLossError(
            f"{what} at step {step} of epoch {epoch} of stage {self.stage} "
            f"(learning rate {self._lr():.3g}); last good checkpoint: {saved}"
        )

    def _save_state(self) -> None:
        """Write the checkpoint. Raises NonFiniteLossError where it would hold a NaN or an infinity."""
        bad = self.checkpoint.save(self.models, self.optimizer, self.accelerator, self.position)
        if bad is not None:
            raise self._non_finite(f"{bad} is not finite", self.updates - 1)
