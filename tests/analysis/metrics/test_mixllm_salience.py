from __future__ import annotations

import numpy as np
import pytest
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import PartsOnDisk, run_metric
from bitatlas.analysis.metrics.mixllm_salience import MixllmSalience


class TestConformance(MetricConformance):
    """The values are compared with autograd in test_taylor.py."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(MixllmSalience, lambda seed: context("llama", "int2-g32", seed, tokens=80))


def test_the_rows_stay_in_the_parts_and_a_tenth_is_chosen(context, tmp_path):
    with context("llama", "int2-g32,int4-g32", tokens=60) as ctx:
        metric = MixllmSalience()
        rows = run_metric(metric, ctx, tmp_path)
        parts = PartsOnDisk(tmp_path, metric.plan(ctx))
        total = sum(parts[key]["rows"] for key in parts) / ctx.sequences  # (R, F)
        assert total.shape == (sum(u.rows for u in ctx.index.units), 2)
        at = 0
        for u in ctx.index.units:
            got = [r.value for r in rows if r.unit == u.key and r.metric == "mixllm_salience"]
            assert got == pytest.approx(total[at : at + u.rows].sum(0).tolist(), rel=1e-9)
            at += u.rows
        for fmt in ctx.formats:
            chosen = sum(
                r.value * ctx.unit_by_key[r.unit].rows
                for r in rows
                if r.metric == "mixllm_share" and r.format == fmt.name
            )
            assert chosen == pytest.approx(round(0.1 * len(total)))
        assert np.isfinite(total).all()
