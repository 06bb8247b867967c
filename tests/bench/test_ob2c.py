"""bench.ob2c: the formulas of DVBP + OB2C against simulated noise, least squares and rankings by hand."""

import copy
import math

import pytest
import torch

import vtp
from bench import ob2c, one_shot
from tests.support.models import TINY
from vtp.pruning.gates import with_gates

DEPTH, WIDTH, HIDDEN = TINY.depth, TINY.embed_dim, TINY.mlp_hidden
UNIT = 2 * WIDTH * TINY.num_tokens  # MACs of a hidden unit


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return TINY.build().double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def moments(dense, images):
    return ob2c.input_moments(dense, vtp.sites(with_gates(dense)), images)


def inputs_of(model, name, images):
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        model(images)
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("dimensions, samples", [(100, 2000), (400, 2000), (600, 600)])
def test_the_median_of_noise_is_that_of_a_simulated_covariance(dimensions, samples):
    noise = torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.eigvalsh(noise.T @ noise / samples)
    assert ob2c.noise_median(dimensions / samples) == pytest.approx(values.median().item(), rel=0.02)


@pytest.mark.parametrize("ratio", [0.0, 1.5, math.nan])
def test_a_median_of_more_dimensions_than_samples_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"ratio: got {ratio:g}, expected at most as many dimensions"):
        ob2c.noise_median(ratio)


def test_denoising_keeps_what_is_planted_in_noise_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    signal = torch.linalg.qr(torch.randn(80, 3, generator=generator, dtype=torch.float64)).Q * 10
    rows = torch.randn(1000, 3, generator=generator, dtype=torch.float64) @ signal.T
    rows += 2 * torch.randn(1000, 80, generator=generator, dtype=torch.float64)
    clean = ob2c.denoised(torch.cov(rows.T), 1000)
    assert torch.linalg.matrix_rank(clean) == 3
    torch.testing.assert_close(clean.trace(), torch.tensor(3 * 104.0).double(), rtol=0.05, atol=0)


def test_moments_are_those_of_the_inputs_over_all_batches(dense, images, moments, monkeypatch):
    rows = inputs_of(dense, "blocks.1.mlp.fc2", images)
    many = images.repeat(13, 1, 1, 1)  # more than a batch
    for mean, covariance in (
        moments["blocks.1.mlp.fc2"],
        ob2c.input_moments(dense, ["blocks.1.mlp.fc2"], many)["blocks.1.mlp.fc2"],
    ):
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(covariance, torch.cov(rows.T, correction=0))


def test_compensation_leaves_the_error_of_least_squares_with_a_bias(dense, images, moments):
    plan = vtp.make_plan(with_gates(dense), rate=0.4, scope="per_site")
    model = ob2c.with_compensation(dense, plan, moments)
    for name, kept in plan.kept.items():
        rows, kept = inputs_of(dense, name, images), list(kept)
        layer, changed = dense.get_submodule(name), model.get_submodule(name)
        assert 0 < len(kept) < rows.shape[1]
        with torch.no_grad():
            wanted, given = layer(rows), changed(rows)
        some = torch.cat([rows[:, kept], torch.ones(len(rows), 1)], 1)
        best = some @ torch.linalg.lstsq(some, wanted, driver="gelsd").solution
        least = (best - wanted).square().sum().item()
        assert (given - wanted).square().sum().item() <= 1.001 * least + 1e-9 * wanted.square().sum().item()
    # What it removes has no effect, so that the cut is the model.
    small = vtp.compact(model, plan)
    torch.testing.assert_close(small(images), model(images))


def spread(*layers):
    """Moments of two MLPs whose inputs have these variances, uncorrelated; of other sites 1."""
    found = {
        name: (torch.zeros(width).double(), torch.eye(width).double())
        for name, width in TINY.site_widths().items()
    }
    for i, own in enumerate(layers):
        found[f"blocks.{i}.mlp.fc2"] = torch.zeros(HIDDEN).double(), torch.tensor(own).double().diag()
    return found


def test_the_lowest_hybrid_scores_go_over_all_layers_weighed_by_the_share_that_goes(dense):
    """Variance of noise counts 1 - p, that of signals 1. Noise of 1 in the first MLP, signals of 0.65 in the
    second: at a small p the signals go first, at a larger the noise."""
    moments = spread([1.0] * HIDDEN, [0.01] * 12 + [0.65] * 8)
    assert ob2c.denoised(moments["blocks.1.mlp.fc2"][1], 200).diagonal().tolist() == pytest.approx(
        [0] * 12 + [0.65] * 8
    )
    for removed, first, second in ((8, 20, 12), (13, 20, 7), (20, 12, 8)):
        macs = vtp.count(dense).macs - removed * UNIT
        plan = ob2c.denoised_variance_plan(dense, macs, moments, 200)
        assert [len(plan.kept[f"blocks.{i}.mlp.fc2"]) for i in range(DEPTH)] == [first, second]
        assert ob2c.removed_share(plan, ob2c.MLP_UNITS) == removed / (DEPTH * HIDDEN)
        whole = {name: len(kept) for name, kept in plan.kept.items() if "fc2" not in name}
        assert whole == {name: width for name, width in TINY.site_widths().items() if "fc2" not in name}
    assert set(plan.kept["blocks.1.mlp.fc2"]) == set(range(12, 20))


def test_all_sites_are_ranked_where_it_is_extended(dense, images, moments):
    macs = 0.5 * vtp.count(dense).macs
    plan = ob2c.denoised_variance_plan(dense, macs, moments, 40, protect=())
    widths = TINY.site_widths()
    cut = {name.split(".", 2)[2] for name, kept in plan.kept.items() if len(kept) < widths[name]}
    assert plan.cost.macs <= macs and cut == {"attn.proj", "mlp.fc2"}


def test_hidden_units_alone_reach_what_is_said_and_nothing_below(dense, moments):
    least = ob2c.least_macs(dense)
    plan = ob2c.denoised_variance_plan(dense, least, moments, 40)
    assert plan.cost.macs == least
    assert [len(plan.kept[f"blocks.{i}.mlp.fc2"]) for i in range(DEPTH)] == [1, 1]
    with pytest.raises(vtp.PlanError, match="cannot be met"):
        ob2c.denoised_variance_plan(dense, least - 1, moments, 40)


def test_rows_of_hidden_units_alone_have_the_shares_that_these_reach():
    model = copy.deepcopy(one_shot.open_model(one_shot.FASHION_DEIT))
    assert one_shot.shares_of("DVBP + OB2C, MLP units alone", model) == [0.55]
    assert one_shot.shares_of("greedy OBS, MLP units alone", model) == [0.55]
    assert one_shot.shares_of("DVBP + OB2C, extended to all sites", model) == list(one_shot.SHARES)
