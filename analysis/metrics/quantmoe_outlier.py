"""QuantMoE-Bench's outlier score: one input column much larger than its own average spoils a grid."""

from __future__ import annotations

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, chunks_by_layer
from bitatlas.analysis.schema import NO_FORMAT, DamageRow

__all__ = ["QuantMoeOutlier"]


class QuantMoeOutlier(Metric):
    """score(W) = max_j ( max_i |W_ij| / mean_i |W_ij| ), i over output rows, j over input columns.

    QuantMoE-Bench (arXiv 2406.08155), the outlier-aware linear layer scorer: a higher score asks for more
    bits. Columns of zeros are left out; a weight of zeros has no score (NaN).
    """

    NAME = "quantmoe_outlier"
    TITLE = "Outlier score"
    UNIT = "ratio"
    SOURCE = "QuantMoE-Bench (arXiv 2406.08155), outlier-aware linear layer scorer"
    NEEDS = "weights"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("quantmoe_outlier",)
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per layer, more for a large one."""
        return list(chunks_by_layer(ctx.index.units))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Reads each unit once."""
        rows = []
        for unit in chunks_by_layer(ctx.index.units)[key]:
            magnitude = ctx.weight(unit).abs()  # (rows, cols)
            mean, top = magnitude.mean(0), magnitude.amax(0)  # (cols,)
            known = mean > 0
            score = float((top[known] / mean[known]).max()) if bool(known.any()) else float("nan")
            rows.append(DamageRow(self.NAME, unit.key, NO_FORMAT, score, count=unit.params))
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read."""
        return Cost(steps=len(self.plan(ctx)), bytes_read=checkpoint_bytes(ctx.index))
