from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.mixllm_salience import MixllmSalience
from bitatlas.analysis.metrics.taylor import Taylor
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Taylor, lambda seed: context("mixtral", "int2-g32", seed, tokens=80))


def gradients(ctx, key):
    """[sequence] -> (rows, cols) gradient of the mean next-token loss, by autograd on a double-precision copy."""
    model = ctx.loaded.model
    model.double()
    found = []
    try:
        with ctx.loaded.requires_grad([key]):
            for one in ctx.calibration.tokens:
                ids = torch.from_numpy(one[None])
                logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.double(), -1)
                nll = -logp[0, :-1].gather(-1, ids[0, 1:, None]).mean()
                nll.backward()
                handle = ctx.loaded.handle(key)
                found.append(handle.grad().clone().numpy())
                handle.param.grad = None
    finally:
        model.float()
    return found


@pytest.mark.parametrize("family", ["llama_tied", "mixtral"])
def test_taylor_and_row_salience_equal_autograd_in_double(context, tmp_path, family):
    with context(family, "int2-g32", tokens=80, settings={"mixllm_top": 0.2}) as ctx:
        salience = {(r.metric, r.unit): r for r in run_metric(MixllmSalience(), ctx, tmp_path / "a")}
        backward = []
        ctx.loaded.model.register_forward_pre_hook(lambda *_: backward.append(1))
        taylor = {(r.metric, r.unit): r for r in run_metric(Taylor(), ctx, tmp_path / "b")}
        assert not backward  # the job's second metric takes the first one's pass
        every = []
        for u in ctx.index.units:
            w = ctx.reader.get(u)
            d = (quantize_dequantize(w, ctx.formats[0]) - w).double().numpy()
            g = gradients(ctx, u.key)
            dots = np.abs([(one * d).sum() for one in g])
            got = taylor["taylor", u.key]
            assert got.value == pytest.approx(dots.mean(), rel=2e-3, abs=1e-8)
            assert got.stderr == pytest.approx(dots.std(ddof=1) / 2, rel=2e-3, abs=1e-8)
            own = np.mean(np.abs([(one * w.double().numpy()).sum() for one in g]))
            assert taylor["taylor_output", u.key].value == pytest.approx(own, rel=2e-3, abs=1e-7)
            a = np.array([(one * d).sum(1) for one in g])  # (S, rows)
            rows = (np.abs(a) + 0.5 * a * a).mean(0)
            assert salience["mixllm_salience", u.key].value == pytest.approx(rows.sum(), rel=2e-3, abs=1e-8)
            every += [(value, u.key) for value in rows]
        best = sorted(every, reverse=True)[: round(0.2 * len(every))]
        for u in ctx.index.units:
            share = sum(key == u.key for _, key in best) / u.rows
            assert salience["mixllm_share", u.key].value == pytest.approx(share, abs=1.5 / u.rows)


def test_reusing_the_pass_changes_nothing(context, tmp_path):
    with context("llama", "int2-g32", tokens=60) as ctx:
        run_metric(MixllmSalience(), ctx, tmp_path / "a")
        shared = run_metric(Taylor(), ctx, tmp_path / "b")
    with context("llama", "int2-g32", tokens=60) as ctx:
        alone = run_metric(Taylor(), ctx, tmp_path / "c")
    assert [repr(r) for r in shared] == [repr(r) for r in alone]


def test_experts_without_tokens_are_unknown(context, tmp_path):
    with context("mixtral", "int2-g32", tokens=40) as ctx:
        for layer in ctx.loaded.model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda _, a, out: (out[0], out[1], torch.where(out[2] == 2, 3, out[2]))
            )
        for kind in (MixllmSalience, Taylor):
            for r in run_metric(kind(), ctx, tmp_path / kind.NAME):
                assert math.isnan(r.value) == (ctx.unit_by_key[r.unit].expert == 2) == (r.count == 0)
