"""Random allocations at the budget, measured on the real model: what every search must beat token for token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.solvers.random_best import random_choice
from bitatlas.solvers.searcher import Reading, Searcher, State

__all__ = ["RandomSearch"]


class RandomSearch(Searcher):
    """Each step draws ``samples`` allocations, scores them on ``tokens``, and lets the best meet the best so far on other text."""

    NAME: ClassVar[str] = "random_search"
    TITLE: ClassVar[str] = "Random search, measured"
    SOURCE: ClassVar[str] = "baseline; Li & Talwalkar 2019, random search and reproducibility"
    SETTINGS: ClassVar[Mapping[str, Any]] = {"steps": 16, "samples": 16, "tokens": 2048, "final_tokens": 8192}

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """See `Searcher.readings`."""
        if step == 0:
            return (Reading(settings["tokens"], max(1, starts)),)
        return Reading(settings["tokens"], max(1, settings["samples"])), Reading(settings["final_tokens"], 2)

    def begin(self) -> State:
        """The given starts, or one random allocation."""
        first = random_choice(self.problem, self.rng(0))
        starts = self.start if len(self.start) else self.problem.classes.expand(first)[None]
        scores = self.objective.scores(starts, int(self.settings["tokens"]), self.seed)
        best = int(np.argmin(scores.mean))
        return {"choice": starts[best], "kl": scores.mean[best], "done": np.array(False)}

    def step(self, state: State, number: int) -> State:
        """More allocations."""
        rng, expand = self.rng(number), self.problem.classes.expand
        drawn = np.array([expand(random_choice(self.problem, rng)) for _ in range(max(1, int(self.settings["samples"])))])  # fmt: skip
        seeds = rng.integers(2**31, size=2).tolist()
        best = drawn[
            int(np.argmin(self.objective.scores(drawn, int(self.settings["tokens"]), seeds[0]).mean))
        ]
        two = np.stack([state["choice"], best])
        scores = self.objective.scores(two, int(self.settings["final_tokens"]), seeds[1])
        at = int(np.argmin(scores.mean))
        return {"choice": two[at], "kl": scores.mean[at], "done": np.array(False)}
