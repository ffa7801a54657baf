"""The logit-difference Gram against the whole differences in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.gram import load_gram
from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.logit_gram import LogitGram
from bitatlas.kernels.errors import UserError


def differences(ctx, sequences):
    """(flips, S T V) float64 z of every flip, in the order units x formats, from whole forwards."""
    ids = torch.from_numpy(ctx.calibration.tokens[:sequences])
    log_p = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
    out = []
    for unit in ctx.index.units:
        for fmt in ctx.formats:
            with ctx.loaded.swapped({unit.key: ctx.candidate(unit, fmt)}):
                u = torch.log_softmax(ctx.loaded.logits(ids).double(), -1) - log_p
            u -= (log_p.exp() * u).sum(-1, keepdim=True)
            out.append((u * (log_p / 2).exp()).reshape(-1).numpy())
    return np.stack(out), ids.numel()


@pytest.fixture(scope="module")
def made(context, tmp_path_factory):
    ctx = context("llama_tied", settings={"flip_sequences": 3, "sketch": 4096})
    folder = tmp_path_factory.mktemp("gram")
    rows = run_metric(LogitGram(), ctx, folder)
    return ctx, rows, load_gram(folder), differences(ctx, 3)


def test_own_terms_are_exact_and_cross_terms_are_kept_by_the_sketch(made):
    ctx, rows, gram, (z, tokens) = made
    want = (z @ z.T) / 2 / tokens
    assert gram.tokens == tokens
    assert gram.units == ctx.index.unit_keys()
    n = len(gram.units) * len(gram.formats)
    np.testing.assert_allclose(gram.own.reshape(-1), np.diag(want), rtol=2e-3, atol=1e-9)
    assert [r.value for r in rows] == pytest.approx(gram.own.reshape(-1).tolist())
    flat = gram.sketch.reshape(len(gram.sketch), n).astype(np.float64)
    got = flat.T @ flat / 2 / tokens
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    # 3 x 4096 numbers: a standard error of about 1 / sqrt(12288) of the norms.
    assert np.abs((got - want) / scale).max() < 5 / 12288**0.5
    assert np.std((got - want) / scale) < 1.5 / 12288**0.5


def test_whole_allocations_are_the_squared_sum(made):
    _, _, gram, (z, tokens) = made
    choices = np.random.default_rng(0).integers(0, len(gram.formats), (6, len(gram.units)))
    cube = z.reshape(len(gram.units), len(gram.formats), -1)
    want = [(np.sum([cube[u, f] for u, f in enumerate(c)], 0) ** 2).sum() / 2 / tokens for c in choices]
    np.testing.assert_allclose(gram.score(choices), want, rtol=0.05)
    alone = gram.own[np.arange(len(gram.units)), choices].sum(1)
    np.testing.assert_allclose(gram.score(choices, shrinkage=0.0), alone)


def test_a_sample_of_flips_scores_no_allocation(context, tmp_path):
    ctx = context("llama_tied", settings={"flip_sequences": 1, "flips": 5, "sketch": 16})
    assert len(run_metric(LogitGram(), ctx, tmp_path)) == 5
    with pytest.raises(UserError, match="every unit in every format"):
        load_gram(tmp_path)


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(LogitGram, lambda seed: context("gpt2", "int2-g32", seed=seed, settings={"sketch": 32}))
