from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.quantmoe_outlier import QuantMoeOutlier


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(QuantMoeOutlier, lambda seed: context("deepseek_v2", seed=seed))


def test_equals_a_loop_over_columns(context, tmp_path):
    with context("mixtral") as ctx:
        for row in run_metric(QuantMoeOutlier(), ctx, tmp_path):
            w = np.abs(ctx.reader.get(row.unit).double().numpy())
            assert row.value == pytest.approx(max(w[:, j].max() / w[:, j].mean() for j in range(w.shape[1])))


def test_zero_columns_are_left_out_and_a_zero_weight_has_no_score(context):
    with context("llama") as ctx:
        (key,) = [k for k in QuantMoeOutlier().plan(ctx) if k == "layer 0"]
        weights = iter([torch.zeros(3, 4), torch.tensor([[0.0, 3.0], [0.0, 1.0]])])
        ctx.weight = lambda unit: next(weights, torch.ones(2, 2))
        values = [r.value for r in QuantMoeOutlier().step(ctx, key).rows]
        assert math.isnan(values[0])
        assert values[1] == 1.5
        assert set(values[2:]) == {1.0}
