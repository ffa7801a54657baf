"""Exact multiple-choice knapsack by dynamic programming over a minimal core (Pisinger 1995).

With mu the slope of the hull step that breaks the budget, option j of class i has the reduced cost
``r = damage + mu * bytes - min_j (damage + mu * bytes) >= 0``, and any allocation costs
``bound + sum r + mu * slack``. So only options with r <= (best known - bound) can matter: the core. States are
(byte shift against the relaxation's choice, sum of r), pruned by the best known value and by dominance.

Classes whose one remaining move shifts the same number of bytes (identical experts) are one stage: of k
such moves, the k cheapest are always right, so the stage has k + 1 outcomes instead of 2**k.
"""

from __future__ import annotations

import time
from bisect import insort
from typing import ClassVar, NamedTuple

import numpy as np

from bitatlas.solvers.base import FEASIBLE, OPTIMAL, TIME_LIMIT, Found, Solver
from bitatlas.solvers.front_cache import FrontCache, fill
from bitatlas.solvers.problem import Problem

__all__ = ["Mckp"]

_PRODUCT = 2_000_000
"""Most new states made at once; larger stages are cut in two."""
_STATES = 2_000_000
"""Beyond this the weakest states are dropped and the proof is given up."""


class Mckp(Solver):
    """Exact optimum of one byte budget; any sizes, any losses (non-convex and negative ones too)."""

    NAME: ClassVar[str] = "mckp"
    TITLE: ClassVar[str] = "Exact knapsack"
    SOURCE: ClassVar[str] = "Pisinger 1995, a minimal algorithm for the multiple-choice knapsack problem"
    EXACT: ClassVar[bool] = True

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        cache = FrontCache.of(problem)
        c, limit = cache.classes, problem.limit_bytes
        k = cache.steps_within(limit)
        base = cache.class_choice(k)
        slack = limit - int(cache.cum_bytes[k])
        if k == len(cache.step_slope) or slack == 0:
            return Found(c.expand(base), OPTIMAL, 1)
        mu = float(cache.step_slope[k])
        start = fill(c, base, limit)
        core = _Core(c.damage, c.bytes, c.allowed, base, mu)
        gap = core.value(start, slack)
        # Differences below the rounding of the objective itself are none.
        noise = 1e-15 * float(np.abs(c.damage[np.arange(len(start)), start]).sum()) / core.unit
        solved = core.search(slack, gap, noise, deadline)
        choice = start if solved.moves is None else solved.moves
        return Found(c.expand(choice), solved.status, solved.states)


class _Stage(NamedTuple):
    """One decision of the DP: outcome o shifts the bytes by shift[o] at reduced cost cost[o]."""

    shift: np.ndarray  # (O,) int64, outcome 0 is "nothing moves"
    cost: np.ndarray  # (O,) float64
    classes: np.ndarray  # grouped: (O - 1,) the classes that move, cheapest first; single: (1,)
    options: np.ndarray  # grouped: (O - 1,) the option of each; single: (O - 1,) option of each outcome
    grouped: bool


class _Searched(NamedTuple):
    moves: np.ndarray | None
    status: str
    states: int


class _Core:
    """Reduced costs around the relaxation's choice, in units of the largest damage difference."""

    def __init__(
        self, damage: np.ndarray, size: np.ndarray, allowed: np.ndarray, base: np.ndarray, mu: float
    ) -> None:
        rows = np.arange(len(base))
        self.base = base
        with np.errstate(invalid="ignore"):
            delta = np.where(allowed, damage - damage[rows, base][:, None], np.inf)
        self.unit = float(np.max(np.abs(delta[allowed]))) or 1.0
        self.mu = mu / self.unit
        self.shift = size - size[rows, base][:, None]  # (C, F) int64
        reduced = np.where(allowed, delta / self.unit + self.mu * self.shift, np.inf)
        self.reduced = np.maximum(reduced, 0.0)  # below zero only by rounding

    def value(self, choice: np.ndarray, slack: int) -> float:
        """Distance of ``choice`` (C,) to the relaxation's bound."""
        rows = np.arange(len(choice))
        used = int(self.shift[rows, choice].sum())
        return float(self.reduced[rows, choice].sum()) + self.mu * (slack - used)

    def stages(self, gap: float) -> list[_Stage]:
        """Moves with a reduced cost within ``gap``, undominated, grouped, cheapest first."""
        reach = (self.reduced <= gap) & (self.shift != 0)
        live = np.flatnonzero(reach.any(axis=1))
        r, s, ok = self.reduced[live], self.shift[live], reach[live]
        true_cost = r - self.mu * s
        k = r.shape[1]
        for j in range(k):
            for other in range(k):
                if other == j:
                    continue
                worse = (
                    ok[:, j]
                    & ok[:, other]
                    & (s[:, other] <= s[:, j])
                    & (true_cost[:, other] <= true_cost[:, j])
                )
                same = (s[:, other] == s[:, j]) & (true_cost[:, other] == true_cost[:, j])
                ok[:, j] &= ~(worse & (~same | (other < j)))
        count = ok.sum(axis=1)
        out: list[_Stage] = []
        one = np.flatnonzero(count == 1)
        option = ok[one].argmax(axis=1)
        shift, cost = s[one, option], r[one, option]
        order = np.lexsort((cost, shift))
        cuts = np.flatnonzero(np.diff(shift[order])) + 1
        for group in np.split(order, cuts) if len(order) else []:
            total = np.concatenate([[0.0], np.cumsum(cost[group])])
            total = total[total <= gap]
            n = len(total)
            out.append(_Stage(shift[group[0]] * np.arange(n), total, live[one[group[: n - 1]]],
                              option[group[: n - 1]], True))  # fmt: skip
        for i in np.flatnonzero(count > 1):
            options = np.flatnonzero(ok[i])
            out.append(_Stage(np.concatenate([[0], s[i, options]]), np.concatenate([[0.0], r[i, options]]),
                              live[[i]], options, False))  # fmt: skip
        return sorted(out, key=_cheapest)

    def search(self, slack: int, gap: float, noise: float, deadline: float) -> _Searched:
        """Best allocation closer to the bound than ``gap`` by more than ``noise``; moves None if there is none."""
        if gap <= noise:
            return _Searched(None, OPTIMAL, 1)
        todo = self.stages(gap)
        below = sum(_down(stage) for stage in todo)  # bytes that the stages to come can still give back
        shift, cost = np.zeros(1, np.int64), np.zeros(1)
        trail: list[tuple[_Stage, np.ndarray, np.ndarray]] = []
        best, best_at = gap, (-1, -1)
        status, made = OPTIMAL, 1
        while todo:
            stage = todo.pop(0)
            # Every further improvement pays at least this stage's cheapest move.
            keep = cost + _cheapest(stage) < best - noise
            if not keep.any():
                break
            if time.perf_counter() > deadline:
                status = TIME_LIMIT
                break
            below -= _down(stage)
            room = max(_PRODUCT // int(keep.sum()), 2)
            if stage.grouped and len(stage.shift) > room:
                stage, rest = _cut(stage, room)
                below += _down(rest)
                insort(todo, rest, key=_cheapest)
            parent = np.flatnonzero(keep)
            new_shift = (shift[parent][:, None] + stage.shift).ravel()
            new_cost = (cost[parent][:, None] + stage.cost).ravel()
            origin = np.repeat(parent, len(stage.shift))
            outcome = np.tile(np.arange(len(stage.shift)), len(parent))
            ok = np.flatnonzero((new_cost < best) & (new_shift + below <= slack))
            ok = ok[np.lexsort((new_cost[ok], new_shift[ok]))]
            truth = new_cost[ok] - self.mu * new_shift[ok]
            first = np.concatenate([[np.inf], np.minimum.accumulate(truth)[:-1]]) if len(ok) else truth
            ok = ok[truth < first]
            if len(ok) > _STATES:
                ok = np.sort(ok[np.argpartition(new_cost[ok], _STATES)[:_STATES]])
                status = FEASIBLE
            shift, cost = new_shift[ok], new_cost[ok]
            made += len(ok)
            trail.append((stage, origin[ok].astype(np.int32), outcome[ok].astype(np.int32)))
            if len(ok):
                final = np.where(shift <= slack, cost + self.mu * (slack - shift), np.inf)
                at = int(np.argmin(final))
                if final[at] < best - noise:
                    best, best_at = float(final[at]), (len(trail) - 1, at)
            else:
                break
        return _Searched(self._trace(trail, *best_at), status, made)

    def _trace(
        self, trail: list[tuple[_Stage, np.ndarray, np.ndarray]], last: int, state: int
    ) -> np.ndarray | None:
        """(C,) the choice that led to ``state`` after stage ``last``."""
        if last < 0:
            return None
        choice = self.base.copy()
        for stage, origin, outcome in reversed(trail[: last + 1]):
            o = int(outcome[state])
            if stage.grouped:
                choice[stage.classes[:o]] = stage.options[:o]
            elif o:
                choice[stage.classes[0]] = stage.options[o - 1]
            state = int(origin[state])
        return choice


def _cheapest(stage: _Stage) -> float:
    """Reduced cost of the stage's cheapest move."""
    return float(stage.cost[1:].min())


def _down(stage: _Stage) -> int:
    """The stage's most negative shift, 0 when it can only grow."""
    return min(int(stage.shift.min()), 0)


def _cut(stage: _Stage, room: int) -> tuple[_Stage, _Stage]:
    """A grouped stage as two: its cheapest moves, then the others. Both together reach all it reached."""
    n = room - 1
    step = int(stage.shift[1])
    head = _Stage(stage.shift[: n + 1], stage.cost[: n + 1], stage.classes[:n], stage.options[:n], True)
    rest = stage.cost[n:] - stage.cost[n]
    tail = _Stage(step * np.arange(len(rest)), rest, stage.classes[n:], stage.options[n:], True)
    return head, tail
