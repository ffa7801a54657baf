from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.capture import layer_groups
from bitatlas.analysis.measure import run_metric, run_step
from bitatlas.analysis.metrics.activation_error import ActivationError, collect_moments
from bitatlas.analysis.prefix import decoder_blocks
from bitatlas.analysis.schema import QuantUnit
from bitatlas.kernels.reference import quantize_dequantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(ActivationError, lambda seed: context("qwen2_moe", seed=seed))


def inputs(ctx):
    """unit key -> (x (n, cols), sequence (n,), routing weight (n,)) in double precision, all tokens at once."""
    found = {}
    length = ctx.calibration.tokens.shape[1]

    def keep(key, x, token, weight):
        w = torch.ones(len(x)) if weight is None else weight
        found[key] = (x.double().numpy(), (token // length).numpy(), w.double().numpy())

    with torch.no_grad(), ctx.loaded.capture(keep):
        ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
    return found


@pytest.mark.parametrize(
    ("family", "routed"),
    [
        ("llama", False),
        ("gpt2", False),
        ("llama_tied", False),
        ("phi3", False),
        ("mixtral", False),
        ("mixtral", True),
    ],
)
def test_equals_the_naive_output_error(context, tmp_path, family, routed):
    settings = {"batch_tokens": 45, "routing_weight": routed}
    with context(family, "int3-g32", settings=settings) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(ActivationError(), ctx, tmp_path)}
        n = ctx.calibration.size
        seen = inputs(ctx)
        for unit in ctx.index.units:
            w = ctx.reader.get(unit)
            d = (quantize_dequantize(w, ctx.formats[0]) - w).double().numpy()
            if unit.key in seen:
                x, _, weight = seen[unit.key]
                if routed:
                    x = x * weight[:, None]
                error, energy = np.square(x @ d.T).sum(), np.square(x @ w.double().numpy().T).sum()
                count = len(x)
            else:
                assert unit.role == "embed"
                ids = ctx.calibration.tokens
                error, energy = np.square(d[ids]).sum(), np.square(w.double().numpy()[ids]).sum()
                count = n
            got = rows["activation_error", unit.key]
            assert got.value == pytest.approx(error / n, rel=1e-4)
            assert got.count == count
            assert rows["activation_error_rel", unit.key].value == pytest.approx(error / energy, rel=1e-4)


def spread_of(x, sequence, d, n):
    """Relative standard error over sequences of sum ||x dW^T||^2, by hand."""
    token_error = np.square(x @ d.T).sum(1)
    per_sequence = np.bincount(sequence, token_error, n)
    return per_sequence.std(ddof=1) / n**0.5 / per_sequence.mean()


def test_spread_is_that_of_the_sequences(context, tmp_path):
    with context("mixtral", "int2-g32,int4-g32,int3-channel", tokens=400) as ctx:
        rows = {
            (r.unit, r.format): r
            for r in run_metric(ActivationError(), ctx, tmp_path)
            if r.metric == "activation_error"
        }
        ratios = []
        for key, (x, sequence, _) in inputs(ctx).items():
            w = ctx.reader.get(key)
            for fmt in ctx.formats:
                d = (quantize_dequantize(w, fmt) - w).double().numpy()
                got = rows[key, fmt.name]
                want = got.value * spread_of(x, sequence, d, 20)
                if fmt.name == "int3-channel" and len(d) <= 64:
                    assert got.stderr == pytest.approx(want, rel=1e-3)
                ratios.append(got.stderr / want)
        # Another format's spread stands in for its own, and 64 directions for the 300 of the head.
        assert 0.9 < np.median(ratios) < 1.1
        assert 0.25 < min(ratios) <= max(ratios) < 4


def test_an_expert_without_tokens_is_unknown(context, tmp_path):
    with context("mixtral", "int2-g32", tokens=40) as ctx:
        original = ctx.loaded.capture

        def without_expert_3(callback, units=None):
            skip = {u.key for u in ctx.index.units if u.expert == 3}
            return original(callback, [k for k in units if k not in skip])

        ctx.loaded.capture = without_expert_3
        rows = run_metric(ActivationError(), ctx, tmp_path)
        for r in rows:
            if ctx.unit_by_key[r.unit].expert == 3:
                assert math.isnan(r.value)
                assert math.isnan(r.stderr)
                assert r.count == 0
            else:
                assert r.value > 0


def test_units_with_one_input_share_one_moment(context):
    with context("mixtral") as ctx:
        sketches = {u.key: torch.zeros(u.cols, 1) for u in ctx.index.units}
        found = collect_moments(ctx, ctx.index.units, sketches, False, 64)
        own = [k for k, m in found.items() if m.second is not None]
        assert found["model.layers.0.self_attn.k_proj"].leader is found["model.layers.0.self_attn.q_proj"]
        # Per layer: qkv, o, and per expert one for gate and up, one for down; and the head.
        assert len(own) == 2 * (2 + 4 * 2) + 1
        assert all(m.matrix() is not None for m in found.values())


def test_a_group_stops_the_forward_behind_its_last_layer(context):
    with context("llama") as ctx:
        first = [u for u in ctx.index.units if u.layer == 0]
        reached = []
        norm = ctx.loaded.model.model.norm.register_forward_hook(lambda *_: reached.append(1))
        sketches = {u.key: torch.zeros(u.cols, 1) for u in ctx.index.units}
        collect_moments(ctx, first, sketches, False, 64)
        assert not reached
        collect_moments(ctx, [u for u in ctx.index.units if u.layer == 1], sketches, False, 64)
        assert reached
        norm.remove()
        assert ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens[:1])).isfinite().all()


def test_groups_keep_within_memory_and_cover_every_unit():
    def unit(key, role, layer, expert=-1, cols=10):
        return QuantUnit(key, role, layer, expert, 7, cols, key)

    units = [unit("e", "embed", -1)]
    for layer in range(8):
        units += [unit(f"{layer}{r}", r, layer) for r in "qkvo"]
        units += [unit(f"{layer}x{e}{r}", r, layer, e) for e in range(4) for r in ("gate", "up", "down")]
    for limit in (1, 4 * 100 * 5, 1 << 30):
        groups = layer_groups(units, limit)
        assert [u.key for g in groups.values() for u in g] == [u.key for u in units[1:]] + ["e"]
        for name, group in groups.items():
            assert len({u.layer for u in group}) <= 2
            inputs = {
                (u.layer, u.expert, "gate" if u.role == "up" else "q" if u.role in "kv" else u.role)
                for u in group
            }
            assert limit == 1 or len(inputs) * 400 <= limit, name
    assert len(layer_groups(units, 1 << 30)) == 5


def runs_of_blocks(ctx):
    """Counter of every block's forwards that came to their end."""
    counts = [0] * ctx.index.n_layers
    for i, block in enumerate(decoder_blocks(ctx.loaded.model, ctx.index.n_layers)):
        original = type(block).forward

        def counted(self, *args, i=i, original=original, **kwargs):
            out = original(self, *args, **kwargs)
            counts[i] += 1
            return out

        block.__class__ = type(f"Counted{i}", (type(block),), {"forward": counted})
    return counts


@pytest.mark.parametrize(("family", "limit"), [("llama", 1 << 30), ("mixtral", 20000), ("gpt2", 1 << 30)])
def test_each_block_runs_once_for_all_groups_together(context, tmp_path, family, limit):
    settings = {"batch_tokens": 60, "moment_bytes": limit}
    changes = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    with context(family, changes=changes, settings=settings) as ctx:
        counts = runs_of_blocks(ctx)
        plan = ActivationError().plan(ctx)
        assert len(plan) >= 5
        rows = run_metric(ActivationError(), ctx, tmp_path / "one")
        batches = 3
        if family == "mixtral":
            # A layer in several groups runs once for each of them, but never the layers before it.
            assert sum(counts) <= batches * len(plan) + 2 * 4
        else:
            # Once per batch, and twice for trying out that beginning at a block changes nothing.
            assert all(batches <= c <= batches + 2 for c in counts)
    for key in plan[1 :: max(1, len(plan) // 2)]:
        with context(family, changes=changes, settings=settings) as fresh:
            alone = run_step(ActivationError(), fresh, tmp_path / "alone", key)
            assert alone
            assert all(repr(r) in {repr(x) for x in rows} for r in alone)


def test_blocks_that_share_more_than_the_stream_run_from_the_start(context, tmp_path):
    with context("llama", changes={"num_hidden_layers": 4}) as ctx:
        want = run_metric(ActivationError(), ctx, tmp_path / "a")
    with context("llama", changes={"num_hidden_layers": 4}) as ctx:
        counts = runs_of_blocks(ctx)
        ctx.scratch["resumable"] = False
        got = run_metric(ActivationError(), ctx, tmp_path / "b")
        assert counts[0] > counts[3]
    assert [repr(r) for r in got] == [repr(r) for r in want]
