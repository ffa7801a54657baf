"""K-FAC where it is exact, and as a metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.kfac import KFac
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(KFac, lambda seed: context("mixtral", "int2-g32,bf16", seed=seed, tokens=40))


def same_token(folder, **settings):
    """One token over and over: every position of a decoder then has the same input, whatever the head's."""
    tokens = CalibrationSet.of(np.full((5, 24), 65))
    return MeasureContext(index_model(folder), expand_formats("int2-g32,int4-g32"), calibration=tokens,
                          settings={"draws": 4, **settings})  # fmt: skip


@pytest.mark.parametrize("widest", [4096, 8])
def test_exact_for_a_linear_layer_with_one_input(tiny_checkpoint, tmp_path, widest):
    """The head with a constant input x: KL to second order is 1/2 Var_p(dW x), and A x G is the whole Fisher."""
    ctx = same_token(tiny_checkpoint("llama"), widest_factor=widest, factor_sketch=128)
    rows = {(r.unit, r.format): r for r in run_metric(KFac(), ctx, tmp_path)}
    head = next(u for u in ctx.index.units if u.role == "head")
    seen = {}
    with ctx.loaded.capture(lambda key, x, token, weight: seen.update({key: x.double()})):
        logits = ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens[:1]))[0].double()
    x = seen[head.key]
    assert float((x - x[0]).abs().max()) < 1e-4
    p = torch.softmax(logits[0], -1)
    for fmt in ctx.formats:
        u = (ctx.candidate(head, fmt) - ctx.weight(head)).double() @ x[0]
        exact = 0.5 * float((p * u.square()).sum() - (p * u).sum() ** 2)
        row = rows[head.key, fmt.name]
        # 480 positions and draws: a relative standard error of 6.5 %; 128 mixtures add 12 %.
        assert row.value == pytest.approx(exact, rel=0.25 if widest == 4096 else 0.5)
        assert 0 < row.stderr < 0.3 * row.value


def test_groups_change_nothing(tiny_checkpoint, tmp_path):
    whole = run_metric(KFac(), same_token(tiny_checkpoint("llama"), group_layers=2), tmp_path / "a")
    parts = run_metric(KFac(), same_token(tiny_checkpoint("llama"), group_layers=1), tmp_path / "b")
    key = lambda r: (r.unit, r.format)  # noqa: E731
    for one, other in zip(sorted(whole, key=key), sorted(parts, key=key)):
        assert one.unit == other.unit
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-12)
