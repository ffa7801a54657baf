"""The independent check of a solution. Shares no code with the solvers: it reads the problem's raw arrays.

The lower bound is the Lagrangian dual: for every mu >= 0, no allocation within the budget has less damage
than ``sum_classes min_b (damage + mu * bytes) - mu * limit``. Its maximum over mu is the bound of the linear
relaxation. Side budgets enter with multipliers that a solver may propose: whatever they are, the bound is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bitatlas.solvers.problem import Problem

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was checked.

    Attributes:
        feasible: allowed formats, pins, ties, bytes and side budgets all hold.
        payload_bytes: recomputed bytes of the units.
        objective: recomputed sum of damages; NaN when some damage is unknown.
        lower_bound: no allocation within ``limit_bytes`` has less damage than this; NaN with the objective.
        gap: (objective - lower_bound) / |objective|, 0 when both are 0.
        imputed: units whose damage is an estimate because they were never measured.
        quadratic: damage with cross-unit terms; NaN without an interaction factor.
        violations: what does not hold, in words; empty when feasible.
    """

    feasible: bool
    payload_bytes: int
    objective: float
    lower_bound: float
    gap: float
    imputed: int = 0
    quadratic: float = float("nan")
    violations: tuple[str, ...] = ()


def certify(problem: Problem, choice: np.ndarray, multipliers: Sequence[float] = ()) -> Certificate:
    """Check ``choice`` (U,) of format indices against the problem; ``multipliers`` (one per side budget) sharpen the bound."""
    choice = np.asarray(choice)
    n, k = problem.damage.shape
    if choice.shape != (n,) or not np.issubdtype(choice.dtype, np.integer):
        return _rejected(
            f"choice has shape {choice.shape} and type {choice.dtype}, ({n},) integers are needed"
        )
    if ((choice < 0) | (choice >= k)).any():
        return _rejected("a format index is out of range")
    rows = np.arange(n)
    wrong: list[str] = []
    if not problem.allowed[rows, choice].all():
        first = int(np.flatnonzero(~problem.allowed[rows, choice])[0])
        wrong.append(f"{problem.units[first]} has a format that is not allowed")
    position = {key: i for i, key in enumerate(problem.units)}
    wrong += [
        f"{unit} is pinned to {name}"
        for unit, name in problem.pins.items()
        if problem.formats[choice[position[unit]]] != name
    ]
    wrong += [
        f"the units of {tie.name!r} differ"
        for tie in problem.ties
        if len({int(choice[position[u]]) for u in tie.units}) > 1
    ]
    # Python integers: a sum of bytes never wraps.
    payload = sum(problem.bytes[rows, choice].tolist())
    if payload > problem.limit_bytes:
        wrong.append(f"{payload} bytes, {problem.limit_bytes} allowed")
    for side in problem.side:
        used = float(side.cost[rows, choice].sum())
        if used > side.limit + 1e-9 * abs(side.limit) + 1e-12:
            wrong.append(f"{side.name}: {used:g}, {side.limit:g} allowed")
    objective = float(np.sum(problem.damage[rows, choice]))
    bound = lower_bound(problem) if np.isfinite(objective) else float("nan")
    if len(multipliers) == len(problem.side) and any(m > 0 for m in multipliers) and np.isfinite(bound):
        bound = max(bound, _bound_with_sides(problem, multipliers))
    return Certificate(
        feasible=not wrong,
        payload_bytes=int(payload),
        objective=objective,
        lower_bound=bound,
        gap=_relative_gap(objective, bound),
        imputed=int(problem.imputed.sum()),
        quadratic=_quadratic(problem, choice),
        violations=tuple(wrong),
    )


def _bound_with_sides(problem: Problem, multipliers: Sequence[float]) -> float:
    """The dual with the side budgets priced: least damage + price, less the price of what the limits allow."""
    damage, allowance = problem.damage.copy(), 0.0
    for side, m in zip(problem.side, multipliers):
        damage += max(m, 0.0) * side.cost
        allowance += max(m, 0.0) * side.limit
    return lower_bound(replace(problem, damage=damage, side=())) - allowance


def _rejected(why: str) -> Certificate:
    nan = float("nan")
    return Certificate(False, 0, nan, nan, nan, violations=(why,))


def _relative_gap(objective: float, bound: float) -> float:
    """Relative distance to the bound; differences below float64's resolution count as none."""
    if not (np.isfinite(objective) and np.isfinite(bound)):
        return float("nan")
    scale = max(abs(objective), abs(bound))
    distance = objective - bound
    return 0.0 if scale == 0 or abs(distance) <= 1e-12 * scale else distance / scale


def _quadratic(problem: Problem, choice: np.ndarray) -> float:
    """The same figure as ``Problem.quadratic``, one probe at a time."""
    if problem.interaction is None:
        return float("nan")
    total, rows = 0.0, np.arange(len(choice))
    for probe in problem.interaction:  # (U, F)
        a = probe[rows, choice].astype(np.float64)
        total += float(a.sum()) ** 2 - float(a @ a)
    cross = total / len(problem.interaction)
    additive = float(problem.damage[rows, choice].sum())
    return additive + problem.shrinkage * problem.interaction_scale * cross


def lower_bound(problem: Problem) -> float:
    """Maximum of the Lagrangian dual over the byte multiplier; inf when nothing fits.

    The dual is concave and piecewise linear. The maximum is bracketed, then narrowed by intersecting the
    two tangents (bisection where that does not shrink the bracket); every value on the way is a valid bound.
    """
    damage, size, allowed = _merged(problem)
    if not allowed.any(axis=1).all():
        return float("inf")
    low_bytes = np.where(allowed, size, np.iinfo(np.int64).max).min(axis=1)
    room = problem.limit_bytes - int(low_bytes.sum())
    if room < 0:
        return float("inf")
    base = np.where(allowed, damage, 0.0).min(axis=1)
    unit = float(np.max(np.where(allowed, damage, base[:, None]) - base[:, None]))
    if not np.isfinite(unit):
        return float("nan")
    unit = unit or 1.0
    cost = np.where(allowed, (damage - base[:, None]) / unit, np.inf)  # (C, F) in 0..1
    extra = size - low_bytes[:, None]  # (C, F) int64 >= 0 where allowed
    rows = np.arange(len(cost))
    # Ties at equal damage + mu * bytes go to the cheaper option only through mu > 0; mu = 0 needs the sort.
    order = np.argsort(np.where(allowed, extra, np.iinfo(np.int64).max), axis=1, kind="stable")
    cost, extra = np.take_along_axis(cost, order, 1), np.take_along_axis(extra, order, 1)

    def dual(mu: float) -> tuple[float, int]:
        pick = np.argmin(cost + mu * extra, axis=1)
        slope = int(extra[rows, pick].sum()) - room
        return float(cost[rows, pick].sum()) + mu * slope, slope

    value, slope = dual(0.0)
    best = value
    low, high = (0.0, value, slope), (1.0 / max(int(extra.max()), 1), 0.0, 0)
    if slope > 0:
        for _ in range(200):
            value, slope = dual(high[0])
            high = (high[0], value, slope)
            best = max(best, value)
            if slope <= 0:
                break
            low, high = high, (high[0] * 4, 0.0, 0)
        for step in range(120):
            if low[2] == high[2]:
                break
            mu = (low[1] - low[2] * low[0] - high[1] + high[2] * high[0]) / (high[2] - low[2])
            if step % 3 == 2 or not low[0] < mu < high[0]:
                mu = (low[0] + high[0]) / 2
            value, slope = dual(mu)
            best = max(best, value)
            if mu in (low[0], high[0]) or slope == 0:
                break
            low, high = ((mu, value, slope), high) if slope > 0 else (low, (mu, value, slope))
    return float(base.sum()) + best * unit


def _merged(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damage (C, F), bytes (C, F) and allowed (C, F) with the units of each tie added up."""
    group = {key: i for i, key in enumerate(problem.units)}
    members = {i: [key] for i, key in enumerate(problem.units)}
    for tie in problem.ties:
        first = group[tie.units[0]]
        for unit in tie.units[1:]:
            other = group[unit]
            if other != first:
                for key in members[other]:
                    group[key] = first
                members[first] += members.pop(other)
    number = {g: c for c, g in enumerate(members)}
    label = np.array([number[group[key]] for key in problem.units])
    damage = np.zeros((len(members), len(problem.formats)))
    size = np.zeros(damage.shape, np.int64)
    forbidden = np.zeros(damage.shape, np.int64)
    np.add.at(damage, label, np.where(problem.allowed, problem.damage, 0.0))
    np.add.at(size, label, problem.bytes)
    np.add.at(forbidden, label, ~problem.allowed)
    return damage, size, forbidden == 0
