"""AlphaQ's allocation as published: a bound on the plain mean of the bits, whatever the units' sizes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import FEASIBLE, TIME_LIMIT, Found, Solver
from bitatlas.solvers.code_bits import code_bits
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.problem import Problem

__all__ = ["AlphaQRule"]


class AlphaQRule(Solver):
    """Minimise sum damage subject to sum_l b_l <= B L, exactly; B is the largest whose result fits the bytes.

    b counts code bits and every unit counts once, large or small: that is the published constraint, and
    its flaw where sizes differ. Solve the ``alphaq`` metric with ``mckp`` for the same cost under a byte budget;
    measure it with ``size_factor=False`` for the published cost.
    """

    NAME: ClassVar[str] = "alphaq"
    TITLE: ClassVar[str] = "AlphaQ (mean of bits)"
    SOURCE: ClassVar[str] = "AlphaQ (arXiv 2606.04980), mixed-integer program with sum b <= B L"

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        members = np.bincount(c.of_unit, minlength=len(c.bytes))
        # Thousandths of a bit, so that formats without a whole code width still count right.
        bits = np.round(1000 * code_bits(problem)).astype(np.int64)
        counted = replace(problem, bytes=np.tile(bits, (len(problem.units), 1)))
        exact = Mckp()
        low = int((np.where(c.allowed, bits, bits.max()).min(axis=1) * members).sum())
        high = int((np.where(c.allowed, bits, 0).max(axis=1) * members).sum())
        best, status, states = c.expand(c.smallest()), FEASIBLE, 0
        step = int(np.gcd.reduce(np.append(np.diff(np.unique(bits)), high - low))) or 1
        # The bytes rise with B but for rounding among units of unlike sizes: bisection, the last that fits wins.
        first, last = 0, (high - low) // step
        while first <= last:
            middle = (first + last) // 2
            found = exact._solve(counted.with_limit(low + middle * step), seed, deadline)
            states += found.evaluations
            if problem.payload(found.choice) <= problem.limit_bytes:
                best, first = found.choice, middle + 1
            else:
                last = middle - 1
            if time.perf_counter() > deadline:
                status = TIME_LIMIT
                break
        return Found(best, status, states)
