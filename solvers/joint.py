"""One memory budget for weights and KV cache: the K/V format pairs of each layer as further units of the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.analysis.schema import KvGeometry, KvLayout, KvPair, KvTable, kv_unit
from bitatlas.solvers.problem import Problem

__all__ = ["JointProblem", "join_kv", "kv_bytes", "kv_problem"]


@dataclass(frozen=True, eq=False)
class JointProblem:
    """The joint problem and how to read its answer.

    Attributes:
        problem: units = the weights' units, then ``kv.L`` for every layer with a cache; formats = theirs, then
            the pairs, ``kv8-channel/kv4-token``; any solver takes it.
        pairs: formats of K and V. layers: of each KV unit.
        weight_units, weight_formats: how many of each come first.
    """

    problem: Problem
    pairs: tuple[KvPair, ...]
    layers: tuple[int, ...]
    weight_units: int
    weight_formats: int

    def split(self, choice: np.ndarray) -> tuple[np.ndarray, dict[int, KvPair]]:
        """(U,) formats of the weights and layer -> formats of K and V, from the joint choice."""
        pair = np.asarray(choice)[self.weight_units :] - self.weight_formats
        return np.asarray(choice)[: self.weight_units], {
            layer: self.pairs[p] for layer, p in zip(self.layers, pair.tolist())
        }

    def spent(self, choice: np.ndarray) -> tuple[int, int]:
        """Bytes of the weights' units and of the KV cache."""
        size = self.problem.bytes[np.arange(len(choice)), choice]
        return int(size[: self.weight_units].sum()), int(size[self.weight_units :].sum())


def kv_bytes(
    geometry: KvGeometry, pairs: Sequence[KvPair], context: int, batch: int, layout: KvLayout
) -> tuple[tuple[int, ...], np.ndarray]:
    """Layers that keep a cache, and (L, P) int64 exact bytes of each in each pair, at ``context`` tokens x ``batch``."""
    layers = geometry.layers
    table = [[geometry.layer_bytes(layer, p, context, batch, layout) for p in pairs] for layer in layers]
    return layers, np.array(table, np.int64).reshape(len(layers), len(pairs))


def kv_problem(
    table: KvTable, geometry: KvGeometry, *, context: int, batch: int, limit_bytes: int
) -> Problem:
    """The cache alone as a problem: one unit a layer, one format a pair; any solver that sums damages takes it.

    Raises:
        ValueError: a table of other layers than the geometry's.
    """
    layers, size = kv_bytes(geometry, table.formats(), context, batch, table.layout)
    if layers != table.layers:
        raise ValueError(f"the table has layers {table.layers}, the model caches {layers}")
    return Problem.of(
        table.damage, size, limit_bytes, units=[kv_unit(layer) for layer in layers], formats=table.pairs,
        params=np.zeros(len(layers), np.int64), layers=np.array(layers), roles=["kv"] * len(layers), metric=table.metric,
    )  # fmt: skip


def join_kv(
    weights: Problem,
    geometry: KvGeometry,
    pairs: Sequence[KvPair],
    damage: np.ndarray,
    *,
    context: int,
    batch: int = 1,
    layout: KvLayout | None = None,
    limit_bytes: int,
) -> JointProblem:
    """Add the KV cache to a weights problem; the two damages must be in one unit (nats per token).

    Args:
        damage: (L, P) of each layer that keeps a cache in each pair.
        layout: rules of the cache's 16-bit window, for its bytes.
        limit_bytes: for the weights' units and the cache together.

    Raises:
        ValueError: a damage table of another shape.
    """
    layers, size = kv_bytes(geometry, pairs, context, batch, layout or KvLayout())
    damage = np.asarray(damage, np.float64)
    if damage.shape != size.shape:
        raise ValueError(f"KV damage is {damage.shape}, {size.shape} is needed")
    (n, k), (m, p) = weights.damage.shape, size.shape
    shape = (n + m, k + p)
    full = np.full(shape, np.nan)
    full[:n, :k], full[n:, k:] = weights.damage, damage
    allowed = np.zeros(shape, bool)
    allowed[:n, :k], allowed[n:, k:] = weights.allowed, np.isfinite(damage)
    total = np.zeros(shape, np.int64)
    total[:n, :k], total[n:, k:] = weights.bytes, size
    interaction = None
    if weights.interaction is not None:
        # Cross terms between weights and cache are not measured; the cache adds its damage alone.
        interaction = np.zeros((len(weights.interaction), *shape), weights.interaction.dtype)
        interaction[:, :n, :k] = weights.interaction
    problem = Problem.of(
        full,
        total,
        limit_bytes,
        units=(*weights.units, *(kv_unit(layer) for layer in layers)),
        formats=(*weights.formats, *(p.name for p in pairs)),
        ties=weights.ties,
        pins=weights.pins,
        allowed=allowed,
        # The cache has no weights: it counts in bytes, not in bits per weight.
        params=np.append(weights.params, np.zeros(m, np.int64)),
        layers=np.append(weights.layers, np.array(layers, np.int64)),
        roles=(*weights.roles, *(("kv",) * m)),
        experts=np.append(weights.experts, np.full(m, -1)),
        kept_bytes=weights.kept_bytes,
        imputed=np.append(weights.imputed, np.zeros(m, bool)),
        metric=weights.metric,
        side=[replace(s, cost=np.pad(s.cost, ((0, m), (0, p)))) for s in weights.side],
        interaction=interaction,
        interaction_scale=weights.interaction_scale,
        shrinkage=weights.shrinkage,
    )
    return JointProblem(problem, tuple(pairs), layers, n, k)
