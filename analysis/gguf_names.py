"""GGUF files: the index of what the imported checkpoint will be, from the header alone. Torch-free."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitatlas.analysis.gguf_header import GgufArray, GgufHeader, GgufTensor, read_gguf_header
from bitatlas.analysis.model_index import build_index, sampled_digest
from bitatlas.analysis.safetensors_header import TensorInfo
from bitatlas.analysis.schema import ModelIndex
from bitatlas.kernels.errors import UserError

__all__ = ["ARCHITECTURES", "hf_config", "hf_names", "index_gguf"]

ARCHITECTURES: dict[str, str] = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
"""general.architecture -> model_type, for what the importer can convert completely."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
_GEMMA = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
          "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
_PHI3 = {"ffn_up": "mlp.gate_up_proj"}
_GPT2_TOP = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
             "output": "lm_head"}  # fmt: skip
_GPT2 = {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}  # fmt: skip
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)(?P<suffix>\.weight|\.bias)")
# Tables that llama.cpp derives from the config; the imported checkpoint does not store them.
_DERIVED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def index_gguf(path: str | Path) -> ModelIndex:
    """Index of a GGUF file; unit keys and shapes are those of the checkpoint that `import_gguf` makes from it.

    Raises:
        UserError: a malformed file, or an architecture that cannot be imported.
    """
    path = Path(path).expanduser().absolute()
    header = read_gguf_header(path)
    config = hf_config(header)
    infos: list[TensorInfo] = []
    for tensor in header.tensors.values():
        for name, shape in hf_names(tensor, config["model_type"]):
            # What the import will hold: bf16.
            infos.append(TensorInfo(name, "BF16", shape, 0, 2 * math.prod(shape)))
    types = sorted({t.type for t in header.tensors.values()} - {"F32", "F16", "BF16"})
    notes = ["the first job turns the file into a bf16 checkpoint folder, once"]
    if types:
        notes.append(
            f"the weights are already quantised ({', '.join(types)}); damage is measured against those"
        )
    digest = hashlib.sha256(header.sha256.encode() + sampled_digest(path, header.file_size)).hexdigest()
    # For people only: the importer's config does without.
    longest = header.metadata.get(f"{header.metadata['general.architecture']}.context_length")
    return build_index(
        path, {"max_position_embeddings": longest, **config}, infos, digest, name=path.stem, architecture=f"GGUF {header.metadata['general.architecture']}",
        notes=notes, source="gguf",
    )  # fmt: skip


def hf_names(tensor: GgufTensor, model_type: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the tensor in the imported checkpoint; one each for the experts of a stack.

    Raises:
        UserError: a name that the architecture does not have.
    """
    if tensor.name in _DERIVED:
        return
    match = _NAME.fullmatch(tensor.name)
    stem, layer = (match["stem"], match["layer"]) if match else ("", None)
    if match and layer is None:
        top = _GPT2_TOP if model_type == "gpt2" else _TOP
        if stem in top:
            yield top[stem] + match["suffix"], tensor.shape
            return
    elif match and stem in _EXPERTS and len(tensor.shape) == 3 and model_type.endswith("_moe"):
        for e in range(tensor.shape[0]):
            yield f"model.layers.{layer}.mlp.experts.{e}.{_EXPERTS[stem]}.weight", tensor.shape[1:]
        return
    elif match:
        special = {"gemma2": _GEMMA, "gemma3_text": _GEMMA, "phi3": _PHI3, "gpt2": _GPT2}.get(model_type, {})
        name = special.get(stem) or (_BLOCK.get(stem) if model_type != "gpt2" else None)
        if name is not None:
            prefix = "transformer.h" if model_type == "gpt2" else "model.layers"
            shape = tensor.shape
            if model_type == "gpt2" and len(shape) == 2:
                shape = shape[::-1]  # Conv1D keeps (in, out).
            if stem == "ffn_gate_inp_shexp":
                shape = (1, *shape[-1:])
            yield f"{prefix}.{layer}.{name}{match['suffix']}", shape
            return
    raise UserError(
        f"the GGUF tensor {tensor.name[:120]!r} has no place in a {model_type} checkpoint", found=str(tensor.shape),
        fix="take the Hugging Face checkpoint that the file was made from",
    )  # fmt: skip


def hf_config(header: GgufHeader) -> dict[str, Any]:
    """The fields of config.json that the header (and the tensors' shapes) decide.

    Raises:
        UserError: an architecture that cannot be imported, or counts that are missing.
    """
    meta, tensors = header.metadata, header.tensors
    arch = str(meta.get("general.architecture", ""))

    def number(key: str) -> int:
        value = meta.get(f"{arch}.{key}", 0)
        return value if isinstance(value, int) and 0 < value < 1 << 31 else 0

    if arch not in ARCHITECTURES or (arch == "llama" and number("expert_count")):
        what = "llama with experts (Mixtral)" if arch in ARCHITECTURES else f"architecture {arch!r}"
        raise UserError(
            f"GGUF files of this architecture cannot be imported ({header.path.name})", found=what,
            fix=f"importable: {', '.join(ARCHITECTURES)}; or take the Hugging Face checkpoint",
        )  # fmt: skip
    layers, hidden, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    embed = tensors.get("token_embd.weight")
    if not layers or not hidden or not heads or embed is None or len(embed.shape) != 2:
        raise UserError(f"{header.path.name} lacks basic counts", found=f"{layers} layers, hidden {hidden}, {heads} heads",
                        fix="convert the model to GGUF again")  # fmt: skip
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[arch], "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "vocab_size": embed.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }  # fmt: skip
    if arch == "gpt2":
        positions = tensors.get("position_embd.weight")
        if positions is not None:
            config["n_positions"] = positions.shape[0]
        return config | {"n_inner": number("feed_forward_length") or None}
    config["num_key_value_heads"] = number("attention.head_count_kv") or heads
    q = tensors.get("blk.0.attn_q.weight")
    config["head_dim"] = number("attention.key_length") or (q.shape[0] // heads if q else hidden // heads)
    if arch.endswith("moe"):
        gate = tensors.get("blk.0.ffn_gate_exps.weight")
        shared = tensors.get("blk.0.ffn_gate_shexp.weight")
        config |= {"num_experts": number("expert_count"), "num_experts_per_tok": number("expert_used_count")}
        if gate is not None and len(gate.shape) == 3:
            config["moe_intermediate_size"] = gate.shape[1]
        if shared is not None:
            config["shared_expert_intermediate_size"] = shared.shape[0]
    window = meta.get(f"{arch}.attention.sliding_window")
    if isinstance(window, int) and not isinstance(window, GgufArray) and window > 0 and arch != "qwen2":
        config["sliding_window"] = window
    return config
