"""MC-MoE's pre-loading mixed precision (PMQ): bits per expert, block by block as published, or over all blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.base import FEASIBLE, Found, Solver
from bitatlas.solvers.classes import Classes
from bitatlas.solvers.code_bits import code_bits
from bitatlas.solvers.ilp import Ilp
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.problem import Problem, SideBudget
from bitatlas.solvers.uniform import spread

__all__ = ["Pmq", "PmqGlobal"]

_ATTENTION_BITS = 4


class Pmq(Solver):
    """Each MoE block solved alone, all blocks with the same share of bytes per weight.

    An expert's projections share a format. What is no expert stays at 4 bits (the nearest format above, lower only
    if the budget asks for it). Every block gets bytes in proportion to its experts' weights and minimises its
    damage exactly; nothing moves between blocks, and what a block cannot use is lost. As published, a block has
    at least one expert in the widest and one in the middle of three formats: the three narrowest ones whose
    widest would not fit everywhere.

    The published damage is phi^1 w^1.5 eps^1 (frequency, routing weight, expert error; the code never uses
    its third exponent). It counts frequency twice, since eps is an error on real tokens.
    """

    NAME: ClassVar[str] = "pmq"
    TITLE: ClassVar[str] = "MC-MoE PMQ, per block"
    SOURCE: ClassVar[str] = "MC-MoE (arXiv 2410.06270) eq. 6, and its code"
    PER_BLOCK: ClassVar[bool] = True

    def check(self, problem: Problem) -> None:
        """Also refuses models without experts."""
        super().check(problem)
        if not (problem.experts >= 0).any():
            raise UserError(f"{self.NAME} divides bits among experts", found="a model without experts",
                            fix="solve a mixture-of-experts model, or use mckp")  # fmt: skip

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c, block = expert_classes(problem)
        choice, limit = self._fix_the_rest(problem, c, block)
        experts = np.flatnonzero(block >= 0)
        label = block if self.PER_BLOCK else np.where(block >= 0, 0, -1)
        blocks = np.unique(label[experts])
        shares = _shares(problem, c, label, blocks, limit - c.payload(choice) + _payload(c, choice, experts))
        states = 0
        for b, share in zip(blocks.tolist(), shares.tolist()):
            rows = np.flatnonzero(label == b)
            part = Problem.of(c.damage[rows], c.bytes[rows], share, allowed=c.allowed[rows])
            found = Mckp()._solve(part, seed, deadline)
            states += found.evaluations
            choice[rows] = found.choice
            if self.PER_BLOCK:
                choice[rows] = _at_least_one(part, found.choice, seed, deadline)
        return Found(c.expand(choice), FEASIBLE, states)

    @staticmethod
    def _fix_the_rest(problem: Problem, c: Classes, block: np.ndarray) -> tuple[np.ndarray, int]:
        """(C,) choice with experts at their smallest and the others as near above 4 bits as fits, and the limit."""
        rest = block < 0
        smallest = c.smallest()
        bits = code_bits(problem)
        above = [j for j in np.argsort(bits, kind="stable").tolist() if bits[j] >= _ATTENTION_BITS]
        below = [j for j in np.argsort(-bits, kind="stable").tolist() if bits[j] < _ATTENTION_BITS]
        for column in [*above[:1], *below]:
            choice = np.where(rest, _spread(problem, c, column), smallest)
            if c.payload(choice) <= problem.limit_bytes:
                return choice, problem.limit_bytes
        return smallest.copy(), problem.limit_bytes


class PmqGlobal(Pmq):
    """One budget over the experts of all blocks: the same damage, experts and fixed rest, but blocks trade."""

    NAME: ClassVar[str] = "pmq_global"
    TITLE: ClassVar[str] = "MC-MoE PMQ, all blocks together"
    PER_BLOCK: ClassVar[bool] = False


def expert_classes(problem: Problem) -> tuple[Classes, np.ndarray]:
    """Classes with the projections of an expert tied as well, and (C,) the block of each, -1 for the rest.

    A class that holds anything else than experts of one block belongs to the rest.
    """
    c = problem.classes
    parent = np.arange(len(c.bytes))
    first: dict[tuple[int, int], int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            i = int(parent[i])
        return i

    layers, experts = problem.layers.tolist(), problem.experts.tolist()
    for unit, label in enumerate(c.of_unit.tolist()):
        if experts[unit] >= 0:
            a, b = root(first.setdefault((layers[unit], experts[unit]), label)), root(label)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(parent))])
    label = np.unique(roots, return_inverse=True)[1]
    n = int(label.max()) + 1
    damage, size = np.zeros((n, c.bytes.shape[1])), np.zeros((n, c.bytes.shape[1]), np.int64)
    allowed = np.ones(damage.shape, bool)
    np.add.at(damage, label, np.where(c.allowed, c.damage, 0.0))
    np.add.at(size, label, c.bytes)
    np.logical_and.at(allowed, label, c.allowed)
    if not allowed.any(axis=1).all():
        raise UserError("the projections of an expert have no allowed format in common",
                        fix="pin whole experts, or use mckp")  # fmt: skip
    of_unit = label[c.of_unit]
    low, high = np.full(n, np.iinfo(np.int64).max), np.full(n, -1, np.int64)
    of_block = np.where(problem.experts >= 0, problem.layers, -1)
    np.minimum.at(low, of_unit, of_block)
    np.maximum.at(high, of_unit, of_block)
    merged = Classes(of_unit, np.where(allowed, damage, np.inf), size, allowed)
    return merged, np.where(low == high, high, -1)


def _spread(problem: Problem, c: Classes, column: int) -> np.ndarray:
    """`uniform.spread` over these classes."""
    view = replace(problem)
    view.__dict__["classes"] = c
    return spread(view, column)


def _payload(c: Classes, choice: np.ndarray, rows: np.ndarray) -> int:
    return int(c.bytes[rows, choice[rows]].sum())


def _shares(problem: Problem, c: Classes, label: np.ndarray, blocks: np.ndarray, total: int) -> np.ndarray:
    """(B,) byte budget of each block: in proportion to its weights, never below its smallest allocation."""
    weights = np.zeros(len(label))
    np.add.at(weights, c.of_unit, problem.params.astype(float))
    size = np.array([weights[label == b].sum() for b in blocks])
    least = np.array([int(c.smallest_bytes()[label == b].sum()) for b in blocks])
    share = least.copy()
    open_ = np.ones(len(blocks), bool)
    while open_.any():
        left = total - int(least[~open_].sum())
        wanted = np.floor(left * size / size[open_].sum()).astype(np.int64)
        short = open_ & (wanted < least)
        if not short.any():
            share[open_] = wanted[open_]
            break
        open_ &= ~short
    return share


def _at_least_one(part: Problem, choice: np.ndarray, seed: int, deadline: float) -> np.ndarray:
    """The block's optimum with an expert in the widest and one in the middle of its three formats, where it can be.

    Kept as it is when the optimum has both already, or when no such allocation fits.
    """
    order = np.argsort(part.bytes.sum(axis=0), kind="stable")
    totals = np.array([part.bytes[:, j].sum() for j in order])
    top = int(np.searchsorted(totals, part.limit_bytes, side="right"))
    window = order[max(min(top, len(order) - 1) - 2, 0) :][:3]
    if len(window) < 3 or len(choice) < 2:
        return choice
    needed = [int(j) for j in window[1:]]
    if all((choice == j).any() for j in needed):
        return choice
    floors = []
    for j in needed:
        count = np.zeros(part.damage.shape)
        count[:, j] = -1.0  # -(experts in format j) <= -1
        floors.append(SideBudget(f"an expert in {part.formats[j]}", count, -1.0))
    try:
        return Ilp()._solve(replace(part, side=tuple(floors)), seed, deadline).choice
    except UserError:
        return choice
