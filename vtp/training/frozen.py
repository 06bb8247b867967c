"""What the features of a model are worth as they are: weighted k-NN and a linear probe.

Both take features of training images with their labels, and say what they tell of test images; no weight of
the model is trained. They need no head, and no head that fits the data. The k-NN is that of Wu et al. 2018
(arXiv 1805.01978, section 3.4), with the cosine and the temperature 0.07 by which DINO (Caron et al. 2021,
arXiv 2104.14294) and DINOv2 (Oquab et al. 2023, arXiv 2304.07193) evaluate. The probe is a logistic
regression whose penalty a tenth of the training images chooses, as in DINOv2's; not the linear layer that
DINO trains on augmented images.

One feature vector stands for an image: what goes into the last layer of a model with a head (class token,
mean over patches, ...), what a model without a head puts out, and of one that puts out all tokens the class
token, or where there is none the mean over patches.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vtp.choices import NEIGHBOURS
from vtp.training.data import Data, DataError, is_multi_label
from vtp.training.evaluation import NonFiniteLossError
from vtp.training.loaders import calibration_count, calibration_images, prepared, test_images

TEMPERATURE = 0.07
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # from the strongest: each starts where the one before ended
HELD_OUT = 10  # one of so many training images chooses the penalty
_ITERATIONS = 200  # of L-BFGS, at most
_BLOCK = 2**24  # numbers of the largest tensor of intermediate results


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """One feature vector for each image, [B, D], in the model's dtype.

    Args:
        model: a dense, gated or compact vision transformer in eval mode, or what `vtp.optimize(model,
            features=True)` gave.
        images: [B, C, H, W], as the model takes them.
    """
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    if features.ndim == 2:
        return features
    vit = getattr(model, "vit", model)  # of a packed model
    return features[:, 0] if vit.cls_token is not None else features[:, vit.num_prefix_tokens :].mean(dim=1)


@torch.no_grad()
def extract(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    process: Accelerator | None = None,
) -> tuple[Tensor, Tensor]:
    """The features of all images of a loader, float32 [N, D], and their labels, int64 [N], on the model's
    device.

    Args:
        process: one of several that share the loader, by `prepared`. The first gets what all have
            found, in the loader's order and each image once, the others nothing: [0, D] and [0].

    Raises:
        NonFiniteLossError: a feature is NaN or infinite.
        ValueError: there is no image.
    """
    was_training = model.training
    model.eval()
    device = next(iter(model.state_dict().values())).device
    rows, labels = [], []
    for images, own in batches:
        features, own = pooled_features(model, images.to(device)).float(), own.to(device)
        if process is not None:
            features, own = process.gather_for_metrics((features, own))
            if not process.is_main_process:
                features, own = features.new_empty(0, features.shape[1]), own.new_empty(0)
        rows.append(features)
        labels.append(own)
    model.train(was_training)
    if not rows:
        raise ValueError("batches: got no image, expected at least one")
    features = torch.cat(rows)
    if not features.isfinite().all():
        raise NonFiniteLossError("model: got NaN or infinite features, expected finite ones")
    return features, torch.cat(labels)


@torch.no_grad()
def knn_predict(
    queries: Tensor, bank: Tensor, labels: Tensor, *, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """The class of each query by the vote of its k nearest neighbours in a bank, int64 [Q].

    A neighbour of cosine similarity s votes with weight exp(s / temperature) for its own class. Of equally
    similar images those that are first in the bank are the neighbours; of classes with equally many votes the
    first wins. Similarities are in memory for a block of queries at a time.

    Args:
        queries: [Q, D], of any length: they are L2-normalised here.
        bank: [N, D], likewise, on the same device.
        labels: of the bank, int64 [N], from 0.
        k: from 1 to N.
        temperature: above 0.

    Raises:
        ValueError: an argument is out of range, or shapes do not fit together.
    """
    _check_labelled("bank", bank, labels)
    if queries.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries: got shape {tuple(queries.shape)}, expected [Q, {bank.shape[1]}]")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: got {k}, expected 1 to {len(bank)}, the images of the bank")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    classes = int(labels.max()) + 1
    bank = F.normalize(bank.float())
    predicted = [queries.new_zeros(0, dtype=torch.int64)]
    for block in F.normalize(queries.float()).split(max(1, _BLOCK // len(bank))):
        similarity, index = _nearest(block @ bank.T, k)
        weights = (similarity.double() / temperature).softmax(dim=1)  # sums of votes in the same order
        votes = weights.new_zeros(len(block), classes).scatter_add_(1, labels[index], weights)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places; of equal ones the first, which `topk` does not promise."""
    if k == similarity.shape[1]:
        return similarity.sort(dim=1, descending=True, stable=True)
    values, index = similarity.topk(k + 1, dim=1)
    values, index, beyond = values[:, :k].clone(), index[:, :k].clone(), values[:, k]
    tied = values[:, -1] == beyond
    if tied.any():
        ordered = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, index


def fit_linear_probe(
    features: Tensor, labels: Tensor, *, penalties: Sequence[float] = PENALTIES
) -> tuple[nn.Linear, float]:
    """A linear classifier of features, by multinomial logistic regression (L-BFGS).

    It minimises the mean cross-entropy + penalty / 2 * |W|^2 over the classifier W of standardised features,
    whose bias is free. The penalty is the one by which most of a random tenth of the features, left out, are
    classified right, the strongest of several; with it all of them are fitted.

    Args:
        features: [N, D], N at least 2.
        labels: int64 [N], from 0; there are as many classes as the largest says.
        penalties: to choose from; above 0.

    Returns:
        (layer, penalty): float32, [D] to [classes], for features as they come: it fits the model as its head.

    Raises:
        ValueError: an argument is out of range, or shapes do not fit together.
    """
    _check_labelled("features", features, labels)
    if len(features) < 2:
        raise ValueError("features: got 1, expected at least 2, as some are left out to choose the penalty")
    if not penalties or not all(penalty > 0 for penalty in penalties):
        raise ValueError(f"penalties: got {penalties}, expected numbers above 0")
    scaling = _Scaling.of(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(features.device)
    left_out, fitted = order.tensor_split([max(1, len(order) // HELD_OUT)])
    start = scaling.mean.new_zeros(int(labels.max()) + 1, features.shape[1] + 1)
    best, chosen, weights = -1, 0.0, start
    for penalty in sorted(penalties, reverse=True):
        weights = _minimise(scaling, features[fitted], labels[fitted], penalty, weights)
        logits = F.linear(features[left_out].double(), *scaling.folded(weights))
        right = int((logits.argmax(dim=1) == labels[left_out]).sum())
        if right > best:
            best, chosen = right, penalty
    weight, bias = scaling.folded(_minimise(scaling, features, labels, chosen, start))
    layer = nn.Linear(*weight.shape[::-1], device=features.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer, chosen


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """Mean and standard deviation of features, [D] in float64."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "_Scaling":
        spread, mean = torch.std_mean(features.double(), dim=0, correction=0)
        return cls(mean, torch.where(spread > 1e-6 * spread.max(), spread, 1.0))  # constants tell nothing

    def folded(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [classes, D] and bias for features as they come, from `weights` [classes, D + 1] for
        standardised ones, with the bias in the last column."""
        weight = weights[:, :-1] / self.spread
        return weight, weights[:, -1] - weight @ self.mean


@torch.enable_grad()
def _minimise(scaling: _Scaling, features: Tensor, labels: Tensor, penalty: float, start: Tensor) -> Tensor:
    """The weights with the least mean cross-entropy + penalty / 2 * |W|^2, from `start` on, in its dtype."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    rows = max(1, _BLOCK // max(start.shape))

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = penalty / 2 * weights[:, :-1].square().sum()
        total.backward()
        for block, own in zip(features.split(rows), labels.split(rows), strict=True):
            logits = F.linear(block.double(), *scaling.folded(weights))
            part = F.cross_entropy(logits, own, reduction="sum") / len(labels)
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(loss)
    return weights.detach()


def _check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name}: got shape {tuple(features.shape)}, expected [N, D] with at least one row")
    if labels.shape != (len(features),) or labels.dtype != torch.int64 or labels.min() < 0:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected int64 of shape "
            f"[{len(features)}], from 0"
        )


def evaluate_features(
    model: nn.Module,
    data: Data,
    *,
    k: int | None = None,
    linear_probe: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    process: Accelerator | None = None,
) -> dict[str, float]:
    """Top-1 accuracy (percent) of frozen features on the test images, on the model's device.

    Args:
        model: as `pooled_features` takes it. Its classes, if it has any, need not be those of the data.
        data: its training images, as they are evaluated, are the bank and what the probe is fitted to.
        k: neighbours that vote; None for no k-NN.
        linear_probe: whether to fit one.
        process: one of several that share the images, all of which call this. They extract features together,
            and the first goes on with them alone: the others are done then, and return nothing.

    Returns:
        "knn"; "linear_probe" and "penalty", which was chosen for it; as asked for. Of several processes on
        the first; {} on the others.

    Raises:
        DataError: images are of several classes each.
        NonFiniteLossError: features are NaN or infinite.
        ValueError: k is larger than the number of training images.
    """
    if is_multi_label(data):
        raise DataError(
            f"data: an image of {data.name} may be of several classes, expected one for k-NN and linear probe"
        )
    images = calibration_count(data, sys.maxsize)  # all there are
    if k is not None and k > images:
        raise ValueError(f"k: got {k}, expected at most {images}, the training images")
    loading = {"batch_size": batch_size, "workers": workers}
    loaders = calibration_images(model, data, images, **loading), test_images(model, data, **loading)
    if process is not None:
        loaders = tuple(prepared(loader, process) for loader in loaders)
    (bank, labels), (queries, wanted) = (extract(model, loader, process) for loader in loaders)
    if process is not None and not process.is_main_process:
        return {}
    found = {}
    if k is not None:
        found["knn"] = _top1(knn_predict(queries, bank, labels, k=k), wanted)
    if linear_probe:
        layer, found["penalty"] = fit_linear_probe(bank, labels)
        with torch.no_grad():
            found["linear_probe"] = _top1(layer(queries).argmax(dim=1), wanted)
    return found


def _top1(predicted: Tensor, wanted: Tensor) -> float:
    return 100.0 * (predicted == wanted).double().mean().item()
