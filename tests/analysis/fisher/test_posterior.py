"""The posterior on simulated units whose true damage is known, and the small pieces beside brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.monotone import isotonic, monotone_families
from bitatlas.analysis.fisher.posterior import posterior, shrink_rare, trace_form

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int6-g64")


def simulate(spread, sequences=48, units=60, seed=0, draws=2):
    """Gaussian projections; ln(true / trace form) ~ N(0.2, spread) per unit, sequences of unequal curvature."""
    rng = np.random.default_rng(seed)
    n = 1000.0
    trace = np.exp(rng.normal(0, 1.5, units))
    norm_sq = np.exp(rng.normal(0, 0.3, (units, 1))) * 0.25 ** np.arange(len(FORMATS))
    true = 0.5 * trace[:, None] / n * norm_sq * np.exp(0.2 + rng.normal(0, spread, (units, 1)))
    tokens = 32
    heat = np.exp(rng.normal(0, 0.4, sequences)).repeat(draws)
    heat /= heat.mean()
    sd = np.sqrt(2 * tokens * true[None] * heat[:, None, None])
    a = rng.normal(0, 1, (sequences * draws, units, len(FORMATS))) * sd
    gsq = trace * tokens * heat[:, None] * rng.gamma(200, 1 / 200, (sequences * draws, units))
    matrix = ProbeMatrix(
        tuple(f"u{i}" for i in range(units)), FORMATS, a.astype(np.float32), gsq,
        np.arange(sequences).repeat(draws), np.full(sequences * draws, tokens),
        np.full((sequences * draws, units), tokens), norm_sq,
    )  # fmt: skip
    return matrix, np.full(units, n), true


def log_error(value, true):
    residual = np.log(value / true)
    return float((residual - residual.mean()).std())


@pytest.mark.parametrize("spread", [0.02, 0.15, 0.6])
def test_posterior_beats_both_of_its_sources(spread):
    """Mean over 5 simulations: no worse than the better source, clearly better when both are comparable."""
    errors = []
    for seed in range(5):
        matrix, n, true = simulate(spread, seed=seed)
        got = posterior(matrix, n, ["r"] * len(n))
        errors.append([log_error(x, true) for x in (got.value, matrix.damage(), trace_form(matrix, n)[0])])
    combined, projection, trace = np.mean(errors, 0)
    assert combined <= 1.05 * min(projection, trace) + 0.01
    if spread == 0.15:
        assert combined < 0.8 * min(projection, trace)


def test_the_winner_is_not_cursed():
    """Of the units that look best, the posterior's prediction is right in total, the projection's is not."""
    ratios = []
    for seed in range(10):
        matrix, n, true = simulate(0.1, seed=100 + seed, sequences=16)
        got = posterior(matrix, n, ["r"] * len(n)).value
        pick = [
            np.argsort(table[:, 1] / trace_form(matrix, n)[0][:, 1])[:10] for table in (got, matrix.damage())
        ]
        ratios.append([got[pick[0], 1].sum() / true[pick[0], 1].sum(),
                       matrix.damage()[pick[1], 1].sum() / true[pick[1], 1].sum()])  # fmt: skip
    ours, projection = np.mean(ratios, 0)
    assert projection < 0.75
    assert 0.82 < ours < 1.15


def test_posterior_stderr_is_honest():
    inside = []
    for seed in range(5):
        matrix, n, true = simulate(0.2, seed=seed)
        got = posterior(matrix, n, ["r"] * len(n))
        inside.append(np.abs(got.value - true) <= 2 * got.stderr)
    assert 0.88 <= np.mean(inside) <= 1.0


def test_monotone_in_bits_exact_formats_and_unreached_units():
    matrix, n, _ = simulate(0.3, sequences=6)
    matrix.norm_sq[:, 3] = 0.0
    matrix.a[:, :, 3] = 0.0
    matrix.reached[:, 5] = 0
    got = posterior(matrix, n, ["a", "b"] * (len(n) // 2))
    assert np.isnan(got.value[5]).all()
    rest = np.delete(got.value, 5, axis=0)
    assert np.all(rest[:, 3] == 0.0)
    assert np.all(np.diff(rest[:, :3], axis=1) <= 1e-15)
    assert np.isfinite(rest).all()


def test_few_sequences_still_give_numbers():
    matrix, n, _ = simulate(0.3, sequences=1, units=3, draws=1)
    got = posterior(matrix, n, ["a", "a", "b"])
    assert np.isfinite(got.value).all()
    assert np.all(got.value > 0)


def test_isotonic_is_the_nearest_monotone_sequence():
    rng = np.random.default_rng(0)
    grid = np.linspace(0, 1, 6)
    for _ in range(12):
        v = rng.choice(grid, 4)
        got = isotonic(v)
        assert np.all(np.diff(got) <= 1e-12)
        best = min(
            ((np.array(c) - v) ** 2).sum()
            for c in itertools.product(np.linspace(0, 1, 13), repeat=4)
            if all(x >= y for x, y in itertools.pairwise(c))
        )
        assert ((got - v) ** 2).sum() <= best + 1e-9


def test_families_group_by_group_size_and_symmetry():
    names = ("int4-g64", "int2-g64", "int4-g128", "bf16", "int3-g64-sym", "int8-g128")
    assert monotone_families(names) == [[1, 0], [2, 5]]


def test_rare_experts_move_towards_their_pool_and_stay_rare():
    trace = np.array([10.0, 0.1, 0.0, 7.0])
    reached = np.array([1000, 1, 0, 1000])
    got = shrink_rare(trace, reached, ["l0", "l0", "l0", None])
    pool = 10.1 / 1001
    assert got[1] == pytest.approx((1 * 0.1 + 64 * pool) / 65)
    assert got[0] == pytest.approx(1000 * (1000 * 0.01 + 64 * pool) / 1064)
    assert got[2] == 0.0
    assert got[3] == 7.0
