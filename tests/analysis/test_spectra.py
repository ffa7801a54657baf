"""Spectra and their tails against a double precision singular value decomposition, square matrices above all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis import spectra
from bitatlas.analysis.power_law import fit_power_law
from bitatlas.analysis.spectra import slab_spectrum
from bitatlas.kernels import eigen

SIZES = (48, 130, 257)


def matrices(n: int) -> dict[str, torch.Tensor]:
    """Square matrices of each kind."""
    rng = torch.Generator().manual_seed(n)
    normal = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    uniform = lambda k: torch.rand(k, generator=rng)  # noqa: E731
    directions = normal(n, n // 4) * uniform(n // 4).pow(-0.4)
    trained = (normal(n, n) + 0.3 * directions @ normal(n // 4, n)) * 0.02
    return {
        "gauss": normal(n, n),
        "heavy": normal(n, n) * uniform(n).pow(-0.6),
        "heavier": normal(n, n) * uniform(n).pow(-1.5) * uniform(n)[:, None].pow(-1),
        "low rank": normal(n, n // 2) @ normal(n // 2, n),
        "rank but one": normal(n, n - 1) @ normal(n - 1, n),
        "graded": normal(n, n) * torch.logspace(-3, 1, n),
        "a mean": normal(n, n) * 0.01 + 1,
        "trained": trained,
        "checkpoint": trained.bfloat16().float(),
        "tiny": trained * 0.01,
        "outlier": normal(n, n) * torch.where(torch.arange(n) == 5, 300.0, 1.0),
        "nearly singular": normal(n, n) @ torch.diag(torch.logspace(-2, 0, n)) @ normal(n, n),
        "heavy rows": normal(n, n) * uniform(n)[:, None].pow(-1.5),
        "orthogonal": torch.linalg.qr(normal(n, n))[0],
    }


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("n", SIZES)
def test_square_matrices_give_what_double_precision_gives(
    monkeypatch: pytest.MonkeyPatch, kernels: str, n: int
) -> None:
    monkeypatch.setenv("BITATLAS_KERNELS", kernels)
    for name, w in matrices(n).items():
        want = np.linalg.svd(w.double().numpy(), compute_uv=False)[::-1] ** 2
        values, fit = slab_spectrum(lambda w=w: w.split(100), n, square=True)
        right = fit_power_law(want)
        assert (np.diff(values) >= 0).all(), name
        if name not in (
            "low rank",
            "rank but one",
            "orthogonal",
        ):  # where rounding decides, whatever the method
            assert (values > 1e-5).sum() == (want > 1e-5).sum(), name
            known, exact = values[values > 1e-5], want[want > 1e-5]
            assert np.log(known).mean() == pytest.approx(np.log(exact).mean(), abs=5e-4), name
            assert known == pytest.approx(exact, rel=3e-2), name
        if name != "orthogonal":  # all equal: any tail is as good as any other
            assert fit.tail == right.tail, name
            assert fit.alpha == pytest.approx(right.alpha, abs=2e-4), name
            assert fit.distance == pytest.approx(right.distance, abs=2e-4), name
        assert values == pytest.approx(want, rel=3e-6, abs=1e-6 * float(np.square(want).mean()) ** 0.5), name


@pytest.mark.skipif(eigen.library() is None, reason="no C compiler here")
def test_single_precision_does_for_some_and_its_errors_are_as_declared() -> None:
    single = 0
    for n in SIZES:
        for name, w in matrices(n).items():
            want = np.linalg.svd(w.double().numpy(), compute_uv=False)[::-1] ** 2
            form = eigen.Reduced([w], n)
            bound = spectra._rounding(form) + spectra._RELATIVE * want
            assert (np.abs(form.values.double().numpy() - want) <= bound).all(), (n, name)
            found = spectra._single(lambda w=w: [w], n) is not None
            single += found
            assert found or name != "gauss"
            assert not found or name not in ("heavier", "low rank", "orthogonal")
    assert single >= 9  # of 42, most of them made to be hard


@pytest.mark.skipif(eigen.library() is None, reason="no C compiler here")
def test_what_single_precision_leaves_open_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrices(130)["trained"] * 10
    double = eigen.slab_eigenvalues([w], 130, True).numpy()
    assert spectra._single(lambda: [w], 130) is not None
    for name, value in (("_ROUNDING", 1e-3), ("_MOST_OFF", 0.0), ("_RELATIVE", 1e-2), ("_MOST_ANEW", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(spectra, name, value)
            assert spectra._single(lambda: [w], 130) is None, name
            assert np.array_equal(slab_spectrum(lambda: [w], 130)[0], double), name


@pytest.mark.skipif(eigen.library() is None, reason="no C compiler here")
def test_an_eigenvalue_on_the_threshold_is_decided_in_double_precision() -> None:
    w = matrices(130)["gauss"].double()
    u, s, v = torch.linalg.svd(w)
    for offset, above in ((1e-4, True), (-1e-4, False)):
        s[-1] = (1e-5 * (1 + offset)) ** 0.5
        again = (u * s @ v).float()
        want = float(torch.linalg.svdvals(again.double())[-1]) ** 2
        values, _ = slab_spectrum(lambda again=again: [again], 130)
        assert values[0] == pytest.approx(want, rel=1e-3)
        assert (values[0] > 1e-5) == (want > 1e-5) == above


def test_a_matrix_of_zeros_has_no_tail() -> None:
    values, fit = slab_spectrum(lambda: [torch.zeros(64, 64)], 64, square=True)
    assert not values.any()
    assert fit.tail == 0
