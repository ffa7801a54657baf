"""The trust table's arithmetic by construction and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bitatlas.analysis.schema import NO_FORMAT, SensitivityTable
from bitatlas.analysis.trust import (
    AllocationTruths,
    badge,
    between_runs,
    between_texts,
    judge,
    sum_of_choices,
    top_overlap,
)

UNITS = tuple(f"u{i}" for i in range(40))
FORMATS = ("int2-g64", "int3-g64", "int4-g64")


def table(damage, formats=FORMATS, metric="m"):
    damage = np.asarray(damage, np.float64)
    return SensitivityTable(
        metric, UNITS, formats, damage, np.full(damage.shape, np.nan), np.ones(damage.shape, np.int64)
    )


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)
    return table(rng.lognormal(0, 1, (40, 1)) * np.array([1.0, 0.2, 0.05]), metric="kl_flip")


@pytest.fixture(scope="module")
def wholes(truth):
    rng = np.random.default_rng(1)
    choices = rng.integers(0, 3, (64, 40))
    bits = np.sort(rng.uniform(2.5, 4.4, 64))
    return AllocationTruths(FORMATS, choices, bits, sum_of_choices(truth.damage, choices) / 100, 1e-6)


def test_a_perfect_metric_is_trusted_and_its_scale_is_told(truth, wholes):
    row = judge("m", table(2 * truth.damage), flips=truth, wholes=wholes, predicted=2 * wholes.kl, nats=True)
    assert row.badge == "trusted"
    assert (row.flips, row.allocations) == (120, 64)
    assert [row.flip_spearman, row.spearman, row.flip_kendall, row.top_overlap] == pytest.approx([1.0] * 4)
    assert row.flip_ratio == row.ratio == pytest.approx(2.0)
    assert set(row.bands) == {"2.5-3", "3-3.5", "3.5-4", "4-4.5"}
    assert sum(row.band_counts.values()) == 64
    assert row.slope == pytest.approx(1.0)


def test_scipy_agrees_and_bands_are_judged_by_the_worst(truth, wholes):
    rng = np.random.default_rng(3)
    other = truth.damage * rng.lognormal(0, 1, truth.damage.shape)
    predicted = sum_of_choices(other, wholes.choices)
    row = judge("m", table(other), flips=truth, wholes=wholes, predicted=predicted)
    x, y = other.ravel(), truth.damage.ravel()
    assert row.flip_spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert row.flip_kendall == pytest.approx(stats.kendalltau(x, y).statistic)
    assert row.flip_low <= row.flip_spearman <= row.flip_high
    inside = (wholes.bits >= 3) & (wholes.bits < 3.5)
    assert row.bands["3-3.5"] == pytest.approx(
        stats.spearmanr(predicted[inside], wholes.kl[inside]).statistic
    )
    assert row.band_least == min(row.bands.values())
    assert row.badge == badge(row.band_least)[0]
    assert np.isnan(row.ratio)  # not a KL: no scale to be right about


def test_the_ratio_leaves_large_kl_out(truth, wholes):
    measured = AllocationTruths(FORMATS, wholes.choices, wholes.bits, wholes.kl / np.median(wholes.kl))
    predicted = np.where(measured.kl < 1, measured.kl, 0.01 * measured.kl)
    assert 3 < (measured.kl < 1).sum() < 64
    row = judge("m", None, wholes=measured, predicted=predicted, nats=True)
    assert row.ratio == pytest.approx(1.0)


def test_a_value_without_formats_is_judged_inside_each_format(truth):
    order = truth.damage[:, :1]
    row = judge("alpha", table(-order, (NO_FORMAT,)), flips=truth)
    assert row.flip_within == -1.0
    assert np.isnan(row.flip_spearman)
    assert row.badge == "trusted"  # a fall is as good as a rise
    assert set(row.flip_formats) == set(FORMATS)


def test_unknown_is_left_out_and_nothing_known_is_not_judged(truth, wholes):
    half = truth.damage.copy()
    half[20:] = np.nan
    row = judge("m", table(half), flips=truth, wholes=wholes, predicted=np.full(64, np.nan))
    assert row.flips == 60
    assert (row.allocations, row.badge) == (0, "trusted")
    assert np.isnan(row.spearman)
    none = judge("m", table(np.full((40, 3), np.nan)), flips=truth)
    assert (none.flips, none.badge) == (0, "not judged")
    assert np.isnan(none.flip_within)


def test_top_overlap_and_runs_of_other_texts(truth):
    x = np.arange(30.0)
    assert top_overlap(x, x, 5) == 1.0
    assert top_overlap(-x, x, 5) == 0.0
    assert np.isnan(top_overlap(x[:5], x[:5], 3))
    rng = np.random.default_rng(5)
    noisy = [table(truth.damage * rng.lognormal(0, s, truth.damage.shape)) for s in (0.1, 0.1, 2.0)]
    least = between_runs(noisy)
    pairs = [(0, 1), (0, 2), (1, 2)]
    want = min(stats.spearmanr(noisy[a].damage.ravel(), noisy[b].damage.ravel()).statistic for a, b in pairs)
    assert least == pytest.approx(want)
    assert np.isnan(between_runs(noisy[:1]))


def test_what_another_text_changes(truth):
    rng = np.random.default_rng(3)
    near = table(truth.damage * 1.1)
    far = table(truth.damage * 0.25 * rng.lognormal(0, 0.5, truth.damage.shape))
    told = between_texts(truth, {"near": near, "far": far})
    assert told["other_texts"] == ("near", "far")
    assert told["text_least"] == pytest.approx(
        stats.spearmanr(truth.damage.ravel(), far.damage.ravel()).statistic
    )
    assert told["text_ratio"] == pytest.approx(np.exp(np.median(np.log(truth.damage / far.damage))))
    alone = between_texts(truth, {})
    assert alone["other_texts"] == ()
    assert np.isnan([alone["text_least"], alone["text_ratio"]]).all()


def test_badges():
    assert [badge(x)[0] for x in (0.95, 0.9, 0.7, 0.5, -0.5, float("nan"))] == [
        "trusted", "trusted", "ranks well", "weak", "not to be trusted", "not judged",
    ]  # fmt: skip
