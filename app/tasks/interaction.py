"""The probes of a measurement, for solvers that count cross-layer terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix, load_probes
from bitatlas.analysis.fisher.resampled import RESAMPLED
from bitatlas.analysis.schema import SensitivityTable, UserError, parse_format
from bitatlas.cache.paths import Home
from bitatlas.solvers import Problem, Solver

__all__ = ["has_probes", "with_interaction", "with_probes"]


def has_probes(table: SensitivityTable, home: Home | None = None) -> bool:
    """Whether part files of a metric made of probes are still there, told without reading them."""
    folder = (home or Home.default()).root / "runs" / table.run
    return table.metric in RESAMPLED and any(folder.glob("*.npz"))


def with_probes(
    problem: Problem, table: SensitivityTable | None, solver: Solver, home: Home | None = None
) -> Problem:
    """The problem with the interaction factor of the table's run, when the solver uses one.

    A pass-through format has no error, so its projections are zero; the weight of the pairs is the cross-validated one.

    Raises:
        UserError: the run left no probes, or none for these units and formats.
    """
    if not solver.USES_INTERACTION or table is None:
        return problem
    try:
        probes = load_probes((home or Home.default()).runs(table.run))
    except UserError:
        raise UserError(
            f"{solver.NAME} needs the probes of the Fisher projection",
            found=f"{table.metric} has none, or its part files were deleted",
            fix="bitatlas measure MODEL --metric fisher_projection, then solve with --metric fisher",
        ) from None
    return with_interaction(problem, probes)


def with_interaction(problem: Problem, probes: ProbeMatrix) -> Problem:
    """The problem with the interaction factor of ``probes``.

    Raises:
        UserError: no probes for these units and formats.
    """
    row = {key: i for i, key in enumerate(probes.units)}
    column = {name: j for j, name in enumerate(probes.formats)}
    missing = [f for f in problem.formats if f not in column and parse_format(f).kind != "float"]
    missing += [u for u in problem.units if u not in row]
    if missing:
        raise UserError("the probes do not cover this problem", found=f"without probes: {', '.join(missing[:3])}",
                        fix="measure fisher_projection with these formats")  # fmt: skip
    a, scale = probes.interaction_factor()
    out = np.zeros((len(a), len(problem.units), len(problem.formats)), np.float32)
    rows = [row[u] for u in problem.units]
    for j, name in enumerate(problem.formats):
        if name in column:
            out[:, :, j] = a[:, rows, column[name]]
    return replace(problem, interaction=out, interaction_scale=scale, shrinkage=probes.shrinkage)
