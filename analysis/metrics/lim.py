"""LIM: how much a transformer block turns its input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult
from bitatlas.analysis.prefix import needed_blocks, stream_before, stream_behind
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import sequence_steps, sequences_of

__all__ = ["Lim"]

_BATCH_TOKENS = 2048


class Lim(Metric):
    """Layer input modification: minus the cosine between a block's input and output, mean over tokens.

        lim = -(1/N) sum_t <x_t, y_t> / (||x_t|| ||y_t||)

    LayerwiseQuant (arXiv 2406.17415), eq. 1; ShortGPT's block influence is 1 + lim. Higher means that the
    block changes the stream more, so it is more important. The value stands at every unit of the block;
    units outside the blocks have none. Standard error over sequences; ``count`` is tokens.
    """

    NAME = "lim"
    TITLE = "Layer input modification"
    UNIT = "cosine"
    SOURCE = "LayerwiseQuant (arXiv 2406.17415), eq. 1"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("lim",)
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Batches of sequences."""
        return sequence_steps(ctx, _BATCH_TOKENS)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Array cosine (B, L): mean over each sequence's tokens, block by block."""
        tokens = torch.from_numpy(sequences_of(ctx, key)[1])  # (B, T)
        blocks = needed_blocks(ctx.loaded.model, ctx.index.n_layers)
        cosine = np.full((len(tokens), len(blocks)), np.nan)

        def watch(layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                x = stream_before(args, kwargs)
                y = stream_behind(out)
                found = torch.cosine_similarity(x.double(), y.double(), dim=-1)  # (B, T)
                cosine[:, layer] = found.mean(1).cpu().numpy()

            return hook

        hooks = [m.register_forward_hook(watch(i), with_kwargs=True) for i, m in enumerate(blocks)]
        try:
            with torch.no_grad():
                ctx.loaded.logits(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return StepResult(arrays={"cosine": cosine})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Mean and spread over all sequences."""
        cosine = np.concatenate([parts[key]["cosine"] for key in self.plan(ctx)])  # (S, L)
        s = len(cosine)
        mean = -cosine.mean(0)
        stderr = cosine.std(0, ddof=1) / s**0.5 if s > 1 else np.full(cosine.shape[1], np.nan)
        return [
            DamageRow(
                self.NAME, u.key, NO_FORMAT, float(mean[u.layer]), float(stderr[u.layer]), s * ctx.seq_len
            )
            for u in ctx.index.units
            if u.layer >= 0
        ]

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )
