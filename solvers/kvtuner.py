"""KVTuner's recipe: prune each layer's pairs, cluster layers that want the same, search over clusters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from bitatlas.solvers.base import FEASIBLE, Found, Solver
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.nsga2 import Nsga2
from bitatlas.solvers.problem import Problem

__all__ = ["KvTuner", "cluster", "pareto"]


def pareto(damage: np.ndarray, size: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(C, F) bool: formats of each class that no other one beats in both bytes and damage (KVTuner, section 5.1)."""
    out = np.zeros(allowed.shape, bool)
    for i in range(len(out)):
        best = np.inf
        for j in sorted(np.flatnonzero(allowed[i]).tolist(), key=lambda j: (size[i, j], damage[i, j], j)):
            # The first one is the smallest and always stays: pruning never makes a budget impossible.
            if damage[i, j] < best or not out[i].any():
                out[i, j] = True
                best = damage[i, j]
    return out


def cluster(damage: np.ndarray, kept: np.ndarray, eps: float) -> np.ndarray:
    """(C,) cluster numbers: same surviving formats, and ln damages over them that hang together within ``eps``.

    DBSCAN with one point enough for a cluster, as KVTuner uses it, is single linkage cut at ``eps``. Distances are root
    mean squares over the surviving formats; a damage of 0 counts as the smallest positive one.
    """
    out = np.full(len(damage), -1)
    positive = damage[np.isfinite(damage) & (damage > 0)]
    logs = np.log(
        np.maximum(np.where(np.isfinite(damage), damage, 1.0), positive.min() if positive.size else 1.0)
    )
    for survivors in dict.fromkeys(map(tuple, kept.tolist())):
        rows = np.flatnonzero((kept == survivors).all(1))
        points = logs[rows][:, np.array(survivors)]
        labels = np.ones(len(rows), int)
        if len(rows) > 1:
            labels = fcluster(linkage(points / np.sqrt(points.shape[1]), "single"), eps, "distance")
        out[rows] = labels + out.max()
    return np.unique(out, return_inverse=True)[1].reshape(-1)


class KvTuner(Solver):
    """Pareto pruning, clustering, then the search over clusters: exact, or NSGA-II as published.

    The published cost is the mean of K and V bits; here it is the exact bytes. Works on weights as well.

    Args:
        eps: largest distance in ln damage between neighbours of a cluster.
        exact: solve the clustered problem exactly instead of by NSGA-II (``--set exact=false``).
        trials, population: of NSGA-II.
    """

    NAME: ClassVar[str] = "kvtuner"
    TITLE: ClassVar[str] = "KVTuner (prune, cluster, search)"
    SOURCE: ClassVar[str] = (
        "KVTuner (Li et al. 2025), sections 5.1-5.3; sum of damages in place of task accuracy"
    )

    SETTINGS: ClassVar[Mapping[str, Any]] = {"eps": 0.35, "exact": True, **Nsga2.SETTINGS}

    def __init__(
        self, eps: float = 0.35, exact: bool = True, trials: int = 1000, population: int = 50
    ) -> None:
        self.eps, self.exact = eps, exact
        self.search = Nsga2(trials, population)

    def check(self, problem: Problem) -> None:
        """Also what NSGA-II needs, where it is asked for."""
        super().check(problem)
        if not self.exact:
            self.search.check(problem)

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        kept = pareto(c.damage, c.bytes, c.allowed)
        labels = cluster(c.damage, kept, self.eps)
        shape = (int(labels.max()) + 1, kept.shape[1])
        damage, size = np.zeros(shape), np.zeros(shape, np.int64)
        np.add.at(damage, labels, np.where(kept, c.damage, 0.0))
        np.add.at(size, labels, c.bytes)
        allowed = np.ones(shape, bool)
        np.logical_and.at(allowed, labels, kept)
        clustered = Problem.of(np.where(allowed, damage, np.nan), size, problem.limit_bytes, allowed=allowed)
        found = (Mckp() if self.exact else self.search)._solve(clustered, seed, deadline)
        return Found(c.expand(np.asarray(found.choice)[labels]), FEASIBLE, found.evaluations)
