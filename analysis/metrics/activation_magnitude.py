"""NNCF's data-aware scores: the size of a unit's inputs times the error of its weight."""

from __future__ import annotations

import numpy as np
import torch

from bitatlas.analysis.cost import checkpoint_bytes
from bitatlas.analysis.input_profile import input_profile
from bitatlas.analysis.measure import MeasureContext
from bitatlas.analysis.metrics.base import Cost, Metric, Parts, StepResult, chunks_by_layer
from bitatlas.analysis.schema import NO_FORMAT, DamageRow
from bitatlas.analysis.sequences import mean_and_stderr, sequence_steps, stacked
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["ActivationMagnitude"]

_STATISTICS = ("mean_top", "mean_variance", "max_variance")
_BACKUP = parse_format("int8-channel")
_EPSILON = float(np.finfo(np.float32).eps)


class ActivationMagnitude(Metric):
    """Input statistic x weight error, for every format, and NNCF's own scores.

        activation_magnitude      = a e(f),  a = mean over channels of max_t |x_tj|
        activation_mean_variance  = a e(f),  a = mean over channels of Var_t x_tj
        activation_max_variance   = a e(f),  a = max over channels of Var_t x_tj
        hessian_input_activation  = mean_t ||x_t||^2 ||Q(W) - W||_F
        nncf_...                  = a / (e(int8, whole rows) + eps)

    with e(f) = max_rows mean_columns (Q(W) - W)^2 and a averaged over sequences (NNCF 3.4, mixed_precision.py and the
    reducers of its statistics). NNCF's scores ask how well a unit does in 8 bits: the **larger**, the rather it stays
    there, so a large int8 error lowers them. They have no format. Units that are only looked up and experts that no
    token reaches are unknown. ``count`` is tokens; standard error over sequences, the weight's error held.
    """

    NAME = "activation_magnitude"
    TITLE = "Activation magnitude x error"
    UNIT = "activation x squared weight"
    SOURCE = (
        "NNCF 3.4, MEAN_ACTIVATION_MAGNITUDE, MEAN_ and MAX_ACTIVATION_VARIANCE, HESSIAN_INPUT_ACTIVATION"
    )
    NEEDS = "activations"
    ADDITIVE = False
    PER_FORMAT = True
    EMITS = (
        "activation_magnitude", "activation_mean_variance", "activation_max_variance", "hessian_input_activation",
        "nncf_mean_magnitude", "nncf_mean_variance", "nncf_max_variance",
    )  # fmt: skip
    VERSION = 1

    def plan(self, ctx: MeasureContext) -> list[str]:
        """Chunks of sequences for the inputs, then layers for the weights."""
        return [*sequence_steps(ctx), *chunks_by_layer(ctx.index.units)]

    def step(self, ctx: MeasureContext, key: str) -> StepResult:
        """Arrays of `input_profile`, or errors (units, formats + 1), squared norms (units, formats)."""
        if key.startswith("sequences"):
            found = input_profile(ctx, key)
            return StepResult(arrays={n: found[n] for n in ("tokens", *_STATISTICS, "square")})
        units = chunks_by_layer(ctx.index.units)[key]
        error = np.zeros((len(units), len(ctx.formats) + 1))
        norm = np.zeros((len(units), len(ctx.formats)))
        for i, unit in enumerate(units):
            weight = ctx.weight(unit)
            for f, fmt in enumerate((*ctx.formats, _BACKUP)):
                square = (quantize_dequantize(weight, fmt) - weight).square_()
                error[i, f] = float(square.mean(1).max())
                if f < len(ctx.formats):
                    norm[i, f] = float(square.sum(dtype=torch.float64)) ** 0.5
        return StepResult(arrays={"error": error, "norm": norm})

    def finish(self, ctx: MeasureContext, parts: Parts) -> list[DamageRow]:
        """Products of the two halves."""
        chunks = chunks_by_layer(ctx.index.units)
        order = [u.key for units in chunks.values() for u in units]
        error = dict(zip(order, np.concatenate([parts[k]["error"] for k in chunks])))
        norm = dict(zip(order, np.concatenate([parts[k]["norm"] for k in chunks])))
        tokens = stacked(parts, "tokens").sum(0)
        size = {name: mean_and_stderr(stacked(parts, name)) for name in (*_STATISTICS, "square")}
        names = [f.name for f in ctx.formats]
        rows = []
        for i, u in enumerate(ctx.index.units):
            n, e = int(tokens[i]), error[u.key]
            for name, statistic in zip(self.EMITS, (*_STATISTICS, "square")):
                factor = norm[u.key] if statistic == "square" else e
                a, spread = (float(v[i]) for v in size[statistic])
                rows += [
                    DamageRow(name, u.key, f, a * factor[j], spread * factor[j], n)
                    for j, f in enumerate(names)
                ]
            for name, statistic in zip(self.EMITS[4:], _STATISTICS):
                a, spread = (float(v[i]) / (e[-1] + _EPSILON) for v in size[statistic])
                rows.append(DamageRow(name, u.key, NO_FORMAT, a, spread, n))
        return rows

    def cost(self, ctx: MeasureContext) -> Cost:
        """One forward, and every weight rounded once per format."""
        return Cost(
            steps=len(self.plan(ctx)),
            bytes_read=2 * checkpoint_bytes(ctx.index),
            forward_tokens=ctx.calibration_tokens,
            quantised=ctx.index.params * (len(ctx.formats) + 1),
        )
