"""vtp.training.frozen: k-NN and linear probe, beside a few lines of plain Python and Newton's method."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image, relative_error
from vtp.runtime.optimize import pack_for_ops
from vtp.training import frozen
from vtp.training.data import Data, DataError
from vtp.training.evaluation import NonFiniteLossError
from vtp.training.frozen import evaluate_features, extract, fit_linear_probe, knn_predict, pooled_features

# ------------------------------------------------------------------------------------------------------ k-NN


def vote(query, bank, labels, k, temperature):
    """One query's class, as Wu et al. define it."""
    unit = [row / max(np.linalg.norm(row), 1e-12) for row in (query, *bank)]
    similarity = [float(unit[0] @ row) for row in unit[1:]]
    nearest = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
    votes = [0.0] * (max(labels) + 1)
    for i in nearest:
        votes[labels[i]] += math.exp(similarity[i] / temperature)
    return max(range(len(votes)), key=lambda c: (votes[c], -c))


@pytest.mark.parametrize("block", [None, 100, 1], ids=["at once", "three at a time", "one by one"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (31, 0.07)])
def test_knn_votes_as_the_definition_says(k, temperature, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(frozen, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(31, 6, generator=generator), 9 * torch.randn(40, 6, generator=generator)
    labels = torch.randint(4, (31,), generator=generator)
    got = knn_predict(queries, bank, labels, k=k, temperature=temperature)
    plain = (bank.double().numpy(), labels.tolist(), k, temperature)
    assert got.tolist() == [vote(query, *plain) for query in queries.double().numpy()]
    assert len(set(got.tolist())) > 1


@pytest.mark.parametrize("k", range(1, 13))
def test_of_equally_similar_images_the_first_are_neighbours_and_of_equal_votes_the_first_class_wins(k):
    corners = torch.eye(4)  # products of these are exact, so that ties are
    bank, labels = corners.repeat(3, 1), torch.tensor([3, 1, 0, 2, 1, 1, 0, 0, 2, 3, 1, 1])
    queries = torch.cat([corners, torch.ones(1, 4), torch.zeros(1, 4)])
    got = knn_predict(queries, bank, labels, k=k)
    plain = (bank.double().numpy(), labels.tolist(), k, 0.07)
    assert got.tolist() == [vote(query, *plain) for query in queries.double().numpy()]


def test_knn_of_one_class_and_of_no_query():
    bank = torch.randn(5, 3)
    assert knn_predict(torch.randn(4, 3), bank, torch.zeros(5, dtype=torch.int64), k=5).tolist() == [0] * 4
    nothing = knn_predict(torch.zeros(0, 3), bank, torch.arange(5), k=2)
    assert nothing.shape == (0,) and nothing.dtype == torch.int64


BANK, LABELS = torch.randn(5, 3), torch.arange(5)
BAD_KNN = {
    "empty bank": ((BANK, BANK[:0], LABELS[:0]), {}, r"bank: got shape \(0, 3\), expected \[N, D\] with at"),
    "k beyond the bank": (
        (BANK, BANK, LABELS),
        {"k": 6},
        "k: got 6, expected 1 to 5, the images of the bank",
    ),
    "no k": ((BANK, BANK, LABELS), {"k": 0}, "k: got 0, expected 1 to 5"),
    "widths": ((BANK[:, 1:], BANK, LABELS), {"k": 1}, r"queries: got shape \(5, 2\), expected \[Q, 3\]"),
    "labels": ((BANK, BANK, LABELS[1:]), {"k": 1}, r"labels: got torch\.int64 of shape \(4,\)"),
    "floats": ((BANK, BANK, LABELS.float()), {"k": 1}, r"labels: got torch\.float32"),
    "negative": ((BANK, BANK, LABELS - 1), {"k": 1}, "labels: .* from 0"),
    "temperature": (
        (BANK, BANK, LABELS),
        {"k": 1, "temperature": 0.0},
        "temperature: got 0.0, expected a number",
    ),
}


@pytest.mark.parametrize("case", BAD_KNN)
def test_knn_refuses_by_name(case):
    arguments, settings, message = BAD_KNN[case]
    with pytest.raises(ValueError, match=message):
        knn_predict(*arguments, **settings)


# -------------------------------------------------------------------------------------------- linear probe


def blobs(count=300, width=6, classes=4, spread=0.3, seed=0):
    """Features around one point for each class, of very unequal scales and far from 0."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return features * torch.logspace(-2, 2, width) + 50.0, labels


def newton(features, labels, penalty):
    """The same classifier by Newton's method, its Hessian by autograd; float64."""
    rows = features.double()
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    rows, classes = (rows - mean) / spread, int(labels.max()) + 1

    def loss(flat):
        weights = flat.view(classes, -1)
        entropy = nn.functional.cross_entropy(rows @ weights[:, :-1].T + weights[:, -1], labels)
        return entropy + penalty / 2 * weights[:, :-1].square().sum()

    flat = torch.zeros(classes * (rows.shape[1] + 1), dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        # Biases of all classes may move together without any change: the pseudo-inverse leaves them.
        flat = flat - torch.linalg.pinv(torch.autograd.functional.hessian(loss, flat), rtol=1e-12) @ gradient
    weights = flat.view(classes, -1)
    weight = weights[:, :-1] / spread
    return weight, weights[:, -1] - weight @ mean


@pytest.mark.parametrize("block", [None, 40], ids=["at once", "in blocks"])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_probe_is_the_regression_that_newton_finds(penalty, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(frozen, "_BLOCK", block)
    features, labels = blobs(count=80, width=3, spread=1.0)
    layer, chosen = fit_linear_probe(features, labels, penalties=[penalty])
    assert chosen == penalty and layer.weight.dtype == torch.float32
    weight, bias = newton(features, labels, penalty)
    # Softmax does not see what all classes have in common.
    got, expected = (logits - logits.mean(1, keepdim=True) for logits in
                     (layer(features).double(), features.double() @ weight.T + bias))  # fmt: skip
    assert relative_error(got, expected) < 1e-4


def test_the_probe_is_right_where_classes_are_separable():
    layer, _ = fit_linear_probe(*blobs(spread=0.05))
    features, labels = blobs(spread=0.05, seed=1)
    assert (layer(features).argmax(1) == labels).all()


def test_the_penalty_is_chosen_by_images_that_are_left_out_and_the_strongest_of_equals():
    features, labels = blobs(spread=0.05)
    assert fit_linear_probe(features, labels, penalties=[1e-6, 1e-3, 1e-1])[1] == 1e-1  # all are right
    features, labels = blobs(spread=1.0)
    noise = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    # By the noise a weak penalty tells all images apart that are fitted, and fewer of the others.
    assert fit_linear_probe(torch.cat([features, noise], dim=1), labels, penalties=[1e-6, 1.0])[1] == 1.0


def test_a_probe_of_constants_of_one_class_and_of_too_little():
    features, labels = blobs()
    features[:, 2] = 7.0
    layer, _ = fit_linear_probe(features, labels)
    assert layer.weight.isfinite().all()
    layer, _ = fit_linear_probe(features[:2], torch.zeros(2, dtype=torch.int64))
    assert layer(features).shape == (300, 1)
    with pytest.raises(ValueError, match="features: got 1, expected at least 2"):
        fit_linear_probe(features[:1], labels[:1])
    with pytest.raises(ValueError, match=r"features: got shape \(0, 6\)"):
        fit_linear_probe(features[:0], labels[:0])
    for penalties in ([], [0.1, 0.0]):
        with pytest.raises(ValueError, match=r"penalties: got .* expected numbers above 0"):
            fit_linear_probe(features, labels, penalties=penalties)


def test_inputs_of_the_probe_are_left_alone_and_it_needs_no_gradients_of_the_caller():
    features, labels = blobs(count=40)
    before = features.clone()
    with torch.no_grad():
        fit_linear_probe(features, labels)
    assert torch.equal(features, before)


# ------------------------------------------------------------------------------------------------ features


POOLED = {
    "class token": (TINY, lambda tokens: tokens[:, 0]),
    "mean": (dataclasses.replace(TINY, global_pool="avg"), lambda tokens: tokens[:, 1:].mean(1)),
    "distilled": (FAMILIES["distilled"], lambda tokens: tokens[:, :2].mean(1)),
    "no head": (FAMILIES["features"], lambda tokens: tokens[:, 0]),
    "all tokens": (dataclasses.replace(FAMILIES["features"], global_pool=""), lambda tokens: tokens[:, 0]),
    "rotary": (
        dataclasses.replace(FAMILIES["rotary"], num_classes=0, global_pool=""),
        lambda tokens: tokens[:, 0],
    ),
    "registers alone": (
        dataclasses.replace(TINY, num_classes=0, global_pool="", class_token=False, reg_tokens=2),
        lambda tokens: tokens[:, 2:].mean(1),
    ),
}


@pytest.mark.parametrize("kind", POOLED)
def test_one_vector_stands_for_an_image_whatever_runs_the_model(kind):
    architecture, pool = POOLED[kind]
    dense = build(architecture, torch.float32)
    model = gated(dense)
    small = vtp.compact(model, vtp.make_plan(model, rate=0.3))
    images = image(small, batch=3)
    for each in (dense, model, small):
        assert relative_error(pooled_features(each, images), pool(each.forward_features(images))) < 1e-6
    for fast in (pack_for_ops(small), vtp.optimize(small, features=True)):
        assert relative_error(pooled_features(fast, images), pooled_features(small, images)) < 1e-5


def test_features_are_extracted_in_eval_mode_without_gradients_and_the_mode_is_restored():
    model = build(dataclasses.replace(TINY, drop_rate=0.5, proj_drop_rate=0.5), torch.bfloat16).train()
    images, labels = image(model, batch=5), torch.arange(5)
    features, own = extract(model, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    assert model.training and not features.requires_grad
    assert features.dtype == torch.float32 and torch.equal(own, labels)
    assert relative_error(features, pooled_features(model.eval(), images).float()) < 1e-2


def test_features_that_are_no_numbers_and_no_images_are_refused():
    model = build(dtype=torch.float32)
    with pytest.raises(ValueError, match="batches: got no image"):
        extract(model, [])
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="NaN or infinite features"):
        extract(model, [(image(model), torch.zeros(2, dtype=torch.int64))])


# ---------------------------------------------------------------------------------------------- end to end


class Patterns(Dataset):
    """Grey images, one pattern for each of three classes and some noise."""

    def __init__(self, count: int, seed: int, kind=lambda label: label) -> None:
        patterns = np.random.default_rng(0).integers(0, 200, (3, 8, 8))
        noise = np.random.default_rng(seed).integers(0, 56, (count, 8, 8))
        self.labels = np.arange(count) % 3
        self.images, self.kind = (patterns[self.labels] + noise).astype("uint8"), kind

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), self.kind(int(self.labels[index]))


def patterns(**kinds) -> Data:
    return Data(
        "patterns",
        3,
        ("a", "b", "c"),
        1,
        8,
        (0.5,),
        (0.5,),
        Patterns(60, 1, **kinds),
        Patterns(30, 2, **kinds),
    )


def test_end_to_end_the_figures_are_those_of_the_definitions():
    data = patterns()
    model = gated(build(FAMILIES["features"], torch.float32))
    small = vtp.compact(model, vtp.make_plan(model, rate=0.3))
    found = evaluate_features(small, data, k=5, linear_probe=True, batch_size=7)
    assert set(found) == {"knn", "linear_probe", "penalty"}

    def features(images):
        pixels = torch.stack([torch.from_numpy(each)[None].float() for each in images.images])
        return small((pixels / 255 - 0.5) / 0.5).detach()

    bank = features(data.train).double().numpy(), data.train.labels.tolist(), 5, 0.07
    right = [vote(query, *bank) for query in features(data.test).double().numpy()] == data.test.labels
    assert found["knn"] == pytest.approx(100 * right.mean())
    assert found["knn"] > 90 and found["linear_probe"] > 90
    fast = evaluate_features(vtp.optimize(small, features=True), data, k=5)
    assert fast == {"knn": found["knn"]}


def test_a_model_with_a_head_is_evaluated_on_other_classes_than_its_own():
    assert evaluate_features(build(dtype=torch.float32), patterns(), k=5)["knn"] > 90


def test_more_neighbours_than_images_and_images_of_several_classes_are_refused_before_any_work(monkeypatch):
    model = build(dtype=torch.float32)
    monkeypatch.setattr(frozen, "extract", lambda *_: pytest.fail("images were read"))
    with pytest.raises(ValueError, match="k: got 61, expected at most 60, the training images"):
        evaluate_features(model, patterns(), k=61)
    several = patterns(kind=lambda label: torch.eye(3)[label])
    several.train.labels = np.eye(3)[several.train.labels]
    with pytest.raises(DataError, match="an image of patterns may be of several classes, expected one"):
        evaluate_features(model, several, k=3)
