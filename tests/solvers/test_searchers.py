from __future__ import annotations

import warnings

import numpy as np
import pytest

from bitatlas.solvers import Problem
from bitatlas.solvers.nsga2 import Nsga2
from bitatlas.solvers.search_space import MAX_VARIABLES, SearchSpace
from bitatlas.solvers.tpe import Tpe
from tests.conformance.problems import random_problem
from tests.conformance.solver import SolverConformance


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna marks constraints_func as experimental
        yield


class TestTpe(SolverConformance):
    SEEDS = 12

    @pytest.fixture
    def solver(self):
        return Tpe(trials=12)


class TestNsga2(SolverConformance):
    SEEDS = 12

    @pytest.fixture
    def solver(self):
        return Nsga2(trials=24, population=8)


def _problem(n: int = 12) -> Problem:
    rng = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 8])
    return Problem.of(rng.lognormal(0, 2, (n, 1)) * 4.0**-bits, np.tile(bits * 10, (n, 1)), n * 38)


@pytest.mark.parametrize(("few", "many"), [(Tpe(8), Tpe(150)), (Nsga2(8), Nsga2(300, 20))])
def test_more_trials_find_more(few, many):
    problem = _problem()
    short, long = (s.solve(problem, seed=1) for s in (few, many))
    assert long.certificate.objective < short.certificate.objective
    assert long.evaluations > short.evaluations


def test_time_limit():
    for solver in (Tpe(10_000), Nsga2(10_000)):
        solution = solver.solve(_problem(), time_limit_s=0.2)
        assert solution.status == "time_limit"
        assert solution.evaluations < 10_000


@pytest.mark.parametrize("seed", range(30))
def test_projection_fits_and_keeps_what_already_fits(seed):
    problem = random_problem(seed)
    space = SearchSpace(problem, seed)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        levels = rng.integers(0, space.levels, space.variables)
        raw, projected = space.decode(levels), space.project(levels)
        c = problem.classes
        assert c.payload(projected) <= problem.limit_bytes
        assert c.allowed[np.arange(len(projected)), projected].all()
        if c.payload(raw) <= problem.limit_bytes:
            assert (c.bytes[np.arange(len(raw)), projected] >= c.bytes[np.arange(len(raw)), raw]).all()


def test_many_classes_share_variables():
    n = 3 * MAX_VARIABLES
    size = np.tile([10, 20], (n, 1))
    problem = Problem.of(np.ones((n, 2)), size, n * 15, layers=np.arange(n) // 8,
                         roles=[("q", "down")[i % 2] for i in range(n)])  # fmt: skip
    space = SearchSpace(problem, 0)
    assert space.variables == 2 * n // 8
    assert len(set(space.variable[:8:2].tolist())) == 1
    wide = Problem.of(np.ones((n, 2)), size, n * 15, layers=np.arange(n))
    assert SearchSpace(wide, 0).variables == MAX_VARIABLES
