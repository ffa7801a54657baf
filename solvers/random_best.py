"""Random allocations at the budget, the best of N by predicted damage: what a search must beat."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bitatlas.solvers.base import FEASIBLE, TIME_LIMIT, Found, Solver
from bitatlas.solvers.byte_groups import ByteGroups, byte_groups
from bitatlas.solvers.classes import Classes
from bitatlas.solvers.problem import Problem

__all__ = ["RandomBest", "random_choice"]


class RandomBest(Solver):
    """Best of 256 random allocations that fill the budget; with an interaction factor, by quadratic damage."""

    NAME: ClassVar[str] = "random_best"
    TITLE: ClassVar[str] = "Random, best of 256"
    SOURCE: ClassVar[str] = "baseline; Li & Talwalkar 2019, random search and reproducibility"

    SETTINGS: ClassVar[Mapping[str, Any]] = {"samples": 256}

    def __init__(self, samples: int = 256) -> None:
        self.samples = max(1, samples)

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        rng = np.random.default_rng(seed)
        best: np.ndarray | None = None
        best_value = np.inf
        for done in range(self.samples):
            choice = problem.classes.expand(random_choice(problem, rng))
            value = problem.objective(choice) if problem.interaction is None else problem.quadratic(choice)
            if best is None or value < best_value:
                best, best_value = choice, value
            if time.perf_counter() > deadline:
                return Found(best, TIME_LIMIT, done + 1)
        assert best is not None
        return Found(best, FEASIBLE, self.samples)


def random_choice(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """(C,) a random allocation within the budget, every class drawn from the same distribution over its formats.

    Each option gets a random (Gumbel) utility minus a price times its share of the class's largest extra bytes.
    The bytes fall as the price rises, so bisection finds the price that meets the budget, and before it for every group with
    a limit the least price that keeps it; random single moves then use up the rest.
    """
    c = problem.classes
    smallest = c.smallest()
    rows = np.arange(len(smallest))
    extra = np.where(c.allowed, c.bytes - c.bytes[rows, smallest][:, None], 0)
    share = extra / np.maximum(extra.max(axis=1, keepdims=True), 1)
    utility = np.where(c.allowed, rng.gumbel(size=extra.shape), -np.inf)
    groups = byte_groups(problem)
    floor = _group_prices(groups, c, utility, share)
    choice = smallest
    low, high = -30.0, 300.0
    for _ in range(40):
        price = (low + high) / 2
        drawn = _drawn(np.maximum(price, floor), utility, share)
        if c.payload(drawn) <= problem.limit_bytes:
            choice, high = drawn, price
        else:
            low = price
    out = _within_groups(groups, c, choice)
    room = problem.limit_bytes - c.payload(out)
    step = c.bytes - c.bytes[rows, out][:, None]
    owner, option = np.nonzero(c.allowed & (step > 0) & (step <= room))
    label, left = (np.full(len(out), -1), np.zeros(0, np.int64)) if groups is None else groups.rooms(c, out)
    left = np.append(left, np.iinfo(np.int64).max // 2)  # of classes without a group
    # One visit to each candidate, in random order; after a move the class is done.
    moved: set[int] = set()
    for at in rng.permutation(len(owner))[: 4 * len(out)].tolist():
        i, need = int(owner[at]), int(step[owner[at], option[at]])
        if need <= room and need <= left[label[i]] and i not in moved:
            out[i] = option[at]
            room -= need
            left[label[i]] -= need
            moved.add(i)
    return out


def _drawn(price: np.ndarray, utility: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(C,) formats at prices (C,)."""
    return np.argmax(utility - price[:, None] * share, axis=1)


def _group_prices(
    groups: ByteGroups | None, c: Classes, utility: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """(C,) the least price at which the class's group keeps its limit; -30, as good as none, without a limit."""
    floor = np.full(len(share), -30.0)
    if groups is None:
        return floor
    low, high = np.full(len(groups.limits), -30.0), np.full(len(groups.limits), 300.0)
    inside = groups.label >= 0
    for _ in range(40):
        price = (low + high) / 2
        floor[inside] = price[groups.label[inside]]
        held = groups.rooms(c, _drawn(floor, utility, share))[1] >= 0
        low, high = np.where(held, low, price), np.where(held, price, high)
    floor[inside] = high[groups.label[inside]]
    return floor


def _within_groups(groups: ByteGroups | None, c: Classes, choice: np.ndarray) -> np.ndarray:
    """A copy (C,) where groups still above their limit, whatever the price, take their smallest formats."""
    out = choice.copy()
    if groups is not None:
        above = np.flatnonzero(groups.rooms(c, out)[1] < 0)
        worst = np.isin(groups.label, above)
        out[worst] = c.smallest()[worst]
    return out
