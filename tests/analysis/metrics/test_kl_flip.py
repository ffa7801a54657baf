"""Single flips by prefix reuse equal whole forwards of the flipped model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.kl_flip import KlFlip
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.prefix import PrefixRunner, decoder_blocks
from bitatlas.kernels.formats import expand_formats

FAMILIES = ["llama", "llama_tied", "gemma3", "gpt2", "opt", "qwen2_moe", "deepseek_v3", "gpt_oss"]


def context(folder, formats="int2-g32,int4-g32-sym", **settings):
    tokens = np.random.default_rng(1).integers(0, 250, (5, 13))
    return MeasureContext(
        index_model(folder), expand_formats(formats), settings=settings, calibration=CalibrationSet.of(tokens)
    )


def naive(ctx, unit, fmt, sequences):
    """KL per sequence in float64 from two whole forwards."""
    ids = torch.from_numpy(ctx.calibration.tokens[:sequences])
    p = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
    with ctx.loaded.swapped({unit.key: ctx.candidate(unit, fmt)}):
        q = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean(-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_resuming_equals_the_whole_forward(tiny_checkpoint, family):
    ctx = context(tiny_checkpoint(family))
    runner = PrefixRunner(ctx.loaded, ctx.index.n_layers)
    ids = torch.from_numpy(ctx.calibration.tokens)
    recording = runner.record(ids)
    assert runner.exact
    assert len(recording.outputs) == ctx.index.n_layers
    for layer in range(ctx.index.n_layers + 1):
        unit = next((u for u in ctx.index.units if u.layer >= layer), ctx.index.units[-1])
        if layer == ctx.index.n_layers and unit.role != "head":
            continue
        with ctx.loaded.swapped({unit.key: ctx.candidate(unit, ctx.formats[0])}):
            torch.testing.assert_close(
                runner.resume(recording, layer), ctx.loaded.logits(ids), rtol=0, atol=1e-5
            )
    torch.testing.assert_close(ctx.loaded.logits(ids), recording.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe"])
def test_rows_equal_two_whole_forwards(tiny_checkpoint, tmp_path, family):
    ctx = context(tiny_checkpoint(family), flip_sequences=4)
    rows = {(r.unit, r.format): r for r in run_metric(KlFlip(), ctx, tmp_path)}
    assert len(rows) == len(ctx.index.units) * len(ctx.formats)
    for unit in ctx.index.units:
        for fmt in ctx.formats:
            each = naive(ctx, unit, fmt, 4)
            row = rows[unit.key, fmt.name]
            assert row.value == pytest.approx(each.mean(), rel=1e-3, abs=1e-8)
            assert row.stderr == pytest.approx(each.std(ddof=1) / 2, rel=1e-2, abs=1e-8)
            assert row.count == 4
            assert 0 <= row.floor < 1e-9


def test_a_sample_of_flips_is_drawn_by_the_seed_and_no_cache_gives_the_same(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama")
    first = run_metric(KlFlip(), context(folder, flips=7), tmp_path / "a")
    again = run_metric(KlFlip(), context(folder, flips=7, cache_gib=0.0), tmp_path / "b")
    assert len(first) == 7
    assert [(r.unit, r.format, r.value) for r in first] == [(r.unit, r.format, r.value) for r in again]


@pytest.mark.parametrize("flips", [1, 2, 3, 7, 13, 25, 29, 31])
def test_as_many_flips_as_were_asked_for(tiny_checkpoint, flips):
    for seed in range(8):
        ctx = context(tiny_checkpoint("llama_tied"), "int2-g32,int4-g32", flips=flips)
        ctx.seed = seed
        pairs = [pair for layer in KlFlip()._pairs(ctx).values() for pair in layer]
        every = len(ctx.index.units) * 2
        assert len({(u.key, f) for u, f in pairs}) == len(pairs) == min(flips, every)
        if flips < every:
            assert [sum(f == i for _, f in pairs) for i in (0, 1)] == [flips - flips // 2, flips // 2]


def test_a_model_that_cannot_be_resumed_is_run_whole(tiny_checkpoint):
    ctx = context(tiny_checkpoint("llama"))
    runner = PrefixRunner(ctx.loaded, 17)
    assert runner.exact is False
    ids = torch.from_numpy(ctx.calibration.tokens)
    torch.testing.assert_close(runner.resume(runner.record(ids), 1), ctx.loaded.logits(ids))


def test_blocks_are_the_decoder_list_not_the_experts():
    experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"experts": experts}) for _ in range(2))
    model = torch.nn.ModuleDict({"layers": blocks})
    assert decoder_blocks(model, 2) is blocks
    assert decoder_blocks(model, 3) is None


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(KlFlip, lambda seed: context("gpt2", "int2-g32,bf16", seed=seed))
