"""Tiny checkpoints with random weights, one per family, with a byte-level tokenizer that really works.

Sizes are odd on purpose (no power of two, no square matrix where a transpose could hide).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 300
_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
_MOE = _DENSE | {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = _DENSE | {
    "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8,
    "kv_lora_rank": 12, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DENSE),
    "llama_tied": ("LlamaConfig", _DENSE | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _DENSE),
    "qwen3": ("Qwen3Config", _DENSE),
    "mistral": ("MistralConfig", _DENSE | {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", _DENSE | {"tie_word_embeddings": True, "sliding_window": 16}),
    "phi3": ("Phi3Config", _DENSE | {"hidden_size": 32, "pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 256},
    ),
    "opt": (
        "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "word_embed_proj_dim": 24,
         "num_attention_heads": 4, "max_position_embeddings": 256},
    ),
    "mixtral": ("MixtralConfig", _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _MOE | {"shared_expert_intermediate_size": 28, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _MOE),
    "olmoe": ("OlmoeConfig", _DENSE | {"head_dim": 6, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", _DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK | {"num_hidden_layers": 3}),
    "gpt_oss": ("GptOssConfig", _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": (
        "Llama4TextConfig",
        _DENSE | {"intermediate_size_mlp": 44, "num_local_experts": 4, "num_experts_per_tok": 1,
                  "interleave_moe_layer_step": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "granitemoe_shared": (
        "GraniteMoeSharedConfig",
        _DENSE | {"head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 28,
                  "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _DENSE.items() if k not in ("head_dim", "num_key_value_heads")}),
    "qwen3_next": (
        "Qwen3NextConfig",
        _MOE | {"shared_expert_intermediate_size": 28, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"]},
    ),
    # The last two layers read the cache of the second and the first; two AltUp copies of the stream.
    "gemma3n": (
        "Gemma3nTextConfig",
        _DENSE | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 16, "tie_word_embeddings": True,
                  "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCAB,
                  "hidden_size_per_layer_input": 12, "altup_num_inputs": 2, "laurel_rank": 6,
                  "activation_sparsity_pattern": [0.0] * 4},
    ),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip
"""Families beyond the promised ones; they keep the rules honest."""
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")


def make_checkpoint(
    family: str, folder: Path, *, dtype: str = "float32", shard: str = "5GB", **changes: Any
) -> Path:
    """Save a tiny random model of ``family`` into ``folder``: weights, config, tokenizer. ``changes`` go to the config."""
    import torch
    import transformers

    kind, settings = (FAMILIES | MORE)[family]
    config = getattr(transformers, kind)(**(settings | changes))
    torch.manual_seed(sum(map(ord, family)))
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit norms would hide a mistake in them.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 257 tokens: any text in, the same text out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
