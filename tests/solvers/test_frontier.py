from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import Allocation, Budget, UserError
from bitatlas.solvers import Problem, choice_of, frontier, get_solver, to_allocation
from bitatlas.solvers.frontier import budget_sweep, supported_points
from tests.conformance.problems import brute_force, random_problem

FOUR = ["int2-g64", "int3-g64", "int4-g64", "int8-g64"]


def test_whole_front_of_the_hull_needs_no_budget(index, make_table):
    problem = Problem.build(index, make_table(), FOUR, 0)
    front = frontier(problem, get_solver("hull"), points=10_000)
    assert front.payload_bytes[0] == problem.min_bytes
    assert front.choice.shape == (len(front.predicted), len(index.units))
    assert front.supported.all()
    assert front.metric == "weight_error"
    thin = frontier(problem, get_solver("hull"), points=12)
    assert 2 <= len(thin.predicted) <= 12
    assert thin.payload_bytes[[0, -1]].tolist() == front.payload_bytes[[0, -1]].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_every_point_of_the_exact_front_is_an_optimum(seed):
    problem = random_problem(seed)
    front = frontier(problem, get_solver("mckp"), points=11)
    for limit, damage in zip(front.payload_bytes, front.predicted):
        assert damage == pytest.approx(brute_force(problem.with_limit(int(limit))), abs=1e-9)


def test_what_the_points_cost_is_added_up(index, make_table):
    problem = Problem.build(index, make_table(), FOUR, 0)
    solver, front = get_solver("random_best"), frontier(problem, get_solver("random_best"), points=4)
    sweep = budget_sweep(problem, 4)
    each = [solver.solve(problem.with_limit(int(b))).evaluations for b in sweep]
    assert front.evaluations == sum(each) > 0
    assert front.tokens == 0
    assert front.seconds > 0


def test_point_for_a_limit(index, make_table):
    front = frontier(Problem.build(index, make_table(), FOUR, 0), get_solver("hull"), points=40)
    assert front.at(int(front.payload_bytes[3])) == 3
    assert front.at(int(front.payload_bytes[3]) - 1) == 2
    assert front.at(0) == -1


def test_a_front_without_a_metric(index):
    front = frontier(Problem.build(index, None, FOUR, 0), get_solver("uniform"), points=8)
    assert (np.diff(front.payload_bytes) > 0).all()
    assert np.isnan(front.predicted).all()


def test_hull_of_points():
    payload, damage = np.array([0, 1, 2, 3, 4]), np.array([8.0, 7.0, 2.0, 1.5, 1.0])
    assert supported_points(payload, damage).tolist() == [True, False, True, True, True]


def test_allocation_and_back(index, make_table):
    problem = Problem.build(index, make_table(), FOUR, 14_000, {"embed": "int4-g64"})
    solution = get_solver("mckp").solve(problem)
    allocation = to_allocation(problem, solution, index, budget=Budget(14_048, label="14 kB"))
    assert allocation.payload_bytes == solution.certificate.payload_bytes <= 14_000
    assert allocation.kept_bytes == 48
    assert allocation.bits_per_weight == pytest.approx(allocation.payload_bytes * 8 / index.params)
    assert allocation.status == "optimal"
    assert allocation.formats["embed"] == "int4-g64"
    allocation.check_model(index)
    again = Allocation.from_json(allocation.to_json())
    assert again == allocation
    assert choice_of(problem, again.formats).tolist() == solution.choice.tolist()
    with pytest.raises(ValueError, match="outside the problem: int8-channel"):
        choice_of(problem, dict(again.formats, embed="int8-channel"))


def test_frontier_of_a_solver_that_refuses(index):
    with pytest.raises(UserError, match="needs a damage"):
        frontier(Problem.build(index, None, FOUR, 0), get_solver("hull"))
