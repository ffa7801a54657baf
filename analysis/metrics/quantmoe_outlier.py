"""QuantMoE-Bench's outlier score: one input column much larger than its own average spoils a grid."""

from __future__ import annotations

import torch

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, StepResult, UnitMetric
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit

__all__ = ["QuantMoeOutlier"]


class QuantMoeOutlier(UnitMetric):
    """score(W) = max_j ( max_i |W_ij| / mean_i |W_ij| ), i over output rows, j over input columns.

    QuantMoE-Bench (arXiv 2406.08155), the outlier-aware linear layer scorer: a higher score asks for more
    bits. Columns of zeros are left out; a weight of zeros has no score (NaN).
    """

    NAME = "quantmoe_outlier"
    TITLE = "Outlier score"
    UNIT = "ratio"
    SOURCE = "QuantMoE-Bench (arXiv 2406.08155), outlier-aware linear layer scorer"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("quantmoe_outlier",)
    VERSION = 1

    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Reads the unit once."""
        total, top, rows = torch.zeros(1, dtype=torch.float64), torch.zeros(1), 0
        for block in ctx.blocks(unit):  # (n, cols)
            magnitude = block.abs()
            # Running values, no list: small tensors kept from every block would lie between the large ones, and what
            # those leave could not be used again (2.5 GB for an embedding of 150 000 tokens).
            total, top = total + magnitude.sum(0), torch.maximum(top, magnitude.amax(0))
            rows += len(block)
        mean = total / rows  # (cols,)
        known = mean > 0
        score = float((top[known] / mean[known]).max()) if bool(known.any()) else float("nan")
        return StepResult([DamageRow(self.NAME, unit.key, NO_FORMAT, score, count=unit.params)])

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read."""
        return Cost(steps=len(self.plan(ctx)), bytes_read=checkpoint_bytes(ctx.index))
