"""Fisher projection of the KV cache: one backward pass per probe prices every layer in every pair of formats.

K and V are activations: with G the gradient of a random score (`analysis.fisher.probes`) with respect to what is read from
the packed part of the cache,
    KL = 1/(2T) E[(<G_K, Q(K) - K> + <G_V, Q(V) - V>)^2]
for a layer and a pair, cross term of K and V included. The projections of all probes stay in the part files, so that a
whole K/V allocation can be scored with its cross-layer terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Parts, StepResult
from bitatlas.analysis.metrics.kv_common import KvMetric
from bitatlas.analysis.schema import DamageRow

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["KvFisher"]


class KvFisher(KvMetric):
    """Predicted KL of each layer's K, V and pairs, nats per token. ``count`` = tokens."""

    NAME = "kv_fisher"
    TITLE = "KV Fisher projection"
    UNIT = "nats/token"
    SOURCE = "second-order KL in K and V as read from the cache (KVQuant, Hooper et al. 2024, eq. 3, projected on the error)"
    NEEDS = "gradients"
    ADDITIVE = True
    EMITS = ("kv_fisher",)
    VERSION = 1
    SETTINGS: ClassVar = {**KvMetric.KV_SETTINGS, "draws": 2, "score": "signs"}

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Projections of a chunk of sequences: k (P, L, FK) and v (P, L, FV), and each probe's sequence."""
        import torch

        from bitatlas.analysis.fisher.probes import score_gradient
        from bitatlas.analysis.kv.readers import GradientReader
        from bitatlas.kernels.kv.quantize import quantize_dequantize_kv

        first, last = (int(n) for n in key.split()[1].split("-"))
        layers, (keys, values), layout = self.layers(ctx), self.formats(ctx), self.layout(ctx)
        draws, score = int(self.option(ctx, "draws")), str(self.option(ctx, "score"))
        k_dots, v_dots, sequence = [], [], []
        reader = GradientReader(layout)
        for s in range(first, last + 1):
            tokens = torch.from_numpy(ctx.calibration.tokens[s])
            with ctx.loaded.cached(reader), torch.enable_grad():
                logits = ctx.loaded.logits(tokens[None])[0]
            deltas = {}
            for layer in layers:
                for part, x, formats in (("k", reader.k[layer], keys), ("v", reader.v[layer], values)):
                    deltas[layer, part] = torch.stack(
                        [quantize_dequantize_kv(x, f, layout.block) - x for f in formats]
                    ).flatten(1)
            for d in range(draws):
                reader.clear()
                v = score_gradient(
                    logits, score, torch.Generator().manual_seed(ctx.random_seed(self.NAME, s, d))
                )
                logits.backward(v, retain_graph=d + 1 < draws)
                dots: dict[str, list[np.ndarray]] = {"k": [], "v": []}
                for layer in layers:
                    for part, grad in zip("kv", reader.gradients(layer)):
                        dots[part].append((deltas[layer, part] @ grad.flatten()).float().cpu().numpy())
                k_dots.append(np.stack(dots["k"]))
                v_dots.append(np.stack(dots["v"]))
                sequence.append(s)
        return StepResult(
            arrays={
                "k": np.stack(k_dots),
                "v": np.stack(v_dots),
                "sequence": np.array(sequence),
                **self.noise(ctx, key),
            }
        )

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Rows of K, V and pairs from all probes."""
        steps = [parts[key] for key in self.plan(ctx)]
        k, v = (np.concatenate([p[name] for p in steps]).astype(np.float64) for name in ("k", "v"))
        sequence = np.concatenate([p["sequence"] for p in steps])
        return self.probe_rows(
            ctx, sequence, k**2, v**2, (k[..., None] + v[:, :, None]) ** 2, float(steps[0].get("noise", 0.0))
        )

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward per sequence, one backward per draw."""
        tokens = self.length(ctx) * self.sequences(ctx)
        return Cost(
            len(self.plan(ctx)), 2 * ctx.index.params, tokens, tokens * int(self.option(ctx, "draws"))
        )
