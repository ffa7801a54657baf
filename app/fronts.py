"""Fronts are kept: the same question is answered from the store, whoever asks it again, a page or the command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np

import bitatlas.solvers
from bitatlas.analysis.schema import Frontier, UserError
from bitatlas.cache.keys import digest
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, Solver, frontier

__all__ = ["front_key", "kept_front"]

_NOT_ASKED = ("limit_bytes", "kept_bytes", "interaction", "engine", "engine_pins", "more_formats")
"""Fields of a problem that a front does not depend on: the last three are for messages; of the interaction, the run stands for it."""


def kept_front(
    store: Store, model: str, run: str, problem: Problem, solver: Solver, *, points: int, time_limit_s: float = 60.0,
    prepare: Callable[[Problem], Problem] | None = None, complete: Callable[[Frontier], Frontier] | None = None,
) -> Frontier:  # fmt: skip
    """The stored front of this question; solved and stored where there is none.

    Args:
        model: digest. run: of the damages, "" without.
        prepare: completes the problem for solving, where that is dear (`tasks.interaction.with_probes`).
        complete: adds to a front what only the asker knows, before it is stored.

    Raises:
        UserError: from the solver.
    """
    key = front_key(problem, solver, model, run, points, time_limit_s)
    found = store.find_frontier(key)
    if found is not None:
        return found
    made = frontier(
        prepare(problem) if prepare else problem, solver, points=points, time_limit_s=time_limit_s
    )
    made = complete(made) if complete else made
    # Busy, full or read-only: the answer is right all the same, and the next one to ask stores it.
    with suppress(UserError):
        store.put_frontier(model, made, run, key)
    return made


def front_key(
    problem: Problem, solver: Solver, model: str, run: str, points: int, time_limit_s: float
) -> str:
    """Of everything that a front is made from: damages, bytes, pins, ties, rules and limits, solver and its code."""
    body = hashlib.sha256()
    for f in fields(problem):
        if f.name not in _NOT_ASKED:
            body.update(f.name.encode())
            _add(body, getattr(problem, f.name))
    return digest(
        {"front": body.hexdigest(), "model": model, "run": run, "solver": solver.NAME,
         "settings": repr(sorted(vars(solver).items())), "points": points,
         "time": 0 if solver.FRONT else time_limit_s, "code": _code()}
    )  # fmt: skip


def _add(body: hashlib._Hash, value: object) -> None:
    if isinstance(value, np.ndarray):
        body.update(f"{value.dtype}{value.shape}".encode())
        body.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, tuple):
        body.update(str(len(value)).encode())
        for item in value:
            _add(body, item)
    elif hasattr(value, "__dataclass_fields__"):
        _add(body, tuple(getattr(value, name) for name in value.__dataclass_fields__))
    else:
        body.update(repr(sorted(value.items()) if isinstance(value, dict) else value).encode() + b"\0")


@lru_cache(maxsize=1)
def _code() -> str:
    """Digest of the solvers' source: another solver, another front."""
    body = hashlib.sha256()
    for folder in bitatlas.solvers.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            body.update(path.name.encode() + path.read_bytes())
    return body.hexdigest()
