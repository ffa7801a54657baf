"""The searches on the real model, here on a pretended one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.solvers import SEARCHERS, Problem, certify, get_searcher, get_solver
from bitatlas.solvers.evopress import EvoPress
from bitatlas.solvers.level_switch import LevelSwitch
from bitatlas.solvers.nsga2_search import Nsga2Search, ranked
from bitatlas.solvers.path import PathDescent
from bitatlas.solvers.ramp import Ramp
from bitatlas.solvers.random_best import random_choice
from bitatlas.solvers.random_search import RandomSearch
from bitatlas.solvers.rco import Manifold, Rco
from bitatlas.solvers.refine import Refine
from bitatlas.solvers.searcher import solve_costs
from tests.conformance.problems import random_problem
from tests.conformance.searcher import (
    Pretended,
    SearcherConformance,
    search_problem,
    sensitivity_features,
    with_groups,
)


class TestEvoPress(SearcherConformance):
    SETTINGS = {
        "steps": 12,
        "offspring": 16,
        "survivors": "4/2/1",
        "tokens": "512/1024/2048",
        "groups": "none",
    }

    @pytest.fixture
    def kind(self):
        return EvoPress


class TestRandomSearch(SearcherConformance):
    SETTINGS = {"steps": 4, "samples": 12}

    @pytest.fixture
    def kind(self):
        return RandomSearch


def test_a_run_begins_no_step_once_it_is_enough():
    problem = search_problem()
    search = RandomSearch(problem, Pretended(problem), settings={"steps": 9, "samples": 2})
    asked = []

    def enough() -> bool:
        asked.append(len(asked))
        return len(asked) > 2

    stopped, state = search.run(enough), search.begin()
    for number in (1, 2):
        state = search.step(state, number)
    assert len(asked) == 3
    assert (stopped["choice"] == state["choice"]).all()


class TestRco(SearcherConformance):
    SETTINGS = {"steps": 30, "samples": 2, "judge_every": 10}

    @pytest.fixture
    def kind(self):
        return Rco

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_wider_fits_any_more(self, kind, known, seed):
        problem = search_problem(seed=seed)
        objective = Pretended(problem)
        posed = problem if known else replace(problem, damage=np.full(problem.damage.shape, np.nan))
        search = kind(posed, objective, settings={**self.SETTINGS, "steps": 20})
        state = search.begin()
        for number in range(1, 21):
            at = state["choice"]
            room = problem.limit_bytes - problem.payload(at)
            extra = problem.bytes - problem.bytes[np.arange(len(at)), at][:, None]
            assert room >= 0
            assert not ((extra > 0) & (extra <= room)).any()
            state = search.step(state, number)


class TestRefine(SearcherConformance):
    SETTINGS = {"steps": 6}

    @pytest.fixture
    def kind(self):
        return Refine


class TestPath(SearcherConformance):
    SETTINGS = {"steps": 8, "stages": 3}

    @pytest.fixture
    def kind(self):
        return PathDescent

    def test_the_walk_ends_within_the_budget(self, kind):
        problem = search_problem()
        search = self.make(kind, problem)
        state = search.begin()
        sizes = [problem.payload(state["walk"])]
        for number in range(1, 4):
            state = search.step(state, number)
            sizes.append(problem.payload(state["walk"]))
        assert sizes[0] > problem.limit_bytes >= sizes[-1]
        assert sorted(sizes, reverse=True) == sizes
        assert problem.payload(state["choice"]) <= problem.limit_bytes

    def test_slopes_and_measured_damages_share_a_change(self, kind):
        problem = search_problem()
        choice, rows = np.zeros(len(problem.units), int), np.arange(len(problem.units))
        change = np.random.default_rng(0).normal(size=problem.damage.shape)
        table, known = problem.damage.copy(), np.ones(problem.damage.shape, bool)
        known[3, 2] = False
        table[3, 2] = np.nan
        problem = replace(problem, damage=table, allowed=problem.allowed & known)
        found = kind(problem, Pretended(problem), settings={"prior": 0.25})._with_prior(change, choice)
        said = table - table[rows, choice][:, None]
        np.testing.assert_allclose(found[known], (0.75 * change + 0.25 * said)[known])
        np.testing.assert_array_equal(found[~known], change[~known])

    def test_it_beats_the_table_that_it_starts_from(self, kind):
        gains = []
        for seed in range(6):
            problem = search_problem(seed=seed)
            search = self.make(kind, problem, seed)
            table = search._starts()[-1]
            gains.append(search.objective.kl(search.run()["choice"]) / search.objective.kl(table))
        assert max(gains) < 1.02
        assert np.mean(gains) < 0.99


class TestRamp(SearcherConformance):
    SETTINGS = {"steps": 6, "updates": 8, "hidden": 16, "judge_tokens": 1024}
    GAIN = 0.9

    @pytest.fixture
    def kind(self):
        return Ramp

    def make(self, kind, problem, seed=0, **options):
        return super().make(kind, problem, seed, features=sensitivity_features(problem), **options)


class TestNsga2Search(SearcherConformance):
    SETTINGS = {"steps": 12, "population": 16, "tokens": 1024, "judge_tokens": 1024}

    @pytest.fixture
    def kind(self):
        return Nsga2Search


def test_nsga2_keeps_a_front():
    problem = search_problem()
    state = Nsga2Search(problem, Pretended(problem), settings={"steps": 15, "population": 20}).run()
    size = np.array([problem.payload(c) for c in state["population"]])
    assert size.max() <= problem.limit_bytes
    assert len(np.unique(size)) > 8  # spread over budgets, not one point
    best = np.argsort(size)
    running = np.minimum.accumulate(state["population_kl"][best])
    assert (
        state["population_kl"][best] <= running + 1e-12
    ).mean() > 0.7  # hardly anything dominated survives


def test_ranks_and_crowding_against_their_definition():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, (40, 2)).astype(float)
    rank, crowding = ranked(points)
    left, level = set(range(40)), 0
    while left:
        front = {
            i
            for i in left
            if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)
        }
        assert front == {i for i in range(40) if rank[i] == level}
        left, level = left - front, level + 1
    assert np.isinf(crowding).sum() >= 2


def test_names_and_tests():
    text = Path(__file__).read_text()
    for name, kind in SEARCHERS.items():
        assert name == kind.NAME
        assert f"return {kind.__name__}\n" in text
    with pytest.raises(UserError, match="nearest: evopress"):
        get_searcher("evopres")


def test_equal_steps_keep_the_bytes_exactly():
    bits = np.array([2, 3, 4, 5])
    size = np.repeat([[8], [8], [8], [24], [24], [24]], 4, axis=1) * bits
    problem = Problem.of(np.ones(size.shape), size, int(size[:, 1].sum()))
    for groups in ("size", "none"):
        switch = LevelSwitch(problem, groups)
        level, rng, seen = np.ones(6, np.int64), np.random.default_rng(0), set()
        for _ in range(300):
            level = switch.mutate(level, rng)
            assert switch.payload(level) <= problem.limit_bytes
            if groups == "size":
                assert switch.payload(level) == problem.limit_bytes
                assert level[:3].sum() == 3  # the small ones exchange among themselves
                assert level[3:].sum() == 3
            seen.add(level.tobytes())
        assert len(seen) > 20


@pytest.mark.parametrize("seed", range(20))
def test_switches_stay_within_any_problem(seed: int):
    problem = random_problem(seed)
    c, rng = problem.classes, np.random.default_rng(seed)
    for groups in ("size", "none"):
        switch = LevelSwitch(problem, groups)
        level = switch.random(rng)
        for _ in range(10):
            choice = switch.formats(level)
            assert c.allowed[np.arange(len(choice)), choice].all()
            assert c.payload(choice) == switch.payload(level) <= problem.limit_bytes
            assert (switch.level(choice) == level).all()
            level = switch.mutate(level, rng)


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_keep_to_the_limits_of_groups_and_use_them(seed: int):
    problem = with_groups(search_problem(30, seed), {(0, 7): 2.4, (8, 19): 2.9})
    c, rng = problem.classes, np.random.default_rng(seed)
    for groups in ("size", "none"):
        switch, seen = LevelSwitch(problem, groups), set()
        level = switch.random(rng)
        for _ in range(20):
            choice = switch.formats(level)
            assert certify(problem, choice).feasible
            more = switch.step_bytes(level, 1)
            room = problem.limit_bytes - switch.payload(level)
            left = [s.limit - s.cost[np.arange(30), choice].sum() for s in problem.side]
            least = [min(room, left[0])] * 8 + [min(room, left[1])] * 12 + [room] * 10
            assert not ((more > 0) & (more <= least)).any()  # nothing more fits
            seen.add(level.tobytes())
            level = switch.mutate(level, rng)
        assert len(seen) > 10
    drawn = [random_choice(problem, rng) for _ in range(20)]
    assert all(certify(problem, d).feasible for d in drawn)
    assert len({d.tobytes() for d in drawn}) == 20
    assert min(c.payload(d) for d in drawn) > 0.95 * problem.limit_bytes


def test_the_best_for_costs_is_exact_where_groups_are_free_and_near_it_where_they_bind():
    for seed in range(20):
        free, cost = search_problem(16, seed), np.random.default_rng(seed).random((16, 4))
        loose = with_groups(free, {(0, 7): 8.0})
        assert solve_costs(loose, cost).tolist() == solve_costs(free, cost).tolist()
        bound = with_groups(free, {(0, 7): 2.5, (8, 11): 3.0})
        found = solve_costs(bound, cost)
        assert certify(bound, found).feasible
        best = get_solver("ilp").solve(replace(bound, damage=cost)).choice
        rows = np.arange(16)
        step = np.ptp(cost, axis=1).max()
        assert cost[rows, best].sum() - 1e-9 <= cost[rows, found].sum() <= cost[rows, best].sum() + 3 * step


def test_equal_sizes_on_a_ladder_are_stepped_over():
    size = np.tile([10, 10, 20, 20], (4, 1))
    switch = LevelSwitch(Problem.of(np.ones(size.shape), size, 60), "none")
    level, rng = np.full(4, 3), np.random.default_rng(0)
    switch.lower(level, rng)
    assert switch.payload(level) <= 60


def test_the_schedule_of_evopress_costs_what_it_says():
    problem = search_problem()
    objective = Pretended(problem)
    settings = {"steps": 2, "offspring": 10, "survivors": "4/2/1", "tokens": "512/1024/4096", "initial": 5, "initial_tokens": 256,
                "groups": "none", "scale": 0.5}  # fmt: skip
    EvoPress(problem, objective, settings=settings).run()
    assert [c[0] for c in objective.calls] == [128] + 2 * [256, 512, 2048]
    assert len({c[1] for c in objective.calls}) == 7  # fresh text in every stage
    assert objective.spent.forward_tokens == 5 * 128 + 2 * (10 * 256 + 4 * 512 + 3 * 2048)
    with pytest.raises(UserError, match="schedule"):
        EvoPress(problem, objective, settings={"survivors": "4/1"})


def test_the_manifold_is_the_budget():
    problem = search_problem()
    c, rng = problem.classes, np.random.default_rng(0)
    m = Manifold(c.bytes, c.allowed, problem.limit_bytes)
    a = m.retract(rng.normal(size=c.bytes.shape) * 3)
    assert m.expected(a) == pytest.approx(m.budget, abs=1e-9)
    expected = float((m.softmax(a) * c.bytes).sum())
    assert expected == pytest.approx(problem.limit_bytes, rel=1e-9)
    g = m.tangent(a, rng.normal(size=a.shape))
    # Along the tangent the expected bytes change in second order only.
    drift = [abs(m.expected(a + h * g) - m.budget) for h in (1e-2, 1e-3)]
    assert drift[1] < 0.02 * drift[0]
    assert m.tangent(a, g) == pytest.approx(g, abs=1e-9)


def test_small_experts_are_not_free():
    """Two hundred tiny classes beside a huge one: rounding their bytes to a resolution would break the budget."""
    size = np.concatenate([np.full((200, 1), 7), [[10_000_000]]]) * np.array([2, 4])
    problem = Problem.of(np.ones(size.shape), size, int(size[:, 0].sum()) + 100 * 14)
    cost = np.tile([1.0, 0.0], (201, 1))
    choice = solve_costs(problem, cost)
    assert problem.classes.payload(choice) <= problem.limit_bytes
    assert choice[:200].sum() == 100
    assert choice[200] == 0


def test_costs_may_be_negative_and_forbidden():
    for seed in range(20):
        problem = random_problem(seed, ties=False, pins=False)
        rng = np.random.default_rng(seed)
        cost = rng.normal(size=problem.damage.shape)
        smallest = problem.classes.smallest()
        cost[rng.random(cost.shape) < 0.2] = np.inf
        rows = np.arange(len(cost))
        cost[rows, smallest] = np.minimum(cost[rows, smallest], 1.0)
        choice = solve_costs(problem, cost)
        assert np.isfinite(cost[rows, choice]).all()
        assert problem.payload(choice) <= problem.limit_bytes
        assert cost[rows, choice].sum() <= cost[rows, smallest].sum() + 1e-12


def test_refining_stops_at_the_noise():
    problem = search_problem()
    noisy = Refine(problem, Pretended(problem, noise=0.05), settings={"steps": 40})
    state = noisy.run()
    assert bool(state["done"])
    assert noisy.objective.spent.evaluations < 400
    assert float(state["kl"]) > 0
