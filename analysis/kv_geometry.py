"""What a token costs in the KV cache, from config.json alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitatlas.analysis.schema import KvGeometry

__all__ = ["config_int", "kv_geometry"]

_ALIASES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts", "moe_topk"),
    "vocab": ("vocab_size", "n_vocab"),
}


def config_int(config: Mapping[str, Any], what: str, default: int = 0) -> int:
    """A count from the config under any of its usual names; ``default`` when absent or not a sensible number."""
    for name in _ALIASES[what]:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            return value
    return default


def kv_geometry(config: Mapping[str, Any]) -> KvGeometry | None:
    """Heads, head size and window of every layer; None when the config does not say.

    Latent attention (DeepSeek's MLA) keeps one latent and one rotary key per token, in place of K and V: one head whose K
    has ``kv_lora_rank`` and whose V has ``qk_rope_head_dim`` numbers, as transformers' cache holds them.
    """
    layers, heads = config_int(config, "layers"), config_int(config, "heads")
    if not layers or not heads or layers > 10_000:
        return None
    rank = config.get("kv_lora_rank")
    if isinstance(rank, int) and rank > 0:
        rope = config.get("qk_rope_head_dim")
        return KvGeometry(
            (1,) * layers, rank, (0,) * layers, rope if isinstance(rope, int) and rope > 0 else 0
        )
    kv_heads = config_int(config, "kv_heads", 1 if config.get("multi_query") is True else heads)
    head_dim = config.get("head_dim")
    if not isinstance(head_dim, int) or head_dim < 1:
        head_dim = config_int(config, "hidden") // heads
    if not head_dim:
        return None
    kinds = _layer_kinds(config, layers)
    window = config.get("sliding_window") or config.get("attention_chunk_size") or 0
    window = window if isinstance(window, int) and window > 0 else 0
    shared = config.get("num_kv_shared_layers")
    own = layers - (shared if isinstance(shared, int) and 0 < shared < layers else 0)
    no_cache = ("linear_attention", "mamba", "recurrent", "conv")
    return KvGeometry(
        tuple(0 if kinds[i] in no_cache or i >= own else kv_heads for i in range(layers)),
        head_dim,
        tuple(window if kinds[i] in ("sliding_attention", "chunked_attention") else 0 for i in range(layers)),
    )


def _layer_kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    """Attention kind of every layer: ``layer_types`` when given, else the older ways of saying the same."""
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [str(t) for t in types]
    model_type = str(config.get("model_type", ""))
    if model_type.startswith(("qwen2", "qwen3")):
        start = config.get("max_window_layers") if config.get("use_sliding_window") else layers
        start = start if isinstance(start, int) else layers
        return ["sliding_attention" if i >= start else "full_attention" for i in range(layers)]
    pattern = config.get("sliding_window_pattern")
    if not isinstance(pattern, int) or pattern < 1:
        # Gemma 2 and gpt-oss alternate, Gemma 3 has five sliding layers to one full; Mistral slides everywhere.
        pattern = {"gemma2": 2, "gpt_oss": 2, "gemma3": 6, "gemma3_text": 6}.get(model_type, 0)
    return [
        "full_attention" if pattern and (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
