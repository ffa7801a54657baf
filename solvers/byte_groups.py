"""Limits on the bytes of groups of units, on the convex front: a group's steps end where its limit ends.

Groups share no unit, so the linear relaxation splits: within a group steps are taken by slope until its limit, over all groups
by slope until the budget. The slopes of the steps that broke a limit are the dual multipliers (Dantzig 1957, bounded variables).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.classes import Classes
from bitatlas.solvers.problem import Problem

__all__ = ["ByteGroups", "Caps", "byte_groups", "cap_steps"]

_NEAR = 256  # steps behind a group's limit whose classes may spend what is left of it


@dataclass(frozen=True, eq=False)
class ByteGroups:
    """label (C,): group of each class, -1 = none; limits (G,) int64 bytes."""

    label: np.ndarray
    limits: np.ndarray

    def left(self, taken: np.ndarray) -> np.ndarray:
        """(G,) int64 bytes still free, from the bytes (C,) that each class takes."""
        inside = self.label >= 0
        used = np.bincount(self.label[inside], taken[inside], len(self.limits))  # exact below 2^53 bytes
        return self.limits - used.astype(np.int64)

    def rooms(self, classes: Classes, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `front_cache.fill` keeps to: group of each class (C,), and the bytes (G,) that each has left under a choice (C,)."""
        return self.label, self.left(classes.bytes[np.arange(len(choice)), choice])


@dataclass(frozen=True, eq=False)
class Caps:
    """Where each group's limit cuts its steps.

    Attributes:
        keep: (M,) bool, the steps that stay.
        slope: (G,) damage per byte of the step that broke the limit, 0 where none did.
        room: (G,) bytes left before it.
        near: for each group, classes of the first steps that were cut.
    """

    keep: np.ndarray
    slope: np.ndarray
    room: np.ndarray
    near: tuple[np.ndarray, ...]

    def multipliers(self, slope: float) -> np.ndarray:
        """(G,) dual multipliers of the limits when a byte is worth ``slope`` overall."""
        return np.maximum(self.slope - slope, 0.0)


def byte_groups(problem: Problem) -> ByteGroups | None:
    """The side budgets as groups of classes; None without side budgets.

    Raises:
        UserError: a limit on something else than bytes, groups that overlap or cut through tied units, a limit below
            what the group takes at least.
    """
    if not problem.side:
        return None
    of_unit = np.full(len(problem.units), -1)
    for g, side in enumerate(problem.side):
        members = (side.cost != 0).any(axis=1)
        if not np.array_equal(side.cost[members], problem.bytes[members]):
            raise UserError("this solver limits the bytes of groups of units, nothing else", found=side.name, fix="use ilp")  # fmt: skip
        if (of_unit[members] >= 0).any():
            raise UserError("a unit is in two groups that have limits", found=side.name, fix="use ilp")
        of_unit[members] = g
    c = problem.classes
    label = np.empty(len(c.bytes), np.int64)
    label[c.of_unit] = of_unit
    if (label[c.of_unit] != of_unit).any():
        raise UserError("units that must share a format are in different groups", fix="group by something that keeps them together, or use ilp")  # fmt: skip
    groups = ByteGroups(label, np.array([int(s.limit) for s in problem.side], np.int64))
    short = np.flatnonzero(groups.left(c.smallest_bytes()) < 0)
    if short.size:
        side = problem.side[int(short[0])]
        least = int(c.smallest_bytes()[label == short[0]].sum())
        raise UserError(f"the limit on {side.name} cannot be met", found=f"{int(side.limit):,} bytes",
                        fix=f"allow it {least:,} bytes, or smaller formats")  # fmt: skip
    return groups


def cap_steps(
    groups: ByteGroups, owner: np.ndarray, slope: np.ndarray, extra: np.ndarray, left: np.ndarray
) -> Caps:
    """Cut the steps (M,), best slope first, at the groups' limits.

    Args:
        owner, slope, extra: class, damage saved per byte and bytes of each step; left: (G,) bytes free before the first.
    """
    keep = np.ones(len(owner), bool)
    cut, room, near = np.zeros(len(left)), left.astype(np.float64), []
    label = groups.label[owner]
    order = np.argsort(label, kind="stable")  # inside a group the steps stay in order
    first = np.searchsorted(label[order], np.arange(len(left) + 1))
    for g in range(len(left)):
        mine = order[first[g] : first[g + 1]]
        total = extra[mine].cumsum()
        n = int(np.searchsorted(total, left[g], side="right"))
        keep[mine[n:]] = False
        room[g] = left[g] - (total[n - 1] if n else 0)
        cut[g] = slope[mine[n]] if n < len(mine) else 0.0
        near.append(np.unique(owner[mine[n : n + _NEAR]]))
    return Caps(keep, cut, room, tuple(near))
