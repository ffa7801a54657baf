"""K-FAC: the Fisher block of a matrix as the Kronecker product of two second moments.

    KL per token ~ 1/2 tr(G dW A dW^T),  A = E[x x^T],  G = E[d d^T]

(Martens & Grosse 2015, eq. 3 and 4; of language models: GuidedQuant, arXiv 2505.07004, and YAQA, arXiv 2505.22988), x the input
at a position, d the gradient of a random score, summed over the sequence, at the output of the same position. Input and
gradient are taken for independent, and positions for unrelated. One pass serves all formats; `ekfac` mends the scale.

An expert has moments of its own, over the tokens routed to it, and the routing weight is in its gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bitatlas.analysis.gradient_groups import ALL_UNITS, default_bytes, gradient_groups
from bitatlas.analysis.metrics.base import Cost, StepResult, unknown_rows
from bitatlas.analysis.metrics.probe_base import PROBE_SETTINGS, ProbeMetric, ratio_stderr
from bitatlas.analysis.schema import DamageRow, QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.factors import FactorPass
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FACTOR_SETTINGS", "KFac", "factor_bytes", "gather_factors"]

FACTOR_SETTINGS: dict[str, Any] = PROBE_SETTINGS | {"draws": 1, "widest_factor": 4096, "factor_sketch": 256}
"""widest_factor: longest side kept as a matrix; a longer one as factor_sketch random mixtures of its vectors."""

_BUCKETS = 8


class KFac(ProbeMetric):
    """1/2 tr(G dW A dW^T). ``count`` = tokens that passed through the unit, ``stderr`` over eight sets of sequences."""

    NAME = "kfac"
    TITLE = "K-FAC"
    UNIT = "nats/token"
    SOURCE = "Martens & Grosse 2015, eq. 3 and 4; 1/2 tr(G dW A dW^T) with sampled scores"
    ADDITIVE = True
    EMITS = ("kfac",)
    SCORES: ClassVar = ("signs", "labels", "data")
    SETTINGS: ClassVar = FACTOR_SETTINGS

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step for each group of layers: a quarter of them, or what fits into the memory limit."""
        super().plan(ctx)
        return list(self._groups(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Factors of a group over all text, and its damages as rows."""
        from bitatlas.analysis.fisher.factors import kfac_values

        units = self._groups(ctx)[key]
        found = gather_factors(self, ctx, units, min(_BUCKETS, len(ctx.calibration.tokens)))
        rows = []
        tokens = found.tokens.numpy()
        names = [f.name for f in ctx.formats]
        for unit in units:
            f = found.factors[unit.key]
            seen = [float(f.inputs.count.sum()) if f.inputs is not None and f.outputs is not None else 0.0,
                    float(f.counts.sum()) if f.counts is not None else 0.0]  # fmt: skip
            if not any(seen):
                rows += unknown_rows(self.NAME, unit.key, names)
                continue
            weight = ctx.weight(unit)
            for fmt in ctx.formats:
                error = (ctx.candidate(unit, fmt) - weight).to(ctx.loaded_in(self._dtype(ctx)).device)
                by_bucket = 0.5 * kfac_values(f, error).numpy()
                value = max(float(by_bucket.sum() / tokens.sum()), 0.0)  # rounding, where dW is nearly zero
                spread = float(ratio_stderr(by_bucket, tokens))
                rows.append(DamageRow(self.NAME, unit.key, fmt.name, value, spread, int(max(seen))))
        return StepResult(rows)

    def finish(self, ctx: MeasureContext, parts: Any) -> list[DamageRow]:
        """Nothing: the steps gave the rows."""
        return []

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward and backward per sequence, draw and group; moments per token, two products per unit and format."""
        cost = super().cost(ctx)
        n, top = ctx.calibration_tokens, ctx.index.top_k / max(ctx.index.n_experts, 1)
        widest, sketch = int(self.option(ctx, "widest_factor")), int(self.option(ctx, "factor_sketch"))
        gather = products = 0.0
        for u in ctx.index.units:
            sides = [min(d, sketch) if d > widest else d for d in (u.rows, u.cols)]
            tokens = n * (top if u.expert >= 0 else 1.0)
            gather += 2.0 * tokens * (sides[0] * u.rows + sides[1] * u.cols)
            products += 4.0 * u.params * (sides[0] + sides[1])
        return Cost(cost.steps, cost.bytes_read, cost.forward_tokens, cost.backward_tokens,
                    gather + products * len(ctx.formats), cost.quantised)  # fmt: skip

    def _groups(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        limit = int(float(self.option(ctx, "gradient_bytes"))) or default_bytes(ctx)
        layers = int(self.option(ctx, "group_layers"))
        groups = gradient_groups(ctx.index.units, limit, lambda u: self._unit_bytes(ctx, u), layers)
        if list(groups) == [ALL_UNITS] and not layers:
            # A step is what a kill may cost.
            layers = -(-ctx.index.n_layers // 4)
            groups = gradient_groups(ctx.index.units, limit, lambda u: 0.0, layers)
        return groups

    def _unit_bytes(self, ctx: MeasureContext, unit: QuantUnit) -> float:
        return _BUCKETS * factor_bytes(self, ctx, unit) + 16.0 * unit.params

    def _dtype(self, ctx: MeasureContext) -> str:
        return str(self.option(ctx, "dtype"))


def factor_bytes(metric: ProbeMetric, ctx: MeasureContext, unit: QuantUnit) -> float:
    """Memory of a unit's two moments in one bucket, an input of its own assumed."""
    widest, sketch = int(metric.option(ctx, "widest_factor")), int(metric.option(ctx, "factor_sketch"))
    return 4.0 * sum(d * (min(sketch, d) if d > widest else d) for d in (unit.rows, unit.cols))


def gather_factors(
    metric: ProbeMetric, ctx: MeasureContext, units: tuple[QuantUnit, ...], buckets: int
) -> FactorPass:
    """The factors of these units over all calibration sequences, which are dealt to the buckets in turn."""
    import torch

    from bitatlas.analysis.fisher.factors import FactorPass
    from bitatlas.analysis.token_weights import token_weights

    loaded = ctx.loaded_in(str(metric.option(ctx, "dtype")))
    weights = token_weights(ctx, metric.token_options(ctx), loaded)
    found = FactorPass(
        loaded, [u.key for u in units], str(metric.option(ctx, "score")),
        widest=int(metric.option(ctx, "widest_factor")), sketch=int(metric.option(ctx, "factor_sketch")), buckets=buckets,
    )  # fmt: skip
    for s, ids in enumerate(ctx.calibration.tokens):
        w = None if weights is None else torch.from_numpy(np.ascontiguousarray(weights[s]))
        if w is None or bool(w.any()):
            seeds = [ctx.random_seed("kfac", s, d) for d in range(int(metric.option(ctx, "draws")))]
            found.run(torch.from_numpy(ids), seeds, s % buckets, w)
    return found
