"""Optuna's tree-structured Parzen estimator on the predicted damage, every candidate brought to the budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.solvers.base import FEASIBLE, TIME_LIMIT, Found, Solver
from bitatlas.solvers.problem import Problem
from bitatlas.solvers.search_space import SearchSpace

__all__ = ["Tpe"]


class Tpe(Solver):
    """Black-box search: one integer per unit (`search_space`), the damage at the budget as the only answer.

    It knows nothing of sums, so it shows what a general-purpose optimiser loses against the structure of the problem.
    """

    NAME: ClassVar[str] = "tpe"
    TITLE: ClassVar[str] = "Optuna TPE"
    SOURCE: ClassVar[str] = "Bergstra et al. 2011, algorithms for hyper-parameter optimization; optuna"
    REQUIRES: ClassVar[tuple[str, ...]] = ("optuna",)

    SETTINGS: ClassVar[Mapping[str, Any]] = {"trials": 300}

    def __init__(self, trials: int = 300) -> None:
        self.trials = max(1, trials)

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = SearchSpace(problem, seed)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=20))
        best = problem.classes.smallest()
        best_value = space.score(problem.classes.expand(best))
        done = 0
        while done < self.trials and (done == 0 or time.perf_counter() < deadline):
            trial = study.ask()
            levels = np.array(
                [trial.suggest_int(f"v{i}", 0, space.levels - 1) for i in range(space.variables)]
            )
            choice = space.project(levels)
            value = space.score(problem.classes.expand(choice))
            study.tell(trial, value)
            done += 1
            if value < best_value:
                best, best_value = choice, value
        return Found(problem.classes.expand(best), FEASIBLE if done == self.trials else TIME_LIMIT, done)
