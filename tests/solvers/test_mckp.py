from __future__ import annotations

import numpy as np
import pytest

from bitatlas.solvers import FrontCache, Problem
from bitatlas.solvers.mckp import Mckp
from tests.conformance.problems import brute_force, random_problem
from tests.conformance.solver import SolverConformance


class TestMckp(SolverConformance):
    SEEDS = 1000

    @pytest.fixture
    def solver(self):
        return Mckp()


def _by_table(problem: Problem) -> float:
    """Independent: the textbook recurrence over every byte."""
    c = problem.classes
    low = c.smallest_bytes()
    room = problem.limit_bytes - int(low.sum())
    best = np.zeros(room + 1)
    for i in range(len(low)):
        row = np.full(room + 1, np.inf)
        for j in np.flatnonzero(c.allowed[i]):
            extra = int(c.bytes[i, j] - low[i])
            if extra <= room:
                row[extra:] = np.minimum(row[extra:], best[: room + 1 - extra] + c.damage[i, j])
        best = row
    return float(best.min())


@pytest.mark.parametrize("kind", ["spread", "identical sizes", "identical units", "two kinds"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_table_on_hundreds_of_units(kind, seed):
    rng = np.random.default_rng(seed)
    n, bits = 150, np.array([2, 3, 4, 5, 6, 8])
    sizes = {
        "spread": rng.integers(5, 60, n),
        "identical sizes": np.full(n, 24),
        "identical units": np.full(n, 24),
        "two kinds": rng.choice([16, 37], n),
    }[kind]
    damage = rng.lognormal(0, 1, n)[:, None] * 4.0**-bits * rng.lognormal(0, 0.35, (n, 6))
    if kind == "identical units":
        damage[:] = damage[0]
    size = sizes[:, None] * bits
    limit = int(size[:, 0].sum() + rng.uniform(0.05, 0.6) * (size[:, -1] - size[:, 0]).sum())
    problem = Problem.of(damage, size, limit)
    solution = Mckp().solve(problem)
    assert solution.status == "optimal"
    assert solution.certificate.objective == pytest.approx(_by_table(problem), rel=1e-9)


def test_never_worse_than_the_hull():
    for seed in range(30):
        problem = random_problem(seed)
        hull = FrontCache.of(problem).at(problem.limit_bytes).objective
        assert Mckp().solve(problem).certificate.objective <= hull + 1e-12


def test_time_limit_still_gives_an_allocation():
    rng = np.random.default_rng(0)
    size = rng.integers(10**6, 10**7, (400, 1)) * np.array([2, 3, 4, 8])
    problem = Problem.of(rng.lognormal(0, 1, (400, 4)), size, int(size[:, 0].sum() * 1.3))
    solution = Mckp().solve(problem, time_limit_s=0.0)
    assert solution.certificate.feasible
    assert solution.status in ("time_limit", "optimal")


def test_large_stages_are_cut(monkeypatch):
    from bitatlas.solvers import mckp

    monkeypatch.setattr(mckp, "_PRODUCT", 8)
    for seed in range(120):
        problem = random_problem(seed)
        scale = float(np.abs(problem.damage[problem.allowed]).sum())
        assert Mckp().solve(problem).certificate.objective == pytest.approx(
            brute_force(problem), abs=1e-9 * scale
        )


def test_an_answer_that_moves_a_class_twice_is_searched_again(monkeypatch):
    from bitatlas.solvers import mckp

    conflicts = []
    search = mckp._Core.search

    def spy(*args):
        found = search(*args)
        conflicts.append(found.conflict)
        return found

    monkeypatch.setattr(mckp._Core, "search", spy)
    for seed in range(200):
        problem = random_problem(seed)
        scale = float(np.abs(problem.damage[problem.allowed]).sum())
        assert Mckp().solve(problem).certificate.objective == pytest.approx(
            brute_force(problem), abs=1e-9 * scale
        )
    assert any(conflicts)
