"""Block influence: how much a transformer block, and its MLP or MoE part alone, turns what goes through it."""

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
from bitatlas.analysis.sequences import mean_and_stderr, sequence_steps, sequences_of, stacked

__all__ = ["BlockInfluence"]

_ATTENTION = ("q", "k", "v", "o", "qkv", "q_a", "q_b", "kv_a", "kv_b")


class BlockInfluence(Metric):
    """One minus the cosine between input and output, mean over tokens.

        block_influence     = 1 - (1/N) sum_t cos(x_t, y_t)   x, y: the residual stream before and behind the block
        block_influence_mlp = the same for the block's MLP or MoE part, its own input and output, no residual

    The first is ShortGPT's (arXiv 2403.03853, eq. 1), 1 + `lim`; the second what QuantMoE-Bench's block importance predictor
    is trained to guess (arXiv 2406.08155), measured instead. Larger means more important. The first stands at all
    units of the block, the second at those that are no attention; units outside the blocks have none. Unknown where the
    part is no module of its own (OPT). Standard error over sequences; ``count`` is tokens.
    """

    NAME = "block_influence"
    TITLE = "Block influence"
    UNIT = "cosine distance"
    SOURCE = "ShortGPT (arXiv 2403.03853), eq. 1; QuantMoE-Bench (arXiv 2406.08155), block importance"
    NEEDS = "forwards"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("block_influence", "block_influence_mlp")
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences."""
        return sequence_steps(ctx)

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays block, mlp (B, L): mean cosine of each sequence.

        Raises:
            UserError: the architecture is not a plain stack of blocks.
        """
        _, tokens = sequences_of(ctx, key)
        blocks = needed_blocks(ctx.loaded.model, ctx.index.n_layers)
        found = {name: np.full((len(tokens), len(blocks)), np.nan) for name in ("block", "mlp")}

        def watch(name: str, layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                x = stream_before(args, kwargs)
                y = stream_behind(out)
                cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)  # (B, T)
                found[name][:, layer] = cosine.reshape(len(tokens), -1).mean(1).cpu().numpy()

            return hook

        mlps = {i: _mlp(block) for i, block in enumerate(blocks)}
        hooks = [m.register_forward_hook(watch("block", i), with_kwargs=True) for i, m in enumerate(blocks)]
        hooks += [
            m.register_forward_hook(watch("mlp", i), with_kwargs=True)
            for i, m in mlps.items()
            if m is not None
        ]
        try:
            with torch.no_grad():
                ctx.loaded.logits(torch.from_numpy(tokens))
        finally:
            for hook in hooks:
                hook.remove()
        return StepResult(arrays=found)

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Mean and spread over all sequences."""
        rows = []
        for name, emitted in zip(("block", "mlp"), self.EMITS):
            cosine = stacked(parts, name)  # (S, L)
            mean, spread = mean_and_stderr(cosine)
            for u in ctx.index.units:
                if u.layer < 0 or (name == "mlp" and u.role in _ATTENTION):
                    continue
                value = 1 - float(mean[u.layer])
                count = 0 if np.isnan(value) else len(cosine) * ctx.seq_len
                rows.append(DamageRow(emitted, u.key, NO_FORMAT, value, float(spread[u.layer]), count))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward over the calibration text."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
        )


def _mlp(block: nn.Module) -> nn.Module | None:
    """The block's child that holds the MLP or the experts."""
    for name in ("mlp", "block_sparse_moe", "feed_forward", "moe", "ffn"):
        child = getattr(block, name, None)
        if isinstance(child, nn.Module):
            return child
    return None
