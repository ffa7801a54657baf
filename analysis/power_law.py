"""The Clauset-Shalizi-Newman power-law fit with an exact scan over xmin, in array operations.

For every eigenvalue as xmin: alpha = 1 + n / sum ln(x / xmin) over the n values from xmin on, and the
Kolmogorov-Smirnov distance between that law and the values; the xmin of the smallest distance wins
(SIAM Review 51, 2009, eq. 3.1 and sec. 3.3; ``WWFit`` of weightwatcher 0.7.7, whose rule for short
spectra is kept too). A coarser scan lands in another local minimum, so all are tried; most are ruled out by the
distance at a few points, which is a lower bound of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["PowerLaw", "fit_power_law"]

_THRESHOLD = 1e-5  # weightwatcher's: eigenvalues below are the null space
_SMALL = 20  # below so many eigenvalues weightwatcher corrects the bias and rewards long tails
_SMALL_TAIL = 8
_SMALL_REWARD = 0.868
_PROBES = 24
_BLOCK = 1 << 20  # distances held at a time


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """A fitted tail p(x) ~ x^-alpha, x >= xmin.

    Attributes:
        alpha: exponent; NaN when nothing can be fitted.
        sigma: its standard error, (alpha - 1) / sqrt(tail).
        xmin, distance: where the tail begins and the Kolmogorov-Smirnov distance there.
        tail: values in the tail.
        index: position of xmin among the ascending values above the threshold.
    """

    alpha: float
    sigma: float
    xmin: float
    distance: float
    tail: int
    index: int


_NAN = float("nan")
_NONE = PowerLaw(_NAN, _NAN, _NAN, _NAN, tail=0, index=-1)


def fit_power_law(values: np.ndarray) -> PowerLaw:
    """The tail of a spectrum. ``values`` in any order; those up to 1e-5 are left out; fewer than 2 give NaN."""
    x = np.sort(np.asarray(values, np.float64))
    x = x[x > _THRESHOLD]
    n = len(x)
    if n < 2:
        return _NONE
    logs = np.log(x)
    tail = n - np.arange(n - 1)  # (n - 1,) values from each xmin on
    spread = np.cumsum(logs[::-1])[::-1][:-1] - tail * logs[:-1]  # sum ln(x / xmin)
    small = n < _SMALL
    usable = spread > 1e-12
    if small:
        usable &= tail >= _SMALL_TAIL
    if not usable.any():
        return _NONE
    with np.errstate(divide="ignore"):
        alphas = 1 + (tail - small) / spread
    penalty = -_SMALL_REWARD / np.sqrt(tail) if small else np.zeros(n - 1)
    best = _scan(logs, alphas, tail, np.flatnonzero(usable), penalty)
    distance = _distances(logs, alphas, tail, np.array([best]))[0]
    alpha = float(alphas[best])
    return PowerLaw(
        alpha, (alpha - 1) / tail[best] ** 0.5, float(x[best]), float(distance), int(tail[best]), int(best)
    )


def _scan(
    logs: np.ndarray, alphas: np.ndarray, tail: np.ndarray, candidates: np.ndarray, penalty: np.ndarray
) -> int:
    """Position of the smallest distance + penalty, the first among equals."""
    # The distance at a few points of each tail bounds the whole from below.
    offset = (np.linspace(0, 1, _PROBES) * (tail[candidates, None] - 1)).astype(np.int64)  # (C, probes)
    at = candidates[:, None] + offset
    model = 1 - np.exp((1 - alphas[candidates, None]) * (logs[at] - logs[candidates, None]))
    bound = np.abs(model - offset / tail[candidates, None]).max(1) + penalty[candidates]
    order = np.argsort(bound, kind="stable")
    best, winner = np.inf, -1
    start, size = 0, 16
    while start < len(order) and bound[order[start]] <= best:
        chunk = candidates[order[start : start + size]]
        found = _distances(logs, alphas, tail, chunk) + penalty[chunk]
        for value, position in zip(found, chunk):
            if (value, position) < (best, winner) or winner < 0:
                best, winner = float(value), int(position)
        start += size
        size = max(16, min(256, _BLOCK // len(logs)))
    return winner


def _distances(logs: np.ndarray, alphas: np.ndarray, tail: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(rows,) Kolmogorov-Smirnov distances: max over the tail of |1 - (x / xmin)^(1 - alpha) - rank / n|."""
    first = int(rows.min())
    rank = np.arange(first, len(logs))[None, :] - rows[:, None]  # (R, n - first), negative before xmin
    model = 1 - np.exp((1 - alphas[rows, None]) * np.maximum(logs[None, first:] - logs[rows, None], 0))
    gap = np.abs(model - rank / tail[rows, None])
    gap[rank < 0] = 0
    return gap.max(1)
