"""The reference quantiser of K and V in plain torch: asymmetric, round to nearest, float16 scale and minimum.

    low = fp16(min x), s = fp16((max x - low) / (2^b - 1)), q = clamp(round((x - low) / s), 0, 2^b - 1), x' = q s + low
over the head's row of a token (``token``) or over a channel in a block of tokens (``channel``); KIVI, eq. 3.
Codes are packed along the channels for both axes, a row of 32-bit words per token and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitatlas.kernels.kv.formats import KvFormat
from bitatlas.kernels.packing import pack_codes, unpack_codes

__all__ = ["PackedKv", "pack_kv", "quantize_dequantize_kv", "quantize_kv", "to_16_bits"]

_TINY, _HUGE = 2.0**-24, 65504.0


def quantize_kv(x: Tensor, fmt: KvFormat, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of K or V.

    Args:
        x: (B, H, T, D), any float type.
        fmt: ``token`` or ``channel``; for ``channel`` T must be whole blocks.
        block: tokens that share a channel's scale.

    Returns:
        codes (B, H, T, D) uint8; scale and minimum, float16, (B, H, T, 1) or (B, H, T / block, D).

    Raises:
        ValueError: a ragged block, or a format that keeps 16 bits.
    """
    if fmt.axis == "none":
        raise ValueError(f"{fmt.name} has no codes")
    b, h, t, d = x.shape
    if fmt.axis == "channel" and t % block:
        raise ValueError(f"{t} tokens are not whole blocks of {block}")
    g = x.detach().float()
    g = g.reshape(b, h, t // block, block, d) if fmt.axis == "channel" else g.unsqueeze(-2)  # (B, H, n, m, D)
    over = -2 if fmt.axis == "channel" else -1
    qmax = (1 << fmt.bits) - 1
    low = g.amin(over, keepdim=True).clamp(-_HUGE, _HUGE).half()
    scale = ((g.amax(over, keepdim=True) - low.float()) / qmax).clamp(_TINY, _HUGE).half()
    codes = ((g - low.float()) / scale.float()).round_().clamp_(0, qmax).to(torch.uint8)
    return codes.reshape(b, h, t, d), scale.squeeze(-2), low.squeeze(-2)


def _restore(codes: Tensor, scale: Tensor, low: Tensor, fmt: KvFormat, block: int) -> Tensor:
    """(B, H, T, D) float32 from codes and their scales."""
    if fmt.axis == "channel":
        scale, low = (s.repeat_interleave(block, 2) for s in (scale, low))
    return codes.float() * scale.float() + low.float()


@dataclass(frozen=True, slots=True)
class PackedKv:
    """Packed tokens of K or V of one layer.

    Attributes:
        words: (B, H, T, words) int32 codes, bit-packed along the channels.
        scale, low: float16, (B, H, T, 1) or (B, H, T / block, D).
        fmt, block, dim: what they mean.
    """

    words: Tensor
    scale: Tensor
    low: Tensor
    fmt: KvFormat
    block: int
    dim: int

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.words, self.scale, self.low

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.words.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, H, T, D)."""
        b, h, t, w = self.words.shape
        codes = unpack_codes(self.words.reshape(b * h * t, w), self.fmt.bits, self.dim).view(
            b, h, t, self.dim
        )
        return _restore(codes, self.scale, self.low, self.fmt, self.block).to(dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedKv:
        """The same with ``change`` applied to each tensor (it must only touch the batch dimension)."""
        return PackedKv(
            change(self.words), change(self.scale), change(self.low), self.fmt, self.block, self.dim
        )

    def drop(self, tokens: int) -> PackedKv:
        """Without the oldest ``tokens`` (whole blocks)."""
        n = tokens if self.fmt.axis == "token" else tokens // self.block
        # Copies, so that what is let go is really freed.
        cut = (self.words[:, :, tokens:].clone(), self.scale[:, :, n:].clone(), self.low[:, :, n:].clone())
        return PackedKv(*cut, self.fmt, self.block, self.dim)

    def extend(self, other: PackedKv) -> PackedKv:
        """With newer tokens behind."""
        words, scale, low = (torch.cat(p, 2) for p in zip(self._tensors, other._tensors))
        return PackedKv(words, scale, low, self.fmt, self.block, self.dim)


def pack_kv(x: Tensor, fmt: KvFormat, block: int) -> PackedKv:
    """`quantize_kv`, bit-packed."""
    b, h, t, d = x.shape
    codes, scale, low = quantize_kv(x, fmt, block)
    words = pack_codes(codes.reshape(b * h * t, d), fmt.bits)
    return PackedKv(words.view(b, h, t, -1), scale.contiguous(), low.contiguous(), fmt, block, d)


def to_16_bits(x: Tensor) -> Tensor:
    """float16 stays, everything else becomes bfloat16."""
    return x.to(torch.float16 if x.dtype == torch.float16 else torch.bfloat16)


def quantize_dequantize_kv(x: Tensor, fmt: KvFormat, block: int) -> Tensor:
    """What x (B, H, T, D) is read back as, in its own type; a last ragged block is never packed and keeps 16 bits."""
    x = to_16_bits(x).to(x.dtype)
    if fmt.axis == "none":
        return x
    whole = x.shape[2] // block * block
    head = _restore(*quantize_kv(x[:, :, :whole], fmt, block), fmt, block).to(x.dtype)
    return torch.cat([head, x[:, :, whole:]], 2) if whole < x.shape[2] else head
