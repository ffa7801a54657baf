from __future__ import annotations

import numpy as np
import pytest

from bitatlas.solvers import Problem
from bitatlas.solvers.uniform import Uniform
from tests.conformance.problems import random_problem
from tests.conformance.solver import SolverConformance


class TestUniform(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Uniform()


def test_largest_that_fits():
    size = np.outer([10, 20], [2, 3, 4])
    problem = Problem.of(np.outer([1.0, 1.0], [4.0, 2.0, 1.0]), size, 100)
    assert Uniform().solve(problem).choice.tolist() == [1, 1]


def test_damage_that_rises_with_bytes_is_seen():
    problem = Problem.of(np.array([[1.0, 5.0]]), np.array([[10, 20]]), 100)
    assert Uniform().solve(problem).choice.tolist() == [0]


def test_needs_no_metric():
    problem = Problem.of(np.full((3, 2), np.nan), np.full((3, 2), [10, 20]), 45, pins={"unit0": "f1"})
    solution = Uniform().solve(problem)
    assert solution.choice.tolist() == [1, 0, 0]
    assert np.isnan(solution.certificate.objective)
    assert np.isnan(solution.certificate.gap)


@pytest.mark.parametrize("seed", range(20))
def test_one_format_where_nothing_prevents_it(seed):
    problem = random_problem(seed, ties=False, pins=False)
    if problem.allowed.all():
        assert len(set(Uniform().solve(problem).choice.tolist())) == 1
