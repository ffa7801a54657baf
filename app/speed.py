"""How fast this machine is, measured once and remembered: turns a metric's cost into seconds."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import ModelIndex
from bitatlas.cache.paths import Home

if TYPE_CHECKING:
    from bitatlas.analysis.metrics.base import Cost

__all__ = ["machine_speed", "seconds_of"]

_BYTES_PER_SECOND = 1.0e9  # reading and widening a checkpoint; only the order of magnitude matters


@lru_cache(maxsize=1)
def machine_speed() -> float:
    """Multiply-adds per second of a float32 matrix product of this machine, all cores; kept in the data folder."""
    path = Home.default().root / "speed.json"
    try:
        return float(json.loads(path.read_text())["macs_per_second"])
    except (OSError, ValueError, KeyError):
        pass
    import numpy as np

    a, b = np.ones((256, 1024), np.float32), np.ones((1024, 1024), np.float32)
    a @ b
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        runs.append(time.perf_counter() - start)
    speed = 256 * 1024 * 1024 / sorted(runs)[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"macs_per_second": speed}))
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only home: measured again next time
    return speed


def seconds_of(cost: Cost, index: ModelIndex) -> float:
    """Rough seconds of a cost: passes at the measured matrix speed, bytes at a disk's, extra arithmetic on top.

    A token's forward touches the active weights once; experts that are not routed to are left out. The
    factor 3 is what small batches and attention cost over a large matrix product; a backward is two forwards.
    """
    active = sum(
        u.params * (index.top_k / index.n_experts if u.expert >= 0 and index.n_experts else 1.0)
        for u in index.units
        if u.role != "embed" or not any(v.role == "head" for v in index.units)
    )
    passes = cost.forward_tokens + 2 * cost.backward_tokens
    macs = 3 * passes * active + cost.flops / 2
    return macs / machine_speed() + cost.bytes_read / _BYTES_PER_SECOND
