"""One format for everything: the baseline that every mix must beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import Found, Solver
from bitatlas.solvers.problem import Problem

__all__ = ["Uniform", "spread"]


class Uniform(Solver):
    """The best single format that fits; pinned units keep their pin.

    "Best" is the least damage, or the most bytes when no metric was given. A class that may not take the
    format gets its largest allowed one that is no bigger (else its smallest).
    """

    NAME: ClassVar[str] = "uniform"
    TITLE: ClassVar[str] = "One format for all"
    SOURCE: ClassVar[str] = "baseline"
    NEEDS_DAMAGE: ClassVar[bool] = False

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        best, best_key = c.smallest(), (np.inf, 0)
        for j in range(len(problem.formats)):
            choice = spread(problem, j)
            payload = c.payload(choice)
            if payload > problem.limit_bytes:
                continue
            damage = c.objective(choice) if problem.has_damage else 0.0
            if (damage, -payload) < best_key:
                best, best_key = choice, (damage, -payload)
        return Found(c.expand(best), evaluations=len(problem.formats))


def spread(problem: Problem, column: int) -> np.ndarray:
    """(C,) format ``column`` wherever allowed, else the largest allowed one that is no bigger, else the smallest."""
    c = problem.classes
    no_bigger = c.allowed & (c.bytes <= c.bytes[:, [column]])
    size = np.where(no_bigger, c.bytes, -1)
    fallback = np.where(no_bigger.any(axis=1), size.argmax(axis=1), c.smallest())
    return np.where(c.allowed[:, column], column, fallback)
