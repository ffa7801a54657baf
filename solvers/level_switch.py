"""EvoPress's level switch with a budget in bytes: some classes go a level up, others pay for it by going down.

Limits on the bytes of groups are kept like the budget: what a move puts above one is paid for inside the group.
"""

from __future__ import annotations

import numpy as np

from bitatlas.solvers.byte_groups import byte_groups
from bitatlas.solvers.problem import Problem

__all__ = ["LevelSwitch"]


class LevelSwitch:
    """Mutations and random starts on the ladders of formats.

    Args:
        problem: its classes of tied units are what moves.
        groups: ``size`` (classes with the same bytes in every format exchange among themselves), ``name`` (the same
            role), ``none`` (all with all).
    """

    def __init__(self, problem: Problem, groups: str = "size") -> None:
        c = problem.classes
        self.limit = problem.limit_bytes
        self._limited = byte_groups(problem)
        self._label = np.full(len(c.bytes), -1) if self._limited is None else self._limited.label
        self._rows = np.arange(len(c.bytes))
        self.top = c.allowed.sum(axis=1) - 1
        # (C, F) formats of a class by bytes, the forbidden ones last; beyond the top rung the last one again.
        by_size = np.argsort(np.where(c.allowed, c.bytes, np.iinfo(np.int64).max), axis=1, kind="stable")
        at = np.minimum(np.arange(c.bytes.shape[1]), self.top[:, None])
        self.rung = np.take_along_axis(by_size, at, axis=1)
        self.size = np.take_along_axis(c.bytes, self.rung, axis=1)
        first = np.full(len(c.bytes), -1)
        first[c.of_unit[::-1]] = np.arange(len(c.of_unit))[::-1]  # a class goes by its first unit
        keys: list[object] = [0] * len(first)
        if groups == "size":
            keys = [tuple(row) for row in np.where(c.allowed, c.bytes, -1).tolist()]
        elif groups == "name":
            keys = [problem.roles[u] for u in first]
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.group = np.array([number[key] for key in keys])  # (C,)

    def level(self, choice: np.ndarray) -> np.ndarray:
        """(C,) position of a choice (C,) on its ladders."""
        return (self.rung == np.asarray(choice)[:, None]).argmax(axis=1)

    def formats(self, level: np.ndarray) -> np.ndarray:
        """(C,) choice of levels."""
        return self.rung[self._rows, level]

    def payload(self, level: np.ndarray) -> int:
        """Bytes of levels (C,)."""
        return int(self.size[self._rows, level].sum())

    def _left(self, level: np.ndarray) -> np.ndarray:
        """(G,) bytes that each limited group has left."""
        if self._limited is None:
            return np.zeros(0, np.int64)
        return self._limited.left(self.size[self._rows, level])

    def step_bytes(self, level: np.ndarray, by: int) -> np.ndarray:
        """(C,) bytes that a class gains (``by`` = 1) or frees (-1) by its next level; -1 at the end of its ladder."""
        to = level + by
        there = (to >= 0) & (to <= self.top)
        change = np.abs(self.size[self._rows, np.clip(to, 0, self.top)] - self.size[self._rows, level])
        return np.where(there, change, -1)

    def mutate(self, level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """k = min(U{1..3}, U{1..3}) switches in groups drawn by their size; within the budget and filled again.

        Where all steps are equal, as in EvoPress, the bytes stay exactly what they were; where they are not
        (4 -> 5 bits against 8 -> 6, or matrices of different size), further classes go down until it fits, and up again
        while something fits.
        """
        level = level.copy()
        for _ in range(int(min(rng.integers(1, 4), rng.integers(1, 4)))):
            mine = self.group == self.group[int(rng.integers(len(level)))]
            up = np.flatnonzero(mine & (self.step_bytes(level, 1) >= 0))
            if not len(up):
                continue
            raised = int(rng.choice(up))
            down = np.flatnonzero(mine & (self.step_bytes(level, -1) >= 0))
            down = down[down != raised]
            if not len(down):
                continue
            level[raised] += 1
            level[int(rng.choice(down))] -= 1
            self.lower(level, rng, mine, raised)
            self.fill(level, rng)
        return level

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """(C,) levels: the smallest common level beyond the budget (groups kept to theirs), lowered at random until it fits."""
        level = np.zeros(len(self.top), np.int64)
        for common in range(int(self.top.max()) + 1):
            level = np.minimum(common, self.top)
            self._keep_groups(level, rng)
            if self.payload(level) > self.limit:
                break
        self.lower(level, rng)
        self.fill(level, rng)
        return level

    def lower(
        self, level: np.ndarray, rng: np.random.Generator, mine: np.ndarray | None = None, spared: int = -1
    ) -> None:
        """Lower random classes (of ``mine``, and not ``spared``, while others can) in place until every limit holds."""
        self._keep_groups(level, rng, mine, spared)
        everything = np.ones(len(level), bool)
        self._free(level, rng, self.payload(level) - self.limit, everything, mine, spared)

    def _keep_groups(
        self, level: np.ndarray, rng: np.random.Generator, mine: np.ndarray | None = None, spared: int = -1
    ) -> None:
        """Lower classes of the groups that are above their limits, in place."""
        left = self._left(level)
        for g in np.flatnonzero(left < 0).tolist():
            inside = self._label == g
            self._free(level, rng, -int(left[g]), inside, None if mine is None else mine & inside, spared)

    def _free(
        self, level: np.ndarray, rng: np.random.Generator, excess: int, among: np.ndarray, mine: np.ndarray | None, spared: int
    ) -> None:  # fmt: skip
        """Lower classes of ``among`` in place until ``excess`` bytes are free; some of ``mine`` while there are any."""
        while excess > 0:
            freed = self.step_bytes(level, -1)
            able = np.flatnonzero((among if mine is None else mine) & (freed > 0))
            if not len(able):
                # Where the next format down has the same bytes, the one below it frees some.
                able, mine = np.flatnonzero(among & (freed > 0)), None
                able = able if len(able) else np.flatnonzero(among & (freed >= 0))
            at = int(rng.choice(able[able != spared] if (able != spared).any() else able))
            excess -= int(freed[at])
            level[at] -= 1

    def fill(self, level: np.ndarray, rng: np.random.Generator) -> None:
        """Raise random classes in place while one fits into the budget and into its group."""
        room = self.limit - self.payload(level)
        # Classes without a group share a last one that is never full.
        left = np.append(self._left(level), np.iinfo(np.int64).max // 2)
        while room > 0:
            more = self.step_bytes(level, 1)
            able = np.flatnonzero((more > 0) & (more <= room) & (more <= left[self._label]))
            if not len(able):
                return
            at = int(rng.choice(able))
            room -= int(more[at])
            left[self._label[at]] -= int(more[at])
            level[at] += 1
