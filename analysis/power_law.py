"""The Clauset-Shalizi-Newman power-law fit with an exact scan over xmin, in array operations.

For every eigenvalue as xmin: alpha = 1 + n / sum ln(x / xmin) over the n values from xmin on, and the
Kolmogorov-Smirnov distance between that law and the values; the xmin of the smallest distance wins
(SIAM Review 51, 2009, eq. 3.1 and sec. 3.3; ``WWFit`` of weightwatcher 0.7.7, whose rule for short
spectra is kept too). A coarser scan lands in another local minimum, so all are tried; most are ruled out by the
distance at a few points, which is a lower bound of the whole. The same bound tells whether values that are known to
some error only would give the same xmin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitatlas.kernels import tail as kernel

__all__ = ["THRESHOLD", "PowerLaw", "fit_power_law"]

THRESHOLD = 1e-5  # weightwatcher's: eigenvalues below are the null space
_SMALL = 20  # below so many eigenvalues weightwatcher corrects the bias and rewards long tails
_SMALL_TAIL = 8
_SMALL_REWARD = 0.868
_DRIFT = 1e-3  # of alpha
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
        sure: whether the errors that were given leave xmin as it is and alpha within 1e-3.
    """

    alpha: float
    sigma: float
    xmin: float
    distance: float
    tail: int
    index: int
    sure: bool = True


_NAN = float("nan")
_NONE = PowerLaw(_NAN, _NAN, _NAN, _NAN, tail=0, index=-1)


def fit_power_law(values: np.ndarray, off: np.ndarray | None = None) -> PowerLaw:
    """The tail of a spectrum. ``values`` in any order; those up to 1e-5 are left out; fewer than 2 give NaN.

    ``off`` are bounds of the errors of the values' logarithms, for which the values must be ascending.
    """
    x = np.sort(np.asarray(values, np.float64))
    first = int(np.searchsorted(x, THRESHOLD, side="right"))
    x = x[first:]
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
    alphas[~usable] = np.nan
    penalty = -_SMALL_REWARD / np.sqrt(tail) if small else np.zeros(n - 1)
    slack, drift = np.zeros(n - 1), np.zeros(n - 1)
    if off is not None:
        slack, drift = _slack(alphas, tail, off[first:])
    scan = kernel.best_start if kernel.available() else _scan
    best, distance, sure = scan(logs, alphas, penalty, slack)
    alpha = float(alphas[best])
    sure = sure and bool(drift[best] < _DRIFT)
    return PowerLaw(
        alpha, (alpha - 1) / tail[best] ** 0.5, float(x[best]), distance, int(tail[best]), best, sure
    )


def _slack(alphas: np.ndarray, tail: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much each start's distance and alpha may be off, (n - 1,) each, when logarithms are by up to ``off`` (n,).

    With a = alpha - 1 = n / sum ln(x / xmin) and t = a ln(x / xmin) the model is 1 - e^-t. An error s of ln xmin
    changes a by a^2 s, so t by a s (t - 1) and the model by at most a s, as e^-t |t - 1| <= 1. Errors of the other
    logarithms change it by at most a e^-t times their own plus a t e^-t times their mean, and t e^-t <= 1 / e.
    """
    mean = np.cumsum(off[::-1])[::-1][:-1] / tail
    worst = np.maximum.accumulate(off[::-1])[::-1][:-1]
    a = np.abs(alphas - 1)
    return a * (off[:-1] + worst + mean / np.e), a * a * (off[:-1] + mean)


def _scan(
    logs: np.ndarray, alphas: np.ndarray, penalty: np.ndarray, slack: np.ndarray
) -> tuple[int, float, bool]:
    """As `bitatlas.kernels.tail.best_start`, in array operations."""
    n = len(logs)
    tail = n - np.arange(n - 1)
    candidates = np.flatnonzero(~np.isnan(alphas))
    # The distance at a few points of each tail bounds the whole from below.
    offset = (np.linspace(0, 1, _PROBES) * (tail[candidates, None] - 1)).astype(np.int64)  # (C, probes)
    at = candidates[:, None] + offset
    model = 1 - np.exp((1 - alphas[candidates, None]) * (logs[at] - logs[candidates, None]))
    bound = np.abs(model - offset / tail[candidates, None]).max(1) + penalty[candidates]
    order = np.argsort(bound - slack[candidates], kind="stable")
    reach = (bound - slack[candidates])[order]
    best, winner, rest = np.inf, -1, np.inf  # rest: how close the others come
    start, size = 0, 16
    while start < len(order) and reach[start] <= best + (slack[winner] if winner >= 0 else 0):
        chunk = candidates[order[start : start + size]]
        found = _distances(logs, alphas, tail, chunk) + penalty[chunk]
        for value, position in zip(found.tolist(), chunk.tolist()):
            if (value, position) < (best, winner) or winner < 0:
                rest = min(rest, best - (slack[winner] if winner >= 0 else 0))
                best, winner = value, position
            else:
                rest = min(rest, value - slack[position])
        start += size
        size = max(16, min(256, _BLOCK // n))
    sure = bool(rest > best + slack[winner]) if len(candidates) > 1 else True
    return winner, best - float(penalty[winner]), sure


def _distances(logs: np.ndarray, alphas: np.ndarray, tail: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(rows,) Kolmogorov-Smirnov distances: max over the tail of |1 - (x / xmin)^(1 - alpha) - rank / n|."""
    first = int(rows.min())
    rank = np.arange(first, len(logs))[None, :] - rows[:, None]  # (R, n - first), negative before xmin
    model = 1 - np.exp((1 - alphas[rows, None]) * np.maximum(logs[None, first:] - logs[rows, None], 0))
    gap = np.abs(model - rank / tail[rows, None])
    gap[rank < 0] = 0
    return gap.max(1)
