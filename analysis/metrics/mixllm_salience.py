"""MixLLM: which output rows of the whole model the loss feels most."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bitatlas.analysis.loss_gradients import gradient_dots, gradient_steps, row_offsets
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.schema import DamageRow
from bitatlas.analysis.sequences import mean_and_stderr, sequences_of, stacked
from bitatlas.kernels.errors import UserError

__all__ = ["MixllmSalience"]


class MixllmSalience(Metric):
    """Loss felt by the output rows, ranked over all units together.

        S_c = mean_s ( |a_sc| + a_sc^2 / 2 ),   a_sc = <row c of dL_s/dW, row c of Q(W) - W>
        mixllm_salience = sum_c S_c,   mixllm_share = share of the unit's rows among the model's top rows

    MixLLM (arXiv 2412.14590): the global loss by Taylor expansion with a Fisher-type curvature g g^T; L_s is the mean
    next-token loss of sequence s. All rows of all units compete in one ranking, ``mixllm_top`` of them (10 %) are
    the ones that MixLLM keeps at 8 bits. The rows' S stay in the steps' arrays (``rows``, summed over a step's sequences,
    units end to end in model order). ``count`` is tokens that passed through the unit; experts that no token
    reached are unknown and outside the ranking. Standard error over sequences.
    """

    NAME = "mixllm_salience"
    TITLE = "MixLLM row salience"
    UNIT = "nats/token"
    SOURCE = "MixLLM (arXiv 2412.14590), salience of output features"
    NEEDS = "gradients"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = ("mixllm_salience", "mixllm_share")
    VERSION = 1
    SETTINGS = {"mixllm_top": 0.1}
    LIMITS = {"mixllm_top": (0, 1)}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """At most eight chunks of sequences."""
        if not ctx.formats:
            raise UserError("MixLLM's salience needs formats", fix="--formats int4-g128")
        return gradient_steps(ctx)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays rows (R, F) summed over the sequences, unit (B, U, F), tokens (B, U)."""
        units = ctx.index.units
        start = row_offsets(units)
        total = np.zeros((start[-1], len(ctx.formats)))
        unit = np.zeros((len(sequences_of(ctx, key)[1]), len(units), len(ctx.formats)))

        def on_rows(sequence: int, i: int, dots: Tensor) -> None:
            a = dots.numpy()  # (rows, F)
            salience = np.abs(a) + 0.5 * a * a
            total[start[i] : start[i + 1]] += salience
            unit[sequence, i] = salience.sum(0)

        found = gradient_dots(ctx, key, on_rows)
        return StepResult(arrays={"rows": total, "unit": unit, "tokens": found["tokens"]})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Means over the sequences, and one ranking for each format."""
        units, formats = ctx.index.units, [f.name for f in ctx.formats]
        start = row_offsets(units)
        tokens = stacked(parts, "tokens").sum(0).astype(int)
        mean, spread = mean_and_stderr(stacked(parts, "unit"))  # (U, F)
        total = np.zeros((start[-1], len(formats)))
        for key in self.plan(ctx):
            total += parts[key]["rows"]
        known = np.repeat(tokens > 0, [u.rows for u in units])
        best = max(1, round(float(self.option(ctx, "mixllm_top")) * int(known.sum())))
        high = np.zeros(total.shape, bool)
        for f in range(len(formats)):
            ranked = np.argsort(np.where(known, -total[:, f], np.inf), kind="stable")
            high[ranked[:best], f] = True
        rows: list[DamageRow] = []
        for i, u in enumerate(units):
            if not tokens[i]:
                rows += [r for m in self.EMITS for r in unknown_rows(m, u.key, formats)]
                continue
            share = high[start[i] : start[i + 1]].mean(0)
            for f, name in enumerate(formats):
                rows.append(
                    DamageRow(self.NAME, u.key, name, float(mean[i, f]), float(spread[i, f]), int(tokens[i]))
                )
                rows.append(DamageRow("mixllm_share", u.key, name, float(share[f]), count=int(tokens[i])))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward and one backward, and every weight met with its errors once per sequence."""
        return gradient_cost(ctx, len(self.plan(ctx)))


def gradient_cost(ctx: MeasureContext, steps: int) -> Cost:
    """Cost of `gradient_dots` over all sequences."""
    return Cost(
        steps=steps,
        bytes_read=4 * ctx.index.params,
        forward_tokens=ctx.calibration_tokens,
        backward_tokens=ctx.calibration_tokens,
        flops=2.0 * ctx.index.params * (len(ctx.formats) + 1) * ctx.sequences,
        quantised=ctx.index.params * len(ctx.formats),
    )
