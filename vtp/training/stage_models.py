"""The models of a stage of training on its device: that which is trained, its moving average and the teacher,
whole or sharded over processes."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from timm.layers import DropPath, calculate_drop_path_rates
from timm.utils import ModelEmaV3
from torch import nn

from vtp.training.config import TrainConfig
from vtp.training.data import Data
from vtp.training.loaders import loader_arguments
from vtp.training.sharding import copy_whole, shard
from vtp.training.sparsity import gated_linears
from vtp.training.teacher import Teacher


class StageModels:
    """Copies of the model that a stage is given, for its moving average and of the teacher, on the device.

    Attributes:
        raw: the bare model that is trained; called: the same compiled and under Accelerate's wrappers, once
            there is an optimizer (`prepared`).
        average: the moving average of `raw`, or None; teacher: to distil from, or None.
        gated: the layers of `raw` with a gate that is trained; gates: these gates.

    Raises:
        ValueError: settings that do not go with the model, or a teacher that does not.
    """

    called: nn.Module

    def __init__(
        self,
        start: nn.Module,
        data: Data,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        teacher: nn.Module | None,
        sharded: bool,
    ) -> None:
        self.start, self.config, self.accelerator, self.sharded = start, config, accelerator, sharded
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
                foreach=not sharded,
            )
        if teacher is not None and config.distill_alpha > 0:
            takes = loader_arguments(self.raw, data, config.batch_size, config.workers)
            shape = (takes["in_chans"], *takes["image_size"])
            own = Teacher(teacher, data, shape=shape, num_classes=self.raw.num_classes)
            self.teacher = own.to(accelerator.device)
        if hasattr(self.raw, "set_distilled_training"):  # a head for the labels and one for the teacher
            self.raw.set_distilled_training(self.teacher is not None)
        if config.grad_checkpointing:
            self.raw.set_grad_checkpointing(True)

    def _copy(self) -> nn.Module:
        """The model that was given, on the device, as it is to be trained."""
        model = copy.deepcopy(self.start).to(self.accelerator.device)
        model.zero_grad()
        _set_drop_path(model, self.config.drop_path)
        return model

    @property
    def average(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    def update_average(self, updates: int) -> None:
        """After so many updates of the weights."""
        if self.ema is not None:
            self.ema.update(self.raw, step=updates)

    def shard(self) -> None:
        """Shard the model, its moving average and the teacher over the processes, if they are to be."""
        if not self.sharded:
            return
        if self.config.compile:  # block by block, between the gathering of weights and their giving back
            for block in self.raw.blocks:
                block.compile()
        for model in (self.raw, self.average, None if self.teacher is None else self.teacher.model):
            if model is not None:
                shard(model, self.accelerator.device)

    def prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer in Accelerate's wrapper; the model gets its own, and is compiled if it is to be."""
        if self.sharded:
            self.called = self.raw
            return self.accelerator.prepare(optimizer)
        model = torch.compile(self.raw) if self.config.compile else self.raw
        self.called, optimizer = self.accelerator.prepare(model, optimizer)
        return optimizer

    def trained(self) -> nn.Module:
        """What the stage has made: the moving average where there is one, whole, in eval mode, without
        wrappers and without what is for training alone."""
        model = self.average or self.raw
        if self.sharded:
            model, shards = self._copy(), model
            copy_whole(shards, model)
        else:
            self.accelerator.unwrap_model(self.called, keep_fp32_wrapper=False)
            # Accelerate leaves the method of the class as an attribute.
            self.raw.__dict__.pop("forward", None)
            if self.config.grad_checkpointing:
                self.raw.set_grad_checkpointing(False)
        if hasattr(model, "set_distilled_training"):
            model.set_distilled_training(False)
        return model.eval()


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
