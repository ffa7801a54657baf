"""Spikes and massive activations: few values so large that a grid must choose between them and all others."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.input_profile import BIN_EDGES, input_profile
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import mean_and_stderr, sequence_steps, stacked

__all__ = ["MassiveActivations"]


class MassiveActivations(Metric):
    """Largest against median magnitude of a unit's inputs, and how many are massive.

        massive_activations = |{|x| > 100 and |x| >= 1000 median |x|}|, all calibration sequences together
        activation_spike    = max |x| / median |x| of a sequence, mean over sequences
        activation_top      = max |x|
        massive_stream      = the first, counted in what the unit's block puts out

    The rule is that of Sun et al. 2024 (arXiv 2402.17762, section 2), who apply it to the residual stream; median
    and maximum are over the tokens and channels of one sequence. ``massive_stream`` stands at every unit of the
    block and is unknown outside the blocks, or where a model is no plain stack of them. A count of zero is a fact;
    a unit that no token reached is unknown. ``count`` is tokens.

    The run keeps a histogram of every unit's |x| over all calibration tokens, in bins that are the same for every
    model (`BIN_EDGES`): what the page of a unit draws.
    """

    NAME = "massive_activations"
    TITLE = "Massive activations"
    UNIT = "activations"
    SOURCE = "Sun et al. 2024, Massive Activations (arXiv 2402.17762), section 2"
    NEEDS = "activations"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("massive_activations", "activation_spike", "activation_top", "massive_stream")
    VERSION = 2

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences."""
        return sequence_steps(ctx)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays (B, U) and (B, L) of `input_profile`."""
        found = input_profile(ctx, key)
        return StepResult(
            arrays={n: found[n] for n in ("tokens", "top", "median", "massive", "stream", "histogram")}
        )

    def keep(self, ctx: MeasureContext, parts: Parts) -> dict[str, np.ndarray]:
        """``counts`` (U, 110) int64 of all steps together, and their ``edges`` (109,)."""
        counts = np.zeros((len(ctx.index.units), len(BIN_EDGES) + 1), np.int64)
        for key in parts:
            counts += parts[key]["histogram"]
        return {"edges": BIN_EDGES, "counts": counts}

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Sums and means over the sequences."""
        tokens, top, median, massive, stream = (
            stacked(parts, n) for n in ("tokens", "top", "median", "massive", "stream")
        )
        count, s = tokens.sum(0).astype(int), len(tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            spike, spread = mean_and_stderr(np.where(median > 0, top / median, np.nan))
        total, total_spread = _sums(massive)
        behind, behind_spread = _sums(stream)
        rows = []
        for i, u in enumerate(ctx.index.units):
            n = int(count[i])
            known = n > 0
            values = [
                ("massive_activations", total[i] if known else np.nan, total_spread[i] if known else np.nan),
                ("activation_spike", spike[i], spread[i]),
                ("activation_top", np.nanmax(top[:, i]) if known else np.nan, np.nan),
            ]
            rows += [DamageRow(m, u.key, NO_FORMAT, float(v), float(e), n) for m, v, e in values]
            if u.layer >= 0:
                value, error = float(behind[u.layer]), float(behind_spread[u.layer])
                size = 0 if np.isnan(value) else s * ctx.seq_len
                rows.append(DamageRow("massive_stream", u.key, NO_FORMAT, value, error, size))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )


def _sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum over sequences (S, n), and its standard error."""
    s = len(values)
    spread = values.std(0, ddof=1) * s**0.5 if s > 1 else np.full(values.shape[1], np.nan)
    return values.sum(0), spread
