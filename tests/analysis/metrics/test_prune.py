from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.prune import Prune, pruned
from bitatlas.kernels.errors import UserError


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Prune, lambda seed: context("llama", "int4-g32", seed))


def test_equals_whole_forwards_of_pruned_models(context, tmp_path):
    with context("mixtral", settings={"prune_share": 0.7, "prune_sequences": 3}) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(Prune(), ctx, tmp_path)}
        ids = torch.from_numpy(ctx.calibration.tokens[:3])
        with torch.no_grad():
            p = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
            for u in ctx.index.units[:: max(1, len(ctx.index.units) // 8)]:
                w = ctx.reader.get(u).double()
                limit = np.sort(w.abs().numpy().ravel())[round(0.7 * w.numel()) - 1]
                with ctx.loaded.swapped({u.key: (w * (w.abs() > limit)).float()}):
                    q = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
                kl = (p.exp() * (p - q)).sum(-1).mean(1).numpy()
                got = rows["prune", u.key]
                assert 0 < got.floor < 1e-9
                assert rows["prune_top1", u.key].floor == 0
                assert got.value == pytest.approx(kl.mean(), rel=1e-3, abs=1e-9)
                assert got.stderr == pytest.approx(kl.std(ddof=1) / 3**0.5, rel=1e-2, abs=1e-9)
                changed = (p.argmax(-1) != q.argmax(-1)).double().mean()
                assert rows["prune_top1", u.key].value == pytest.approx(float(changed), abs=1e-6)


def test_pruning_keeps_the_large_weights_and_the_original():
    w = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    assert pruned(w, 0.5).tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    assert w[0, 1] == -1.0


def test_an_impossible_share_is_a_user_error(context):
    with context("llama", settings={"prune_share": 1.5}) as ctx, pytest.raises(UserError, match="between"):
        Prune().plan(ctx)
