from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import PartsOnDisk, run_metric
from bitatlas.analysis.metrics.spectral import Spectral
from bitatlas.analysis.power_law import fit_power_law
from bitatlas.analysis.spectra import gram_eigenvalues


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Spectral, lambda seed: context("gpt2", seed=seed))


def test_equals_a_double_precision_svd(context, tmp_path):
    with context("mixtral") as ctx:
        metric = Spectral()
        rows = {(r.metric, r.unit): r for r in run_metric(metric, ctx, tmp_path)}
        parts = PartsOnDisk(tmp_path, metric.plan(ctx))
        for unit in ctx.index.units:
            lam = np.linalg.svd(ctx.reader.get(unit).double().numpy(), compute_uv=False)[::-1] ** 2
            stored = metric.eigenvalues(ctx, parts, unit.key)
            assert stored == pytest.approx(lam, rel=1e-4, abs=1e-6 * lam[-1])
            fit = fit_power_law(lam)
            index = len(lam[lam > 1e-5]) - rows["spectral_alpha", unit.key].count
            assert index == fit.index
            got = rows["spectral_alpha", unit.key]
            assert got.value == pytest.approx(fit.alpha, abs=1e-3)
            assert got.stderr == pytest.approx(fit.sigma, abs=1e-3)
            assert got.count == fit.tail
            assert rows["spectral_distance", unit.key].value == pytest.approx(fit.distance, abs=1e-4)
            assert rows["spectral_weighted", unit.key].value == pytest.approx(
                fit.alpha * np.log10(lam[-1]), abs=1e-2
            )
            assert rows["spectral_log_norm", unit.key].value == pytest.approx(np.log10(lam.sum()), abs=1e-5)
            known = lam[lam > 1e-5]
            assert rows["spectral_log_det", unit.key].value == pytest.approx(np.log(known).mean(), abs=1e-3)
        with pytest.raises(KeyError):
            metric.eigenvalues(ctx, parts, "nobody")


def test_the_smallest_eigenvalue_survives():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((90, 60)))
    v, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    singular = np.geomspace(4e-3, 30, 60)
    w = torch.from_numpy(u * singular @ v.T)
    assert gram_eigenvalues(w, exact=True).numpy() == pytest.approx(singular**2, rel=1e-6)
    assert gram_eigenvalues(w.T.contiguous(), exact=True).numpy() == pytest.approx(singular**2, rel=1e-6)
    assert (gram_eigenvalues(w.float(), exact=True).numpy() > 1e-5).all()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("shape", [(300, 130), (70, 200), (64, 64), (1, 9)])
def test_slab_spectrum_with_and_without_our_kernel(monkeypatch, kernels, shape):
    from bitatlas.analysis.spectra import slab_spectrum

    monkeypatch.setenv("BITATLAS_KERNELS", kernels)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    tall = w if shape[0] >= shape[1] else w.mT
    want = np.linalg.svd(w.double().numpy(), compute_uv=False)[::-1] ** 2
    for slabs in ([tall], list(tall.split(128))):
        found, _ = slab_spectrum(lambda slabs=slabs: slabs, min(shape))
        assert found == pytest.approx(want, rel=2e-2, abs=3e-7 * want[-1])
        assert np.log(found).mean() == pytest.approx(np.log(want).mean(), abs=1e-3)
