from __future__ import annotations

import numpy as np
import pytest

from bitatlas.solvers import FrontCache, Problem, front_cache, get_solver
from bitatlas.solvers.front_cache import fill
from bitatlas.solvers.hull import Hull
from tests.conformance.problems import random_problem
from tests.conformance.solver import SolverConformance


class TestHull(SolverConformance):
    @pytest.fixture
    def solver(self):
        return Hull()


def _supported_by_multipliers(problem: Problem) -> set[tuple[int, float]]:
    """Independent: the (bytes, damage) points that a dense sweep of multipliers finds, one class at a time."""
    c = problem.classes
    points = set()
    for mu in np.concatenate([[0.0], np.geomspace(1e-14, 1e3, 4000)]):
        score = np.where(c.allowed, c.damage + mu * c.bytes, np.inf)
        pick = score.argmin(axis=1)
        points.add((c.payload(pick), round(c.objective(pick), 12)))
    return points


@pytest.mark.parametrize("seed", range(12))
def test_front_holds_every_supported_point(seed):
    problem = random_problem(seed)
    cache = FrontCache.of(problem)
    have = {(int(b), round(float(d), 12)) for b, d in zip(cache.cum_bytes, cache.cum_damage)}
    sizes = {b for b, _ in have}
    # mu = 0 may pick a larger option of equal damage; all else must be on the front.
    for size, damage in _supported_by_multipliers(problem):
        assert size in sizes or any(b < size and d <= damage + 1e-9 for b, d in have)


@pytest.mark.parametrize("seed", range(40))
def test_prefix_sums_are_the_points_themselves(seed):
    problem = random_problem(seed)
    cache = FrontCache.of(problem)
    for k in range(len(cache.cum_bytes)):
        choice = cache.class_choice(k)
        assert cache.classes.payload(choice) == cache.cum_bytes[k]
        assert cache.classes.objective(choice) == pytest.approx(cache.cum_damage[k], abs=1e-9)
    assert (np.diff(cache.step_slope) <= 0).all()


@pytest.mark.parametrize("seed", range(40))
def test_cached_answer_is_the_solver_s_and_its_bound_the_certificate_s(seed):
    problem = random_problem(seed)
    point = FrontCache.of(problem).at(problem.limit_bytes)
    solution = get_solver("hull").solve(problem)
    scale = float(np.abs(problem.damage[problem.allowed]).sum())
    assert point.choice.tolist() == solution.choice.tolist()
    assert point.lower_bound == pytest.approx(solution.certificate.lower_bound, abs=1e-9 * scale)


def test_too_small_a_limit():
    cache = FrontCache.of(random_problem(1))
    with pytest.raises(ValueError, match="smallest allocation"):
        cache.at(-1)


@pytest.mark.parametrize("seed", range(20))
def test_stored_allocations_and_windows_change_no_answer(seed, monkeypatch):
    problem = random_problem(seed)
    plain = FrontCache.of(problem)
    monkeypatch.setattr(front_cache, "_CHUNK", 3)
    stored = FrontCache.of(problem)
    c, total = problem.classes, len(plain.cum_bytes)
    for k in range(total):
        level = np.minimum(np.bincount(plain.step_class[:k], minlength=len(c.bytes)), c.bytes.shape[1] - 1)
        naive = plain.hull[np.arange(len(level)), level]
        assert stored.class_choice(k).tolist() == naive.tolist()
        limit = int(plain.cum_bytes[k]) + seed
        after = stored.steps_within(limit)
        whole = stored.class_choice(after)
        if after < total - 1:
            whole = fill(c, whole, limit)
        point = stored.at(limit)
        assert point.choice.tolist() == c.expand(whole).tolist()
        assert point.payload_bytes == problem.payload(point.choice) <= limit
        assert point.objective == pytest.approx(problem.objective(point.choice), abs=1e-9)


def test_a_short_window_still_spends_what_is_left(monkeypatch):
    monkeypatch.setattr(front_cache, "_AHEAD", 1)
    problem = random_problem(3)
    cache = FrontCache.of(problem)
    for limit in range(int(cache.cum_bytes[0]), int(cache.cum_bytes[-1])):
        point = cache.at(limit)
        assert point.payload_bytes == problem.payload(point.choice) <= limit
        assert point.objective <= cache.cum_damage[cache.steps_within(limit)] + 1e-9
        assert point.objective >= point.lower_bound - 1e-9
