"""Allocations and fronts in numbers, for people and scripts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bitatlas.analysis.schema import Allocation, Frontier, ModelIndex
from bitatlas.app.side_budgets import active_bytes as bytes_read
from bitatlas.app.tasks.models import register
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["describe_allocation", "describe_frontier"]


def describe_allocation(allocation: Allocation, file: str | Path | None = None) -> dict[str, Any]:
    """An allocation in numbers for people and scripts, without its unit list."""
    counts = Counter(allocation.formats.values())
    total = sum(counts.values())
    return {
        "model": allocation.model_name,
        "metric": allocation.metric,
        "solver": allocation.solver,
        "quantizer": _measured_with(allocation),
        "status": allocation.status,
        "bits_per_weight": allocation.bits_per_weight,
        "payload_bytes": allocation.payload_bytes,
        "kept_bytes": allocation.kept_bytes,
        "weights_bytes": allocation.weights_bytes,
        **_in_engine(allocation),
        "predicted": allocation.predicted,
        "searched": allocation.searched,
        "lower_bound": allocation.lower_bound,
        "gap": allocation.gap,
        "budget": allocation.budget.label if allocation.budget else "",
        "histogram": {name: {"units": n, "share": n / total} for name, n in sorted(counts.items())},
        "kv_bytes": allocation.budget.kv_bytes if allocation.budget else 0,
        "kv": dict(sorted(Counter("/".join(pair) for pair in allocation.kv.values()).items())),
        "file": str(file) if file else "",
    }


def _measured_with(allocation: Allocation) -> str:
    """The quantiser under which the damage was measured; "" where this store does not know the run."""
    store, run = Store(Home.default()), str(allocation.provenance.settings.get("run") or "")
    return next((r.quantizer for r in store.runs(allocation.model_digest) if r.run == run), "")


def _in_engine(allocation: Allocation) -> dict[str, Any]:
    """target, engine_bytes and engine_bits (units, per weight) of an allocation that was solved for an engine."""
    name = allocation.provenance.settings.get("target")
    store = Store(Home.default())
    if (
        not isinstance(name, str)
        or not name
        or allocation.model_digest not in {m["digest"] for m in store.models()}
    ):
        return {}
    from bitatlas.app.targets import get_target

    engine, index = get_target(name), store.model(allocation.model_digest)
    total = engine.engine_bytes(allocation, index)
    bits = (total - engine.kept_bytes(index)) * 8 / max(index.params, 1)
    return {"target": name, "engine_bytes": total, "engine_bits": bits}


def describe_frontier(front: Frontier, model: str | Path, target: str | None = None) -> list[dict[str, Any]]:
    """One row per point of a front: bytes, bytes read per token, effective bits, predicted damage, units per format.

    Of weights and KV cache together also the bytes of all weights (kept tensors included, by ``target``'s container if one is
    named) and the cache, the cache's own and its share, and layers per pair.
    """
    index = register(model)
    n, joint = len(index.units), len(front.kv_bytes) > 0
    formats = tuple(f for f in front.formats if not (joint and f.startswith("kv")))  # the weights' come first
    params, read = index.params, bytes_read(index, formats)
    units, rows = np.arange(n), []
    kept = _kept_bytes(index, target) if joint else 0
    for p, (size, damage) in enumerate(zip(front.payload_bytes.tolist(), front.predicted.tolist())):
        choice, cache = front.choice[p, :n], int(front.kv_bytes[p]) if joint else 0
        row = {"payload_bytes": size - cache, "active_bytes": int(read[units, choice].sum()), "bits_per_weight": (size - cache) * 8 / params, "predicted": damage,
               "units": _counted(choice, front.formats)}  # fmt: skip
        if joint:
            both = size + kept
            row = {"total_bytes": both, "kv_bytes": cache, "kv_share": cache / both, **row, "kv": _counted(front.choice[p, n:], front.formats)}  # fmt: skip
        rows.append(row)
    return rows


def _counted(choice: np.ndarray, formats: tuple[str, ...]) -> str:
    """``12xint4-g64 3xint8-g64``."""
    return " ".join(f"{n}x{f}" for f, n in zip(formats, np.bincount(choice, minlength=len(formats))) if n)


def _kept_bytes(index: ModelIndex, target: str | None) -> int:
    """What a file keeps beside the units."""
    if target is None:
        return index.kept_bytes
    from bitatlas.app.targets import get_target

    return max(index.kept_bytes, get_target(target).kept_bytes(index))
