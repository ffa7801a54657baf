"""Hutchinson against the exact Hessian trace: a loop of Hessian-vector products over unit vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.hessian import curvature
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.hawq_trace import HawqTrace, controlled_mean
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


@pytest.mark.parametrize(
    ("group", "control"), [("layer", "none"), ("unit", "none"), (2, "none"), ("layer", "fisher")]
)
def test_trace_equals_the_exact_hessian(folder, exact, tmp_path, group, control):
    ctx = context(folder, probe_group=group, control=control, max_probes=20 if group == "unit" else 80)
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


@pytest.mark.parametrize("group", ["all", 1, 0, True])
def test_an_unknown_group_is_refused(folder, group):
    with pytest.raises(UserError, match="probe group"):
        HawqTrace().plan(context(folder, probe_group=group))


def test_a_number_puts_every_nth_layer_into_a_probe(folder):
    plan = HawqTrace().plan(context(folder, probe_group=2))
    assert "layers 0 mod 2" in plan
    assert "layers 1 mod 2" in plan
    assert len(plan) == 2 + sum(u.layer < 0 for u in context(folder).index.units)


def test_the_control_is_the_gauss_newton_of_the_same_text(folder):
    """G v by double backward against J from a loop over the logits; its traces against the diagonal of G."""
    ctx = context(folder)
    loaded, key = ctx.loaded, ctx.index.units[2].key
    ids = torch.from_numpy(ctx.calibration.tokens[:1])
    with curvature(loaded, [key], ids) as c:
        logits = c._logits
        rows = [
            torch.autograd.grad(x, loaded.handle(key).param, retain_graph=True)[0].flatten()
            for x in logits.flatten()
        ]
        j = torch.stack(rows).reshape(*logits.shape, -1).double()  # (N, V, n)
        p = torch.softmax(logits.detach().double(), -1)
        cov = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        g = torch.einsum("tvi,tvw,twj->ij", j, cov, j) / len(p)
        v = torch.randn(loaded.handle(key).param.shape, generator=torch.Generator().manual_seed(0))
        got = c.gauss_newton([v])[0].flatten().double()
        torch.testing.assert_close(got, g @ v.flatten().double(), rtol=1e-4, atol=1e-7)
        generator = torch.Generator().manual_seed(1)
        draws = np.array([c.fisher_traces(generator)[0] for _ in range(200)])
    assert abs(draws.mean() - float(g.trace())) <= 5 * draws.std(ddof=1) / 200**0.5


def test_a_control_variate_lowers_the_error_and_never_biases():
    rng = np.random.default_rng(0)
    got, plain = [], []
    for _ in range(300):
        common = rng.normal(size=16)
        samples = np.stack([3 + common + 0.3 * rng.normal(size=16), 1 + common], 1)
        value, error = controlled_mean(samples, 1 + 0.1 * rng.normal(size=16))
        got.append((value, error))
        plain.append(samples[:, 0].mean())
    values, errors = np.array(got).T
    assert abs(values.mean() - 3) < 4 * values.std() / 300**0.5
    assert values.std() < 0.5 * np.std(plain)
    assert 0.7 < errors.mean() / values.std() < 1.3
    # A control that has nothing to do with it is left out.
    alone = rng.normal(size=(16, 2))
    assert controlled_mean(alone, np.array([5.0, -5.0]))[0] == pytest.approx(alone[:, 0].mean())


def test_batches_give_mean_and_spread(folder, tmp_path):
    """Q-BERT: the damage uses mean + spread over batches; three batches of one sequence each."""
    settings = {"trace_tokens": 6, "max_probes": 8, "hessian_batches": 3}
    tables = []
    for spread in (0.0, 1.0):
        ctx = context(folder, hessian_spread=spread, **settings)
        rows = run_metric(HawqTrace(), ctx, tmp_path / str(spread))
        tables.append({(r.metric, r.unit, r.format): r for r in rows})
    unit = ctx.index.units[2]
    trace = tables[0]["hessian_trace", unit.key, "-"]
    assert trace == tables[1]["hessian_trace", unit.key, "-"]
    assert trace.count == 24
    error_sq = float((ctx.candidate(unit, ctx.formats[0]) - ctx.weight(unit)).double().square().sum())
    for spread, table in zip((0.0, 1.0), tables):
        level = max(trace.value, 0) + spread * trace.stderr * 3**0.5
        got = table["hawq_trace", unit.key, ctx.formats[0].name].value
        assert got == pytest.approx(0.5 * level / unit.params * error_sq, rel=1e-4)
    with pytest.raises(UserError, match="batches"):
        run_metric(HawqTrace(), context(folder, trace_tokens=12, hessian_batches=3), tmp_path / "many")


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        settings = {"max_probes": 9, "trace_tokens": 40}
        return Case(HawqTrace, lambda seed: context("qwen3_moe", seed=seed, settings=settings))
