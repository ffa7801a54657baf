"""Agreement numbers against SciPy and by construction."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bitatlas.analysis.agreement import agreement, agreement_of_tables, band_spearman, rank, spearman
from bitatlas.analysis.schema import SensitivityTable
from bitatlas.kernels.errors import UserError


def test_rank_and_spearman_equal_scipy_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 30), rng.normal(size=30)
        np.testing.assert_allclose(rank(x), stats.rankdata(x) - 1)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))


def test_a_scaled_prediction():
    rng = np.random.default_rng(1)
    measured = np.exp(rng.normal(size=200))
    got = agreement(2 * measured, measured)
    assert (got.spearman, got.slope, got.ratio) == pytest.approx((1.0, 1.0, 2.0))
    total = np.log(measured).var()
    assert got.r2 == pytest.approx(1 - np.log(2) ** 2 / total)
    assert agreement(measured**2, measured).slope == pytest.approx(0.5)


def test_intervals_cover_the_truth():
    """95 % intervals of the slope: 60 repetitions cover it at least 50 times (chance of fewer: about 1e-3)."""
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(60):
        x = rng.normal(size=60)
        y = 0.8 * x + 0.3 * rng.normal(size=60)
        got = agreement(np.exp(x), np.exp(y), bootstrap=200, seed=i)
        covered += got.slope_low <= 0.8 <= got.slope_high
        assert got.spearman_low <= got.spearman <= got.spearman_high
    assert covered >= 50


def test_unknown_and_below_the_floor_are_dropped():
    x = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 5.0, 0.0])
    y = np.array([1.0, 2.0, 3.0, 4.0, 1.0, 1e-9, 1.0])
    got = agreement(x, y, floor=1e-8)
    assert (got.points, got.dropped) == (4, 3)
    with pytest.raises(UserError, match="too few"):
        agreement(x[:2], y[:2])


def test_tables_are_compared_on_common_formats():
    units = ("a", "b", "c", "d")
    value = np.arange(8.0).reshape(4, 2) + 1
    zeros, counts = np.zeros((4, 2)), np.ones((4, 2), np.int64)
    p = SensitivityTable("p", units, ("int2-g64", "int4-g64"), value, zeros, counts)
    m = SensitivityTable("m", units, ("int4-g64", "int8-g64"), value[:, ::-1], zeros, counts)
    got = agreement_of_tables(p, m)
    assert got.points == 4
    assert got.spearman == 1.0
    other = SensitivityTable("m", units[::-1], m.formats, value, zeros, counts)
    with pytest.raises(UserError, match="common ground"):
        agreement_of_tables(p, other)


def test_bands():
    bits = np.array([2.6, 2.7, 2.9, 3.1, 3.2, 3.3, 4.9])
    predicted = np.array([3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 1.0])
    measured = np.array([3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    assert band_spearman(bits, predicted, measured) == {(2.5, 3.0): 1.0, (3.0, 3.5): -1.0}
