"""Hutchinson against the exact Hessian trace: a loop of Hessian-vector products over unit vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.hawq_trace import HawqTrace
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import expand_formats


def context(folder, **settings):
    tokens = np.random.default_rng(0).integers(0, 7, (3, 6))
    options = {"trace_tol": 0.0, "max_probes": 80, "trace_tokens": 12, **settings}
    return MeasureContext(
        index_model(folder), expand_formats("int2-g32,int4-g32"), settings=options,
        calibration=CalibrationSet.of(tokens),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint(
        "qwen3_moe", vocab_size=7, hidden_size=8, head_dim=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=6, moe_intermediate_size=5, num_experts=2, num_experts_per_tok=1,
        num_hidden_layers=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(folder):
    """Trace of every unit's diagonal block, one Hessian-vector product per weight."""
    ctx = context(folder)
    loaded, keys = ctx.loaded, ctx.index.unit_keys()
    ids = torch.from_numpy(ctx.calibration.tokens[:2])
    out = dict.fromkeys(keys, 0.0)
    with sdpa_kernel(SDPBackend.MATH), loaded.requires_grad(keys) as params:
        logits = loaded.logits(ids)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        grads = dict(zip(map(id, params), torch.autograd.grad(loss, params, create_graph=True)))
        for key in keys:
            handle = loaded.handle(key)
            flat = handle.view(grads[id(handle.param)]).reshape(-1)
            for j in range(flat.numel()):
                (row,) = torch.autograd.grad(flat[j], handle.param, retain_graph=True, materialize_grads=True)
                out[key] += float(handle.view(row).reshape(-1)[j])
    return out


@pytest.mark.parametrize("group", ["layer", "unit"])
def test_trace_equals_the_exact_hessian(folder, exact, tmp_path, group):
    ctx = context(folder, probe_group=group)
    rows = {(r.metric, r.unit, r.format): r for r in run_metric(HawqTrace(), ctx, tmp_path)}
    for unit in ctx.index.units:
        trace = rows["hessian_trace", unit.key, "-"]
        if np.isnan(trace.value):
            assert exact[unit.key] == 0.0
            assert trace.count == 0
            continue
        # 25 units x 5 standard errors; 1e-5 covers probes without variance (diagonal blocks).
        assert abs(trace.value - exact[unit.key]) <= 5 * trace.stderr + 1e-5
        for fmt in ctx.formats:
            w = ctx.weight(unit).double()
            error = float((ctx.candidate(unit, fmt).double() - w).square().sum())
            expect = 0.5 * max(trace.value, 0.0) / unit.params * error
            assert rows["hawq_trace", unit.key, fmt.name].value == pytest.approx(expect, rel=1e-5)
    assert sum(r.value > 4 * r.stderr for k, r in rows.items() if k[0] == "hessian_trace") >= 3


def test_the_stop_respects_tolerance_and_bounds(folder, tmp_path):
    ctx = context(folder, trace_tol=0.3, min_probes=8, max_probes=40)
    rows = [r for r in run_metric(HawqTrace(), ctx, tmp_path) if r.metric == "hessian_trace" and r.count]
    assert all(8 <= r.count <= 40 for r in rows)
    stopped = [r for r in rows if r.count < 40]
    assert stopped
    assert all(r.stderr <= 0.3 * abs(r.value) for r in stopped)


def test_an_expert_without_tokens_is_unknown(folder, tmp_path):
    ctx = context(folder, max_probes=8, trace_tokens=1)
    rows = [r for r in run_metric(HawqTrace(), ctx, tmp_path) if ".experts." in r.unit]
    # Each layer routes the six tokens of one sequence; whoever got none has no Hessian.
    reached: set[str] = set()
    with ctx.loaded.capture(lambda key, x, token, weight: reached.add(key)):
        ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens[:1]))
    for r in rows:
        if r.unit not in reached:
            assert np.isnan(r.value)
            assert r.count == 0


def test_an_unknown_group_is_refused(folder):
    with pytest.raises(UserError, match="probe group"):
        HawqTrace().plan(context(folder, probe_group="all"))


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        settings = {"max_probes": 9, "trace_tokens": 40}
        return Case(HawqTrace, lambda seed: context("qwen3_moe", seed=seed, settings=settings))
