"""The contract of a search on the real model: steps over a state of plain arrays, so that a killed job goes on.

A searcher draws its random numbers from (seed, step) and keeps everything else in the state: the same problem, objective,
settings and seed give the same answer, with or without interruptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bitatlas.analysis.schema import Objective, UserError
from bitatlas.solvers.byte_groups import byte_groups
from bitatlas.solvers.front_cache import FrontCache
from bitatlas.solvers.infeasible import check_feasible
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.problem import Problem
from bitatlas.solvers.settings import checked_settings

__all__ = ["Reading", "Searcher", "State", "solve_costs"]

State = dict[str, np.ndarray]
"""At least ``choice`` (U,) int64, the best so far, ``kl`` (), its last measured KL, and ``done`` () bool."""


class Reading(NamedTuple):
    """One call of the objective: ``candidates`` read a text of ``tokens``; ``backward``: for slopes."""

    tokens: int
    candidates: int = 1
    backward: bool = False

    def most(self, pool: int) -> int:
        """Forward-equivalent tokens at most, the original model's own pass included, from a text of ``pool`` tokens."""
        return max(1, min(self.tokens, pool)) * (self.candidates + 1 + 2 * self.backward)


class Searcher(ABC):
    """One search.

    Args:
        problem: units, formats, bytes and budget; damages where `NEEDS_DAMAGE`.
        objective: the real model.
        seed: of everything random.
        settings: overrides of `SETTINGS`.
        start: (K, U) choices within the budget to begin with, maybe none.
        features: (U, 9) of `analysis.unit_features`, where `NEEDS_FEATURES`.
        policy: arrays of a policy trained before, where `HAS_POLICY`.

    Raises:
        UserError: an unknown or malformed setting, something needed that is missing, an impossible budget.
    """

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    SOURCE: ClassVar[str]
    STEP: ClassVar[str] = "generation"
    """What a step is called."""
    SETTINGS: ClassVar[Mapping[str, Any]]
    """Name -> default; ``steps`` is the number of steps after the first."""
    NEEDS_DAMAGE: ClassVar[bool] = False
    NEEDS_SLOPES: ClassVar[bool] = False
    NEEDS_FEATURES: ClassVar[bool] = False
    HAS_POLICY: ClassVar[bool] = False
    REQUIRES: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, problem: Problem, objective: Objective, *, seed: int = 0, settings: Mapping[str, Any] | None = None,
        start: np.ndarray | None = None, features: np.ndarray | None = None, policy: Mapping[str, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        missing = [m for m in self.REQUIRES if find_spec(m) is None]
        if missing:
            raise UserError(f"{self.NAME} needs {', '.join(missing)}", fix=f"pip install {' '.join(missing)}")
        self.check(problem)
        self.problem, self.objective, self.seed = problem, objective, seed
        self.settings = self.checked(settings or {})
        starts = np.zeros((0, len(problem.units)), np.int64) if start is None else np.atleast_2d(start)
        self.start = np.array([c for c in starts if self.fits(c)], np.int64).reshape(-1, len(problem.units))
        self.features = features
        self.policy = dict(policy or {})

    @classmethod
    def check(cls, problem: Problem) -> None:
        """Return if the search can take this problem: bytes, and the bytes of separate groups of units, are all it holds.

        Raises:
            UserError: another limit, groups that cut through tied units, no damage where one is needed, or nothing fits.
        """
        if cls.NEEDS_DAMAGE and not problem.has_damage:
            raise UserError(f"{cls.NAME} needs a damage for every unit", found="no metric", fix="name one with --metric")  # fmt: skip
        check_feasible(problem)
        try:
            byte_groups(problem)
        except UserError as error:
            raise UserError(error.what, found=error.found, fix=error.fix.replace("use ilp", "`bitatlas solve --solver ilp`")) from None  # fmt: skip

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`SETTINGS` with overrides; numbers keep the type of their default.

        Raises:
            UserError: an unknown name, or a value of another kind.
        """
        return checked_settings(cls.NAME, cls.SETTINGS, settings)

    @classmethod
    def readings(cls, settings: Mapping[str, Any], starts: int, step: int) -> tuple[Reading, ...]:
        """What a step (0 = `begin`) asks of the model at most, by settings as `checked` returns them; () = cannot be told."""
        return ()

    @classmethod
    def most_tokens(cls, settings: Mapping[str, Any], starts: int, pool: int) -> int | None:
        """Forward-equivalent tokens of a whole search at most, with ``starts`` to begin from and a text of ``pool`` tokens.

        None where nobody can tell.
        """
        steps = [cls.readings(settings, starts, number) for number in range(int(settings["steps"]) + 1)]
        return sum(r.most(pool) for step in steps for r in step) if any(steps) else None

    @classmethod
    def longest_text(cls, settings: Mapping[str, Any], starts: int) -> int:
        """Tokens of the longest text that a candidate of the first steps is read on; 0 where nobody can tell."""
        steps = range(min(int(settings["steps"]), 1) + 1)
        return max((r.tokens for n in steps for r in cls.readings(settings, starts, n)), default=0)

    @property
    def steps(self) -> int:
        """Steps of a whole search, the first one (`begin`) not counted."""
        return int(self.settings["steps"])

    def rng(self, step: int) -> np.random.Generator:
        """The random numbers of one step."""
        return np.random.default_rng([self.seed, step])

    def fits(self, choice: np.ndarray) -> bool:
        """Whether a choice (U,) is allowed, keeps the ties and lies within the budget and the limits of groups."""
        p, c = self.problem, self.problem.classes
        choice = np.asarray(choice)
        together = bool((c.expand(c.expand_back(choice)) == choice).all())
        return (
            together
            and bool(p.allowed[np.arange(len(choice)), choice].all())
            and p.payload(choice) <= p.limit_bytes
            and not any(s.cost[np.arange(len(choice)), choice].sum() > s.limit for s in p.side)
        )

    @abstractmethod
    def begin(self) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: State, number: int) -> State:
        """One step, numbered from 1; only called while ``state["done"]`` is false. Leaves ``state`` as it is."""

    def run(self, enough: Callable[[], bool] = lambda: False) -> State:
        """All steps in this process, or as many as were begun before ``enough()`` came true."""
        state = self.begin()
        for number in range(1, self.steps + 1):
            if bool(state["done"]) or enough():
                break
            state = self.step(state, number)
        return state


def solve_costs(problem: Problem, cost: np.ndarray) -> np.ndarray:
    """(C,) the best choice for costs (C, F) of classes, any sign, within the budget and the limits of groups; inf = not allowed.

    Exact where no group is at its limit; there at most one step of the hull worse for each that is (`solvers.byte_groups`).
    """
    c = problem.classes
    open_ = c.allowed & np.isfinite(cost)
    lifted = np.where(open_, cost - np.where(open_, cost, np.inf).min(axis=1, keepdims=True), np.inf)
    view = replace(problem)
    view.__dict__["classes"] = replace(c, damage=lifted, allowed=open_)
    found = c.expand_back(Mckp()._solve(view, 0, np.inf).choice)
    groups = byte_groups(view)
    if groups is not None and (groups.rooms(c, found)[1] < 0).any():
        return c.expand_back(FrontCache.of(view).at(view.limit_bytes).choice)
    return found
