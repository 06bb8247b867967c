"""What a model is worth on the test images: loss, top-1 accuracy, mean average precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vtp.training.data import Data
from vtp.training.loaders import prepared, test_images
from vtp.training.multi_label import mean_average_precision


class NonFiniteLossError(RuntimeError):
    """The loss, a weight or an output is NaN or infinite; training names step and checkpoint."""


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
    device = _device_of(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
    shared = {}
    if process is not None:
        loader, shared = prepared(loader, process), {"gather": process.gather_for_metrics}
    found = evaluate_batches(model, loader, cast, labels=data.labels_present, **shared)
    if not math.isfinite(found["loss"]):
        raise NonFiniteLossError(
            "model: got NaN or infinite outputs on the test images, expected finite ones"
        )
    return found["top1"], found["loss"]


@torch.no_grad()
def evaluate_batches(
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
    was_training, device = model.training, _device_of(model)
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


def _device_of(model: nn.Module) -> torch.device:
    """The device that a model is on; a packed one has no parameters."""
    return next(itertools.chain(model.parameters(), model.buffers())).device
