"""EK-FAC: K-FAC's eigenbasis with the second moments that the gradients really have in it.

    KL per token ~ 1/2 sum_ij L_ij M_ij^2,  M = U_G^T dW U_A,  L_ij = 1/T mean_s (U_G^T G_s U_A)_ij^2

(George et al. 2018, arXiv 1806.03884, eq. 8; G_s the weight gradient of a sequence, so that what K-FAC takes for independent is
measured: input against gradient, and position against position). The trace is exactly the Fisher's.

Two passes over the text: factors and their eigenvectors first, then one backward pass per probe and two products per unit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from bitatlas.analysis.metrics.base import Cost, Parts
from bitatlas.analysis.metrics.kfac import FACTOR_SETTINGS, factor_bytes, gather_factors
from bitatlas.analysis.metrics.probe_base import ProbeMetric
from bitatlas.analysis.schema import DamageRow, QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.deltas import DeltaStore
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["EKFac"]


class EKFac(ProbeMetric):
    """Eigenvalue-corrected K-FAC. ``count`` = tokens that passed through the unit; settings as `kfac`.

    A side wider than ``widest_factor`` keeps its coordinates instead of eigenvectors.
    """

    NAME = "ekfac"
    TITLE = "EK-FAC"
    UNIT = "nats/token"
    SOURCE = "eigenvalue-corrected K-FAC: George et al. 2018, eq. 8, with per-sequence gradients"
    ADDITIVE = True
    EMITS = ("ekfac",)
    SQUARE: ClassVar = True
    SCORES: ClassVar = ("signs", "labels", "data")
    SETTINGS: ClassVar = FACTOR_SETTINGS

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Mean over probes; stderr over sequences."""
        return self.square_rows(ctx, parts)

    def cost(self, ctx: MeasureContext) -> Cost:
        """A pass for the factors, one for the eigenvalues, two rotations of every gradient and error, decompositions."""
        cost = super().cost(ctx)
        widest, sketch = int(self.option(ctx, "widest_factor")), int(self.option(ctx, "factor_sketch"))
        probes = ctx.sequences * int(self.option(ctx, "draws"))
        flops = cost.flops
        for u in ctx.index.units:
            sides = [d for d in (u.rows, u.cols) if d <= widest]
            flops += (probes + len(ctx.formats)) * 2.0 * u.params * sum(sides)
            flops += sum(10.0 * d**3 for d in sides)
            flops += (
                2.0
                * ctx.calibration_tokens
                * sum(d * min(d, sketch if d > widest else d) for d in (u.rows, u.cols))
            )
        return replace(
            cost,
            forward_tokens=2 * cost.forward_tokens,
            backward_tokens=2 * cost.backward_tokens,
            flops=flops,
        )

    def _unit_bytes(self, ctx: MeasureContext, unit: QuantUnit) -> float:
        return super()._unit_bytes(ctx, unit) + 2 * factor_bytes(self, ctx, unit)

    def _store(self, ctx: MeasureContext, units: tuple[QuantUnit, ...], limit: int) -> DeltaStore:
        """Errors in the eigenbases of these units; the bases come from a pass over the text of their own."""
        from bitatlas.analysis.fisher.deltas import RotatedStore
        from bitatlas.analysis.fisher.factors import basis_of

        found = gather_factors(self, ctx, units, 1).factors
        return RotatedStore(
            lambda key: ctx.weight(ctx.unit_by_key[key]),
            lambda key, f: ctx.candidate(ctx.unit_by_key[key], ctx.formats[f]),
            len(ctx.formats),
            limit_bytes=limit,
            basis={key: basis_of(f) for key, f in found.items()},
            device=ctx.device,
        )
