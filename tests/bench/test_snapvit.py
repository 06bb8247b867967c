"""bench.snapvit: its scores, its search and what they cut."""

import copy
import math

import numpy as np
import pytest
import torch

import vtp
from bench import snapvit
from tests.support.models import TINY

DEPTH, HEADS, HIDDEN = TINY.depth, TINY.num_heads, TINY.mlp_hidden


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = TINY.build().eval()
    with torch.no_grad():  # far from the small weights of a new model, in whose embeddings a cut hardly shows
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.weight.normal_(0, 0.4)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(dense, images):
    return snapvit.sensitivity(dense, images)


def test_crops_are_of_the_images_size_and_many(images):
    cut = snapvit.crops(images[0])
    assert cut.shape == (12, 1, 8, 8)
    assert len({tuple(crop.flatten().tolist()) for crop in cut}) == 12


def test_the_loss_compares_each_global_crop_with_all_others():
    """Embeddings e_0..e_11, unit vectors: by hand, one pair at a time."""
    rows = torch.nn.functional.normalize(
        torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    expected = 0.0
    for i in range(2):
        target = rows[i].exp() / rows[i].exp().sum()
        for j in range(12):
            if j != i:
                expected -= (target * (rows[j].exp() / rows[j].exp().sum()).log()).sum()
    got = snapvit.self_supervised_loss(3 * rows[:2], 2 * rows)
    torch.testing.assert_close(got, expected)


def test_sensitivity_is_the_mean_of_the_squares_of_each_image(dense, images, monkeypatch):
    monkeypatch.setattr(snapvit, "crops", lambda image: torch.stack([image.roll(i, -1) for i in range(12)]))
    both = snapvit.sensitivity(dense, images[:2])
    one, other = (snapvit.sensitivity(dense, images[i : i + 1]) for i in range(2))
    torch.testing.assert_close(both.units, (one.units + other.units) / 2)
    torch.testing.assert_close(both.heads, (one.heads + other.heads) / 2)
    model = copy.deepcopy(dense).requires_grad_(True)
    found = snapvit.embedding(model, snapvit.crops(images[0]))
    snapvit.self_supervised_loss(found[:2].detach(), found).backward()
    block = model.blocks[1]
    torch.testing.assert_close(one.units[1], block.mlp.fc1.weight.grad.square().mean(1))
    values = block.attn.qkv.weight.grad[24:].square().mean(1).unflatten(0, (3, 4)).mean(1)
    torch.testing.assert_close(one.heads[1], values)


def test_what_has_no_effect_has_no_sensitivity(dense, images):
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 7] = 0
        model.blocks[1].attn.proj.weight[:, 4:8] = 0  # the second head
    found = snapvit.sensitivity(model, images[:4])
    assert found.units.shape == (DEPTH, HIDDEN) and found.heads.shape == (DEPTH, HEADS)
    assert (found.units == 0).nonzero().tolist() == [[0, 7]]
    assert (found.heads == 0).nonzero().tolist() == [[1, 1]]
    assert all(not weight.requires_grad or weight.grad is None for weight in model.parameters())


def test_the_least_heads_go_whole_and_then_the_least_units(dense, found):
    factors = np.random.default_rng(0).uniform(0.5, 2, DEPTH * (1 + HEADS)) * ([-1, 1] * 4)
    macs = 0.5 * vtp.count(dense).macs
    plan = snapvit.snapvit_plan(dense, macs, found, factors)
    assert macs - 2 * TINY.embed_dim * TINY.num_tokens < plan.cost.macs <= macs
    scores = found.heads.numpy() * np.abs(factors[DEPTH:]).reshape(DEPTH, HEADS)
    removed = scores.flatten().argsort()[: snapvit.removed_heads(dense, macs)]
    gone = [[j for j in range(12) if j not in plan.kept[f"blocks.{i}.attn.proj"]] for i in range(DEPTH)]
    assert gone == [[j for j in range(12) if i * HEADS + j // 4 in removed] for i in range(DEPTH)]
    assert 0 < len(removed) < DEPTH * HEADS
    units = found.units.numpy() * np.abs(factors[:DEPTH, None])
    kept = np.zeros_like(units, dtype=bool)
    for i in range(DEPTH):
        kept[i, list(plan.kept[f"blocks.{i}.mlp.fc2"])] = True
        assert len(plan.kept[f"blocks.{i}.attn.qkv"]) == len(plan.kept[f"blocks.{i}.mlp.fc1"]) == 12
        assert kept[i, units[i].argmax()]
        units[i, units[i].argmax()] = math.inf  # the best of each MLP stays whatever the others have
    assert units[~kept].max() < units[kept].min()


def test_a_factor_decides_which_mlp_is_cut_and_each_keeps_its_best(dense, found):
    for share, first, second in ((0.85, HIDDEN, (2, HIDDEN - 1)), (0.6, None, (1, 1))):
        for block in range(DEPTH):
            factors = np.ones(DEPTH * (1 + HEADS))
            factors[block] = 1e9
            plan = snapvit.snapvit_plan(dense, share * vtp.count(dense).macs, found, factors)
            left = [len(plan.kept[f"blocks.{i}.mlp.fc2"]) for i in (block, 1 - block)]
            assert first is None or left[0] == first
            assert second[0] <= left[1] <= second[1]
            assert int(found.units[1 - block].argmax()) in plan.kept[f"blocks.{1 - block}.mlp.fc2"]


def test_a_budget_that_whole_heads_and_units_do_not_reach_is_refused(dense, found):
    with pytest.raises(ValueError, match="macs: got 3000, which"):
        snapvit.snapvit_plan(dense, 3000, found, np.ones(DEPTH * (1 + HEADS)))


def test_heads_go_later_than_units_by_the_line_of_its_settings(dense):
    whole = vtp.count(dense).macs
    gone = [snapvit.removed_heads(dense, share * whole) for share in (1.0, 0.9, 0.6, 0.3)]
    assert gone[:2] == [0, 0] and 0 < gone[2] < gone[3] < DEPTH * HEADS


def test_the_search_finds_the_bottom_of_a_narrow_valley():
    scale = np.array([1.0, 3.0, 10.0, 30.0])
    looked = []

    def valley(x):
        looked.append(x)
        return float((scale * (x - 2) ** 2).sum())

    best = snapvit.natural_evolution(valley, np.zeros(4), 1200, np.random.default_rng(0))
    assert valley(best) < 1e-3 * valley(np.zeros(4))
    assert min(map(valley, looked[:-2])) == valley(best)
    assert len(looked) <= 2 * 1201 + 4


def test_the_search_brings_embeddings_closer_to_the_dense_models(dense, images, found, monkeypatch):
    looked = []
    search = snapvit.natural_evolution

    def spy(objective, *arguments):
        def told(point):
            looked.append((objective(point), point))
            return looked[-1][0]

        return search(told, *arguments)

    monkeypatch.setattr(snapvit, "natural_evolution", spy)
    budgets = [0.5 * vtp.count(dense).macs]
    wrong = torch.tensor([[0.1], [1.0]])  # between blocks: what a search can mend
    found = snapvit.Sensitivity(found.units * wrong, found.heads * wrong)
    factors = snapvit.searched_factors(dense, budgets, found, images, evaluations=20, seed=0)

    def distance(factors):
        cosines = []
        with torch.no_grad():
            whole = snapvit.embedding(dense, images)
            for macs in budgets:
                small = vtp.compact(dense, snapvit.snapvit_plan(dense, macs, found, factors))
                # All 12 components of 12 numbers are a rotation, which a cosine does not see.
                pair = snapvit.embedding(small, images) - whole.mean(0), whole - whole.mean(0)
                cosines.append(torch.nn.functional.cosine_similarity(*pair).mean().item())
        return 1 - sum(cosines) / len(cosines)

    values = [value for value, _ in looked]
    blocks = np.linspace(1.2, 0.8, DEPTH)
    np.testing.assert_allclose(looked[0][1], np.concatenate([blocks, blocks.repeat(HEADS)]))
    assert values[0] == pytest.approx(distance(looked[0][1]), abs=1e-5)
    assert min(values) == pytest.approx(distance(factors), abs=1e-5)
    assert min(values) < values[0] - 0.01 and len(values) == 21
