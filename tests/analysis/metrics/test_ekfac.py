"""EK-FAC against its definition, from gradients of single sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.fisher.factors import basis_of
from bitatlas.analysis.fisher.probes import score_gradient
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.ekfac import EKFac
from bitatlas.analysis.metrics.kfac import gather_factors
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(EKFac, lambda seed: context("mixtral", "int2-g32,bf16", seed=seed, tokens=40))


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe"])
def test_equals_the_definition(tiny_checkpoint, tmp_path, family):
    index = index_model(tiny_checkpoint(family))
    tokens = np.random.default_rng(0).integers(0, 250, (3, 9))
    ctx = MeasureContext(index, expand_formats("int3-g32"), calibration=CalibrationSet.of(tokens),
                         settings={"draws": 1, "widest_factor": 64})  # fmt: skip
    rows = {r.unit: r for r in run_metric(EKFac(), ctx, tmp_path)}
    factors = gather_factors(EKFac(), ctx, index.units, 1).factors
    loaded, keys = ctx.loaded, index.unit_keys()
    total = dict.fromkeys(keys, 0.0)
    for s, ids in enumerate(torch.from_numpy(tokens)):
        with loaded.requires_grad(keys) as params, torch.enable_grad():
            logits = loaded.logits(ids[None])[0]
            seed = ctx.random_seed("fisher_projection", s, 0)
            v = score_gradient(logits, "signs", torch.Generator().manual_seed(seed))
            grads = torch.autograd.grad(logits, params, v, materialize_grads=True)
        of = {id(p): g for p, g in zip(params, grads)}
        for u in index.units:
            left, right = (None if b is None else b.double() for b in basis_of(factors[u.key]))
            assert right is not None or u.expert >= 0
            g = loaded.handle(u.key).view(of[id(loaded.handle(u.key).param)]).double()
            d = (ctx.candidate(u, ctx.formats[0]) - ctx.weight(u)).double()
            for basis, side in ((left, 0), (right, 1)):
                if basis is not None:
                    eye = torch.eye(len(basis), dtype=torch.float64)
                    torch.testing.assert_close(basis.T @ basis, eye, rtol=1e-4, atol=1e-4)
                    g, d = (basis.T @ g, basis.T @ d) if side == 0 else (g @ basis, d @ basis)
            total[u.key] += float((g.square() * d.square()).sum()) / 2 / 27
    for key, row in rows.items():
        if row.count:
            assert row.value == pytest.approx(total[key], rel=5e-3)
        else:
            assert total[key] == 0.0
