from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis import sequences
from bitatlas.analysis.input_profile import BIN_EDGES
from bitatlas.analysis.measure import kept_arrays, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.metrics.activation_magnitude import ActivationMagnitude
from bitatlas.analysis.metrics.massive_activations import MassiveActivations
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(sequences, "STEP_TOKENS", 60)


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(ActivationMagnitude, lambda seed: context("mixtral", "int4-g32", seed))


def seen_inputs(ctx):
    """unit key -> {sequence: (n, cols) float64 inputs}."""
    found = {}

    def keep(key, x, token, weight):
        x, s = x.double().numpy(), (token // ctx.seq_len).numpy()
        found[key] = {int(i): x[s == i] for i in np.unique(s)}

    with torch.no_grad(), ctx.loaded.capture(keep):
        ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
    return found


def test_scores_equal_the_naive_ones(context, tmp_path):
    with context("mixtral", "int3-g32") as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(ActivationMagnitude(), ctx, tmp_path)}
        seen = seen_inputs(ctx)
        for u in ctx.index.units:
            if u.key not in seen:
                assert math.isnan(rows["activation_magnitude", u.key].value)
                continue
            samples = list(seen[u.key].values())
            w = ctx.reader.get(u)
            error = {
                f: (quantize_dequantize(w, parse_format(f)) - w).double().numpy() for f in ("int3-g32", "int8-channel")
            }  # fmt: skip
            e = {f: np.square(d).mean(1).max() for f, d in error.items()}
            want = {
                "magnitude": [np.abs(x).max(0).mean() for x in samples],
                "mean_variance": [x.var(0).mean() for x in samples],
                "max_variance": [x.var(0).max() for x in samples],
            }
            for name, values in want.items():
                full = "activation_" + name
                got = rows[full, u.key]
                assert got.value == pytest.approx(np.mean(values) * e["int3-g32"], rel=1e-4)
                if len(values) > 1:
                    stderr = np.std(values, ddof=1) / len(values) ** 0.5 * e["int3-g32"]
                    assert got.stderr == pytest.approx(stderr, rel=1e-3)
                nncf = "nncf_" + ("mean_magnitude" if name == "magnitude" else name)
                assert rows[nncf, u.key].value == pytest.approx(
                    np.mean(values) / (e["int8-channel"] + 2.0**-23), rel=1e-3
                )
            square = np.mean([np.square(x).sum(1).mean() for x in samples])
            norm = np.linalg.norm(error["int3-g32"])
            assert rows["hessian_input_activation", u.key].value == pytest.approx(square * norm, rel=1e-4)
            assert rows["activation_magnitude", u.key].count == sum(map(len, samples))


def test_spikes_and_massive_activations_equal_the_naive_count(context, tmp_path):
    with context("mixtral") as ctx:
        # One channel of every down projection's input a thousand times larger.
        for u in ctx.index.units:
            if u.role == "up":
                ctx.loaded.handle(u.key).get()[3] *= 3e4
        rows = {(r.metric, r.unit): r for r in run_metric(MassiveActivations(), ctx, tmp_path)}
        kept = kept_arrays(MassiveActivations(), ctx, tmp_path)
        edges = kept["edges"].astype(np.float32)
        assert kept["counts"].shape == (len(ctx.index.units), len(BIN_EDGES) + 1)
        seen, massive = seen_inputs(ctx), 0
        for i, u in enumerate(ctx.index.units):
            if u.key not in seen:
                assert not kept["counts"][i].any()
                continue
            every = np.abs(np.concatenate([x.ravel() for x in seen[u.key].values()]))
            bins = [np.sum((every >= a) & (every < b)) for a, b in zip((0, *edges), (*edges, np.inf))]
            np.testing.assert_array_equal(kept["counts"][i], bins)
            count, spikes = 0, []
            for x in seen[u.key].values():
                a = np.sort(np.abs(x).ravel())
                median = a[(a.size - 1) // 2]
                spikes.append(a[-1] / median)
                count += int(((a > 100) & (a >= 1000 * median)).sum())
            assert rows["massive_activations", u.key].value == count
            assert rows["activation_spike", u.key].value == pytest.approx(np.mean(spikes), rel=1e-4)
            top = max(np.abs(x).max() for x in seen[u.key].values())
            assert rows["activation_top", u.key].value == pytest.approx(top, rel=1e-6)
            massive += count
        assert massive > 0
        behind = [rows["massive_stream", u.key].value for u in ctx.index.units if u.layer >= 0]
        assert all(v >= 0 for v in behind)


def test_the_second_metric_of_a_job_reuses_the_pass(context, tmp_path):
    with context("llama", "int4-g32") as ctx:
        run_metric(ActivationMagnitude(), ctx, tmp_path / "a")
        forwards = []
        ctx.loaded.model.register_forward_pre_hook(lambda *_: forwards.append(1))
        shared = run_metric(get_metric("activation_spike"), ctx, tmp_path / "b")
        assert not forwards
    with context("llama", "int4-g32") as ctx:
        alone = run_metric(MassiveActivations(), ctx, tmp_path / "c")
    assert [repr(r) for r in alone] == [repr(r) for r in shared]
