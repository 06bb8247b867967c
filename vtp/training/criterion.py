"""What a step of training minimises: the task loss, and mixup, which makes the labels that it takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vtp.training.config import TrainConfig
from vtp.training.data import Data
from vtp.training.sources import labels_of
from vtp.words import counted


def mixup_and_criterion(
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


def class_weight(config: TrainConfig, data: Data, num_classes: int, device: torch.device) -> Tensor | None:
    """The weight of each class in the task loss, float32 [classes], or None."""
    given = config.class_weight
    if given is None:
        return None
    if not isinstance(given, str):
        if len(given) != num_classes:
            raise ValueError(
                f"config.class_weight: got {counted(len(given), 'weight')}, expected {num_classes}"
            )
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
