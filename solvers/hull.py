"""Greedy on hull slopes = the Lagrangian sweep: every supported allocation from one sort."""

from __future__ import annotations

from typing import ClassVar

from bitatlas.solvers.base import FEASIBLE, OPTIMAL, Found, Solver
from bitatlas.solvers.front_cache import FrontCache
from bitatlas.solvers.problem import Problem

__all__ = ["Hull"]


class Hull(Solver):
    """Take the hull steps with the most damage saved per byte until one does not fit, then fill.

    The loss against the optimum is at most the saving of the one step that broke the budget.
    """

    NAME: ClassVar[str] = "hull"
    TITLE: ClassVar[str] = "Hull greedy (Lagrangian)"
    SOURCE: ClassVar[str] = (
        "Sinha & Zoltners 1979, the multiple-choice knapsack problem; Shoham & Gersho 1988"
    )
    FRONT: ClassVar[bool] = True

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        cache = FrontCache.of(problem)
        point = cache.at(problem.limit_bytes)
        # The relaxation without a fractional class is an integer optimum.
        k = cache.steps_within(problem.limit_bytes)
        proved = point.slope == 0.0 or int(cache.cum_bytes[k]) == problem.limit_bytes
        return Found(point.choice, OPTIMAL if proved else FEASIBLE, evaluations=len(cache.cum_bytes))
