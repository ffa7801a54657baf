"""One metric against the truth: single flips, whole allocations, top-k, calibration texts, and the badge in words. NumPy and SciPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from bitatlas.analysis.agreement import Agreement, agreement, band_spearman, spearman
from bitatlas.analysis.schema import NO_FORMAT, SensitivityTable, UserError

__all__ = [
    "BADGES",
    "AllocationTruths",
    "Trust",
    "badge",
    "between_runs",
    "between_texts",
    "decode_choice",
    "encode_choice",
    "judge",
    "sum_of_choices",
    "top_overlap",
]

_NAN = float("nan")
_SMALL_KL = (
    1.0  # nats per token; above it a KL saturates and no second-order prediction can be right in scale
)
_BAND = 0.5  # bits

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

BADGES: tuple[tuple[str, float, str], ...] = (
    ("trusted", 0.9, "green"),
    ("ranks well", 0.7, "blue"),
    ("weak", 0.4, "orange"),
    ("not to be trusted", -1.0, "red"),
)
"""Badge, the least rank correlation that earns it, colour. Judged by the worst half-bit band of whole allocations; where
there are none, by single flips of one format (sign left aside for values that are no damage)."""


@dataclass(frozen=True, slots=True)
class AllocationTruths:
    """Measured whole allocations.

    Attributes:
        formats: what the positions in ``choices`` mean.
        choices: (N, U); bits: (N,) effective bits per weight.
        kl: (N,) nats per token; floor: noise floor.
    """

    formats: tuple[str, ...]
    choices: np.ndarray
    bits: np.ndarray
    kl: np.ndarray
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class Trust:
    """How one metric did. NaN = cannot be said; intervals are 95 % bootstrap percentiles.

    Attributes:
        metric, run, unit: what was judged; nats: is it a KL, so that its scale can be right or wrong.
        flips: usable single flips; flip_spearman (low, high), flip_kendall: over all of them, formats mixed (NaN for a
            value without formats); flip_within: Spearman inside one format, mean over formats weighted by flips;
            flip_formats: format -> Spearman; flip_ratio: median predicted / measured where measured KL < 1 nat.
        top_k, top_overlap: share of the k most damaged units that the metric also puts there, mean over formats.
        allocations: usable ones; spearman (low, high): over all of them; bands: ``2.5-3.0`` -> Spearman inside that
            half-bit band of effective bits, band_counts: how many each holds; band_least: the worst band.
        ratio (low, high): median predicted / measured where measured KL < 1 nat; slope, r2: of ln KL (`agreement`).
        tokens: of calibration text; forward_equivalents: tokens forwards + 2 x tokens backwards;
            cost_ratio: that cost over the forward passes of measuring every flip on the truth's text;
            cost_ratio_same_text: the same if both used equally many tokens.
        calibration_runs, calibration_least: runs that differ in their calibration text or seed only (as many tokens, in
            sequences as long), and the smallest Spearman of the metric with itself between two of them.
        other_texts, text_least, text_ratio: the calibration texts among them that are not this run's, the smallest Spearman
            of this run with one of those, and the median of this run's values over theirs where that is farthest from 1.
        same_text: it was measured on the text of the truth, so it flatters itself.
        badge: one of `BADGES`, or ``not judged``.
    """

    metric: str
    run: str = ""
    unit: str = ""
    nats: bool = False
    flips: int = 0
    flip_spearman: float = _NAN
    flip_low: float = _NAN
    flip_high: float = _NAN
    flip_kendall: float = _NAN
    flip_within: float = _NAN
    flip_formats: Mapping[str, float] = field(default_factory=dict)
    flip_ratio: float = _NAN
    top_k: int = 0
    top_overlap: float = _NAN
    allocations: int = 0
    spearman: float = _NAN
    low: float = _NAN
    high: float = _NAN
    bands: Mapping[str, float] = field(default_factory=dict)
    band_counts: Mapping[str, int] = field(default_factory=dict)
    band_least: float = _NAN
    ratio: float = _NAN
    ratio_low: float = _NAN
    ratio_high: float = _NAN
    slope: float = _NAN
    r2: float = _NAN
    tokens: int = 0
    forward_equivalents: float = _NAN
    cost_ratio: float = _NAN
    cost_ratio_same_text: float = _NAN
    calibration_runs: int = 0
    calibration_least: float = _NAN
    other_texts: tuple[str, ...] = ()
    text_least: float = _NAN
    text_ratio: float = _NAN
    same_text: bool = False
    badge: str = "not judged"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @property
    def score(self) -> float:
        """What the badge is judged by."""
        if np.isfinite(self.band_least):
            return self.band_least
        return abs(self.flip_within) if not np.isfinite(self.flip_spearman) else self.flip_within


def encode_choice(choice: np.ndarray) -> str:
    """One character per unit: the position of its format, base 36."""
    return "".join(_DIGITS[i] for i in choice.tolist())


def decode_choice(text: str) -> np.ndarray:
    """(U,) positions of the formats. Inverse of `encode_choice`."""
    return np.array([_DIGITS.index(c) for c in text], np.intp)


def badge(score: float) -> tuple[str, str]:
    """Words and colour for a rank correlation."""
    if not np.isfinite(score):
        return "not judged", "gray"
    return next((word, colour) for word, least, colour in BADGES if score >= least)


def sum_of_choices(table: np.ndarray, choices: np.ndarray) -> np.ndarray:
    """(N,) additive prediction: the damage table (U, F) summed over the units of every choice (N, U)."""
    return table[np.arange(table.shape[0]), choices].sum(1)


def top_overlap(predicted: np.ndarray, measured: np.ndarray, k: int) -> float:
    """Share of the ``k`` largest measured that are among the ``k`` largest predicted; NaN for fewer than 2 k points."""
    if k < 1 or len(measured) < 2 * k:
        return _NAN
    a, b = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (predicted, measured))
    return len(a & b) / k


def between_runs(tables: Sequence[SensitivityTable]) -> float:
    """The smallest Spearman between two runs of one metric, over the cells that both know; NaN for fewer than two."""
    found = []
    for i, a in enumerate(tables):
        for b in tables[i + 1 :]:
            x, y = _shared_cells(a, b)
            found.append(spearman(x, y))
    found = [x for x in found if np.isfinite(x)]
    return min(found) if found else _NAN


def between_texts(table: SensitivityTable, others: Mapping[str, SensitivityTable]) -> dict[str, Any]:
    """What another calibration text changes: ``other_texts``, ``text_least`` and ``text_ratio`` of `Trust`.

    Args:
        others: name of the text -> the same metric on it.
    """
    ranks, ratios = [], []
    for other in others.values():
        x, y = _shared_cells(table, other)
        ranks.append(spearman(x, y))
        positive = (x > 0) & (y > 0)
        if positive.any():
            ratios.append(float(np.exp(np.median(np.log(x[positive] / y[positive])))))
    ranks = [r for r in ranks if np.isfinite(r)]
    farthest = max(ratios, key=lambda r: abs(np.log(r)), default=_NAN)
    return {"other_texts": tuple(others), "text_least": min(ranks, default=_NAN), "text_ratio": farthest}


def _shared_cells(a: SensitivityTable, b: SensitivityTable) -> tuple[np.ndarray, np.ndarray]:
    """Values of both at the cells that both know."""
    formats = [f for f in a.formats if f in b.formats]
    if not formats or a.units != b.units:
        return np.zeros(0), np.zeros(0)
    x, y = a.select(formats).damage.ravel(), b.select(formats).damage.ravel()
    both = np.isfinite(x) & np.isfinite(y)
    return x[both], y[both]


def _agree(x: np.ndarray, y: np.ndarray, floor: float) -> Agreement | None:
    try:
        return agreement(x, y, floor=floor, bootstrap=400 if len(x) <= 2000 else 100)
    except UserError:  # too few usable points: nothing can be said
        return None


def _flips(table: SensitivityTable, truth: SensitivityTable, nats: bool) -> dict[str, Any]:
    free = table.formats == (NO_FORMAT,)
    formats = [f for f in truth.formats if free or f in table.formats]
    if not formats or table.units != truth.units:
        return {}
    measured = truth.select(formats).damage
    predicted = np.repeat(table.damage, len(formats), 1) if free else table.select(formats).damage
    good = np.isfinite(predicted) & np.isfinite(measured) & (measured > max(truth.floor, 0.0))
    out: dict[str, Any] = {"flips": int(good.sum())}
    within, weights, overlaps, sizes = {}, [], [], []
    for f, name in enumerate(formats):
        x, y = predicted[good[:, f], f], measured[good[:, f], f]
        rho = spearman(x, y)
        if np.isfinite(rho):
            within[name] = rho
            weights.append(len(x))
        k = max(3, round(0.1 * len(x)))
        share = top_overlap(x, y, k)
        if np.isfinite(share):
            overlaps.append(share)
            sizes.append(k)
    if within:
        out |= {
            "flip_formats": within,
            "flip_within": float(np.average(list(within.values()), weights=weights)),
        }
    if overlaps:
        out |= {"top_overlap": float(np.mean(overlaps)), "top_k": int(np.median(sizes))}
    x, y = predicted[good], measured[good]
    if not free and len(x) >= 3:
        out["flip_spearman"] = spearman(x, y)
        out["flip_kendall"] = float(stats.kendalltau(x, y).statistic)
        got = _agree(x, y, truth.floor)
        if got is not None:
            out |= {"flip_low": got.spearman_low, "flip_high": got.spearman_high}
        small = (y < _SMALL_KL) & (x > 0)
        if nats and small.any():
            out["flip_ratio"] = float(np.median(x[small] / y[small]))
    return out


def _wholes(predicted: np.ndarray, truth: AllocationTruths, nats: bool) -> dict[str, Any]:
    good = np.isfinite(predicted) & (truth.kl > max(truth.floor, 0.0)) & (predicted > 0)
    x, y, bits = predicted[good], truth.kl[good], truth.bits[good]
    got = _agree(x, y, truth.floor)
    out: dict[str, Any] = {"allocations": int(good.sum())}
    if got is None:
        return out
    bands = {f"{a:g}-{b:g}": rho for (a, b), rho in band_spearman(bits, x, y, _BAND).items()}
    counts = {
        name: int(((bits >= float(name.split("-")[0])) & (bits < float(name.split("-")[1]))).sum())
        for name in bands
    }
    known = [rho for rho in bands.values() if np.isfinite(rho)]
    out |= {"spearman": got.spearman, "low": got.spearman_low, "high": got.spearman_high, "bands": bands, "band_counts": counts,
            "band_least": min(known) if known else _NAN}  # fmt: skip
    if nats:
        out |= {"slope": got.slope, "r2": got.r2}
        small = _agree(x[y < _SMALL_KL], y[y < _SMALL_KL], truth.floor)
        if small is not None:
            out |= {"ratio": small.ratio, "ratio_low": small.ratio_low, "ratio_high": small.ratio_high}
    return out


def judge(
    name: str,
    table: SensitivityTable | None,
    *,
    flips: SensitivityTable | None = None,
    wholes: AllocationTruths | None = None,
    predicted: np.ndarray | None = None,
    nats: bool = False,
    **facts: Any,
) -> Trust:
    """The row of one metric.

    Args:
        name: of the row.
        table: its values for single flips; None leaves them out.
        flips: measured single flips; wholes: measured whole allocations.
        predicted: (N,) what the metric says about these allocations; None where it says nothing.
        nats: its values are a KL in nats per token.
        facts: further fields of `Trust` (run, unit, tokens, costs, calibration).
    """
    found: dict[str, Any] = {"nats": nats, **facts}
    if table is not None and flips is not None:
        found |= _flips(table, flips, nats)
    if predicted is not None and wholes is not None:
        found |= _wholes(predicted, wholes, nats)
    row = Trust(name, **found)
    return Trust(name, **{**found, "badge": badge(row.score)[0]})
