from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis import prefix
from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics import lim
from bitatlas.analysis.metrics.lim import Lim
from bitatlas.analysis.prefix import decoder_blocks
from bitatlas.kernels.errors import UserError


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(lim, "_BATCH_TOKENS", 60)


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Lim, lambda seed: context("llama", seed=seed))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_equals_the_cosine_of_the_hidden_states(context, tmp_path, family):
    with context(family) as ctx:
        rows = run_metric(Lim(), ctx, tmp_path)
        tokens = ctx.calibration.tokens
        streams = []
        for block in decoder_blocks(ctx.loaded.model, 2):
            block.register_forward_pre_hook(
                lambda _, a, k: streams.append(a[0] if a else k["hidden_states"]), with_kwargs=True
            )
            block.register_forward_hook(
                lambda _, a, out: streams.append(out[0] if isinstance(out, tuple) else out)
            )
        with torch.no_grad():
            ctx.loaded.logits(torch.from_numpy(tokens))
        assert len(streams) == 4
        want = []
        for x, y in zip(streams[::2], streams[1::2]):
            x, y = x.double().numpy(), y.double().numpy()
            assert x.shape[:2] == tokens.shape
            cosine = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))  # (S, T)
            want.append((-cosine.mean(), cosine.mean(1).std(ddof=1) / len(tokens) ** 0.5))
        assert want[0][0] != pytest.approx(want[1][0], rel=1e-3)
        units = [u for u in ctx.index.units if u.layer >= 0]
        assert [r.unit for r in rows] == [u.key for u in units]
        for row, unit in zip(rows, units):
            assert (row.value, row.stderr) == pytest.approx(want[unit.layer], rel=1e-5)
            assert row.count == tokens.size


def test_a_model_that_is_no_stack_is_refused(context, monkeypatch):
    with context("llama") as ctx:
        monkeypatch.setattr(prefix, "decoder_blocks", lambda model, n: None)
        with pytest.raises(UserError, match="not a plain stack"):
            Lim().step(ctx, Lim().plan(ctx)[0])
