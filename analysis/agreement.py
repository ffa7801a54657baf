"""How far a prediction can be trusted: predicted against measured damage, with bootstrap intervals. NumPy only.

Used for single flips (one point = unit x format) and for whole allocations (one point = an allocation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from bitatlas.analysis.schema import SensitivityTable, UserError

__all__ = ["Agreement", "agreement", "agreement_of_tables", "band_spearman", "rank", "spearman"]

_MIN_POINTS = 3


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predicted against measured. Intervals are 95 % bootstrap percentiles over the points.

    Attributes:
        points: finite, positive pairs used; dropped: pairs left out (unknown or not positive).
        spearman, spearman_low, spearman_high: rank correlation.
        slope, slope_low, slope_high: of ln measured on ln predicted; 1 = calibrated in scale at every size.
        r2: of ln measured, prediction taken as it is (no fit; below 0 = worse than the mean).
        ratio, ratio_low, ratio_high: median of predicted / measured.
    """

    points: int
    dropped: int
    spearman: float
    spearman_low: float
    spearman_high: float
    slope: float
    slope_low: float
    slope_high: float
    r2: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-able form."""
        return asdict(self)


def rank(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties get their mean; (n,) float64."""
    values = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return (first + (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties averaged; NaN when one side is constant or there are fewer than 3 points."""
    if len(x) < _MIN_POINTS:
        return float("nan")
    a, b = rank(x), rank(y)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float((a @ b) / norm) if norm > 0 else float("nan")


def agreement(
    predicted: np.ndarray, measured: np.ndarray, *, floor: float = 0.0, bootstrap: int = 500, seed: int = 0
) -> Agreement:
    """Agreement of two lists of damages.

    Args:
        predicted, measured: (n,) each; NaN = unknown.
        floor: noise floor of the measurement; points not above it say nothing and are dropped.
        bootstrap: resamples of the points.

    Raises:
        UserError: fewer than 3 usable points.
    """
    x, y = np.asarray(predicted, np.float64).ravel(), np.asarray(measured, np.float64).ravel()
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > max(floor, 0.0))
    x, y = x[good], y[good]
    if len(x) < _MIN_POINTS:
        raise UserError("too few points to compare", found=f"{len(x)} of {len(good)} pairs are usable",
                        fix="measure more flips, or lower the noise with more text")  # fmt: skip
    lx, ly = np.log(x), np.log(y)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(x), (bootstrap, len(x)))

    def interval(stat: Callable[[np.ndarray], float]) -> tuple[float, float]:
        values = np.array([stat(d) for d in draws])
        values = values[np.isfinite(values)]
        return tuple(np.quantile(values, [0.025, 0.975])) if len(values) else (np.nan, np.nan)

    rho_low, rho_high = interval(lambda d: spearman(x[d], y[d]))
    slope_low, slope_high = interval(lambda d: _slope(lx[d], ly[d]))
    ratio_low, ratio_high = interval(lambda d: float(np.exp(np.median(lx[d] - ly[d]))))
    total = ((ly - ly.mean()) ** 2).sum()
    return Agreement(
        len(x), int((~good).sum()),
        spearman(x, y), float(rho_low), float(rho_high),
        _slope(lx, ly), float(slope_low), float(slope_high),
        float(1 - ((ly - lx) ** 2).sum() / total) if total > 0 else float("nan"),
        float(np.exp(np.median(lx - ly))), float(ratio_low), float(ratio_high),
    )  # fmt: skip


def agreement_of_tables(
    predicted: SensitivityTable, measured: SensitivityTable, **options: float
) -> Agreement:
    """Single flips: two tables on the units and formats that both have; ``options`` as in `agreement`."""
    formats = [f for f in measured.formats if f in predicted.formats]
    if not formats or predicted.units != measured.units:
        raise UserError(f"{predicted.metric} and {measured.metric} have no common ground",
                        found=f"{len(formats)} common formats")  # fmt: skip
    a, b = predicted.select(formats), measured.select(formats)
    return agreement(a.damage, b.damage, **{"floor": measured.floor, **options})  # type: ignore[arg-type]


def band_spearman(
    bits: np.ndarray, predicted: np.ndarray, measured: np.ndarray, width: float = 0.5
) -> dict[tuple[float, float], float]:
    """Rank correlation inside bands of average bits: (from, to) -> Spearman, bands with at least 3 points."""
    bits = np.asarray(bits, np.float64)
    at = np.floor(bits / width).astype(int)
    out = {}
    for band in np.unique(at):
        inside = at == band
        if inside.sum() >= _MIN_POINTS:
            out[float(band * width), float((band + 1) * width)] = spearman(
                np.asarray(predicted)[inside], np.asarray(measured)[inside]
            )
    return out


def _slope(lx: np.ndarray, ly: np.ndarray) -> float:
    """Least-squares slope of ly on lx; NaN when lx is constant."""
    dx = lx - lx.mean()
    var = dx @ dx
    return float(dx @ (ly - ly.mean()) / var) if var > 0 else float("nan")
