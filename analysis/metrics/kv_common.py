"""What the metrics of the KV cache share: their formats, their window, their units."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Metric
from bitatlas.analysis.schema import DamageRow, UserError, kv_unit
from bitatlas.kernels.kv.formats import KvFormat, KvLayout, KvPair, parse_kv_format

if TYPE_CHECKING:
    from bitatlas.analysis.kv.attention import AttentionReplay
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["KvMetric"]

_SETTINGS = {
    "kv_keys": "kv2-token,kv4-token,kv8-token,kv2-channel,kv4-channel,kv8-channel",
    "kv_values": "kv2-token,kv4-token,kv8-token",
    "kv_block": KvLayout().block,
    "kv_residual": KvLayout().residual,
}

_STEP_TOKENS = 512


class KvMetric(Metric):
    """A metric whose units are ``kv.L`` (a pair of formats ``K/V``), ``kv.L.k`` and ``kv.L.v`` (one format).

    Settings:
        kv_keys, kv_values: formats of K and of V, comma lists; every pair is measured.
        kv_block, kv_residual: rules of the 16-bit window (`KvLayout`).
    """

    _replay: tuple[MeasureContext, AttentionReplay] | None = None

    SUBJECT = "kv"
    PER_FORMAT = False
    KV_SETTINGS: ClassVar = _SETTINGS
    LIMITS: ClassVar = {
        "kv_residual": (0, 1 << 20),
        "flip_sequences": (0, math.inf),
        "score": ("signs", "labels"),
    }

    def unit_keys(self, ctx: MeasureContext) -> tuple[str, ...]:
        """``kv.L``, ``kv.L.k``, ``kv.L.v`` of every layer that keeps K/V of its own."""
        return tuple(kv_unit(layer, part) for layer in self.layers(ctx) for part in ("", "k", "v"))

    def layers(self, ctx: MeasureContext) -> tuple[int, ...]:
        """Layers that keep K/V of their own.

        Raises:
            UserError: there are none, or config.json does not say.
        """
        layers = ctx.index.kv.layers if ctx.index.kv else ()
        if not layers:
            raise UserError(f"{ctx.index.name} keeps no KV cache that could be measured",
                            found="config.json gives no heads and head size" if ctx.index.kv is None else "no attention layer")  # fmt: skip
        return layers

    def formats(self, ctx: MeasureContext) -> tuple[tuple[KvFormat, ...], tuple[KvFormat, ...]]:
        """Formats of K and of V.

        Raises:
            UserError: an unknown one, or none.
        """
        out = []
        for name in ("kv_keys", "kv_values"):
            found = tuple(parse_kv_format(n) for n in str(self.option(ctx, name)).split(",") if n.strip())
            if not found:
                raise UserError(f"{name} names no format", fix=f"--set {name}={_SETTINGS[name]}")
            out.append(tuple(dict.fromkeys(found)))
        return out[0], out[1]

    def pairs(self, ctx: MeasureContext) -> tuple[KvPair, ...]:
        """Every pair."""
        keys, values = self.formats(ctx)
        return tuple(KvPair(k, v) for k in keys for v in values)

    def layout(self, ctx: MeasureContext) -> KvLayout:
        """Rules of the window.

        Raises:
            UserError: sequences so short that nothing is ever packed.
        """
        layout = KvLayout(int(self.option(ctx, "kv_block")), int(self.option(ctx, "kv_residual")))
        length = self.length(ctx)
        if layout.packed(length - 1) == 0:
            raise UserError("the sequences are too short to see the quantised KV cache",
                            found=f"{length} tokens; the newest {layout.residual} to {layout.residual + layout.block - 1} stay at 16 bits",
                            fix=f"--seq-len {4 * (layout.residual + layout.block)} or more")  # fmt: skip
        return layout

    def length(self, ctx: MeasureContext) -> int:
        """Tokens of a sequence."""
        made = ctx.__dict__.get("calibration")
        return int(made.tokens.shape[1]) if made is not None else ctx.seq_len

    def sequences(self, ctx: MeasureContext) -> int:
        """Number of sequences."""
        made = ctx.__dict__.get("calibration")
        return int(made.tokens.shape[0]) if made is not None else -(-ctx.tokens // ctx.seq_len)

    def replay(self, ctx: MeasureContext) -> AttentionReplay:
        """Runs the model and hands out its attention layers; made once for a context."""
        if self._replay is None or self._replay[0] is not ctx:
            from bitatlas.analysis.kv.attention import AttentionReplay

            self._replay = ctx, AttentionReplay(ctx.loaded, self.layout(ctx))
        return self._replay[1]

    def noise(self, ctx: MeasureContext, key: str) -> dict[str, np.ndarray]:
        """``noise``: KL of the first sequence in two batch layouts, nats per token; left by the first step only."""
        import torch

        from bitatlas.analysis.divergence import batch_noise

        if key != self.plan(ctx)[0]:
            return {}
        ids = torch.from_numpy(ctx.calibration.tokens[:1])
        with torch.no_grad():
            return {"noise": np.array(batch_noise(ctx.loaded.logits, ids, ctx.loaded.logits(ids)))}

    def probe_rows(
        self,
        ctx: MeasureContext,
        sequence: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        pairs: np.ndarray,
        floor: float,
    ) -> list[DamageRow]:
        """Rows of K, V and pairs of every layer: half the mean of squared projections per token, stderr over sequences.

        Args:
            sequence: (P,) of each probe. k, v, pairs: (P, L, FK), (P, L, FV), (P, L, FK, FV) squared projections.
            floor: nats per token.
        """
        keys, values = self.formats(ctx)
        length, tokens = self.length(ctx), self.length(ctx) * self.sequences(ctx)
        rows = []
        for i, layer in enumerate(self.layers(ctx)):
            found = [(kv_unit(layer, "k"), f.name, k[:, i, j]) for j, f in enumerate(keys)]
            found += [(kv_unit(layer, "v"), f.name, v[:, i, j]) for j, f in enumerate(values)]
            found += [(kv_unit(layer), f"{a.name}/{b.name}", pairs[:, i, m, n])
                      for m, a in enumerate(keys) for n, b in enumerate(values)]  # fmt: skip
            for unit, fmt, square in found:
                each = np.bincount(sequence, square) / np.bincount(sequence) / (2 * length)  # by sequence
                n = len(each)
                error = float(each.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
                rows.append(DamageRow(self.NAME, unit, fmt, float(each.mean()), error, tokens, floor))
        return rows

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences, ``sequences 0-3``; what cannot be measured is said before the first step."""
        self.layers(ctx)
        self.pairs(ctx)
        self.layout(ctx)
        return self.chunks(ctx, _STEP_TOKENS)

    def chunks(self, ctx: MeasureContext, tokens: int) -> list[str]:
        """Step keys ``sequences 0-3`` of about so many tokens each."""
        n, per_step = self.sequences(ctx), max(1, tokens // self.length(ctx))
        return [f"sequences {i}-{min(i + per_step, n) - 1}" for i in range(0, n, per_step)]
