"""An allocation's K/V formats in an engine's words: what it can represent, and what it does to the rest.

Engines take one type for all layers (llama.cpp one for K and one for V, vLLM one pair and a list of layers that stay at
16 bits). The nearest setting is the smallest that gives the average layer no fewer bits than planned; what then differs is
said, layer by layer. Sources: llama.cpp's --cache-type-k/v, vLLM's --kv-cache-dtype and --kv-cache-dtype-skip-layers,
mlx_lm's --kv-bits (all read 2026-07). transformers' QuantizedCache takes one number of bits too, but its layers can be put
together one by one in Python (5.23): each has one number of bits for K and V, and cannot slide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bitatlas.analysis.schema import KV16, Allocation, KvGeometry, KvPair, ModelIndex

__all__ = ["KvSetting", "kv_setting"]

# Engine -> (bits of K, bits of V) -> its option. 16 bits are the default and need none.
_OPTIONS: dict[str, dict[tuple[int, int], str]] = {
    "vllm": {
        (4, 4): "--kv-cache-dtype int4_per_token_head",
        (8, 4): "--kv-cache-dtype turboquant_k8v4",
        (8, 8): "--kv-cache-dtype fp8",
    },
    "llama.cpp": {
        (k, v): f"--cache-type-k {kt} --cache-type-v {vt}" + (" -fa on" if v < 16 else "")
        for k, kt in ((4, "q4_0"), (8, "q8_0"), (16, "f16"))
        for v, vt in ((4, "q4_0"), (8, "q8_0"), (16, "f16"))
        if (k, v) != (16, 16)
    },
    "mlx": {(b, b): f"--kv-bits {b} --kv-group-size 64" for b in (2, 3, 4, 6, 8)},
}
_OWN_CODES = {
    "vllm": "vLLM rounds in its own way (fp8, or codes per token and head)",
    "llama.cpp": "ggml rounds blocks of 32 channels of a token, keys too",
    "mlx": "MLX rounds groups of 64 channels of a token, keys too",
}


@dataclass(frozen=True, slots=True)
class KvSetting:
    """One engine's setting.

    Attributes:
        flags: for its command line, "" for 16 bits.
        files: name -> text, where the cache is made in Python.
        bits: of K and V where the flags apply.
        exact: every layer gets the bits that were planned.
        notes: what differs from the plan.
    """

    flags: str
    bits: tuple[int, int]
    exact: bool
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def kv_setting(engine: str, allocation: Allocation, index: ModelIndex) -> KvSetting:
    """The nearest setting of ``engine`` (``vllm``, ``llama.cpp``, ``mlx``, ``bitatlas`` or ``transformers``)."""
    plan: Mapping[int, KvPair] = allocation.kv_plan
    if not plan or index.kv is None:
        return KvSetting("", (16, 16), True)
    layers = {layer: plan.get(layer, KvPair(KV16, KV16)) for layer in index.kv.layers}
    wanted = {layer: (pair.k.bits, pair.v.bits) for layer, pair in layers.items()}
    if engine == "bitatlas":
        return KvSetting(
            "",
            (0, 0),
            True,
            (f"the KV cache of {len(plan)} layers is packed as planned when bitatlas generates",),
        )
    if engine not in _OPTIONS:
        return _transformers(allocation, index.kv, wanted)
    packed = {layer: bits for layer, bits in wanted.items() if bits != (16, 16)}
    # Layers at 16 bits can be left out of vLLM's setting; elsewhere they count.
    asked = packed if engine == "vllm" else wanted
    mean = [sum(b[i] for b in asked.values()) / len(asked) for i in (0, 1)]
    options = _OPTIONS[engine]
    # A tenth of a bit below the mean still counts as reaching it: one layer in forty must not double the cache.
    enough = [o for o in options if o[0] >= mean[0] - 0.1 and o[1] >= mean[1] - 0.1]
    if not enough:
        return KvSetting(
            "",
            (16, 16),
            False,
            (f"{engine} has nothing between this plan and 16 bits: the cache stays at 16 bits",),
        )
    chosen = min(enough, key=sum)
    flags, notes = options[chosen], []
    apart = sorted(layer for layer, bits in wanted.items() if bits == (16, 16)) if engine == "vllm" else []
    if apart:
        flags += " --kv-cache-dtype-skip-layers " + " ".join(map(str, apart))
        notes.append(f"{len(apart)} layers stay at 16 bits by name")
    fewer = [i for i, b in asked.items() if b[0] > chosen[0] or b[1] > chosen[1]]
    more = [i for i, b in asked.items() if i not in fewer and b != chosen]
    exact = not fewer and not more
    if not exact:
        words = f"{engine} takes one KV type for all layers: K at {chosen[0]} and V at {chosen[1]} bits is nearest"
        notes.append(f"{words}; {len(fewer)} layers get fewer bits than planned, {len(more)} get more")
    notes.append(f"{_OWN_CODES[engine]}: the KV damage was measured for other codes")
    return KvSetting(flags, chosen, exact, tuple(notes))


def _transformers(
    allocation: Allocation, geometry: KvGeometry, wanted: Mapping[int, tuple[int, int]]
) -> KvSetting:
    """A cache of HQQ layers where the plan packs, of transformers' own layers elsewhere."""
    bits = {
        layer: min(b for b in (2, 4, 8, 16) if b >= sum(pair) / 2 - 0.1)
        for layer, pair in wanted.items()
        if not geometry.windows[layer]
    }
    packed = {layer: b for layer, b in bits.items() if b < 16}
    planned = [layer for layer, pair in wanted.items() if pair != (16, 16)]
    if not packed:
        return KvSetting(
            "",
            (16, 16),
            False,
            ("transformers has no quantised KV layer for this plan: the cache stays at 16 bits",),
        )
    notes = [f"kv_cache.py makes the KV cache for transformers: {len(packed)} layers packed by hqq, "
             "model.generate(..., past_key_values=kv_cache(model))"]  # fmt: skip
    apart = [layer for layer in planned if layer in bits and wanted[layer] != (bits[layer],) * 2]
    if apart:
        notes.append(f"K and V of a layer share their bits there: {len(apart)} layers get the nearest")
    sliding = [layer for layer in planned if geometry.windows[layer]]
    if sliding:
        notes.append(
            f"{len(sliding)} layers with a sliding KV window stay at 16 bits: no quantised layer slides"
        )
    notes.append(
        "hqq rounds groups of channels of a token, keys too: the KV damage was measured for other codes"
    )
    group = math.gcd(64, geometry.head_dim, geometry.v_dim or geometry.head_dim)
    script = _CACHE % (packed, group, allocation.kv_block + allocation.kv_residual)
    chosen = max(packed.values())
    return KvSetting("", (chosen, chosen), not apart and not sliding, tuple(notes), {"kv_cache.py": script})


_CACHE = '''"""The KV cache as planned: model.generate(..., past_key_values=kv_cache(model)); needs the hqq package."""
from transformers import DynamicCache
from transformers.cache_utils import HQQQuantizedLayer

BITS = %r  # layer -> bits of K and V; the others stay at 16


def kv_cache(model):
    cache = DynamicCache(config=model.config)
    for layer, bits in BITS.items():
        cache.layers[layer] = HQQQuantizedLayer(
            nbits=bits, axis_key=1, axis_value=1, q_group_size=%d, residual_length=%d
        )
    return cache
'''
