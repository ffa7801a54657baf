"""Squared singular values through a Gram product of our own (`eigen.c`); absent without a C compiler.

Made for matrices whose shorter side is some hundred: there a Gram matrix stays in the cache, and one pass over it
updates it and makes the next product, where LAPACK's blocked reduction makes two. One thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from bitatlas.kernels.native import compiled, switched_off

__all__ = ["MOST", "Reduced", "available", "library", "slab_eigenvalues", "tile_eigenvalues"]

MOST = 1536  # rows of a Gram matrix; larger ones leave the cache, and LAPACK's blocks win
_PANEL = 32
_DEPTH = 256  # rows of a matrix that the product takes at a time
_BESIDE = 16  # a row is no power of two long, so that neighbours do not share a cache set


@cache
def library(double: bool = False, *more: str) -> ctypes.CDLL | None:
    """The compiled library in single or double precision; None without a compiler. ``more`` flags are for tests."""
    lib = compiled("eigen.c", *(("-DDOUBLE",) if double else ()), *more)
    if lib is None:
        return None
    p, i64, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double if double else ctypes.c_float
    lib.bitatlas_gram.argtypes = [p, i64, i64, i64, i64, p, i64, p]
    lib.bitatlas_eigenvalues.argtypes = [p, i64, i64, p, p]
    lib.bitatlas_tiles.argtypes = [p, i64, i64, p, p, i64, p, p]
    lib.bitatlas_vectors.argtypes = [p, p, i64, real, real, i64, p, p]
    lib.bitatlas_turn.argtypes = [p, i64, i64, p, p, i64]
    for name in ("gram", "eigenvalues", "tiles", "vectors", "turn"):
        getattr(lib, f"bitatlas_{name}").restype = None
    return lib


def available(n: int) -> bool:
    """Whether spectra of ``n`` values are computed here."""
    return 0 < n <= MOST and not switched_off() and library() is not None


def slab_eigenvalues(
    slabs: Iterable[Tensor], n: int, double: bool = False, lib: ctypes.CDLL | None = None
) -> Tensor:
    """Squared singular values, ascending (n,), of the matrix whose (rows, n) float32 row blocks ``slabs`` gives.

    Each is known to 1e-6 of itself, in single precision as long as it is above 1e-6 of the largest; ask `available` first.
    """
    return Reduced(slabs, n, double, lib).values


class Reduced:
    """A Gram matrix brought to tridiagonal form: its eigenvalues, and on demand the smallest ones better.

    Attributes:
        values: squared singular values, ascending (n,).
        heaviest: squared norm of the largest of the n columns.
    """

    def __init__(
        self, slabs: Iterable[Tensor], n: int, double: bool = False, lib: ctypes.CDLL | None = None
    ) -> None:
        lib = lib or library(double)
        assert lib is not None
        self._lib, dtype = lib, torch.float64 if double else torch.float32
        self._gram, pack, self._work = _buffers(n, dtype)
        gram, wide = self._gram.data_ptr(), self._gram.shape[1]
        for slab in slabs:
            # Double precision is made a block at a time, so that no matrix is ever held twice over.
            for block in slab.split(_DEPTH * 8) if double else (slab,):
                w = block.to(dtype)
                lib.bitatlas_gram(
                    w.data_ptr(), w.stride(0), w.stride(1), len(w), n, gram, wide, pack.data_ptr()
                )
        self.heaviest = float(self._gram.diagonal().max())
        self.values = torch.empty(n, dtype=dtype)
        lib.bitatlas_eigenvalues(gram, n, wide, self.values.data_ptr(), self._work.data_ptr())

    def smallest(
        self, slabs: Iterable[Tensor], count: int, error: float, double: ctypes.CDLL | None = None
    ) -> Tensor:
        """The ``count`` smallest eigenvalues once more, ascending float64, from the same matrix in single precision.

        Rayleigh-Ritz in the space of their vectors: rounding of the Gram matrix turns that space a little, and what it
        adds to a value is of second order, below error^2 / the next eigenvalue. ``error`` bounds the rounding;
        ``count`` is a multiple of 16 below n. Not finite where the vectors are not independent.
        """
        double = double or library(True)
        assert double is not None
        n, wide = len(self.values), self._gram.shape[1]
        d, e, tau = self._work[: 3 * wide].view(3, wide)
        d64, e64 = d[:n].double(), e[:n].double()
        vectors, room = torch.empty(n, count, dtype=torch.float64), torch.empty(17 * n, dtype=torch.float64)
        high = float(self.values[count - 1]) * 1.01 + error
        double.bitatlas_vectors(
            d64.data_ptr(), e64.data_ptr(), n, -error, high, count, vectors.data_ptr(), room.data_ptr()
        )
        v = vectors.float()
        self._lib.bitatlas_turn(self._gram.data_ptr(), n, wide, tau.data_ptr(), v.data_ptr(), count)
        square = torch.zeros(count, count, dtype=torch.float64)
        for slab in slabs:
            image = (slab @ v).double()
            square += image.mT @ image
        lower, bad = torch.linalg.cholesky_ex(v.double().mT @ v.double())
        inner = torch.linalg.solve_triangular(lower, square, upper=False)
        inner = torch.linalg.solve_triangular(lower, inner.mT, upper=False)
        if int(bad) or not bool(inner.isfinite().all()):
            return torch.full((count,), torch.nan, dtype=torch.float64)
        return torch.linalg.eigvalsh(inner).clamp_min(0)


def tile_eigenvalues(tiles: Tensor, lib: ctypes.CDLL | None = None) -> Tensor:
    """Squared singular values (count, n), each row ascending, of square float32 tiles (count, n, n)."""
    lib = lib or library()
    assert lib is not None
    count, n, _ = tiles.shape
    tiles = tiles.contiguous()
    gram, pack, work = _buffers(n, torch.float32)
    out = torch.empty(count, n)
    lib.bitatlas_tiles(
        tiles.data_ptr(), count, n, out.data_ptr(), gram.data_ptr(), gram.shape[1], pack.data_ptr(), work.data_ptr()
    )  # fmt: skip
    return out


def _buffers(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """An empty Gram matrix, room for packed rows, room for vectors; sizes as eigen.c says."""
    padded = -(-n // _PANEL) * _PANEL
    wide = padded + _BESIDE
    return (
        torch.zeros(padded, wide, dtype=dtype),
        torch.empty(_DEPTH * padded, dtype=dtype),
        torch.empty(7 * wide, dtype=dtype),
    )
