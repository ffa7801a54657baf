"""The KV cache in rows and tables: names of its units, and damage by layer and pair of formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from bitatlas.analysis.schema.damage import DamageRow
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv.formats import KvLayout, KvPair, parse_pair

__all__ = ["KV_DAMAGES", "KvTable", "is_kv_metric", "kv_layer", "kv_unit"]

KV_DAMAGES = ("kv_output", "kv_fisher", "kv_flip")
"""Metrics of the cache in nats per token, which may be added to the damage of weights; the one to ask first comes first."""


def kv_unit(layer: int, part: str = "") -> str:
    """``kv.3`` (K and V of layer 3 together), ``kv.3.k``, ``kv.3.v``."""
    return f"kv.{layer}.{part}" if part else f"kv.{layer}"


def kv_layer(unit: str) -> tuple[int, str]:
    """Layer and part of a KV unit; (-1, "") for any other unit."""
    found = re.fullmatch(r"kv\.(\d+)(?:\.([kv]))?", unit)
    return (int(found[1]), found[2] or "") if found else (-1, "")


def is_kv_metric(name: str) -> bool:
    """Whether a metric's (or an emitted value's) units are those of the KV cache."""
    return name.startswith("kv_")


_BESIDE = {
    f"kv_error{s}": {"k": f"kv_tensor_error{s}", "v": "kv_tensor_error", "scores": f"kv_score_error{s}"} for s in ("", "_pre")
}  # fmt: skip
"""Metric of pairs -> what the same run says of K, of V and of the scores."""


@dataclass(frozen=True, slots=True)
class KvTable:
    """Damage by layer and pair.

    Attributes:
        metric: its name.
        layers: (L,) layers that keep K/V of their own.
        pairs: (P,) names ``K/V``.
        damage, stderr: (L, P) float64, NaN = unknown. ``kv16/kv16`` is 0 by definition.
        layout: the window it was measured with.
        run: key of the run.
        parts: ("k" or "v", format) -> (L,) damage of K or V alone, where the metric tells them apart; for the relative
            errors of `kv_error` those of K and V themselves, and under "scores" that of the attention scores.
    """

    metric: str
    layers: tuple[int, ...]
    pairs: tuple[str, ...]
    damage: np.ndarray
    stderr: np.ndarray
    layout: KvLayout = KvLayout()
    run: str = ""
    parts: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[DamageRow], metric: str, layout: KvLayout, run: str = "") -> KvTable:
        """Table of a run's rows for one metric, whole layers by pair and K and V alone; the 16-bit pair is added.

        Raises:
            UserError: no row of a whole layer.
        """
        rows = list(rows)
        found = [
            r for r in rows if r.metric == metric and kv_layer(r.unit)[0] >= 0 and not kv_layer(r.unit)[1]
        ]
        if not found:
            raise UserError(
                f"this run has no {metric} for pairs of K and V",
                fix="bitatlas measure MODEL --metric kv_output",
            )
        layers = tuple(sorted({kv_layer(r.unit)[0] for r in found}))
        names = {r.format for r in found} | {"kv16/kv16"}
        pairs = tuple(sorted(names, key=lambda n: (-parse_pair(n).k.bits - parse_pair(n).v.bits, n)))
        damage, stderr = (np.full((len(layers), len(pairs)), np.nan) for _ in range(2))
        damage[:, pairs.index("kv16/kv16")] = 0.0
        for r in found:
            at = layers.index(kv_layer(r.unit)[0]), pairs.index(r.format)
            damage[at], stderr[at] = r.value, r.stderr
        parts: dict[tuple[str, str], np.ndarray] = {}
        beside = _BESIDE.get(metric, {})
        for r in rows:
            layer, part = kv_layer(r.unit)
            part = "scores" if r.metric == beside.get("scores") else part
            if part and layer in layers and (r.metric == metric or r.metric == beside.get(part)):
                column = parts.setdefault((part, r.format), np.full(len(layers), np.nan))
                column[layers.index(layer)] = r.value
        return cls(metric, layers, pairs, damage, stderr, layout, run, parts)

    def select(self, pairs: Iterable[str]) -> KvTable:
        """The same with these pairs only, in this order.

        Raises:
            UserError: a pair that was not measured.
        """
        wanted = tuple(dict.fromkeys(parse_pair(p).name for p in pairs))
        missing = [p for p in wanted if p not in self.pairs]
        if missing:
            raise UserError(f"{self.metric} was not measured for {', '.join(missing)}",
                            found=f"measured: {', '.join(self.pairs)}")  # fmt: skip
        at = [self.pairs.index(p) for p in wanted]
        return replace(self, pairs=wanted, damage=self.damage[:, at], stderr=self.stderr[:, at])

    def formats(self) -> tuple[KvPair, ...]:
        """The pairs as formats."""
        return tuple(parse_pair(p) for p in self.pairs)
