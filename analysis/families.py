"""Name rules: what a checkpoint's tensor is, from its name, shape and model type alone. Torch-free.

One rule set covers the usual families (Llama, Qwen, Mistral, Gemma, Phi-3, GPT-2, OPT, Mixtral, Qwen-MoE, OLMoE,
DeepSeek, gpt-oss, Llama 4, Granite-MoE); a 2-D ``.weight`` that no rule knows is a plain ``linear``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ROLE_ORDER", "Place", "bare_name", "classify", "layer_of"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_WRAPPERS = ("model.", "transformer.", "language_model.", "text_model.", "decoder.", "gpt_neox.", "backbone.")

_LEAF_ROLES: dict[str, str] = {
    **dict.fromkeys(("q_proj", "wq", "query"), "q"),
    **dict.fromkeys(("k_proj", "wk", "key"), "k"),
    **dict.fromkeys(("v_proj", "wv", "value"), "v"),
    **dict.fromkeys(("o_proj", "wo", "out_proj"), "o"),
    **dict.fromkeys(("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "W_pack"), "qkv"),
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3"), "up"),
    **dict.fromkeys(("down_proj", "w2"), "down"),
    **dict.fromkeys(("gate_up_proj",), "gate_up"),
    **dict.fromkeys(("fc1", "c_fc", "dense_h_to_4h", "fc_in"), "fc1"),
    **dict.fromkeys(("fc2", "dense_4h_to_h", "fc_out"), "fc2"),
    "q_a_proj": "q_a",
    "q_b_proj": "q_b",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_b_proj": "kv_b",
    "embed_tokens_per_layer": "embed",
    "input_linear": "gate_up",  # Granite's shared MLP
    "output_linear": "down",
    **dict.fromkeys(
        ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings"), "embed"
    ),
    **dict.fromkeys(("lm_head", "embed_out"), "head"),
}
# Granite-MoE and Aria name the fused stacks differently from everybody else.
_FUSED_ROLES = {"gate_up_proj": "gate_up", "down_proj": "down", "gate_proj": "gate", "up_proj": "up",
                "input_linear": "gate_up", "output_linear": "down"}  # fmt: skip
_ROUTERS = {"gate", "router", "shared_expert_gate", "wg", "gate_network"}
# Applied through their bare weight inside a scan kernel, never as a layer of their own.
_STATE_SPACE = {"dt_proj"}
_POSITIONS = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "token_type_embeddings",
              "pos_embed", "relative_attention_bias"}  # fmt: skip
_OTHER_MODALITY = re.compile(
    r"(?:^|\.)(vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|embed_vision|embed_audio)\."
)
_CONV1D_TYPES = {"gpt2", "openai-gpt"}
_CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_TRANSPOSED_TYPES = {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}

ROLE_ORDER: tuple[str, ...] = (
    "embed", "q", "q_a", "q_b", "kv_a", "kv_b", "k", "v", "qkv", "o", "gate", "up", "gate_up", "fc1", "down", "fc2",
    "linear", "shared_gate", "shared_up", "shared_gate_up", "shared_down", "head",
)  # fmt: skip
"""Order of the units inside a layer, and of roles in menus and heat maps."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a tensor is.

    Attributes:
        role: as in `QuantUnit.role`; ``gate_up`` with ``stacked`` means two units per expert.
        layer: block index, -1 outside the blocks.
        expert: expert index, -1 for none (and for stacked tensors, which hold them all).
        stacked: a 3-D tensor (experts, ., .).
        transposed: (cols, rows) on disk; interleaved: gate and up alternate.
    """

    role: str
    layer: int
    expert: int = -1
    stacked: bool = False
    transposed: bool = False
    interleaved: bool = False


def layer_of(name: str) -> int:
    """Block index of a tensor or module name, -1 outside the blocks."""
    match = _LAYER.search(name + ".")
    return int(match[1]) if match else -1


def bare_name(name: str) -> str:
    """The name without wrapper prefixes: GPT-2's ``transformer.h.0…`` and the hub's ``h.0…`` become the same."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def classify(name: str, shape: tuple[int, ...], model_type: str, hidden: int = 0) -> Place | None:
    """What the tensor ``name`` is, or None when it stays as it is (norm, bias, router, position, other modality)."""
    if _OTHER_MODALITY.search(name) or 0 in shape:
        return None
    path = name.removesuffix(".weight").split(".")
    leaf, parent = path[-1], path[-2] if len(path) > 1 else ""
    if len(shape) == 3:
        return _stacked(path, shape, layer_of(name), model_type, hidden)
    if len(shape) != 2 or min(shape) < 2 or not name.endswith(".weight"):
        return None
    if (
        leaf in _ROUTERS
        or parent == "router"
        or leaf in _POSITIONS | _STATE_SPACE
        or "norm" in leaf
        or "conv" in leaf
    ):
        return None
    expert = _EXPERT.search(name)
    role = _LEAF_ROLES.get(leaf)
    if role is None:
        attention = "attn" in parent or "attention" in parent
        if leaf in ("c_proj", "dense") and (attention or parent == "mlp"):
            role = "o" if attention else "fc2"
        elif leaf == "output" and len(path) <= 2:
            role = "head"
        else:
            role = "linear"
    if any(p.startswith("shared_") for p in path[:-1]) and role in ("gate", "up", "down", "gate_up"):
        role = f"shared_{role}"
    transposed = model_type in _CONV1D_TYPES and leaf in _CONV1D_LEAVES
    return Place(role, layer_of(name), int(expert[1]) if expert else -1, transposed=transposed)


def _stacked(
    path: list[str], shape: tuple[int, ...], layer: int, model_type: str, hidden: int
) -> Place | None:
    """Fused experts: (E, out, in), or (E, in, out) in gpt-oss and Llama 4."""
    role = _FUSED_ROLES.get(path[-1])
    if role is None or not (path[-1].endswith("_linear") or any("experts" in p for p in path[:-1])):
        return None
    transposed = model_type in _TRANSPOSED_TYPES
    _, a, b = shape
    if hidden in (a, b) and a != b and 2 * hidden not in (a, b):
        # One side is the hidden size: it is the input of gate and up, and the output of down.
        transposed = (a == hidden) != (role == "down")
    return Place(role, layer, -1, True, transposed, model_type == "gpt_oss" and role == "gate_up")
