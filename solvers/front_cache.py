"""The whole convex front of a problem from one sort, and any budget on it in about a millisecond.

Multiple-choice knapsack, linear relaxation (Sinha & Zoltners 1979): keep each class's lower convex hull of
(bytes, damage), sort all hull steps by damage saved per byte; prefix sums are the supported front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bitatlas.solvers.byte_groups import ByteGroups, Caps, byte_groups, cap_steps
from bitatlas.solvers.classes import Classes
from bitatlas.solvers.problem import Problem

__all__ = ["FrontCache", "FrontPoint", "fill"]

_CHUNK = 16_384  # steps between two stored allocations
_AHEAD = 4_096  # steps behind the budget whose classes may spend what is left


class FrontPoint(NamedTuple):
    """One budget's answer: choice (U,), its bytes and damage, the relaxation's bound, and the slope.

    ``slope`` is the damage that the next byte would save, 0 when nothing is left to gain.
    """

    choice: np.ndarray
    payload_bytes: int
    objective: float
    lower_bound: float
    slope: float


@dataclass(frozen=True, eq=False)
class FrontCache:
    """All supported points of one problem, for every budget.

    Attributes:
        classes: the merged problem.
        hull: (C, F) int64 format index at each level of a class's hull, the last level repeated.
        step_class: (M,) class of each step, best slope first; step_slope: (M,) damage saved per byte.
        cum_bytes: (M + 1,) int64 payload after k steps; cum_damage: (M + 1,) float64.
        step_to: (M,) uint8 format index of the class after its step.
        groups, caps: limits on the bytes of groups of units, and where they cut the steps; None without.
    """

    classes: Classes
    hull: np.ndarray
    step_class: np.ndarray
    step_slope: np.ndarray
    cum_bytes: np.ndarray
    cum_damage: np.ndarray
    step_to: np.ndarray
    groups: ByteGroups | None = None
    caps: Caps | None = None

    @classmethod
    def of(cls, problem: Problem) -> FrontCache:
        """Hulls of all classes and one sort. O(C F^2 + M log M).

        Raises:
            UserError: side budgets that are no limits on the bytes of separate groups of units.
        """
        c = problem.classes
        order = _by_bytes(c)  # cheapest first; among equals the least damage
        w = np.take_along_axis(np.where(c.allowed, c.bytes, np.iinfo(np.int64).max), order, 1).astype(
            np.float64
        )
        d = np.take_along_axis(c.damage, order, 1)
        n, k = w.shape
        hull = np.repeat(order[:, :1], k, axis=1)
        at, live, last = np.zeros(n, np.int64), np.arange(n), np.full(n, np.inf)
        steps: list[tuple[np.ndarray, ...]] = []
        for level in range(1, k):
            here = at[live]
            here_w, here_d = w[live, here][:, None], d[live, here][:, None]
            run, drop = w[live] - here_w, here_d - d[live]
            with np.errstate(invalid="ignore", divide="ignore"):
                slope = np.where((run > 0) & (drop > 0), drop / run, -1.0)
            # The farthest of equal slopes, so that every hull step is strict.
            best = k - 1 - np.argmax(slope[:, ::-1], axis=1)
            top = slope[np.arange(len(live)), best]
            moved = top > 0
            live, best = live[moved], best[moved]
            if not live.size:
                break
            # Rounding may lift a slope above its predecessor; the order within a class must hold.
            last[live] = np.minimum(last[live], top[moved])
            before, after = hull[live, level], order[live, best]
            steps.append((live, last[live], c.bytes[live, after] - c.bytes[live, before],
                          c.damage[live, before] - c.damage[live, after], after.astype(np.uint8)))  # fmt: skip
            hull[live, level:] = after[:, None]
            at[live] = best
        owner, slopes, extra, saved, after = (
            (np.concatenate(parts) for parts in zip(*steps)) if steps else (np.zeros(0, int),) * 5
        )
        sort = np.argsort(-slopes, kind="stable")  # stable: levels of a class stay in order
        first = hull[:, 0]
        groups, caps = byte_groups(problem), None
        if groups is not None:
            left = groups.left(c.bytes[np.arange(n), first])
            caps = cap_steps(groups, owner[sort], slopes[sort], extra[sort], left)
            sort = sort[caps.keep]
        cum_bytes = np.concatenate([[c.payload(first)], extra[sort]]).astype(np.int64).cumsum()
        # A million savings are taken off one large sum; the little that remains must not be their rounding.
        fine = np.concatenate([[c.objective(first)], -saved[sort]]).cumsum(dtype=np.longdouble)
        cum_damage = fine.astype(np.float64)
        return cls(
            c,
            hull,
            owner[sort],
            slopes[sort],
            cum_bytes,
            cum_damage,
            after[sort].astype(np.uint8),
            groups,
            caps,
        )

    def steps_within(self, limit_bytes: int) -> int:
        """How many steps fit, -1 when not even the smallest allocation does."""
        return int(np.searchsorted(self.cum_bytes, limit_bytes, side="right")) - 1

    @cached_property
    def _stored(self) -> np.ndarray:
        """(M // _CHUNK + 1, C) uint8: the classes' formats after every `_CHUNK` steps."""
        out = np.empty((len(self.step_to) // _CHUNK + 1, len(self.hull)), np.uint8)
        out[0] = self.hull[:, 0]
        for i in range(1, len(out)):
            out[i] = out[i - 1]
            self._walk(out[i], (i - 1) * _CHUNK, i * _CHUNK)
        return out

    def _walk(self, choice: np.ndarray, start: int, end: int) -> None:
        # A class that steps twice has its later format last, and the last assignment stays.
        choice[self.step_class[start:end]] = self.step_to[start:end]

    def class_choice(self, steps: int) -> np.ndarray:
        """(C,) format index after ``steps`` steps: the nearest stored allocation before, and the few steps since."""
        at = steps // _CHUNK
        choice = self._stored[at].copy()
        self._walk(choice, at * _CHUNK, steps)
        return choice.astype(np.int64)

    def at(self, limit_bytes: int, *, filled: bool = True) -> FrontPoint:
        """Best supported allocation within ``limit_bytes``, then single moves while any still fits.

        The moves are looked for among the classes of the next `_AHEAD` steps: what is left is less than one step takes, and
        the classes with the best slopes make the most of it. No pass over all classes and formats is made.

        Raises:
            ValueError: nothing fits; `solvers.infeasible.check_feasible` explains it to a user.
        """
        k = self.steps_within(limit_bytes)
        if k < 0:
            raise ValueError(f"{limit_bytes} bytes, the smallest allocation takes {int(self.cum_bytes[0])}")
        choice = self.class_choice(k)
        slope = float(self.step_slope[k]) if k < len(self.step_slope) else 0.0
        payload, objective = int(self.cum_bytes[k]), float(self.cum_damage[k])
        bound = objective - slope * (limit_bytes - payload)
        near = np.unique(self.step_class[k : k + _AHEAD])
        rooms = None
        if self.groups is not None and self.caps is not None:
            worth = self.caps.multipliers(slope)
            bound -= float(worth @ self.caps.room)
            near = np.unique(np.concatenate([near, *(self.caps.near[g] for g in np.flatnonzero(worth))]))
            label, left = self.groups.rooms(self.classes, choice)
            rooms = label[near], left
        if filled and near.size:
            part, before = self.classes.rows(near), choice[near]
            after = fill(part, before, part.payload(before) + limit_bytes - payload, rooms)
            choice[near] = after
            payload += part.payload(after) - part.payload(before)
            objective += part.objective(after) - part.objective(before)
        return FrontPoint(self.classes.expand(choice), payload, objective, bound, slope)


def _by_bytes(c: Classes) -> np.ndarray:
    """(C, F) columns of each class by bytes, then damage; forbidden ones last."""
    if c.allowed.all() and (np.diff(c.bytes, axis=1) > 0).all():
        return np.broadcast_to(np.arange(c.bytes.shape[1]), c.bytes.shape)
    size = np.where(c.allowed, c.bytes, np.iinfo(np.int64).max)
    return np.lexsort((c.damage, size), axis=1)


def fill(
    classes: Classes, choice: np.ndarray, limit_bytes: int, rooms: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Spend what is left: again and again the single change that saves most and still fits. (C,) -> (C,).

    Args:
        rooms: group of each class (C,), -1 = none, and the bytes (G,) that each group has left.
    """
    out = np.array(choice, np.int64)
    rows = np.arange(len(out))
    room = limit_bytes - classes.payload(out)
    # Classes without a group share a last one that is never full.
    label, left = rooms if rooms is not None else (np.full(len(out), -1), np.zeros(0, np.int64))
    left = np.append(left, np.iinfo(np.int64).max // 2)
    extra = classes.bytes - classes.bytes[rows, out][:, None]
    gain = classes.damage[rows, out][:, None] - classes.damage
    owner, option = np.nonzero((gain > 0) & (extra <= room) & classes.allowed)
    extra, gain = extra[owner, option], gain[owner, option]
    while True:
        keep = (extra <= room) & (gain > 0) & (extra <= left[label[owner]])
        owner, option, extra, gain = owner[keep], option[keep], extra[keep], gain[keep]
        if not owner.size:
            return out
        best = int(np.argmax(gain))
        taken, cost, won = int(owner[best]), int(extra[best]), float(gain[best])
        out[taken] = option[best]
        room -= cost
        left[label[taken]] -= cost
        same = owner == taken
        extra = np.where(same, extra - cost, extra)
        gain = np.where(same, gain - won, gain)
