"""Recipes: the settings of the stages of a run that are known to work for a kind of model and data."""

import dataclasses
import os
from collections.abc import Callable

from vtp.training.config import TrainConfig

STAGES = ("dense", "sparse", "finetune")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training settings of the three stages and the augmentation preset that goes with them; fine-tuning may
    have one of its own."""

    augment: str
    dense: TrainConfig
    sparse: TrainConfig
    finetune: TrainConfig
    finetune_augment: str | None = None

    def augment_of(self, stage: str) -> str:
        """The preset of a stage."""
        return (self.finetune_augment if stage == "finetune" else None) or self.augment


def _small_recipe() -> Recipe:
    """The recipe for the 28-pixel DeiT that ships with the package; minutes on a laptop."""
    tuning = TrainConfig(epochs=4, batch_size=128, lr=5e-4, warmup_epochs=0.5, clip_grad=1.0)
    return Recipe(
        augment="light",
        dense=dataclasses.replace(tuning, epochs=20, lr=3e-3, warmup_epochs=1.0),
        sparse=dataclasses.replace(tuning, l1=1e-4, gate_lr=10.0, distill_alpha=0.5, distill_temperature=2.0),
        finetune=dataclasses.replace(tuning, distill_alpha=0.5, distill_temperature=2.0),
    )


def _loading_processes() -> int:
    """As many as released models were trained with, but no more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _deit_recipe() -> Recipe:
    """The recipe for released DeiT, ViT and DINOv2 models on image folders: DeiT's augmentation (arXiv
    2012.12877) and the paper's 100 + 100 epochs and lambda (arXiv 2104.08500)."""
    tuning = TrainConfig(
        epochs=100, batch_size=128, lr=2e-5, min_lr=1e-6, warmup_epochs=5.0, weight_decay=0.05,
        mixup=0.8, cutmix=1.0, drop_path=0.1, precision="bf16", workers=_loading_processes(),
    )  # fmt: skip
    return Recipe(
        augment="deit",
        dense=dataclasses.replace(tuning, lr=5e-4, epochs=300),
        sparse=dataclasses.replace(tuning, l1=1e-4, gate_lr=10.0),
        finetune=tuning,
    )


def _short_recipe() -> Recipe:
    """`small`, with a fine-tuning that only recovers what a one-shot cut has lost: it learns from the dense
    model what this does with images as they are evaluated."""
    recipe = _small_recipe()
    recovery = dataclasses.replace(recipe.finetune, epochs=2, lr=2e-4, label_smoothing=0.0, distill_alpha=0.9)
    return dataclasses.replace(recipe, finetune=recovery, finetune_augment="none")


def _short_deit_recipe() -> Recipe:
    """`deit`, with the 10 epochs of distillation from the dense model that VBP (arXiv 2507.12988) has behind
    its one-shot cut of models for image folders."""
    recovery = TrainConfig(
        epochs=10, batch_size=32, lr=1.5e-5, min_lr=0.0, warmup_epochs=0.0, weight_decay=0.01,
        label_smoothing=0.0, distill_alpha=0.3, distill_temperature=2.0, precision="bf16",
        workers=_loading_processes(),
    )  # fmt: skip
    return dataclasses.replace(_deit_recipe(), finetune=recovery)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "small": _small_recipe,
    "deit": _deit_recipe,
    "short": _short_recipe,
    "short-deit": _short_deit_recipe,
}


def stages_of_run(*, new_weights: bool, one_shot: bool) -> tuple[str, ...]:
    """The stages that a run trains, in order: `dense` only where the model, or its head, begins anew."""
    return (*(("dense",) if new_weights else ()), *(("finetune",) if one_shot else ("sparse", "finetune")))


def short_recipe_for(data: str) -> str:
    """The recipe behind a one-shot cut for data as `open_data` takes it."""
    from vtp.training.data import is_small_grey  # for which PyTorch is imported; names of recipes need none

    return "short" if is_small_grey(data) else "short-deit"
