"""Measured KL of single K/V flips: one layer's cache read in a pair of formats, everything else original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, StepResult
from bitatlas.analysis.metrics.kv_common import KvMetric
from bitatlas.analysis.schema import DamageRow, kv_unit

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["KvFlip"]

_BATCH_TOKENS = 1024


class KvFlip(KvMetric):
    """KL(original || one layer's cache quantised), nats per token. ``count`` = sequences. The truth for `kv_fisher`."""

    NAME = "kv_flip"
    TITLE = "Measured KL of single K/V flips"
    UNIT = "nats/token"
    SOURCE = "KL with only one layer's cache quantised, as decoding reads it; compare KVTuner (Li et al. 2025), section 4"
    NEEDS = "forwards"
    ADDITIVE = True
    EMITS = ("kv_flip",)
    VERSION = 1
    SETTINGS: ClassVar = {
        **KvMetric.KV_SETTINGS,
        "kv_keys": "kv2-channel,kv4-channel,kv8-channel",
        "flip_sequences": 16,
    }

    def __init__(self) -> None:
        self._runner: tuple[MeasureContext, Any, dict[int, Any]] | None = None

    def plan(self, ctx: MeasureContext) -> list[str]:
        """One step a layer."""
        self.pairs(ctx)
        self.layout(ctx)
        return [f"layer {layer}" for layer in self.layers(ctx)]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """All pairs of one layer."""
        import torch

        from bitatlas.analysis.divergence import token_kl
        from bitatlas.analysis.kv.readers import PlanReader

        layer, pairs, layout = int(key.split()[1]), self.pairs(ctx), self.layout(ctx)
        runner, recorded = self._recorded(ctx)
        tokens = ctx.calibration.tokens[: self._sequences(ctx)]
        size = max(1, _BATCH_TOKENS // tokens.shape[1])
        each: list[list[np.ndarray]] = [[] for _ in pairs]
        floor = 0.0
        for start in range(0, len(tokens), size):
            if start not in recorded:
                recorded.clear()  # one batch in memory: its logits alone may be large
                recorded[start] = runner.record(
                    torch.from_numpy(np.ascontiguousarray(tokens[start : start + size]))
                )
            recording = recorded[start]
            with torch.no_grad():
                with ctx.loaded.cached(PlanReader({}, layout)):
                    # The same model through the cache's own attention: what the order of summation alone does.
                    again = runner.resume(recording, layer)
                floor = max(floor, float(token_kl(recording.logits, again).mean()))
                for i, pair in enumerate(pairs):
                    with ctx.loaded.cached(PlanReader({layer: pair}, layout)):
                        logits = runner.resume(recording, layer)
                    each[i].append(token_kl(recording.logits, logits).mean(1).numpy())
        rows = []
        for pair, batches in zip(pairs, each):
            kl = np.concatenate(batches)
            error = float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else float("nan")
            rows.append(
                DamageRow(self.NAME, kv_unit(layer), pair.name, float(kl.mean()), error, len(kl), floor)
            )
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """A flip in layer l costs the blocks from l on, with twice the keys."""
        layers, n = self.layers(ctx), max(ctx.index.n_layers, 1)
        share = sum((n - layer) / n for layer in layers)
        tokens = self._sequences(ctx) * self.length(ctx)
        return Cost(len(layers), 2 * ctx.index.params,
                    int(tokens * (1 + share * (len(self.pairs(ctx)) + 1))))  # fmt: skip

    def _sequences(self, ctx: MeasureContext) -> int:
        wanted = int(self.option(ctx, "flip_sequences"))
        return min(wanted, self.sequences(ctx)) if wanted > 0 else self.sequences(ctx)

    def _recorded(self, ctx: MeasureContext) -> tuple[Any, dict[int, Any]]:
        if self._runner is None or self._runner[0] is not ctx:
            from bitatlas.analysis.prefix import PrefixRunner

            self._runner = ctx, PrefixRunner(ctx.loaded, ctx.index.n_layers), {}
        return self._runner[1], self._runner[2]
