"""First-order Taylor scores: how much the loss moves, to first order, with a unit's output."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.loss_gradients import gradient_dots, gradient_steps
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.metrics.mixllm_salience import gradient_cost
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import mean_and_stderr, stacked
from bitatlas.kernels.errors import UserError

__all__ = ["Taylor"]


class Taylor(Metric):
    """Absolute first-order change of the loss, mean over sequences.

        taylor        = mean_s | sum_t <dL_s/da_t, (Q(W) - W) x_t> | = mean_s |<dL_s/dW, Q(W) - W>|
        taylor_output = mean_s | sum_t <dL_s/da_t, a_t> | = mean_s |<dL_s/dW, W>|,   a = W x

    CPTQuant's TDMPQ (Nanda et al. 2024): |dL/da da| for a perturbed activation a, here the one that quantising
    the unit causes, and for ``taylor_output`` the one that removes it. L_s is the mean next-token loss of sequence s.
    First-order terms change sign from text to text and vanish in the mean at a minimum, so the absolute value is
    taken before averaging. ``count`` is tokens that passed through the unit; experts that no token reached are unknown.
    """

    NAME = "taylor"
    TITLE = "First-order Taylor"
    UNIT = "nats/token"
    SOURCE = "CPTQuant TDMPQ (Nanda et al. 2024); first-order Taylor expansion"
    NEEDS = "gradients"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = ("taylor", "taylor_output")
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """At most eight chunks of sequences."""
        if not ctx.formats:
            raise UserError("the Taylor score needs formats", fix="--formats int{2,3,4}-g64")
        return gradient_steps(ctx)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays dots (B, U, F), own (B, U), tokens (B, U)."""
        return StepResult(arrays=gradient_dots(ctx, key))

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Means of absolute values."""
        mean, spread = mean_and_stderr(np.abs(stacked(parts, "dots")))
        own, own_spread = mean_and_stderr(np.abs(stacked(parts, "own")))
        tokens = stacked(parts, "tokens").sum(0).astype(int)
        names = [f.name for f in ctx.formats]
        rows: list[DamageRow] = []
        for i, u in enumerate(ctx.index.units):
            n = int(tokens[i])
            if not n:
                rows += unknown_rows(self.NAME, u.key, names)
                rows += unknown_rows("taylor_output", u.key, [NO_FORMAT])
                continue
            rows += [
                DamageRow(self.NAME, u.key, name, float(mean[i, f]), float(spread[i, f]), n)
                for f, name in enumerate(names)
            ]
            rows.append(DamageRow("taylor_output", u.key, NO_FORMAT, float(own[i]), float(own_spread[i]), n))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward and one backward, and every weight met with its errors once per sequence."""
        return gradient_cost(ctx, len(self.plan(ctx)))
