"""A solver's allocations over a sweep of budgets."""

from __future__ import annotations

import time

import numpy as np

from bitatlas.analysis.schema import Frontier
from bitatlas.solvers.base import Solver
from bitatlas.solvers.front_cache import FrontCache
from bitatlas.solvers.problem import Problem

__all__ = ["budget_sweep", "frontier", "supported_points"]


def frontier(
    problem: Problem,
    solver: Solver,
    *,
    points: int = 33,
    seed: int = 0,
    time_limit_s: float = 60.0,
    limits: np.ndarray | None = None,
) -> Frontier:
    """Non-dominated allocations, cheapest first, strictly falling damage.

    Solvers with FRONT give their whole front at once, thinned to at most ``points`` when it is longer; others
    solve ``points`` budgets, each within ``time_limit_s / points``. ``problem.limit_bytes`` is ignored. Damage is
    the quadratic one where the problem has an interaction factor, for every solver. What all budgets cost is added up.

    Args:
        limits: the budgets to solve, instead of `budget_sweep`.

    Raises:
        UserError: from the solver.
    """
    start, evaluations, tokens = time.perf_counter(), 0, 0
    easiest = problem.with_limit(max(problem.limit_bytes, problem.min_bytes))
    solver.check(easiest)
    if solver.FRONT and limits is None:
        choice = _whole_front(FrontCache.of(easiest), points)
    else:
        sweep = budget_sweep(problem, points) if limits is None else np.asarray(limits, np.int64)
        each = time_limit_s / max(len(sweep), 1)
        solutions = [solver.solve(problem.with_limit(int(b)), seed=seed, time_limit_s=each) for b in sweep]
        choice = np.array([s.choice for s in solutions])
        evaluations, tokens = (sum(getattr(s, name) for s in solutions) for name in ("evaluations", "tokens"))
    rows = np.arange(len(problem.units))
    payload = np.array([int(problem.bytes[rows, p].sum()) for p in choice], np.int64)
    # A solver that needs no damage may run without a metric; its front is then ordered by bytes alone.
    predict = problem.objective if problem.interaction is None else problem.quadratic
    damage = np.array([predict(p) for p in choice])
    keep = _non_dominated(payload, damage)
    return Frontier(
        units=problem.units,
        formats=problem.formats,
        payload_bytes=payload[keep],
        predicted=damage[keep],
        choice=choice[keep].astype(np.uint8),
        supported=supported_points(payload[keep], damage[keep]),
        metric=problem.metric,
        solver=solver.NAME,
        seconds=time.perf_counter() - start,
        evaluations=evaluations,
        tokens=tokens,
    )


def budget_sweep(problem: Problem, points: int) -> np.ndarray:
    """(P,) int64 byte limits from the smallest to the largest allocation, evenly spread."""
    c = problem.classes
    top = int(np.where(c.allowed, c.bytes, 0).max(axis=1).sum())
    return np.unique(np.linspace(problem.min_bytes, top, max(points, 2)).round().astype(np.int64))


def supported_points(payload: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """(P,) bool: on the lower convex hull of (payload, damage), which must be sorted by payload."""
    on = np.zeros(len(payload), bool)
    hull: list[int] = []
    for i in range(len(payload)):
        while len(hull) > 1 and _bends_up(payload, damage, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    on[hull] = True
    return on


def _bends_up(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether b lies above the line from a to c."""
    left = (float(y[b]) - float(y[a])) * (float(x[c]) - float(x[a]))
    right = (float(y[c]) - float(y[a])) * (float(x[b]) - float(x[a]))
    return left > right + 1e-12 * max(abs(left), abs(right))


def _whole_front(cache: FrontCache, points: int) -> np.ndarray:
    """(P, U) the supported points, both ends kept, evenly spread in bytes when there are too many."""
    total = len(cache.cum_bytes)
    if total <= points:
        steps = np.arange(total)
    else:
        wanted = np.linspace(float(cache.cum_bytes[0]), float(cache.cum_bytes[-1]), points)
        steps = np.unique(np.searchsorted(cache.cum_bytes, wanted, side="right") - 1)
    return np.array([cache.classes.expand(cache.class_choice(int(k))) for k in steps])


def _non_dominated(payload: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Indices, by payload, of the points with less damage than every cheaper one."""
    order = np.lexsort((damage, payload))
    if not np.isfinite(damage).all():
        return order[np.unique(payload[order], return_index=True)[1]]
    best = np.concatenate([[np.inf], np.minimum.accumulate(damage[order])[:-1]])
    return order[damage[order] < best]
