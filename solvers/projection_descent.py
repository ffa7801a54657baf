"""Projection descent: minimise the Fisher projection's quadratic, cross terms included, within the exact bytes.

    q(b) = sum_u damage[u, b_u] + shrinkage * scale * mean_s [ (sum_u a_s[u, b_u])^2 - sum_u a_s[u, b_u]^2 ]

With v = sum_u a[u, b_u] the change of any single move needs one product with v, and a pair of moves one product more:
O(S) each, S the number of probes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import FEASIBLE, TIME_LIMIT, Found, Solver
from bitatlas.solvers.front_cache import FrontCache
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.problem import Problem

__all__ = ["ProjectionDescent", "Quadratic"]

_PAIRS_FROM = 256
"""Moves with the smallest reduced cost, of which all pairs are tried."""


class ProjectionDescent(Solver):
    """Exact knapsack on the additive damage, then single moves and exchanges of two units that stay in the budget.

    Restarts (seeded) solve the problem linearised at the best point with damages shaken by up to 40 %, and
    descend again. Never worse, in the quadratic, than the additive optimum it starts from.
    """

    NAME: ClassVar[str] = "projection_descent"
    TITLE: ClassVar[str] = "Projection descent (interactions)"
    SOURCE: ClassVar[str] = (
        "ours; second-order KL with cross-layer terms, exchange local search under exact bytes"
    )
    USES_INTERACTION: ClassVar[bool] = True
    RESTARTS: ClassVar[int] = 24

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        rng = np.random.default_rng(seed)
        q = Quadratic(problem)
        first = c.expand_back(Mckp()._solve(problem, seed, deadline).choice)
        price = FrontCache.of(problem).at(problem.limit_bytes, filled=False).slope
        best, value, tried = q.descend(first, price, deadline)
        for restart in range(self.RESTARTS):
            if time.perf_counter() > deadline:
                return Found(c.expand(best), TIME_LIMIT, tried)
            # The first restart is the plain linearisation.
            shake = rng.lognormal(0, 0.4 * restart / self.RESTARTS, c.damage.shape)
            linear = np.where(c.allowed, q.linearised(best) * shake, np.inf)
            view = replace(problem)
            view.__dict__["classes"] = replace(c, damage=linear)
            point = FrontCache.of(view).at(problem.limit_bytes)
            start = c.expand_back(point.choice)
            found, found_value, more = q.descend(start, price, deadline)
            tried += more
            if found_value < value - 1e-12 * abs(value):
                best, value = found, found_value
        return Found(c.expand(best), FEASIBLE, tried)


class Quadratic:
    """The quadratic over classes of tied units: q = sum_c linear[c, b_c] + factor * |sum_c a[c, b_c]|^2."""

    def __init__(self, problem: Problem) -> None:
        assert problem.interaction is not None
        c = problem.classes
        self.bytes, self.allowed, self.limit = c.bytes, c.allowed, problem.limit_bytes
        probes, n, k = problem.interaction.shape
        # Double precision unless it would take gigabytes.
        kind: type[np.floating] = np.float64 if problem.interaction.size <= 50_000_000 else np.float32
        a: np.ndarray = np.ascontiguousarray(problem.interaction.transpose(1, 2, 0), dtype=kind)  # (U, F, S)
        own = (a.astype(np.float64) ** 2).sum(axis=2)
        if len(c.bytes) < n:
            merged, merged_own = np.zeros((len(c.bytes), k, probes), kind), np.zeros((len(c.bytes), k))
            np.add.at(merged, c.of_unit, a)
            np.add.at(merged_own, c.of_unit, own)
            a, own = merged, merged_own
        self.a = a  # (C, F, S)
        self.factor = problem.shrinkage * problem.interaction_scale / probes
        self.linear = np.where(c.allowed, c.damage, 0.0) - self.factor * own  # (C, F)
        self.norm = (a.astype(np.float64) ** 2).sum(axis=2)

    def value(self, choice: np.ndarray) -> float:
        """q of a choice (C,)."""
        rows = np.arange(len(choice))
        v = self.a[rows, choice].sum(axis=0, dtype=np.float64)
        return float(self.linear[rows, choice].sum() + self.factor * (v @ v))

    def moves(self, choice: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(C, F) change of q when one class moves; inf where not allowed or where nothing moves."""
        rows = np.arange(len(choice))
        here = self.a[rows, choice]  # (C, S)
        others = v.astype(self.a.dtype) - here
        # |others + a_new|^2 - |others + a_old|^2
        gain = self.norm + 2 * np.matmul(self.a, others[:, :, None])[:, :, 0]
        change = self.linear - self.linear[rows, choice][:, None]
        change = change + self.factor * (gain - gain[rows, choice][:, None])
        change = np.where(self.allowed, change, np.inf)
        change[rows, choice] = np.inf
        return change

    def linearised(self, choice: np.ndarray) -> np.ndarray:
        """(C, F) damage of each option with all other classes held at ``choice``, counted from zero upwards."""
        rows = np.arange(len(choice))
        v = self.a[rows, choice].sum(axis=0, dtype=np.float64)
        change = self.moves(choice, v)
        change[rows, choice] = 0.0
        return change - np.where(np.isfinite(change), change, 0.0).min(axis=1, keepdims=True)

    def descend(self, choice: np.ndarray, price: float, deadline: float) -> tuple[np.ndarray, float, int]:
        """Single moves and pair exchanges until none improves: (choice (C,), value, moves looked at).

        ``price`` (damage per byte) ranks the moves from which pairs are formed.
        """
        choice = choice.copy()
        rows = np.arange(len(choice))
        v = self.a[rows, choice].sum(axis=0, dtype=np.float64)
        tried = 0
        value = self.value(choice)
        while time.perf_counter() < deadline:
            change = self.moves(choice, v)
            extra = self.bytes - self.bytes[rows, choice][:, None]
            room = self.limit - int(self.bytes[rows, choice].sum())
            tried += change.size
            single = np.where(extra <= room, change, np.inf)
            at = int(np.argmin(single))
            moves = [np.unravel_index(at, single.shape)]
            best = float(single.flat[at])
            pair, pair_change, looked = self._best_pair(choice, change, extra, room, price)
            tried += looked
            if pair_change < best:
                moves, best = pair, pair_change
            if not best < -1e-12 * max(abs(value), 1e-300):
                break
            for c, f in moves:
                v += self.a[c, f].astype(np.float64) - self.a[c, choice[c]]
                choice[c] = f
            value += best
        return choice, self.value(choice), tried

    def _best_pair(
        self, choice: np.ndarray, change: np.ndarray, extra: np.ndarray, room: int, price: float
    ) -> tuple[list[tuple[np.intp, ...]], float, int]:
        """The two moves of different classes that together fit and lower q most."""
        score = (change + price * extra).ravel()
        count = min(_PAIRS_FROM, int(np.isfinite(score).sum()))
        if count < 2:
            return [], np.inf, 0
        pick = np.argpartition(score, count - 1)[:count]
        pick.sort()
        c, f = np.unravel_index(pick, change.shape)
        step = self.a[c, f] - self.a[c, choice[c]]  # (K, S)
        joint = change[c, f][:, None] + change[c, f] + 2 * self.factor * (step @ step.T)
        fits = (extra[c, f][:, None] + extra[c, f] <= room) & (c[:, None] < c)
        joint = np.where(fits, joint, np.inf)
        i, j = np.unravel_index(int(np.argmin(joint)), joint.shape)
        return [(c[i], f[i]), (c[j], f[j])], float(joint[i, j]), count * (count - 1) // 2
