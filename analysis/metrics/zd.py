"""ZD: how many of a layer's weights lie far above their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, chunks_by_layer
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit

__all__ = ["Zd"]


class Zd(Metric):
    """Share of weights with a z-score above 1; **smaller** means more important.

        zd = |{w : (w - mean) / std > 1}| / n   over all quantisable weights of the block
        zd_unit = the same over the unit's own weights

    LayerwiseQuant (arXiv 2406.17415), eq. 2. The block's value stands at each of its units; embedding and
    head are blocks of their own. Mean and standard deviation are the population's. 0.159 for a Gaussian.
    """

    NAME = "zd"
    TITLE = "z-score distribution"
    UNIT = "share"
    SOURCE = "LayerwiseQuant (arXiv 2406.17415), eq. 2"
    NEEDS = "weights"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("zd", "zd_unit")
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per block: its score needs all its weights."""
        return list(_blocks(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Reads the block twice: for mean and deviation, then for the count."""
        units = _blocks(ctx)[key]
        moments = [_moments(ctx.weight(u)) for u in units]
        n, total, square = (sum(m[i] for m in moments) for i in range(3))
        limit = _limit(n, total, square)
        above, rows = 0, []
        for unit, own in zip(units, moments):
            weight = ctx.weight(unit)
            above += int((weight > limit).sum())
            share = int((weight > _limit(*own)).sum()) / unit.params
            rows.append(DamageRow("zd_unit", unit.key, NO_FORMAT, share, count=unit.params))
        rows += [DamageRow("zd", u.key, NO_FORMAT, above / n, count=int(n)) for u in units]
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """Two reads."""
        return Cost(steps=len(self.plan(ctx)), bytes_read=2 * checkpoint_bytes(ctx.index))


def _blocks(ctx: MeasureContext) -> dict[str, Sequence[QuantUnit]]:
    layers: dict[str, Sequence[QuantUnit]] = dict(
        chunks_by_layer([u for u in ctx.index.units if u.layer >= 0], max_params=1 << 62)
    )
    return layers | {u.key: (u,) for u in ctx.index.units if u.layer < 0}


def _moments(weight: torch.Tensor) -> tuple[float, float, float]:
    square = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    return float(weight.numel()), float(weight.sum(dtype=torch.float64)), square


def _limit(n: float, total: float, square: float) -> float:
    """mean + standard deviation."""
    mean = total / n
    return mean + max(square / n - mean * mean, 0.0) ** 0.5
