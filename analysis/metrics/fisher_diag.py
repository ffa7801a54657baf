"""Fisher diagonal: every weight's own squared gradient times its squared error.

    damage = 1/2 sum_ij F_ij (Q(W) - W)_ij^2,  F_ij = 1/T mean_s G_s,ij^2

with G_s the gradient of one sequence (SqueezeLLM, arXiv 2306.07629, eq. 3; FIT, arXiv 2210.08502, eq. 4, before its
average over the layer). The score is random by default, so that F is the model's own Fisher; ``--set score=data``
takes the text's labels as the papers do (the empirical Fisher, whose cross terms between tokens do not vanish).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bitatlas.analysis.metrics.base import Parts
from bitatlas.analysis.metrics.probe_base import PROBE_SETTINGS, ProbeMetric
from bitatlas.analysis.schema import DamageRow

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FisherDiag"]


class FisherDiag(ProbeMetric):
    """One backward pass per probe. ``count`` = tokens that passed through the unit; settings as `fisher_projection`."""

    NAME = "fisher_diag"
    TITLE = "Fisher diagonal"
    UNIT = "nats/token"
    SOURCE = "SqueezeLLM (arXiv 2306.07629), eq. 3; FIT (arXiv 2210.08502), eq. 4"
    ADDITIVE = True
    EMITS = ("fisher_diag",)
    SQUARE: ClassVar = True
    SCORES: ClassVar = ("signs", "labels", "data")
    SETTINGS: ClassVar = PROBE_SETTINGS

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Mean over probes; stderr over sequences."""
        return self.square_rows(ctx, parts)
