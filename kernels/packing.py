"""Bit packing: codes of 2 to 8 bits as one little-endian bit stream in 32-bit words.

Value j of a row occupies bits [j * bits, (j + 1) * bits) of the row's stream; bit 0 is the lowest bit of word 0.
Every row starts at a whole word. Widths that do not divide 32 straddle words (the layout of compressed-tensors,
MLX and GPTQ's 3 bits).

Eight codes of one byte each are read as one 64-bit lane and squeezed together in three shift-and-merge steps, so
the cost is a dozen 64-bit operations for eight values at every width, on CPU and GPU alike. `cpu_packing` does the same
in C, in one pass over the codes; the torch path here is its reference and stands in without a compiler.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from bitatlas.kernels import cpu_packing

__all__ = ["gather_stream", "pack_codes", "pack_stream", "packed_words", "unpack_codes", "unpack_stream"]

_WORD_BITS = 32
_PERIOD = 32  # values after which every width is back at a word border: 32 values are `bits` words
_MAX_BITS = 8
# (lane width before the merge, mask of the even lanes)
_STEPS = ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0x00000000FFFFFFFF))


def packed_words(count: int, bits: int) -> int:
    """Words that ``count`` values of ``bits`` bits take."""
    return -(-count * bits // _WORD_BITS)


def _check(bits: int) -> None:
    if not 1 <= bits <= _MAX_BITS:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    if sys.byteorder != "little":  # the lanes are byte views
        raise RuntimeError("bit packing needs a little-endian machine")


def pack_codes(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """(rows, cols) uint8 codes -> (rows, words) int32, each row one bit stream padded with zero bits; into ``out`` if given.

    Raises:
        ValueError: codes are not uint8, not 2-D, or do not fit into ``bits``.
    """
    _check(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be a (rows, cols) uint8 tensor, not {codes.dtype} {tuple(codes.shape)}")
    rows, cols = codes.shape
    words = packed_words(cols, bits)
    if out is None:
        out = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    if codes.numel() == 0:
        return out.zero_()
    if cpu_packing.available(codes) and out.is_contiguous():
        seen = cpu_packing.pack(codes, bits, out)
    else:
        seen = int(codes.amax())
        out.copy_(_pack(codes, bits, words))
    if seen >> bits:
        raise ValueError(f"codes up to {int(codes.amax())} do not fit into {bits} bits")
    return out


def _pack(codes: Tensor, bits: int, words: int) -> Tensor:
    rows, cols = codes.shape
    padded = -cols % _PERIOD
    if padded:
        codes = torch.cat([codes, codes.new_zeros(rows, padded)], dim=1)
    # Flat: a single row may have any stride, which a view of wider elements refuses.
    lanes = codes.contiguous().view(-1).view(torch.int64)  # (rows * padded cols / 8,), eight codes each
    if bits < _MAX_BITS:
        held = bits
        for width, even in _STEPS:
            # Codes below 2^7 leave the sign bit clear, so the arithmetic shift is a logical one.
            odd = lanes & (even << width) if width < 32 else lanes & ~even
            lanes = (lanes & even) | (odd >> (width - held))
            held *= 2
    packed = lanes.view(torch.uint8).view(rows, -1, 8)[:, :, :bits]  # (rows, padded cols / 8, bits)
    return packed.contiguous().view(-1).view(torch.int32).view(rows, -1)[:, :words].contiguous()


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """(rows, words) int32 -> (rows, cols) uint8; the inverse of `pack_codes`.

    Raises:
        ValueError: ``packed`` is not int32 or has the wrong number of words for ``cols``.
    """
    _check(bits)
    if packed.dtype != torch.int32 or packed.dim() != 2 or packed.shape[1] != packed_words(cols, bits):
        raise ValueError(
            f"{cols} columns of {bits} bits need (rows, {packed_words(cols, bits)}) int32, "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    rows, words = packed.shape
    if rows == 0 or cols == 0:
        return torch.zeros(rows, cols, dtype=torch.uint8, device=packed.device)
    return (
        cpu_packing.unpack(packed, bits, cols)
        if cpu_packing.available(packed)
        else _unpack(packed, bits, cols)
    )


def _unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    rows, words = packed.shape
    missing = -words % bits  # up to the next whole period
    if missing:
        packed = torch.cat([packed, packed.new_zeros(rows, missing)], dim=1)
    packed = packed.contiguous()
    if bits == _MAX_BITS:
        return packed.view(torch.uint8)[:, :cols].contiguous()
    squeezed = packed.view(torch.uint8).view(rows, -1, bits)
    spread = squeezed.new_zeros(*squeezed.shape[:2], 8)
    spread[:, :, :bits] = squeezed
    lanes = spread.view(torch.int64)  # (rows, periods * 4, 1): 8 * bits bits in each
    for width, even in reversed(_STEPS):
        held = bits * width // 8
        low = _lane_mask(held, 2 * width)
        lanes = (lanes & low) | ((lanes << (width - held)) & (even << width if width < 32 else ~even))
    return lanes.view(torch.uint8).view(rows, -1)[:, :cols].contiguous()


def _lane_mask(held: int, lane: int) -> int:
    """The low ``held`` bits of every ``lane``-bit lane of 64 bits, as a signed integer."""
    mask = sum(((1 << held) - 1) << at for at in range(0, 64, lane))
    return mask - (1 << 64) if mask >> 63 else mask


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Any uint8 tensor, read in row-major order, as one stream: (words,) int32. Used for zero points."""
    return pack_codes(values.reshape(1, -1), bits)[0]


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """(words,) int32 -> (count,) uint8; the inverse of `pack_stream`."""
    return unpack_codes(packed.reshape(1, -1), bits, count)[0]


def gather_stream(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Single values of a stream: (words,) int32 and any integer tensor of positions -> uint8 of its shape."""
    _check(bits)
    at = index.to(torch.int64) * bits
    word, shift = at >> 5, at & 31
    low = packed[word].to(torch.int64) & 0xFFFFFFFF
    # The value may go on in the next word; the last word has none, and needs none.
    high = packed[(word + 1).clamp_max(packed.numel() - 1)].to(torch.int64) & 0xFFFFFFFF
    return (((low >> shift) | (high << (32 - shift))) & ((1 << bits) - 1)).to(torch.uint8)
