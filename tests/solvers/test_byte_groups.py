"""Limits on the bytes of groups of units, on the front."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import TieGroup, UserError
from bitatlas.solvers import FrontCache, Problem, SideBudget, certify, get_solver
from tests.conformance.problems import brute_force


def grouped(seed: int, tightness: float | None = None) -> Problem:
    """Six units in two groups with limits, one unit in none; limits that can be met."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 200, (7, 1)) * np.array([2, 3, 4, 8])
    damage = rng.lognormal(0, 2, (7, 1)) * 4.0 ** -np.array([2, 3, 4, 8]) * rng.lognormal(0, 0.5, (7, 4))
    sides = []
    for g in (0, 1):
        cost = np.where((np.arange(7) % 3 == g)[:, None], size, 0).astype(float)
        low, high = cost[:, 0].sum(), cost[:, 3].sum()
        share = rng.random() if tightness is None else tightness
        sides.append(SideBudget(f"group {g}", cost, float(int(low + share * (high - low)))))
    low, high = int(size[:, 0].sum()), int(size[:, 3].sum())
    return Problem.of(damage, size, low + int(rng.random() * (high - low)), side=sides)


@pytest.mark.parametrize("seed", range(60))
def test_within_all_limits_and_between_the_bound_and_brute_force(seed):
    problem = grouped(seed)
    solution = get_solver("hull").solve(problem)
    proof, best = solution.certificate, brute_force(problem)
    assert proof.feasible
    assert proof.lower_bound <= best + 1e-9 <= proof.objective + 2e-9
    if solution.status == "optimal":
        assert proof.objective == pytest.approx(best)
    point = FrontCache.of(problem).at(problem.limit_bytes)
    assert point.objective == pytest.approx(proof.objective)
    # The certificate, with other code, looks for the best price of a byte as well.
    assert point.lower_bound <= proof.lower_bound + 1e-9


def test_the_multipliers_sharpen_the_bound_and_never_break_it():
    sharper = 0
    for seed in range(40):
        problem = grouped(seed, tightness=0.1)
        solution = get_solver("hull").solve(problem)
        blind = certify(problem, solution.choice)
        assert blind.lower_bound <= solution.certificate.lower_bound
        sharper += blind.lower_bound < solution.certificate.lower_bound - 1e-9
        wild = certify(problem, solution.choice, tuple(np.random.default_rng(seed).lognormal(0, 5, 2)))
        assert wild.lower_bound <= brute_force(problem) + 1e-9
    assert sharper > 20


def test_many_units_come_close_to_the_bound():
    rng = np.random.default_rng(0)
    size = rng.integers(1000, 5000, (3000, 1)) * np.array([2, 3, 4, 5, 6, 8])
    damage = (
        rng.lognormal(0, 1, (3000, 1))
        * 4.0 ** -np.array([2, 3, 4, 5, 6, 8])
        * rng.lognormal(0, 0.3, size.shape)
    )
    label = rng.integers(0, 6, 3000)
    sides = [SideBudget(f"q{g}", np.where((label == g)[:, None], size, 0).astype(float), float(size[label == g][:, 1].sum() + 9))
             for g in range(5)]  # fmt: skip
    problem = Problem.of(damage, size, int(size[:, 2].sum()), side=sides)
    proof = get_solver("hull").solve(problem).certificate
    assert proof.feasible
    assert proof.gap < 2e-3


def test_what_is_no_group_of_bytes_is_refused():
    size, damage = np.outer([10, 10, 20], [2, 4]), np.outer([1.0, 2.0, 3.0], [1.0, 0.1])
    bytes_of = lambda *rows: np.where(np.isin(np.arange(3), rows)[:, None], size, 0).astype(float)  # noqa: E731

    def solve(*side, ties=()):
        return get_solver("hull").solve(Problem.of(damage, size, 100, side=side, ties=ties))

    with pytest.raises(UserError, match="nothing else"):
        solve(SideBudget("latency", np.ones((3, 2)), 9))
    with pytest.raises(UserError, match="two groups"):
        solve(SideBudget("a", bytes_of(0, 1), 90), SideBudget("b", bytes_of(1, 2), 90))
    with pytest.raises(UserError, match="different groups"):
        solve(SideBudget("a", bytes_of(0), 90), ties=[TieGroup("t", ("unit0", "unit1"))])
    with pytest.raises(UserError, match="cannot be met") as error:
        solve(SideBudget("group a", bytes_of(0, 2), 59))
    assert "group a 60" in str(error.value.fix)
