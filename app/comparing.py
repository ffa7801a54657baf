"""What the Compare page and the command need beside the two allocations: how stable A's choice is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitatlas.analysis.schema import ModelIndex, SensitivityTable, parse_format
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.robust import stability, stability_from_errors

__all__ = ["kept_share"]


def kept_share(
    index: ModelIndex,
    formats: Mapping[str, str],
    table: SensitivityTable,
    samples: np.ndarray | None = None,
    replicates: int = 30,
) -> np.ndarray | None:
    """(U,) how often each unit keeps its format when the calibration sequences are resampled and the same bytes re-solved.

    Args:
        samples: (N, U, F) damage of each sequence alone in the table's formats; without them the table's standard
            errors are used. Units that the table says nothing about are NaN.

    Returns:
        None when the table cannot price the allocation.
    """
    keys = index.unit_keys()
    if not set(formats.values()) <= set(table.formats):
        return None
    usable = [parse_format(f) for f in table.formats]
    choice = np.array([table.formats.index(formats[k]) for k in keys])
    size = index.bytes_table(usable)
    rows = np.arange(len(keys))
    problem = Problem.build(index, table, usable, int(size[rows, choice].sum()))
    solver = get_solver("hull")
    if samples is not None:
        share = stability(problem, samples, solver, replicates=replicates)
    else:
        share = stability_from_errors(problem, table.stderr, solver, replicates=replicates)
    known = np.isfinite(table.damage[rows, choice])
    return np.where(known, share[rows, choice], np.nan)
