from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from bitatlas.analysis.schema import TieGroup
from bitatlas.solvers import Problem, SideBudget, certify
from bitatlas.solvers.certificate import lower_bound
from tests.conformance.problems import random_problem


def _relaxation(problem: Problem) -> float:
    """The same linear program through SciPy's HiGHS."""
    c = problem.classes
    owner, option = np.nonzero(c.allowed)
    n = len(c.damage)
    one = np.zeros((n, len(owner)))
    one[owner, np.arange(len(owner))] = 1
    size = c.bytes[owner, option].astype(float)
    # HiGHS stops within 1e-7: costs of one scale, else small damages are within its tolerance.
    unit = float(np.abs(problem.damage[problem.allowed]).max()) * 1e-6 or 1.0
    found = linprog(c.damage[owner, option] / unit, A_ub=size[None] / size.max(), b_ub=[problem.limit_bytes / size.max()],
                    A_eq=one, b_eq=np.ones(n), bounds=(0, 1), method="highs")  # fmt: skip
    return float(found.fun) * unit


@pytest.mark.parametrize("seed", range(80))
def test_bound_is_the_linear_relaxation_s(seed):
    problem = random_problem(seed)
    scale = float(np.abs(problem.damage[problem.allowed]).sum())
    assert lower_bound(problem) == pytest.approx(_relaxation(problem), abs=2e-7 * scale)


def test_bound_of_a_large_problem():
    rng = np.random.default_rng(3)
    size = rng.integers(10**5, 10**7, (3000, 1)) * np.array([2, 3, 4, 5, 6, 8])
    damage = (
        rng.lognormal(0, 2, (3000, 1))
        * 4.0 ** -np.array([2, 3, 4, 5, 6, 8])
        * rng.lognormal(0, 0.3, (3000, 6))
    )
    problem = Problem.of(damage, size, int(size[:, 0].sum() * 1.6))
    assert lower_bound(problem) == pytest.approx(_relaxation(problem), rel=1e-6)


def test_nothing_fits():
    assert lower_bound(Problem.of(np.ones((2, 1)), np.ones((2, 1)), 1)) == np.inf


def _problem() -> Problem:
    damage = np.array([[3.0, 2.0, np.nan], [3.0, 2.0, 1.0], [9.0, 1.0, 0.5], [9.0, 1.0, 0.5]])
    return Problem.of(
        damage, np.full((4, 3), [10, 20, 30]), 90, units=list("abcd"), formats=["x", "y", "z"],
        ties=[TieGroup("cd", ("c", "d"))], pins={"b": "y"},
        side=[SideBudget("latency", np.full((4, 3), [1.0, 2.0, 9.0]), 12.0)],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ([2, 1, 0, 0], "a has a format that is not allowed"),
        ([0, 0, 0, 0], "b is pinned to y"),
        ([0, 1, 1, 0], "units of 'cd' differ"),
        ([1, 1, 2, 2], "100 bytes, 90 allowed"),
        ([0, 1, 2, 2], "latency: 21, 12 allowed"),
        ([0, 1, 3, 3], "out of range"),
        ([0, 1, -1, -1], "out of range"),
        ([0, 1], "shape"),
    ],
)
def test_every_kind_of_violation_is_seen(choice, words):
    proof = certify(_problem(), np.array(choice))
    assert not proof.feasible
    assert any(words in v for v in proof.violations)


def test_a_good_one():
    proof = certify(_problem(), np.array([0, 1, 1, 1]))
    assert proof.feasible
    assert proof.violations == ()
    assert proof.payload_bytes == 70
    assert proof.objective == 7.0
    assert 0 <= proof.gap < 1


def test_floats_are_no_choice():
    assert not certify(_problem(), np.array([0.0, 1.0, 1.0, 1.0])).feasible


def test_a_solver_that_cheats_is_our_fault():
    from bitatlas.solvers.base import Found, Solver

    class Cheat(Solver):
        NAME, TITLE, SOURCE = "cheat", "Cheat", "none"

        def _solve(self, problem, seed, deadline):
            return Found(np.full(len(problem.units), len(problem.formats) - 1))

    with pytest.raises(RuntimeError, match="broke its limits"):
        Cheat().solve(Problem.of(np.ones((2, 2)), np.full((2, 2), [1, 9]), 5))


def test_quadratic_agrees_with_the_problem_s():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(5, 6, 2)).astype(np.float32)
    problem = Problem.of((a**2).mean(axis=0), np.ones((6, 2)), 9, interaction=a, shrinkage=0.4)
    choice = np.array([0, 1, 1, 0, 1, 0])
    assert certify(problem, choice).quadratic == pytest.approx(problem.quadratic(choice))
