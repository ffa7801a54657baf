"""Weight error: how far rounding moves the weights, no data needed."""

from __future__ import annotations

import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, StepResult, UnitMetric
from bitatlas.analysis.schema import DamageRow, QuantUnit
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["WeightError", "squared_error"]

_BLOCK = 1 << 22  # weights rounded at a time, so that a large embedding needs no second copy of itself


class WeightError(UnitMetric):
    """Sum of squared rounding errors of a unit.

        weight_error = ||dW||_F^2,  weight_error_rel = ||dW||_F^2 / ||W||_F^2,  dW = Q(W) - W

    The relative form is t_l^2 of the linearity theorem (HIGGS, arXiv 2411.17525, eq. 4): perplexity rises
    by sum_l a_l t_l^2. Neither knows what the network does with the weight. Exact, so without spread.
    """

    NAME = "weight_error"
    TITLE = "Weight error"
    UNIT = "squared weight"
    SOURCE = "||Q(W) - W||^2; relative form: HIGGS (arXiv 2411.17525), eq. 4"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("weight_error", "weight_error_rel")
    VERSION = 1

    def look(self, ctx: MeasureContext, unit: QuantUnit) -> StepResult:
        """Reads the unit once and rounds it to every format."""
        energy, errors, largest = 0.0, [0.0] * len(ctx.formats), ctx.largest(unit)
        for block in ctx.blocks(unit):  # (n, cols)
            energy += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            for i, fmt in enumerate(ctx.formats):
                errors[i] += squared_error(block, fmt, largest)
        rows = []
        for fmt, error in zip(ctx.formats, errors):
            # A weight of zeros is stored without error in every format.
            relative = error / energy if energy else 0.0
            rows += [
                DamageRow(name, unit.key, fmt.name, value, count=unit.params)
                for name, value in zip(self.EMITS, (error, relative))
            ]
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """One read, every weight rounded once per format."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            quantised=ctx.index.params * len(ctx.formats),
        )


def squared_error(weight: Tensor, fmt: Format, largest: Tensor | None = None) -> float:
    """``||Q(W) - W||_F^2`` of a (rows, cols) float32 matrix, summed in double precision, row block by row block.

    ``largest`` is the largest |w| of the matrix that these rows are of, for formats with one scale for it.
    """
    block = max(1, _BLOCK // weight.shape[1])
    if fmt.per_tensor and largest is None:
        largest = weight.abs().amax()
    return sum(
        float(torch.linalg.vector_norm(quantize_dequantize(w, fmt, largest) - w, dtype=torch.float64)) ** 2
        for w in weight.split(block)
    )
