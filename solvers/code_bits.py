"""Bits of a format's codes: what the published rules count, instead of bytes."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.schema import FORMATS
from bitatlas.solvers.problem import Problem

__all__ = ["code_bits", "effective_bits"]


def code_bits(problem: Problem) -> np.ndarray:
    """(F,) float64 code width by name; for other names the bits per weight over all units."""
    mean = 8 * problem.bytes.sum(axis=0) / max(int(problem.params.sum()), 1)
    return np.array(
        [FORMATS[f].bits if f in FORMATS else mean[j] for j, f in enumerate(problem.formats)], float
    )


def effective_bits(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(C, F) bits per weight of each class, scales and zeros counted, and (C,) weights of each class."""
    c = problem.classes
    weights = np.zeros(len(c.bytes))
    np.add.at(weights, c.of_unit, problem.params.astype(float))
    # A class without weights (a KV cache) counts as if its largest format took 16 bits.
    weights = np.where(weights > 0, weights, np.maximum(c.bytes.max(axis=1) / 2, 1.0))
    return 8 * c.bytes / weights[:, None], weights
