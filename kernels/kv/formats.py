"""How K and V may be kept in the cache, and what that takes. Torch-free; the only byte counter of the cache.

Two axes (KIVI, Liu et al. 2024, section 3): *token*, one scale for the head's row of one token; *channel*, one scale for
one channel over a block of tokens, which suits keys, whose outliers keep to a few channels. The newest tokens stay at 16
bits; they leave that window a whole block at a time, K and V together, so how much is packed follows from the number of
tokens alone, however they came in.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bitatlas.kernels.errors import UserError

__all__ = ["KV16", "KV_BITS", "KV_FORMATS", "KvFormat", "KvLayout", "KvPair", "parse_kv_format", "parse_pair"]

KV_BITS = (2, 4, 8)
_AXES: tuple[Literal["token", "channel"], ...] = ("token", "channel")
_WORD = 32
_SCALE_BYTES = 4  # float16 scale and float16 minimum


@dataclass(frozen=True, slots=True)
class KvFormat:
    """One way to keep K or V.

    Attributes:
        name: ``kv4-token``, ``kv2-channel``, ``kv16``.
        bits: of a code; 16 = kept as it is.
        axis: what shares a scale: a head's row of one ``token``, or a ``channel`` over a block of tokens.
    """

    name: str
    bits: int
    axis: Literal["token", "channel", "none"]

    def packed_bytes(self, tokens: int, heads: int, dim: int, block: int) -> int:
        """Bytes of ``tokens`` packed tokens (whole blocks) of ``heads`` heads of ``dim`` channels."""
        if self.axis == "none":
            return tokens * heads * dim * 2
        codes = tokens * heads * -(-dim * self.bits // _WORD) * 4
        rows = tokens if self.axis == "token" else -(-tokens // block) * dim
        return codes + rows * heads * _SCALE_BYTES

    def bits_per_element(self, dim: int, block: int = 32) -> float:
        """Effective bits of a packed element, scales and minima counted."""
        return self.packed_bytes(block, 1, dim, block) * 8 / (block * dim)


class KvPair(NamedTuple):
    """Formats of K and V of one layer."""

    k: KvFormat
    v: KvFormat

    @property
    def name(self) -> str:
        """``kv8-channel/kv4-token``."""
        return f"{self.k.name}/{self.v.name}"


KV16 = KvFormat("kv16", 16, "none")
# Few bits first, as in the table of weight formats; the pass-through last.
KV_FORMATS: dict[str, KvFormat] = {
    f.name: f for f in (*(KvFormat(f"kv{b}-{axis}", b, axis) for axis in _AXES for b in KV_BITS), KV16)
}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Rules of the window at 16 bits, the same for all layers.

    Attributes:
        block: tokens that leave the window together, and that share a channel's scale.
        residual: at least so many of the newest tokens stay in the window.
    """

    block: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 1024 or not 0 <= self.residual <= 1 << 20:
            raise UserError(
                "the window of the KV cache cannot be like this",
                found=f"block {self.block}, residual {self.residual}",
                fix="a block of 1 to 1024 tokens, a residual of 0 or more",
            )

    def packed(self, tokens: int) -> int:
        """How many of the oldest tokens are packed when the cache has seen ``tokens``."""
        return max(0, tokens - self.residual) // self.block * self.block

    def split(self, tokens: int, window: int = 0) -> tuple[int, int]:
        """(packed, plain) tokens in memory; a sliding ``window`` lets go of whole blocks that nobody sees any more."""
        packed = self.packed(tokens)
        plain = tokens - packed
        if window:
            packed -= min(packed, max(0, tokens - window) // self.block * self.block)
        return packed, plain

    def layer_bytes(self, fmt: KvFormat, tokens: int, heads: int, dim: int, window: int = 0) -> int:
        """Exact bytes of K (or V) of one layer and one sequence of ``tokens``."""
        if fmt.axis == "none":
            return (min(tokens, window) if window else tokens) * heads * dim * 2
        packed, plain = self.split(tokens, window)
        return fmt.packed_bytes(packed, heads, dim, self.block) + plain * heads * dim * 2


def parse_kv_format(name: str) -> KvFormat:
    """The KV format called ``name``.

    Raises:
        UserError: no such format; the message names the nearest ones.
    """
    found = KV_FORMATS.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), KV_FORMATS, n=3, cutoff=0.4)
        raise UserError(f"there is no KV format called {name!r}", found=f"nearest: {', '.join(near) or 'none'}",
                        fix=f"one of {', '.join(KV_FORMATS)}")  # fmt: skip
    return found


def parse_pair(name: str) -> KvPair:
    """The pair written ``K/V``; one name stands for both.

    Raises:
        UserError: an unknown format.
    """
    k, _, v = name.partition("/")
    return KvPair(parse_kv_format(k), parse_kv_format(v or k))
