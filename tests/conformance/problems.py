"""Small random allocation problems and their exhaustive solution."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from bitatlas.analysis.schema import TieGroup, UserError
from bitatlas.solvers import Problem, SideBudget

__all__ = ["brute_force", "random_problem", "solved"]


@functools.cache
def solved(seed: int, ties: bool) -> tuple[Problem, float]:
    """`random_problem` and its `brute_force` value, computed once for all solvers of a test run."""
    problem = random_problem(seed, ties=ties)
    return problem, brute_force(problem)


def random_problem(
    seed: int, *, ties: bool = True, pins: bool = True, side: bool = False, tightness: float | None = None
) -> Problem:
    """Up to 7 units x 5 formats; non-convex damages, forbidden cells, equal sizes, ties, pins.

    The limit lies between the smallest and the largest allocation, so the problem can always be solved
    (side budgets are set from a random allocation that fits).
    """
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 8)), int(rng.integers(1, 6))
    bits = np.sort(rng.choice(np.arange(2, 17), k, replace=False))
    sizes = rng.choice([64, 96, 1000, 1111], n) if rng.random() < 0.5 else rng.integers(1, 3000, n)
    size = sizes[:, None] * bits
    damage = rng.lognormal(0, 2, n)[:, None] * 4.0**-bits
    if rng.random() < 0.7:
        damage = damage * rng.lognormal(0, 0.8, damage.shape)
    if rng.random() < 0.2:
        damage = damage - 0.3 * damage.max()
    if rng.random() < 0.2:
        damage = damage.round(3)
    if rng.random() < 0.3:
        # The first format stays, so that ties and pins always leave something.
        damage[:, 1:][rng.random((n, k - 1)) < 0.2] = np.nan
    units = tuple(f"layer.{i}" for i in range(n))
    formats = tuple(f"int{b}" for b in bits)
    groups: list[TieGroup] = []
    if ties and n > 2 and rng.random() < 0.7:
        members = rng.permutation(n)[: int(rng.integers(2, n))]
        groups.append(TieGroup("a", tuple(units[i] for i in members)))
        if rng.random() < 0.4:
            groups.append(TieGroup("b", tuple(units[i] for i in rng.permutation(n)[:2])))
    pinned: dict[str, str] = {}
    if pins and rng.random() < 0.5:
        unit = int(rng.integers(n))
        tied = {u for g in groups if units[unit] in g.units for u in g.units} | {units[unit]}
        for g in groups:
            tied |= set(g.units) if tied & set(g.units) else set()
        rows = [units.index(u) for u in tied]
        options = np.flatnonzero(np.isfinite(damage[rows]).all(axis=0))
        pinned[units[unit]] = formats[int(rng.choice(options))]
    problem = Problem.of(
        damage, size, 0, units=units, formats=formats, ties=groups, pins=pinned,
        params=sizes, layers=np.arange(n) // 2, roles=[("q", "v", "down")[i % 3] for i in range(n)],
    )  # fmt: skip
    c = problem.classes
    low = problem.min_bytes
    high = int(np.where(c.allowed, c.bytes, 0).max(axis=1).sum())
    share = rng.uniform(0, 1.05) if tightness is None else tightness
    problem = problem.with_limit(low + int(share * (high - low)))
    if not side:
        return problem
    latency = rng.integers(1, 50, (n, k)).astype(float)
    fits = [p for p in _allocations(problem) if problem.payload(p) <= problem.limit_bytes]
    some = fits[int(rng.integers(len(fits)))]
    limit = float(latency[np.arange(n), some].sum())
    return Problem.of(
        damage, size, problem.limit_bytes, units=units, formats=formats, ties=groups, pins=pinned,
        side=[SideBudget("latency", latency, limit)],
    )  # fmt: skip


def _allocations(problem: Problem) -> list[np.ndarray]:
    """Every allocation (U,) that allowed formats and ties permit; plain loops over the raw fields."""
    options = [[j for j in range(len(problem.formats)) if row[j]] for row in problem.allowed]
    position = {u: i for i, u in enumerate(problem.units)}
    out = []
    for choice in itertools.product(*options):
        if all(len({choice[position[u]] for u in tie.units}) == 1 for tie in problem.ties):
            out.append(np.array(choice))
    return out


def brute_force(problem: Problem) -> float:
    """Least damage over all allocations within every limit.

    Raises:
        UserError: there is none.
    """
    rows = np.arange(len(problem.units))
    best = None
    for choice in _allocations(problem):
        if problem.bytes[rows, choice].sum() > problem.limit_bytes:
            continue
        if any(s.cost[rows, choice].sum() > s.limit + 1e-9 for s in problem.side):
            continue
        value = float(problem.damage[rows, choice].sum())
        best = value if best is None or value < best else best
    if best is None:
        raise UserError("nothing fits")
    return best
