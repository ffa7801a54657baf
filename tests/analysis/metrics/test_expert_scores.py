"""Scores of routed experts, against a hand-written loop over unfused experts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitatlas.analysis import sequences
from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.camera_energy import CameraEnergy, micro_expert_bits
from bitatlas.analysis.metrics.coactivation import Coactivation, pair_counts
from bitatlas.analysis.metrics.expert_error import ExpertError
from bitatlas.analysis.moe import shrunk
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.reference import quantize_dequantize


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(sequences, "STEP_TOKENS", 60)


def unfused(ctx, layer):
    """Weights of a Mixtral layer's experts one by one, the inputs of its MoE block, and what its router does.

    Returns: {expert: (gate, up, down)}, x (N, d), {expert: [(token, weight)]}, all double precision.
    """
    experts = {}
    for u in ctx.index.units:
        if u.layer == layer and u.expert >= 0:
            experts.setdefault(u.expert, {})[u.role] = ctx.reader.get(u).double()
    seen = {}
    block = ctx.loaded.model.model.layers[layer].mlp
    hook = block.register_forward_pre_hook(lambda _, a: seen.update(x=a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
    hook.remove()
    x = seen["x"].double()
    routed = {e: [] for e in experts}
    for t, row in enumerate((x.float() @ block.gate.weight.T).double()):
        p = torch.softmax(row, 0)
        top = torch.topk(p, ctx.index.top_k).indices.tolist()
        for e in top:
            routed[e].append((t, float(p[e] / p[top].sum())))
    return experts, x, routed


def output(weights, x):
    gate, up, down = (weights[r] for r in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_expert_error_equals_the_unfused_loop(context, tmp_path):
    with context("mixtral", "int2-g32") as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(ExpertError(), ctx, tmp_path)}
        size, s = ctx.calibration.size, len(ctx.calibration.tokens)
        keys = {(u.layer, u.expert, u.role): u.key for u in ctx.index.units}
        for layer in (0, 1):
            experts, x, routed = unfused(ctx, layer)
            counts = np.array([len(routed[e]) for e in sorted(routed)])
            w = np.array([np.mean([r for _, r in routed[e]]) if routed[e] else 0.0 for e in sorted(routed)])
            per_token = {}
            for e, weights in experts.items():
                changed = {
                    r: quantize_dequantize(m.float(), ctx.formats[0]).double() for r, m in weights.items()
                }
                token = [t for t, _ in routed[e]]
                route = torch.tensor([r for _, r in routed[e]], dtype=torch.float64)[:, None]

                def error(variant, x=x[token], route=route, weights=weights):
                    d = (output(variant, x) - output(weights, x)) * route
                    return d.square().sum(1).numpy()

                both = error(changed)
                for role in weights:
                    one = error(weights | {role: changed[role]})
                    got = rows["expert_error", keys[layer, e, role]]
                    assert got.count == len(token)
                    assert got.value == pytest.approx(one.sum() / size, rel=1e-4)
                    by_sequence = np.bincount(np.array(token) // ctx.seq_len, one, s)
                    assert got.stderr == pytest.approx(by_sequence.std(ddof=1) * s**0.5 / size, rel=1e-4)
                    per_token[e, role] = one.mean()
                    joint = rows["expert_error_joint", keys[layer, e, role]]
                    assert joint.value == pytest.approx(both.sum() / size, rel=1e-4)
                    cost = 1000 * counts[e] / counts.sum() * (w[e] / w.sum()) ** 1.5 * both.sum() ** 0.5
                    assert rows["expert_error_pmq", keys[layer, e, role]].value == pytest.approx(
                        cost / 3, rel=1e-4
                    )
            for (e, role), mean in per_token.items():
                common = sum(per_token[f, role] * counts[f] for f in range(4)) / counts.sum()
                drawn = (counts[e] * mean + 64 * common) / (counts[e] + 64)
                got = rows["expert_error_shrunk", keys[layer, e, role]]
                assert got.value == pytest.approx(drawn * counts[e] / size, rel=1e-4)
        attention = [u.key for u in ctx.index.units if u.expert < 0]
        assert attention
        assert all(math.isnan(rows["expert_error", k].value) for k in attention)


def test_micro_expert_energy_equals_the_unfused_loop(context, tmp_path):
    with context("mixtral", settings={"camera_alpha": 0.7}) as ctx:
        metric = CameraEnergy()
        rows = {(r.metric, r.unit): r for r in run_metric(metric, ctx, tmp_path)}
        keys = {(u.layer, u.expert, u.role): u.key for u in ctx.index.units}
        for layer in (0, 1):
            experts, x, routed = unfused(ctx, layer)
            energy = {}
            for e, m in experts.items():
                total, scores = 0.0, np.zeros(m["down"].shape[1])
                for i in range(len(scores)):
                    norm = float(m["down"][:, i].square().sum())
                    phi = [
                        r * float(torch.nn.functional.silu(m["gate"][i] @ x[t]) * (m["up"][i] @ x[t]))
                        for t, r in routed[e]
                    ]
                    square = np.square(phi)
                    total += norm * square.sum()
                    scores[i] = norm * (0.3 * square.sum() + 0.7 * square.max())
                energy[e] = scores
                for role in ("gate", "up", "down"):
                    got = rows["camera_energy", keys[layer, e, role]]
                    assert got.value == pytest.approx(total / ctx.calibration.size, rel=1e-4)
                    assert got.count == len(routed[e])
                    assert rows["camera_score", keys[layer, e, role]].value == pytest.approx(
                        scores.sum(), rel=1e-4
                    )
            everyone = np.sort(np.concatenate(list(energy.values())))[::-1]
            limit = everyone[round(0.1 * len(everyone)) - 1]
            for e, scores in energy.items():
                share = (scores >= limit * (1 - 1e-6)).mean()
                assert rows["camera_top_share", keys[layer, e, "up"]].value == pytest.approx(share)
            mean = np.mean([rows["camera_bits", keys[layer, e, "up"]].value for e in energy])
            assert mean == pytest.approx(3.2)


def test_bits_of_micro_experts_follow_the_published_shares():
    bits, top = micro_expert_bits(np.arange(20.0))
    assert bits.tolist() == [2.0] * 12 + [4.0] * 6 + [8.0] * 2
    assert top.tolist() == [False] * 18 + [True] * 2


def test_pairs_equal_a_loop_over_tokens(context, tmp_path):
    with context("qwen3_moe", settings={"shrink_tokens": 10}) as ctx:
        metric = Coactivation()
        rows = {(r.metric, r.unit): r for r in run_metric(metric, ctx, tmp_path)}
        from bitatlas.analysis.measure import PartsOnDisk

        pairs = pair_counts(PartsOnDisk(tmp_path, metric.plan(ctx)))
        keys = {(u.layer, u.expert): u.key for u in ctx.index.units if u.role == "down"}
        size = ctx.calibration.size
        for layer in (0, 1):
            _, _, routed = unfused(ctx, layer)
            tokens = {e: {t for t, _ in found} for e, found in routed.items()}
            for e in tokens:
                if not tokens[e]:
                    assert math.isnan(rows["coactivation", keys[layer, e]].value)
                    continue
                both = {f: len(tokens[e] & tokens[f]) for f in tokens}
                assert pairs[layer, e].tolist() == [both[f] for f in sorted(both)]
                del both[e]
                n = len(tokens[e])
                got = rows["coactivation", keys[layer, e]]
                assert got.value == pytest.approx(max(both.values()) / n)
                assert got.count == n
                partner = int(rows["coactivation_partner", keys[layer, e]].value)
                assert both[partner] == max(both.values())
                lift = max(
                    (c + 10 * len(tokens[f]) / size) / (n + 10) / (len(tokens[f]) / size)
                    for f, c in both.items()
                    if tokens[f]
                )
                assert rows["coactivation_lift", keys[layer, e]].value == pytest.approx(lift)


def test_an_expert_that_is_never_chosen_is_unknown_everywhere(context, tmp_path):
    with context("mixtral", "int2-g32", tokens=40) as ctx:
        for layer in ctx.loaded.model.model.layers:
            layer.mlp.gate.weight.data[2] = 0
            layer.mlp.gate.weight.data[[0, 1, 3]] += 0.0
            layer.mlp.gate.register_forward_hook(without_expert_2)
        for kind in (ExpertError, CameraEnergy, Coactivation):
            lost = 0
            for r in run_metric(kind(), ctx, tmp_path / kind.NAME):
                u = ctx.unit_by_key[r.unit]
                if u.expert == 2:
                    assert math.isnan(r.value)
                    assert r.count == 0
                    lost += 1
                elif u.expert >= 0:
                    assert math.isfinite(r.value)
                    assert r.count > 0
            assert lost


def without_expert_2(_, args, out):
    logits, weight, chosen = out
    return logits, weight, torch.where(chosen == 2, 3, chosen)


def test_few_samples_are_drawn_to_the_mean_and_none_stay_unknown():
    got = shrunk(np.array([1.0, 5.0, np.nan]), np.array([100, 4, 0]), 20.0)
    common = (100 * 1.0 + 4 * 5.0) / 104
    assert got[0] == pytest.approx((100 + 20 * common) / 120)
    assert got[1] == pytest.approx((20 + 20 * common) / 24)
    assert math.isnan(got[2])


@pytest.mark.parametrize("kind", [ExpertError, Coactivation])
def test_a_dense_model_is_a_user_error(context, kind):
    with context("llama") as ctx, pytest.raises(UserError, match="no routed experts"):
        kind().plan(ctx)
