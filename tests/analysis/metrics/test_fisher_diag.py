"""The diagonal against per-sequence gradients taken one by one, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.fisher.matrix import load_probes
from bitatlas.analysis.fisher.probes import score_gradient
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.fisher_diag import FisherDiag
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(FisherDiag, lambda seed: context("mixtral", "int2-g32,bf16", seed=seed, tokens=40))


@pytest.mark.parametrize("score", ["signs", "data"])
def test_equals_squared_gradients_times_squared_errors(tiny_checkpoint, tmp_path, score):
    index = index_model(tiny_checkpoint("qwen3_moe"))
    tokens = np.random.default_rng(0).integers(0, 250, (3, 9))
    ctx = MeasureContext(
        index, expand_formats("int2-g32,int6-g32"), calibration=CalibrationSet.of(tokens),
        settings={"draws": 1, "score": score},
    )  # fmt: skip
    rows = {(r.unit, r.format): r for r in run_metric(FisherDiag(), ctx, tmp_path)}
    loaded, keys = ctx.loaded, index.unit_keys()
    per_sequence = {key: [] for key in rows}
    for s, ids in enumerate(torch.from_numpy(tokens)):
        with loaded.requires_grad(keys) as params, torch.enable_grad():
            logits = loaded.logits(ids[None])[0]
            if score == "data":
                loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
                grads = torch.autograd.grad(loss, params, materialize_grads=True)
            else:
                seed = ctx.random_seed("fisher_projection", s, 0)
                v = score_gradient(logits, score, torch.Generator().manual_seed(seed))
                grads = torch.autograd.grad(logits, params, v, materialize_grads=True)
        of = {id(p): g for p, g in zip(params, grads)}
        for u in index.units:
            g = loaded.handle(u.key).view(of[id(loaded.handle(u.key).param)]).double()
            for fmt in ctx.formats:
                d = (ctx.candidate(u, fmt) - ctx.weight(u)).double()
                per_sequence[u.key, fmt.name].append(float((g.square() * d.square()).sum()) / 2 / 9)
    known = 0
    for key, values in per_sequence.items():
        if rows[key].count:
            known += 1
            assert rows[key].value == pytest.approx(np.mean(values), rel=3e-3)
            error = np.std(values, ddof=1) / 3**0.5
            assert rows[key].stderr == pytest.approx(error, rel=3e-3, abs=3e-3 * np.mean(values))
        else:
            assert not any(values)
    assert known > len(rows) / 2
    with pytest.raises(UserError, match="no probes"):
        load_probes(tmp_path)  # squares must not become an interaction term
