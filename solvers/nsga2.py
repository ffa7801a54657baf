"""NSGA-II on two objectives, bytes and predicted damage; the best of all candidates within the budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.base import FEASIBLE, TIME_LIMIT, Found, Solver
from bitatlas.solvers.problem import Problem
from bitatlas.solvers.search_space import SearchSpace

__all__ = ["Nsga2"]


class Nsga2(Solver):
    """Optuna's NSGA-II: candidates of any size, so the search spreads over a whole front around the budget.

    Candidates over the budget are ranked behind by how far they exceed it (constrained domination). The first
    generation holds the uniform plans. The answer is the best of all candidates within the budget and of the
    projections (`search_space`) of those over it.
    """

    NAME: ClassVar[str] = "nsga2"
    TITLE: ClassVar[str] = "NSGA-II"
    SOURCE: ClassVar[str] = "Deb et al. 2002, a fast and elitist multiobjective genetic algorithm; optuna"
    REQUIRES: ClassVar[tuple[str, ...]] = ("optuna",)

    SETTINGS: ClassVar[Mapping[str, Any]] = {"trials": 1000, "population": 50}

    def __init__(self, trials: int = 1000, population: int = 50) -> None:
        if trials < 1 or population < 2:
            raise UserError(f"{self.NAME} needs a trial, and two plans to cross", found=f"trials {trials}, population {population}",
                            fix="trials=1000 and population=50")  # fmt: skip
        self.trials = trials
        self.population = population

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        c = problem.classes
        space = SearchSpace(problem, seed)
        sampler = optuna.samplers.NSGAIISampler(
            seed=seed,
            population_size=self.population,
            constraints_func=lambda trial: (trial.user_attrs["excess"],),
        )
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for level in range(space.levels):
            study.enqueue_trial({f"v{i}": level for i in range(space.variables)})
        best = c.smallest()
        best_value = space.score(c.expand(best))
        done = 0
        while done < self.trials and (done == 0 or time.perf_counter() < deadline):
            trial = study.ask()
            levels = np.array(
                [trial.suggest_int(f"v{i}", 0, space.levels - 1) for i in range(space.variables)]
            )
            choice = space.decode(levels)
            size = c.payload(choice)
            trial.set_user_attr("excess", float(max(size - problem.limit_bytes, 0)))
            study.tell(trial, [float(size), space.score(c.expand(choice))])
            done += 1
            if size > problem.limit_bytes:
                choice = space.project(levels)
            value = space.score(c.expand(choice))
            if value < best_value:
                best, best_value = choice, value
        return Found(c.expand(best), FEASIBLE if done == self.trials else TIME_LIMIT, done)
