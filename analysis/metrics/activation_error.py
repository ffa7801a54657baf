"""Activation-aware layer error: how far rounding moves what a unit puts out, on real inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.capture import SHARED_INPUT, Watch, layer_groups, watch_units
from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, unknown_rows
from bitatlas.analysis.schema import DamageRow, QuantUnit
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["ActivationError", "InputMoments", "collect_moments", "error_sketch", "relative_stderr"]

_SKETCH = 64  # random output directions whose energy is followed sequence by sequence
_BLOCK = 1 << 22  # weights rounded at a time


class ActivationError(Metric):
    """Squared error of a unit's output, per calibration token.

        activation_error = (1/N) sum_t w_t^2 ||x_t dW^T||^2 = tr(dW H dW^T),  H = (1/N) sum_t w_t^2 x_t x_t^T

    the quantity that OBQ and GPTQ minimise (arXiv 2210.17323, eq. 1). N counts all calibration tokens, so a
    routed expert's damage is what it adds to an average token; w_t is the routing weight with
    ``routing_weight=True`` and 1 otherwise. ``activation_error_rel`` divides by the output's own energy
    tr(W H W^T). Units that share an input (q, k, v; gate, up) share one H. An embedding that is only looked
    up is measured by the rows that the text uses. An expert that no token reaches is unknown (NaN, count 0).

    The value is exact for the text. Its relative standard error is the spread over sequences, followed in the
    middle one of the formats along 64 random output directions (all of them for a unit with fewer rows):
    it hangs on the inputs far more than on the format. ``count`` is the tokens that reached the unit.
    """

    NAME = "activation_error"
    TITLE = "Layer output error"
    UNIT = "squared activation per token"
    SOURCE = "GPTQ (arXiv 2210.17323), eq. 1; tr(dW H dW^T)"
    NEEDS = "activations"
    ADDITIVE = True
    PER_FORMAT = True
    EMITS = ("activation_error", "activation_error_rel")
    VERSION = 1
    SETTINGS = {"routing_weight": False, "moment_bytes": 1 << 30, "batch_tokens": 2048}

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Groups of layers whose second moments fit into ``moment_bytes``; each runs the model up to its end."""
        return list(layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes"))))

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """One pass over the text for a group of layers, then every unit in every format."""
        units = layer_groups(ctx.index.units, int(self.option(ctx, "moment_bytes")))[key]
        tokens = ctx.calibration.tokens
        sketches = {u.key: error_sketch(ctx, u) for u in units}
        moments = collect_moments(
            ctx,
            units,
            sketches,
            bool(self.option(ctx, "routing_weight")),
            int(self.option(ctx, "batch_tokens")),
        )
        rows = []
        for unit in units:
            found = moments.get(unit.key)
            if unit.role == "embed" and found is None:
                rows += self._lookup_rows(ctx, unit, tokens)
            elif found is None or not found.count:
                for name in self.EMITS:
                    rows += unknown_rows(name, unit.key, [f.name for f in ctx.formats])
            else:
                rows += self._rows(ctx, unit, found, tokens.size)
        return StepResult(rows)

    def _rows(self, ctx: MeasureContext, unit: QuantUnit, found: InputMoments, n: int) -> list[DamageRow]:
        weight = ctx.weight(unit).to(ctx.loaded.device)
        h = found.matrix()  # (cols, cols), sum over tokens
        energy = sum(
            float(((w @ h) * w).sum(dtype=torch.float64)) for w in weight.split(_rows_at_once(unit.cols))
        )
        rows, spread = [], relative_stderr(found.energies)
        for fmt in ctx.formats:
            total = sum(float(((e @ h) * e).sum(dtype=torch.float64)) for e in _errors(weight, fmt))
            total = max(total, 0.0)  # rounding in the product of a dW that is nearly zero
            mean, relative = total / n, total / energy if energy > 0 else 0.0
            rows += [
                DamageRow(name, unit.key, fmt.name, value, value * spread, found.count)
                for name, value in zip(self.EMITS, (mean, relative))
            ]
        return rows

    def _lookup_rows(self, ctx: MeasureContext, unit: QuantUnit, tokens: np.ndarray) -> list[DamageRow]:
        """An embedding: x is one-hot, so the error of a token is that of its row."""
        weight = ctx.weight(unit)
        ids = torch.from_numpy(tokens)
        energy = float(weight.square().sum(1, dtype=torch.float64)[ids].sum())
        rows = []
        for fmt in ctx.formats:
            per_row = torch.cat([e.square().sum(1, dtype=torch.float64) for e in _errors(weight, fmt)])
            by_sequence = per_row[ids].sum(1).numpy()  # (S,)
            total, spread = float(by_sequence.sum()), relative_stderr(by_sequence)
            mean, relative = total / tokens.size, total / energy if energy > 0 else 0.0
            rows += [
                DamageRow(name, unit.key, fmt.name, value, value * spread, tokens.size)
                for name, value in zip(self.EMITS, (mean, relative))
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, group by group, H once per distinct input, dW H once per unit and format."""
        n, groups, units = ctx.calibration_tokens, len(self.plan(ctx)), ctx.index.units
        inputs = {
            (u.layer, u.expert, SHARED_INPUT.get(u.role, u.role)): u for u in units if u.role != "embed"
        }
        share = ctx.index.top_k / ctx.index.n_experts if ctx.index.n_experts else 1.0
        gram = sum(2.0 * n * u.cols**2 * (share if u.expert >= 0 else 1) for u in inputs.values())
        product = sum(2.0 * u.params * u.cols for u in units if u.role != "embed") * (len(ctx.formats) + 1)
        return Cost(
            steps=groups,
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            flops=gram + product,
            quantised=ctx.index.params * (len(ctx.formats) + 1),
        )


@dataclass(slots=True)
class InputMoments:
    """What a pass gathers about a unit's input.

    Attributes:
        count: tokens seen.
        energies: (S,) float64, squared output of each sequence along the sketched directions.
        second: (cols, cols) float32 on the model's device, sum of w^2 x x^T; None when ``leader`` has it.
        leader: the unit whose input this one shares.
    """

    count: int
    energies: np.ndarray
    second: Tensor | None = None
    leader: InputMoments | None = field(default=None, repr=False)

    def matrix(self) -> Tensor:
        """The second moment, own or shared."""
        found = self.second if self.leader is None else self.leader.second
        assert found is not None
        return found


def collect_moments(
    ctx: MeasureContext,
    units: Sequence[QuantUnit],
    sketches: dict[str, Tensor],
    routing_weight: bool,
    batch_tokens: int,
    also: Watch | None = None,
) -> dict[str, InputMoments]:
    """One pass over the calibration text; units that no token reached are missing from the result.

    Args:
        sketches: unit key -> (cols, r) directions to follow per sequence.
        routing_weight: weigh an expert's tokens with their squared routing weight.
        also: told the inputs of the units whose own second moment is kept, as they come.
    """
    sequences = len(ctx.calibration.tokens)
    found: dict[str, InputMoments] = {}
    # Holding the last few inputs keeps their addresses from being used again.
    recent: deque[tuple[str, Tensor]] = deque(maxlen=4)

    def watch(key: str, x: Tensor, sequence: np.ndarray, weight: Tensor | None) -> None:
        moments = found.get(key)
        if moments is None:
            moments = InputMoments(0, np.zeros(sequences))
            same = (
                found[k] for k, seen in recent if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape
            )
            moments.leader = next(same, None)
            if moments.leader is None:
                moments.second = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            found[key] = moments
        if moments.second is not None:
            recent.append((key, x))
            if also is not None:
                also(key, x, sequence, weight)
        x = x.float()
        if weight is not None and routing_weight:
            x = x * weight.float().unsqueeze(-1)
        if moments.second is not None:
            moments.second.addmm_(x.T, x)
        moments.count += len(x)
        energy = (x @ sketches[key].to(x.device)).square().sum(1, dtype=torch.float64)  # (n,)
        np.add.at(moments.energies, sequence, energy.cpu().numpy())

    watch_units(ctx, units, watch, batch_tokens, before_batch=recent.clear)
    return found


def error_sketch(ctx: MeasureContext, unit: QuantUnit) -> Tensor:
    """(cols, r): dW^T R of the middle format, R random signs (rows, r) / sqrt(r), or the identity."""
    fmt = sorted(ctx.formats, key=lambda f: f.bits)[len(ctx.formats) // 2]
    if unit.rows <= _SKETCH:
        return torch.cat(list(_errors(ctx.weight(unit), fmt))).T
    signs = ctx.rng("sketch", unit.key).integers(0, 2, (unit.rows, _SKETCH)) * 2.0 - 1
    directions = torch.from_numpy(signs / _SKETCH**0.5).float().split(_rows_at_once(unit.cols))
    out = torch.zeros(unit.cols, _SKETCH)
    for error, part in zip(_errors(ctx.weight(unit), fmt), directions):
        out += error.T @ part
    return out


def _rows_at_once(cols: int) -> int:
    return max(1, _BLOCK // cols)


def _errors(weight: Tensor, fmt: Format) -> Iterator[Tensor]:
    """dW of a (rows, cols) weight, row block by row block."""
    for w in weight.split(_rows_at_once(weight.shape[1])):
        yield quantize_dequantize(w, fmt) - w


def relative_stderr(by_sequence: np.ndarray) -> float:
    """Standard error of a sum over sequences, relative to it; NaN for one sequence, 0 when nothing moved."""
    s, total = len(by_sequence), float(by_sequence.sum())
    if s < 2:
        return float("nan")
    return float(by_sequence.std(ddof=1) * s**0.5 / total) if total > 0 else 0.0
