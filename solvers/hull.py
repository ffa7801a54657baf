"""Greedy on hull slopes = the Lagrangian sweep: every supported allocation from one sort."""

from __future__ import annotations

from typing import ClassVar

from bitatlas.solvers.base import FEASIBLE, OPTIMAL, Found, Solver
from bitatlas.solvers.front_cache import FrontCache
from bitatlas.solvers.problem import Problem

__all__ = ["Hull"]


class Hull(Solver):
    """Take the hull steps with the most damage saved per byte until one does not fit, then fill.

    The loss against the optimum is at most the saving of the one step that broke the budget. Further limits must be on the
    bytes of separate groups of units (`solvers.byte_groups`); each costs one such step more.
    """

    NAME: ClassVar[str] = "hull"
    TITLE: ClassVar[str] = "Hull greedy (Lagrangian)"
    SOURCE: ClassVar[str] = (
        "Sinha & Zoltners 1979, the multiple-choice knapsack problem; Shoham & Gersho 1988"
    )
    FRONT: ClassVar[bool] = True
    MULTI_BUDGET: ClassVar[bool] = True

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        cache = FrontCache.of(problem)
        point = cache.at(problem.limit_bytes)
        # The relaxation without a fractional class is an integer optimum.
        k = cache.steps_within(problem.limit_bytes)
        proved = point.slope == 0.0 or int(cache.cum_bytes[k]) == problem.limit_bytes
        worth: tuple[float, ...] = ()
        if cache.caps is not None:
            worth = tuple(cache.caps.multipliers(point.slope).tolist())
            proved = proved and not any(w and r for w, r in zip(worth, cache.caps.room.tolist()))
        return Found(point.choice, OPTIMAL if proved else FEASIBLE, len(cache.cum_bytes), multipliers=worth)
