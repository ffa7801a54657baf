"""Exact multiple-choice knapsack by dynamic programming over a minimal core (Pisinger 1995).

With mu the slope of the hull step that breaks the budget, option j of class i has the reduced cost
``r = damage + mu * bytes - min_j (damage + mu * bytes) >= 0``, and any allocation costs
``bound + sum r + mu * slack``. So only options with r <= (best known - bound) can matter: the core. States are
(byte shift against the relaxation's choice, sum of r), pruned by the best known value and by dominance.

Moves that shift the same number of bytes (identical experts) are one stage: of k such moves the k cheapest are
right, so the stage has k + 1 outcomes instead of 2**k. That forgets that a class makes one move only; should
the optimum move a class twice, the search runs again with one stage per class.
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
        best, states, status = start, 1, OPTIMAL
        gap = core.value(start, slack)
        # Differences below the rounding of the objective itself are none.
        noise = 1e-15 * float(np.abs(c.damage[np.arange(len(start)), start]).sum()) / core.unit
        # A guess below the known gap makes a far smaller core; an answer within the guess is the optimum.
        for guess in (gap / 64, gap / 8, gap):
            if gap <= noise:
                break
            for one_move in (False, True):
                found = core.search(slack, guess, noise, deadline, one_move)
                states += found.states
                if not found.conflict:
                    break
            status = found.status
            if found.choice is not None and core.value(found.choice, slack) < core.value(best, slack):
                best = found.choice
            if status == TIME_LIMIT or found.choice is not None:
                break
        return Found(c.expand(best), status, states)


class _Stage(NamedTuple):
    """One decision of the DP: outcome o shifts the bytes by shift[o] at reduced cost cost[o]; outcome 0 is none."""

    shift: np.ndarray  # (O,) int64
    cost: np.ndarray  # (O,) float64
    classes: (
        np.ndarray
    )  # (O - 1,) cumulative: the classes that move, cheapest first; else one class, repeated
    options: np.ndarray  # (O - 1,) the option of each move
    cumulative: bool  # outcome o makes the first o moves, not the o-th


class _Searched(NamedTuple):
    choice: np.ndarray | None  # (C,), None: nothing within the guess
    status: str
    states: int
    conflict: bool = False  # the answer moves a class twice, so it is none


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

    def stages(self, gap: float, one_move: bool) -> list[_Stage]:
        """Moves with a reduced cost within ``gap``, undominated within their class, cheapest stage first.

        Equal shifts share a stage; with ``one_move`` only those of classes that have no other move.
        """
        reach = (self.reduced <= gap) & (self.shift != 0)
        live = np.flatnonzero(reach.any(axis=1))
        r, s, ok = self.reduced[live], self.shift[live], reach[live]
        truth = r - self.mu * s
        k = r.shape[1]
        for j in range(k):
            for other in range(k):
                if other == j:
                    continue
                worse = ok[:, j] & ok[:, other] & (s[:, other] <= s[:, j]) & (truth[:, other] <= truth[:, j])
                same = (s[:, other] == s[:, j]) & (truth[:, other] == truth[:, j])
                ok[:, j] &= ~(worse & (~same | (other < j)))
        several = ok.sum(axis=1) > 1
        out: list[_Stage] = []
        row, option = np.nonzero(ok & ~several[:, None] if one_move else ok)
        shift, cost = s[row, option], r[row, option]
        order = np.lexsort((cost, shift))
        for group in np.split(order, np.flatnonzero(np.diff(shift[order])) + 1) if len(order) else []:
            total = np.concatenate([[0.0], np.cumsum(cost[group])])
            n = max(int(np.searchsorted(total, gap, side="right")), 2)
            out.append(_Stage(shift[group[0]] * np.arange(n), total[:n], live[row[group[: n - 1]]],
                              option[group[: n - 1]], True))  # fmt: skip
        for i in np.flatnonzero(several) if one_move else []:
            moves = np.flatnonzero(ok[i])
            out.append(_Stage(np.concatenate([[0], s[i, moves]]), np.concatenate([[0.0], r[i, moves]]),
                              np.full(len(moves), live[i]), moves, False))  # fmt: skip
        return sorted(out, key=_cheapest)

    def search(self, slack: int, gap: float, noise: float, deadline: float, one_move: bool) -> _Searched:
        """Best allocation closer to the bound than ``gap`` by more than ``noise``."""
        todo = self.stages(gap, one_move)
        below = sum(_down(stage) for stage in todo)  # bytes that the stages to come can still give back
        up, down = _rates(todo)
        shift, cost = np.zeros(1, np.int64), np.zeros(1)  # states, by shift
        trail: list[tuple[_Stage, np.ndarray, np.ndarray]] = []
        best, best_at = gap, (-1, -1)
        status, made = OPTIMAL, 1
        at = -1
        while (at := at + 1) < len(todo):
            stage = todo[at]
            # Any improvement pays at least this stage's cheapest move, and for the bytes it is off the budget the
            # best rate of the moves to come (or mu for bytes left unused).
            off = slack - shift
            fare = np.where(off >= 0, off * min(self.mu, up[at]), np.maximum(-off, 1) * down[at])
            keep = np.flatnonzero(cost + np.maximum(fare, _cheapest(stage)) < best - noise)
            if not keep.size:
                break
            if time.perf_counter() > deadline:
                status = TIME_LIMIT
                break
            below -= _down(stage)
            room = max(_PRODUCT // keep.size, 2)
            if stage.cumulative and len(stage.shift) > room:
                stage, rest = _cut(stage, room)
                below += _down(rest)
                insort(todo, rest, lo=at + 1, key=_cheapest)
                up, down = _rates(todo)
            new_shift = (stage.shift[:, None] + shift[keep]).ravel()
            new_cost = (stage.cost[:, None] + cost[keep]).ravel()
            ok = np.flatnonzero((new_cost < best) & (new_shift + below <= slack))
            # One sorted run per outcome: a stable sort only merges them.
            ok = ok[np.argsort(new_shift[ok], kind="stable")]
            truth = new_cost[ok] - self.mu * new_shift[ok]
            ok = ok[truth < np.append(np.inf, np.minimum.accumulate(truth)[:-1])]
            if len(ok) > _STATES:
                ok = ok[np.sort(np.argpartition(new_cost[ok], _STATES)[:_STATES])]
                status = FEASIBLE
            if not ok.size:
                break
            shift, cost = new_shift[ok], new_cost[ok]
            made += len(ok)
            trail.append((stage, keep[ok % keep.size].astype(np.int32), (ok // keep.size).astype(np.int32)))
            final = np.where(shift <= slack, cost + self.mu * (slack - shift), np.inf)
            first = int(np.argmin(final))
            if final[first] < best - noise:
                best, best_at = float(final[first]), (len(trail) - 1, first)
        choice, conflict = self._trace(trail, *best_at)
        return _Searched(None if conflict else choice, status, made, conflict)

    def _trace(
        self, trail: list[tuple[_Stage, np.ndarray, np.ndarray]], last: int, state: int
    ) -> tuple[np.ndarray | None, bool]:
        """(C,) the choice that led to ``state`` after stage ``last``, and whether a class moved twice."""
        if last < 0:
            return None, False
        choice, times = self.base.copy(), np.zeros(len(self.base), np.int64)
        for stage, origin, outcome in reversed(trail[: last + 1]):
            o = int(outcome[state])
            made = slice(0, o) if stage.cumulative else slice(max(o - 1, 0), o)
            choice[stage.classes[made]] = stage.options[made]
            np.add.at(times, stage.classes[made], 1)
            state = int(origin[state])
        return choice, bool((times > 1).any())


def _cheapest(stage: _Stage) -> float:
    """Reduced cost of the stage's cheapest move."""
    return float(stage.cost[1:].min())


def _rates(stages: list[_Stage]) -> tuple[np.ndarray, np.ndarray]:
    """(N + 1,) least reduced cost per byte gained, and per byte given back, by stage i or any later one."""
    up, down = np.full(len(stages) + 1, np.inf), np.full(len(stages) + 1, np.inf)
    for i, stage in enumerate(stages):
        rate = stage.cost[1:] / np.abs(stage.shift[1:])
        more = stage.shift[1:] > 0
        up[i] = rate[more].min(initial=np.inf)
        down[i] = rate[~more].min(initial=np.inf)
    return np.minimum.accumulate(up[::-1])[::-1], np.minimum.accumulate(down[::-1])[::-1]


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
