"""NSGA-II on the real model: measured KL against bytes, a whole front below the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.solvers.level_switch import LevelSwitch
from bitatlas.solvers.searcher import Reading, Searcher, State

__all__ = ["Nsga2Search", "ranked"]


class Nsga2Search(Searcher):
    """Tournaments by rank and crowding, uniform crossover of classes, single levels up or down, elitist selection.

    All generations are scored on the same ``tokens``, so that parents need no second run; the best within the budget meets the
    best so far on ``judge_tokens`` of other text. The first ``population`` fills budgets between ``floor`` times the
    budget and the budget.
    """

    NAME: ClassVar[str] = "nsga2_search"
    TITLE: ClassVar[str] = "NSGA-II, measured"
    SOURCE: ClassVar[str] = "Deb et al. 2002, a fast and elitist multiobjective genetic algorithm"
    SETTINGS: ClassVar[Mapping[str, Any]] = {
        "steps": 40, "population": 32, "tokens": 4096, "judge_tokens": 8192, "floor": 0.7,
    }  # fmt: skip

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        people = max(2, settings["population"], starts + 1)
        judged = Reading(settings["judge_tokens"], 2 if step else 1)
        return Reading(settings["tokens"], people), judged

    def begin(self) -> State:
        """The given starts and random allocations at budgets in between."""
        p, c, rng = self.problem, self.problem.classes, self.rng(0)
        found = [np.asarray(s) for s in self.start]
        least = max(p.min_bytes, int(float(self.settings["floor"]) * p.limit_bytes))
        count = max(2, int(self.settings["population"]))
        for limit in np.linspace(p.limit_bytes, least, max(count - len(found), 1)).astype(np.int64).tolist():
            switch = LevelSwitch(p.with_limit(limit), "none")
            found.append(c.expand(switch.formats(switch.random(rng))))
        people = np.array(found)
        kl = self._scores(people)
        best = people[int(np.argmin(kl))]
        judged = self.objective.scores(best, int(self.settings["judge_tokens"]), self.seed + 1)
        return {
            "choice": best,
            "kl": judged.mean[0],
            "done": np.array(False),
            "population": people,
            "population_kl": kl,
        }

    def step(self, state: State, number: int) -> State:
        """One generation."""
        p, c, rng = self.problem, self.problem.classes, self.rng(number)
        people, kl = state["population"], state["population_kl"]
        size = np.array([p.payload(choice) for choice in people], np.float64)
        rank, crowding = ranked(np.stack([size, kl], 1))
        switch = LevelSwitch(p, "none")
        levels = np.array([switch.level(c.expand_back(choice)) for choice in people])
        seen = {row.tobytes() for row in levels}
        children: list[np.ndarray] = []
        for _ in range(10 * len(people)):
            if len(children) == len(people):
                break
            one, other = (self._tournament(rank, crowding, rng) for _ in range(2))
            child = np.where(rng.random(levels.shape[1]) < 0.5, levels[one], levels[other])
            moved = rng.random(len(child)) < 1 / len(child)
            child = np.clip(child + np.where(moved, rng.choice([-1, 1], len(child)), 0), 0, switch.top)
            switch.lower(child, rng)
            if child.tobytes() not in seen:
                seen.add(child.tobytes())
                children.append(c.expand(switch.formats(child)))
        if not children:
            return {**state, "done": np.array(True)}
        people = np.concatenate([people, children])
        kl = np.concatenate([kl, self._scores(np.array(children))])
        size = np.array([p.payload(choice) for choice in people], np.float64)
        rank, crowding = ranked(np.stack([size, kl], 1))
        keep = np.lexsort((-crowding, rank))[: len(levels)]
        out = {**state, "population": people[keep], "population_kl": kl[keep]}
        best = people[int(np.argmin(kl))]
        if (best != state["choice"]).any():
            two = np.stack([state["choice"], best])
            judged = self.objective.scores(two, int(self.settings["judge_tokens"]), self.seed + 1)
            at = int(np.argmin(judged.mean))
            out |= {"choice": two[at], "kl": judged.mean[at]}
        return out

    def _scores(self, choices: np.ndarray) -> np.ndarray:
        return self.objective.scores(choices, int(self.settings["tokens"]), self.seed).mean

    @staticmethod
    def _tournament(rank: np.ndarray, crowding: np.ndarray, rng: np.random.Generator) -> int:
        """The better of two drawn at random."""
        a, b = rng.integers(len(rank), size=2).tolist()
        return a if (rank[a], -crowding[a]) <= (rank[b], -crowding[b]) else b


def ranked(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) front of every point (0 = not dominated), both objectives (N, 2) minimised, and its crowding distance."""
    below = (points[:, None] <= points[None]).all(axis=2) & (points[:, None] < points[None]).any(
        axis=2
    )  # i before j
    rank = np.full(len(points), -1)
    for front in range(len(points)):
        open_ = rank < 0
        if not open_.any():
            break
        rank[open_ & ~(below & open_[:, None]).any(axis=0)] = front
    crowding = np.zeros(len(points))
    for front in range(int(rank.max()) + 1):
        members = np.flatnonzero(rank == front)
        for axis in range(points.shape[1]):
            order = members[np.argsort(points[members, axis], kind="stable")]
            value = points[order, axis]
            crowding[order[[0, -1]]] = np.inf
            if len(order) > 2 and value[-1] > value[0]:
                crowding[order[1:-1]] += (value[2:] - value[:-2]) / (value[-1] - value[0])
    return rank, crowding
