"""Fisher projection: one backward pass per probe prices every unit in every format, interactions included.

KL(p || p') of a weight change d is 1/2 d^T F d + O(d^3) per sequence, F = E[G G^T] with G from `analysis.fisher.probes`.
Three values come from the same pass, two from a few passes more:

- ``fisher_projection``: 1/(2T) mean <G, Q(W) - W>^2, unbiased, stderr over sequences;
- ``fisher_trace``: 1/2 (mean ||G||^2 / (T n)) ||Q(W) - W||^2, the isotropic form (HAWQ-V2's with the Fisher);
- ``fisher``: the two combined (`analysis.fisher.posterior`), the best prediction for a single unit;
- ``fisher_scaled``: the same times one factor a format, so that a whole model in that format is predicted as it is
  measured (`analysis.fisher.whole`);
- ``fisher_anchored``: that averaged with slopes of the KL at four allocations that it proposes itself
  (`analysis.fisher.anchors`): the one to solve with.

The projections of all probes stay in the run's part files; `analysis.fisher.matrix.load_probes` reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.fisher.anchors import LEVELS, anchored, front_choices
from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.parts import Joined
from bitatlas.analysis.fisher.posterior import posterior_of_units, trace_form
from bitatlas.analysis.gradient_groups import units_of_group
from bitatlas.analysis.metrics.base import Cost, Parts, StepResult
from bitatlas.analysis.metrics.probe_base import (
    PROBE_LIMITS,
    PROBE_SETTINGS,
    ProbeMetric,
    damage_rows,
    ratio_stderr,
    sequences_of,
)
from bitatlas.analysis.schema import DamageRow, Format

if TYPE_CHECKING:
    from bitatlas.analysis.fisher.whole import WholeModel
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["FisherProjection"]

_WHOLE = "whole "
_FRONT = "front "
_FRONT_TOKENS = 1024  # a step: all anchors, one forward and backward pass each


class FisherProjection(ProbeMetric):
    """One backward pass per probe, all units and formats together. ``count`` = tokens that passed through the unit."""

    NAME = "fisher_projection"
    TITLE = "Fisher projection"
    UNIT = "nats/token"
    SOURCE = "second-order KL with sampled labels (Martens 2020, eq. 10); <G, dW> for all units and formats in one pass"
    ADDITIVE = True
    EMITS = ("fisher_projection", "fisher_trace", "fisher", "fisher_scaled", "fisher_anchored")
    VERSION = 4
    SETTINGS: ClassVar = {**PROBE_SETTINGS, "whole_tokens": 1024, "front_tokens": 2048}
    """whole_tokens: calibration tokens on which the model is measured as a whole in each format; 0 = not at all.
    front_tokens: calibration tokens for the slopes at each anchor; 0 = none, as when nothing is measured as a whole.
    """
    LIMITS: ClassVar = {**PROBE_LIMITS, "whole_tokens": (0, math.inf), "front_tokens": (0, math.inf)}

    def __init__(self) -> None:
        super().__init__()
        self._whole: tuple[MeasureContext, WholeModel] | None = None
        self._known: tuple[MeasureContext, _Tables] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of probes, ``whole FORMAT`` for each format, then ``front GROUP: part 1 of 2`` at the anchors."""
        return super().plan(ctx) + [_WHOLE + f.name for f in self._measured(ctx)] + list(self._front(ctx))

    def _front(self, ctx: MeasureContext) -> dict[str, tuple[str, np.ndarray]]:
        """Step key -> group of layers and its calibration sequences."""
        if not self._measured(ctx) or not int(self.option(ctx, "front_tokens")):
            return {}
        chosen = self._spread(ctx, int(self.option(ctx, "front_tokens")))
        # A sequence is never cut: long ones make fewer parts, of one sequence each.
        parts = min(len(chosen), -(-len(chosen) * sequences_of(ctx)[1] // _FRONT_TOKENS))
        chunks = np.array_split(chosen, parts)
        return {
            f"{_FRONT}{group}: part {i} of {len(chunks)}": (group, chunk)
            for group in self._groups(ctx)
            for i, chunk in enumerate(chunks, 1)
        }

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

    def step_after(self, ctx: MeasureContext, key: str, parts: Parts) -> StepResult:
        """At the anchors: (A, U) ``choice``, (A, u, F) ``slopes`` of the units ``place`` and (A,) ``kl``, nats summed over ``tokens``."""
        if not key.startswith(_FRONT):
            return self.step(ctx, key)
        from bitatlas.analysis.fisher.whole import WholeModel

        self._whole = None  # its logits make room
        group, chosen = self._front(ctx)[key]
        ids = ctx.calibration.tokens[chosen]
        units = units_of_group(ctx.index.units, group)
        choices = front_choices(self._tables(ctx, parts).scaled[0], ctx.index.bytes_table(ctx.formats))
        probes = self._probe_pass(ctx, group, units)
        place = {u.key: i for i, u in enumerate(ctx.index.units)}
        whole = WholeModel(probes.loaded, ids, ctx.index.units, ctx.weight)
        slopes, kl = np.zeros((len(choices), len(units), len(ctx.formats))), np.zeros(len(choices))
        for i, choice in enumerate(choices):
            with whole.placed(lambda u, at=choice: ctx.candidate(u, ctx.formats[at[place[u.key]]])):  # type: ignore[misc]
                for batch, logits in whole.batches:
                    found, nats = probes.slopes(batch, logits)
                    slopes[i] += found
                    kl[i] += nats
        return StepResult(
            arrays={
                "choice": choices, "slopes": slopes, "kl": kl, "place": np.array([place[u.key] for u in units]),
                "sequences": chosen, "tokens": np.array(ids.size),
            }
        )  # fmt: skip

    def _whole_model(self, ctx: MeasureContext) -> WholeModel:
        if self._whole is None or self._whole[0] is not ctx:
            from bitatlas.analysis.fisher.whole import WholeModel

            loaded, tokens = ctx.loaded_in(str(self.option(ctx, "dtype"))), ctx.calibration.tokens
            whole = WholeModel(loaded, tokens[self._whole_sequences(ctx)], ctx.index.units, ctx.weight)
            self._whole = ctx, whole
        return self._whole[1]

    def cost(self, ctx: MeasureContext) -> Cost:
        """The probes; a forward pass over a few sequences for the original and each format; both passes at each anchor."""
        cost, formats = super().cost(ctx), len(self._measured(ctx))
        length = sequences_of(ctx)[1]
        whole = (formats + 1) * len(self._whole_sequences(ctx)) * length if formats else 0
        front = sum(len(chosen) for _, chosen in self._front(ctx).values()) * length
        return replace(
            cost, steps=len(self.plan(ctx)),
            forward_tokens=cost.forward_tokens + whole + (1 + len(LEVELS)) * front,
            backward_tokens=cost.backward_tokens + len(LEVELS) * front,
        )  # fmt: skip

    def _measured(self, ctx: MeasureContext) -> tuple[Format, ...]:
        """Formats whose uniform model is measured: none where only some positions count."""
        return (
            ctx.formats
            if int(self.option(ctx, "whole_tokens")) > 0 and self.option(ctx, "tokens") == "all"
            else ()
        )

    def _whole_sequences(self, ctx: MeasureContext) -> np.ndarray:
        return self._spread(ctx, max(int(self.option(ctx, "whole_tokens")), 2 * sequences_of(ctx)[1]))

    def _spread(self, ctx: MeasureContext, tokens: int) -> np.ndarray:
        """Numbers of sequences that hold ``tokens``, from all over the text: those that follow each other are of one article."""
        count, length = sequences_of(ctx)
        wanted = min(count, max(1, -(-tokens // length)))
        return ((np.arange(wanted) + 0.5) * count // wanted).astype(np.int64)

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """The tables from all probes."""
        known = self._tables(ctx, parts)
        asq, _, tokens = known.probes.by_sequence
        count = known.probes.reached.sum(0) // max(1, int(self.option(ctx, "draws")))  # (U,) tokens
        tables = {
            "fisher_projection": (known.probes.damage(), 0.5 * ratio_stderr(asq, tokens)),
            "fisher_trace": known.trace,
            "fisher": known.fisher,
        }
        if self._measured(ctx):
            tables["fisher_scaled"] = known.scaled
        if front := [parts[key] for key in self._front(ctx)]:
            nbytes = ctx.index.bytes_table(ctx.formats)
            tables["fisher_anchored"] = anchored(
                *known.scaled, known.fisher[0], nbytes, front, known.probes.formats
            )
        return [
            row
            for name, (v, e) in tables.items()
            for row in damage_rows(name, known.joined, v, e, count, known.noise)
        ]

    def _tables(self, ctx: MeasureContext, parts: Parts) -> _Tables:
        """What all probes and whole models say; kept for the steps that ask for it one after the other."""
        if self._known is None or self._known[0] is not ctx:
            self._known = ctx, self._reduced(ctx, parts)
        return self._known[1]

    def _reduced(self, ctx: MeasureContext, parts: Parts) -> _Tables:
        joined = self.joined({key: parts[key] for key in super().plan(ctx)})
        probes, units = ProbeMatrix.of(joined), ctx.index.units
        params = np.array([u.params for u in units], np.float64)
        best = posterior_of_units(probes, units)
        scale, noise = np.ones(len(joined.formats)), np.zeros(len(joined.formats))
        if found := {f.name: parts[_WHOLE + f.name] for f in self._measured(ctx)}:
            from bitatlas.analysis.fisher.whole import format_scales

            measured, noise = (
                np.array([found[n][k].mean() for n in joined.formats]) for k in ("uniform_kl", "noise")
            )
            scale = format_scales(best.value, measured, noise)
        return _Tables(
            joined, probes, trace_form(probes, params), (best.value, best.stderr), (best.value * scale, best.stderr * scale), noise
        )  # fmt: skip


@dataclass(frozen=True)
class _Tables:
    """Value and standard error, (U, F) each, of the probes' tables; (F,) noise of a measured KL, 0 where none was."""

    joined: Joined
    probes: ProbeMatrix
    trace: tuple[np.ndarray, np.ndarray]
    fisher: tuple[np.ndarray, np.ndarray]
    scaled: tuple[np.ndarray, np.ndarray]
    noise: np.ndarray
