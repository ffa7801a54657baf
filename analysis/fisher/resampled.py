"""Bootstrap of the Fisher tables: calibration sequences drawn again, the table made again from them. NumPy only.

What is measured once for all sequences stays as it is: the factor of each format in ``fisher_scaled``, the slopes at the
anchors in ``fisher_anchored``. Both are then ``fisher`` times the factor that they had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.posterior import posterior_of_units, trace_form
from bitatlas.analysis.schema import QuantUnit

__all__ = ["RESAMPLED", "resampled_factors"]

RESAMPLED = ("fisher_projection", "fisher_trace", "fisher", "fisher_scaled", "fisher_anchored")
"""Metrics whose numbers of single sequences the probes keep."""


def resampled_factors(
    probes: ProbeMatrix, metric: str, units: Sequence[QuantUnit], replicates: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """(U, F) damage of each bootstrap replicate over that of all sequences; NaN where no token reached the unit.

    A replicate that happens to have no token for a unit says nothing about it: factor 1.

    Args:
        metric: one of `RESAMPLED`. units: (U,) of the probes, in their order.

    Raises:
        ValueError: fewer than two sequences, or another metric.
    """
    count = len(probes.by_sequence[2])
    if metric not in RESAMPLED or count < 2:
        raise ValueError(f"{metric} of {count} sequences cannot be resampled")
    base = _table(probes, metric, units)
    rng = np.random.default_rng(seed)
    for _ in range(replicates):
        drawn = _table(probes.drawn(rng.integers(0, count, count)), metric, units)
        said = (base > 0) & np.isfinite(drawn)
        factor = np.where(said, drawn / np.where(said, base, 1.0), 1.0)
        yield np.where(np.isfinite(base), factor, np.nan)


def _table(probes: ProbeMatrix, metric: str, units: Sequence[QuantUnit]) -> np.ndarray:
    """(U, F), NaN where no token reached the unit."""
    if metric == "fisher_projection":
        asq, _, tokens = probes.by_sequence
        value = asq.sum(0) / (2 * tokens.sum())
    elif metric == "fisher_trace":
        value = trace_form(probes, np.array([u.params for u in units], np.float64))[0]
    else:
        value = posterior_of_units(probes, units).value
    return np.where((probes.reached.sum(0) > 0)[:, None], value, np.nan)
