"""Integer linear program (HAWQ-V3 and OHQ): several budgets at once, through PuLP.

Binaries x[c, b], one per class and allowed format; sum_b x = 1; minimise sum damage * x; any number of linear
limits. Ties are merged before, so no equality rows are needed.
"""

from __future__ import annotations

import time
import warnings
from typing import Any, ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.base import FEASIBLE, OPTIMAL, TIME_LIMIT, Found, Solver
from bitatlas.solvers.classes import Classes
from bitatlas.solvers.front_cache import fill
from bitatlas.solvers.infeasible import in_words, least_of
from bitatlas.solvers.problem import Problem

__all__ = ["Ilp"]


class Ilp(Solver):
    """PuLP with HiGHS where it is installed, else the CBC that comes with PuLP.

    PuLP reports "Optimal" after a time-out, so the status is ours: optimal only when the back end ended
    before its limit.
    """

    NAME: ClassVar[str] = "ilp"
    TITLE: ClassVar[str] = "Integer program"
    SOURCE: ClassVar[str] = "HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680) eq. 5; OHQ (arXiv 2309.01945)"
    EXACT: ClassVar[bool] = True
    MULTI_BUDGET: ClassVar[bool] = True
    REQUIRES: ClassVar[tuple[str, ...]] = ("pulp",)

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        sides = [(_merge(side.cost, c), side.limit, side.name) for side in problem.side]
        limit = problem.limit_bytes
        for _ in range(4):
            choice, finished = _run(c, limit, sides, seed, deadline)
            if choice is None:
                return self._without_answer(problem, c, sides, finished)
            over = c.payload(choice) - problem.limit_bytes
            if over <= 0 and _within(choice, sides):
                if not finished and not sides:
                    choice = fill(c, choice, problem.limit_bytes)
                return Found(c.expand(choice), OPTIMAL if finished else TIME_LIMIT, 1)
            # The back end's feasibility tolerance let a few bytes through: tighten and solve again.
            limit -= max(over, 1)
            sides = [(cost, lim - 1e-6 * max(abs(lim), 1e-12), name) for cost, lim, name in sides]
        return self._without_answer(problem, c, sides, finished=False)

    @staticmethod
    def _without_answer(
        problem: Problem, c: Classes, sides: list[tuple[np.ndarray, float, str]], finished: bool
    ) -> Found:
        """The smallest allocation when it will do, else an error that says which limit stands in the way."""
        choice = c.smallest()
        if not finished and _within(choice, sides):
            return Found(c.expand(fill(c, choice, problem.limit_bytes) if not sides else choice), FEASIBLE, 1)
        names = ", ".join(f"{s.name} <= {s.limit:g}" for s in problem.side)
        if finished:
            alone = [f"{problem.min_bytes} bytes", *(in_words(s, least_of(problem, s)) for s in problem.side)]
            raise UserError("no allocation meets all limits together", found=f"{problem.limit_bytes} bytes, {names}",
                            fix=f"relax one of them; the smallest possible of each alone: {', '.join(alone)}")  # fmt: skip
        raise UserError("the integer program found no allocation in its time", found=names,
                        fix="allow more time, or relax a limit")  # fmt: skip


def _run(
    c: Classes, limit_bytes: int, sides: list[tuple[np.ndarray, float, str]], seed: int, deadline: float
) -> tuple[np.ndarray | None, bool]:
    """(choice (C,) or None when there is none, whether the back end ended before its time limit)."""
    import pulp

    owner, option = np.nonzero(c.allowed)
    base = np.where(c.allowed, c.damage, np.inf).min(axis=1)
    worth = c.damage[owner, option] - base[owner]
    # CBC stops within absolute tolerances of about 1e-6: spread the objective over 0..1e6.
    worth = worth / (float(worth.max()) or 1.0) * 1e6
    model = pulp.LpProblem("bits", pulp.LpMinimize)
    x = [model.add_variable(f"x{i}", cat=pulp.LpBinary) for i in range(len(owner))]
    model += pulp.LpAffineExpression(zip(x, worth.tolist()))
    cuts = np.flatnonzero(np.diff(owner)) + 1
    for members in np.split(np.arange(len(owner)), cuts):
        model += pulp.LpAffineExpression([(x[i], 1) for i in members]) == 1
    smallest = c.smallest_bytes()
    extra = (c.bytes - smallest[:, None])[owner, option]
    step = int(np.gcd.reduce(extra)) or 1
    room = (limit_bytes - int(smallest.sum())) // step
    if room < 0:
        return None, True
    if int(extra.sum()):
        model += pulp.LpAffineExpression(zip(x, (extra // step).tolist())) <= room
    for cost, limit, _ in sides:
        values = cost[owner, option]
        scale = float(np.abs(values).max()) or 1.0
        model += pulp.LpAffineExpression(zip(x, (values / scale).tolist())) <= limit / scale
    seconds = max(deadline - time.perf_counter(), 0.1)
    start = time.perf_counter()
    model.solve(_backend(pulp, seconds, seed))
    spent = time.perf_counter() - start
    found = [v.value() for v in x]
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) or None in found:
        return None, model.status == pulp.LpStatusInfeasible
    score = np.full(c.damage.shape, -np.inf)
    score[owner, option] = found
    proved = model.sol_status == pulp.LpSolutionOptimal and spent < 0.95 * seconds
    return score.argmax(axis=1), proved


def _backend(pulp: Any, seconds: float, seed: int) -> Any:
    """HiGHS in process when highspy is there, else CBC in a process of its own; one thread, no tolerance."""
    highs = pulp.HiGHS(msg=False, timeLimit=seconds, gapRel=0.0, threads=1, random_seed=seed)
    if highs.available():
        return highs
    # CBC's own preprocessing cuts off the optimum of some problems with two budgets and calls the rest optimal.
    options = [f"randomCbcSeed {seed}", f"randomSeed {seed}", "allowableGap 0", "preprocess off"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the bundled CBC leaves PuLP with version 4
        return pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0, threads=1, options=options)


def _merge(cost: np.ndarray, c: Classes) -> np.ndarray:
    """(C, F) cost of each class from (U, F)."""
    out = np.zeros(c.damage.shape)
    np.add.at(out, c.of_unit, cost)
    return out


def _within(choice: np.ndarray, sides: list[tuple[np.ndarray, float, str]]) -> bool:
    rows = np.arange(len(choice))
    return all(
        float(cost[rows, choice].sum()) <= limit + 1e-9 * abs(limit) + 1e-12 for cost, limit, _ in sides
    )
