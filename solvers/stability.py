"""How sure a choice is: the same problem solved on other damages that the measurement could have given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from bitatlas.solvers.base import Solver
from bitatlas.solvers.problem import Problem

__all__ = ["error_factors", "share_chosen"]


def share_chosen(
    problem: Problem, damages: Iterable[np.ndarray], solver: Solver, *, seed: int = 0, time_limit_s: float = 60.0
) -> np.ndarray:  # fmt: skip
    """(U, F) share of the tables ``damages``, (U, F) each, under which a unit gets a format."""
    rows, count = np.arange(len(problem.units)), 0
    times = np.zeros(problem.damage.shape)
    for damage in damages:
        drawn = replace(problem, damage=damage)
        times[rows, solver.solve(drawn, seed=seed, time_limit_s=time_limit_s).choice] += 1
        count += 1
    return times / max(count, 1)


def error_factors(
    damage: np.ndarray, stderr: np.ndarray, replicates: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """(U, F) log-normal factors of mean 1 with the relative standard errors of ``damage``, one table a replicate.

    A draw moves all formats of a unit together, as resampled text does. Without damage there is nothing to move; an
    unknown error is an unknown factor: NaN.
    """
    rng = np.random.default_rng(seed)
    relative = np.where(damage == 0, 0.0, stderr / np.where(damage > 0, damage, np.nan))
    spread = np.sqrt(np.log1p(relative**2))
    for _ in range(replicates):
        yield np.exp(spread * rng.standard_normal((len(damage), 1)) - spread**2 / 2)
