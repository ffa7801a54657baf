from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.robust import (
    bootstrap_damage,
    error_factors,
    monotone_in_bytes,
    optimism,
    robust_problem,
    share_chosen,
    stability,
)

BITS = np.array([2, 3, 4, 6])


def _samples(seed: int, n: int = 24, units: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Chi-squared noise, like squared projections: (N, U, F) samples and their true means (U, F)."""
    rng = np.random.default_rng(seed)
    truth = rng.lognormal(0, 1, (units, 1)) * 4.0**-BITS
    return truth * rng.chisquare(1, (n, units, 1)) * rng.lognormal(-0.02, 0.2, (n, units, 4)), truth


def _problem(damage: np.ndarray) -> Problem:
    size = np.tile(BITS * 10, (len(damage), 1))
    return Problem.of(damage, size, len(damage) * 34)


def test_mean_and_quantile():
    samples, _ = _samples(0)
    mean = bootstrap_damage(samples)
    assert mean == pytest.approx(samples.mean(axis=0))
    upper, lower = (bootstrap_damage(samples, quantile=q) for q in (0.9, 0.1))
    assert (upper > mean).mean() > 0.95
    assert (lower < mean).mean() > 0.95


def test_quantile_of_a_certain_unit_is_its_mean():
    samples = np.full((10, 1, 2), 3.0)
    assert bootstrap_damage(samples, quantile=0.95) == pytest.approx(np.full((1, 2), 3.0))


def test_sequences_that_did_not_reach_a_unit_do_not_count():
    samples = np.array([[[1.0]], [[np.nan]], [[3.0]]])
    assert bootstrap_damage(samples)[0, 0] == 2.0
    assert np.isnan(bootstrap_damage(np.full((3, 1, 1), np.nan))[0, 0])


def test_a_unit_without_samples_keeps_its_damage():
    samples, truth = _samples(1)
    samples[:, 5] = np.nan
    assert robust_problem(_problem(truth), samples).damage[5].tolist() == truth[5].tolist()


@pytest.mark.parametrize("seed", range(10))
def test_monotone_is_the_least_squares_one(seed):
    rng = np.random.default_rng(seed)
    damage = rng.normal(size=(1, 4))
    order = rng.permutation(4)
    got = monotone_in_bytes(damage, order[None] * 10, np.ones((1, 4), bool))
    along = got[0, np.argsort(order)]
    assert (np.diff(along) <= 1e-12).all()
    best = np.inf
    # Independent: every way to cut the sequence into blocks of equal value.
    values = damage[0, np.argsort(order)]
    for cuts in itertools.product([0, 1], repeat=3):
        label = np.concatenate([[0], np.cumsum(cuts)])
        fit = np.array([values[label == k].mean() for k in label])
        if (np.diff(fit) <= 1e-12).all():
            best = min(best, float(((fit - values) ** 2).sum()))
    assert float(((got - damage) ** 2).sum()) == pytest.approx(best)


def test_monotone_leaves_forbidden_cells():
    damage = np.array([[1.0, np.nan, 2.0]])
    got = monotone_in_bytes(damage, np.array([[1, 2, 3]]), np.isfinite(damage))
    assert got[0, [0, 2]].tolist() == [1.5, 1.5]
    assert np.isnan(got[0, 1])


def test_stability_is_certain_without_noise_and_a_share_with_it():
    samples, truth = _samples(2)
    still = stability(_problem(truth), np.repeat(truth[None], 4, axis=0), get_solver("hull"), replicates=5)
    assert set(np.round(still, 9).ravel()) == {0.0, 1.0}
    noisy = stability(_problem(truth), samples, get_solver("hull"), replicates=12)
    assert noisy.sum(axis=1) == pytest.approx(np.ones(60))
    assert ((noisy > 0.05) & (noisy < 0.95)).any()


def test_shares_are_counted_over_the_tables():
    _, truth = _samples(4)
    solver, other = get_solver("hull"), np.flip(truth, 0)
    share = share_chosen(_problem(truth), [truth, truth, other, truth], solver)
    once, flipped = (share_chosen(_problem(truth), [d], solver) for d in (truth, other))
    np.testing.assert_allclose(share, 0.75 * once + 0.25 * flipped)


def test_factors_of_errors():
    damage, stderr = (
        np.array([[4.0, 1.0], [2.0, 0.0], [3.0, 1.0]]),
        np.array([[2.0, 0.5], [0.0, np.nan], [np.nan, 0.1]]),
    )
    drawn = np.array(list(error_factors(damage, stderr, 4000)))
    assert drawn[:, 0].mean(0) == pytest.approx(np.ones(2), abs=0.05)
    assert drawn[:, 0].std(0) == pytest.approx(np.full(2, 0.5), rel=0.1)
    assert np.array_equal(drawn[:, 0, 0], drawn[:, 0, 1])  # a unit moves as a whole
    assert (drawn[:, 1] == 1).all()  # no error, no damage
    assert np.isnan(drawn[:, 2, 0]).all()  # unknown is not none
    assert np.isfinite(drawn[:, 2, 1]).all()


def test_optimism_sees_the_winner_s_curse():
    samples, truth = _samples(3)
    noisy = optimism(_problem(truth), samples, get_solver("mckp"), splits=6)
    assert noisy.ratio > 1.1
    assert noisy.stderr > 0
    exact = optimism(_problem(truth), np.repeat(truth[None], 6, axis=0), get_solver("mckp"), splits=3)
    assert exact.ratio == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two samples"):
        optimism(_problem(truth), samples[:1], get_solver("mckp"))


def test_bad_quantile():
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_damage(np.ones((2, 1, 1)), quantile=1.0)
