from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.gptq_error import GptqError
from bitatlas.kernels.quantizers.grid import search_grid
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(GptqError, lambda seed: context("mixtral", "int3-g32,bf16", seed))


def naive(w, x, fmt):
    """GPTQ in double precision by refitting: each rounded column is followed by the exact least squares of the rest.

    Returns dW and the damped H. No Cholesky factor, no identity: the rest is solved for anew at every column.
    """
    n, cols = x.shape
    h = x.T @ x / n
    damped = h + max(0.01, 1 - n / cols) * np.trace(h) / cols * np.eye(cols)
    importance = torch.from_numpy(np.diagonal(h).copy()).float()
    scale, zero = (
        t.double().numpy() for t in search_grid(torch.from_numpy(w).float(), fmt, importance).columns(0, cols)
    )
    order = np.argsort(-np.diagonal(damped), kind="stable")
    out, left = w.copy(), list(order)
    for j in order:
        q = (np.clip(np.round(out[:, j] / scale[:, j]) + zero[:, j], 0, fmt.qmax) - zero[:, j]) * scale[:, j]
        left.remove(j)
        change = q - out[:, j]
        out[:, j] = q
        if left:
            out[:, left] -= np.outer(change, np.linalg.solve(damped[np.ix_(left, left)], damped[left, j]))
    return out - w, damped, h


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_sum_of_squared_steps_is_the_layer_error(context, tmp_path, family):
    with context(family, "int2-g32,int3-g32") as ctx:
        rows = {(r.metric, r.unit, r.format): r for r in run_metric(GptqError(), ctx, tmp_path)}
        seen = {}
        with torch.no_grad(), ctx.loaded.capture(lambda k, x, t, w: seen.update({k: x.double().numpy()})):
            ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        ratios, gains = [], []
        for u in ctx.index.units:
            if u.key not in seen:
                assert math.isnan(rows["gptq_error", u.key, "int2-g32"].value)
                continue
            if u.role == "head":
                continue  # 300 rows of the same
            x, w = seen[u.key], ctx.reader.get(u).double().numpy()
            for fmt in ctx.formats:
                d, damped, h = naive(w, x, fmt)
                n = len(x)
                got = rows["gptq_error", u.key, fmt.name]
                assert got.count == n
                # A float32 tie may send one weight to the other side; what follows it differs then.
                ratios.append(got.value / (np.trace(d @ damped @ d.T) * n / ctx.calibration.size))
                output = np.trace(d @ h @ d.T) * n
                ratios.append(
                    rows["gptq_output_error", u.key, fmt.name].value / (output / ctx.calibration.size)
                )
                rtn = quantize_dequantize(torch.from_numpy(w).float(), fmt).double().numpy() - w
                gains.append(rows["gptq_gain", u.key, fmt.name].value / (np.square(x @ rtn.T).sum() / output))
        for values in (ratios, gains):
            values = np.array(values)
            assert (np.abs(values - 1) < 1e-3).mean() > 0.8
            assert np.abs(values - 1).max() < 0.3


def test_gptq_gains_on_correlated_inputs(context, tmp_path):
    with context("llama", "int3-g32", tokens=400) as ctx:
        rows = run_metric(GptqError(), ctx, tmp_path)
        gain = [r.value for r in rows if r.metric == "gptq_gain" and math.isfinite(r.value)]
        assert np.median(gain) > 1.1
