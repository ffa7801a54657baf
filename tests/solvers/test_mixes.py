from __future__ import annotations

import numpy as np
import pytest

from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.mixes import Q4KM, AttentionHigh, FirstLast
from bitatlas.solvers.random_best import RandomBest
from tests.conformance.problems import random_problem
from tests.conformance.solver import SolverConformance


class TestFirstLast(SolverConformance):
    @pytest.fixture
    def solver(self):
        return FirstLast()


class TestAttentionHigh(SolverConformance):
    @pytest.fixture
    def solver(self):
        return AttentionHigh()


class TestQ4KM(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Q4KM()


class TestRandomBest(SolverConformance):
    @pytest.fixture
    def solver(self):
        return RandomBest(samples=4)


def _dense(n_layers: int, share: float) -> Problem:
    """An embedding, then q, k, v, o, gate, up, down of every block, all of one size; 4, 6 and 8 bits."""
    roles, layers = ["embed"], [-1]
    for layer in range(n_layers):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            roles.append(role)
            layers.append(layer)
    size = np.full((len(roles), 3), [400, 600, 800])
    return Problem.of(np.full(size.shape, np.nan), size, round(len(roles) * (400 + 200 * share)), roles=roles,
                      layers=np.array(layers), formats=["i4", "i6", "i8"])  # fmt: skip


def test_q4_k_m_names_the_blocks_that_llama_cpp_names():
    # 32 blocks: 0-3 and 28-31, and of the others every third: (i - 4) % 3 == 2.
    wide = [i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    assert len(wide) == 16
    # Room for exactly the embedding (there is no head) and v and down of those blocks.
    problem = _dense(32, (1 + 2 * len(wide)) / (1 + 7 * 32))
    choice = get_solver("q4_k_m").solve(problem).choice
    got = {(problem.roles[u], int(problem.layers[u])) for u in np.flatnonzero(choice == 1)}
    assert got == {("embed", -1)} | {(role, layer) for layer in wide for role in ("v", "down")}


def test_attention_high_widens_attention_first():
    problem = _dense(4, 4 * 4 / 29)
    choice = get_solver("attention_high").solve(problem).choice
    assert {problem.roles[u] for u in np.flatnonzero(choice == 1)} == {"q", "k", "v", "o"}
    assert (choice == 1).sum() == 16


def test_first_last_widens_from_the_ends():
    problem = _dense(6, 15 / 43)
    choice = get_solver("first_last").solve(problem).choice
    assert {int(problem.layers[u]) for u in np.flatnonzero(choice == 1)} == {-1, 0, 5}


@pytest.mark.parametrize("name", ["first_last", "attention_high", "q4_k_m"])
@pytest.mark.parametrize("seed", range(25))
def test_two_neighbouring_widths_that_fill_the_budget(name, seed):
    problem = random_problem(seed, ties=False, pins=False)
    solution = get_solver(name).solve(problem)
    c = problem.classes
    if problem.allowed.all():
        widths = sorted(set(solution.choice.tolist()))
        assert len(widths) == 1 or (len(widths) == 2 and widths[1] == widths[0] + 1)
        low = widths[0]
        left = problem.limit_bytes - solution.certificate.payload_bytes
        still = np.flatnonzero(solution.choice == low)
        if len(widths) == 2:
            assert (c.bytes[still, low + 1] - c.bytes[still, low] > left).all()


def test_random_allocations_differ_by_seed_and_fill_the_budget():
    rng = np.random.default_rng(0)
    size = rng.integers(50, 90, (60, 1)) * np.array([2, 3, 4, 5, 6, 8])
    problem = Problem.of(rng.random((60, 6)), size, int(size[:, 2].sum()))
    one, other = (RandomBest().solve(problem, seed=s) for s in (0, 1))
    assert one.choice.tolist() != other.choice.tolist()
    assert one.certificate.payload_bytes > 0.98 * problem.limit_bytes
    assert one.evaluations == 256


def test_random_best_judges_by_the_quadratic_when_there_is_one():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(16, 12, 3)) * 4.0 ** -np.arange(3)
    problem = Problem.of((a**2).mean(axis=0), np.full((12, 3), [2, 3, 4]), 36, interaction=a)
    best = RandomBest().solve(problem).certificate.quadratic
    from bitatlas.solvers.random_best import random_choice

    rng = np.random.default_rng(0)
    drawn = [problem.quadratic(problem.classes.expand(random_choice(problem, rng))) for _ in range(256)]
    assert best == pytest.approx(min(drawn))
