"""Co-activation: which experts are chosen together."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, unknown_rows
from bitatlas.analysis.moe import chosen_mask, require_experts, watch_routing
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import sequence_steps, sequences_of, stacked

__all__ = ["Coactivation", "pair_counts"]


class Coactivation(Metric):
    """How tied an expert is to its most frequent partner of the same layer.

        coactivation         = max_f n_ef / n_e
        coactivation_lift    = max_f (n_ef + k p_f) / (n_e + k) / p_f,   p_f = n_f / N
        coactivation_partner = the f of the first maximum (index of the expert; -1 where one expert is chosen at a time)

    n_ef: tokens that went to both, N all tokens. The lift is how much more often f is chosen where e is than
    anywhere; the conditional share of a rarely chosen expert is drawn towards p_f, worth k = ``shrink_tokens`` tokens.
    Co-activation is what MC-MoE's and expert-merging work group experts by (arXiv 2410.06270, section 3). The counts
    of all pairs are the array ``pairs`` (sequences, layers, E, E) of the steps; `pair_counts` sums them. Experts
    that no token reached are unknown. ``count`` = n_e; standard error over sequences, partner held.
    """

    NAME = "coactivation"
    TITLE = "Expert co-activation"
    UNIT = "share"
    SOURCE = "pair counts of the router's top k; shrinkage as in an empirical Bayes mean"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("coactivation", "coactivation_lift", "coactivation_partner")
    VERSION = 1
    SETTINGS = {"shrink_tokens": 64}
    LIMITS = {"shrink_tokens": (0, math.inf)}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences.

        Raises:
            UserError: a dense model.
        """
        require_experts(ctx.index)
        return sequence_steps(ctx)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Array pairs (B, layers with experts, E, E) int32; the diagonal holds the experts' own counts."""
        _, tokens = sequences_of(ctx, key)
        layers = sorted({layer for layer, _ in require_experts(ctx.index)})
        experts = ctx.index.n_experts
        pairs = np.zeros((len(tokens), len(layers), experts, experts), np.int32)

        def watch(layer: int, x: Tensor, chosen: Tensor, weight: Tensor) -> None:
            mask = chosen_mask(chosen, experts).float().reshape(len(tokens), -1, experts)
            pairs[:, layers.index(layer)] = (mask.transpose(1, 2) @ mask).round().int().cpu().numpy()

        with torch.no_grad(), watch_routing(ctx.loaded, watch):
            ctx.loaded.logits(torch.from_numpy(tokens))
        return StepResult(arrays={"pairs": pairs})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Sums over the sequences, then the partner of every expert."""
        by_sequence = stacked(parts, "pairs").astype(np.float64)  # (S, L, E, E)
        sequences, size = len(by_sequence), ctx.calibration.size
        prior = float(self.option(ctx, "shrink_tokens"))
        slots = require_experts(ctx.index)
        position = {layer: i for i, layer in enumerate(sorted({layer for layer, _ in slots}))}
        rows = []
        for (layer, e), units in slots.items():
            own = by_sequence[:, position[layer]]  # (S, E, E)
            pairs = own.sum(0)
            n = int(pairs[e, e])
            if not n:
                rows += [r for m in self.EMITS for u in units for r in unknown_rows(m, u.key, [NO_FORMAT])]
                continue
            together = pairs[e].copy()
            together[e] = -1.0
            f = int(together.argmax())
            share = max(together[f], 0.0) / n
            residual = own[:, e, f] - share * own[:, e, e] if together[f] > 0 else np.zeros(sequences)
            spread = float((residual @ residual * sequences / (sequences - 1)) ** 0.5 / n) if sequences > 1 else float("nan")  # fmt: skip
            p = np.diagonal(pairs) / size
            others = (p > 0) & (np.arange(len(p)) != e)
            lift = (together[others] + prior * p[others]) / (n + prior) / p[others]
            values = (
                (share, spread),
                (float(lift.max()) if others.any() and ctx.index.top_k > 1 else float("nan"), float("nan")),
                (float(f) if together[f] > 0 else -1.0, float("nan")),
            )
            rows += [
                DamageRow(m, u.key, NO_FORMAT, v, e_, n)
                for u in units
                for m, (v, e_) in zip(self.EMITS, values)
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )


def pair_counts(parts: Parts) -> np.ndarray:
    """(layers with experts, E, E) int64: tokens that went to both experts, over all sequences of a finished run."""
    return stacked(parts, "pairs").sum(0, dtype=np.int64)
