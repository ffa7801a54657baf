"""Allocators: who gives the lowest damage at the same bytes, and what does asking cost? Fronts in, a frozen view out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import Frontier
from bitatlas.app.views.fit import FrontLine, MeasuredPoint, front_line
from bitatlas.app.views.words import count
from bitatlas.cache.runs import RunInfo
from bitatlas.solvers import FrontCache

__all__ = ["AllocatorRow", "AllocatorsView", "Asked", "MeasureCost", "build_allocators", "cost_of"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One allocator's answers: its front, and what they cost.

    Attributes:
        frontier: payload bytes and damage.
        seconds: of solving or searching; evaluations: of the objective; tokens: forward-equivalents that the real model read
            for the search, 0 for none; metric_tokens: the same for measuring the damages that it starts from.
        measured: the damages are measured KL in nats per token, not sums of the metric.
        words: why there is no front (frontier None).
    """

    name: str
    title: str
    frontier: Frontier | None
    seconds: float = float("nan")
    evaluations: int = 0
    tokens: int = 0
    measured: bool = False
    words: str = ""
    metric_tokens: int = 0


@dataclass(frozen=True, slots=True)
class MeasureCost:
    """What measuring a metric took: forward-equivalent tokens of the real model (a backward pass counts two), seconds."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AllocatorRow:
    """One line of the table and of the chart. Bytes are total weight bytes, kept tensors included.

    ``gap`` is the median of (damage - lower bound) / lower bound over the front's points; NaN for measured fronts.
    """

    name: str
    title: str
    weights_bytes: tuple[int, ...]
    damage: tuple[float, ...]
    gap: float
    seconds: float
    evaluations: int
    tokens: int
    measured: bool
    words: str
    metric_tokens: int


@dataclass(frozen=True, slots=True)
class AllocatorsView:
    """Everything the Allocators page shows: rows by gap, the lower bound as a line, verified allocations as points."""

    title: str
    detail: str
    rows: tuple[AllocatorRow, ...]
    bound: FrontLine
    measured: tuple[MeasuredPoint, ...]
    metric: str
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for the download."""
        return {
            "title": self.title, "detail": self.detail, "rows": [asdict(r) for r in self.rows], "metric": self.metric, "unit": self.unit,
            "bound": {"weights_bytes": self.bound.weights_bytes.tolist(), "damage": self.bound.damage.tolist()},
            "measured": [asdict(m) for m in self.measured],
        }  # fmt: skip


def build_allocators(
    asked: Iterable[Asked], cache: FrontCache, kept_bytes: int, measured: Sequence[MeasuredPoint], metric: str, unit: str,
    cost: MeasureCost | None = None,
) -> AllocatorsView:  # fmt: skip
    """Judge fronts against the lower bound of the same problem.

    Args:
        cache: the convex front of the problem that all predicted fronts solve.
        kept_bytes: added to payloads, so that sizes are what the file takes.
        cost: of measuring ``metric``; None = unknown.
    """
    rows = sorted(
        (_row(a, cache, kept_bytes) for a in asked),
        key=lambda r: (r.measured, not r.damage, np.nan_to_num(r.gap, nan=9e9)),
    )
    judged = [r for r in rows if np.isfinite(r.gap)]
    if judged:
        best, worst = judged[0], judged[-1]
        title = f"{best.title} is {_percent(best.gap)} above the lower bound"
        if worst is not best:
            title += f", {worst.title} {_percent(worst.gap)}"
    else:
        title = "No allocator has answered yet"
    detail = "Gap: the median over a front of how far its damage lies above what no allocation of the same bytes can undercut."
    if cost is not None:
        read = f"{cost.tokens:,} forward-equivalent tokens of the real model" if cost.tokens else "no tokens"
        lasted = f" and {cost.seconds:.0f} s" if np.isfinite(cost.seconds) else ""
        detail += f" Measuring {metric} took {read}{lasted}, once for all who solve with it."
    found = [r for r in rows if r.measured and r.damage]
    if found:
        detail += f" {count(len(found), 'search', 'es')} measured on the real model are drawn with marks."
    return AllocatorsView(
        title, detail, tuple(rows), front_line(cache, kept_bytes), tuple(measured), metric, unit
    )


def cost_of(run: RunInfo) -> MeasureCost:
    """From what a run wrote down about itself."""
    told = (run.provenance.get("settings") or {}).get("metric") or {}
    seconds = run.finished - run.started if run.finished is not None else float("nan")
    return MeasureCost(int(told.get("forward_tokens", 0)) + 2 * int(told.get("backward_tokens", 0)), seconds)


def _percent(gap: float) -> str:
    return f"{gap:.1%}" if gap < 1 else f"{1 + gap:.1f} times"


def _row(asked: Asked, cache: FrontCache, kept: int) -> AllocatorRow:
    front, gap = asked.frontier, float("nan")
    if front is not None and not asked.measured:
        gaps = []
        for payload, damage in zip(front.payload_bytes.tolist(), front.predicted.tolist()):
            bound = cache.at(payload).lower_bound
            if bound > 0 and np.isfinite(damage):
                gaps.append(damage / bound - 1)
        gap = float(np.median(gaps)) if gaps else gap
    return AllocatorRow(
        asked.name, asked.title, tuple(int(b) + kept for b in front.payload_bytes) if front is not None else (),
        tuple(float(d) for d in front.predicted) if front is not None else (), max(gap, 0.0) if gap == gap else gap, asked.seconds,
        asked.evaluations, asked.tokens, asked.measured, asked.words, asked.metric_tokens,
    )  # fmt: skip
