"""The best start of a power-law tail through a scan of our own (`tail.c`); absent without a C compiler."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from bitatlas.kernels.native import compiled, switched_off

__all__ = ["available", "best_start", "library"]

_MORE = 8  # values behind the logs that a vector may touch


@cache
def library(*more: str) -> ctypes.CDLL | None:
    """The compiled library; None without a compiler. ``more`` flags are for tests."""
    lib = compiled("tail.c", *more)
    if lib is not None:
        p = ctypes.c_void_p
        lib.bitatlas_tail.argtypes = [p, ctypes.c_int64, p, p, p, p]
        lib.bitatlas_tail.restype = ctypes.c_int64
    return lib


def available() -> bool:
    """Whether the scan is made here."""
    return not switched_off() and library() is not None


def best_start(
    logs: np.ndarray,
    alphas: np.ndarray,
    penalty: np.ndarray,
    slack: np.ndarray,
    lib: ctypes.CDLL | None = None,
) -> tuple[int, float, bool]:
    """Position of the smallest Kolmogorov-Smirnov distance + penalty, that distance, and whether no other comes near it.

    ``logs`` (n,) of the ascending values; of each start (n - 1,): ``alphas``, NaN where none is, ``penalty``, and
    ``slack``, by how much its distance may be off. The first of equal ones is taken, -1 where there is none; ask
    `available` first.
    """
    lib = lib or library()
    assert lib is not None
    padded = np.concatenate([logs, np.zeros(_MORE)])
    given = [np.ascontiguousarray(a, np.float64) for a in (alphas, penalty, slack)]
    out = np.empty(2)
    best = lib.bitatlas_tail(padded.ctypes.data, len(logs), *(a.ctypes.data for a in given), out.ctypes.data)
    return int(best), float(out[0]), bool(out[1])
