"""The settings of a training stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vtp.words import counted

INV_FREQ = "inv_freq"
L1_MODES = ("subgradient", "proximal")
SCHEDULES = ("cosine", "constant")
DISTILLATIONS = ("soft", "hard")
PRECISIONS = ("no", "bf16", "fp16")
# Of timm's optimizers those whose state goes through a checkpoint and back, tried one by one.
OPTIMIZERS = (
    "adamw", "adam", "nadam", "nadamw", "radam", "adamax", "adan", "adopt", "lion", "sgd", "sgdw", "sgdp",
    "momentum", "rmsprop", "lars",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """What determines a training stage, apart from the model and the data.

    epochs: passes over the training data, >= 1.
    batch_size: images of a pass of a process; even where mixup or cutmix is on. Without `effective_batch`
        an update is one pass of every process.
    effective_batch: images of an update, over all processes; None for batch_size times the processes. Where
        it is more than that, each process takes several passes, of at most batch_size images each, and their
        gradients are added up: see `split`.
    lr: peak learning rate; the schedule goes from lr/100 up to it in warmup_epochs and down to min_lr.
    weight_decay: on weights of two and more dimensions, less those that the model exempts.
    label_smoothing, mixup, cutmix: as in DeiT; 0 is off.
    class_weight: weight of each class in the task loss, in the order of the labels; "inv_freq" makes them
        inverse to how often a class is seen in training, with a mean of 1; None weighs all alike.
    clip_grad: largest norm of the gradient; None is off.
    drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    ema_decay: decay of the moving average of weights, warmed up as 1 - (1 + step)^(-2/3); None is off.
    distill_alpha, distill_temperature: weight and temperature of distillation; alpha 0 is off.
    distill_type: "soft" learns the teacher's probabilities, "hard" its decisions, as DeiT was distilled
        (without a temperature): see `teacher.py`.
    l1: lambda, weight of sum |g|; 0 is off. l1_mode: see `sparsity.py`.
    gate_lr: learning rate of the gates as a multiple of lr.
    precision: "no" (float32), "bf16" or "fp16" (GPU only).
    seed: of the order of the data and of all that is random in a step.
    workers: processes that load data; 0 loads in the training process.
    fsdp: weights, gradients and optimizer state sharded over the processes (`sharding.py`), not replicated.
    grad_checkpointing: blocks are computed again in the backward pass instead of keeping what they computed.
    compile: the training steps run through torch.compile.
    opt, sched: names that timm knows; opt one of OPTIMIZERS, sched "cosine" or "constant".
    """

    epochs: int = 10
    batch_size: int = 128
    effective_batch: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    min_lr: float = 1e-5
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weight: str | Sequence[float] | None = None
    clip_grad: float | None = None
    drop_path: float = 0.0
    ema_decay: float | None = None
    distill_alpha: float = 0.0
    distill_temperature: float = 1.0
    distill_type: str = "soft"
    l1: float = 0.0
    l1_mode: str = "subgradient"
    gate_lr: float = 1.0
    precision: str = "no"
    seed: int = 0
    workers: int = 0
    opt: str = "adamw"
    sched: str = "cosine"
    fsdp: bool = False
    grad_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._require(name, int, lambda v: v >= 1, "an integer of at least 1")
        for name in ("seed", "workers"):
            self._require(name, int, lambda v: v >= 0, "an integer of at least 0")
        for name in ("lr", "gate_lr", "distill_temperature"):
            self._require(name, (int, float), lambda v: 0 < v < math.inf, "a positive number")
        for name in ("weight_decay", "mixup", "cutmix", "l1"):
            self._require(name, (int, float), lambda v: 0 <= v < math.inf, "a number of at least 0")
        for name in ("label_smoothing", "drop_path"):
            self._require(name, (int, float), lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._require("min_lr", (int, float), lambda v: 0 <= v <= self.lr, f"between 0 and lr ({self.lr})")
        self._require(
            "warmup_epochs",
            (int, float),
            lambda v: 0 <= v <= self.epochs,
            f"between 0 and {counted(self.epochs, 'epoch')}",
        )
        self._require("distill_alpha", (int, float), lambda v: 0 <= v <= 1, "a number in [0, 1]")
        if self.effective_batch is not None:
            expected = "an integer of at least 1, or None"
            self._require("effective_batch", int, lambda v: v >= 1, expected)
        for name in ("fsdp", "grad_checkpointing", "compile"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"TrainConfig.{name}: got {value!r}, expected true or false")
        if self.clip_grad is not None:
            self._require("clip_grad", (int, float), lambda v: 0 < v < math.inf, "a positive number or None")
        if self.ema_decay is not None:
            self._require("ema_decay", (int, float), lambda v: 0 < v < 1, "a number between 0 and 1, or None")
        if self.class_weight is not None:
            expected = f"None, {INV_FREQ!r}, or a list with a positive number for each class"
            self._require("class_weight", (str, list, tuple), _is_class_weight, expected)
        for name, choices in (
            ("l1_mode", L1_MODES),
            ("precision", PRECISIONS),
            ("sched", SCHEDULES),
            ("distill_type", DISTILLATIONS),
        ):
            self._require(name, str, lambda v, c=choices: v in c, f"one of {', '.join(choices)}")
        self._require("opt", str, lambda v: v in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        if self.mixup or self.cutmix:
            self._require("batch_size", int, lambda v: v % 2 == 0, "an even number, as mixup pairs images")

    def split(self, processes: int, images: int | None = None) -> tuple[int, int]:
        """How so many processes share an update: (images of a pass, passes of each process).

        They take as few passes as batch_size allows, all of one size, which is even where images are mixed.

        Args:
            images: how many there are to train on; None where that is not known.

        Raises:
            ValueError: effective_batch cannot be shared out like that; what could be is said.
        """
        wanted = self.effective_batch
        if wanted is None:
            return self.batch_size, 1
        pairs = 2 if self.mixup or self.cutmix else 1

        def passes(update: int) -> int:
            return -(-update // (processes * self.batch_size))

        def fits(update: int) -> bool:
            return update % (processes * passes(update) * pairs) == 0

        if fits(wanted):
            return wanted // (processes * passes(wanted)), passes(wanted)
        near = [next(filter(fits, range(wanted, 0, -1)), None), next(filter(fits, itertools.count(wanted)))]
        several = counted(processes, "process", "processes")
        if near[0] and images is not None and near[1] > images:
            near.pop()
        fitting = " or ".join(str(number) for number in near if number)
        raise ValueError(
            f"TrainConfig.effective_batch: got {wanted}, expected {fitting} for {several} and"
            f" {counted(self.batch_size, 'image')} a pass at most (batch_size)"
            + (", in pairs, as mixup makes them" if pairs > 1 else "")
        )

    def _require(self, name: str, kind: type | tuple, ok: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not ok(value):
            raise ValueError(f"TrainConfig.{name}: got {value!r}, expected {expected}")


def _is_class_weight(value: Any) -> bool:
    if isinstance(value, str):
        return value == INV_FREQ
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)
    return bool(value) and numbers and all(0 < each < math.inf for each in value)
