"""Tied units merged into classes: the multiple-choice knapsack that the solvers see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bitatlas.analysis.schema import TieGroup, UserError

__all__ = ["Classes", "merge_ties", "tie_labels"]


@dataclass(frozen=True, eq=False)
class Classes:
    """One row per class of units that share a format.

    Attributes:
        of_unit: (U,) int64 class of each unit.
        damage: (C, F) float64 summed damage, inf where not allowed.
        bytes: (C, F) int64 summed bytes.
        allowed: (C, F) bool.
    """

    of_unit: np.ndarray
    damage: np.ndarray
    bytes: np.ndarray
    allowed: np.ndarray

    @cached_property
    def _untied(self) -> bool:
        """Every unit is a class of its own, in order."""
        return len(self.of_unit) == len(self.bytes) and bool((np.diff(self.of_unit) == 1).all())

    def expand(self, choice: np.ndarray) -> np.ndarray:
        """Format index per unit (U,) from format index per class (C,)."""
        found = np.asarray(choice, np.int64)
        return found.copy() if self._untied else found[self.of_unit]

    def rows(self, which: np.ndarray) -> Classes:
        """These classes (n,) alone, without their units."""
        return Classes(np.arange(len(which)), self.damage[which], self.bytes[which], self.allowed[which])

    def expand_back(self, choice: np.ndarray) -> np.ndarray:
        """Format index per class (C,) from format index per unit (U,): the inverse of `expand`."""
        out = np.empty(len(self.bytes), np.int64)
        out[self.of_unit] = choice
        return out

    def smallest(self) -> np.ndarray:
        """(C,) the format with the fewest bytes; among equals the least damage."""
        size = np.where(self.allowed, self.bytes, np.iinfo(np.int64).max)
        least = size == size.min(axis=1, keepdims=True)
        damage = np.where(least, np.nan_to_num(self.damage, nan=0.0, posinf=np.inf), np.inf)
        # A class whose least-bytes options all carry an infinite damage still needs one of them.
        return np.where(np.isfinite(damage).any(axis=1), damage.argmin(axis=1), least.argmax(axis=1))

    def smallest_bytes(self) -> np.ndarray:
        """(C,) int64 bytes of the smallest allowed format."""
        return np.where(self.allowed, self.bytes, np.iinfo(np.int64).max).min(axis=1)

    def payload(self, choice: np.ndarray) -> int:
        """Bytes of a choice (C,)."""
        return int(self.bytes[np.arange(len(self.bytes)), choice].sum())

    def objective(self, choice: np.ndarray) -> float:
        """Damage of a choice (C,)."""
        return float(self.damage[np.arange(len(self.damage)), choice].sum())


def tie_labels(units: Sequence[str], ties: Sequence[TieGroup]) -> np.ndarray:
    """(U,) int64 class of each unit, numbered by first appearance; groups that overlap become one.

    Raises:
        UserError: a tie that names an unknown unit.
    """
    parent = np.arange(len(units))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    position = {key: i for i, key in enumerate(units)} if ties else {}
    for tie in ties:
        unknown = [u for u in tie.units if u not in position]
        if unknown:
            raise UserError(
                f"the tie {tie.name!r} names a unit that the model does not have", found=unknown[0]
            )
        for unit in tie.units[1:]:
            a, b = root(position[tie.units[0]]), root(position[unit])
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(units))], np.int64) if ties else parent
    # Roots are the smallest member, so np.unique numbers the classes by first appearance.
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def merge_ties(
    units: Sequence[str],
    damage: np.ndarray,
    bytes_table: np.ndarray,
    allowed: np.ndarray,
    ties: Sequence[TieGroup],
) -> Classes:
    """Sum damage and bytes over tied units; a format is allowed where every member allows it. (U, F) in."""
    labels = tie_labels(units, ties)
    shape = (int(labels.max()) + 1, damage.shape[1])
    if shape[0] == len(units):
        return Classes(labels, np.where(allowed, damage, np.inf), bytes_table, allowed)
    joint = np.ones(shape, bool)
    np.logical_and.at(joint, labels, allowed)
    summed, size = np.zeros(shape), np.zeros(shape, np.int64)
    np.add.at(summed, labels, np.where(allowed, damage, 0.0))
    np.add.at(size, labels, bytes_table)
    return Classes(labels, np.where(joint, summed, np.inf), size, joint)
