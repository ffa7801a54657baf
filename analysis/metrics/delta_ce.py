"""Change of the cross-entropy on the text itself: first order on the data's labels, second order by Gauss-Newton.

    CE(W + d) - CE(W) ~ <grad CE, d> + 1/2 d^T G d,  d = Q(W) - W

KL has no first-order term, the loss on real labels has one: the gradient is zero only at a trained optimum and on
the training text. G is the Gauss-Newton part of the Hessian, which for cross-entropy is the Fisher information, so the
second term is that of the Fisher projection (Martens 2020, section 9.2). One backward pass per sequence for the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Parts
from bitatlas.analysis.metrics.probe_base import PROBE_SETTINGS, ProbeMetric, damage_rows, ratio_stderr
from bitatlas.analysis.schema import DamageRow

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["DeltaCe"]


class DeltaCe(ProbeMetric):
    """Expected change of the loss, which may be negative. ``count`` = tokens that passed through the unit.

    ``ce_first_order`` and ``ce_gauss_newton`` are the two terms. Settings as `fisher_projection`.
    """

    NAME = "delta_ce"
    TITLE = "Change of the cross-entropy"
    UNIT = "nats/token"
    SOURCE = (
        "second-order expansion of the loss: data-label gradient and Gauss-Newton (Martens 2020, section 9.2)"
    )
    ADDITIVE = True
    EMITS = ("delta_ce", "ce_first_order", "ce_gauss_newton")
    CE: ClassVar = True
    SETTINGS: ClassVar = PROBE_SETTINGS

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Both terms and their sum; stderr over sequences."""
        every = self.joined(parts)
        data, probes = every.rows(every.draw < 0), every.rows(every.draw >= 0)
        first, weight = data.a.astype(np.float64), data.tokens
        second = np.zeros_like(first)
        at = np.searchsorted(data.sequence, probes.sequence)
        np.add.at(second, at, 0.5 * probes.a.astype(np.float64) ** 2)
        second /= max(1, int(self.option(ctx, "draws")))
        count = data.reached.sum(0)
        rows = []
        for name, term in (
            ("delta_ce", first + second),
            ("ce_first_order", first),
            ("ce_gauss_newton", second),
        ):
            rows += damage_rows(name, every, term.sum(0) / weight.sum(), ratio_stderr(term, weight), count)
        return rows
