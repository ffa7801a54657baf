"""One memory budget for weights and KV cache: the K/V format pairs of each layer as further units of the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.schema import KvGeometry
from bitatlas.solvers.problem import Problem, SideBudget

__all__ = ["JointProblem", "join_kv", "kv_bytes"]

_PREFIX = "kv.layer."


@dataclass(frozen=True, eq=False)
class JointProblem:
    """The joint problem and how to read its answer.

    Attributes:
        problem: units = the weights' units, then ``kv.layer.L`` for every layer with a cache; formats = theirs, then
            the pairs, ``k8v4``; any solver takes it.
        pairs: (k bits, v bits) of each pair. layers: of each KV unit.
        weight_units, weight_formats: how many of each come first.
    """

    problem: Problem
    pairs: tuple[tuple[float, float], ...]
    layers: tuple[int, ...]
    weight_units: int
    weight_formats: int

    def split(self, choice: np.ndarray) -> tuple[np.ndarray, dict[int, tuple[float, float]]]:
        """(U,) formats of the weights and layer -> (k bits, v bits) from the joint choice."""
        pair = np.asarray(choice)[self.weight_units :] - self.weight_formats
        return np.asarray(choice)[: self.weight_units], {
            layer: self.pairs[p] for layer, p in zip(self.layers, pair.tolist())
        }

    def spent(self, choice: np.ndarray) -> tuple[int, int]:
        """Bytes of the weights' units and of the KV cache."""
        size = self.problem.bytes[np.arange(len(choice)), choice]
        return int(size[: self.weight_units].sum()), int(size[self.weight_units :].sum())


def kv_bytes(
    geometry: KvGeometry, pairs: Sequence[tuple[float, float]], context: int, batch: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Layers that keep a cache, and (L, P) int64 bytes of each in each pair, at ``context`` tokens x ``batch``."""
    layers = tuple(layer for layer, heads in enumerate(geometry.heads) if heads)
    alone = [
        KvGeometry((geometry.heads[layer],), geometry.head_dim, (geometry.windows[layer],))
        for layer in layers
    ]
    table = [[g.cache_bytes(context, batch, k, v) for k, v in pairs] for g in alone]
    return layers, np.array(table, np.int64).reshape(len(layers), len(pairs))


def join_kv(
    weights: Problem,
    geometry: KvGeometry,
    pairs: Sequence[tuple[float, float]],
    damage: np.ndarray,
    *,
    context: int,
    batch: int = 1,
    limit_bytes: int,
) -> JointProblem:
    """Add the KV cache to a weights problem; the two damages must be in one unit (nats per token).

    Args:
        damage: (L, P) of each layer that keeps a cache in each pair of (k bits, v bits).
        limit_bytes: for the weights' units and the cache together.

    Raises:
        ValueError: a damage table of another shape.
    """
    layers, size = kv_bytes(geometry, pairs, context, batch)
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
        units=(*weights.units, *(f"{_PREFIX}{layer}" for layer in layers)),
        formats=(*weights.formats, *(f"k{a:g}v{b:g}" for a, b in pairs)),
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
        side=[SideBudget(s.name, np.pad(s.cost, ((0, m), (0, p))), s.limit) for s in weights.side],
        interaction=interaction,
        interaction_scale=weights.interaction_scale,
        shrinkage=weights.shrinkage,
    )
    return JointProblem(problem, tuple(pairs), layers, n, k)
