"""ggml's tensor types and names: block sizes, llama-quantize's fallbacks, how a checkpoint's tensors are called in GGUF."""

from __future__ import annotations

from bitatlas.analysis.schema import Format, QuantUnit

__all__ = [
    "ARCHITECTURES", "BLOCKS", "MAKEABLE", "WRITTEN", "exact_type", "fallback", "ggml_type", "gguf_name", "has_type", "tensor_bytes", "type_of",
]  # fmt: skip

BLOCKS: dict[str, tuple[int, int]] = {
    "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
    "mxfp4": (32, 17), "f16": (1, 2), "bf16": (1, 2), "f32": (1, 4),
}  # fmt: skip
"""Type -> (weights in a block, bytes of a block)."""

_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_K_QUANTS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
# Groups of 32 are what the older types have; q4_1 and q5_1 store a minimum, as asymmetric formats do.
_GROUP_32 = {(4, True): "q4_0", (4, False): "q4_1", (5, True): "q5_0", (5, False): "q5_1"}

MAKEABLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "f16", "bf16", "f32")
"""Types that the gguf package can make; k-quants need llama-quantize."""

WRITTEN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
"""Model types whose GGUF is written here; the rest goes through llama.cpp's own converter."""

ARCHITECTURES: dict[str, str] = {
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3",
    "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE", "gemma": "GEMMA", "gemma2": "GEMMA2", "gemma3": "GEMMA3",
    "gemma3_text": "GEMMA3", "phi3": "PHI3", "gpt2": "GPT2", "olmo": "OLMO", "olmo2": "OLMO2", "olmoe": "OLMOE",
    "deepseek_v2": "DEEPSEEK2", "deepseek_v3": "DEEPSEEK2", "gpt_oss": "GPT_OSS", "smollm3": "SMOLLM3",
    "granite": "GRANITE", "granitemoe": "GRANITE_MOE", "starcoder2": "STARCODER2", "glm4": "GLM4",
    "glm4_moe": "GLM4_MOE", "seed_oss": "SEED_OSS",
}  # fmt: skip
"""transformers model type -> name in gguf.MODEL_ARCH."""

_ROLES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output", "gate": "ffn_gate",
    "up": "ffn_up", "gate_up": "ffn_up", "down": "ffn_down", "fc1": "ffn_up", "fc2": "ffn_down",
    "q_a": "attn_q_a", "q_b": "attn_q_b", "kv_a": "attn_kv_a_mqa", "kv_b": "attn_kv_b",
    "shared_gate": "ffn_gate_shexp", "shared_up": "ffn_up_shexp", "shared_down": "ffn_down_shexp",
}  # fmt: skip


def has_type(fmt: Format) -> bool:
    """Whether some ggml type stands for the format: integers, 16 bits and MXFP4; no other table, no outliers."""
    return fmt.kind in ("int", "float") or fmt.scale == "e8m0"


def type_of(fmt: Format) -> str:
    """The ggml type that stands for a format, or would (`has_type`): same bits, the nearest block."""
    if fmt.scale == "e8m0":
        return "mxfp4"
    if fmt.kind == "float":
        return "bf16" if fmt.name == "bf16" else "f16"
    if fmt.group_size == 32:
        return _GROUP_32.get((fmt.bits, fmt.symmetric), _K_QUANTS[fmt.bits])
    return _K_QUANTS[fmt.bits]


def fallback(kind: str, cols: int) -> str:
    """What llama-quantize makes of a tensor whose rows do not divide into the type's blocks."""
    if cols % BLOCKS[kind][0] == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if cols % BLOCKS[kind][0] == 0 else "f16"


def ggml_type(fmt: Format, cols: int) -> str:
    """The type that a tensor of ``cols`` columns really gets."""
    return fallback(type_of(fmt), cols)


def exact_type(fmt: Format) -> str:
    """The type with the very grid of ``fmt`` (q4_1 and q5_1 but for the minimum's rounding); "" when there is none."""
    if fmt.kind == "float" or fmt.scale == "e8m0":
        return type_of(fmt)
    same = (
        has_type(fmt)
        and fmt.group_size == 32
        and ((fmt.bits, fmt.symmetric) in _GROUP_32 or (fmt.bits == 8 and fmt.symmetric))
    )
    return type_of(fmt) if same else ""


def tensor_bytes(kind: str, weights: int) -> int:
    """Bytes of ``weights`` weights of a type, rows being whole blocks."""
    block, size = BLOCKS[kind]
    return weights // block * size


def gguf_name(unit: QuantUnit) -> str:
    """Name of the GGUF tensor that holds the unit, without ``.weight``; "" when it has none."""
    if unit.role in ("embed", "head"):
        return "token_embd" if unit.role == "embed" else "output"
    if unit.layer < 0 or unit.role not in _ROLES:
        return ""
    stack = "_exps" if unit.expert >= 0 else ""
    return f"blk.{unit.layer}.{_ROLES[unit.role]}{stack}"
