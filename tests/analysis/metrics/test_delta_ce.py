"""Predicted change of the loss against the loss of slightly changed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.delta_ce import DeltaCe
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(DeltaCe, lambda seed: context("qwen2_moe", "int4-g32", seed=seed, tokens=40))


@pytest.mark.parametrize("tied", [False, True])
def test_first_order_is_the_slope_of_the_loss_and_second_the_fishers(tiny_checkpoint, tmp_path, tied):
    index = index_model(tiny_checkpoint("llama_tied" if tied else "llama"))
    tokens = np.random.default_rng(0).integers(0, 250, (4, 12))
    ctx = MeasureContext(
        index, expand_formats("int4-g32"), calibration=CalibrationSet.of(tokens), settings={"draws": 1}
    )
    rows = {(r.metric, r.unit): r for r in run_metric(DeltaCe(), ctx, tmp_path)}
    ids = torch.from_numpy(tokens)

    def loss(weights):
        with ctx.loaded.swapped(weights), torch.no_grad():
            logits = ctx.loaded.logits(ids)[:, :-1].flatten(0, 1).double()
        return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))

    for unit in index.units:
        w, fmt = ctx.weight(unit).clone(), ctx.formats[0]
        d = ctx.candidate(unit, fmt) - w
        step = 0.05
        slope = (loss({unit.key: w + step * d}) - loss({unit.key: w - step * d})) / (2 * step)
        first, second = rows["ce_first_order", unit.key], rows["ce_gauss_newton", unit.key]
        assert first.value == pytest.approx(slope, rel=0.03, abs=3e-5)
        assert second.value > 0
        assert rows["delta_ce", unit.key].value == pytest.approx(first.value + second.value, rel=1e-6)
    assert any(r.value < 0 for (name, _), r in rows.items() if name == "ce_first_order")
