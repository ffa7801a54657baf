from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.block_influence import BlockInfluence
from bitatlas.analysis.metrics.lim import Lim


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(BlockInfluence, lambda seed: context("llama", seed=seed))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_equals_lim_and_the_cosine_of_the_mlp(context, tmp_path, family):
    with context(family) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(BlockInfluence(), ctx, tmp_path / "a")}
        lim = {r.unit: r for r in run_metric(Lim(), ctx, tmp_path / "b")}
        seen = []
        for block in ctx.loaded.model.model.layers:
            block.mlp.register_forward_hook(
                lambda _, a, out: seen.append(
                    tuple(
                        v.double().numpy().reshape(-1, a[0].shape[-1])
                        for v in (a[0], out[0] if isinstance(out, tuple) else out)
                    )
                )
            )
        with torch.no_grad():
            ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        for u in ctx.index.units:
            if u.layer < 0:
                continue
            block = rows["block_influence", u.key]
            assert (block.value - 1, block.stderr) == pytest.approx((lim[u.key].value, lim[u.key].stderr))
            if u.role in ("gate", "up", "down"):
                x, y = seen[u.layer]
                cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
                assert rows["block_influence_mlp", u.key].value == pytest.approx(1 - cosine.mean(), rel=1e-5)
            elif u.role == "q":
                assert ("block_influence_mlp", u.key) not in rows


def test_a_part_that_is_no_module_is_unknown(context, tmp_path):
    with context("opt") as ctx:
        rows = run_metric(BlockInfluence(), ctx, tmp_path)
        mlp = [r for r in rows if r.metric == "block_influence_mlp"]
        assert mlp
        assert all(math.isnan(r.value) and r.count == 0 for r in mlp)
        assert all(math.isfinite(r.value) for r in rows if r.metric == "block_influence")
