"""Second moments, and what is solved from them: ridge, damping, OBS, narrowed scores, turned values."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vtp.pruning.moments import (
    LEAST_DAMPING,
    Moments,
    narrowed_scores,
    oas_damping,
    obs_curve,
    ridge,
    root,
    turned_values,
)


def rows(n, p, seed=0, mean=0.0):
    """Correlated rows, float64 [n, p]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return torch.randn(n, p, generator=generator, dtype=torch.float64) @ mix + mean


def moments_of(x, e=None, pieces=1):
    result = Moments(x.shape[1], 0 if e is None else e.shape[1])
    for part in torch.arange(len(x)).tensor_split(pieces):
        result.add(x[part], None if e is None else e[part])
    return result


def covariance_of(x):
    return torch.from_numpy(np.cov(x.numpy().T, bias=True).reshape(x.shape[1], -1))


# -- Sums --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 7, 50])
def test_a_large_mean_costs_no_digits_however_rows_come(pieces):
    x, e = rows(50, 5, mean=1e6), rows(50, 3, seed=1, mean=10)
    m = moments_of(x, e, pieces)
    centred, target = x.numpy() - x.numpy().mean(0), e.numpy() - e.numpy().mean(0)
    assert m.count == 50
    np.testing.assert_allclose(m.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(m.mean_target, e.numpy().mean(0), rtol=1e-13)
    # The rows themselves have 1e6 * 2^-53 = 1e-10 as their last place.
    np.testing.assert_allclose(m.covariance, centred.T @ centred / 50, atol=1e-8)
    np.testing.assert_allclose(m.cross, centred.T @ target / 50, atol=1e-8)
    np.testing.assert_allclose(m.raw, x.numpy().T @ x.numpy() / 50, rtol=1e-13)


def test_float32_rows_keep_their_variance_beside_a_mean_of_a_thousand_deviations():
    x = rows(4000, 4, mean=1000).float()
    exact = covariance_of(x.double())
    assert (moments_of(x, pieces=5).covariance - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_no_rows_add_nothing_not_even_the_shift():
    x = rows(9, 3)
    m = Moments(3)
    m.add(x[:0])
    m.add(x)
    assert m.count == 9
    assert torch.equal(m.covariance, moments_of(x).covariance)


# -- Damping and ridge -------------------------------------------------------------------------------------


def test_oas_by_hand():
    # p = 2, trace 4, trace of the square 10, n = 9: rho = (0 * 10 + 16) / (9 * (10 - 8)) = 8 / 9 is more than
    # what as many alike directions need, 3 / 10; with n = 99 it is 16 / (99 * 2) and more than 3 / 100.
    c = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert oas_damping(c, 9) == pytest.approx(0.3 / 0.7 * 2)
    assert oas_damping(c, 99) == pytest.approx(0.03 / 0.97 * 2)
    # p = 4, one direction has nearly all: trace 13, square 103, n = 19:
    # rho = (103 / 2 + 169) / ((20 - 1 / 2) * (103 - 169 / 4)) = 220.5 / 1184.625, less than 5 / 20.
    c = torch.diag(torch.tensor([10.0, 1, 1, 1], dtype=torch.float64))
    rho = 220.5 / 1184.625
    assert oas_damping(c, 19) == pytest.approx(rho / (1 - rho) * 13 / 4)


@pytest.mark.parametrize("p", [1, 2, 8, 64])
def test_directions_that_vary_alike_are_fitted(p):
    """Whitened inputs: OAS alone would shrink their covariance to its target, and the fit to nothing."""
    generator = torch.Generator().manual_seed(p)
    x = torch.randn(20_000, p, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, p, generator=generator, dtype=torch.float64)
    found, _ = ridge(moments_of(x, x @ weight.T))
    assert (found - weight).abs().max() <= 0.01 * weight.abs().max()


@pytest.mark.parametrize("samples", [1, 2, 3, 50, 10**9])
@pytest.mark.parametrize("kind", ["zero", "one-input", "identity", "rank-one", "tiny", "huge"])
def test_damping_is_finite_and_never_negative(kind, samples):
    v = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    c = {
        "zero": torch.zeros(3, 3), "one-input": torch.ones(1, 1), "identity": torch.eye(3),
        "rank-one": torch.outer(v, v), "tiny": 1e-70 * torch.outer(v, v), "huge": 1e70 * torch.outer(v, v),
    }[kind].double()  # fmt: skip
    damping = oas_damping(c, samples)
    assert math.isfinite(damping)
    assert damping >= LEAST_DAMPING * c.diagonal().mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_rows_that_are_not_finite_are_refused(bad, where):
    x, e = rows(20, 3), rows(20, 2)
    (x if where == "inputs" else e)[4, 1] = bad
    with pytest.raises(
        ValueError, match=r"^model: got activations that are NaN, infinite .* expected finite"
    ):
        ridge(moments_of(x, e))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.7])
def test_ridge_is_least_squares_with_rows_for_the_damping(bias, damping):
    x, e = rows(40, 6, mean=2), rows(40, 3, seed=1, mean=-1)
    n, p = x.shape
    moment = covariance_of(x) if bias else x.T @ x / n
    scale = (n * max(damping, LEAST_DAMPING) * moment.diagonal().mean()).sqrt()
    columns = [x, torch.ones(n, 1, dtype=x.dtype)] if bias else [x]
    extra = [scale * torch.eye(p, dtype=x.dtype), torch.zeros(p, 1, dtype=x.dtype)][: len(columns)]
    matrix = torch.cat([torch.cat(columns, 1), torch.cat(extra, 1)])
    target = torch.cat([e, torch.zeros(p, 3, dtype=x.dtype)])
    expected = torch.linalg.lstsq(matrix, target).solution
    weight, shift = ridge(moments_of(x, e, pieces=3), damping, bias)
    torch.testing.assert_close(weight, expected[:p].T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(shift, expected[p] if bias else torch.zeros(3).double(), rtol=1e-9, atol=1e-11)


def test_inputs_that_never_change_say_nothing():
    e = rows(30, 2, mean=3)
    for constant in (0.0, 0.1, 7.3e8):
        weight, shift = ridge(moments_of(torch.full((30, 3), constant, dtype=torch.float64), e, pieces=4))
        assert torch.equal(weight, torch.zeros(2, 3, dtype=torch.float64))
        torch.testing.assert_close(shift, e.mean(0))


def test_fewer_samples_than_inputs_give_a_finite_map_that_fits_no_worse_than_none():
    for n in (1, 2, 5):
        x, e = rows(n, 12), rows(n, 4, seed=1)
        weight, shift = ridge(moments_of(x, e))
        assert weight.isfinite().all()
        before, after = e - e.mean(0), e - x @ weight.T - shift
        assert after.square().sum() <= before.square().sum() * (1 + 1e-12)


# -- Greedy OBS --------------------------------------------------------------------------------------------


def damped(covariance, samples):
    extra = max(oas_damping(covariance, samples), torch.finfo(torch.float32).tiny)
    return covariance + extra * torch.eye(len(covariance), dtype=covariance.dtype)


def refit_error(c, weight, kept):
    """E|W x - V x_kept|^2 for the best V: |W|^2 in the Schur complement of what is kept."""
    gone = [j for j in range(len(c)) if j not in kept]
    left = c[gone][:, gone]
    if kept:
        left = left - c[gone][:, kept] @ torch.linalg.solve(c[kept][:, kept], c[kept][:, gone])
    return torch.einsum("oi,ij,oj->", weight[:, gone], left, weight[:, gone]).item()


COVARIANCES = {
    "correlated": lambda p: covariance_of(rows(60, p)),
    "rank-deficient": lambda p: covariance_of(rows(4, p)),
    "constant-inputs": lambda p: covariance_of(rows(60, p) * (torch.arange(p) % 3 > 0)),
    "two-equal": lambda p: covariance_of(rows(60, p)[:, [0, *range(p - 1)]]),
}


@pytest.mark.parametrize("block", [1, 2, 3, 128])
@pytest.mark.parametrize("kind", COVARIANCES)
def test_obs_removes_what_costs_least_and_its_errors_are_those_of_the_refit(kind, block):
    p = 8
    covariance, weight = COVARIANCES[kind](p), rows(5, p, seed=3)
    order, errors = obs_curve(covariance, weight, 60, block)
    c, scale = damped(covariance, 60), errors[-1].item()
    assert sorted(order.tolist()) == list(range(p))
    kept = list(range(p))
    for step, j in enumerate(order.tolist()):
        now = {i: refit_error(c, weight, [k for k in kept if k != i]) for i in kept}
        assert now[j] <= min(now.values()) + 1e-7 * scale
        kept.remove(j)
        assert errors[step + 1].item() == pytest.approx(now[j], rel=1e-5, abs=1e-7 * scale)
        assert errors[step + 1] >= errors[step]


def test_greedy_is_near_the_best_subset_of_each_size():
    p = 7
    covariance, weight = COVARIANCES["correlated"](p), rows(4, p, seed=5)
    _, errors = obs_curve(covariance, weight, 60)
    c = damped(covariance, 60)
    for gone in range(p + 1):
        best = min(refit_error(c, weight, list(kept)) for kept in itertools.combinations(range(p), p - gone))
        assert best * (1 - 1e-9) <= errors[gone].item() <= 2 * best + 1e-9


def test_the_second_of_two_equal_inputs_is_dear_once_the_first_is_gone():
    x = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 1] = x[:, 0]
    order, errors = obs_curve(covariance_of(x), torch.ones(3, 6, dtype=torch.float64), len(x))
    assert order[0] in (0, 1)
    assert errors[1] <= 1e-3 * errors[-1]
    # It stands for both: twice the weight, four times the cost of any other, which is removed before it.
    assert order[-1] == 1 - order[0]
    assert errors[-1] - errors[-2] >= 0.45 * errors[-1]


@pytest.mark.parametrize("block", [1, 5, 128])
def test_inputs_that_are_dead_or_unread_go_first_and_cost_nothing(block):
    x, weight = rows(20_000, 9), rows(4, 9, seed=1)
    x[:, [2, 7]] = 3.5
    weight[:, 4] = 0
    order, errors = obs_curve(covariance_of(x), weight, len(x), block)
    assert set(order[:3].tolist()) == {2, 4, 7}
    assert errors[3] <= 1e-3 * errors[-1]


def test_nothing_varies_and_nothing_is_lost():
    order, errors = obs_curve(torch.zeros(4, 4, dtype=torch.float64), rows(3, 4), 10)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert (errors >= 0).all()
    assert errors[-1] <= 1e-30


def test_512_nearly_collinear_inputs_stay_finite_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x = base @ torch.randn(3, 512, generator=generator, dtype=torch.float64)
    x += 1e-7 * torch.randn(4000, 512, generator=generator, dtype=torch.float64)
    x[:, 5] *= 1e4
    weight = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    covariance = covariance_of(x)
    order, errors = obs_curve(covariance, weight, 4000)
    assert sorted(order.tolist()) == list(range(512))
    assert errors.isfinite().all()
    assert (errors.diff() >= 0).all()
    whole = refit_error(damped(covariance, 4000), weight, [])
    assert errors[-1].item() == pytest.approx(whole, rel=1e-6)


# -- Scores and values of a head ---------------------------------------------------------------------------


def scores(query, key):
    """Scores of every image, centred over keys as a softmax sees them, [images, tokens, tokens]."""
    s = query @ key.transpose(-2, -1)
    return s - s.mean(-1, keepdim=True)


def head(images=6, tokens=9, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, tokens, d)
    mixes = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64) @ mix + 1 for mix in mixes)
    return query, key


def second_moments(query, key):
    centred = key - key.mean(-2, keepdim=True)
    return moments_of(query.flatten(0, 1)).raw, moments_of(centred.flatten(0, 1)).raw


def test_narrowed_scores_lose_their_tail_and_less_than_any_choice_of_dimensions():
    query, key = head()
    d = query.shape[-1]
    to_query, to_key, energies = narrowed_scores(*second_moments(query, key))
    # Over all pairs of tokens, those of two images among them: that is what the moments are of.
    centred = (key - key.mean(-2, keepdim=True)).flatten(0, 1)
    flat = query.flatten(0, 1)
    dense = flat @ centred.T
    assert (energies.diff() <= 0).all()
    for r in range(d + 1):
        narrow = (flat @ to_query[:, :r]) @ (centred @ to_key[:, :r]).T
        error = (dense - narrow).square().mean()
        assert error == pytest.approx(energies[r:].sum().item(), rel=1e-9, abs=1e-12 * energies.sum().item())
        for chosen in map(list, itertools.combinations(range(d), r)):
            cut = flat[:, chosen] @ centred[:, chosen].T
            assert (dense - cut).square().mean() >= error * (1 - 1e-9) - 1e-20


def test_narrowed_scores_are_exact_at_full_rank_and_do_not_see_a_shift_of_an_images_keys():
    query, key = head()
    to_query, to_key, energies = narrowed_scores(*second_moments(query, key))
    torch.testing.assert_close(to_query @ to_key.T, torch.eye(5, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    shifted = key + 100 * torch.randn(len(key), 1, 5, dtype=torch.float64)
    again = narrowed_scores(*second_moments(query, shifted))
    torch.testing.assert_close(again[2], energies, rtol=1e-9, atol=0)
    narrow = [scores(query @ q[:, :2], key @ k[:, :2]) for q, k, _ in ((to_query, to_key, 0), again)]
    torch.testing.assert_close(*narrow, rtol=1e-7, atol=1e-9)


def test_scores_of_low_rank_are_exact_at_that_rank():
    query, key = head(d=6)
    key = key @ torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    to_query, to_key, energies = narrowed_scores(*second_moments(query, key))
    narrow = scores(query @ to_query[:, :2], key @ to_key[:, :2])
    # Directions without variance are given 1e-10 of the largest, which is what is lost.
    torch.testing.assert_close(narrow, scores(query, key), rtol=1e-4, atol=1e-3)
    assert energies[2:].sum() <= 1e-8 * energies.sum()


def test_turned_values_lose_their_tail_and_less_than_any_choice_of_dimensions():
    x = rows(80, 5, mean=3)
    weight = rows(7, 5, seed=2)
    covariance = covariance_of(x)
    turn, back, energies = turned_values(covariance, weight)
    centred = x - x.mean(0)
    assert (energies.diff() <= 0).all()
    torch.testing.assert_close(turn @ back.T, torch.eye(5, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    for r in range(6):
        lost = centred @ weight.T - (centred @ turn[:, :r]) @ (weight @ back[:, :r]).T
        error = lost.square().sum(1).mean().item()
        assert error == pytest.approx(energies[r:].sum().item(), rel=1e-9, abs=1e-12 * energies.sum().item())
        for kept in map(list, itertools.combinations(range(5), r)):
            assert refit_error(covariance, weight, kept) >= error * (1 - 1e-9) - 1e-20


def test_more_directions_than_outputs_have_no_energy():
    _, _, energies = turned_values(covariance_of(rows(50, 5)), rows(2, 5))
    assert energies.shape == (5,)
    assert (energies[:2] > 0).all()
    assert torch.equal(energies[2:], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [0.0, 1e-80, 1e-40, 1e40])
def test_a_head_that_hardly_varies_or_very_much_has_finite_maps(size):
    c = size * covariance_of(rows(30, 4))
    other = covariance_of(rows(30, 4, seed=1))
    for maps in (narrowed_scores(other, c), narrowed_scores(c, other), turned_values(c, rows(3, 4))):
        for tensor in maps:
            assert tensor.isfinite().all()
            assert tensor.abs().max() <= 1e90
    for tensor in root(c):
        assert tensor.isfinite().all()


def test_a_head_without_variance_narrows_to_weights_that_float32_holds():
    nothing, other = torch.zeros(4, 4, dtype=torch.float64), covariance_of(rows(30, 4))
    for maps in (narrowed_scores(other, nothing)[:2], turned_values(nothing, rows(3, 4))[:2]):
        assert all(tensor.float().isfinite().all() and tensor.abs().max() < 1e3 for tensor in maps)


def test_products_of_wide_rows_are_computed_once_on_either_side_of_the_diagonal():
    width, rows = 1536, 64
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(width)
    with FlopCounterMode(display=False) as counter:
        moments.add(x)
        covariance = moments.covariance
    torch.testing.assert_close(covariance, torch.cov(x.T, correction=0), rtol=1e-12, atol=1e-12)
    assert counter.get_total_flops() <= 0.65 * 2 * rows * width**2
