"""What every solver must do. A solver's test subclasses this and gives one fixture, ``solver``."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from bitatlas.analysis.schema import TieGroup, UserError
from bitatlas.solvers import PROVED, SOLUTION_PRESENT, Problem, Solver, certify, frontier
from tests.conformance.problems import random_problem, solved

__all__ = ["SolverConformance"]


def close(a: float, b: float, scale: float) -> bool:
    """Equal to 1e-9 of the damages' scale."""
    return abs(a - b) <= 1e-9 * max(scale, 1e-300)


class SolverConformance:
    """Inherit, add a ``solver`` fixture. ``SEEDS`` random problems are compared with brute force."""

    SEEDS = 300
    TIME_LIMIT_S = 20.0

    def solve(self, solver: Solver, problem: Problem, seed: int = 0):
        solution = solver.solve(self.prepare(problem), seed=seed, time_limit_s=self.TIME_LIMIT_S)
        assert solution.status in SOLUTION_PRESENT
        assert solution.solver == solver.NAME
        assert solution.choice.shape == (len(problem.units),)
        assert solution.seconds >= 0
        assert certify(problem, solution.choice).feasible
        return solution

    def prepare(self, problem: Problem) -> Problem:
        """Hook for solvers that need more than damages (an interaction factor, expert numbers)."""
        return problem

    def test_class_attributes(self, solver):
        assert solver.NAME
        assert solver.NAME.lower() == solver.NAME
        assert len(solver.TITLE) > 3
        assert solver.SOURCE
        assert solver.available()
        defaults = {name: p.default for name, p in inspect.signature(type(solver)).parameters.items()}
        assert {name: defaults[name] for name in solver.SETTINGS} == solver.SETTINGS

    def test_random_problems_feasible_above_bound_and_exact(self, solver):
        for seed in range(self.SEEDS):
            problem, best = solved(seed, solver.HANDLES_TIES)
            solution = self.solve(solver, problem)
            proof = solution.certificate
            scale = float(np.abs(problem.damage[problem.allowed]).sum())
            assert proof.objective == pytest.approx(problem.objective(solution.choice))
            assert proof.payload_bytes <= problem.limit_bytes
            assert proof.lower_bound <= best + 1e-9 * scale, seed
            assert proof.objective >= best - 1e-9 * scale, seed
            if solution.status in PROVED:
                assert close(proof.objective, best, scale), seed
            if solver.EXACT:
                assert solution.status in PROVED, seed

    def test_same_seed_same_answer(self, solver):
        for seed in (3, 14):
            problem = random_problem(seed, ties=solver.HANDLES_TIES)
            first, second = self.solve(solver, problem, seed=5), self.solve(solver, problem, seed=5)
            assert first.choice.tolist() == second.choice.tolist()

    def test_pins_hold(self, solver):
        damage = np.outer(np.arange(1.0, 6.0), [1.0, 0.25, 0.01])
        size = np.outer([10, 20, 30, 40, 50], [2, 4, 8])
        problem = Problem.of(damage, size, 700, units=list("abcde"), formats=["i2", "i4", "i8"],
                             pins={"b": "i8", "e": "i2"})  # fmt: skip
        choice = self.solve(solver, problem).choice
        assert choice[1] == 2
        assert choice[4] == 0

    def test_ties_hold(self, solver):
        if not solver.HANDLES_TIES:
            pytest.skip("cannot tie units, and says so")
        damage = np.outer([1.0, 50.0, 2.0, 9.0], [1.0, 0.25, 0.01])
        size = np.outer([10, 10, 10, 10], [2, 4, 8])
        tied = TieGroup("qkv", ("a", "b", "c"))
        problem = Problem.of(damage, size, 200, units=list("abcd"), formats=["i2", "i4", "i8"], ties=[tied])
        choice = self.solve(solver, problem).choice
        assert choice[0] == choice[1] == choice[2]

    def test_a_pin_reaches_its_ties(self, solver):
        if not solver.HANDLES_TIES:
            pytest.skip("cannot tie units, and says so")
        damage, size = np.outer([1.0, 2.0, 3.0], [1.0, 0.1]), np.outer([10, 10, 10], [2, 4])
        problem = Problem.of(damage, size, 120, units=list("abc"), formats=["i2", "i4"],
                             ties=[TieGroup("t", ("a", "b"))], pins={"a": "i2"})  # fmt: skip
        assert self.solve(solver, problem).choice[:2].tolist() == [0, 0]

    def test_impossible_budget_names_the_smallest_possible_one(self, solver):
        problem = Problem.of(np.ones((3, 2)), np.full((3, 2), [1_000_000, 2_000_000]), 2_500_000)
        with pytest.raises(UserError, match="3.0 MB"):
            self.solve(solver, problem)

    def test_exactly_the_smallest_budget(self, solver):
        for seed in range(12):
            problem = random_problem(seed, ties=solver.HANDLES_TIES, tightness=0.0)
            assert self.solve(solver, problem).certificate.payload_bytes == problem.min_bytes

    def test_single_unit(self, solver):
        problem = Problem.of(np.array([[3.0, 2.0, 1.0]]), np.array([[10, 20, 30]]), 25)
        assert self.solve(solver, problem).choice.tolist() == [1]

    def test_single_format(self, solver):
        problem = Problem.of(np.ones((4, 1)), np.full((4, 1), 10), 40)
        assert self.solve(solver, problem).choice.tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_all_damages_equal(self, solver, value):
        problem = Problem.of(np.full((6, 3), value), np.outer(np.arange(1, 7), [2, 3, 4]), 60)
        assert self.solve(solver, problem).certificate.objective == pytest.approx(6 * value)

    @pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e12, 1e30])
    def test_scale_of_the_damage_does_not_matter(self, solver, scale):
        for seed in (1, 7, 21):
            problem = random_problem(seed, ties=False, pins=False)
            scaled = Problem.of(problem.damage * scale, problem.bytes, problem.limit_bytes, units=problem.units,
                                formats=problem.formats, params=problem.params, layers=problem.layers,
                                roles=problem.roles)  # fmt: skip
            one, other = self.solve(solver, problem), self.solve(solver, scaled)
            size = float(np.abs(problem.damage[problem.allowed]).sum())
            assert close(other.certificate.objective / scale, one.certificate.objective, size)

    def test_large_sizes(self, solver):
        problem = random_problem(11, ties=False, pins=False)
        huge = Problem.of(problem.damage, problem.bytes * 10**9 + 7, problem.limit_bytes * 10**9 + 70,
                          params=problem.params, layers=problem.layers, roles=problem.roles)  # fmt: skip
        assert self.solve(solver, huge).certificate.payload_bytes <= huge.limit_bytes

    def test_front_is_monotone_and_feasible(self, solver):
        problem = self.prepare(random_problem(8, ties=solver.HANDLES_TIES))
        front = frontier(problem, solver, points=9, time_limit_s=9 * self.TIME_LIMIT_S)
        assert (np.diff(front.payload_bytes) > 0).all()
        assert (np.diff(front.predicted) < 0).all()
        assert front.supported[0]
        assert front.supported[-1]
        for limit, damage, choice in zip(front.payload_bytes, front.predicted, front.choice):
            proof = certify(problem.with_limit(int(limit)), choice.astype(int))
            assert proof.feasible
            assert problem.objective(choice.astype(int)) == pytest.approx(proof.objective)
            expected = proof.objective if problem.interaction is None else proof.quadratic
            assert expected == pytest.approx(damage)
