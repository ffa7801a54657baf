"""The CPU's own packed product for few rows (`cpu_linear.c`, see `bitatlas.kernels.native`); absent without a compiler."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from bitatlas.kernels.codebooks import entries
from bitatlas.kernels.native import compiled, switched_off
from bitatlas.kernels.packed.matrix import PackedMatrix

__all__ = ["MOST_ROWS", "available", "library", "linear"]

MOST_ROWS = 8  # beyond, dequantising a block once for all rows and a BLAS product is faster
_FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fopenmp")


@cache
def library(*more: str) -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler, or it fails. ``more`` flags are for tests."""
    lib = compiled("cpu_linear.c", *_FLAGS, *more)
    if lib is None:
        return None
    p, i64, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.bitatlas_linear.argtypes = [p, i64, p, p, i64, *[p] * 3, *[i64] * 4, number, number]
    lib.bitatlas_table_linear.argtypes = [p, i64, p, i64, number, *[p] * 4, *[i64] * 4, number, number]
    lib.bitatlas_linear.restype = lib.bitatlas_table_linear.restype = None
    return lib


def available(x: Tensor, matrix: PackedMatrix) -> bool:
    """Whether `linear` takes this product: few rows, codes of integers or of a table, no gradient wanted."""
    fmt, rows = matrix.format, x.numel() // matrix.cols
    if fmt.kind not in ("int", "codebook") or not 0 < rows <= MOST_ROWS or switched_off():
        return False
    if (
        x.device.type != "cpu"
        or matrix.codes.device.type != "cpu"
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return False
    # Eight codes are decoded at a time, so groups must start at whole bytes.
    return (fmt.group_size or 8) % 8 == 0 and library() is not None


def linear(x: Tensor, matrix: PackedMatrix, lib: ctypes.CDLL | None = None) -> Tensor:
    """``x (..., cols) @ W.T`` -> (..., rows) in x's dtype, computed in float32; ask `available` first."""
    lib = lib or library()
    assert lib is not None
    fmt, flat = matrix.format, x.detach().reshape(-1, matrix.cols).to(torch.float32).contiguous()
    m, k = flat.shape
    group = fmt.group_size or k
    codes, scales, zeros = matrix.codes.contiguous(), matrix.scales.contiguous(), matrix.zeros
    y = torch.empty(m, matrix.rows)
    # x once more, every group filled up to a multiple of 32 columns.
    work = torch.empty(m * fmt.groups(k) * -(-group // 32) * 32)
    if fmt.kind == "codebook":
        lib.bitatlas_table_linear(
            codes.data_ptr(), codes.shape[1] * 4, scales.data_ptr(), 0 if fmt.per_tensor else scales.shape[1],
            fmt.scale == "e8m0", entries(fmt.codebook).data_ptr(), flat.data_ptr(), work.data_ptr(), y.data_ptr(),
            m, matrix.rows, k, group, fmt.bits, torch.get_num_threads(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], matrix.rows).to(x.dtype)
    lib.bitatlas_linear(
        codes.data_ptr(), codes.shape[1] * 4, scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), 0 if zeros is None else zeros.numel() * 4,
        flat.data_ptr(), work.data_ptr(), y.data_ptr(), m, matrix.rows, k, group, fmt.bits, torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], matrix.rows).to(x.dtype)
