"""The contract of a kind of job, and how a kind is found.

A `Work` lives in the engine process, one object for one job. The worker process asks it for its plan, for one
step after another and for the end, and stores the rows. It must be able to start at any step: after a crash a
new engine goes on where the old one stopped.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from bitatlas.analysis.schema import UserError
from bitatlas.app.work import WORKS
from bitatlas.cache.paths import Home

__all__ = ["Work", "load_work", "work_table"]


class Work(ABC):
    """One job's computing.

    Args:
        params: the request's parameters.
        home: the data folder.

    Everything it returns is JSON-able (NaN allowed in rows). It writes no damage rows itself: it returns them
    as lists in the order of `DamageRow` (metric, unit, format, value, stderr, count, floor), and the worker
    stores them together with the step's mark in one transaction. Arrays go to files of its own
    (``home.runs(run)``, `.tmp` + rename) before `run` returns. Whatever else it puts into the store must be
    idempotent. A `UserError` fails the job with that text.
    """

    KIND: ClassVar[str] = ""

    def __init__(self, params: Mapping[str, Any], home: Home) -> None:
        self.params = dict(params)
        self.home = home
        self._report: Callable[[str, float | None], None] = lambda note, fraction: None

    def report(self, note: str, fraction: float | None = None) -> None:
        """Tell people what is going on inside a step; ``fraction`` (0..1) of the step, if known."""
        self._report(note, fraction)

    @abstractmethod
    def plan(self) -> list[str]:
        """Step keys, deterministic and unique; seconds to a few minutes each. Called first in every engine."""

    def weights(self) -> list[float]:
        """What each step of the plan is expected to take, in seconds, for the time left; [] = all the same."""
        return []

    def runs(self) -> list[dict[str, Any]]:
        """Runs of the store that the rows belong to: keyword arguments of `Store.begin_run`. [] = no rows.

        Called after `plan`. Steps that the store has for one of these runs are not computed again.
        """
        return []

    @abstractmethod
    def run(self, key: str) -> dict[str, Any]:
        """Compute one step.

        Returns:
            ``rows``: lists as said above, for the first run; or ``{run: rows}``, which marks the step in those runs
            only. A later job with the same run and the same step key finds the step done, so keys of a job
            with several runs must say to which run they belong (``metric/step``).
            ``note``: a few words for the log.
        """

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """After the last step: ``rows`` as in `run` (optional), and everything else is the job's result."""


def work_table() -> dict[str, str]:
    """kind -> ``module:Class``: `WORKS`, and kinds added through ``$BITATLAS_WORKS`` (``kind=module:Class,…``)."""
    table = dict(WORKS)
    for entry in os.environ.get("BITATLAS_WORKS", "").split(","):
        kind, eq, target = entry.strip().partition("=")
        if eq:
            table[kind] = target
    return table


def load_work(kind: str, params: Mapping[str, Any], home: Home) -> Work:
    """Make the `Work` of a kind; imports its module.

    Raises:
        UserError: no such kind.
    """
    table = work_table()
    if kind not in table:
        raise UserError(
            f"there is no kind of job called {kind!r}", found=f"known: {', '.join(sorted(table))}"
        )
    module, _, name = table[kind].partition(":")
    work: Work = getattr(importlib.import_module(module), name)(params, home)
    return work
