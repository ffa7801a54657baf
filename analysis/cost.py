"""From a metric's machine-free cost to seconds on this machine, by timing three tiny pieces of work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import ModelIndex

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.metrics.base import Cost, Metric

__all__ = ["Rates", "active_params", "checkpoint_bytes", "estimate", "loading", "measure_rates"]

_START_S = 5.0  # a worker, its computing process, and their libraries


@dataclass(frozen=True, slots=True)
class Rates:
    """What this process does in a second: matrix arithmetic, weights rounded to a format, bytes read."""

    flops: float
    quantised: float
    bytes: float


def _per_second(amount: float, work: Callable[[], object], at_least_s: float = 0.05) -> float:
    work()  # the first call pays for threads and caches
    count, start = 0, time.perf_counter()
    # The mean, not the best: what this process gets while others work too.
    while (elapsed := time.perf_counter() - start) < at_least_s or not count:
        work()
        count += 1
    return amount * count / elapsed


@lru_cache(maxsize=1)
def measure_rates() -> Rates:
    """Times a matrix product, a quantiser call and what reading does; a quarter of a second, once per process."""
    import torch

    from bitatlas.kernels.formats import parse_format
    from bitatlas.kernels.reference import quantize_dequantize

    a = torch.ones(384, 384)
    raw = torch.ones(1 << 18, dtype=torch.bfloat16)
    fmt = parse_format("int4-g64")
    return Rates(
        flops=_per_second(2 * 384**3, lambda: a @ a),
        quantised=_per_second(a.numel(), lambda: quantize_dequantize(a, fmt)),
        bytes=_per_second(2 * raw.numel(), lambda: torch.isfinite(raw.to(torch.float32)).all()),
    )


def active_params(index: ModelIndex) -> float:
    """Weights that one token passes through: of routed experts only the chosen ones count."""
    share = index.top_k / index.n_experts if index.n_experts else 1.0
    # An embedding costs nothing to look up, unless it is the head as well.
    looked_up = "embed" if any(u.role == "head" for u in index.units) else ""
    return sum(u.params * (share if u.expert >= 0 else 1.0) for u in index.units if u.role != looked_up)


def checkpoint_bytes(index: ModelIndex) -> int:
    """Bytes of the checkpoint's weight files that hold units."""
    path = Path(index.path)
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    total = sum(os.path.getsize(f) for f in files if f.exists())
    return max(0, total - index.kept_bytes)


def estimate(metric: Metric, ctx: MeasureContext) -> Cost:
    """The metric's cost with seconds for this process: good to a small factor, before anything has run.

    A token costs 2 operations per active weight forwards and 4 backwards; once steps have run, their own
    times tell more (see `measure.StepDone`).
    """
    cost, rates = metric.cost(ctx), measure_rates()
    active = active_params(ctx.index)
    flops = cost.flops + active * (2.0 * cost.forward_tokens + 4.0 * cost.backward_tokens)
    seconds = flops / rates.flops + cost.quantised / rates.quantised + cost.bytes_read / rates.bytes
    return replace(cost, seconds=seconds)


def loading(ctx: MeasureContext, *, model: bool, sampled: bool) -> Cost:
    """What every job pays once, whatever it measures: the processes' start, the model, a text sampled from it.

    Args:
        model: one of the metrics runs the model. sampled: on text of its own.
    """
    from bitatlas.analysis.metrics.base import Cost

    rates, size = measure_rates(), checkpoint_bytes(ctx.index) if model else 0
    tokens = ctx.calibration_tokens if model and sampled else 0
    seconds = _START_S + size / rates.bytes + 2.0 * active_params(ctx.index) * tokens / rates.flops
    return Cost(steps=0, bytes_read=size, forward_tokens=tokens, seconds=seconds)
