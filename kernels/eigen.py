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

__all__ = ["MOST", "available", "library", "slab_eigenvalues", "tile_eigenvalues"]

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
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.bitatlas_gram.argtypes = [p, i64, i64, i64, i64, p, i64, p]
    lib.bitatlas_eigenvalues.argtypes = [p, i64, i64, p, p]
    lib.bitatlas_tiles.argtypes = [p, i64, i64, p, p, i64, p, p]
    for name in ("gram", "eigenvalues", "tiles"):
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
    lib = lib or library(double)
    assert lib is not None
    dtype = torch.float64 if double else torch.float32
    gram, pack, work = _buffers(n, dtype)
    for slab in slabs:
        # Double precision is made a block at a time, so that no matrix is ever held twice over.
        for block in slab.split(_DEPTH * 8) if double else (slab,):
            w = block.to(dtype)
            lib.bitatlas_gram(
                w.data_ptr(), w.stride(0), w.stride(1), len(w), n, gram.data_ptr(), gram.shape[1], pack.data_ptr()
            )  # fmt: skip
    out = torch.empty(n, dtype=dtype)
    lib.bitatlas_eigenvalues(gram.data_ptr(), n, gram.shape[1], out.data_ptr(), work.data_ptr())
    return out


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
        torch.empty(6 * wide, dtype=dtype),
    )
