"""SliM-LLM's double pointer with units in place of groups of columns: as many bytes a step up as a step down."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import Found, Solver
from bitatlas.solvers.code_bits import effective_bits
from bitatlas.solvers.front_cache import fill
from bitatlas.solvers.mixes import neighbours
from bitatlas.solvers.problem import Problem
from bitatlas.solvers.uniform import spread

__all__ = ["DoublePointer", "pointers"]


class DoublePointer(Solver):
    """Within each block the least salient units go a format down and pay for the most salient ones going up.

    Published: groups of 128 input columns within a matrix, k of them at b - 1 bits and k at b + 1, k by a double pointer
    and the KL of the matrix's outputs. A unit has one format here, so units of a block take the groups' place
    (`docs/decisions.md`): b is the widest format that fits everywhere, salience is the damage at b per weight, and of all
    stops of the two pointers the one with the least summed damage counts, staying at b included. Equal numbers become
    equal bytes: what goes up never costs more than what went down freed. Units outside the blocks stay at b. What the
    budget leaves above b goes to the most salient units of all blocks, a step each, and then to what still fits.
    """

    NAME: ClassVar[str] = "double_pointer"
    TITLE: ClassVar[str] = "SliM-LLM-style double pointer (units)"
    SOURCE: ClassVar[str] = (
        "after SliM-LLM (arXiv 2405.14917), salience-determined bit allocation; units for groups"
    )
    METRICS: ClassVar[tuple[str, ...]] = ("slim_uniform", "slim_salience")

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        middle, high = neighbours(problem)
        low = _below(problem, middle)
        rows = np.arange(len(middle))
        damage = np.stack([c.damage[rows, at] for at in (low, middle, high)], axis=1)  # (C, 3)
        size = np.stack([c.bytes[rows, at] for at in (low, middle, high)], axis=1)
        salience = damage[:, 1] / effective_bits(problem)[1]
        move = np.zeros(len(middle), np.int64)
        block = _blocks(problem)
        stops = 0
        for b in np.unique(block[block >= 0]):
            mine = np.flatnonzero(block == b)
            order = mine[np.argsort(salience[mine], kind="stable")]
            move[order], tried = pointers(damage[order], size[order])
            stops += tried
        room = problem.limit_bytes - int(size[rows, move + 1].sum())
        for i in np.argsort(-salience, kind="stable").tolist():
            extra = int(size[i, 2] - size[i, move[i] + 1]) if move[i] == 0 else 0
            if 0 < extra <= room:
                move[i] = 1
                room -= extra
        choice = np.choose(move + 1, [low, middle, high])
        return Found(c.expand(fill(c, choice, problem.limit_bytes)), evaluations=stops)


def pointers(damage: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, int]:
    """Which classes of a block go down (-1) and up (1), and how many stops were compared.

    Args:
        damage: (n, 3) in the narrower, the middle and the wider format, least salient class first.
        size: (n, 3) bytes in them.
    """
    move = np.zeros(len(damage), np.int64)
    best, value, least = move.copy(), 0.0, 0.0
    down, up, saved, stops = 0, len(damage) - 1, 0, 0
    while down <= up:
        cost = int(size[up, 2] - size[up, 1])
        if cost <= saved:
            if cost > 0:
                move[up] = 1
                value += float(damage[up, 2] - damage[up, 1])
                saved -= cost
                stops += 1
                if value < least:
                    best, least = move.copy(), value
            up -= 1
        else:
            if size[down, 0] < size[down, 1]:
                move[down] = -1
                value += float(damage[down, 0] - damage[down, 1])
                saved += int(size[down, 1] - size[down, 0])
            down += 1
    return best, stops


def _below(problem: Problem, middle: np.ndarray) -> np.ndarray:
    """(C,) the next narrower format than ``middle`` in the ladder of uniform plans; itself where there is none."""
    c = problem.classes
    ladder = [spread(problem, j) for j in range(len(problem.formats))]
    narrower = [plan for plan in ladder if c.payload(plan) < c.payload(middle)]
    below = max(narrower, key=c.payload) if narrower else middle
    rows = np.arange(len(middle))
    return np.where(c.bytes[rows, below] < c.bytes[rows, middle], below, middle)


def _blocks(problem: Problem) -> np.ndarray:
    """(C,) block of each class; -1 outside the blocks and where tied units lie in several."""
    of_unit = problem.classes.of_unit
    n = len(problem.classes.bytes)
    first, last = np.full(n, np.iinfo(np.int64).max), np.full(n, -1, np.int64)
    np.minimum.at(first, of_unit, problem.layers)
    np.maximum.at(last, of_unit, problem.layers)
    return np.where(first == last, last, -1)
