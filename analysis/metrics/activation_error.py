"""Activation-aware layer error: how far rounding moves what a unit puts out, on real inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, unknown_rows
from bitatlas.analysis.schema import DamageRow, QuantUnit
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["ActivationError", "InputMoments", "collect_moments", "layer_groups"]

_SKETCH = 8  # random output directions whose energy is followed sequence by sequence
_BLOCK = 1 << 22  # weights rounded at a time


class ActivationError(Metric):
    """Squared error of a unit's output, per calibration token.

        activation_error = (1/N) sum_t w_t^2 ||x_t dW^T||^2 = tr(dW H dW^T),  H = (1/N) sum_t w_t^2 x_t x_t^T

    the quantity that OBQ and GPTQ minimise (arXiv 2210.17323, eq. 1). N counts all calibration tokens, so a
    routed expert's damage is what it adds to an average token; w_t is the routing weight with
    ``routing_weight=True`` and 1 otherwise. ``activation_error_rel`` divides by the output's own energy
    tr(W H W^T). Units that share an input (q, k, v; gate, up) share one H. An embedding that is only looked
    up is measured by the rows that the text uses. An expert that no token reaches is unknown (NaN, count 0).

    The value is exact for the text. Its standard error is the spread over sequences, in which each
    sequence's energy is followed along 8 random output directions. ``count`` is the tokens that reached the unit.
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
        if len(tokens) < 2:
            raise UserError("one sequence tells nothing about spread", found="1 sequence", fix="ask for more tokens")
        sketches = {u.key: self._sketch(ctx, u) for u in units}
        moments = collect_moments(
            ctx, units, sketches, bool(self.option(ctx, "routing_weight")), int(self.option(ctx, "batch_tokens"))
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

    def _sketch(self, ctx: MeasureContext, unit: QuantUnit) -> Tensor:
        """(F, cols, r): dW^T R for every format, R random signs (rows, r)."""
        weight = ctx.weight(unit)
        signs = ctx.rng("sketch", unit.key).integers(0, 2, (unit.rows, _SKETCH)) * 2.0 - 1
        r = torch.from_numpy(signs).float()
        out = torch.zeros(len(ctx.formats), unit.cols, _SKETCH)
        for f, fmt in enumerate(ctx.formats):
            for error, part in zip(_errors(weight, fmt), r.split(_rows_at_once(unit.cols))):
                out[f] += error.T @ part
        return out

    def _rows(self, ctx: MeasureContext, unit: QuantUnit, found: InputMoments, n: int) -> list[DamageRow]:
        weight = ctx.weight(unit)
        h = found.matrix().cpu()  # (cols, cols), sum over tokens
        energy = sum(float(((w @ h) * w).sum(dtype=torch.float64)) for w in weight.split(_rows_at_once(unit.cols)))
        rows = []
        for f, fmt in enumerate(ctx.formats):
            total = sum(float(((e @ h) * e).sum(dtype=torch.float64)) for e in _errors(weight, fmt))
            total = max(total, 0.0)  # rounding in the product of a dW that is nearly zero
            mean, relative = total / n, total / energy if energy > 0 else 0.0
            spread = _relative_stderr(found.energies[:, f])
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
            total, spread = float(by_sequence.sum()), _relative_stderr(by_sequence)
            mean, relative = total / tokens.size, total / energy if energy > 0 else 0.0
            rows += [
                DamageRow(name, unit.key, fmt.name, value, value * spread, tokens.size)
                for name, value in zip(self.EMITS, (mean, relative))
            ]
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """A forward per layer group, H once per distinct input, dW H once per unit and format, two roundings."""
        n, groups, units = ctx.calibration_tokens, len(self.plan(ctx)), ctx.index.units
        inputs = {(u.layer, u.expert, _input_of(u)): u for u in units if u.role != "embed"}
        share = ctx.index.top_k / ctx.index.n_experts if ctx.index.n_experts else 1.0
        gram = sum(2.0 * n * u.cols**2 * (share if u.expert >= 0 else 1) for u in inputs.values())
        product = sum(2.0 * u.params * u.cols for u in units if u.role != "embed") * (len(ctx.formats) + 1)
        return Cost(
            steps=groups,
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=n * (groups + 1) // 2,
            flops=gram + product,
            quantised=2 * ctx.index.params * len(ctx.formats),
        )


@dataclass(slots=True)
class InputMoments:
    """What a pass gathers about a unit's input.

    Attributes:
        count: tokens seen.
        energies: (S, F) float64, squared error of each sequence along the sketched directions, summed.
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


class _Reached(Exception):
    """The last layer of the group has been passed; the rest of the forward is not needed."""


def collect_moments(
    ctx: MeasureContext,
    units: Sequence[QuantUnit],
    sketches: dict[str, Tensor],
    routing_weight: bool,
    batch_tokens: int,
) -> dict[str, InputMoments]:
    """One pass over the calibration text; units that no token reached are missing from the result.

    Args:
        sketches: unit key -> (F, cols, r) directions to follow per sequence.
        routing_weight: weigh an expert's tokens with their squared routing weight.
    """
    loaded, calibration = ctx.loaded, ctx.calibration
    length = calibration.tokens.shape[1]
    wanted = {u.key for u in units}
    found: dict[str, InputMoments] = {}
    seen: dict[tuple[int, tuple[int, ...]], tuple[str, Tensor]] = {}
    last = max(u.layer for u in units)
    # A unit behind the group ends the pass: nothing after it is needed. Head and embedding need it all.
    behind = [u.key for u in ctx.index.units if u.layer == last + 1] if all(u.layer >= 0 for u in units) else []
    offset = 0

    def watch(key: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        if key not in wanted:
            raise _Reached
        x = x.float()
        if weight is not None and routing_weight:
            x = x * weight.float().unsqueeze(-1)
        moments = found.get(key)
        if moments is None:
            moments = InputMoments(0, np.zeros((len(calibration.tokens), sketches[key].shape[0])))
            shared = seen.get((x.data_ptr(), tuple(x.shape)))
            if shared is not None and found[shared[0]].count == len(x):
                moments.leader = found[shared[0]]
            else:
                moments.second = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            found[key] = moments
        if moments.second is not None:
            moments.second.addmm_(x.T, x)
            seen[x.data_ptr(), tuple(x.shape)] = key, x  # holding x keeps its address from being used again
        moments.count += len(x)
        f, cols, r = sketches[key].shape
        y = x @ sketches[key].to(x.device).permute(1, 0, 2).reshape(cols, f * r)  # (n, F r)
        energy = y.double().square().reshape(-1, f, r).sum(2).cpu()  # (n, F)
        np.add.at(moments.energies, (token.cpu() // length + offset).numpy(), energy.numpy())

    with torch.no_grad(), loaded.capture(watch, [*wanted, *behind]):
        for batch in calibration.batches(batch_tokens):
            seen.clear()
            try:
                loaded.logits(torch.from_numpy(batch))
            except _Reached:
                pass
            offset += len(batch)
    return found


def layer_groups(units: Sequence[QuantUnit], max_bytes: int) -> dict[str, tuple[QuantUnit, ...]]:
    """Consecutive layers whose second moments fit into ``max_bytes``, at most a quarter of the layers each.

    Embedding and head make the last group. A single layer that does not fit makes a group all the same.
    """
    layers: dict[int, list[QuantUnit]] = {}
    for u in units:
        layers.setdefault(u.layer, []).append(u)
    inside = sorted(layer for layer in layers if layer >= 0)
    most = max(1, -(-len(inside) // 4))
    groups: list[list[int]] = []
    size = 0
    for layer in inside:
        inputs = {(u.expert, _input_of(u)): u.cols for u in layers[layer]}
        need = sum(4 * cols * cols for cols in inputs.values())
        if not groups or size + need > max_bytes or len(groups[-1]) == most:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += need
    out = {}
    for g in groups:
        name = f"layers {g[0]}-{g[-1]}" if len(g) > 1 else f"layer {g[0]}"
        out[name] = tuple(u for layer in g for u in layers[layer])
    if layers.get(-1):
        out["outside the layers"] = tuple(layers[-1])
    return out


def _input_of(unit: QuantUnit) -> str:
    """Roles that share an input, as far as names tell; only an estimate of memory hangs on it."""
    for shared in (("q", "k", "v"), ("gate", "up"), ("shared_gate", "shared_up")):
        if unit.role in shared:
            return shared[0]
    return unit.role


def _rows_at_once(cols: int) -> int:
    return max(1, _BLOCK // cols)


def _errors(weight: Tensor, fmt: Format) -> list[Tensor] | map[Tensor]:
    """dW of a (rows, cols) weight, row block by row block."""
    return map(lambda w: quantize_dequantize(w, fmt) - w, weight.split(_rows_at_once(weight.shape[1])))


def _relative_stderr(by_sequence: np.ndarray) -> float:
    """Standard error of a sum over sequences, relative to it; NaN when nothing moved."""
    s, total = len(by_sequence), float(by_sequence.sum())
    return float(by_sequence.std(ddof=1) * s**0.5 / total) if total > 0 and s > 1 else float("nan")
