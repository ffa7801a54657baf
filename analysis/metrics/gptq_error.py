"""What is left of a unit's output error after GPTQ has spread it over the columns still to come."""

from __future__ import annotations

from torch import Tensor

from bitatlas.analysis.capture import layer_groups
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.activation_error import (
    InputMoments,
    collect_moments,
    error_sketch,
    relative_stderr,
)
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, unknown_rows
from bitatlas.analysis.schema import DamageRow, QuantUnit
from bitatlas.kernels.quantizers.base import InputStats
from bitatlas.kernels.quantizers.gptq import Gptq
from bitatlas.kernels.reference import dequantize, quantize_dequantize

__all__ = ["GptqError"]


class GptqError(Metric):
    """Squared error of a GPTQ-quantised unit's output, per calibration token.

        gptq_error = (n/N) sum_ij (w_ij - w'_ij)^2 / U_jj^2 = (n/N) tr(dW H' dW^T),   H'^-1 = U^T U
        gptq_output_error = (n/N) tr(dW H dW^T),   gptq_gain = tr(dR H dR^T) / tr(dW H dW^T)

    w and w' are a column's value when its turn comes and the grid point that it gets (GPTQ, arXiv 2210.17323,
    algorithm 1): the sum that every GPTQ code computes on its way is the layer's error under the damped H' exactly,
    since dW = -E U. H = sum x x^T / n over the n tokens that reached the unit, N all calibration tokens;
    H' adds 1 % of the mean diagonal (more where n is less than the columns). dR is what rounding to nearest leaves, so
    that the gain says how much of `activation_error` GPTQ takes away. Looked-up embeddings and experts that no token
    reaches are unknown. The standard error is that of `activation_error`: over sequences, in the middle format.
    """

    NAME = "gptq_error"
    TITLE = "Output error after GPTQ"
    UNIT = "squared activation per token"
    SOURCE = "GPTQ (arXiv 2210.17323), algorithm 1; tr(dW H dW^T) = ||E||_F^2"
    NEEDS = "activations"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("gptq_error", "gptq_output_error", "gptq_gain")
    VERSION = 1
    SETTINGS = {"moment_bytes": 1 << 30, "batch_tokens": 2048}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Groups of layers whose second moments fit into ``moment_bytes``."""
        return list(layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes"))))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """One pass over the text for a group of layers, then GPTQ of every unit in every format."""
        units = layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes")))[key]
        sketches = {u.key: error_sketch(ctx, u) for u in units}
        moments = collect_moments(ctx, units, sketches, False, int(self.option(ctx, "batch_tokens")))
        rows = []
        for unit in units:
            found = moments.get(unit.key)
            if found is None or not found.count:
                names = [f.name for f in ctx.formats]
                rows += [r for m in self.EMITS for r in unknown_rows(m, unit.key, names)]
            else:
                rows += self._rows(ctx, unit, found)
        return StepResult(rows)

    def _rows(self, ctx: MeasureContext, unit: QuantUnit, found: InputMoments) -> list[DamageRow]:
        h, n = found.matrix(), ctx.calibration.size  # (cols, cols), sum over tokens
        weight = ctx.weight(unit).to(h.device)
        gptq = Gptq(InputStats(h, found.count))
        spread = relative_stderr(found.energies)
        rows = []
        for fmt in ctx.formats:
            nearest = _trace(quantize_dequantize(weight, fmt) - weight, h)
            if fmt.kind != "float":
                before = gptq.loss or 0.0
                left = _trace(dequantize(gptq(weight, fmt)) - weight, h)
                damped = ((gptq.loss or 0.0) - before) * found.count
            else:  # a cast has no grid to compensate on
                left = damped = nearest
            gain = nearest / left if left > 0 else float("nan")
            rows += [
                DamageRow(name, unit.key, fmt.name, value, value * spread, found.count)
                for name, value in zip(self.EMITS, (damped / n, left / n))
            ]
            rows.append(DamageRow("gptq_gain", unit.key, fmt.name, gain, count=found.count))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, a second moment per input, and for every unit and format one sweep over its columns."""
        n, units = ctx.calibration_tokens, [u for u in ctx.index.units if u.role != "embed"]
        share = ctx.index.top_k / ctx.index.n_experts if ctx.index.n_experts else 1.0
        gram = sum(2.0 * n * u.cols**2 * (share if u.expert >= 0 else 1) for u in units)
        sweep = sum(4.0 * u.params * u.cols * len(ctx.formats) + 3.0 * u.cols**3 for u in units)
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=n,
            flops=gram + sweep,
            # The searched grid tries 40 ranges a group.
            quantised=40 * sum(u.params for u in units) * len(ctx.formats),
        )


def _trace(error: Tensor, h: Tensor) -> float:
    """tr(E H E^T), not negative."""
    return max(float(((error @ h) * error).double().sum()), 0.0)
