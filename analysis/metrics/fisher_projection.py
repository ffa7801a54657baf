"""Fisher projection: one backward pass per probe prices every unit in every format, interactions included.

KL(p || p') of a weight change d is 1/2 d^T F d + O(d^3) per sequence, F = E[G G^T] with G from `analysis.fisher.probes`.
Three values come from the same pass, a fourth from a few forward passes more:

- ``fisher_projection``: 1/(2T) mean <G, Q(W) - W>^2, unbiased, stderr over sequences;
- ``fisher_trace``: 1/2 (mean ||G||^2 / (T n)) ||Q(W) - W||^2, the isotropic form (HAWQ-V2's with the Fisher);
- ``fisher``: the two combined (`analysis.fisher.posterior`), the best prediction for a single unit;
- ``fisher_scaled``: the same times one factor a format, so that a whole model in that format is predicted as it is
  measured (`analysis.fisher.whole`): the one to solve with.

The projections of all probes stay in the run's part files; `analysis.fisher.matrix.load_probes` reads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.posterior import posterior, trace_form
from bitatlas.analysis.metrics.base import Cost, Parts, StepResult
from bitatlas.analysis.metrics.probe_base import (
    PROBE_SETTINGS,
    ProbeMetric,
    damage_rows,
    ratio_stderr,
    sequences_of,
)
from bitatlas.analysis.schema import DamageRow, Format, QuantUnit

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.whole import WholeModel
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FisherProjection"]

_WHOLE = "whole "


class FisherProjection(ProbeMetric):
    """One backward pass per probe, all units and formats together. ``count`` = tokens that passed through the unit."""

    NAME = "fisher_projection"
    TITLE = "Fisher projection"
    UNIT = "nats/token"
    SOURCE = "second-order KL with sampled labels (Martens 2020, eq. 10); <G, dW> for all units and formats in one pass"
    ADDITIVE = True
    EMITS = ("fisher_projection", "fisher_trace", "fisher", "fisher_scaled")
    VERSION = 2
    SETTINGS: ClassVar = {**PROBE_SETTINGS, "whole_tokens": 1024}
    """whole_tokens: calibration tokens on which the model is measured as a whole in each format; 0 = not at all."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: tuple[MeasureContext, WholeModel] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of probes, then ``whole FORMAT`` for each format."""
        return super().plan(ctx) + [_WHOLE + f.name for f in self._measured(ctx)]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """A chunk of probes, or the KL (S,) of the model with all units in a format, and the noise (1,)."""
        if not key.startswith(_WHOLE):
            return super().step(ctx, key)
        self._pass = None  # the errors of the last group make room
        fmt = next(f for f in ctx.formats if f.name == key.removeprefix(_WHOLE))
        whole = self._whole_model(ctx)
        return StepResult(
            arrays={"uniform_kl": whole.kl(lambda u: ctx.candidate(u, fmt)), "noise": np.array([whole.noise])}
        )

    def _whole_model(self, ctx: MeasureContext) -> WholeModel:
        if self._whole is None or self._whole[0] is not ctx:
            from bitatlas.analysis.fisher.whole import WholeModel

            loaded, tokens = ctx.loaded_in(str(self.option(ctx, "dtype"))), ctx.calibration.tokens
            whole = WholeModel(loaded, tokens[: self._sequences(ctx)], ctx.index.units, ctx.weight)
            self._whole = ctx, whole
        return self._whole[1]

    def cost(self, ctx: MeasureContext) -> Cost:
        """The probes, and a forward pass over a few sequences for the original and for each format."""
        cost, formats = super().cost(ctx), len(self._measured(ctx))
        tokens = (formats + 1) * self._sequences(ctx) * sequences_of(ctx)[1] if formats else 0
        return replace(cost, steps=len(self.plan(ctx)), forward_tokens=cost.forward_tokens + tokens)

    def _measured(self, ctx: MeasureContext) -> tuple[Format, ...]:
        """Formats whose uniform model is measured: none where only some positions count."""
        return (
            ctx.formats
            if int(self.option(ctx, "whole_tokens")) > 0 and self.option(ctx, "tokens") == "all"
            else ()
        )

    def _sequences(self, ctx: MeasureContext) -> int:
        count, length = sequences_of(ctx)
        return min(count, max(2, int(self.option(ctx, "whole_tokens")) // length))

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """The tables from all probes."""
        joined = self.joined({key: parts[key] for key in super().plan(ctx)})
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
        if found := {f.name: parts[_WHOLE + f.name] for f in self._measured(ctx)}:
            from bitatlas.analysis.fisher.whole import format_scales

            measured, noise = (
                np.array([found[n][k].mean() for n in joined.formats]) for k in ("uniform_kl", "noise")
            )
            scale = format_scales(best.value, measured, noise)
            tables["fisher_scaled"] = best.value * scale, best.stderr * scale
        return [row for name, (v, e) in tables.items() for row in damage_rows(name, joined, v, e, count)]


def _pool(unit: QuantUnit) -> tuple[int, str] | None:
    """Experts of one layer and projection: what a rarely reached one is shrunk towards."""
    return (unit.layer, unit.role) if unit.expert >= 0 else None
