"""Dequantise, and multiply without dequantising to memory, on the GPU: W{2,3,4,5,6,8}A16 (and A32).

The product of a group is taken over the integers (code - zero), which fp16 and bf16 hold exactly, and scaled once per
group afterwards. Few rows: the columns are split over programs and summed in a second, deterministic pass. Many rows:
the weight is dequantised a strip at a time and multiplied by the vendor's library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitatlas.kernels.packed.matrix import PackedMatrix
from bitatlas.kernels.triton_bits import product, scale_and_zero, stream_values
from bitatlas.kernels.tuned import launch, many_rows

__all__ = ["dequantize", "linear", "linear_fused", "supports"]

# From here on a dense product wins over unpacking again for every block of rows; where nothing was measured (`kernels.tuned`).
_MANY_ROWS = 256
_PROGRAMS = 4 * 132  # enough to fill a large GPU four times over


@triton.jit
def dequantize_kernel(
    codes, scales, zeros, out, rows, cols, words, group, groups,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLS) tile of weights."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    rows_2d = tl.broadcast_to(row[:, None], (ROWS, COLS))
    cols_2d = tl.broadcast_to(col[None, :], (ROWS, COLS))
    code = stream_values(codes + rows_2d.to(tl.int64) * words, cols_2d, BITS, inside)
    scale, zero = scale_and_zero(scales, zeros, rows_2d, cols_2d // group, groups, BITS, SYMMETRIC, inside)
    weight = (code - zero).to(tl.float32) * scale
    tl.store(out + rows_2d.to(tl.int64) * cols + cols_2d, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x, codes, scales, zeros, out, m, n, k, words, group, groups, chunk,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = x[m, its columns] @ W[n, its columns].T; K divides the group size."""
    row = tl.program_id(0) * N + tl.arange(0, N)  # of W
    token = tl.program_id(1) * M + tl.arange(0, M)
    split = tl.program_id(2)
    stop = tl.minimum(split * chunk + chunk, k)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(split * chunk, stop, K):
        col = start + tl.arange(0, K)
        a = tl.load(
            x + token[:, None].to(tl.int64) * k + col[None, :],
            mask=(token[:, None] < m) & (col[None, :] < stop),
            other=0.0,
        )
        inside = (col[:, None] < stop) & (row[None, :] < n)
        cols_2d = tl.broadcast_to(col[:, None], (K, N))
        code = stream_values(codes + row[None, :].to(tl.int64) * words, cols_2d, BITS, inside)
        scale, zero = scale_and_zero(
            scales, zeros, row, tl.zeros_like(row) + start // group, groups, BITS, SYMMETRIC, row < n
        )
        # Columns past the end are zero in a, so what stands there in W does not matter.
        b = (code - zero[None, :]).to(tl.float32).to(a.dtype)
        total += product(a, b) * scale[None, :]
    at = (split.to(tl.int64) * m + token[:, None]) * n + row[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(token[:, None] < m) & (row[None, :] < n))


def supports(matrix: PackedMatrix, dtype: torch.dtype) -> bool:
    """Whether the fused kernel takes this matrix with inputs of this dtype."""
    return matrix.format.kind == "int" and dtype in (torch.float16, torch.bfloat16, torch.float32)


def _buffers(matrix: PackedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = matrix.codes.view(torch.uint32), matrix.scales.view(torch.float16)
    return codes, scales, codes if matrix.zeros is None else matrix.zeros.view(torch.uint32)


def dequantize(
    matrix: PackedMatrix, dtype: torch.dtype = torch.float32, tile: tuple[int, int] = (16, 128)
) -> Tensor:
    """The (rows, cols) weight."""
    out = torch.empty(matrix.rows, matrix.cols, dtype=dtype, device=matrix.codes.device)
    group = matrix.format.group_size or matrix.cols
    codes, scales, zeros = _buffers(matrix)
    grid = (triton.cdiv(matrix.rows, tile[0]), triton.cdiv(matrix.cols, tile[1]))
    dequantize_kernel[grid](
        codes, scales, zeros, out, matrix.rows, matrix.cols, codes.shape[1], group, matrix.format.groups(matrix.cols),
        matrix.format.bits, matrix.format.symmetric, *tile,
    )  # fmt: skip
    return out


def linear_fused(
    x: Tensor, matrix: PackedMatrix, *, tile: tuple[int, int, int] | None = None, splits: int | None = None
) -> Tensor:
    """``x (m, cols) @ W.T`` -> (m, rows), the weight staying packed.

    Args:
        x: float16, bfloat16 or float32.
        matrix: an integer format.
        tile: rows of x, rows of W, columns in one step; the last must divide the group size.
        splits: over how many programs the columns are split. Both as measured on this GPU (`kernels.tuned`) when left out.
    """
    m, k = x.shape
    n, fmt = matrix.rows, matrix.format
    group = fmt.group_size or k
    if tile is None and splits is None and (known := launch(x.device, fmt.bits, fmt.group_size, n, k, m)):
        tile, splits = known.tile, known.splits
    if tile is None:
        step = 64 if group % 64 == 0 or fmt.group_size is None else 32
        tile = (16 if m <= 16 else 32 if m <= 32 else 64, 64, step)
    if fmt.group_size is not None and group % tile[2]:
        raise ValueError(f"{tile[2]} columns in one step do not divide groups of {group}")
    blocks = triton.cdiv(n, tile[1]) * triton.cdiv(m, tile[0])
    if splits is None:
        splits = min(max(_PROGRAMS // blocks, 1), max(triton.cdiv(k, 4 * tile[2]), 1), 16)
    chunk = triton.cdiv(triton.cdiv(k, splits), tile[2]) * tile[2]
    splits = triton.cdiv(k, chunk)
    codes, scales, zeros = _buffers(matrix)
    out = torch.empty(splits, m, n, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    grid = (triton.cdiv(n, tile[1]), triton.cdiv(m, tile[0]), splits)
    linear_kernel[grid](
        x.contiguous(), codes, scales, zeros, out, m, n, k, codes.shape[1], group, fmt.groups(k), chunk,
        fmt.bits, fmt.symmetric, *tile,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def linear(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """``x (..., cols) @ W.T`` -> (..., rows): fused for few rows, dequantise and multiply for many."""
    flat = x.reshape(-1, matrix.cols)
    if flat.shape[0] >= (many_rows(x.device, matrix.format.bits, matrix.rows, matrix.cols) or _MANY_ROWS):
        out = flat @ dequantize(matrix, x.dtype).T
    elif flat.shape[0] == 0:
        out = flat.new_zeros(0, matrix.rows)
    else:
        out = linear_fused(flat, matrix)
    return out.view(*x.shape[:-1], matrix.rows)
