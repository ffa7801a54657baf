from __future__ import annotations

import numpy as np
import pytest

from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.stability import error_factors, share_chosen

BITS = np.array([2, 3, 4, 6])


def _problem(damage: np.ndarray) -> Problem:
    size = np.tile(BITS * 10, (len(damage), 1))
    return Problem.of(damage, size, len(damage) * 34)


def test_shares_are_counted_over_the_tables():
    truth = np.random.default_rng(4).lognormal(0, 1, (60, 1)) * 4.0**-BITS
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
