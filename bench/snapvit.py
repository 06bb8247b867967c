"""SnapViT's choice of heads and hidden units (arXiv 2510.17700) by its published formulas: squared gradients
of a self-supervised loss, times a factor for each MLP and each head, found by an evolutionary search.

Settings are those of its repository's script for a ViT-B of DINO, but for what a comment says. Its floor of a
fifth of the heads of a block is none of 3, and not here; nor is its weight correction.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import vtp
from vtp.model.architecture import describe
from vtp.model.cost import block_cost

GLOBAL_CROPS, LOCAL_CROPS = (2, (0.25, 1.0)), (10, (0.05, 0.25))  # how many of an image, shares of its area
HEADS_BEHIND = 0.15  # the share of heads that goes is smaller than that of hidden units, by so much
KEPT_UNITS = 0.05  # of each MLP are never removed
COMPONENTS = 64  # its default; of 768 numbers 192
EVALUATIONS = 78  # six generations of a model of 6 blocks and 3 heads; 50 there
FIRST, LAST = 1.2, 0.8  # where the search starts: factors of the first and the last block


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Squared gradients: of fc1 a hidden unit, [depth, hidden]; of the values a head, [depth, H]."""

    units: Tensor
    heads: Tensor


def embedding(model: nn.Module, images: Tensor) -> Tensor:
    """What the head of classes reads, [N, C]."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def crops(image: Tensor) -> Tensor:
    """Random crops of an image [C, H, W], of its size, the global ones first, by torch's own generator."""
    size = image.shape[-2:]
    cut = [
        torchvision.transforms.RandomResizedCrop(size, scale)
        for count, scale in (GLOBAL_CROPS, LOCAL_CROPS)
        for _ in range(count)
    ]
    return torch.stack([own(image) for own in cut])


def self_supervised_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Cross-entropy of the embeddings of each global crop [2, C] with those of all other crops [12, C]."""
    target = nn.functional.normalize(teacher, dim=-1).softmax(-1)
    found = nn.functional.normalize(student, dim=-1).log_softmax(-1)
    pairs = -target @ found.T
    return pairs.sum() - pairs.diagonal().sum()


def sensitivity(dense: nn.Module, images: Tensor, *, seed: int = 0) -> Sensitivity:
    """Mean over images [N, C, H, W] of the squared gradients of the loss of each."""
    model = copy.deepcopy(dense).requires_grad_(True)
    weights = [w for block in model.blocks for w in (block.mlp.fc1.weight, block.attn.qkv.weight)]
    sums = [torch.zeros_like(weight) for weight in weights]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for image in images:
            found = embedding(model, crops(image))
            loss = self_supervised_loss(found[: GLOBAL_CROPS[0]].detach(), found)
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += gradient.square() / len(images)
    values = [total.unflatten(0, (3, describe(dense).num_heads, -1))[2] for total in sums[1::2]]
    return Sensitivity(
        torch.stack([total.mean(1) for total in sums[::2]]), torch.stack([own.mean((1, 2)) for own in values])
    )


def snapvit_plan(dense: nn.Module, macs: float, found: Sensitivity, factors: np.ndarray) -> vtp.PruningPlan:
    """The heads and hidden units of the highest sensitivity times factor, at so many MACs.

    Heads and units are ranked apart. The share of heads that goes follows that of units, on the line of the
    repository's own settings; then as many units go as the budget takes.

    Args:
        factors: of the MLP of each block, then of each head of each block; their signs do not count.

    Raises:
        ValueError: the budget cannot be met.
    """
    depth, hidden = found.units.shape
    factors = torch.from_numpy(np.abs(factors)).to(found.units)
    units = found.units * factors[:depth, None]
    heads = found.heads * factors[depth:].view_as(found.heads)
    units[units >= units.topk(max(1, int(KEPT_UNITS * hidden))).values[:, -1:]] = torch.inf
    removed = heads.flatten().argsort()[: removed_heads(dense, macs)]
    whole = torch.ones(heads.numel())
    whole[removed] = -1
    # In the order of their scores go: those heads at -1, units in (0, 1), and never what is at 1 or above.
    places = torch.empty(units.numel())
    places[units.flatten().argsort(stable=True)] = (torch.arange(units.numel()) + 0.5) / units.numel()
    widths = describe(dense).site_widths()
    score = {name: torch.full((width,), 2.0) for name, width in widths.items()}
    for i in range(depth):
        score[f"blocks.{i}.mlp.fc2"] = places.view_as(units)[i]
        values = widths[f"blocks.{i}.attn.proj"] // heads.shape[1]
        score[f"blocks.{i}.attn.proj"] = whole.view_as(heads)[i].repeat_interleave(values)
    plan = vtp.make_plan(dense, macs=macs, score=score, min_keep=0)
    others = sum(widths[name] - len(kept) for name, kept in plan.kept.items() if not name.endswith("fc2"))
    if others != len(removed) * values:
        raise ValueError(
            f"macs: got {macs:.4g}, which {len(removed)} heads and all hidden units do not reach"
        )
    return plan


def removed_heads(dense: nn.Module, macs: float) -> int:
    """How many heads go at so many MACs."""
    architecture = describe(dense)
    full = architecture.dense_widths
    whole = block_cost(architecture, full).macs
    mlp = whole - block_cost(architecture, dataclasses.replace(full, fc2=0)).macs
    attention = (
        whole - block_cost(architecture, dataclasses.replace(full, values=(0,) * len(full.values))).macs
    )
    saved = (vtp.count(dense).macs - macs) / architecture.depth
    share = (saved + HEADS_BEHIND * attention) / (mlp + attention) - HEADS_BEHIND
    return int(max(0.0, share) * architecture.depth * len(full.values))


@torch.no_grad()
def searched_factors(
    dense: nn.Module,
    budgets: Sequence[float],
    found: Sensitivity,
    images: Tensor,
    *,
    evaluations: int = EVALUATIONS,
    seed: int = 0,
) -> np.ndarray:
    """The factors for which the embeddings of images [N, C, H, W] come closest to the dense model's.

    Closeness is the mean cosine of their principal components, over models cut to each of `budgets` MACs.
    """
    whole = embedding(dense, images)
    mean = whole.mean(0)
    components = torch.linalg.svd(whole - mean, full_matrices=False).Vh[:COMPONENTS].T
    target = (whole - mean) @ components

    def distance(factors: np.ndarray) -> float:
        total = 0.0
        for macs in budgets:
            small = vtp.compact(dense, snapvit_plan(dense, macs, found, factors))
            own = torch.cat([embedding(small, batch) for batch in images.split(100)])
            total += nn.functional.cosine_similarity((own - mean) @ components, target).mean().item()
        return 1 - total / len(budgets)

    depth, heads = found.heads.shape
    blocks = np.linspace(FIRST, LAST, depth)
    start = np.concatenate([blocks, blocks.repeat(heads)])
    return natural_evolution(distance, start, evaluations, np.random.default_rng(seed))


def natural_evolution(
    objective: Callable[[np.ndarray], float],
    start: np.ndarray,
    evaluations: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """The best of so many points [d] that xNES looks at (Glasmachers et al., GECCO 2010), whole generations.

    Samples are `mean + A z`, z normal, A first the identity; with their utilities u the mean moves by
    `A sum u z`, and A is multiplied by `exp(rate / 2 sum u (z z' - 1))`.
    """
    dimensions = len(start)
    population = 4 + int(3 * math.log(dimensions))
    rate = 0.6 * (3 + math.log(dimensions)) / dimensions**1.5
    utility = np.maximum(0, math.log(population / 2 + 1) - np.log(np.arange(population) + 1))
    utility = utility / utility.sum() - 1 / population
    mean, spread = start.astype(float), np.eye(dimensions)
    best, least = mean, objective(mean)
    for _ in range(evaluations // population):
        z = generator.standard_normal((population, dimensions))
        points = mean + z @ spread.T
        values = np.array([objective(point) for point in points])
        order = values.argsort()
        if values[order[0]] < least:
            best, least = points[order[0]], values[order[0]]
        z = z[order]
        turn = np.einsum("i,ij,ik->jk", utility, z, z) - utility.sum() * np.eye(dimensions)
        mean = mean + spread @ (utility @ z)
        lengths, axes = np.linalg.eigh(rate / 2 * turn)
        spread = spread @ (axes * np.exp(lengths)) @ axes.T
    return best
