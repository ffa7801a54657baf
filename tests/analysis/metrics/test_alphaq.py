from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.alphaq import AlphaQ
from bitatlas.analysis.spectra import (
    farms_eigenvalues,
    farms_pick,
    farms_tiles,
    gram_eigenvalues,
    hill_alpha,
    spectral_entropy,
    stable_rank,
    tiles_hill,
)
from bitatlas.kernels.errors import UserError

BIG = {"hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 1, "vocab_size": 300}


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(AlphaQ, lambda seed: context("mixtral", seed=seed))


def heavy(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols)) * rng.pareto(2.5, cols)
    return torch.from_numpy(w).float()


def naive_hill(singular):
    """PL_Alpha_Hill as a loop over sorted numbers, in double precision."""
    lam = sorted(float(s) ** 2 for s in singular)
    m = len(lam)
    k = min(max(10, int(0.1 * m)), m - 1)
    k = max(k, 1)
    return 1 + k / sum(math.log(lam[m - i] / lam[m - k - 1]) for i in range(1, k + 1))


@pytest.mark.parametrize("shape", [(200, 130), (90, 310), (64, 64), (5, 40), (2, 2)])
def test_plain_hill_equals_the_loop_over_singular_values(shape):
    w = heavy(*shape)
    singular = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert np.sqrt(gram_eigenvalues(w).numpy()[::-1]) == pytest.approx(
        singular, rel=1e-3, abs=1e-3 * singular[0]
    )
    assert hill_alpha(gram_eigenvalues(w)) == pytest.approx(naive_hill(singular), rel=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(128, 128), (300, 520), (700, 260)])
def test_farms_equals_a_loop_of_double_precision_svds(shape, kernels, monkeypatch):
    monkeypatch.setenv("BITATLAS_KERNELS", kernels)
    w = heavy(*shape, seed=1)
    down, across = shape[0] // 128, shape[1] // 128
    blocks = min(3, down * across)
    picked = torch.randperm(down * across, generator=torch.Generator().manual_seed(4))[:blocks].tolist()
    pooled = []
    for i in picked:
        r, c = divmod(i, across)
        tile = w[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128].double().numpy()
        pooled += list(np.linalg.svd(tile, compute_uv=False))
    found = farms_eigenvalues(w, torch.Generator().manual_seed(4), blocks=3)
    assert found.numel() == blocks * 128
    assert bool((found.diff() >= 0).all())
    assert hill_alpha(found) == pytest.approx(naive_hill(pooled), rel=1e-5)
    pick = farms_pick(*shape, torch.Generator().manual_seed(4), 3)
    assert tiles_hill(farms_tiles([w], [pick])[0]) == pytest.approx(naive_hill(pooled), rel=1e-5)


def test_farms_takes_the_shape_out_and_falls_back_on_small_matrices():
    w = heavy(100, 300)
    assert torch.equal(farms_eigenvalues(w, torch.Generator()), gram_eigenvalues(w))


def test_hill_is_scale_free_and_finds_a_known_tail():
    rng = np.random.default_rng(0)
    alpha = 3.2
    eigenvalues = torch.from_numpy(np.sort(rng.uniform(size=200_000) ** (-1 / (alpha - 1))))
    assert hill_alpha(eigenvalues) == pytest.approx(alpha, rel=0.03)
    assert hill_alpha(eigenvalues * 1e-6) == pytest.approx(hill_alpha(eigenvalues), rel=1e-9)


def test_what_has_no_tail_is_unknown():
    assert math.isnan(hill_alpha(torch.tensor([1.0])))
    assert math.isnan(hill_alpha(torch.zeros(40)))
    assert math.isnan(hill_alpha(torch.ones(40)))
    assert math.isnan(hill_alpha(torch.cat([torch.zeros(39), torch.ones(1)])))
    assert math.isnan(stable_rank(torch.zeros(4)))
    assert math.isnan(spectral_entropy(torch.zeros(4)))


def test_stable_rank_and_entropy_by_hand():
    lam = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert stable_rank(lam) == 2.0
    p = np.array([1, 1, 2, 4]) / 8
    assert spectral_entropy(lam) == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    assert spectral_entropy(torch.ones(7)) == pytest.approx(1.0)
    assert spectral_entropy(torch.tensor([0.0, 0.0, 3.0])) == 0.0


def test_damage_follows_the_published_cost(context, tmp_path):
    with context("llama", "int2-g32,int4-g64", changes=BIG, settings={"gamma": 2.0, "farms_seeds": 2}) as ctx:
        rows = run_metric(AlphaQ(), ctx, tmp_path)
        alpha = {r.unit: r.value for r in rows if r.metric == "alpha_hill"}
        spread = {r.unit: r.stderr for r in rows if r.metric == "alpha_hill"}
        median = float(np.median(list(alpha.values())))
        for r in rows:
            if r.metric == "alphaq":
                w = ctx.reader.get(r.unit).double().numpy()
                bits = int(r.format[3])
                want = (median / alpha[r.unit]) ** 2 * w.size * w.var() * 2.0 ** (-2 * bits)
                assert r.value == pytest.approx(want, rel=1e-6)
                assert r.stderr == pytest.approx(want * 2 * spread[r.unit] / alpha[r.unit], rel=1e-6)


def test_variants(context, tmp_path):
    from bitatlas.analysis.metrics.weight_error import squared_error

    base = {"farms_seeds": 1}
    runs = {}
    for name, settings in (
        ("n", {}),
        ("published", {"size_factor": False}),
        ("measured", {"distortion": "measured"}),
    ):
        with context("mixtral", settings=base | settings) as ctx:
            rows = run_metric(AlphaQ(), ctx, tmp_path / name)
            runs[name] = {(r.unit, r.format): r.value for r in rows if r.metric == "alphaq"}
            alpha = {r.unit: r.value for r in rows if r.metric == "alpha_hill"}
            assert all(math.isnan(r.stderr) for r in rows if r.metric == "alpha_hill")
            units, formats = ctx.unit_by_key, {f.name: f for f in ctx.formats}
            if name == "measured":
                median = np.median(list(alpha.values()))
                for (u, f), value in runs[name].items():
                    error = squared_error(ctx.reader.get(u), formats[f])
                    assert value == pytest.approx(median / alpha[u] * error, rel=1e-9)
    for (u, f), value in runs["n"].items():
        assert value == pytest.approx(runs["published"][u, f] * units[u].params, rel=1e-9)


def test_another_seed_moves_alpha_only_where_tiles_are_drawn(context, tmp_path):
    found = []
    for seed in (0, 1):
        settings = {"farms_seeds": 3, "farms_tiles": 1}
        with context("llama", seed=seed, changes=BIG | {"vocab_size": 700}, settings=settings) as ctx:
            rows = run_metric(AlphaQ(), ctx, tmp_path / str(seed))
            several = {u.key for u in ctx.index.units if (u.rows // 128) * (u.cols // 128) > 1}
        found.append({r.unit: (r.value, r.stderr) for r in rows if r.metric == "alpha_hill"})
    moved = {u for u in found[0] if found[0][u] != found[1][u]}
    # Of two tiles the same may be drawn again; embedding and head have five.
    assert {"model.embed_tokens", "lm_head"} <= moved <= several < set(found[0])
    assert {k for k in found[0] if found[0][k][1] > 0} <= several
    for unit in moved:
        assert found[0][unit][1] < 0.5 * found[0][unit][0]


def test_wrong_settings(context, tmp_path):
    for settings, message in (
        ({"distortion": "guess"}, "model or measured"),
        ({"farms_seeds": 0}, "1 to 100"),
    ):
        with context("llama", settings=settings) as ctx, pytest.raises(UserError, match=message):
            AlphaQ().plan(ctx)
