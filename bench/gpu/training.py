"""Steps of training: gates beside none and beside gates by hand, and fine-tuning a compact model beside the
dense one.

bench/gating_cost.py makes, checks and times the steps; here are their sizes, and the same with every block
compiled (one compilation for all blocks of a model, as they are alike).
"""

import copy
import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtp
from bench import gating_cost
from bench.gating_cost import Trainee, Variant, observed
from bench.gpu.cases import TOY, Case, Context, Record
from bench.gpu.models import kernels
from bench.gpu.numerics import require
from bench.irregular import cut, gated_model
from vtp.comparison.comparison import FACTOR, TINY, relative_error
from vtp.model.architecture import replace_sites
from vtp.pruning.compact import plain_operators
from vtp.timing import pairwise_ratio, take_turns
from vtp_kernels import launching

BATCH, DEPTH = 128, 12
ROUNDS, ROUNDS_SECONDS = 15, 10.0
RATE = 0.4
MODELS = {"DeiT-B": "deit_base_patch16_224", "DeiT-S": "deit_small_patch16_224"}
DTYPE = "bfloat16"  # by autocast
PATHS = ("padded", "narrow")  # of a compact model: on padded widths, as it goes by itself, and on the ops
PROFILED_STEPS, MOST_KERNELS = 3, 12


def cases(toy: bool) -> list[Case]:
    """Eager first, as most train; then fine-tuning, and compiled."""
    found = [Case(f"{name}, eager", functools.partial(measure, name, False), 50) for name in MODELS]
    found += [Case(f"{name}, fine-tuning", functools.partial(fine_tune, name), 50) for name in MODELS]
    found += [Case(f"{name}, compiled", functools.partial(measure, name, True), 90) for name in MODELS]
    return found


class FoldedByPyTorch(vtp.GatedLinear):
    """The gate on the weight, as ours, in operators of PyTorch alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gate, self.bias)


def by_pytorch(dense: nn.Module) -> Variant:
    """Gates that are folded by four launches of PyTorch's more than a plain linear has."""
    model = copy.deepcopy(dense)
    replace_sites(model, lambda _, linear: FoldedByPyTorch.from_linear(linear))
    return gating_cost.trained(model)


def one_by_one(dense: nn.Module) -> Variant:
    """The project's gates, each folded by launches of its own, not a block's together."""
    return dataclasses.replace(gating_cost.gated(dense), paths=("apart",))


# Where the host is what a step waits for, how gates are launched decides: see docs/speed-gpu.md.
EAGER = {"gated, one by one": one_by_one, "gated, by PyTorch": by_pytorch}


def measure(name: str, compiled: bool, context: Context) -> Record:
    """A step without gates, with ours, with gates by hand, and once more without.

    In eager mode also with other ways to launch ours.
    """
    variants = gating_cost.VARIANTS if compiled else {**gating_cost.VARIANTS, **EAGER}
    if compiled:
        variants = {
            label: functools.partial(_compiled, make, context.toy) for label, make in variants.items()
        }
    case = gating_cost.Case(DTYPE, 2, 1) if context.toy else gating_cost.Case(DTYPE, BATCH, DEPTH)
    record = gating_cost.measure(
        case,
        lambda depth: _dense(name, depth, context.toy),
        device=context.device,
        rounds=5 if context.toy else ROUNDS,
        seconds=0.1 if context.toy else ROUNDS_SECONDS,
        variants=variants,
    )
    wrong = [f"{label}: {found['failed']}" for label, found in record["variants"].items() if found["failed"]]
    _clean_up()
    return record | ({"status": f"failed: {'; '.join(wrong)}"} if wrong else {})


def _dense(name: str, depth: int, toy: bool) -> nn.Module:
    return timm.create_model(MODELS[name], **{"depth": depth, **(TOY if toy else {})})


def _compiled(make: Callable[[nn.Module], Variant], toy: bool, dense: nn.Module) -> Variant:
    variant = make(dense)
    for block in variant.model.blocks:
        block.compile(backend="eager" if toy else "inductor")
    return variant


class OnPath(Trainee):
    """A Trainee of a compact model that goes one way, whatever its rules say: see `fine_tune`."""

    def __init__(self, path: str, variant: Variant, *batch: Any) -> None:
        self.path = path
        super().__init__(variant, *batch)

    def step(self) -> Tensor:
        with launching.forced_path("compact_training", self.path):
            return super().step()


def fine_tune(name: str, context: Context) -> Record:
    """A step of a compact model on padded widths and one on the ops, beside a step of the dense model that it
    was cut from; and of each the time that its kernels take: the rest of a step is the host's."""
    batch = 2 if context.toy else BATCH
    dense = _dense(name, DEPTH, context.toy)
    small = cut(gated_model(MODELS[name], **TOY if context.toy else {}), RATE)
    generator = torch.Generator().manual_seed(0)
    patch = dense.patch_embed
    images = torch.randn(batch, patch.proj.in_channels, *patch.img_size, generator=generator)
    targets = torch.randint(dense.num_classes, (batch,), generator=generator)
    images, targets = images.to(context.device), targets.to(context.device)
    small.to(context.device)
    errors = _gradient_errors(small, images, targets)
    trainees = {"dense": Trainee(Variant(dense.to(context.device)), images, targets, DTYPE)}
    trainees |= {path: OnPath(path, Variant(copy.deepcopy(small)), images, targets, DTYPE) for path in PATHS}
    macs = {"dense": vtp.count(dense).macs, "compact": vtp.count(small).macs}
    for trainee in list(trainees.values()) * 2:
        trainee.step()
    done = take_turns(trainees, 5 if context.toy else ROUNDS, 0.1 if context.toy else ROUNDS_SECONDS)
    seconds = {label: trainee.seconds[-done:] for label, trainee in trainees.items()}
    profiled = {label: kernels(trainee.step, context, PROFILED_STEPS) for label, trainee in trainees.items()}
    ratios = {path: pairwise_ratio(seconds[path], seconds["dense"]) for path in PATHS}
    # 1: the step is shorter by all that the model has fewer MACs.
    shares = {path: macs["compact"] / macs["dense"] / ratio["median"] for path, ratio in ratios.items()}
    record = {
        "batch": batch,
        "rounds": done,
        "macs": macs,
        "gradient_error": errors,
        "median_seconds": {label: statistics.median(times) for label, times in seconds.items()},
        "kernel_seconds": {label: sum(k["seconds"] for k in found) for label, found in profiled.items()},
        "launches": {
            label: sum(k["launches"] for k in found if k["seconds"]) for label, found in profiled.items()
        },
        "kernels": {label: found[:MOST_KERNELS] for label, found in profiled.items()},
        "compact_over_dense": ratios,
        "share_of_macs": shares,
    }
    del trainees
    _clean_up()
    return record


def _gradient_errors(small: nn.Module, images: Tensor, targets: Tensor) -> Record:
    """Relative error of all gradients of a step on each path, beside float32 on PyTorch's operators; and what
    is allowed, given what these make of it under autocast.

    Raises:
        AssertionError: a path is further away than that.
    """

    def gradients(dtype: str, path: str | None) -> Tensor:
        variant, batch = Variant(copy.deepcopy(small)), (images, targets, dtype)
        trainee = Trainee(variant, *batch) if path is None else OnPath(path, variant, *batch)
        with plain_operators() if path is None else nullcontext():
            trainee.step()
        return torch.cat([g.double().flatten() for g in observed(trainee).values() if g is not None])

    exact = gradients("float32", None)
    bound = FACTOR * relative_error(gradients(DTYPE, None), exact) + TINY[DTYPE]
    found: Record = {"bound": bound}
    for path in PATHS:
        found[path] = error = relative_error(gradients(DTYPE, path), exact)
        require(error <= bound, f"{path}: gradients: relative error {error:.2g}, at most {bound:.2g} allowed")
    return found


def _clean_up() -> None:
    """Memory of one model is free before the next is made."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
