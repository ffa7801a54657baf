"""What comes into one unit: the histogram of the magnitudes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["METRIC", "InputsView", "build"]

METRIC = "massive_activations"
"""The metric whose run keeps the histograms."""
_RARE = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class InputsView:
    """Magnitudes of a unit's inputs over the calibration text.

    Attributes:
        counts (B,), edges (B + 1,): the bins between the smallest and the largest magnitude seen; each is a third of an octave.
        below, above: values outside all bins: smaller than the first edge (zeros among them), not smaller than the last.
        total: of all values, 0 = no token reached the unit.
        median, rare: what half of the values and all but one in 10 000 stay below, read off the bins (upper edges).
        words: the answer.
    """

    counts: np.ndarray
    edges: np.ndarray
    below: int
    above: int
    total: int
    median: float
    rare: float
    words: str

    def columns(self) -> dict[str, list[float]]:
        """The histogram as a table: from, to, inputs."""
        return {
            "from": self.edges[:-1].tolist(),
            "to": self.edges[1:].tolist(),
            "inputs": self.counts.tolist(),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            **self.columns(), "below": self.below, "above": self.above, "total": self.total, "median": self.median,
            "rare": self.rare, "words": self.words,
        }  # fmt: skip


def build(arrays: Mapping[str, np.ndarray], unit: int) -> InputsView | None:
    """The view of a unit's inputs; None where nothing was kept.

    Args:
        arrays: ``edges`` (B + 1,) and ``counts`` (U, B + 2) of a finished run, empty when none was.
        unit: its id.
    """
    if not {"edges", "counts"} <= arrays.keys():
        return None
    edges, counts = arrays["edges"], arrays["counts"][unit]
    total = int(counts.sum())
    if not total:
        none = np.zeros(0)
        words = "No calibration token went through this unit: a look-up, or an expert that was not chosen."
        return InputsView(none, none, 0, 0, 0, np.nan, np.nan, words)
    upper = np.append(edges, np.inf)  # of each bin, those outside included
    share = counts.cumsum() / total
    median, rare = (float(upper[np.searchsorted(share, q)]) for q in (0.5, 1 - _RARE))
    inside = counts[1:-1]
    seen = np.flatnonzero(inside)
    first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    words = (
        f"Half of the {total:,} values are below {median:.2g}, all but one in 10,000 below {rare:.2g}"
        + (f": {rare / median:.0f} times as much. " if median > edges[0] else ". ")
        + (f"{counts[0] / total:.1%} are zero or below {edges[0]:.0e}." if counts[0] else "")
    )
    return InputsView(
        inside[first:last], edges[first : last + 1], int(counts[0]), int(counts[-1]), total, median, rare, words.strip()
    )  # fmt: skip
