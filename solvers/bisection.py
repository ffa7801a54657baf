"""Bisection on how many units may go down one width, ordered with a term between layers (Augmented Hessian)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import Found, Solver
from bitatlas.solvers.mixes import neighbours
from bitatlas.solvers.problem import Problem

__all__ = ["Bisection"]


class Bisection(Solver):
    """Two neighbouring formats; units sorted by what going down costs; bisection on how many must.

    The cost of a unit is its damage increase per byte saved. With an interaction factor the increase includes
    the unit's share of the joint effect of all units going down together, the inter-layer term:

        s_u = damage_u(low) - damage_u(high) + 2 shrinkage scale mean_s d_us (sum_v d_vs - d_us),
        d_us = a_s[u, low] - a_s[u, high]

    The published search stops at an accuracy target; ours at the bytes.
    """

    NAME: ClassVar[str] = "bisection"
    TITLE: ClassVar[str] = "Sorted bisection (Augmented Hessian)"
    SOURCE: ClassVar[str] = (
        "Augmented Hessian (arXiv 2306.04879), section 3; interlayer dependency, bisection"
    )

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        low, high = neighbours(problem)
        rows = np.arange(len(low))
        movable = np.flatnonzero(low != high)
        saved = c.bytes[rows, high] - c.bytes[rows, low]
        increase = c.damage[rows, low] - c.damage[rows, high]
        if problem.interaction is not None:
            increase = increase + _joint_effect(problem, low, high)
        order = movable[np.argsort((increase / np.maximum(saved, 1))[movable], kind="stable")]
        fewest, most = 0, len(order)  # how many go down; ``most`` always fits
        tried = 0
        while fewest < most:
            count = (fewest + most) // 2
            choice = high.copy()
            choice[order[:count]] = low[order[:count]]
            tried += 1
            if c.payload(choice) <= problem.limit_bytes:
                most = count
            else:
                fewest = count + 1
        choice = high.copy()
        choice[order[:most]] = low[order[:most]]
        return Found(c.expand(choice), evaluations=tried)


def _joint_effect(problem: Problem, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(C,) cross terms between a class's step down and everybody else's."""
    assert problem.interaction is not None
    c = problem.classes
    units = np.arange(len(problem.units))
    step = (
        problem.interaction[:, units, low[c.of_unit]] - problem.interaction[:, units, high[c.of_unit]]
    )  # (S, U)
    by_class = np.zeros((step.shape[0], len(low)))
    np.add.at(by_class.T, c.of_unit, step.T.astype(np.float64))
    others = by_class.sum(axis=1, keepdims=True) - by_class
    return 2 * problem.shrinkage * problem.interaction_scale * (by_class * others).mean(axis=0)
