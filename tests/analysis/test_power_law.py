from __future__ import annotations

import math

import numpy as np
import pytest

from bitatlas.analysis import power_law
from bitatlas.analysis.power_law import fit_power_law


def loop(values):
    """WWFit of weightwatcher 0.7.7, one xmin after the other."""
    x = np.sort(np.asarray(values, np.float64))
    x = x[x > 1e-5]
    n_all, logs = len(x), np.log(x)
    small = n_all < 20
    best = (math.inf, -1, math.nan, math.nan)
    for i in range(n_all - 1):
        n = n_all - i
        s = logs[i:].sum() - n * logs[i]
        if (small and n < 8) or s <= 1e-12:
            continue
        alpha = 1 + (n - small) / s
        d = np.abs(1 - (x[i:] / x[i]) ** (1 - alpha) - np.arange(n) / n).max()
        goal = d - 0.868 / math.sqrt(n) if small else d
        if goal < best[0]:
            best = (goal, i, alpha, d)
    return best[1:]


def spectra():
    rng = np.random.default_rng(0)
    for n in (8, 12, 19, 20, 33, 200, 576, 1500):
        yield f"gauss{n}", np.linalg.svd(rng.standard_normal((2 * n, n)), compute_uv=False) ** 2
        heavy = rng.standard_normal((n + 50, n)) * rng.pareto(1.5, n)
        yield f"heavy{n}", np.linalg.svd(heavy, compute_uv=False) ** 2
        yield f"pareto{n}", rng.pareto(2.0, n) + 1
        yield f"rankless{n}", np.concatenate([np.zeros(n // 3), rng.pareto(1.0, n - n // 3) + 0.1])


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(("name", "values"), list(spectra()), ids=lambda v: v if isinstance(v, str) else "")
def test_equals_the_loop_over_every_xmin(monkeypatch, kernels, name, values):
    monkeypatch.setenv("BITATLAS_KERNELS", kernels)
    index, alpha, distance = loop(values)
    fit = fit_power_law(values)
    assert fit.index == index
    if index >= 0:
        assert fit.alpha == pytest.approx(alpha, abs=1e-9 * abs(alpha))
        assert fit.distance == pytest.approx(distance, abs=1e-10)
        known = np.sort(values[values > 1e-5])
        assert fit.xmin == known[index]
        assert fit.tail == len(known) - index
        assert fit.sigma == pytest.approx((fit.alpha - 1) / fit.tail**0.5)


def test_the_bound_saves_work_and_small_blocks_change_nothing(monkeypatch):
    monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    values = np.random.default_rng(3).pareto(1.7, 1200) + 1
    whole = fit_power_law(values)
    rows = []
    original = power_law._distances
    monkeypatch.setattr(power_law, "_distances", lambda *a: rows.append(len(a[3])) or original(*a))
    monkeypatch.setattr(power_law, "_BLOCK", 1)
    assert fit_power_law(values) == whole
    assert 0 < sum(rows) < 1199 / 2


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_sure_of_xmin_means_that_no_error_within_bounds_moves_it(monkeypatch, kernels):
    monkeypatch.setenv("BITATLAS_KERNELS", kernels)
    rng = np.random.default_rng(5)
    sure, moved = 0, 0
    for name, values in spectra():
        values = np.sort(values)
        for size in (1e-6, 1e-4, 1e-2):  # the smaller a value, the worse known
            off = np.minimum(size * np.sqrt(values[-1] / np.maximum(values, 1e-9)), 0.1)
            fit = fit_power_law(values, off)
            sure += fit.sure and fit.index >= 0
            for sign in (rng.choice([-1, 1], len(values)), np.sign(values - np.median(values)), -1, 1):
                other = fit_power_law(values * np.exp(0.99 * sign * off))
                moved += other.tail != fit.tail
                if fit.sure and fit.index >= 0:
                    assert other.tail == fit.tail, name
                    assert other.alpha == pytest.approx(fit.alpha, abs=1.1e-3), name
    assert sure > 20
    assert moved > 20  # so that something was at stake


def test_recovers_a_known_exponent_and_its_start():
    rng = np.random.default_rng(1)
    tail = 5 * rng.uniform(size=8000) ** (-1 / (2.7 - 1))
    bulk = rng.uniform(0.5, 5, 4000)
    fit = fit_power_law(np.concatenate([tail, bulk]))
    assert fit.alpha == pytest.approx(2.7, abs=4 * fit.sigma + 0.05)
    assert 4 < fit.xmin < 9


def test_nothing_to_fit_is_unknown():
    for values in ([], [1.0], np.zeros(50), np.ones(50), [1.0, 2.0, 3.0]):
        fit = fit_power_law(np.array(values))
        assert math.isnan(fit.alpha)
        assert fit.tail == 0
