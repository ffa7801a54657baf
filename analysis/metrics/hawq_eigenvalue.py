"""HAWQ: the Hessian's largest eigenvalue of each block, by power iteration.

HAWQ (Dong et al. 2019, ICCV) orders blocks by lambda / n for their bits and by lambda ||Q(W) - W||^2 for fine-tuning
(section 3.3); the latter, halved, bounds the second-order loss of the block: v^T H v <= lambda |v|^2. A bound holds for one
unit alone, so the values do not add up. Power iteration finds the eigenvalue of largest magnitude; where that is negative
(language models are at no minimum) the iteration goes on with H shifted by it, which leads to the largest one.

Cost: per block one forward, one backward that keeps its graph, and about 1.5 backwards per iteration through the
layers from the block on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.hessian import Curvature
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["HawqEigenvalue"]


class HawqEigenvalue(Metric):
    """1/2 lambda_max ||Q(W) - W||^2, an upper bound of the second-order loss. ``count`` = iterations.

    ``hessian_eigenvalue`` is that of the block which the unit is in. ``stderr``: last change of the iteration, or,
    with several batches, the standard error over batches.

    Settings:
        eigen_group: block of the Hessian: ``layer`` (all its units together) or ``unit``.
        eigen_tol: stop when the eigenvalue changes by less than this share.
        eigen_iterations: most iterations in a batch.
        eigen_tokens: tokens of calibration text in a batch.
        hessian_batches: disjoint batches of text; the eigenvalues are averaged.
        hessian_spread: standard deviations over batches added to the mean (Q-BERT, Shen et al. 2020, eq. 3: 1).
    """

    NAME = "hawq_eigenvalue"
    TITLE = "HAWQ top eigenvalue x error"
    UNIT = "nats/token, at most"
    SOURCE = (
        "HAWQ (Dong et al. 2019), section 3.3; mean and spread over batches: Q-BERT (Shen et al. 2020), eq. 3"
    )
    NEEDS = "gradients"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = ("hawq_eigenvalue", "hessian_eigenvalue")
    SETTINGS: ClassVar = {
        "eigen_group": "layer", "eigen_tol": 0.01, "eigen_iterations": 30, "eigen_tokens": 256,
        "hessian_batches": 1, "hessian_spread": 0.0, "quantizer": "rtn",
    }  # fmt: skip

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step per block."""
        if not ctx.formats:
            raise UserError("HAWQ needs formats", fix="--formats int{2,3,4}-g64")
        return list(self._blocks(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """The block's eigenvalue and the damages of its units, as rows."""
        from bitatlas.analysis.hessian import curvature, hessian_batches

        units = self._blocks(ctx)[key]
        many = int(self.option(ctx, "hessian_batches"))
        values, changes, steps, known = [], [], 0, np.zeros(len(units), bool)
        for b, ids in enumerate(hessian_batches(ctx, int(self.option(ctx, "eigen_tokens")), many)):
            with curvature(ctx.loaded, [u.key for u in units], ids.to(ctx.loaded.device)) as c:
                value, change, used = self._top(ctx, c, units, (key, b))
                known |= c.known
            values.append(value)
            changes.append(change)
            steps += used
        mean = float(np.mean(values))
        spread = float(np.std(values, ddof=1)) if many > 1 else 0.0
        error = spread / np.sqrt(many) if many > 1 else changes[0]
        level = max(mean, 0.0) + float(self.option(ctx, "hessian_spread")) * spread
        rows = []
        for i, unit in enumerate(units):
            count = steps if known[i] else 0
            rows.append(DamageRow("hessian_eigenvalue", unit.key, NO_FORMAT, mean if count else float("nan"),
                                  error if count else float("nan"), count))  # fmt: skip
            weight = ctx.weight(unit)
            for fmt in ctx.formats:
                scale = 0.5 * float((ctx.candidate(unit, fmt) - weight).double().square().sum())
                value, spread_of = (scale * level, scale * error) if count else (float("nan"), float("nan"))
                rows.append(DamageRow(self.NAME, unit.key, fmt.name, value, spread_of, count))
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """Expected at two thirds of the largest number of iterations."""
        from bitatlas.analysis.hessian import hessian_cost

        tokens = int(self.option(ctx, "eigen_tokens")) * int(self.option(ctx, "hessian_batches"))
        passes = 1 + 1.5 * int(self.option(ctx, "eigen_iterations")) * 2 / 3
        return hessian_cost(ctx, self._blocks(ctx), tokens, passes)

    def _blocks(self, ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
        """Step key -> units of one block of the Hessian."""
        from bitatlas.analysis.hessian import probe_groups

        group = str(self.option(ctx, "eigen_group"))
        if group not in ("layer", "unit"):
            raise UserError("unknown block of the Hessian", found=group, fix="eigen_group=layer or unit")
        return probe_groups(ctx.index.units, group)

    def _top(
        self, ctx: MeasureContext, c: Curvature, units: tuple[QuantUnit, ...], label: tuple[object, ...]
    ) -> tuple[float, float, int]:
        """Largest eigenvalue, its last change, iterations."""
        import torch

        tol, most = float(self.option(ctx, "eigen_tol")), int(self.option(ctx, "eigen_iterations"))
        generator = torch.Generator().manual_seed(ctx.random_seed(self.NAME, *label))
        start = {
            i: torch.randn((u.rows, u.cols), generator=generator) for i, u in enumerate(units) if c.known[i]
        }
        if not start:
            return 0.0, 0.0, 0
        v = _normalised(c.vectors(start))
        shift, before, change = 0.0, float("inf"), float("inf")
        for n in range(1, most + 1):
            hv = [h - shift * x for h, x in zip(c.product(v), v)]
            value = _dot(v, hv)
            change = abs(value - before)
            # The shift is taken out again, so that a small eigenvalue beside a large negative one is found too.
            size = max(abs(value + shift), 0.1 * abs(value))
            if change <= tol * size or n == most:
                if value >= 0 or shift or n == most:
                    return value + shift, change, n
                shift = value
                v = _normalised(c.vectors(start))
                before = float("inf")
                continue
            before = value
            norm = _dot(hv, hv) ** 0.5
            if norm == 0.0:
                return 0.0, 0.0, n
            v = [x / norm for x in hv]
        return before + shift, change, most


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b)))


def _normalised(v: list[Tensor]) -> list[Tensor]:
    norm = _dot(v, v) ** 0.5
    return [x / norm for x in v]
