"""The KV metrics against recomputations by hand: attention with loops over queries, KL of whole forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.fisher.probes import score_gradient
from bitatlas.analysis.kv.readers import OutputReader, PlanReader
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.kv_error import KvError
from bitatlas.analysis.metrics.kv_fisher import KvFisher
from bitatlas.analysis.metrics.kv_flip import KvFlip
from bitatlas.analysis.metrics.kv_output import KvOutput
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import KvTable
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.kv import KvLayout, parse_kv_format, parse_pair
from bitatlas.kernels.kv.quantize import quantize_dequantize_kv

LAYOUT = KvLayout(4, 2)
SETTINGS = {
    "kv_block": 4,
    "kv_residual": 2,
    "kv_keys": "kv2-token,kv2-channel",
    "kv_values": "kv4-token,kv2-token",
}


def make(folder, tokens=(3, 18), **settings):
    ids = np.random.default_rng(1).integers(1, 250, tokens)
    return MeasureContext(
        index_model(folder), settings=SETTINGS | settings, calibration=CalibrationSet.of(ids)
    )


def values(rows):
    return {(r.metric, r.unit, r.format): r for r in rows}


def rotated(x, theta=10000.0):
    """Rotary embedding in the half-split convention, from the definition; x (H, T, D)."""
    t, d = x.shape[1:]
    angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, d, 2) / d)[None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("pre", [False, True])
def test_errors_equal_attention_computed_by_hand(tiny_checkpoint, tmp_path, pre):
    assert (LAYOUT.packed(5), LAYOUT.packed(6), LAYOUT.packed(17)) == (0, 4, 12)
    ctx = make(tiny_checkpoint("llama"), (1, 18))
    rows = values(run_metric(KvError(), ctx, tmp_path))
    model, end = ctx.loaded.model, "_pre" if pre else ""
    seen = []
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True
    )
    ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
    hook.remove()
    attn = model.model.layers[1].self_attn
    heads = {
        n: getattr(attn, f"{n}_proj")(seen[0])[0].view(18, -1, 8).transpose(0, 1).detach() for n in "qkv"
    }
    q = rotated(heads["q"])
    for kf in ("kv2-token", "kv2-channel"):
        for vf in ("kv4-token", "kv2-token"):
            source = heads["k"] if pre else rotated(heads["k"])
            k_read = quantize_dequantize_kv(source[None], parse_kv_format(kf), 4)[0]
            k_read = rotated(k_read) if pre else k_read
            v_read = quantize_dequantize_kv(heads["v"][None], parse_kv_format(vf), 4)[0]
            k, v = rotated(heads["k"]), heads["v"]
            sums = np.zeros(4)
            for h in range(4):
                for i in range(6, 18):  # the first packed block is read by query 6 on
                    n = LAYOUT.packed(i)
                    kk = torch.cat([k_read[h // 2, :n], k[h // 2, n : i + 1].bfloat16().float()])
                    vv = torch.cat([v_read[h // 2, :n], v[h // 2, n : i + 1].bfloat16().float()])
                    p = torch.softmax(q[h, i] @ k[h // 2, : i + 1].T / 8**0.5, -1)
                    p2 = torch.softmax(q[h, i] @ kk.T / 8**0.5, -1)
                    o, o2 = p @ v[h // 2, : i + 1], p2 @ vv
                    sums += [
                        float(x)
                        for x in (
                            (p - p2).pow(2).sum(),
                            p.pow(2).sum(),
                            (o - o2).pow(2).sum(),
                            o.pow(2).sum(),
                        )
                    ]
            assert rows["kv_score_error" + end, "kv.1.k", kf].value == pytest.approx(
                (sums[0] / sums[1]) ** 0.5, rel=1e-3
            )
            assert rows["kv_error" + end, "kv.1", f"{kf}/{vf}"].value == pytest.approx(
                (sums[2] / sums[3]) ** 0.5, rel=1e-3
            )
            tensor = float(
                (
                    source[:, :12] - quantize_dequantize_kv(source[None, :, :12], parse_kv_format(kf), 4)[0]
                ).norm()
                / source[:, :12].norm()
            )
            assert rows["kv_tensor_error" + end, "kv.1.k", kf].value == pytest.approx(tensor, rel=1e-3)


def test_flips_equal_two_whole_forwards_and_the_fisher_form_predicts_small_ones(tiny_checkpoint, tmp_path):
    ctx = make(
        tiny_checkpoint("llama"),
        (6, 18),
        kv_keys="kv2-channel,kv4-token",
        kv_values="kv4-token,kv16",
        draws=40,
    )
    flips = values(run_metric(KvFlip(), ctx, tmp_path / "flip"))
    ids = torch.from_numpy(ctx.calibration.tokens)
    p = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
    for unit, pair in (("kv.0", "kv2-channel/kv4-token"), ("kv.1", "kv4-token/kv16")):
        with ctx.loaded.cached(PlanReader({int(unit[3:]): parse_pair(pair)}, LAYOUT)), torch.no_grad():
            q = torch.log_softmax(ctx.loaded.logits(ids).double(), -1)
        each = (p.exp() * (p - q)).sum(-1).mean(-1)
        row = flips["kv_flip", unit, pair]
        assert row.value == pytest.approx(float(each.mean()), rel=1e-2, abs=1e-9)
        assert row.floor < 1e-9
    fisher = values(run_metric(KvFisher(), ctx, tmp_path / "fisher"))
    for unit in ("kv.0", "kv.1"):
        for pair in ("kv4-token/kv4-token", "kv2-channel/kv4-token"):
            row = fisher["kv_fisher", unit, pair]
            # The spread is that of sequences, which both share; what is left is that of the probes.
            assert row.value / flips["kv_flip", unit, pair].value == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "gpt_oss"])
def test_the_projection_behind_attention_is_the_gradient_times_the_exact_change(
    tiny_checkpoint, tmp_path, monkeypatch, family
):
    ctx = make(tiny_checkpoint(family), (2, 18))
    monkeypatch.setattr(MeasureContext, "random_seed", lambda self, *parts: 7)
    step = KvOutput().plan(ctx)[0]
    found = KvOutput().step(ctx, step).arrays
    inside = KvFisher().step(ctx, step).arrays
    if family != "deepseek_v3":  # which caches latents: its "V" is the rotated part of the keys
        # The output is linear in V: there both projections are the same number.
        np.testing.assert_allclose(found["dots"][:, :, -1, :-1], inside["v"], rtol=2e-3, atol=1e-6)
    assert (found["dots"][:, :, -1, -1] == 0).all() or abs(found["dots"][:, :, -1, -1]).max() < 1e-5
    # K and V together: the change that the same layer shows when the whole model runs with this plan.
    layer = KvOutput().layers(ctx)[0]  # nothing before it differs
    ids = torch.from_numpy(ctx.calibration.tokens[:1])
    outputs, gradient = [], OutputReader(LAYOUT)
    for pair in ("kv16/kv16", "kv2-token/kv2-token"):
        reader = Keeping({layer: parse_pair(pair)}, LAYOUT)
        with ctx.loaded.cached(reader), torch.no_grad():
            ctx.loaded.logits(ids)
        outputs.append(reader.output[layer])
    with ctx.loaded.cached(gradient):
        logits = ctx.loaded.logits(ids)[0]
    logits.backward(score_gradient(logits, "signs", torch.Generator().manual_seed(7)))
    want = float((gradient.gradient(layer) * (outputs[1] - outputs[0])).sum())
    # The plan reads its window in 16 bits, the metric as it is.
    assert found["dots"][0, 0, 0, 1] == pytest.approx(want, rel=3e-2, abs=1e-4)


class Keeping(PlanReader):
    """Also keeps every layer's attention output."""

    def attended(self, call):
        self.__dict__.setdefault("output", {})[call.layer] = call.output


def test_a_settled_softmax_is_no_small_change(tiny_checkpoint, tmp_path):
    """Keys so large that the softmax settles: the slope in K is next to nothing, what quantising does is not."""
    ctx = make(tiny_checkpoint("llama"), (4, 18), draws=40)
    with torch.no_grad():
        for block in ctx.loaded.model.model.layers:
            block.self_attn.k_proj.weight *= 200
            block.self_attn.q_proj.weight *= 4
            block.self_attn.o_proj.weight *= 0.1  # what attention says stays a small change of the whole
    truth, inside, behind = (
        values(run_metric(kind(), ctx, tmp_path / kind.NAME)) for kind in (KvFlip, KvFisher, KvOutput)
    )
    off = {"kv_fisher": [], "kv_output": []}
    for unit in ("kv.0", "kv.1"):
        for pair in ("kv2-token/kv4-token", "kv2-channel/kv4-token"):
            want = truth["kv_flip", unit, pair].value
            off["kv_fisher"].append(abs(np.log(inside["kv_fisher", unit, pair].value / want)))
            off["kv_output"].append(abs(np.log(behind["kv_output", unit, pair].value / want)))
    assert np.mean(off["kv_output"]) < 0.3
    assert np.mean(off["kv_output"]) < np.mean(off["kv_fisher"]) / 2


def test_rows_make_a_table_of_pairs_with_the_16_bit_one(tiny_checkpoint, tmp_path):
    ctx = make(tiny_checkpoint("deepseek_v3"))  # latents: no keys before rotation
    rows = run_metric(KvError(), ctx, tmp_path)
    assert all(np.isnan(r.value) and r.count == 0 for r in rows if r.metric == "kv_error_pre")
    table = KvTable.from_rows(rows, "kv_error", LAYOUT)
    assert table.layers == (0, 1, 2)
    assert table.pairs[0] == "kv16/kv16"
    assert (table.damage[:, 0] == 0).all()
    assert (table.damage[:, 1:] > 0).all()
    with pytest.raises(UserError, match="not measured for kv8-token/kv8-token"):
        table.select(["kv8-token"])
    with pytest.raises(UserError, match="no kv_flip"):
        KvTable.from_rows(rows, "kv_flip", LAYOUT)


def test_what_cannot_be_measured_is_named(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    with pytest.raises(UserError, match="too short"):
        KvFisher().plan(make(folder, (2, 6)))
    with pytest.raises(UserError, match="no KV format"):
        KvFlip().plan(make(folder, kv_keys="int4"))
    with pytest.raises(UserError, match="no KV cache"):
        KvError().plan(make(tiny_checkpoint("mamba")))


class TestError(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tiny_checkpoint):
        return Case(KvError, lambda seed: make(tiny_checkpoint("llama")))


class TestFisher(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(KvFisher, lambda seed: context("gpt2", seed=seed, settings=SETTINGS))


class TestOutput(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(KvOutput, lambda seed: context("gpt2", seed=seed, settings=SETTINGS))


class TestFlip(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tiny_checkpoint):
        return Case(KvFlip, lambda seed: make(tiny_checkpoint("gemma3")))


@pytest.mark.parametrize("kind", [KvFisher, KvOutput])
def test_projections_carry_the_floor_of_the_arithmetic(tiny_checkpoint, tmp_path, monkeypatch, kind):
    asked = []
    monkeypatch.setattr("bitatlas.analysis.divergence.batch_noise", lambda *a: asked.append(a) or 1e-7)
    rows = run_metric(kind(), make(tiny_checkpoint("llama"), (60, 18)), tmp_path)
    assert {r.floor for r in rows} == {1e-7}
    assert len(asked) == 1  # of several steps
