"""What every search must do, on a model whose KL is known: a quadratic of the units' errors, with noise over sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bitatlas.analysis.schema import Scores, Spent, TieGroup, UserError
from bitatlas.solvers import Problem, Searcher, SideBudget, certify

__all__ = ["Pretended", "SearcherConformance", "search_problem", "sensitivity_features"]

BITS = np.array([2, 3, 4, 6])


def search_problem(units: int = 12, seed: int = 0, **options: Any) -> Problem:
    """Two shapes of matrices, ties and pins as asked, damages that are only nearly right."""
    rng = np.random.default_rng(seed)
    damage = rng.lognormal(0, 1.5, (units, 1)) * 4.0**-BITS
    size = np.where(np.arange(units) % 3 == 0, 200, 100)[:, None] * BITS
    limit = int(size[:, 1].sum() * 1.1)
    options.setdefault("params", size[:, 0] * 8 // BITS[0])  # so that effective bits are the formats' own
    return Problem.of(damage, size, limit, units=[f"u{i}" for i in range(units)], formats=[f"int{b}" for b in BITS],
                      roles=["q" if i % 3 else "down" for i in range(units)], **options)  # fmt: skip


def with_groups(problem: Problem, bits: dict[tuple[int, int], float]) -> Problem:
    """The problem with limits on the bytes of runs of units, (first, last) -> bits per weight."""
    sides = []
    for (first, last), most in bits.items():
        cost = (
            np.where(
                (np.arange(len(problem.units)) >= first) & (np.arange(len(problem.units)) <= last), 1.0, 0.0
            )[:, None]
            * problem.bytes
        )
        limit = float(int(most * problem.params[first : last + 1].sum() / 8))
        sides.append(SideBudget(f"group {first}-{last}", cost, limit))
    return replace(problem, side=tuple(sides))


def sensitivity_features(problem: Problem) -> np.ndarray:
    """Nine features, the first of which says what the unit's damage is, the others nothing."""
    out = np.random.default_rng(0).normal(size=(len(problem.units), 9))
    log = np.log(problem.damage[:, 0])
    out[:, 0] = (log - np.median(log)) / 1.5
    return out


class Pretended:
    """An objective: KL of a sequence = quadratic in the true errors, times the sequence's own factor."""

    def __init__(self, problem: Problem, seed: int = 1, noise: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        n = len(problem.units)
        self.true = np.nan_to_num(problem.damage) * rng.lognormal(0, 0.5, problem.damage.shape)
        self.cross = 0.2 * rng.random((n, n))
        self.noise = noise
        self.spent = Spent()
        self.calls: list[tuple[int, int, str]] = []

    def kl(self, choice: np.ndarray) -> float:
        d = np.sqrt(self.true[np.arange(len(choice)), choice])
        return float(d @ d + d @ self.cross @ d)

    def scores(self, choices: np.ndarray, tokens: int, seed: int, pool: str = "all") -> Scores:
        choices = np.atleast_2d(choices)
        self.calls.append((tokens, seed, pool))
        self.spent = self.spent.plus(Spent(tokens * len(choices), 0, tokens * len(choices), len(choices)))
        rng = np.random.default_rng([seed, tokens])
        factor = rng.lognormal(0, self.noise, max(2, tokens // 256))
        return Scores(
            np.array([[self.kl(c) * f for f in factor] for c in choices]), np.full(len(factor), 256)
        )

    def slopes(
        self, choice: np.ndarray, tokens: int, seed: int, pool: str = "all"
    ) -> tuple[np.ndarray, float]:
        self.spent = self.spent.plus(Spent(tokens, tokens, tokens, 1))
        d = np.sqrt(self.true)
        here = d[np.arange(len(choice)), choice]
        gradient = 2 * here + (self.cross + self.cross.T) @ here
        return (d - here[:, None]) * gradient[:, None], self.kl(choice)

    def distances(self, choice: np.ndarray) -> np.ndarray:
        d = np.sqrt(self.true)
        return (d - d[np.arange(len(choice)), choice][:, None]) ** 2


class Watched(Pretended):
    """An objective that keeps every allocation it is asked about."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.asked: list[np.ndarray] = []

    def scores(self, choices: np.ndarray, tokens: int, seed: int, pool: str = "all") -> Scores:
        self.asked += list(np.atleast_2d(choices))
        return super().scores(choices, tokens, seed, pool)

    def slopes(
        self, choice: np.ndarray, tokens: int, seed: int, pool: str = "all"
    ) -> tuple[np.ndarray, float]:
        self.asked.append(choice)
        return super().slopes(choice, tokens, seed, pool)


class SearcherConformance:
    """Inherit, add a ``kind`` fixture (the class) and ``SETTINGS`` that end within a second."""

    SETTINGS: dict[str, Any] = {}
    GAIN = 0.9
    """Measured KL over that of the median random allocation, at most."""

    def make(self, kind: type[Searcher], problem: Problem, seed: int = 0, **options: Any) -> Searcher:
        return kind(problem, Pretended(problem), seed=seed, settings=self.SETTINGS, **options)

    def test_class_attributes(self, kind):
        assert kind.NAME.lower() == kind.NAME
        assert kind.TITLE
        assert kind.SOURCE
        assert "steps" in kind.SETTINGS

    @pytest.mark.parametrize(
        "options", [{}, {"ties": [TieGroup("t", ("u0", "u1", "u5"))], "pins": {"u2": "int6"}}]
    )
    def test_feasible_and_better_than_random(self, kind, options):
        from bitatlas.solvers.random_best import random_choice

        problem = search_problem(**options)
        search = self.make(kind, problem)
        state = search.run()
        proof = certify(problem, state["choice"])
        assert proof.feasible, proof.violations
        rng = np.random.default_rng(9)
        drawn = [problem.classes.expand(random_choice(problem, rng)) for _ in range(40)]
        objective = search.objective
        assert objective.kl(state["choice"]) < self.GAIN * np.median([objective.kl(c) for c in drawn])
        assert float(state["kl"]) == pytest.approx(objective.kl(state["choice"]), rel=0.5)

    @pytest.mark.parametrize("starts", [0, 2])
    def test_the_tokens_told_beforehand_are_enough_and_not_far_off(self, kind, starts):
        from bitatlas.solvers.random_best import random_choice

        problem, rng = search_problem(), np.random.default_rng(4)
        drawn = [problem.classes.expand(random_choice(problem, rng)) for _ in range(starts)]
        given = np.array(drawn) if starts else None
        search = self.make(kind, problem, start=given)
        told, pool = [kind.readings(search.settings, starts, n) for n in range(search.steps + 1)], 1 << 30
        if not any(told):
            pytest.skip("cannot tell")
        state, spent = search.begin(), [search.objective.spent.forward_equivalents]
        for number in range(1, search.steps + 1):
            if bool(state["done"]):
                break
            state = search.step(state, number)
            spent.append(search.objective.spent.forward_equivalents)
        # The pretended model does not count the original's own pass.
        most = [sum(r.most(pool) - min(r.tokens, pool) for r in step) for step in told]
        each = np.diff([0, *spent])
        assert all(s <= m for s, m in zip(each.tolist(), most))
        assert spent[-1] >= 0.3 * sum(most[: len(each)])
        assert kind.most_tokens(search.settings, starts, 64) <= kind.most_tokens(
            search.settings, starts, pool
        )

    def test_interrupted_is_the_same(self, kind):
        problem = search_problem()
        whole = self.make(kind, problem, seed=3)
        expected = whole.run()
        state = self.make(kind, problem, seed=3).begin()
        for number in range(1, whole.steps + 1):
            if bool(state["done"]):
                break
            before = {k: np.array(v) for k, v in state.items()}
            after = self.make(kind, problem, seed=3).step(state, number)  # a fresh process
            for name, value in before.items():
                np.testing.assert_array_equal(state[name], value)  # nothing was changed in place
            state = {k: np.array(v) for k, v in after.items()}
        assert state["choice"].tolist() == expected["choice"].tolist()
        assert float(state["kl"]) == float(expected["kl"])

    def test_the_start_is_used_and_never_lost(self, kind):
        problem = search_problem()
        fine = self.make(kind, problem)
        best = fine.run()["choice"]
        again = self.make(kind, problem, seed=8, start=best[None])
        assert again.objective.kl(again.run()["choice"]) <= 1.05 * fine.objective.kl(best)

    @pytest.mark.parametrize("seed", range(3))
    def test_limits_of_groups_hold_in_every_candidate(self, kind, seed):
        tied = search_problem(
            ties=[TieGroup("t", ("u0", "u1", "u5"))], pins={"u2": "int6", "u9": "int2"}, seed=seed
        )
        # The first group can have little beyond its pin, the second less than the budget would give it.
        problem = with_groups(tied, {(0, 5): 2.7, (6, 9): 2.5})
        search = self.make(kind, problem, seed)
        search.objective = watched = Watched(problem)
        free = self.make(kind, tied, seed).run()["choice"]
        assert not search.fits(free)
        state = search.run()
        assert certify(problem, state["choice"]).feasible
        assert search.fits(state["choice"])
        assert len(watched.asked) > 3
        for choice in watched.asked:
            proof = certify(problem.with_limit(10**9), choice)  # on its way a walk may be above the budget
            assert proof.feasible, proof.violations
        begun = self.make(kind, problem, seed, start=np.array([free, state["choice"]]))
        assert len(begun.start) == 1  # what breaks a limit is no start
        again = begun.begin()
        for number in (1, 2):
            if not bool(again["done"]):
                again = self.make(kind, problem, seed).step(again, number)
            assert certify(problem, again["choice"]).feasible

    def test_limits_that_no_search_holds(self, kind):
        problem = search_problem(ties=[TieGroup("t", ("u0", "u1", "u5"))])
        with pytest.raises(UserError, match="different groups") as across:
            self.make(kind, with_groups(problem, {(0, 3): 3.0}))
        assert "solve --solver ilp" in across.value.fix
        other = replace(problem, side=(SideBudget("BOPs", np.ones(problem.bytes.shape), 1e9),))
        with pytest.raises(UserError, match="nothing else") as bops:
            self.make(kind, other)
        assert "solve --solver ilp" in bops.value.fix
        with pytest.raises(UserError, match="cannot be met"):
            self.make(kind, with_groups(problem, {(6, 9): 1.0}))

    def test_bad_settings_and_budgets(self, kind):
        problem = search_problem()
        with pytest.raises(UserError, match="no setting nonsense"):
            kind(problem, Pretended(problem), settings={"nonsense": 1})
        with pytest.raises(UserError, match="wrong kind"):
            kind(problem, Pretended(problem), settings={"steps": "many"})
        with pytest.raises(UserError):
            kind(problem.with_limit(10), Pretended(problem))
