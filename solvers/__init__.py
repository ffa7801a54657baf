"""Allocators: one problem type, one solution type, one status vocabulary, a certificate each. Torch-free.

>>> from bitatlas.solvers import Problem, get_solver
>>> solution = get_solver("hull").solve(problem)  # doctest: +SKIP

A new allocator is one file with a `Solver` subclass, one line in `SOLVERS`, and one conformance-test subclass.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.allocate import choice_of, to_allocation
from bitatlas.solvers.alphaq import AlphaQRule
from bitatlas.solvers.baq import Baq
from bitatlas.solvers.base import PROVED, SOLUTION_PRESENT, STATUSES, Solution, Solver
from bitatlas.solvers.bisection import Bisection
from bitatlas.solvers.certificate import Certificate, certify
from bitatlas.solvers.double_pointer import DoublePointer
from bitatlas.solvers.evopress import EvoPress
from bitatlas.solvers.front_cache import FrontCache, FrontPoint
from bitatlas.solvers.frontier import frontier
from bitatlas.solvers.hull import Hull
from bitatlas.solvers.ilp import Ilp
from bitatlas.solvers.kvtuner import KvTuner
from bitatlas.solvers.mckp import Mckp
from bitatlas.solvers.mixes import Q4KM, AttentionHigh, FirstLast
from bitatlas.solvers.nsga2 import Nsga2
from bitatlas.solvers.nsga2_search import Nsga2Search
from bitatlas.solvers.path import PathDescent
from bitatlas.solvers.pmq import Pmq, PmqGlobal
from bitatlas.solvers.problem import Problem, SideBudget
from bitatlas.solvers.projection_descent import ProjectionDescent
from bitatlas.solvers.ramp import Ramp
from bitatlas.solvers.random_best import RandomBest
from bitatlas.solvers.random_search import RandomSearch
from bitatlas.solvers.rco import Rco
from bitatlas.solvers.refine import Refine
from bitatlas.solvers.searcher import Searcher, State
from bitatlas.solvers.settings import checked_settings
from bitatlas.solvers.threshold import Threshold
from bitatlas.solvers.tpe import Tpe
from bitatlas.solvers.uniform import Uniform

__all__ = [
    "PROVED",
    "SEARCHERS",
    "SOLUTION_PRESENT",
    "SOLVERS",
    "STATUSES",
    "Certificate",
    "FrontCache",
    "FrontPoint",
    "Problem",
    "Searcher",
    "SideBudget",
    "Solution",
    "Solver",
    "State",
    "certify",
    "choice_of",
    "frontier",
    "get_searcher",
    "get_solver",
    "to_allocation",
]

# Menus follow this order; the first is the default.
SOLVERS: dict[str, type[Solver]] = {
    "mckp": Mckp,
    "projection_descent": ProjectionDescent,
    "hull": Hull,
    "ilp": Ilp,
    "baq": Baq,
    "alphaq": AlphaQRule,
    "pmq": Pmq,
    "pmq_global": PmqGlobal,
    "bisection": Bisection,
    "threshold": Threshold,
    "double_pointer": DoublePointer,
    "uniform": Uniform,
    "first_last": FirstLast,
    "attention_high": AttentionHigh,
    "q4_k_m": Q4KM,
    "random_best": RandomBest,
    "tpe": Tpe,
    "nsga2": Nsga2,
    "kvtuner": KvTuner,
}

# Searches on the real model (jobs, not functions): `bitatlas search`.
SEARCHERS: dict[str, type[Searcher]] = {
    "path": PathDescent,
    "refine": Refine,
    "evopress": EvoPress,
    "rco": Rco,
    "ramp": Ramp,
    "nsga2_search": Nsga2Search,
    "random_search": RandomSearch,
}


def get_searcher(name: str) -> type[Searcher]:
    """The search called ``name``.

    Raises:
        UserError: no such search; the message names the nearest ones.
    """
    found = SEARCHERS.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), SEARCHERS, n=3, cutoff=0.4)
        raise UserError(f"there is no search called {name!r}", found=f"nearest: {', '.join(near) or 'none'}",
                        fix=f"one of {', '.join(SEARCHERS)}; `bitatlas solve` takes the others")  # fmt: skip
    return found


def get_solver(name: str, settings: Mapping[str, Any] | None = None) -> Solver:
    """The solver called ``name``, with overrides of its `Solver.SETTINGS`.

    Raises:
        UserError: no such solver, and the message names the nearest ones; or no such setting.
    """
    key = name.strip().lower()
    found = SOLVERS.get(key)
    if found is None and key in SEARCHERS:
        raise UserError(f"{name} runs the model itself, which solving does not", found="a search",
                        fix=f"bitatlas search --solver {key}, with the same budget, formats, pins and target")  # fmt: skip
    if found is None:
        near = difflib.get_close_matches(name.lower(), SOLVERS, n=3, cutoff=0.4)
        raise UserError(f"there is no solver called {name!r}", found=f"nearest: {', '.join(near) or 'none'}",
                        fix=f"one of {', '.join(SOLVERS)}")  # fmt: skip
    return found(**checked_settings(found.NAME, found.SETTINGS, settings)) if settings else found()
