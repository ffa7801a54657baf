"""ZD: how many of a layer's weights lie far above their mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Parts, StepResult, UnitMetric, chunks_by_layer
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit

__all__ = ["Zd"]

_BINS = 1 << 16


class Zd(UnitMetric):
    """Share of weights with a z-score above 1; **smaller** means more important.

        zd = |{w : (w - mean) / std > 1}| / n   over all quantisable weights of the block
        zd_unit = the same over the unit's own weights

    LayerwiseQuant (arXiv 2406.17415), eq. 2. The block's value stands at each of its units; embedding and
    head are blocks of their own. Mean and standard deviation are the population's. 0.159 for a Gaussian.

    bfloat16 weights are read once: they take 65 536 values at most, so their histogram tells the count above any
    limit exactly. Others are read again when the limit of their block is known.
    """

    NAME = "zd"
    TITLE = "z-score distribution"
    UNIT = "share"
    SOURCE = "LayerwiseQuant (arXiv 2406.17415), eq. 2"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("zd", "zd_unit")
    VERSION = 1

    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Moments (count, sum, squares), weights above the unit's own limit, and the histogram if it is exact."""
        moments = np.zeros(3)
        counts: Tensor | None = torch.zeros(_BINS, dtype=torch.int64)
        for block in ctx.blocks(unit):
            square = float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            moments += (block.numel(), float(block.sum(dtype=torch.float64)), square)
            halves = block.contiguous().view(torch.int16).reshape(-1, 2)  # low, high 16 bits of each weight
            if counts is not None and not bool(halves[:, 0].any()):
                counts += torch.bincount(halves[:, 1].to(torch.int32) & (_BINS - 1), minlength=_BINS)
            else:
                counts = None
        exact = counts is not None
        used = counts.nonzero().flatten() if counts is not None else torch.zeros(0, dtype=torch.int64)
        values = (used << 16).to(torch.int32).view(torch.float32).numpy()
        number = counts[used].numpy() if counts is not None else np.zeros(0, np.int64)
        own = _above(values, number, moments) if exact else _recount(ctx, unit, _limit(moments))
        return StepResult(
            arrays={
                "moments": moments[None], "own": np.array([own]), "exact": np.array([exact]),
                "values": values, "counts": number,
            }
        )  # fmt: skip

    def gather(self, looks: Sequence[StepResult]) -> StepResult:
        """One histogram for the step: units of a step that is cut out of a layer belong to one block."""
        arrays = super().gather(looks).arrays or {}
        values, where = np.unique(arrays["values"], return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, where, arrays["counts"])
        return StepResult(arrays=arrays | {"values": values, "counts": counts})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """The limit of each block, and how many of its weights are above it."""
        chunks = chunks_by_layer(ctx.index.units)
        moments: dict[int, np.ndarray] = {}
        for key, units in chunks.items():
            moments[units[0].layer] = moments.get(units[0].layer, 0) + parts[key]["moments"].sum(0)
        above = dict.fromkeys(moments, 0)
        for key, units in chunks.items():
            part, block = parts[key], moments[units[0].layer]
            if units[0].layer >= 0 and part["exact"].all():
                above[units[0].layer] += _above(part["values"], part["counts"], block)
            elif units[0].layer >= 0:
                above[units[0].layer] += sum(_recount(ctx, u, _limit(block)) for u in units)
        rows = []
        for key, units in chunks.items():
            for unit, own in zip(units, parts[key]["own"]):
                n, count = unit.params, int(own)
                rows.append(DamageRow("zd_unit", unit.key, NO_FORMAT, count / n, count=n))
                if unit.layer >= 0:
                    n, count = int(moments[unit.layer][0]), above[unit.layer]
                rows.append(DamageRow("zd", unit.key, NO_FORMAT, count / n, count=n))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read, two where the weights are not bfloat16."""
        return Cost(steps=len(self.plan(ctx)), bytes_read=2 * checkpoint_bytes(ctx.index))


def _above(values: np.ndarray, counts: np.ndarray, moments: np.ndarray) -> int:
    """Weights above the limit that ``moments`` set, out of a histogram."""
    return int(counts[values > np.float32(_limit(moments))].sum())


def _recount(ctx: MeasureContext, unit: QuantUnit, limit: float) -> int:
    """Weights of a unit above ``limit``, read again."""
    return sum(int((block > limit).sum()) for block in ctx.blocks(unit))


def _limit(moments: np.ndarray) -> float:
    """mean + standard deviation."""
    n, total, square = (float(m) for m in moments)
    mean = total / n
    return mean + max(square / n - mean * mean, 0.0) ** 0.5
