"""Our own spectra against double precision singular values: odd shapes, every width of vectors, hard cases."""

from __future__ import annotations

import pytest
import torch

from bitatlas.kernels import eigen
from bitatlas.kernels.native import compiled

PLAIN = ("-mno-avx512f", "-mno-avx2", "-mno-fma")  # what other processors run
pytestmark = pytest.mark.skipif(eigen.library() is None, reason="no C compiler here")


def exact(w: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(w.double()).flip(-1) ** 2


def heavy(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.rand(cols, generator=generator).pow(-0.6)


@pytest.mark.parametrize("flags", [(), PLAIN], ids=["native", "plain"])
@pytest.mark.parametrize("double", [False, True])
def test_equals_the_singular_values(flags: tuple[str, ...], double: bool) -> None:
    lib = eigen.library(double, *flags)
    if lib is None:
        pytest.skip("these flags are for x86")
    for rows, cols in ((1, 1), (2, 2), (5, 3), (33, 32), (300, 31), (190, 65), (513, 130)):
        w = heavy(rows, cols, rows)
        want = exact(w)
        slabs = {"whole": [w], "blocks": list(w.split(128)), "turned": [w.T.contiguous().T]}
        for name, given in slabs.items():
            got = eigen.slab_eigenvalues(given, cols, double, lib).double()
            assert bool((got.diff() >= 0).all())
            error = (got - want).abs()
            assert float(error.max() / want.max()) < 2e-6, (rows, cols, name)
            if double:
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-12 * float(want.max()))


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
