"""One step of several weights-only metrics at once, each weight read once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitatlas.analysis.measure import MeasureContext, run_step, save_step, step_saved
from bitatlas.analysis.metrics.base import Metric, StepResult, UnitMetric

__all__ = ["run_together"]


def run_together(metrics: Mapping[Metric, str | Path], ctx: MeasureContext, key: str) -> None:
    """Run step ``key`` of every metric (metric -> folder of its parts) that has not got it yet.

    Metrics that look unit by unit share the read, and what they share of the work (`MeasureContext.of_unit`);
    the others run one after another. The parts are the very ones that `measure.run_step` would have left.
    """
    todo = [m for m, parts in metrics.items() if not step_saved(parts, key)]
    looks: dict[UnitMetric, list[StepResult]] = {m: [] for m in todo if isinstance(m, UnitMetric)}
    if looks:
        for unit in next(iter(looks)).units_of(ctx, key):
            for looking, found in looks.items():
                found.append(looking.look(ctx, unit))
    for m in todo:
        if isinstance(m, UnitMetric):
            save_step(metrics[m], key, m.gather(looks[m]))
        else:
            run_step(m, ctx, metrics[m], key)
