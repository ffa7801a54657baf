from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.awq_stats import AwqStats, scaled_error
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(AwqStats, lambda seed: context("qwen2_moe", seed=seed))


def naive(w, fmt, x):
    """AWQ's grid in double precision (the quantiser itself is float32): (loss, alpha)."""
    mean, energy = np.abs(x).mean(0), np.square(x).sum(0)
    losses = []
    for i in range(20):
        s = np.maximum(mean ** (i / 20), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        q = quantize_dequantize(torch.from_numpy(w * s).float(), fmt).double().numpy() / s
        losses.append((np.square(q - w).sum(0) * energy).sum())
    best = int(np.argmin(losses))
    return losses[best], best / 20, losses


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_equals_the_naive_grid(context, tmp_path, family):
    with context(family, "int3-g32") as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(AwqStats(), ctx, tmp_path)}
        seen = {}
        with (
            torch.no_grad(),
            ctx.loaded.capture(lambda k, x, t, w: seen.update({k: (x.double().numpy(), t)})),
        ):
            ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        n, s = ctx.calibration.size, len(ctx.calibration.tokens)
        assert seen
        for unit in ctx.index.units:
            got = rows["awq_stats", unit.key]
            if unit.key not in seen:
                assert unit.role == "embed"
                assert math.isnan(got.value)
                assert got.count == 0
                continue
            x, token = seen[unit.key]
            w = ctx.reader.get(unit).double().numpy()
            loss, alpha, losses = naive(w, ctx.formats[0], x)
            # A rounding of s in the last bit may move one weight to the next grid point.
            assert got.value == pytest.approx(loss / n, rel=5e-3)
            assert got.count == len(x)
            found = rows["awq_alpha", unit.key].value
            assert losses[round(found * 20)] == pytest.approx(loss, rel=5e-3)
            mean = np.abs(x).mean(0)
            assert rows["awq_channel_ratio", unit.key].value == pytest.approx(
                mean.max() / mean.mean(), rel=1e-5
            )
            assert rows["awq_mean_activation", unit.key].value == pytest.approx(np.abs(x).mean(), rel=1e-5)
            assert rows["awq_spike", unit.key].value == pytest.approx(
                np.abs(x).max() / np.abs(x).mean(), rel=1e-5
            )
            # Spread: the energy of each sequence under the winning error.
            q = np.maximum(mean**found, 1e-4)
            q = q / np.sqrt(q.max() * q.min())
            error = (
                quantize_dequantize(torch.from_numpy(w * q).float(), ctx.formats[0]).double().numpy() / q - w
            )
            per_token = np.square(x) @ np.square(error).sum(0)
            per_sequence = np.bincount(token.numpy() // ctx.seq_len, per_token, s)
            assert got.stderr == pytest.approx(per_sequence.std(ddof=1) * s**0.5 / n, rel=0.01)


def test_a_large_channel_is_protected_by_scaling():
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    mean = torch.ones(128)
    mean[5] = 60.0
    fmt = parse_format("int3-g64")
    alpha, error = scaled_error(w, fmt, mean, mean.double() ** 2)
    plain = (quantize_dequantize(w, fmt) - w).square().sum(0).double()
    assert alpha > 0.2
    assert float(error @ mean.double() ** 2) < 0.6 * float(plain @ mean.double() ** 2)
    flat, error = scaled_error(w, fmt, torch.ones(128), torch.ones(128).double())
    assert flat == 0
    assert float(error.sum()) == pytest.approx(float(plain.sum()), rel=1e-5)
