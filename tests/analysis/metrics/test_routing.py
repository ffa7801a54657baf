from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import finish_metric, run_metric
from bitatlas.analysis.metrics import routing
from bitatlas.analysis.metrics.routing import Routing
from bitatlas.kernels.errors import UserError


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(routing, "_BATCH_TOKENS", 60)


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Routing, lambda seed: context("mixtral", "int4-g32", seed))


def by_hand(ctx):
    """{(layer, expert): (per-sequence counts, per-sequence weights)} from the router's own logits, token by token."""
    logits = {}
    hooks = []
    for name, module in ctx.loaded.model.named_modules():
        if name.endswith("mlp.gate"):
            layer = int(name.split(".")[2])
            weight = module.weight

            def keep(_, args, __, layer=layer, weight=weight):
                x = args[0].reshape(-1, args[0].shape[-1])
                logits[layer] = (x @ weight.T).detach().double().numpy()

            hooks.append(module.register_forward_hook(keep))
    tokens = ctx.calibration.tokens
    with torch.no_grad():
        ctx.loaded.logits(torch.from_numpy(tokens))
    for hook in hooks:
        hook.remove()
    found = {}
    for layer, values in logits.items():
        for i, row in enumerate(values):
            p = np.exp(row - row.max())
            p /= p.sum()
            top = np.argsort(-p)[: ctx.index.top_k]
            for e in top:
                count, weight = found.setdefault(
                    (layer, int(e)), (np.zeros(len(tokens)), np.zeros(len(tokens)))
                )
                count[i // tokens.shape[1]] += 1
                weight[i // tokens.shape[1]] += p[e] / p[top].sum()
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_equals_a_loop_over_router_logits(context, tmp_path, family):
    changes = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    with context(family, tokens=200, changes=changes) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(Routing(), ctx, tmp_path)}
        want = by_hand(ctx)
        s, n = ctx.calibration.tokens.shape[0], ctx.calibration.size
        experts = [u for u in ctx.index.units if u.expert >= 0]
        assert len(rows) == 3 * len(experts)
        for u in experts:
            count, weight = want[u.layer, u.expert]
            got = rows["routing_count", u.key]
            assert got.value == count.sum()
            assert got.stderr == pytest.approx(count.std(ddof=1) * s**0.5)
            share = rows["routing_frequency", u.key]
            assert share.value == pytest.approx(count.sum() / n)
            assert share.stderr == pytest.approx((count / (n / s)).std(ddof=1) / s**0.5)
            assert rows["routing_weight", u.key].value == pytest.approx(weight.sum() / count.sum(), rel=1e-5)
            assert rows["routing_weight", u.key].count == count.sum()
        for layer in {u.layer for u in experts}:
            total = sum(
                rows["routing_frequency", u.key].value for u in experts if u.layer == layer and u.role == "up"
            )
            assert total == pytest.approx(ctx.index.top_k)


def test_the_ratio_spread_equals_leaving_sequences_out():
    rng = np.random.default_rng(0)
    count = rng.integers(5, 60, 80)
    total = count * 0.3 + rng.normal(0, 1, 80)
    mean, stderr = routing._ratio(total, count)
    left_out = [(total.sum() - t) / (count.sum() - c) for t, c in zip(total, count)]
    jackknife = (79 / 80 * np.square(np.array(left_out) - np.mean(left_out)).sum()) ** 0.5
    assert mean == pytest.approx(total.sum() / count.sum())
    assert stderr == pytest.approx(jackknife, rel=0.05)


def test_never_reached_is_count_zero_and_weight_unknown(context, tmp_path):
    with context("mixtral") as ctx:
        metric = Routing()
        for key in metric.plan(ctx):
            result = metric.step(ctx, key)
            # Slot 5 is expert 1 of layer 1: the router never chose it.
            result.arrays["count"][:, 5] = 0
            result.arrays["weight"][:, 5] = 0
            from bitatlas.analysis.measure import _write_part, part_path

            _write_part(part_path(tmp_path, key), [], result.arrays)
        rows = finish_metric(metric, ctx, tmp_path)
        lost = [r for r in rows if (ctx.unit_by_key[r.unit].layer, ctx.unit_by_key[r.unit].expert) == (1, 1)]
        assert len(lost) == 9
        for r in lost:
            if r.metric == "routing_weight":
                assert math.isnan(r.value)
                assert r.count == 0
            else:
                assert r.value == 0


def test_dense_model_is_a_user_error(context):
    with context("llama") as ctx, pytest.raises(UserError, match="no routed experts"):
        Routing().plan(ctx)
