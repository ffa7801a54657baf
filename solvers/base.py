"""The solver contract: one abstract class, one solution type, one status vocabulary."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.certificate import Certificate, certify
from bitatlas.solvers.infeasible import check_feasible
from bitatlas.solvers.problem import Problem

__all__ = [
    "FEASIBLE", "INFEASIBLE", "OPTIMAL", "PROVED", "SOLUTION_PRESENT", "STATUSES", "TIME_LIMIT", "Found", "Solution",
    "Solver",
]  # fmt: skip

OPTIMAL = "optimal"
"""Proved: no allocation of the problem as posed has less damage."""
FEASIBLE = "feasible"
"""Within all limits; nothing proved beyond the certificate's gap."""
TIME_LIMIT = "time_limit"
"""Within all limits, the best found when the time ran out."""
INFEASIBLE = "infeasible"
"""Proved: no allocation meets the limits. Solvers raise `UserError`; job records keep the word."""

STATUSES: tuple[str, ...] = (OPTIMAL, FEASIBLE, TIME_LIMIT, INFEASIBLE)
SOLUTION_PRESENT = frozenset({OPTIMAL, FEASIBLE, TIME_LIMIT})
PROVED = frozenset({OPTIMAL, INFEASIBLE})


class Found(NamedTuple):
    """What a solver's `_solve` hands back: choice (U,), status, objective evaluations, tokens run.

    ``multipliers``: one per side budget, for the lower bound; any that are not negative give a valid one.
    """

    choice: np.ndarray
    status: str = FEASIBLE
    evaluations: int = 0
    tokens: int = 0
    multipliers: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Solution:
    """An allocation with its proof and its price.

    Attributes:
        choice: (U,) int64 index into ``problem.formats``.
        status: one of `STATUSES`.
        certificate: made by code that no solver shares.
        seconds: the solver's own time, the certificate not counted.
        evaluations: objective evaluations; tokens: model tokens run (0 for pure solvers).
        solver: registry name.
    """

    choice: np.ndarray
    status: str
    certificate: Certificate
    seconds: float
    evaluations: int
    tokens: int
    solver: str


class Solver(ABC):
    """One allocator. Subclasses fill the class attributes and `_solve`; `solve` does the rest."""

    NAME: ClassVar[str]
    """Registry name = file name, or a rule of the file."""
    TITLE: ClassVar[str]
    """For menus."""
    SOURCE: ClassVar[str]
    """Paper and equation, or where the rule comes from."""
    EXACT: ClassVar[bool] = False
    """Returns a proved optimum when given the time."""
    FRONT: ClassVar[bool] = False
    """Has the whole front at once (`solvers.front_cache`)."""
    HANDLES_TIES: ClassVar[bool] = True
    MULTI_BUDGET: ClassVar[bool] = False
    """Accepts ``problem.side``."""
    NEEDS_DAMAGE: ClassVar[bool] = True
    RANKS: ClassVar[bool] = False
    """Also takes a metric that does not depend on the format, as ``problem.score``."""
    METRICS: ClassVar[tuple[str, ...]] = ()
    """What it is published with, the one to ask first comes first; () = any damage."""
    USES_INTERACTION: ClassVar[bool] = False
    """Minimises ``problem.quadratic`` rather than the sum of damages."""
    SETTINGS: ClassVar[Mapping[str, Any]] = {}
    """Name -> default of the constructor's arguments."""
    REQUIRES: ClassVar[tuple[str, ...]] = ()
    """Modules that must be installed."""

    @classmethod
    def available(cls) -> bool:
        """Whether `REQUIRES` is installed, found without importing anything."""
        return all(find_spec(module) is not None for module in cls.REQUIRES)

    def solve(self, problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0) -> Solution:
        """Solve and certify. The same problem, seed and (unreached) time limit give the same choice.

        Raises:
            UserError: the budget cannot be met, the solver cannot handle the problem, or a module is missing.
            RuntimeError: the certificate refutes the solution (our fault).
        """
        self.check(problem)
        start = time.perf_counter()
        found = self._solve(problem, seed, start + time_limit_s)
        seconds = time.perf_counter() - start
        choice = np.asarray(found.choice, np.int64)
        certificate = certify(problem, choice, found.multipliers)
        if not certificate.feasible:
            raise RuntimeError(f"{self.NAME} broke its limits: {'; '.join(certificate.violations[:3])}")
        return Solution(
            choice, found.status, certificate, seconds, found.evaluations, found.tokens, self.NAME
        )

    def check(self, problem: Problem) -> None:
        """Raise `UserError` when this solver cannot take this problem, or nothing could."""
        if not self.available():
            raise UserError(
                f"{self.NAME} needs {', '.join(self.REQUIRES)}", fix=f"pip install {' '.join(self.REQUIRES)}"
            )
        if problem.ties and not self.HANDLES_TIES:
            raise UserError(f"{self.NAME} cannot tie units", fix="use hull, mckp or ilp")
        if problem.side and not self.MULTI_BUDGET:
            names = ", ".join(s.name for s in problem.side)
            raise UserError(
                f"{self.NAME} knows one budget only",
                found=f"also limited: {names}",
                fix="use ilp, or hull for limits on groups",
            )
        if self.NEEDS_DAMAGE and not problem.has_damage:
            raise UserError(
                f"{self.NAME} needs a damage for every unit", found="no metric", fix="name one with --metric"
            )
        if self.USES_INTERACTION and problem.interaction is None:
            raise UserError(
                f"{self.NAME} needs the projections of the probes", found="a metric without cross-unit terms",
                fix="measure fisher_projection and solve with it",
            )  # fmt: skip
        check_feasible(problem)

    @abstractmethod
    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        """The algorithm. ``deadline`` is in `time.perf_counter` seconds; an allocation is known to exist."""
