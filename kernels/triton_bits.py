"""Triton building blocks: reading values out of bit streams. Importing this imports triton; nothing touches a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["product", "scale_and_zero", "stream_values"]

# Triton's interpreter multiplies the bit patterns of bfloat16; there, and only there, operands are widened (exactly).
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def stream_values(base, index, bits, mask):
    """Values number ``index`` of the little-endian stream at ``base`` (uint32), each ``bits`` wide, as int32.

    A second word is read only where a value straddles, so nothing beyond the stream is touched.
    """
    at = index * bits
    word = at >> 5
    shift = (at & 31).to(tl.uint32)
    low = tl.load(base + word, mask=mask, other=0)
    spills = mask & ((at & 31) + bits > 32)
    high = tl.load(base + word + 1, mask=spills, other=0)
    # In two steps: a shift by 32 is undefined, and needed when the value starts a word.
    value = (low >> shift) | ((high << 1) << (31 - shift))
    return (value & ((1 << bits) - 1)).to(tl.int32)


@triton.jit
def scale_and_zero(scales, zeros, row, group, groups, bits, symmetric, mask):
    """Scale (float32) and zero point (int32) of ``group`` in each ``row``."""
    at = row * groups + group
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    middle = (1 << bits) >> 1
    zero = tl.zeros_like(row).to(tl.int32) + middle
    if not symmetric:
        zero = stream_values(zeros, at, bits, mask)
    return scale, zero


@triton.jit
def product(a, b):
    """``a @ b`` in float32; float32 operands are not rounded to TF32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
