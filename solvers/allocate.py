"""From a solution to the allocation that is saved, shown and shipped."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.schema import Allocation, Budget, ModelIndex, Provenance
from bitatlas.solvers.base import Solution
from bitatlas.solvers.problem import Problem

__all__ = ["choice_of", "to_allocation"]


def to_allocation(
    problem: Problem,
    solution: Solution,
    index: ModelIndex,
    *,
    metric: str | None = None,
    provenance: Provenance | None = None,
    budget: Budget | None = None,
    kv: dict[int, tuple[str, str]] | None = None,
) -> Allocation:
    """The allocation file's content. ``predicted`` is the quadratic damage where the problem has interactions."""
    proof = solution.certificate
    predicted = proof.quadratic if np.isfinite(proof.quadratic) else proof.objective
    return Allocation(
        model_digest=index.digest,
        model_name=index.name,
        formats={u: problem.formats[j] for u, j in zip(problem.units, solution.choice.tolist())},
        payload_bytes=proof.payload_bytes,
        kept_bytes=index.kept_bytes,
        bits_per_weight=proof.payload_bytes * 8 / max(int(problem.params.sum()), 1),
        predicted=predicted,
        metric=problem.metric if metric is None else metric,
        solver=solution.solver,
        status=solution.status,
        lower_bound=proof.lower_bound,
        gap=proof.gap,
        budget=budget,
        pins={u: f for u, f in problem.pins.items() if u not in problem.engine_pins},
        kv=dict(kv or {}),
        provenance=provenance or Provenance(model_digest=index.digest, model_name=index.name),
    )


def choice_of(problem: Problem, formats: dict[str, str]) -> np.ndarray:
    """(U,) format indices of an allocation's ``formats``, to certify or to refine it.

    Raises:
        KeyError: a unit is missing. ValueError: a format that the problem does not have.
    """
    column = {name: j for j, name in enumerate(problem.formats)}
    unknown = sorted({formats[u] for u in problem.units} - set(column))
    if unknown:
        raise ValueError(f"formats outside the problem: {', '.join(unknown)}")
    return np.array([column[formats[u]] for u in problem.units], np.int64)
