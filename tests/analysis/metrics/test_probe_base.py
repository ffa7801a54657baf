"""Settings that all probe metrics share: groups of layers change nothing, token weights and dtype do what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.fisher.matrix import load_probes
from bitatlas.analysis.fisher.parts import join_parts
from bitatlas.analysis.gradient_groups import (
    ALL_UNITS,
    default_bytes,
    gradient_groups,
    machine_bytes,
    units_of_group,
)
from bitatlas.analysis.measure import MeasureContext, PartsOnDisk, run_metric, run_step
from bitatlas.analysis.metrics.delta_ce import DeltaCe
from bitatlas.analysis.metrics.fisher_projection import FisherProjection
from bitatlas.analysis.metrics.probe_base import ratio_stderr
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.token_weights import answer_mask, attention_mass
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import expand_formats


def make(folder, settings=None, sequences=3, length=10, formats="int3-g32", **options):
    tokens = np.random.default_rng(5).integers(1, 250, (sequences, length))
    return MeasureContext(
        index_model(folder), expand_formats(formats), calibration=CalibrationSet.of(tokens),
        settings={"draws": 1, **(settings or {})}, **options,
    )  # fmt: skip


def rows(ctx, folder, metric=FisherProjection):
    return {(r.metric, r.unit, r.format): r for r in run_metric(metric(), ctx, folder)}


@pytest.mark.parametrize(("family", "metric"), [("qwen2_moe", FisherProjection), ("llama_tied", DeltaCe)])
def test_groups_of_layers_give_the_same_numbers(tiny_checkpoint, tmp_path, family, metric):
    whole = make(tiny_checkpoint(family))
    want = rows(whole, tmp_path / "whole", metric)
    by_layer = make(tiny_checkpoint(family), {"group_layers": 1})
    by_bytes = make(tiny_checkpoint(family), {"gradient_bytes": 1000})
    assert metric().plan(by_bytes) == metric().plan(by_layer)
    plan = [key for key in metric().plan(by_layer) if not key.startswith(("whole ", "front "))]
    assert plan[0].startswith("layers 0-0: sequences")
    assert plan[-1].startswith("outside the layers: ")
    probes = [make(tiny_checkpoint(family), {"whole_tokens": 0} | more) for more in ({}, {"group_layers": 1})]
    assert metric().cost(probes[1]).forward_tokens == 3 * metric().cost(probes[0]).forward_tokens
    got = rows(by_layer, tmp_path / "layers", metric)
    assert list(got) == list(want)
    assert [repr(r) for r in got.values()] == [repr(r) for r in want.values()]
    if metric is FisherProjection:
        matrix = load_probes(tmp_path / "layers")
        assert matrix.units == by_layer.index.unit_keys()
        np.testing.assert_array_equal(matrix.a, load_probes(tmp_path / "whole").a)


def test_groups_cover_every_unit_once_and_keep_layers_whole(tiny_checkpoint):
    units = index_model(tiny_checkpoint("deepseek_v3")).units
    total = sum(u.params for u in units)
    assert list(gradient_groups(units, total, lambda u: u.params)) == [ALL_UNITS]
    assert list(gradient_groups(units, total - 1, lambda u: u.params)) != [ALL_UNITS]
    for limit, layers in ((1, 0), (total // 3, 0), (total // 2, 0), (1, 2)):
        groups = gradient_groups(units, limit, lambda u: u.params, layers)
        assert sorted(u.key for g in groups.values() for u in g) == sorted(u.key for u in units)
        for name, group in groups.items():
            assert units_of_group(units, name) == group
            inside = {u.layer for u in group}
            assert not inside & {u.layer for g in groups.values() if g is not group for u in g}
            assert len(inside) == 1 or layers or sum(u.params for u in group) <= limit
    with pytest.raises(UserError):
        gradient_groups(units, 1, lambda u: 1, -1)


def test_the_default_limit_leaves_room_and_does_not_move(tiny_checkpoint):
    ctx = make(tiny_checkpoint("llama"))
    assert 1 << 28 <= default_bytes(ctx) < machine_bytes()
    assert default_bytes(ctx) == default_bytes(ctx)


def test_a_run_with_missing_steps_has_no_probes(tiny_checkpoint, tmp_path):
    ctx = make(tiny_checkpoint("llama"), {"group_layers": 1})
    plan = FisherProjection().plan(ctx)
    run_step(FisherProjection(), ctx, tmp_path, plan[0])
    assert join_parts(PartsOnDisk(tmp_path, plan[:1])).a.shape[0] == 3
    np.savez(tmp_path / "x.npz", **{
        k: v for k, v in PartsOnDisk(tmp_path, plan)[plan[0]].items() if k not in ("draw", "place")
    })  # fmt: skip
    joined = load_probes(tmp_path)  # the same cells twice, once as older versions wrote them
    assert joined.a.shape == (3, len(joined.units), 1)
    part = dict(PartsOnDisk(tmp_path, plan)[plan[0]])
    part |= {"sequence": part["sequence"] + 3, "names": part["names"]}
    more = {"one": PartsOnDisk(tmp_path, plan)[plan[0]], "two": part | {"place": part["place"] + 50}}
    assert len(join_parts(more).units) == len(joined.units)
    fewer = {n: (v[:, :1] if n in ("a", "gsq", "reached") else v) for n, v in part.items()}
    fewer |= {"place": part["place"][:1], "norm_sq": part["norm_sq"][:1]}
    import json

    names = json.loads(bytes(part["names"]))
    fewer["names"] = np.frombuffer(json.dumps([names[0][:1], names[1]]).encode(), np.uint8)
    with pytest.raises(UserError, match="incomplete"):
        join_parts({"one": more["one"], "two": fewer})


def test_answers_only_equal_the_positions_weighted_by_hand(tiny_checkpoint, tmp_path):
    """Token ids are bytes here: answers stand between ">" and "<"."""
    folder = tiny_checkpoint("llama")
    ctx = make(folder, {"tokens": "answer", "answer_marker": ">", "answer_end": "<"})
    vocabulary = {ctx.loaded.tokenizer.decode([i]): i for i in range(1, 257)}
    tokens = np.array([[vocabulary[c] for c in text] for text in ("ab>cd<ef", "no answers"[:8], "x>yz>12<")])
    ctx = make(folder, ctx.settings | {"group_layers": 0})
    ctx.__dict__["calibration"] = CalibrationSet.of(tokens)
    got = rows(ctx, tmp_path / "answers")
    probes = load_probes(tmp_path / "answers")
    assert probes.sequence.tolist() == [0, 2]  # a sequence without an answer tells nothing
    assert probes.tokens.tolist() == [2.0, 4.0]
    key = ctx.index.units[3].key
    value = 0.0
    for s, where in ((0, [2, 3]), (2, [1, 2, 4, 5])):
        ids = torch.from_numpy(tokens[s])
        handle = ctx.loaded.handle(key)
        from bitatlas.analysis.fisher.probes import score_gradient

        with ctx.loaded.requires_grad([key]) as params, torch.enable_grad():
            logits = ctx.loaded.logits(ids[None])[0]
            seed = ctx.random_seed("fisher_projection", s, 0)
            v = score_gradient(logits, "signs", torch.Generator().manual_seed(seed))
            mask = torch.zeros(len(ids), 1)
            mask[where] = 1.0
            (g,) = torch.autograd.grad(logits, params, v * mask)
        d = ctx.candidate(ctx.unit_by_key[key], ctx.formats[0]) - handle.get()
        value += float((handle.view(g) * d).sum()) ** 2 / 2 / 6
    assert got["fisher_projection", key, "int3-g32"].value == pytest.approx(value, rel=5e-3)


def test_answer_mask_ignores_white_space_and_ends():
    pieces = ["<|im", "_start|>", "assist", "ant\n", "Yes", " sir", ".", "<|im_end|>", "user"]
    mask = answer_mask(pieces, "<|im_start|> assistant", "<|im_end|>")
    # The position before "Yes" predicts it; the end marker is no answer.
    assert mask.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert answer_mask(pieces, "<|im_start|>assistant").tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert not answer_mask(pieces, "nobody").any()


def test_attention_mass_equals_the_models_own_attention(tiny_checkpoint):
    ctx = make(tiny_checkpoint("qwen3_moe"))
    ids = torch.from_numpy(ctx.calibration.tokens[0])
    got = attention_mass(ctx.loaded, ids)
    model = ctx.loaded.model
    assert model.config._attn_implementation != "eager"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
    want = torch.stack([a[0].sum(1).mean(0) for a in attentions]).mean(0)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)
    assert got.sum() == pytest.approx(len(ids), rel=1e-5)  # every query spends one


def test_attention_weights_reach_the_probes(tiny_checkpoint, tmp_path):
    ctx = make(tiny_checkpoint("llama"), {"tokens": "attention", "least_weight": 1.0, "most_weight": 3.0})
    weighted = rows(ctx, tmp_path / "weighted")
    flat = rows(make(tiny_checkpoint("llama"), {"tokens": "attention", "least_weight": 2.0, "most_weight": 2.0}),
                tmp_path / "flat")  # fmt: skip
    plain = rows(make(tiny_checkpoint("llama"), {"whole_tokens": 0}), tmp_path / "plain")
    for key, row in plain.items():
        assert flat[key].value == pytest.approx(row.value, rel=1e-4)
    assert any(abs(weighted[k].value / plain[k].value - 1) > 0.01 for k in plain)


def test_bad_token_rules_are_refused(tiny_checkpoint, tmp_path):
    for settings, word in (
        ({"tokens": "answer"}, "answer_marker"),
        ({"tokens": "answer", "answer_marker": "###"}, "no answer"),
        ({"tokens": "some"}, "rule"),
        ({"tokens": "attention", "least_weight": 4}, "least_weight"),
    ):
        ctx = make(tiny_checkpoint("llama"), settings)
        with pytest.raises(UserError, match=word):
            FisherProjection().step(ctx, FisherProjection().plan(ctx)[0])
    ctx = make(tiny_checkpoint("llama"), {"dtype": "int8"})
    with pytest.raises(UserError, match="dtype"):
        FisherProjection().step(ctx, FisherProjection().plan(ctx)[0])


def test_bfloat16_stays_close_and_leaves_the_float32_model_alone(tiny_checkpoint, tmp_path):
    exact = rows(make(tiny_checkpoint("llama"), sequences=6), tmp_path / "float32")
    ctx = make(tiny_checkpoint("llama"), {"dtype": "bfloat16"}, sequences=6)
    near = rows(ctx, tmp_path / "bfloat16")
    assert ctx._others["bfloat16"].handle(ctx.index.units[0].key).get().dtype == torch.bfloat16
    assert "loaded" not in ctx.__dict__
    ratio = np.array([near[k].value / exact[k].value for k in exact if k[0] == "fisher_trace"])
    assert np.all(np.abs(np.log(ratio)) < 0.1)
    ctx.close()
    assert not ctx._others


def test_ratio_stderr_is_that_of_resampled_sequences():
    rng = np.random.default_rng(0)
    weight = rng.uniform(1, 5, 60)
    values = rng.gamma(2, 1, (60, 2)) * weight[:, None]
    got = ratio_stderr(values, weight)
    picks = rng.integers(0, 60, (4000, 60))
    boot = (values[picks].sum(1) / weight[picks].sum(1)[:, None]).std(0)
    np.testing.assert_allclose(got, boot, rtol=0.08)
    assert np.isnan(ratio_stderr(values[:1], weight[:1])).all()
