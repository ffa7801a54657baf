"""Round to nearest in C (`rounding.c`), from weights as they are stored; absent without a compiler. One thread."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.native import compiled, switched_off
from bitatlas.kernels.reference import Quantized

__all__ = ["DTYPES", "available", "library", "rounded"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of weights that are read as they are."""


@cache
def library(*more: str) -> ctypes.CDLL | None:
    """The compiled library; None where there is no compiler, or it fails. ``more`` flags are for tests."""
    lib = compiled("rounding.c", *more)
    if lib is not None:
        p, i64, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        lib.bitatlas_round.argtypes = [p, i, i64, i64, i64, i64, i, p, p, p, p]
        lib.bitatlas_round.restype = i
    return lib


def available(fmt: Format) -> bool:
    """Whether matrices on the CPU are rounded to this format here."""
    return fmt.kind == "int" and not switched_off() and library() is not None


def rounded(weight: Tensor, fmt: Format, lib: ctypes.CDLL | None = None) -> Quantized | None:
    """What `reference.quantize` says of a (rows, cols) matrix, bit by bit.

    None where it has to be asked: another kind of format, another device or dtype, no compiler, NaN or Inf in the weight.
    """
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or not available(fmt) or not weight.numel():
        return None
    lib = lib or library()
    assert lib is not None
    weight = weight.detach()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    rows, cols = weight.shape
    group = fmt.group_size or cols
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.empty(rows, -(-cols // group), dtype=torch.float16)
    zeros = None if fmt.symmetric else torch.empty(scales.shape, dtype=torch.uint8)
    scratch = torch.empty(cols)
    step = weight.stride(0) if rows > 1 else cols  # a single row may have any stride
    known = lib.bitatlas_round(
        weight.data_ptr(), DTYPES[weight.dtype], rows, cols, step, group, fmt.bits, scratch.data_ptr(), codes.data_ptr(),
        scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
    )  # fmt: skip
    return Quantized(codes, scales, zeros, fmt) if known else None
