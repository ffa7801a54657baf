"""KV cache: which layers' K and V can do with fewer bits, and how memory should be split between weights and cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitatlas.analysis.schema import Frontier, KvGeometry, KvTable, UserError, parse_kv_format
from bitatlas.app.kv_plan import encode_kv, pair_bits
from bitatlas.app.sizes import format_bytes
from bitatlas.solvers import FrontCache
from bitatlas.solvers.joint import kv_problem

__all__ = [
    "JointFront",
    "KvMap",
    "Panel",
    "Split",
    "best_bits",
    "build_joint_front",
    "build_map",
    "build_split",
]

_POINTS = 96
_PARTS = {"k": "K", "v": "V", "scores": "Scores"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One map: ``values`` (layers, columns), NaN = unknown."""

    name: str
    columns: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class KvMap:
    """K, V, and both, by layer and format.

    Attributes:
        title, subtitle: the answer, and where it comes from.
        layers: rows of every panel; panels: ``K``, ``V`` (where the metric tells them apart) and ``K and V``; of relative errors
            ``K``, ``V``, ``Scores`` and ``Output``.
        metric: whose values.
    """

    title: str
    subtitle: str
    layers: tuple[int, ...]
    panels: tuple[Panel, ...]
    metric: str

    @property
    def quantity(self) -> str:
        """What the colours stand for."""
        return "relative error" if _is_error(self.metric) else "damage"

    def columns(self) -> dict[str, list[Any]]:
        """The panels as a table: part, layer, format, damage."""
        out: dict[str, list[Any]] = {"part": [], "layer": [], "format": [], "damage": []}
        for panel in self.panels:
            for i, layer in enumerate(self.layers):
                for j, name in enumerate(panel.columns):
                    for key, value in zip(out, (panel.name, layer, name, float(panel.values[i, j]))):
                        out[key].append(value)
        return out

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        data = asdict(self)
        for panel in data["panels"]:
            panel["values"] = panel["values"].tolist()
        return data


@dataclass(frozen=True, slots=True)
class Split:
    """One memory, shared in every possible way.

    Attributes:
        title, detail: the answer.
        kv_bytes: (N,) bytes given to the cache, rising; weights, cache, total: (N,) predicted damages.
        best: index of the best split. plan: layer -> pair there.
        whole_kv_bytes: what a cache of 16 bits would take.
    """

    title: str
    detail: str
    kv_bytes: np.ndarray
    weights: np.ndarray
    cache: np.ndarray
    best: int
    plan: dict[int, str]
    whole_kv_bytes: int

    @property
    def total(self) -> np.ndarray:
        """(N,) damage of both."""
        return self.weights + self.cache


@dataclass(frozen=True, slots=True)
class JointFront:
    """Every memory with its best split, smallest first.

    Attributes:
        title, detail: the answer.
        total_bytes: (P,) all weights, kept tensors included, and the cache; kv_bytes: (P,) the cache alone.
        damage: (P,) predicted, of both. at: index of the point for the memory in hand, -1 = it is too small.
    """

    title: str
    detail: str
    total_bytes: np.ndarray
    kv_bytes: np.ndarray
    damage: np.ndarray
    at: int

    def columns(self) -> dict[str, list[Any]]:
        """The front as a table."""
        share = self.kv_bytes / self.total_bytes
        return {"total_bytes": self.total_bytes.tolist(), "kv_bytes": self.kv_bytes.tolist(), "kv_share": share.tolist(),
                "damage": self.damage.tolist()}  # fmt: skip


def build_joint_front(front: Frontier, kept_bytes: int, memory: int) -> JointFront:
    """The front of weights and cache together (`tasks.joint.joint_front`), seen from ``memory`` bytes in all."""
    total = front.payload_bytes + kept_bytes
    share, at = front.kv_bytes / total, front.at(memory - kept_bytes)
    low, high = int(np.argmin(share)), int(np.argmax(share))
    title = f"The KV cache should get {share[low]:.0%} to {share[high]:.0%} of the memory"
    detail = f"The least at {format_bytes(int(total[low]))}, the most at {format_bytes(int(total[high]))}"
    detail += (
        f"; {format_bytes(memory)} is too small."
        if at < 0
        else f"; {share[at]:.0%} at {format_bytes(memory)}."
    )
    return JointFront(title, detail, total, front.kv_bytes, np.maximum(front.predicted, 0.0), at)


def build_map(table: KvTable) -> KvMap:
    """The map of one measured KV metric."""
    panels = []
    for part, title in _PARTS.items():
        names = sorted(
            (n for p, n in table.parts if p == part),
            key=lambda n: (n.partition("-")[2], -parse_kv_format(n).bits),
        )
        if names:
            panels.append(Panel(title, tuple(names), np.stack([table.parts[part, n] for n in names], 1)))
    pairs = [i for i, p in enumerate(table.pairs) if p != "kv16/kv16"]
    panels.append(
        Panel(
            "Output" if _is_error(table.metric) else "K and V",
            tuple(table.pairs[i] for i in pairs),
            table.damage[:, pairs],
        )
    )
    return KvMap(_answer(table, panels), _where(table), table.layers, tuple(panels), table.metric)


def _answer(table: KvTable, panels: list[Panel]) -> str:
    """Which of K and V hurts more where both have the same bits, and how concentrated it is."""
    four = [np.nanmean(v) for (p, n), v in table.parts.items() if p == "k" and n.startswith("kv4")]
    other = [np.nanmean(v) for (p, n), v in table.parts.items() if p == "v" and n.startswith("kv4")]
    last = panels[-1].values
    worst = int(np.nanargmax(np.nansum(last, axis=1)))
    layer = f"layer {table.layers[worst]} is hurt most"
    if not four or not other or not min(other) > 0:
        return f"{len(table.layers)} layers keep a cache; {layer}"
    ratio = float(min(four) / min(other))
    first, second = ("K", "V") if ratio >= 1 else ("V", "K")
    verb = "is off by" if _is_error(table.metric) else "hurts"
    word = f"{first} at 4 bits {verb} {max(ratio, 1 / ratio):.1f} times as much as {second}"
    return f"{word}; {layer}"


def _is_error(metric: str) -> bool:
    """Relative errors stand for themselves: of K, of V, of the scores and of the output, not damages of the output alone."""
    return metric.startswith("kv_error")


def _where(table: KvTable) -> str:
    w = table.layout
    return f"{table.metric}; the newest {w.residual} to {w.residual + w.block - 1} tokens stay at 16 bits"


def build_split(
    front: FrontCache, table: KvTable, geometry: KvGeometry, *, memory: int, context: int, batch: int
) -> Split:
    """How ``memory`` bytes (kept tensors and reserve already taken off) should be shared.

    Args:
        front: of the weights' problem.
        memory: for the units' payload and the cache together.

    Raises:
        UserError: no context, or too little memory for the smallest formats of both.
    """
    if context < 1:
        raise UserError("the split needs a context length", found="0 tokens", fix="set the context")
    cache = kv_problem(table, geometry, context=context, batch=batch, limit_bytes=0)
    kv_front = FrontCache.of(cache)
    least, kv_least = int(front.cum_bytes[0]), int(kv_front.cum_bytes[0])
    if least + kv_least > memory:
        raise UserError(
            f"{format_bytes(memory)} is too small for weights and KV cache",
            found=f"the smallest formats take {format_bytes(least)} and {format_bytes(kv_least)}",
            fix="more memory, a shorter context, a smaller batch, or smaller formats",
        )
    # Every step of the cache's own front is a candidate, thinned for drawing; the weights take the rest.
    within = kv_front.cum_bytes[kv_front.cum_bytes <= memory - least]
    at = np.unique(np.linspace(0, len(within) - 1, min(len(within), _POINTS)).round().astype(int))
    kv_bytes = within[at]
    cache_damage = np.maximum(kv_front.cum_damage[at], 0.0)
    steps = np.searchsorted(front.cum_bytes, memory - kv_bytes, side="right") - 1
    weight_damage = np.maximum(front.cum_damage[steps], 0.0)
    best = int(np.argmin(weight_damage + cache_damage))
    choice = kv_front.classes.expand(kv_front.class_choice(int(at[best])))
    plan = {layer: table.pairs[p] for layer, p in zip(table.layers, choice.tolist())}
    whole = geometry.plan_bytes({}, context, batch, table.layout)
    share = kv_bytes[best] / memory
    bits = 16 * kv_bytes[best] / max(whole, 1)
    return Split(
        title=f"Give the KV cache {format_bytes(int(kv_bytes[best]))} of {format_bytes(memory)} ({share:.0%})",
        detail=f"{bits:.1f} bits per cached number on average; at 16 bits it would take {format_bytes(whole)}. "
        f"Predicted damage {weight_damage[best]:.3g} from the weights and {cache_damage[best]:.3g} from the cache.",
        kv_bytes=kv_bytes,
        weights=weight_damage,
        cache=cache_damage,
        best=best,
        plan=plan,
        whole_kv_bytes=whole,
    )


def best_bits(
    front: FrontCache, table: KvTable, geometry: KvGeometry, *, memory: int, context: int, batch: int
) -> str:
    """Bits of K and V by layer (`app.kv_plan`) where one memory for weights and cache is split best.

    Keys by channel and values by token only: what the plan's text stands for.

    Raises:
        UserError: see `build_split`; or the metric was not measured for such pairs.
    """
    usual = []
    for pair in table.formats():
        k, v = pair.k.name, pair.v.name
        if (k.endswith("-channel") or k == "kv16") and (v.endswith("-token") or v == "kv16"):
            usual.append(pair.name)
    split = build_split(front, table.select(usual), geometry, memory=memory, context=context, batch=batch)
    return encode_kv({layer: pair_bits(name) for layer, name in split.plan.items()})
