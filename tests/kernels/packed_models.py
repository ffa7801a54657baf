"""Tiny random models of many families, and a packer of checkpoint folders that knows nothing but tensor names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitatlas.kernels.packed.manifest import Manifest, PackedKept, PackedUnit, plan_shards
from bitatlas.kernels.packed.matrix import pack_quantized
from bitatlas.kernels.packed.shards import CODES
from bitatlas.kernels.packed.writer import PackedWriter
from bitatlas.kernels.reference import quantize, quantize_dequantize

_SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
              "intermediate_size": 80, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 1,
            "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 40,
            "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
_MOE = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": dict(model_type="llama", **_SMALL),
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True, **_SMALL),
    "qwen2": dict(model_type="qwen2", **_SMALL),
    "qwen3": dict(model_type="qwen3", head_dim=12, **_SMALL),
    "mistral": dict(model_type="mistral", **_SMALL),
    "gemma3": dict(model_type="gemma3_text", head_dim=12, sliding_window=8, **_SMALL),
    "phi3": dict(model_type="phi3", **_SMALL),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 99,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "vocab_size": 99,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
    },
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, **_SMALL),
    "qwen2_moe": dict(model_type="qwen2_moe", shared_expert_intermediate_size=56, **_SMALL, **_MOE),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=12, **_SMALL, **_MOE),
    "olmoe": dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2, **_SMALL),
    "deepseek_v2": dict(model_type="deepseek_v2", **{**_SMALL, **_MLA}),
    "deepseek_v3": dict(model_type="deepseek_v3", **{**_SMALL, **_MLA}),
    "gpt_oss": dict(
        model_type="gpt_oss",
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        **_SMALL,
    ),
}
MIX = ("int2-g32", "int3-g64", "int4-g32-sym", "int5-channel", "int6-g128", "int8-g32", "bf16")


def build(family: str, folder: Path) -> PreTrainedModel:
    """A seeded model of the family, saved to ``folder``; every weight and bias random, so that none can hide."""
    settings = dict(FAMILIES[family])
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder)
    return model


def is_unit(name: str, tensor: Tensor) -> bool:
    """Quantisable, from name and shape."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if tensor.dim() == 3:
        return "experts" in name and not name.endswith("_bias")
    if tensor.dim() != 2 or not name.endswith(".weight") or "norm" in leaf:
        return False
    return leaf not in ("gate", "router", "shared_expert_gate", "wpe", "embed_positions")


def units_of(name: str, tensor: Tensor, kind: str, pick: Callable[[], str]) -> list[PackedUnit]:
    key = name.removesuffix(".weight")
    if tensor.dim() == 2:
        turned = kind == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.", name) is not None
        rows, cols = tensor.shape[::-1] if turned else tensor.shape
        expert = re.search(r"\.experts\.(\d+)\.", name)
        return [
            PackedUnit(key, name, rows, cols, pick(), int(expert[1]) if expert else -1, transposed=turned)
        ]
    assert kind == "gpt_oss"
    experts, cols, rows = tensor.shape
    out = []
    for e in range(experts):
        if "gate_up" not in name:
            out.append(PackedUnit(f"{key}[{e}]", name, rows, cols, pick(), e, transposed=True))
            continue
        for part in ("gate", "up"):
            out.append(PackedUnit(f"{key}[{e}].{part}", name, rows // 2, cols, pick(), e, part, True, True))
    return out


def matrix_of(unit: PackedUnit, tensor: Tensor) -> Tensor:
    """View of a checkpoint tensor that is the unit's (rows, cols)."""
    w = tensor[unit.expert] if tensor.dim() == 3 else tensor
    w = w.T if unit.transposed else w
    return w[0 if unit.part == "gate" else 1 :: 2] if unit.part else w


class Packing:
    """Packs a saved checkpoint with a rotating mix of formats; ``reference`` is the same with dense weights."""

    def __init__(
        self, folder: Path, kind: str, formats: tuple[str, ...] = MIX, shard_bytes: int = 12_000
    ) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "model.safetensors")
        count = iter(range(10**9))
        units: list[PackedUnit] = []
        kept = []
        for name, t in self.tensors.items():
            if is_unit(name, t):
                units += units_of(name, t, kind, lambda: formats[next(count) % len(formats)])
            else:
                kept.append(PackedKept(name, tuple(t.shape), CODES[t.dtype], t.numel() * t.itemsize))
        self.manifest = Manifest(*plan_shards(units, kept, shard_bytes), model={"model_type": kind})
        self.packed: list[str] = []

    def pack(self, unit: PackedUnit) -> dict[str, Tensor]:
        self.packed.append(unit.key)
        w = matrix_of(unit, self.tensors[unit.tensor])
        if unit.fmt.kind == "float":
            return {"weight": w.to(torch.bfloat16 if unit.format == "bf16" else torch.float16)}
        return pack_quantized(quantize(w, unit.fmt))

    def writer(self, out: Path) -> PackedWriter:
        return PackedWriter(out, self.manifest, self.folder)

    def write(self, out: Path) -> Path:
        writer = self.writer(out)
        for number in writer.pending():
            writer.write(number, self.pack, lambda k: self.tensors[k.name])
        return writer.finish()

    def reference(self, folder: Path) -> PreTrainedModel:
        """transformers' own model, from a dense checkpoint whose weights went through quantize_dequantize."""
        dense = {name: t.clone() for name, t in self.tensors.items()}
        for unit in self.manifest.units:
            matrix_of(unit, dense[unit.tensor]).copy_(
                quantize_dequantize(matrix_of(unit, self.tensors[unit.tensor]), unit.fmt)
            )
        folder.mkdir()
        save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((self.folder / "config.json").read_text())
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
