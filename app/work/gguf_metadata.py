"""What a GGUF says about a model beside its tensors: hyper-parameters and tokenizer, as convert_hf_to_gguf writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitatlas.kernels.errors import UserError

__all__ = ["ROPE_PERMUTED", "add_config", "add_tokenizer", "read_config"]

ROPE_PERMUTED = ("llama", "mistral", "mixtral")
"""Model types whose q and k rows are reordered: ggml rotates neighbouring pairs, transformers two halves."""

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression that splits text before a byte-level BPE -> its name in llama.cpp.
_PRE = {_SPLIT % r"\p{N}{1,3}": "llama-bpe", _SPLIT % r"\p{N}": "qwen2"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        UserError: a rotary embedding that is scaled, or another activation than SiLU: the tensors that those need are
            not written here.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    act = config.get("hidden_act", "silu")
    if kind != "default" or act != "silu":
        raise UserError("the GGUF of this model is not written here", found=f"rope type {kind}, activation {act}",
                        fix="export without --weights and run the command")  # fmt: skip
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UserError("llama.cpp wants experts in every layer of this architecture",
                        found=f"mlp_only_layers {config.get('mlp_only_layers')}")  # fmt: skip
    return config


def add_config(writer: Any, config: dict[str, Any], name: str) -> None:
    """The hyper-parameters, for a `gguf.GGUFWriter`."""
    rope = config.get("rope_parameters") or {}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if width := config.get("moe_intermediate_size"):
            writer.add_expert_feed_forward_length(width)
        if shared := config.get("shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(shared)


def add_tokenizer(writer: Any, folder: Path, vocab: int) -> None:
    """Tokens, types, merges, special ids and the chat template of a byte-level BPE.

    Raises:
        UserError: no tokenizer.json, another kind of tokenizer, or a pre-tokenizer that llama.cpp has no known name for.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            "there is no tokenizer.json",
            found=str(folder),
            fix="export without --weights and run the command",
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    model, pre = data["model"], _pre_tokenizer(data)
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre is None:
        raise UserError("this tokenizer is not written here; byte-level BPE of a known kind is",
                        found=f"{model.get('type')}, pre-tokenizer {str(data.get('pre_tokenizer'))[:80]}",
                        fix="export without --weights and run the command")  # fmt: skip
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = [int(gguf.TokenType.UNUSED)] * vocab
    for text, i in model["vocab"].items():
        if i < vocab:
            tokens[i], types[i] = text, int(gguf.TokenType.NORMAL)
    for token in data.get("added_tokens", []):
        if token["id"] < vocab:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = int(
                gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
            )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not model.get("merges"):
        # llama.cpp does not load a BPE without merges. One whose result is no token changes nothing: it falls back to the parts.
        known, single = set(tokens), [t for t, kind in zip(tokens, types) if kind == 1 and len(t) == 1]
        writer.add_token_merges([next(f"{a} {b}" for a in single for b in single if a + b not in known)])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(data: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer; None when it has none that is known here."""
    pre = data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return _PRE.get(str(steps[0].get("pattern", {}).get("Regex", "")))
    return None
