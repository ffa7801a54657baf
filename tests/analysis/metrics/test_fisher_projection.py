"""The metric around the probes: rows, counts, unknown experts, agreement with measured flips."""

from __future__ import annotations

import numpy as np
import pytest
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.agreement import agreement_of_tables
from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.fisher.matrix import load_probes
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.fisher_projection import FisherProjection
from bitatlas.analysis.metrics.kl_flip import KlFlip
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import SensitivityTable
from bitatlas.analysis.verify import verify_many
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(FisherProjection, lambda seed: context("qwen2_moe", "int2-g32,int4-g32,bf16", seed=seed))


def tables(rows, units):
    names = {r.metric for r in rows}
    return {m: SensitivityTable.from_rows([r for r in rows if r.metric == m], units) for m in names}


def test_predicts_measured_flips_and_whole_allocations(tiny_checkpoint, tmp_path):
    """Random weights, so a nearly quadratic model: the scale must be right, not only the order."""
    index = index_model(tiny_checkpoint("llama_tied"))
    tokens = np.random.default_rng(0).integers(0, 250, (24, 16))
    ctx = MeasureContext(
        index, expand_formats("int{3,4,6}-g32"), calibration=CalibrationSet.of(tokens),
        settings={"draws": 6, "flip_sequences": 0},
    )  # fmt: skip
    got = tables(run_metric(FisherProjection(), ctx, tmp_path / "fisher"), index.unit_keys())
    measured = tables(run_metric(KlFlip(), ctx, tmp_path / "flips"), index.unit_keys())["kl_flip"]
    for metric in ("fisher_projection", "fisher"):
        trust = agreement_of_tables(got[metric], measured, bootstrap=50)
        # 144 probes: 12 % standard error per value.
        assert trust.spearman > 0.97
        assert 0.85 < trust.ratio < 1.15
        assert 0.9 < trust.slope < 1.1
    probes = load_probes(tmp_path / "fisher")
    rng = np.random.default_rng(1)
    choices = rng.integers(0, 3, (6, len(index.units)))
    allocations = {
        str(i): {k: ctx.formats[c].name for k, c in zip(index.unit_keys(), choice)}
        for i, choice in enumerate(choices)
    }
    truth = verify_many(ctx.loaded, index, allocations, tokens)
    predicted = probes.score(choices, damage=got["fisher"].damage)
    ratio = predicted / np.array([truth[str(i)].kl_mean for i in range(6)])
    assert np.all((ratio > 0.7) & (ratio < 1.4))


def test_an_expert_that_no_token_reached_is_unknown(tiny_checkpoint, tmp_path):
    index = index_model(tiny_checkpoint("qwen3_moe"))
    ctx = MeasureContext(index, expand_formats("int2-g32"), calibration=CalibrationSet.of(np.array([[3, 4]])))
    reached: dict[str, int] = {}
    import torch

    with ctx.loaded.capture(lambda key, x, token, weight: reached.update({key: len(token)})):
        ctx.loaded.logits(torch.tensor([[3, 4]]))
    rows = run_metric(FisherProjection(), ctx, tmp_path)
    experts = {u.key for u in index.units if u.expert >= 0}
    missing = experts - set(reached)
    assert missing
    for r in rows:
        if r.unit in missing:
            assert np.isnan(r.value)
            assert r.count == 0
        else:
            assert r.value > 0
            assert r.count == reached.get(r.unit, 2)


def test_bad_settings_are_refused(tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama"))
    tokens = CalibrationSet.of(np.zeros((1, 4), np.int64))
    with pytest.raises(UserError, match="formats"):
        FisherProjection().plan(MeasureContext(index, (), calibration=tokens))
    ctx = MeasureContext(index, expand_formats("int2-g32"), calibration=tokens, settings={"score": "guesses"})
    with pytest.raises(UserError, match="score"):
        FisherProjection().step(ctx, FisherProjection().plan(ctx)[0])


def test_sequences_longer_than_a_part_of_the_front_are_parts_of_their_own(tiny_checkpoint, tmp_path):
    index = index_model(tiny_checkpoint("llama"))
    formats = expand_formats("int{2,4}-g32")
    tokens = CalibrationSet.of(np.random.default_rng(0).integers(0, 250, (3, 1100)))
    ctx = MeasureContext(index, formats, calibration=tokens, settings={"draws": 1})
    front = [k for k in FisherProjection().plan(ctx) if k.startswith("front ")]
    assert [k.rpartition(": ")[2] for k in front] == ["part 1 of 2", "part 2 of 2"]  # 2048 tokens, rounded up
    found = tables(run_metric(FisherProjection(), ctx, tmp_path), index.unit_keys())["fisher_anchored"]
    assert np.isfinite(found.damage).all()
    assert np.isfinite(found.stderr).all()
    # The longest that anybody asked for: one sequence, one part; short ones are grouped as ever.
    for count, length, parts in ((1, 100_000, 1), (8, 1024, 2), (64, 128, 2), (64, 100, 3)):
        ctx = MeasureContext(index, formats, tokens=count * length, seq_len=length)
        assert sum(k.startswith("front ") for k in FisherProjection().plan(ctx)) == parts


@pytest.mark.parametrize(("settings", "floor"), [({}, 1e-7), ({"whole_tokens": 0}, 0.0)])
def test_values_carry_the_noise_of_measured_kl(context, tmp_path, monkeypatch, settings, floor):
    """Known where the model was measured as a whole; the arithmetic itself may happen to be exact."""
    monkeypatch.setattr("bitatlas.analysis.fisher.whole.batch_noise", lambda *_: 1e-7)
    with context("llama", settings={"draws": 1, **settings}) as ctx:
        rows = run_metric(FisherProjection(), ctx, tmp_path)
    assert {r.metric for r in rows} == set(FisherProjection.EMITS[: 5 if floor else 3])
    assert {r.floor for r in rows} == {floor}
