"""Errors of K, V, attention weights and attention output when one layer's cache is quantised (KVTuner's four errors).

All are relative, ||x - x'|| / ||x||: of K and V over the tokens that are packed at the end, of the weights and the output
over the queries that read at least one packed key. ``_pre``: keys quantised before the rotary embedding and rotated when
read (KVQuant), unknown where a model has no such embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitatlas.analysis.metrics.base import Cost, Parts, StepResult
from bitatlas.analysis.metrics.kv_common import KvMetric
from bitatlas.analysis.schema import DamageRow, kv_unit

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.kv.attention import Replayed
    from bitatlas.analysis.measure import MeasureContext

__all__ = ["KvError"]


class KvError(KvMetric):
    """Relative errors by layer and pair; the output's is the one that decides. ``count`` = sequences.

    Values: ``kv_error`` (output, per pair), ``kv_score_error`` (weights, per K format), ``kv_tensor_error`` (K and V
    themselves), each also as ``_pre`` for keys quantised before rotation.
    """

    NAME = "kv_error"
    TITLE = "KV cache errors"
    UNIT = "relative"
    SOURCE = "KVTuner (Li et al. 2025), section 4.1: e_k, e_v, e_a, e_o; keys before rotation: KVQuant (Hooper et al. 2024)"
    NEEDS = "activations"
    ADDITIVE = False
    EMITS = (
        "kv_error",
        "kv_score_error",
        "kv_tensor_error",
        "kv_error_pre",
        "kv_score_error_pre",
        "kv_tensor_error_pre",
    )
    VERSION = 1
    SETTINGS: ClassVar = KvMetric.KV_SETTINGS

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Errors of a chunk: out and out_pre (S, L, FK, FV), weights and weights_pre, k and k_pre (S, L, FK), v (S, L, FV)."""
        import torch

        first, last = (int(n) for n in key.split()[1].split("-"))
        layers, (keys, values) = self.layers(ctx), self.formats(ctx)
        shape = (last - first + 1, len(layers), len(keys))
        arrays = {n: np.full(shape, np.nan) for n in ("weights", "weights_pre", "k", "k_pre")}
        arrays |= {n: np.full((*shape, len(values)), np.nan) for n in ("out", "out_pre")}
        arrays["v"] = np.full((*shape[:2], len(values)), np.nan)
        position = {layer: i for i, layer in enumerate(layers)}
        for s in range(first, last + 1):
            ids = torch.from_numpy(ctx.calibration.tokens[s])[None]
            for attention in self.replay(ctx).run(ids):
                if attention.layer in position:
                    at = s - first, position[attention.layer]
                    for name, found in self._errors(ctx, attention).items():
                        arrays[name][at] = found
        return StepResult(arrays=arrays)

    def _errors(self, ctx: MeasureContext, attention: Replayed) -> dict[str, np.ndarray]:
        """Arrays of one layer and sequence."""
        from bitatlas.kernels.kv.quantize import quantize_dequantize_kv

        (keys, values), layout = self.formats(ctx), self.layout(ctx)
        length = attention.k.shape[2]
        packed = layout.packed(length - 1)
        late = next(i for i in range(length) if layout.packed(i))  # the first query that reads a packed key
        v = [quantize_dequantize_kv(attention.v, f, layout.block) for f in values]
        out = {"v": np.array([_relative(attention.v[:, :, :packed], x[:, :, :packed]) for x in v])}
        bare = attention.before_rotation()
        for suffix, k in (("", attention.k), ("_pre", bare)):
            if k is None:
                continue
            read = [quantize_dequantize_kv(k, f, layout.block) for f in keys]
            out["k" + suffix] = np.array([_relative(k[:, :, :packed], x[:, :, :packed]) for x in read])
            weights, outputs = np.empty(len(keys)), np.empty((len(keys), len(values)))
            for i, x in enumerate(read):
                turned = x if not suffix else attention.rotate(x)
                assert turned is not None
                for j, y in enumerate(v):
                    result, seen = attention.with_packed(turned, y, weights=j == 0)
                    if seen is not None:
                        weights[i] = _relative(attention.weights[:, late:], seen[:, late:])
                    outputs[i, j] = _relative(attention.output[:, late:], result[:, late:])
            out["weights" + suffix], out["out" + suffix] = weights, outputs
        return out

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Means over the sequences."""
        steps = [parts[key] for key in self.plan(ctx)]
        whole = {name: np.concatenate([p[name] for p in steps]) for name in steps[0]}
        keys, values = self.formats(ctx)
        rows = []
        for i, layer in enumerate(self.layers(ctx)):
            for suffix in ("", "_pre"):
                found = [
                    ("kv_score_error", "k", f.name, whole["weights" + suffix][:, i, j])
                    for j, f in enumerate(keys)
                ]
                found += [
                    ("kv_tensor_error", "k", f.name, whole["k" + suffix][:, i, j]) for j, f in enumerate(keys)
                ]
                if not suffix:
                    found += [
                        ("kv_tensor_error", "v", f.name, whole["v"][:, i, j]) for j, f in enumerate(values)
                    ]
                found += [("kv_error", "", f"{a.name}/{b.name}", whole["out" + suffix][:, i, m, n])
                          for m, a in enumerate(keys) for n, b in enumerate(values)]  # fmt: skip
                for metric, part, fmt, each in found:
                    known = bool(np.isfinite(each).all())
                    error = (
                        float(each.std(ddof=1) / np.sqrt(len(each)))
                        if len(each) > 1 and known
                        else float("nan")
                    )
                    value = float(each.mean()) if known else float("nan")
                    rows.append(
                        DamageRow(
                            metric + suffix,
                            kv_unit(layer, part),
                            fmt,
                            value,
                            error,
                            len(each) if known else 0,
                        )
                    )
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, and the attention modules again for every pair before and after rotation."""
        tokens = self.length(ctx) * self.sequences(ctx)
        share = 0.15 * 2 * len(self.pairs(ctx))  # an attention module against its whole block, about
        return Cost(len(self.plan(ctx)), 2 * ctx.index.params, int(tokens * (1 + share)))


def _relative(x: Tensor, other: Tensor) -> float:
    """||x - other|| / ||x||; 0 where both are 0."""
    norm = float(x.double().norm())
    return float((x.double() - other.double()).norm()) / norm if norm else 0.0
