"""Conformance of the published allocators, each checked against its rule computed in another way."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from bitatlas.analysis.schema import TieGroup, UserError
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.alphaq import AlphaQRule
from bitatlas.solvers.baq import Baq, closed_form
from bitatlas.solvers.bisection import Bisection
from bitatlas.solvers.pmq import Pmq, PmqGlobal
from tests.conformance.solver import SolverConformance


class TestBaq(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Baq()


class TestAlphaQ(SolverConformance):
    @pytest.fixture
    def solver(self):
        return AlphaQRule()


class TestBisection(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Bisection()


class _ExpertConformance(SolverConformance):
    """Each unit an expert of its own, two a block; then projections need no tie and the problems stay as they are."""

    SEEDS = 100

    def prepare(self, problem: Problem) -> Problem:
        n = len(problem.units)
        return dataclasses.replace(problem, experts=np.arange(n), layers=np.arange(n) // 2)


class TestPmq(_ExpertConformance):
    @pytest.fixture
    def solver(self):
        return Pmq()


class TestPmqGlobal(_ExpertConformance):
    @pytest.fixture
    def solver(self):
        return PmqGlobal()


class TestBaqRule:
    def test_closed_form_is_the_minimum(self):
        rng = np.random.default_rng(0)
        weights = rng.integers(1, 50, 12).astype(float)
        log_c = rng.normal(0, 3, 12)
        bits = closed_form(log_c, weights, 4.0)
        assert np.average(bits, weights=weights) == pytest.approx(4.0)
        # Equal loss per weight.
        assert (np.exp2(log_c - 2 * bits) / weights).std() < 1e-9 * (
            np.exp2(log_c - 2 * bits) / weights
        ).mean()
        least = np.exp2(log_c - 2 * bits).sum()
        for _ in range(200):
            step = rng.normal(0, 0.3, 12)
            step -= np.average(step, weights=weights)
            assert np.exp2(log_c - 2 * (bits + step)).sum() >= least

    def test_published_formula_at_equal_sizes(self):
        c = np.array([1.0, 16.0, 4.0, 64.0])
        expected = 3 + 0.5 * np.log2(c / np.exp(np.log(c).mean()))
        assert closed_form(np.log2(c), np.ones(4), 3.0) == pytest.approx(expected)

    def test_finds_the_optimum_where_the_model_is_exact(self):
        # Damage C 2^(-2b) with C a power of 16: the ideal bits are whole.
        bits = np.arange(1, 9)
        c = 16.0 ** np.array([0, 1, 2, 3])
        size = np.tile(bits * 100, (4, 1))
        problem = Problem.of(c[:, None] * 4.0**-bits, size, 1600, params=np.full(4, 800))
        assert Baq().solve(problem).choice.tolist() == [0, 2, 4, 6]

    def test_near_the_optimum_on_log_linear_damage(self):
        rng = np.random.default_rng(1)
        sizes = rng.integers(1000, 9000, 80)
        bits = np.array([2, 3, 4, 5, 6, 8])
        damage = rng.lognormal(0, 2, (80, 1)) * 4.0**-bits
        size = sizes[:, None] * bits
        problem = Problem.of(damage, size, int(sizes.sum() * 4), params=sizes * 8)
        ours, best = (get_solver(n).solve(problem).certificate.objective for n in ("baq", "mckp"))
        assert best <= ours <= 1.1 * best


class TestAlphaQConstraint:
    def _problem(self, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        formats = ["int2-g64", "int3-g64", "int4-g64", "int8-g64"]
        sizes = rng.choice([100, 400], 6)
        damage = rng.lognormal(0, 1, (6, 1)) * 4.0 ** -np.array([2, 3, 4, 8])
        size = sizes[:, None] * np.array([2, 3, 4, 8])
        return Problem.of(damage, size, int(sizes.sum() * 3.3), formats=formats, params=sizes * 8)

    @pytest.mark.parametrize("seed", range(5))
    def test_least_damage_for_its_sum_of_bits(self, seed):
        problem = self._problem(seed)
        solution = get_solver("alphaq").solve(problem)
        bits = np.array([2, 3, 4, 8])
        total = bits[solution.choice].sum()
        best = min(
            sum(problem.damage[i, j] for i, j in enumerate(p))
            for p in itertools.product(range(4), repeat=6)
            if bits[list(p)].sum() <= total
        )
        assert solution.certificate.objective == pytest.approx(best)

    def test_ignores_sizes_in_its_constraint(self):
        # Two units of one damage, one ten times larger: the published bound cannot tell them apart.
        damage = np.tile([1.0, 0.1], (2, 1))
        size = np.array([[20, 40], [200, 400]])
        problem = Problem.of(damage, size, 400, formats=["int2-g64", "int4-g64"])
        assert get_solver("mckp").solve(problem).choice.tolist() == [1, 0]
        published = get_solver("alphaq").solve(problem)
        assert published.certificate.objective in (pytest.approx(1.1), pytest.approx(2.0))


def _moe(seed: int, limit_bits: float) -> Problem:
    """Attention and 2 blocks of 4 experts with three projections each, at 1, 2, 3 and 4 bits."""
    rng = np.random.default_rng(seed)
    units, layers, experts, roles = [], [], [], []
    for layer in range(2):
        units.append(f"{layer}.q")
        layers.append(layer)
        experts.append(-1)
        roles.append("q")
        for e in range(4):
            for role in ("gate", "up", "down"):
                units.append(f"{layer}.{e}.{role}")
                layers.append(layer)
                experts.append(e)
                roles.append(role)
    bits = np.array([1, 2, 3, 4])
    damage = rng.lognormal(0, 1, (len(units), 1)) * 4.0**-bits * rng.lognormal(0, 0.2, (len(units), 4))
    # The second block matters far more: only a global solver may move bytes there.
    damage[np.array(layers) == 1] *= 100
    size = np.tile(bits * 100, (len(units), 1))
    limit = 2 * 400 + int(24 * 100 * limit_bits)
    return Problem.of(damage, size, limit, units=units, formats=["b1", "b2", "b3", "b4"], layers=np.array(layers),
                      experts=np.array(experts), roles=roles, params=np.full(len(units), 800))  # fmt: skip


class TestPmqRule:
    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("mean", [1.75, 2.0, 2.5])
    def test_each_block_is_the_optimum_of_its_own_program(self, seed, mean):
        problem = _moe(seed, mean)
        choice = get_solver("pmq").solve(problem).choice
        assert choice[0] == choice[13] == 3  # attention at 4 bits
        for layer in range(2):
            first = 13 * layer + 1
            rows = np.arange(first, first + 12).reshape(4, 3)
            mine = choice[rows]
            assert (mine == mine[:, :1]).all()  # an expert's projections share a format
            cost = problem.damage[rows].sum(axis=1)  # (4 experts, 4 formats)
            best = min(
                sum(cost[e, j] for e, j in enumerate(p))
                for p in itertools.product(range(4), repeat=4)
                if sum(j + 1 for j in p) <= 4 * mean and 1 in p and 2 in p
            )
            assert cost[np.arange(4), mine[:, 0]].sum() == pytest.approx(best)

    def test_global_moves_bytes_to_the_block_that_matters(self):
        problem = _moe(0, 2.0)
        blocks = get_solver("pmq").solve(problem)
        together = get_solver("pmq_global").solve(problem)
        assert together.certificate.objective < blocks.certificate.objective
        first, second = (
            problem.bytes[np.arange(s, s + 12), together.choice[s : s + 12]].sum() for s in (1, 14)
        )
        assert second > first

    def test_a_dense_model_is_refused(self):
        with pytest.raises(UserError, match="divides bits among experts"):
            get_solver("pmq").solve(Problem.of(np.ones((2, 2)), np.ones((2, 2)), 9))

    def test_a_tie_across_blocks_keeps_its_units_out_of_the_blocks(self):
        problem = _moe(1, 2.0)
        ties = [TieGroup("gates", ("0.0.gate", "1.0.gate"))]
        tied = Problem.of(problem.damage, problem.bytes, problem.limit_bytes, units=problem.units, ties=ties,
                          formats=problem.formats, layers=problem.layers, experts=problem.experts,
                          params=problem.params)  # fmt: skip
        choice = get_solver("pmq").solve(tied).choice
        # Tied through their experts, all six projections share one format.
        assert len(set(choice[[1, 2, 3, 14, 15, 16]].tolist())) == 1


class TestBisectionRule:
    def test_the_least_harmed_go_down_and_no_more_than_needed(self):
        increase = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
        damage = np.column_stack([increase, np.zeros(5)])
        problem = Problem.of(damage, np.full((5, 2), [10, 20]), 75)
        assert get_solver("bisection").solve(problem).choice.tolist() == [1, 0, 1, 0, 0]

    def test_the_inter_layer_term_changes_the_order(self):
        # Units 0 and 1 are alike alone, but the errors of 0 and 2 add up in every probe, those of 1 and 2 cancel.
        a = np.zeros((2, 3, 2))
        a[:, 0, 0], a[:, 1, 0], a[:, 2, 0] = [1, -1], [-1, 1], [3, -3]
        damage = (a**2).mean(axis=0)
        size = np.full((3, 2), [10, 20])
        plain = Problem.of(damage, size, 50)
        linked = Problem.of(damage, size, 50, interaction=a)
        assert get_solver("bisection").solve(plain).choice.tolist() == [0, 1, 1]
        assert get_solver("bisection").solve(linked).choice.tolist() == [1, 0, 1]
