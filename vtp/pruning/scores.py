"""How important each gate is, and how the gates of a whole model are made comparable."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from vtp.choices import SCORES
from vtp.model.architecture import Architecture
from vtp.model.cost import block_cost
from vtp.model.widths import SITES
from vtp.pruning.allocation import rescaled
from vtp.pruning.calibration import Statistics
from vtp.pruning.gates import GatedLinear
from vtp.pruning.plan import PlanError

OF_STATISTICS = SCORES[2:]


def site_scores(
    layers: Mapping[str, GatedLinear],
    score: str | Mapping[str, Tensor],
    statistics: Statistics | None = None,
) -> dict[str, np.ndarray]:
    """The score of every gate, float64, larger is more important."""
    if isinstance(score, str) and score in OF_STATISTICS:
        if statistics is None:
            raise PlanError(f"statistics: got None, expected those of vtp.calibrate for score={score!r}")
        score = {name: _of_statistics(statistics, name, score) for name in layers}
    scores = {}
    for name, layer in layers.items():
        if isinstance(score, Mapping):
            if name not in score:
                raise PlanError(f"score: no entry for site {name!r}")
            value = score[name]
        elif score == "gate":
            value = layer.gate.detach().abs()
        elif score == "taylor":
            if layer.taylor_steps == 0:
                raise PlanError(
                    f"score: 'taylor' has no statistics at {name}; sparse training collects them, or call "
                    "accumulate_taylor() on each gated layer after a backward pass"
                )
            value = layer.taylor / layer.taylor_steps
        else:
            raise PlanError(f"score: got {score!r}, expected one of {SCORES} or a mapping")
        try:
            values = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, float)
        except (TypeError, ValueError) as error:
            raise PlanError(f"score[{name!r}]: expected numbers ({error})") from error
        if values.shape != (layer.in_features,):
            raise PlanError(f"score[{name!r}]: got shape {values.shape}, expected ({layer.in_features},)")
        if not np.isfinite(values).all():
            raise PlanError(f"score[{name!r}]: contains NaN or infinity, so gates cannot be ranked")
        scores[name] = values
    return scores


def _of_statistics(statistics: Statistics, name: str, score: str) -> Tensor:
    """The score of the inputs of one site, float64 [p].

    "obs" is what the removal of a dimension adds to the change of the output, at the time greedy OBS comes to
    it (see `moments.obs_curve`); the order of the removals is kept where a later one would add less.
    """
    if score != "obs":
        return statistics.tensors[f"{name}.{score}"]
    order = statistics.tensors[f"{name}.order"].long()
    errors = statistics.tensors[f"{name}.errors"]
    if f"{name}.changes" not in statistics.tensors:  # proj, cut to other directions to measure a change
        values = statistics.tensors[name.replace("attn.proj", "attn.values")].sum().item()
        points = statistics.tensors[name.replace("attn.proj", "attn.values.changes")]
        changes = errors * (points[0, 1] / max(values, 1e-300))
    else:
        points = statistics.tensors[f"{name}.changes"]
        changes = torch.from_numpy(rescaled(errors.numpy()[::-1], points.numpy())[::-1].copy())
    # Steps that add nothing are told apart by a small part of their own error, so that their order stays.
    steps = changes.diff().clamp_min(0).cummax(0).values
    steps = steps * (1 + 1e-9 * torch.arange(len(steps), dtype=torch.float64))
    scores = torch.empty_like(steps)
    scores[order] = steps
    return scores


def ranking(
    architecture: Architecture,
    scores: Mapping[str, np.ndarray],
    score: str | Mapping[str, Tensor],
    scope: str,
    per_mac: bool,
) -> dict[str, np.ndarray]:
    """Scores made comparable over the whole model, so that one global cut obeys `scope` and `per_mac`."""
    if per_mac:
        values = _quantiles(scores, lambda name: "") if score == "gate" else scores
        saved = _macs_of_one_dimension(architecture)
        values = {name: value / saved[site_of(name)] for name, value in values.items()}
    else:
        values = dict(scores)
    if scope in ("global", "optimal"):  # of "optimal" only the order within each site is looked at
        return values
    return _quantiles(values, site_of if scope == "per_site" else str)


def site_of(name: str) -> str:
    """The kind of site that a site's name ends with: `attn.qkv` of `blocks.3.attn.qkv`."""
    return name.split(".", 2)[2]


def _quantiles(scores: Mapping[str, np.ndarray], family_of: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Replace each score by its rank in (0, 1) among the scores of its family; ties share their mean rank."""
    ranks = {}
    for family in {family_of(name) for name in scores}:
        members = [name for name in scores if family_of(name) == family]
        values = np.concatenate([scores[name] for name in members])
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_rank = (np.cumsum(counts) - counts / 2) / len(values)
        split = np.cumsum([len(scores[name]) for name in members])[:-1]
        ranks |= dict(zip(members, np.split(mean_rank[inverse], split), strict=True))
    return {name: ranks[name] for name in scores}


def _macs_of_one_dimension(architecture: Architecture) -> dict[str, float]:
    """MACs that one dimension of a site costs in the dense model, relative to their mean."""
    full = architecture.dense_widths
    whole = block_cost(architecture, full).macs
    fewer_values = (full.values[0] - 1, *full.values[1:])
    less = (
        dataclasses.replace(full, qkv=full.qkv - 1),
        dataclasses.replace(full, values=fewer_values),
        dataclasses.replace(full, fc1=full.fc1 - 1),
        dataclasses.replace(full, fc2=full.fc2 - 1),
    )
    saved = {
        s: whole - block_cost(architecture, one_less).macs for s, one_less in zip(SITES, less, strict=True)
    }
    mean = sum(saved.values()) / len(saved)
    return {site: macs / mean for site, macs in saved.items()}
