"""Our own spectra against double precision singular values: odd shapes, every width of vectors, hard cases."""

from __future__ import annotations

import pytest
import torch

from bitatlas.kernels import eigen
from bitatlas.kernels.native import compiled

PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-fma")  # what other processors run
AVX2 = ("-mno-avx512f",)
NO_PAIRS = ("-mno-avx512bf16",)
pytestmark = pytest.mark.skipif(eigen.library() is None, reason="no C compiler here")


def exact(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w.double()).flip(-1) ** 2


def heavy(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.rand(cols, generator=generator).pow(-0.6)


@pytest.mark.parametrize("flags", [(), NO_PAIRS, AVX2, PLAIN], ids=["native", "no pairs", "avx2", "plain"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_equals_the_singular_values(flags: tuple[str, ...], double: bool, half: bool) -> None:
    lib = eigen.library(double, *flags)
    if lib is None:
        pytest.skip("these flags are for x86")
    for rows, cols in ((1, 1), (2, 2), (5, 3), (33, 32), (300, 31), (190, 65), (513, 130)):
        w = heavy(rows, cols, rows)
        w = w.bfloat16().float() if half else w
        want = exact(w)
        slabs = {"whole": [w], "blocks": list(w.split(128)), "turned": [w.T.contiguous().T]}
        for name, given in slabs.items():
            got = eigen.slab_eigenvalues(given, cols, double, lib).double()
            assert bool((got.diff() >= 0).all())
            error = (got - want).abs()
            assert float(error.max() / want.max()) < 2e-6, (rows, cols, name)
            if double:
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-12 * float(want.max()))


@pytest.mark.parametrize("where", [(0, 0), (299, 70), (511, 3), (512, 5)])
def test_one_weight_that_is_no_bfloat16_is_not_cut_off(where: tuple[int, int]) -> None:
    w = heavy(513, 71).bfloat16().float()
    w[where] = 1000.123
    for given in (w, w.T.contiguous().T):
        got = eigen.slab_eigenvalues([given], 71).double()
        assert float(got[-1]) == pytest.approx(float(exact(w)[-1]), rel=1e-6)


@pytest.mark.parametrize("flags", [(), AVX2, PLAIN], ids=["native", "avx2", "plain"])
@pytest.mark.parametrize("n", [33, 130, 257])
def test_the_smallest_once_more(flags: tuple[str, ...], n: int) -> None:
    lib, double = eigen.library(False, *flags), eigen.library(True, *flags)
    if lib is None or double is None:
        pytest.skip("these flags are for x86")
    generator = torch.Generator().manual_seed(n)
    for w in (
        torch.randn(n, n, generator=generator),
        torch.randn(n, n, generator=generator) @ torch.randn(n, n, generator=generator),
        heavy(n, n, n).bfloat16().float(),
    ):
        want = exact(w)
        form = eigen.Reduced([w], n, lib=lib)
        mean = float(want.square().mean().sqrt())
        got = form.smallest(list(w.split(100)), 16, 1e-6 * mean, double)
        bound = (
            1e-6 * want[:16] + (1e-6 * mean) ** 2 / want[16] + 2e-7 * (mean * want[:16]).sqrt() + 1e-14 * mean
        )
        assert bool((got.diff() >= 0).all())
        assert bool(((got - want[:16]).abs() <= bound).all()), (got, want[:16])
        assert float((got / want[:16])[1:].log().abs().max()) < 1e-2 or float(want[1] / mean) < 1e-6


def test_vectors_that_are_not_independent_are_not_finite() -> None:
    w = torch.zeros(40, 40)
    w[0, 0] = 1.0
    assert not bool(eigen.Reduced([w], 40).smallest([w], 16, 1e-6).isfinite().all())


def test_small_eigenvalues_in_double_precision() -> None:
    q, _ = torch.linalg.qr(
        torch.randn(90, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    v, _ = torch.linalg.qr(
        torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )
    w = (q * torch.logspace(-2.5, 1.5, 60, dtype=torch.float64) @ v.T).float()
    torch.testing.assert_close(eigen.slab_eigenvalues([w], 60, True), exact(w), rtol=2e-6, atol=0)


@pytest.mark.parametrize("double", [False, True])
def test_degenerate_matrices(double: bool) -> None:
    assert not eigen.slab_eigenvalues([torch.zeros(40, 33)], 33, double).any()
    rank_one = torch.outer(torch.arange(1.0, 41.0), torch.ones(35))
    got = eigen.slab_eigenvalues([rank_one], 35, double)
    assert float(got[-1]) == pytest.approx(float(rank_one.square().sum()), rel=1e-5)
    assert float(got[:-1].abs().max()) < 1e-6 * float(got[-1])
    diagonal = torch.diag(torch.arange(1.0, 38.0))  # tridiagonal from the start, every reflection empty
    torch.testing.assert_close(
        eigen.slab_eigenvalues([diagonal], 37, double).double(),
        torch.arange(1.0, 38.0).double() ** 2,
        rtol=2e-5,
        atol=0,
    )
    same = eigen.slab_eigenvalues([torch.eye(50) * 1e-8], 50, double)
    torch.testing.assert_close(same.double(), torch.full((50,), 1e-16).double(), rtol=1e-4, atol=0)


def test_tiles_are_as_one_by_one() -> None:
    for n in (128, 37):
        tiles = torch.stack([heavy(n, n, seed) for seed in range(5)])
        got = eigen.tile_eigenvalues(tiles)
        for tile, row in zip(tiles, got):
            want = exact(tile)
            assert float((row - want).abs().max() / want.max()) < 1e-6
            assert torch.equal(row, eigen.slab_eigenvalues([tile], n))


def test_switched_off_or_too_large_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert eigen.available(128)
    assert not eigen.available(eigen.MOST + 1)
    monkeypatch.setenv("BITATLAS_KERNELS", "torch")
    assert not eigen.available(128)


def test_a_source_that_does_not_compile_is_absent() -> None:
    assert compiled("eigen.c", "-no-such-flag-at-all") is None
