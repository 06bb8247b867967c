"""bench.accuracy: a seed goes on where it stopped, and its table has each way, ranking and refit."""

import dataclasses

import pytest

from bench import accuracy, one_shot
from bench.accuracy import Seed, Way
from vtp.training.data import open_data
from vtp.zoo import FASHION_DEIT, open_model


@pytest.fixture
def seed(tmp_path, monkeypatch):
    ways = {
        "one-shot": Way(sparse=False, epochs=2, rankings={"magnitude": (one_shot.magnitude, (False, True))})
    }
    monkeypatch.setattr(accuracy, "WAYS", ways)
    monkeypatch.setattr(accuracy, "SHARES", (0.55,))
    monkeypatch.setattr(one_shot, "IMAGES", 200)
    monkeypatch.setattr(accuracy, "evaluate", lambda model, data: (80.0 + model.trained, 0.5))
    return Seed(open_model(FASHION_DEIT).eval(), open_data(), 0, tmp_path)


def test_a_plain_cut_is_trained_by_small_and_a_fitted_one_by_short_once_each(seed, monkeypatch):
    trained = []

    def train(model, data, settings, *, stage, teacher, **options):
        trained.append((stage, settings, options["augment"]))
        model.trained = 5.0
        assert teacher is seed.dense
        return dataclasses.make_dataclass("Result", ["model"])(model)

    monkeypatch.setattr(accuracy, "train", train)
    monkeypatch.setattr("vtp.pruning.compact.CompactViT.trained", 0.0, raising=False)
    records, saved = {}, []
    accuracy.run_seed(seed, records, lambda: saved.append(len(records)))
    assert list(records) == ["0/one-shot/magnitude/0.55/False", "0/one-shot/magnitude/0.55/True"]
    assert saved == [1, 2]
    (_, plain, augmented), (_, fitted, as_they_are) = trained
    assert plain.epochs == fitted.epochs == 2
    assert plain.lr > fitted.lr and augmented != as_they_are
    accuracy.run_seed(seed, records, lambda: saved.append(0))  # all is there
    assert len(trained) == 2 and saved == [1, 2]
    table = accuracy.markdown(
        {"records": records, "dense": {"top1": 89.25}, "images": 10_000, **accuracy_description()}
    )
    assert "| one-shot | magnitude |  | 20,000 | 80.00 | 85.00 |" in table
    assert "| one-shot | magnitude | yes | 20,000 | 80.00 | 85.00 |" in table


def accuracy_description():
    return accuracy.description(accuracy.torch.device("cpu")) | {"commit": accuracy.commit()}
