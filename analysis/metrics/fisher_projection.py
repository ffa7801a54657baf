"""Fisher projection: one backward pass per probe prices every unit in every format, interactions included.

KL(p || p') of a weight change d is 1/2 d^T F d + O(d^3) per sequence, F = E[G G^T] with G from `analysis.fisher.probes`.
Three values come from the same pass:

- ``fisher_projection``: 1/(2T) mean <G, Q(W) - W>^2, unbiased, stderr over sequences;
- ``fisher_trace``: 1/2 (mean ||G||^2 / (T n)) ||Q(W) - W||^2, the isotropic form (HAWQ-V2's with the Fisher);
- ``fisher``: the two combined (`analysis.fisher.posterior`); the one to solve with.

The projections of all probes stay in the run's part files; `analysis.fisher.matrix.load_probes` reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.posterior import posterior, trace_form
from bitatlas.analysis.metrics.base import Parts
from bitatlas.analysis.metrics.probe_base import PROBE_SETTINGS, ProbeMetric, damage_rows, ratio_stderr
from bitatlas.analysis.schema import DamageRow, QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FisherProjection"]


class FisherProjection(ProbeMetric):
    """One backward pass per probe, all units and formats together. ``count`` = tokens that passed through the unit."""

    NAME = "fisher_projection"
    TITLE = "Fisher projection"
    UNIT = "nats/token"
    SOURCE = "second-order KL with sampled labels (Martens 2020, eq. 10); <G, dW> for all units and formats in one pass"
    ADDITIVE = True
    EMITS = ("fisher_projection", "fisher_trace", "fisher")
    VERSION = 1
    SETTINGS: ClassVar = PROBE_SETTINGS

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """The three tables from all probes."""
        joined = self.joined(parts)
        probes = ProbeMatrix.of(joined)
        units = ctx.index.units
        params = np.array([u.params for u in units], np.float64)
        count = probes.reached.sum(0) // max(1, int(self.option(ctx, "draws")))  # (U,) tokens
        asq, _, tokens = probes.by_sequence
        trace, trace_stderr = trace_form(probes, params)
        best = posterior(probes, params, [u.role for u in units], pools=[_pool(u) for u in units])
        tables = {
            "fisher_projection": (probes.damage(), 0.5 * ratio_stderr(asq, tokens)),
            "fisher_trace": (trace, trace_stderr),
            "fisher": (best.value, best.stderr),
        }
        return [row for name, (v, e) in tables.items() for row in damage_rows(name, joined, v, e, count)]


def _pool(unit: QuantUnit) -> tuple[int, str] | None:
    """Experts of one layer and projection: what a rarely reached one is shrunk towards."""
    return (unit.layer, unit.role) if unit.expert >= 0 else None
