"""Packing and unpacking on the GPU; the same streams as `kernels.packing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitatlas.kernels.packing import packed_words
from bitatlas.kernels.triton_bits import stream_values

__all__ = ["pack_codes", "unpack_codes"]


@triton.jit
def pack_kernel(
    codes, packed, rows, cols, words, BITS: tl.constexpr, REACH: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """One (ROWS, WORDS) tile of words; each word gathers the up to REACH values that reach into it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (row[:, None] < rows) & (word[None, :] < words)
    first = (word * 32) // BITS
    out = tl.zeros((ROWS, WORDS), dtype=tl.uint32)
    for i in tl.static_range(REACH):
        col = first + i
        shift = col * BITS - word * 32  # where the value starts in this word; negative: in the one before
        reaches = (shift < 32) & (col < cols)
        value = tl.load(
            codes + row[:, None].to(tl.int64) * cols + col[None, :],
            mask=inside & reaches[None, :],
            other=0,
        ).to(tl.uint32)
        left = tl.maximum(tl.minimum(shift, 31), 0).to(tl.uint32)
        right = tl.maximum(-shift, 0).to(tl.uint32)
        out |= tl.where(reaches[None, :], (value << left[None, :]) >> right[None, :], 0)
    tl.store(packed + row[:, None].to(tl.int64) * words + word[None, :], out, mask=inside)


@triton.jit
def unpack_kernel(
    packed, codes, rows, cols, words, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """One (ROWS, COLS) tile of codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    start = packed + row[:, None].to(tl.int64) * words
    value = stream_values(start, tl.broadcast_to(col[None, :], (ROWS, COLS)), BITS, inside)
    tl.store(codes + row[:, None].to(tl.int64) * cols + col[None, :], value.to(tl.uint8), mask=inside)


def pack_codes(codes: Tensor, bits: int, tile: tuple[int, int] = (16, 64)) -> Tensor:
    """(rows, cols) uint8 -> (rows, words) int32; codes must fit into ``bits``."""
    rows, cols = codes.shape
    words = packed_words(cols, bits)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    if packed.numel():
        grid = (triton.cdiv(rows, tile[0]), triton.cdiv(words, tile[1]))
        reach = 32 // bits + (0 if 32 % bits == 0 else 2)
        pack_kernel[grid](
            codes.contiguous(), packed.view(torch.uint32), rows, cols, words, bits, reach, *tile
        )
    return packed


def unpack_codes(packed: Tensor, bits: int, cols: int, tile: tuple[int, int] = (16, 128)) -> Tensor:
    """(rows, words) int32 -> (rows, cols) uint8."""
    rows, words = packed.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=packed.device)
    if codes.numel():
        grid = (triton.cdiv(rows, tile[0]), triton.cdiv(cols, tile[1]))
        unpack_kernel[grid](packed.contiguous().view(torch.uint32), codes, rows, cols, words, bits, *tile)
    return codes
