"""Fit: what is the best model that fits in N GiB? Table and controls in, a frozen view out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import Budget, ModelIndex, UserError, parse_format
from bitatlas.app.sizes import format_bytes, format_least
from bitatlas.solvers import FrontCache, FrontPoint, Problem
from bitatlas.solvers.infeasible import format_that_fits

__all__ = [
    "FitControls",
    "FitView",
    "FormatShare",
    "FrontLine",
    "MeasuredPoint",
    "MemorySegment",
    "build_fit",
    "front_line",
]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemorySegment:
    """One piece of the memory bar: ``kind`` is weights, kept, kv, reserve or free; bits only for weights."""

    kind: str
    label: str
    nbytes: int
    bits: int = 0


@dataclass(frozen=True, slots=True)
class FormatShare:
    """How much of the model sits in a format."""

    format: str
    bits: int
    units: int
    params: int
    nbytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A verified allocation on the front's axes: measured, never predicted."""

    weights_bytes: int
    kl: float
    stderr: float
    label: str


@dataclass(frozen=True, slots=True)
class FrontLine:
    """The predicted front, thinned for drawing: (P,) total weight bytes and damage, cheapest first."""

    weights_bytes: np.ndarray
    damage: np.ndarray


@dataclass(frozen=True, slots=True)
class FitControls:
    """What the person asked: memory in bytes, the budget it leaves, names for the words, and the formats that were measured."""

    total_bytes: int
    budget: Budget
    metric: str
    unit: str
    measured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitView:
    """Everything the Fit page shows.

    Attributes:
        title: the answer in one sentence. detail: the next useful step.
        segments: the memory bar, adding up to ``total_bytes``.
        shares: bytes, weights and damage by format.
        here: (weights bytes, predicted damage) of the answer.
        bits_per_weight: effective. lower_bound, gap: of the answer.
        choice: (U,) format index per unit; formats: the names.
        pinned: number of pinned units. imputed: units whose damage is an estimate.
    """

    title: str
    detail: str
    segments: tuple[MemorySegment, ...]
    shares: tuple[FormatShare, ...]
    here: tuple[int, float]
    bits_per_weight: float
    lower_bound: float
    gap: float
    choice: np.ndarray
    formats: tuple[str, ...]
    metric: str
    unit: str
    total_bytes: int
    pinned: int
    imputed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        data = asdict(self)
        data["choice"] = self.choice.tolist()
        return data


def front_line(cache: FrontCache, kept_bytes: int, points: int = 400) -> FrontLine:
    """At most ``points`` of the front's supported points, ends included."""
    n = len(cache.cum_bytes)
    at = np.unique(np.linspace(0, n - 1, min(n, points)).round().astype(int))
    return FrontLine(cache.cum_bytes[at] + kept_bytes, np.maximum(cache.cum_damage[at], 0.0))


def build_fit(index: ModelIndex, problem: Problem, cache: FrontCache, controls: FitControls) -> FitView:
    """The best allocation within the controls' budget, from the cached front.

    Raises:
        UserError: the budget is below the smallest allocation; names that one.
    """
    limit = controls.budget.weights_bytes - problem.kept_bytes
    try:
        point = cache.at(limit)
    except ValueError:
        raise _impossible(index, problem, controls) from None
    return _view(index, problem, cache, controls, point)


def _impossible(index: ModelIndex, problem: Problem, controls: FitControls) -> UserError:
    spare = controls.budget.kv_bytes + controls.budget.reserve_bytes
    smallest = problem.min_bytes + problem.kept_bytes
    fix = f"at least {format_least(smallest + spare)} in all"
    if controls.budget.kv_bytes:
        fix += ", a shorter context, or a KV cache of fewer bits"
    if problem.pins:
        fix += ", or fewer pins"
    return UserError(
        f"{format_bytes(controls.total_bytes)} is too small: the smallest weights take {format_bytes(smallest)}",
        found=f"{format_bytes(max(controls.budget.weights_bytes, 0))} are left for weights after {format_bytes(spare)} of KV cache and reserve",
        fix=fix + _smaller_format(index, problem, controls),
    )


def _smaller_format(index: ModelIndex, problem: Problem, controls: FitControls) -> str:
    """The format that would make the weights fit, or the smallest there is."""
    found = format_that_fits(problem.with_limit(controls.budget.weights_bytes - problem.kept_bytes))
    if found is None:
        return ""
    name, nbytes, fits = found
    verb = "allow" if name in controls.measured else "measure and allow"
    return f", or {verb} {name}: {format_bytes(nbytes + problem.kept_bytes)}{'' if fits else ', the smallest there is'}"


def _view(
    index: ModelIndex, problem: Problem, cache: FrontCache, controls: FitControls, point: FrontPoint
) -> FitView:
    params = problem.params
    damage_of = problem.damage[np.arange(len(params)), point.choice]
    size_of = problem.bytes[np.arange(len(params)), point.choice]
    shares = []
    for f, name in enumerate(problem.formats):
        mask = point.choice == f
        if mask.any():
            shares.append(FormatShare(name, parse_format(name).bits, int(mask.sum()), int(params[mask].sum()),
                                      int(size_of[mask].sum()), float(damage_of[mask].sum())))  # fmt: skip
    used = point.payload_bytes + problem.kept_bytes + controls.budget.kv_bytes + controls.budget.reserve_bytes
    segments = _segments(shares, problem.kept_bytes, controls, used)
    gap = point.objective - point.lower_bound
    return FitView(
        title=f"{format_bytes(used)} of {format_bytes(controls.total_bytes)} used; {_concentration(problem.layers, damage_of)}",
        detail=_next_step(cache, point, limit=controls.budget.weights_bytes - problem.kept_bytes),
        segments=segments,
        shares=tuple(shares),
        here=(point.payload_bytes + problem.kept_bytes, point.objective),
        bits_per_weight=point.payload_bytes * 8 / max(1, index.params),
        lower_bound=point.lower_bound,
        gap=gap / point.objective if point.objective > 0 else 0.0,
        choice=point.choice,
        formats=problem.formats,
        metric=controls.metric,
        unit=controls.unit,
        total_bytes=controls.total_bytes,
        pinned=len(problem.pins),
        imputed=int(problem.imputed.sum()) if problem.imputed.size else 0,
    )


def _segments(
    shares: Sequence[FormatShare], kept: int, controls: FitControls, used: int
) -> tuple[MemorySegment, ...]:
    by_bits: dict[int, int] = {}
    for share in shares:
        by_bits[share.bits] = by_bits.get(share.bits, 0) + share.nbytes
    out = [MemorySegment("weights", f"{bits}-bit weights", by_bits[bits], bits) for bits in sorted(by_bits)]
    out.append(MemorySegment("kept", "norms, routers, biases", kept))
    if controls.budget.kv_bytes:
        label = f"KV cache, {controls.budget.context} tokens x {controls.budget.batch}"
        out.append(MemorySegment("kv", label, controls.budget.kv_bytes))
    out.append(MemorySegment("reserve", "reserve", controls.budget.reserve_bytes))
    out.append(MemorySegment("free", "free", max(0, controls.total_bytes - used)))
    return tuple(s for s in out if s.nbytes)


def _concentration(layers: np.ndarray, damage: np.ndarray) -> str:
    """Where the remaining damage sits, in words."""
    total = float(damage.sum())
    if total <= 0:
        return "no damage is predicted"
    _, of_layer = np.unique(layers, return_inverse=True)
    worst = np.sort(np.bincount(of_layer, damage))[::-1]
    count = int(np.searchsorted(np.cumsum(worst), total / 2)) + 1
    noun = "layer carries" if count == 1 else "layers carry"
    return f"{count} of {len(worst)} {noun} half of the predicted damage"


def _next_step(cache: FrontCache, point: FrontPoint, limit: int) -> str:
    """What a little more memory would buy, from the front itself."""
    if point.objective <= 0 or point.slope <= 0:
        return "More memory would not reduce the predicted damage."
    k = max(cache.steps_within(limit), 0)
    ahead = np.flatnonzero(cache.cum_damage[k:] <= point.objective * 2 / 3)
    if not ahead.size:
        return "The widest formats are nearly reached; a third of the remaining damage cannot be removed."
    extra = int(cache.cum_bytes[k + ahead[0]]) - point.payload_bytes
    return f"+{format_bytes(max(extra, 0))} would remove a third of the remaining damage."


def measured_points(
    verifications: Iterable[dict[str, Any]], sizes: dict[str, int]
) -> tuple[MeasuredPoint, ...]:
    """Verified allocations of the model as points; ``sizes`` maps allocation id to its weight bytes."""
    return tuple(
        MeasuredPoint(
            sizes[v["allocation"]],
            float(v["kl_mean"]),
            float(v.get("kl_stderr") or 0.0),
            str(v.get("label", "")),
        )
        for v in verifications
        if v["allocation"] in sizes
    )
