from __future__ import annotations

import numpy as np
import pytest
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.zd import Zd


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Zd, lambda seed: context("mixtral", seed=seed))


def share(values):
    return float(((values - values.mean()) / values.std() > 1).mean())


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe"])
def test_equals_the_z_scores_of_the_whole_block(context, tmp_path, family):
    with context(family) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(Zd(), ctx, tmp_path)}
        weights = {u.key: ctx.reader.get(u).double().numpy().ravel() for u in ctx.index.units}
        for unit in ctx.index.units:
            own = weights[unit.key]
            peers = [weights[u.key] for u in ctx.index.units if u.layer == unit.layer]
            block = np.concatenate(peers) if unit.layer >= 0 else own
            # One weight within float32 rounding of the limit may fall on the other side.
            assert rows["zd_unit", unit.key].value == pytest.approx(share(own), abs=1.5 / own.size)
            assert rows["zd", unit.key].value == pytest.approx(share(block), abs=1.5 / block.size)
            assert rows["zd", unit.key].count == block.size
            assert 0.1 < rows["zd", unit.key].value < 0.2
