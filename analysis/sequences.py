"""Steps over calibration sequences: keys, the sequences behind a key, and reading the parts back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.metrics.base import Parts

__all__ = ["mean_and_stderr", "sequence_steps", "sequences_of", "stacked"]

STEP_TOKENS = 2048
_PREFIX = "sequences "


def sequence_steps(ctx: MeasureContext, tokens: int = 0) -> list[str]:
    """``sequences 0-7``, ... : chunks of about ``tokens`` (2048) tokens that cover the calibration set."""
    size = max(1, (tokens or STEP_TOKENS) // ctx.seq_len)
    return [f"{_PREFIX}{i}-{min(i + size, ctx.sequences) - 1}" for i in range(0, ctx.sequences, size)]


def sequences_of(ctx: MeasureContext, key: str) -> tuple[int, np.ndarray]:
    """Number of the first sequence of a step, and its tokens (B, T) int64."""
    first, last = (int(n) for n in key.removeprefix(_PREFIX).split("-"))
    return first, ctx.calibration.tokens[first : last + 1]


def stacked(parts: Parts, name: str) -> np.ndarray:
    """One array of all sequence steps, concatenated along the sequences."""
    return np.concatenate([parts[key][name] for key in parts if key.startswith(_PREFIX)])


def mean_and_stderr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the known of the first axis, and its standard error; NaN where none (or only one) is known.

    Args:
        values: (S, ...), NaN = the sequence says nothing.
    """
    known = np.isfinite(values)
    n = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n > 0, np.where(known, values, 0.0).sum(0) / n, np.nan)
        square = np.where(known, (values - mean) ** 2, 0.0).sum(0)
        stderr = np.where(n > 1, np.sqrt(square / (n - 1) / n), np.nan)
    return mean, stderr
