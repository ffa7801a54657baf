"""What the black-box searchers vary: one level per variable, and how levels become an allocation at the budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitatlas.solvers.problem import Problem

__all__ = ["MAX_VARIABLES", "SearchSpace"]

MAX_VARIABLES = 256
"""With more classes, those of one layer and role share a variable, then neighbours do."""


class SearchSpace:
    """Levels 0 (fewest bytes) to ``levels - 1`` per variable; a class with fewer formats scales them.

    Attributes:
        variables: how many; levels: how many each has.
        ladder: per class its allowed formats by bytes.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        c = problem.classes
        self.problem = problem
        self.ladder = [
            np.flatnonzero(c.allowed[i])[np.argsort(c.bytes[i, c.allowed[i]], kind="stable")]
            for i in range(len(c.bytes))
        ]
        self.levels = max(len(steps) for steps in self.ladder)
        self.variable = _share_variables(problem)
        self.variables = int(self.variable.max()) + 1
        # One fixed random order for the partial step, so that the projection favours nobody by position.
        self.order = np.random.default_rng(seed).permutation(len(self.ladder))
        self.score: Callable[[np.ndarray], float] = (
            problem.objective if problem.interaction is None else problem.quadratic
        )

    def decode(self, levels: np.ndarray) -> np.ndarray:
        """(C,) format indices of (variables,) levels; may exceed the budget."""
        return self._formats(np.asarray(levels)[self.variable])

    def project(self, levels: np.ndarray) -> np.ndarray:
        """(C,) the same plan at the budget: all classes lowered level by level until it fits, then raised while it fits."""
        c, limit = self.problem.classes, self.problem.limit_bytes
        want = np.asarray(levels, np.int64)[self.variable]
        choice = self._formats(want)
        while c.payload(choice) > limit and want.max() > 0:
            want = np.maximum(want - 1, 0)
            choice = self._formats(want)
        if c.payload(choice) > limit:
            return c.smallest()
        upper = self._formats(np.minimum(want + 1, self.levels - 1))
        room = limit - c.payload(choice)
        rows = np.arange(len(choice))
        extra = c.bytes[rows, upper] - c.bytes[rows, choice]
        for i in self.order[extra[self.order] > 0].tolist():
            if extra[i] <= room:
                choice[i] = upper[i]
                room -= int(extra[i])
        return choice

    def _formats(self, level: np.ndarray) -> np.ndarray:
        share = level / max(self.levels - 1, 1)
        return np.array([steps[round(s * (len(steps) - 1))] for steps, s in zip(self.ladder, share.tolist())])


def _share_variables(problem: Problem) -> np.ndarray:
    """(C,) variable of each class, numbered from 0."""
    c = problem.classes
    n = len(c.bytes)
    if n <= MAX_VARIABLES:
        return np.arange(n)
    first = np.full(n, -1)
    first[c.of_unit[::-1]] = np.arange(len(c.of_unit))[::-1]  # a class goes by its first unit
    roles = {role: r for r, role in enumerate(dict.fromkeys(problem.roles))}
    key = np.array([(problem.layers[u], roles[problem.roles[u]]) for u in first.tolist()])
    shared = np.unique(key, axis=0, return_inverse=True)[1].reshape(-1)
    count = int(shared.max()) + 1
    return shared if count <= MAX_VARIABLES else shared * MAX_VARIABLES // count
