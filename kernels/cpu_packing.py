"""Bit packing and the check for NaN and Inf in C (`packing.c`); absent without a compiler. One thread, no copies."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from bitatlas.kernels.native import compiled, switched_off

__all__ = ["available", "finite", "library", "pack", "unpack"]


@cache
def library(*more: str) -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler, or it fails. ``more`` flags are for tests."""
    lib = compiled("packing.c", *more)
    if lib is None:
        return None
    p, i64, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.bitatlas_pack.argtypes = [p, i64, i64, i64, i, p, i64]
    lib.bitatlas_unpack.argtypes = [p, i64, i64, i, p, i64]
    lib.bitatlas_finite.argtypes = [p, i64]
    lib.bitatlas_pack.restype = lib.bitatlas_finite.restype = i
    lib.bitatlas_unpack.restype = None
    return lib


def available(tensor: Tensor) -> bool:
    """Whether this tensor is dealt with here."""
    return tensor.device.type == "cpu" and not switched_off() and library() is not None


def pack(codes: Tensor, bits: int, out: Tensor, lib: ctypes.CDLL | None = None) -> int:
    """(rows, cols) uint8 into the contiguous (rows, words) int32 ``out``; returns all codes or'ed together."""
    lib = lib or library()
    assert lib is not None
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    rows, cols = codes.shape
    # A single row may have any stride.
    step = codes.stride(0) if rows > 1 else cols
    return int(lib.bitatlas_pack(codes.data_ptr(), rows, cols, step, bits, out.data_ptr(), out.shape[1]))


def unpack(packed: Tensor, bits: int, cols: int, lib: ctypes.CDLL | None = None) -> Tensor:
    """(rows, words) int32 -> (rows, cols) uint8."""
    lib = lib or library()
    assert lib is not None
    packed, out = packed.contiguous(), torch.empty(packed.shape[0], cols, dtype=torch.uint8)
    lib.bitatlas_unpack(packed.data_ptr(), *packed.shape, bits, out.data_ptr(), cols)
    return out


def finite(weight: Tensor, lib: ctypes.CDLL | None = None) -> bool:
    """Whether a contiguous float32 tensor holds neither NaN nor Inf."""
    lib = lib or library()
    assert lib is not None
    return bool(lib.bitatlas_finite(weight.data_ptr(), weight.numel()))
