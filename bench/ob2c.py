"""DVBP + OB2C (arXiv 2608.17657) by its published formulas: a denoised variance ranks the hidden units of the
MLPs over all layers, and the weights that are left make up for those that go, biases included.

Moments are of the dense model: the mean [p] and the covariance [p, p] of the inputs of a layer, over the
tokens of all images, float64.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import vtp
from vtp.model.architecture import describe
from vtp.model.cost import model_cost

Moments = Mapping[str, tuple[Tensor, Tensor]]

MLP_UNITS = ("attn", "mlp.fc1")  # what is protected where hidden units alone are cut, as in the paper
DAMPING = 1e-6  # of the mean variance, on the diagonal: inputs that a norm made have a direction of none


@torch.no_grad()
def input_moments(dense: nn.Module, layers: Iterable[str], images: Tensor) -> Moments:
    """Mean and covariance of the inputs of these layers on images [N, C, H, W]."""
    model, sums = copy.deepcopy(dense), {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            count, total, products = sums.get(name, (0, 0, 0))
            sums[name] = count + len(rows), total + rows.sum(0), products + rows.T @ rows

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    for batch in images.split(500):
        model(batch)
    return {
        name: (total / count, products / count - torch.outer(total, total) / count**2)
        for name, (count, total, products) in sums.items()
    }


def noise_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur distribution: of the eigenvalues of a covariance that is estimated from
    noise of variance 1, with `ratio` dimensions for each sample (Gavish and Donoho, arXiv 1305.5870)."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: got {ratio:g}, expected at most as many dimensions as samples, in (0, 1]")
    # t = 1 + ratio - 2 sqrt(ratio) cos(angle): the square root of the density becomes a sine.
    angle = (np.arange(10_000) + 0.5) * math.pi / 10_000
    t = 1 + ratio - 2 * math.sqrt(ratio) * np.cos(angle)
    below = np.cumsum(np.sin(angle) ** 2 / t)
    return float(np.interp(0.5, below / below[-1], t))


def denoised(covariance: Tensor, samples: int) -> Tensor:
    """A covariance [p, p] without its eigenvalues below the edge of the noise.

    Args:
        samples: independent ones: images, not tokens.
    """
    values, vectors = torch.linalg.eigh(covariance)
    ratio = len(values) / samples
    noise = values.quantile(0.5) / noise_median(ratio)
    signal = values > noise * (1 + math.sqrt(ratio)) ** 2
    return (vectors[:, signal] * values[signal]) @ vectors[:, signal].T


def denoised_variance_plan(
    dense: nn.Module, macs: float, moments: Moments, images: int, *, protect: tuple[str, ...] = MLP_UNITS
) -> vtp.PruningPlan:
    """What is kept at so many MACs: those of the lowest (1 - p) var + p denoised var go, p being their share.

    Args:
        moments: of all sites, on so many images.
        protect: as `vtp.make_plan` takes it; () ranks the inputs of all sites, which the paper does not do.

    Raises:
        vtp.PlanError: the budget cannot be met by what is not protected.
    """
    variance = {name: covariance.diagonal() for name, (_, covariance) in moments.items()}
    clean = {name: denoised(covariance, images).diagonal() for name, (_, covariance) in moments.items()}
    share, before = 0.5, -1.0
    for _ in range(10):  # a plan's own share, but for plans that take turns
        if share == before:
            break
        score = {name: (1 - share) * variance[name] + share * clean[name] for name in moments}
        plan = vtp.make_plan(dense, macs=macs, score=score, protect=protect, min_keep=0)
        share, before = removed_share(plan, protect), share
    return plan


def removed_share(plan: vtp.PruningPlan, protect: tuple[str, ...]) -> float:
    """Share of the dimensions that are not protected which a plan removes."""
    free = [name for name in plan.kept if not any(f".{part}." in f".{name}." for part in protect)]
    widths = plan.architecture.site_widths()
    before = sum(widths[name] for name in free)
    return (before - sum(len(plan.kept[name]) for name in free)) / before


def least_macs(dense: nn.Module) -> int:
    """MACs that are left with one hidden unit in each MLP: cutting those alone reaches no budget below."""
    architecture = describe(dense)
    without = dataclasses.replace(architecture.dense_widths, fc2=1)
    return model_cost(architecture, [without] * architecture.depth).macs


@torch.no_grad()
def with_compensation(dense: nn.Module, plan: vtp.PruningPlan, moments: Moments) -> nn.Module:
    """The dense model with the weights of what a plan removes, P, at 0, and the others changed for it:
    `dW = -W_P ([C^-1]_PP)^-1 [C^-1]_P,:`, and biases by `-dW mu` (Eq. 7, 10)."""
    model = copy.deepcopy(dense)
    for name, kept in plan.kept.items():
        layer, (mean, covariance) = model.get_submodule(name), moments[name]
        gone = torch.ones(len(mean), dtype=torch.bool)
        gone[list(kept)] = False
        ridge = DAMPING * covariance.diagonal().mean() * torch.eye(len(mean))
        inverse = torch.linalg.inv(covariance + ridge)[gone]
        change = -layer.weight.double()[:, gone] @ torch.linalg.solve(inverse[:, gone], inverse)
        layer.weight += change
        layer.weight[:, gone] = 0
        layer.bias -= change @ mean
    return model
