from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.topk_flip import TopkFlip
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        settings = {"topk_sequences": 2}
        return Case(TopkFlip, lambda seed: context("mixtral", "int2-g32", seed, settings=settings))


def choices(ctx, ids):
    """[layer][token] -> set of experts, by the router's own logits."""
    found, hooks = [], []
    for layer in ctx.loaded.model.model.layers:
        gate = layer.mlp.gate
        hooks.append(
            gate.register_forward_pre_hook(
                lambda m, a: found.append(
                    [set(t.topk(2).indices.tolist()) for t in a[0].reshape(-1, 24) @ m.weight.T]
                )
            )
        )
    with torch.no_grad():
        ctx.loaded.logits(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_equals_a_loop_over_tokens_and_layers(context, tmp_path):
    with context("mixtral", "int2-g32", settings={"topk_sequences": 3}) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(TopkFlip(), ctx, tmp_path)}
        ids = torch.from_numpy(ctx.calibration.tokens[:3])
        before = choices(ctx, ids)
        changed = {u.key: quantize_dequantize(ctx.reader.get(u), ctx.formats[0]) for u in ctx.index.units}
        flips = []
        for u in ctx.index.units:
            if u.role not in ("embed", "q", "o", "down", "head"):
                continue
            with ctx.loaded.swapped({u.key: changed[u.key]}):
                after = choices(ctx, ids)
            want = np.mean([a != b for x, y in zip(before, after) for a, b in zip(x, y)])
            got = rows["topk_flip", u.key]
            assert got.value == pytest.approx(want, abs=1e-9)
            assert got.count == ids.numel()
            flips.append(want)
            if u.role == "head" or (u.role == "down" and u.layer == 1):
                assert got.value == 0
        assert max(flips) > 0
        with ctx.loaded.swapped(changed):
            after = choices(ctx, ids)
        for u in ctx.index.units:
            if u.expert >= 0:
                want = np.mean([a != b for a, b in zip(before[u.layer], after[u.layer])])
                assert rows["topk_flip_before", u.key].value == pytest.approx(want, abs=1e-9)


def test_a_dense_model_is_a_user_error(context):
    with context("llama") as ctx, pytest.raises(UserError, match="no routed experts"):
        TopkFlip().plan(ctx)
