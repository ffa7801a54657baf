"""AWQ statistics: which input channels are large, and how much scaling them helps each format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.capture import layer_groups, watch_units
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.activation_error import relative_stderr
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, unknown_rows
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, QuantUnit
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["AwqStats", "ChannelStats", "scaled_error"]

_BATCH_TOKENS = 2048
_GRID = 20  # AWQ tries alpha = 0, 1/20, ... 19/20
_BATCHES = 16  # of sequences, for the standard error
_STATISTICS_BYTES = 1 << 28
_FREE = ("awq_channel_ratio", "awq_mean_activation", "awq_spike")


class AwqStats(Metric):
    """Error of a unit under AWQ's best per-channel scale, and its input's magnitudes.

        awq_stats = min_alpha (1/N) sum_j E_j ||dW_j||^2,   dW = Q(W diag(s)) diag(s)^-1 - W
        s = m^alpha / sqrt(max(m^alpha) min(m^alpha)),  m_j = mean |x_j|,  alpha in {0, 1/20, ..., 19/20}

    AWQ (arXiv 2306.00978), eq. 4-5. AWQ compares block outputs; here the output error is taken with the
    diagonal of the input's second moment, E_j = sum x_j^2, so that a unit needs no forward of its own per alpha.
    ``awq_alpha`` is the winning alpha; a large one says that salient channels matter. Format-free:
    ``awq_channel_ratio`` = max_j m_j / mean_j m_j, ``awq_mean_activation`` = mean |x|, ``awq_spike`` =
    max |x| / mean |x| (massive activations). N counts all calibration tokens, as in `activation_error`.
    Units that are only looked up and experts that no token reaches are unknown. Standard error
    over 16 batches of sequences, alpha held.
    """

    NAME = "awq_stats"
    TITLE = "AWQ scaled error"
    UNIT = "squared activation per token"
    SOURCE = "AWQ (arXiv 2306.00978), eq. 4-5, diagonal second moment"
    NEEDS = "activations"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("awq_stats", "awq_alpha", *_FREE)
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Groups of layers, each with a pass of the model up to its end."""
        return list(_groups(ctx))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Channel statistics of a group in one pass, then every unit in every format and alpha."""
        units = _groups(ctx)[key]
        stats = _collect(ctx, units)
        n = ctx.calibration.size
        rows = []
        for unit in units:
            found = stats.get(unit.key)
            if found is None:
                rows += [
                    r
                    for name in self.EMITS[:2]
                    for r in unknown_rows(name, unit.key, [f.name for f in ctx.formats])
                ]
                rows += [r for name in _FREE for r in unknown_rows(name, unit.key, [NO_FORMAT])]
                continue
            weight = ctx.weight(unit)
            mean = found.absolute / found.count  # (cols,) mean |x|
            for fmt in ctx.formats:
                alpha, row_error = scaled_error(weight, fmt, mean, found.energy.sum(0))
                by_batch = (found.energy.double() @ row_error).numpy()  # (K,)
                damage = float(by_batch.sum()) / n
                spread = damage * relative_stderr(by_batch)
                rows.append(DamageRow("awq_stats", unit.key, fmt.name, damage, spread, found.count))
                rows.append(DamageRow("awq_alpha", unit.key, fmt.name, alpha, count=found.count))
            overall = float(mean.mean())
            known = overall > 0
            free = (
                (float(mean.max()) / overall, overall, found.top / overall) if known else (float("nan"),) * 3
            )
            rows += [DamageRow(m, unit.key, NO_FORMAT, v, count=found.count) for m, v in zip(_FREE, free)]
        return StepResult(rows)

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, group by group, and every weight rounded 20 times per format."""
        groups = len(self.plan(ctx))
        return Cost(
            steps=groups,
            bytes_read=checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            quantised=_GRID * ctx.index.params * len(ctx.formats),
        )


@dataclass(slots=True)
class ChannelStats:
    """Sums over the tokens that reached a unit.

    Attributes:
        count: tokens.
        absolute: (cols,) float64, sum of |x|.
        energy: (K, cols) float64, sum of x^2 of each of K equal batches of sequences.
        top: largest |x|.
    """

    count: int
    absolute: Tensor
    energy: Tensor
    top: float


def scaled_error(weight: Tensor, fmt: Format, mean: Tensor, energy: Tensor) -> tuple[float, Tensor]:
    """Best alpha of AWQ's grid, and ||dW_j||^2 per input column there, (cols,) float64.

    Args:
        weight: (rows, cols) float32.
        mean: (cols,) mean |x|; energy: (cols,) sum of x^2.
    """
    best, winner, columns = float("inf"), 0.0, torch.zeros(weight.shape[1], dtype=torch.float64)
    for i in range(_GRID):
        s = mean.float().pow(i / _GRID).clamp_min(1e-4)  # (cols,)
        s = s / (s.max() * s.min()).sqrt()
        error = (quantize_dequantize(weight * s, fmt) / s).sub_(weight)
        found = error.square_().sum(0, dtype=torch.float64)
        loss = float(found @ energy)
        if loss < best:
            best, winner, columns = loss, i / _GRID, found
    return winner, columns


def _groups(ctx: MeasureContext) -> dict[str, tuple[QuantUnit, ...]]:
    return layer_groups(ctx.index.units, _STATISTICS_BYTES, lambda u: 8 * (_BATCHES + 1) * u.cols)


def _collect(ctx: MeasureContext, units: tuple[QuantUnit, ...]) -> dict[str, ChannelStats]:
    sequences = len(ctx.calibration.tokens)
    batches = min(_BATCHES, sequences)
    found: dict[str, ChannelStats] = {}

    def watch(key: str, x: Tensor, sequence: np.ndarray, weight: Tensor | None) -> None:
        x = x.float().cpu()
        stats = found.get(key)
        if stats is None:
            zeros = torch.zeros(batches, x.shape[1], dtype=torch.float64)
            stats = found[key] = ChannelStats(0, zeros[0].clone(), zeros, 0.0)
        stats.count += len(x)
        stats.absolute += x.abs().sum(0, dtype=torch.float64)
        stats.energy.index_add_(0, torch.from_numpy(sequence * batches // sequences), x.double().square())
        stats.top = max(stats.top, float(x.abs().max()))

    watch_units(ctx, units, watch, _BATCH_TOKENS)
    return found
