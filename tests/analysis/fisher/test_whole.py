"""Uniform models measured in place: the KL of whole forwards, the model untouched afterwards, the factors by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.fisher.whole import WholeModel, format_scales
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.fisher_projection import FisherProjection
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS, SensitivityTable


@pytest.fixture
def context(tiny_checkpoint):
    """``context("llama", "int2-g32,int4-g32", settings={})`` -> a context with random tokens."""

    def make(family: str, formats: str = "int2-g32,int4-g32", **settings: object) -> MeasureContext:
        ids = np.random.default_rng(3).integers(1, 250, (8, 20))
        chosen = [FORMATS[name] for name in formats.split(",")]
        return MeasureContext(
            index_model(tiny_checkpoint(family)), chosen, calibration=CalibrationSet.of(ids), **settings
        )

    return make


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe", "gpt2"])
def test_measured_in_place_and_nothing_is_left_behind(tiny_checkpoint, context, family):
    ctx = context(family, "int2-g32,int4-g32")
    loaded, ids = ctx.loaded, torch.from_numpy(ctx.calibration.tokens[:3])
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    fmt = FORMATS["int2-g32"]
    whole = WholeModel(loaded, ctx.calibration.tokens[:3], ctx.index.units, ctx.weight)
    found, noise = whole.kl(lambda u: ctx.candidate(u, fmt)), whole.noise
    after = dict(loaded.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    weights = {u.key: ctx.candidate(u, fmt) for u in ctx.index.units}
    with torch.no_grad():
        plain = loaded.logits(ids)
        with loaded.swapped(weights):
            want = token_kl(plain, loaded.logits(ids)).mean(1)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-4)
    assert 0 <= noise < 1e-9


def test_the_model_comes_back_when_a_weight_cannot_be_quantised(context):
    ctx = context("llama")
    before = {n: p.detach().clone() for n, p in ctx.loaded.model.named_parameters()}

    def broken(unit):
        if unit.layer == 1:
            raise RuntimeError("no such candidate")
        return torch.zeros(unit.rows, unit.cols)

    with pytest.raises(RuntimeError, match="no such candidate"):
        WholeModel(ctx.loaded, ctx.calibration.tokens[:2], ctx.index.units, ctx.weight).kl(broken)
    assert all(torch.equal(before[n], p) for n, p in ctx.loaded.model.named_parameters())


def test_factors_by_hand():
    predicted = np.array([[1.0, 0.5, 1e-9, 0.0], [3.0, np.nan, 1e-9, 0.0]])
    scale = format_scales(predicted, np.array([6.0, 0.4, 1e-8, 1.0]), np.full(4, 1e-9))
    # At the noise, and where nothing is predicted: left alone.
    np.testing.assert_allclose(scale, [1.5, 0.8, 1.0, 1.0])
    np.testing.assert_allclose(format_scales(predicted, np.full(4, np.nan), np.zeros(4)), 1.0)


def test_a_whole_model_is_predicted_as_it_was_measured(context, tmp_path):
    ctx = context("qwen3_moe", "int2-g32,int4-g32")
    rows = run_metric(FisherProjection(), ctx, tmp_path)
    keys = ctx.index.unit_keys()
    scaled, plain = (
        SensitivityTable.from_rows([r for r in rows if r.metric == m], keys)
        for m in ("fisher_scaled", "fisher")
    )
    whole = WholeModel(ctx.loaded, ctx.calibration.tokens, ctx.index.units, ctx.weight)
    for j, fmt in enumerate(ctx.formats):
        kl = whole.kl(lambda u, f=fmt: ctx.candidate(u, f))
        assert np.nansum(scaled.damage[:, j]) == pytest.approx(kl.mean(), rel=1e-3)
        known = np.isfinite(plain.damage[:, j])
        assert np.ptp(scaled.damage[known, j] / plain.damage[known, j]) < 1e-6  # one factor a format


@pytest.mark.parametrize("settings", [{"whole_tokens": 0}, {"tokens": "attention"}])
def test_without_the_whole_there_is_no_scaled_value(context, tmp_path, settings):
    ctx = context("llama", settings=settings)
    assert not [k for k in FisherProjection().plan(ctx) if k.startswith("whole")]
    assert "fisher_scaled" not in {r.metric for r in run_metric(FisherProjection(), ctx, tmp_path)}
