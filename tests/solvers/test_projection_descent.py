from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from bitatlas.analysis.schema import TieGroup, UserError
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.projection_descent import ProjectionDescent, Quadratic
from tests.conformance.solver import SolverConformance


class TestProjectionDescent(SolverConformance):
    SEEDS = 50

    @pytest.fixture
    def solver(self):
        return ProjectionDescent()

    def prepare(self, problem: Problem) -> Problem:
        """Probes whose mean square is the damage."""
        damage = np.maximum(np.nan_to_num(problem.damage), 0)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (6, *damage.shape))
        return dataclasses.replace(problem, interaction=signs * np.sqrt(damage), interaction_scale=1.0)


def _problem(
    seed: int, n: int = 6, k: int = 4, probes: int = 5, ties: bool = False, shrinkage: float = 1.0
) -> Problem:
    """Correlated errors: units share a few directions, so the cross terms matter."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8])[:k]
    mix = rng.normal(size=(probes, 3)) @ rng.normal(size=(3, n)) + 0.5 * rng.normal(size=(probes, n))
    a = mix[:, :, None] * 2.0**-bits * rng.normal(1, 0.3, (probes, n, k)) * rng.lognormal(0, 1, (1, n, 1))
    scale = 1 / 256
    size = rng.integers(5, 40, n)[:, None] * bits
    limit = int(size[:, 0].sum() + rng.uniform(0.1, 0.7) * (size[:, -1] - size[:, 0]).sum())
    units = tuple(f"u{i}" for i in range(n))
    groups = [TieGroup("t", (units[0], units[2]))] if ties else []
    return Problem.of(scale * (a**2).mean(axis=0), size, limit, units=units, ties=groups, interaction=a,
                      interaction_scale=scale, shrinkage=shrinkage)  # fmt: skip


def _optimum(problem: Problem) -> float:
    best = np.inf
    for p in itertools.product(range(len(problem.formats)), repeat=len(problem.units)):
        choice = np.array(p)
        if problem.ties and choice[0] != choice[2]:
            continue
        if problem.payload(choice) <= problem.limit_bytes:
            best = min(best, problem.quadratic(choice))
    return best


def test_finds_the_quadratic_optimum_of_small_problems():
    hits = 0
    for seed in range(30):
        problem = _problem(seed, ties=seed % 2 == 0, shrinkage=(1.0, 0.5)[seed % 3 == 0])
        found = ProjectionDescent().solve(problem).certificate.quadratic
        best = _optimum(problem)
        assert found >= best - 1e-9 * abs(best)
        hits += found <= best + 1e-9 * abs(best)
    assert hits >= 27


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_the_additive_optimum_and_often_better(seed):
    problem = _problem(seed, n=40, k=6, probes=24)
    additive = get_solver("mckp").solve(problem).certificate
    ours = ProjectionDescent().solve(problem, seed=seed).certificate
    assert ours.quadratic <= additive.quadratic * (1 + 1e-12)
    assert ours.objective >= additive.objective * (1 - 1e-12)


def test_interactions_are_worth_something_where_errors_are_correlated():
    gains = []
    for seed in range(8):
        problem = _problem(seed, n=40, k=6, probes=24)
        additive = get_solver("mckp").solve(problem).certificate.quadratic
        gains.append(1 - ProjectionDescent().solve(problem).certificate.quadratic / additive)
    assert np.mean(gains) > 0.05


def test_without_cross_terms_it_is_the_knapsack():
    for seed in range(6):
        problem = _problem(seed, n=30, k=6, shrinkage=0.0)
        ours, exact = (
            get_solver(n).solve(problem).certificate.objective for n in ("projection_descent", "mckp")
        )
        assert ours == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_move_table_is_the_difference_of_values(ties):
    problem = _problem(3, ties=ties, shrinkage=0.7)
    q = Quadratic(problem)
    c = problem.classes
    choice = np.arange(len(c.bytes)) % 4
    assert q.value(choice) == pytest.approx(problem.quadratic(c.expand(choice)), rel=1e-9)
    v = q.a[np.arange(len(choice)), choice].sum(axis=0)
    table = q.moves(choice, v)
    for i, j in itertools.product(range(len(choice)), range(4)):
        other = choice.copy()
        other[i] = j
        if j == choice[i]:
            assert np.isinf(table[i, j])
        else:
            assert table[i, j] == pytest.approx(q.value(other) - q.value(choice), rel=1e-6, abs=1e-12)


def test_seeds_and_time():
    problem = _problem(1, n=30, k=6)
    one, again = (ProjectionDescent().solve(problem, seed=4) for _ in range(2))
    assert one.choice.tolist() == again.choice.tolist()
    short = ProjectionDescent().solve(problem, time_limit_s=0.0)
    assert short.status == "time_limit"
    assert short.certificate.feasible


def test_a_metric_without_projections_is_refused():
    with pytest.raises(UserError, match="needs the projections"):
        ProjectionDescent().solve(Problem.of(np.ones((2, 2)), np.ones((2, 2)), 9))


def test_single_precision_probes():
    problem = _problem(2, n=20, k=6)
    narrow = dataclasses.replace(problem, interaction=problem.interaction.astype(np.float32))
    a, b = (ProjectionDescent().solve(p).certificate.quadratic for p in (problem, narrow))
    assert a == pytest.approx(b, rel=1e-3)
