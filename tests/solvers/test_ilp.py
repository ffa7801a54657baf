from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.solvers import Problem, SideBudget
from bitatlas.solvers.ilp import Ilp
from tests.conformance.problems import brute_force, random_problem
from tests.conformance.solver import SolverConformance


class TestIlp(SolverConformance):
    # Every solve starts a process of CBC; the thousand problems are mckp's and the slow test's.
    SEEDS = 40

    @pytest.fixture
    def solver(self):
        return Ilp()


def _check_two_budgets(seeds):
    for seed in seeds:
        problem = random_problem(seed, side=True)
        proof = Ilp().solve(problem).certificate
        scale = float(np.abs(problem.damage[problem.allowed]).sum())
        assert proof.feasible
        assert proof.objective == pytest.approx(brute_force(problem), abs=1e-9 * scale), seed


def test_two_budgets_equal_brute_force():
    _check_two_budgets(range(40))


@pytest.mark.slow
def test_two_budgets_equal_brute_force_on_a_thousand():
    _check_two_budgets(range(1000))


def test_two_budgets_that_cbc_s_preprocessing_gets_wrong():
    _check_two_budgets([587])


def test_budgets_that_exclude_each_other():
    problem = Problem.of(np.ones((2, 2)), np.full((2, 2), [10, 20]), 30,
                         side=[SideBudget("latency", np.full((2, 2), [9.0, 1.0]), 5.0)])  # fmt: skip
    with pytest.raises(UserError, match="no allocation meets all limits"):
        Ilp().solve(problem)


def test_a_time_out_is_not_called_optimal():
    rng = np.random.default_rng(1)
    n, bits = 400, np.array([2, 3, 4, 5, 6, 8])
    size = np.full((n, 1), 40_000) * bits + rng.integers(0, 7, (n, 6))
    damage = rng.lognormal(0, 1, n)[:, None] * 4.0**-bits
    problem = Problem.of(damage, size, int(size.sum() / 9))
    solution = Ilp().solve(problem, time_limit_s=0.5)
    assert solution.certificate.feasible
    # CBC may be done in time; if it was not, the gap is real and the status says so.
    assert solution.status == "optimal" or solution.certificate.gap >= 0
