"""K and V bits layer by layer, as text: ``8/4`` for all layers, ``0-5=8/8;6-29:2=8/4`` for some; what is not named keeps 16."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bitatlas.analysis.schema import KvPair, ModelIndex, UserError, parse_pair
from bitatlas.app.budgets import uniform_kv
from bitatlas.app.selection import Selection, read_runs

__all__ = [
    "KV_BITS",
    "KvBits",
    "cache_pairs",
    "decode_kv",
    "encode_kv",
    "kv_pairs",
    "pair_bits",
    "pair_names",
]

KV_BITS = (16, 8, 4, 2)
KvBits = Mapping[int, tuple[int, int]]
"""Layer -> bits of K and V."""


def decode_kv(text: str, layers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Bits of every layer that keeps a cache; later parts win.

    Raises:
        UserError: not written like this, a width that the cache does not have, a layer that keeps no cache.
    """
    out = dict.fromkeys(layers, (16, 16))
    for part in filter(None, text.split(";")):
        runs, mark, bits = part.rpartition("=")
        found = re.fullmatch(r"(\d+)(?:/(\d+))?", bits.strip())
        pair = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not set(pair) <= set(KV_BITS):
            raise UserError("bits of K and V cannot be read", found=part[:80],
                            fix=f"8/4, or 0-5=8/8;6-29=8/4, of {', '.join(map(str, KV_BITS))} bits")  # fmt: skip
        try:
            where = read_runs(runs, max(layers, default=-1) + 1, "layer") if mark else tuple(layers)
        except ValueError as e:
            raise UserError("the layers of the K and V bits cannot be read", found=f"{part[:80]}: {e}", fix="0-5=8/8;6-29=8/4") from None  # fmt: skip
        strange = [i for i in where if i not in out]
        if strange:
            raise UserError(f"layer {strange[0]} keeps no K and V of its own", found=part[:80])
        out |= dict.fromkeys(where, pair)
    return out


def encode_kv(bits: KvBits) -> str:
    """Inverse of `decode_kv`; short where all layers are alike."""
    if len(set(bits.values())) <= 1:
        k, v = next(iter(bits.values()), (16, 16))
        return f"{k}/{v}"
    by_pair: dict[tuple[int, int], list[int]] = {}
    for layer, pair in sorted(bits.items()):
        by_pair.setdefault(pair, []).append(layer)
    return ";".join(
        f"{Selection.of(at).encode()}={k}/{v}" for (k, v), at in by_pair.items() if (k, v) != (16, 16)
    )


def pair_bits(name: str) -> tuple[int, int]:
    """Bits of K and V of a pair of formats, ``kv8-channel/kv4-token`` -> (8, 4)."""
    pair = parse_pair(name)
    return int(pair.k.bits), int(pair.v.bits)


def pair_names(pairs: Mapping[int, KvPair]) -> dict[int, tuple[str, str]]:
    """As an allocation keeps them: layer -> names of K's and V's format."""
    return {layer: (pair.k.name, pair.v.name) for layer, pair in pairs.items()}


def kv_pairs(index: ModelIndex, text: str) -> dict[int, KvPair]:
    """Layer -> formats: keys by channel, values by token (KIVI); layers at 16 bits are left out.

    Raises:
        UserError: see `decode_kv`.
    """
    if index.kv is None:
        return {}
    out = {}
    for layer, bits in decode_kv(text, index.kv.layers).items():
        if bits != (16, 16):
            names = ["kv16" if b == 16 else f"kv{b}-{axis}" for b, axis in zip(bits, ("channel", "token"))]
            out[layer] = parse_pair("/".join(names))
    return out


def cache_pairs(index: ModelIndex, kv_bits: float, kv_plan: str) -> dict[int, KvPair]:
    """Formats of K and V by layer: ``kv_plan``'s, or ``kv_bits`` everywhere; nothing at 16 bits.

    Raises:
        UserError: both are given, or a width that the cache does not have.
    """
    if kv_plan and kv_bits != 16:
        raise UserError("K and V have bits twice", found=f"--kv-bits {kv_bits:g} and --kv-plan {kv_plan}", fix="leave one of them out")  # fmt: skip
    return kv_pairs(index, kv_plan) if kv_plan else uniform_kv(index, kv_bits, kv_bits)
