"""KV damage projected behind the attention: the cache read in other formats exactly, the KL to second order from there.

`kv_fisher` expands the KL in K itself. A softmax that has settled on one key has no slope there, and quantising that key
moves it all the same: keys with outlier channels, quantised by token, are underestimated several times. Here the
attention of a layer is computed again with the cache as it would be read, and with G the gradient of a random score
(`analysis.fisher.probes`) with respect to the attention's output O,
    KL = 1/(2T) E[<G, O' - O>^2].

The square of a sum over all positions is one number a probe, and noisy. Its terms of one position alone, sum_t <G_t, O'_t - O_t>^2,
are many; what the products of different positions add is nearly the same share everywhere, so that share is estimated
once, over all layers and pairs, and the terms carry the differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Parts, StepResult
from bitatlas.analysis.metrics.kv_common import KvMetric
from bitatlas.analysis.schema import DamageRow

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.kv.attention import Replayed
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["KvOutput"]


class KvOutput(KvMetric):
    """Predicted KL of each layer's K, V and pairs, nats per token. ``count`` = tokens."""

    NAME = "kv_output"
    TITLE = "KV damage behind the attention"
    UNIT = "nats/token"
    SOURCE = "second-order KL in the attention output, whose change is computed exactly (bitatlas; e_o of KVTuner, projected)"
    NEEDS = "gradients"
    ADDITIVE = True
    EMITS = ("kv_output",)
    VERSION = 1
    SETTINGS: ClassVar = {**KvMetric.KV_SETTINGS, "draws": 2, "score": "signs"}

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Projections of a chunk of sequences: dots and squares (P, L, FK + 1, FV + 1), the last of each axis the 16-bit one."""
        import torch

        from bitatlas.analysis.fisher.probes import score_gradient
        from bitatlas.analysis.kv.readers import OutputReader

        first, last = (int(n) for n in key.split()[1].split("-"))
        draws, score = int(self.option(ctx, "draws")), str(self.option(ctx, "score"))
        layers, reader = self.layers(ctx), OutputReader(self.layout(ctx))
        (keys, values), sequence = self.formats(ctx), np.repeat(np.arange(first, last + 1), draws)
        dots = np.zeros((len(sequence), len(layers), len(keys) + 1, len(values) + 1))
        squares = np.zeros_like(dots)
        for s in range(first, last + 1):
            ids = torch.from_numpy(ctx.calibration.tokens[s])[None]
            with ctx.loaded.cached(reader), torch.enable_grad():
                logits = ctx.loaded.logits(ids)[0]
            gradients: dict[int, list[Tensor]] = {layer: [] for layer in layers}
            for d in range(draws):
                reader.clear()
                generator = torch.Generator().manual_seed(ctx.random_seed(self.NAME, s, d))
                logits.backward(score_gradient(logits, score, generator), retain_graph=d + 1 < draws)
                for layer, found in gradients.items():
                    found.append(reader.gradient(layer)[0].clone())
            del logits
            for attention in self.replay(ctx).run(ids):
                if attention.layer in gradients:
                    at = np.flatnonzero(sequence == s), layers.index(attention.layer)
                    each = self._projected(ctx, attention, torch.stack(gradients[attention.layer]))
                    dots[at], squares[at] = each.sum(1), np.square(each).sum(1)
        return StepResult(
            arrays={"dots": dots, "squares": squares, "sequence": sequence, **self.noise(ctx, key)}
        )

    def _projected(self, ctx: MeasureContext, attention: Replayed, gradients: Tensor) -> np.ndarray:
        """<G, O' - O> of each position, (P, T, FK + 1, FV + 1); gradients are (P, T, heads, D)."""
        import torch

        from bitatlas.kernels.kv.quantize import quantize_dequantize_kv

        (keys, values), block = self.formats(ctx), self.layout(ctx).block
        k_read = [*(quantize_dequantize_kv(attention.k, f, block) for f in keys), attention.k]
        v_read = [*(quantize_dequantize_kv(attention.v, f, block) for f in values), attention.v]
        each = [
            torch.einsum("pthd,thvd->ptv", gradients, attention.changes(k, v_read)[0]).double().cpu()
            for k in k_read
        ]
        return torch.stack(each, 2).numpy()

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Rows of K, V and pairs from all probes."""
        steps = [parts[key] for key in self.plan(ctx)]
        dots, squares, sequence = (
            np.concatenate([p[n] for p in steps]) for n in ("dots", "squares", "sequence")
        )
        squares *= _shared_share(dots, squares)
        return self.probe_rows(
            ctx,
            sequence,
            squares[:, :, :-1, -1],
            squares[:, :, -1, :-1],
            squares[:, :, :-1, :-1],
            float(steps[0].get("noise", 0.0)),
        )

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward and the attention again for every format of K, one backward per draw."""
        tokens = self.length(ctx) * self.sequences(ctx)
        # An attention over doubled keys against its whole block, about.
        share = 0.1 * (len(self.formats(ctx)[0]) + 1)
        return Cost(
            len(self.plan(ctx)),
            2 * ctx.index.params,
            int(tokens * (1 + share)),
            tokens * int(self.option(ctx, "draws")),
        )


def _shared_share(dots: np.ndarray, squares: np.ndarray) -> float:
    """Mean over layers and pairs of E[(sum over positions)^2] / E[sum of squares]; both (P, L, FK + 1, FV + 1)."""
    whole, alone = np.square(dots).mean(0)[:, :-1, :-1], squares.mean(0)[:, :-1, :-1]
    moved = alone > 0
    return float((whole[moved] / alone[moved]).mean()) if moved.any() else 1.0
