"""compressed-tensors (pack-quantized, float-quantized) for vLLM, SGLang and transformers, made by llm-compressor.

What was tried (compressed-tensors 0.20, transformers 5.23) and read in vLLM's source: dense symmetric mixes load
exactly; asymmetric checkpoints are refused by transformers, also those that compressed-tensors writes itself (packed
zero points do not fit the shape it expects); transformers takes one scheme for all experts of the model, vLLM looks at
expert 0 of each layer only, both without a word when the rest differs. FP8 weights alone (compressed_tensors_w8a16_fp8.py)
may have a scale per row or one, each part of a fused layer its own; experts need FP8 inputs as well, and a RuntimeError
says so.
"""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup
from bitatlas.app.targets.base import REJECTED, WRONG, Finding, Target
from bitatlas.app.targets.fusion import all_experts, fused_gate_up, fused_qkv, layer_experts
from bitatlas.app.targets.names import alternatives, experts_path, is_linear, stacked_on_disk

if TYPE_CHECKING:
    from bitatlas.app.work.engine_checkpoint import Container

__all__ = ["CompressedTensors", "Vllm"]

_EXPERT_BITS = (
    2,
    4,
    8,
)  # Marlin's, and the one width of Humming that was tried in a MoE (vllm#48918, vllm#52799)
_PACKED, _FLOAT = "pack-quantized", "float-quantized"  # the library's names of the two containers
_SHAPE_BYTES = 16  # the int64 pair weight_shape of every module


class CompressedTensors(Target):
    """Config groups by format, for every reader of the container."""

    NAME = "compressed-tensors"
    TITLE = "compressed-tensors (vLLM, SGLang and transformers)"
    SERVES = "vLLM, SGLang and transformers alike"
    KV_ENGINE = "vllm"
    MEASURE = "int{2,3,4,5,6,8}-g64-sym"
    ASYMMETRIC_BITS: ClassVar[tuple[int, ...]] = ()
    ASYMMETRIC_RULE: ClassVar[str] = "transformers refuses asymmetric weights"

    def loads(self, fmt: Format) -> bool:
        """Symmetric at every width, and FP8."""
        return (
            fmt.kind == "float"
            or fmt.codebook == "fp8"
            or (fmt.kind == "int" and (fmt.symmetric or fmt.bits in self.ASYMMETRIC_BITS))
        )

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Only nn.Linear, whole groups, symmetric experts."""
        if self.ours(fmt) and not self.loads(fmt):
            return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))
        if fmt.kind == "float":
            return None
        if unit.role in ("embed", "head"):
            return Finding(REJECTED, "the embedding and the head stay at 16 bits", (unit.key,))
        if stacked_on_disk(unit):
            return Finding(
                REJECTED, "experts that are fused in the checkpoint cannot be read when packed", (unit.key,)
            )
        if not is_linear(unit):
            return Finding(REJECTED, "only nn.Linear is quantised; this is a Conv1D", (unit.key,))
        if unit.expert >= 0 and "block_sparse_moe" in unit.key:
            return Finding(WRONG, "experts called w1, w2, w3 are mistaken for others", (unit.key,))
        if not self.loads(fmt):
            return Finding(REJECTED, self.ASYMMETRIC_RULE, (unit.key,))
        if unit.expert >= 0 and fmt.codebook:
            return Finding(REJECTED, "vLLM has no experts whose weights alone are FP8", (unit.key,))
        if unit.expert >= 0 and not fmt.symmetric:
            return Finding(REJECTED, "the zero points of experts are not read; symmetric only", (unit.key,))
        if fmt.group_size and unit.cols % fmt.group_size:
            return Finding(
                REJECTED, f"groups of {fmt.group_size} do not divide {unit.cols} columns", (unit.key,)
            )
        return None

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """q/k/v, gate/up, and all experts of the model."""
        return (
            *fused_qkv(index, "vLLM"),
            *fused_gate_up(index, "vLLM"),
            *self._expert_ties(index),
        )

    def _expert_ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        reason = "transformers takes one scheme for all experts of the model"
        return all_experts(index, reason)

    def tie_status(self, tie: TieGroup, formats: Mapping[str, str]) -> str:
        """Broken expert ties are not noticed; other ties raise."""
        return WRONG if "experts" in tie.name else REJECTED

    def unit_bytes(self, unit: QuantUnit, fmt: Format) -> int:
        """Packed weights, scales, zero points (packed along the rows) and the shape; else 16 bits."""
        if fmt.kind == "float":
            return unit.params * 2
        if fmt.codebook:  # the codes are not padded, and need no shape
            return unit.params + fmt.scale_bytes(unit.rows, unit.cols)
        zeros = 0 if fmt.symmetric else -(-unit.rows * fmt.bits // 32) * 4 * fmt.groups(unit.cols)
        codes = fmt.code_bytes(unit.rows, unit.cols) + fmt.scale_bytes(unit.rows, unit.cols)
        return codes + zeros + _SHAPE_BYTES

    def container(self) -> Container:
        """Pack-quantized modules."""
        from bitatlas.app.targets.compressed_container import PackQuantized

        return PackQuantized(self)

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """Kernels that other widths need."""
        odd = sorted({FORMATS[f].bits for f in allocation.formats.values()} - {4, 8, 16})
        if odd:
            yield f"{', '.join(map(str, odd))} bits need vLLM's Humming kernels (compute capability 7.5 or newer)"

    def quantization_config(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """What stands in config.json of the finished checkpoint."""
        groups, ignore = self._groups(allocation, index)
        kinds = {g["format"] for g in groups.values()} or {_PACKED}
        return {
            "quant_method": "compressed-tensors", "quantization_status": "compressed",
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
            "global_compression_ratio": None, "ignore": ignore, "config_groups": groups, "kv_cache_scheme": None,
        }  # fmt: skip

    def _groups(self, allocation: Allocation, index: ModelIndex) -> tuple[dict[str, Any], list[str]]:
        """Config groups with disjoint targets, and everything that is left alone."""
        by_format: dict[str, list[str]] = defaultdict(list)
        stacks: dict[tuple[str, str], list[QuantUnit]] = defaultdict(list)
        ignore = ["lm_head"] if not any(u.role == "head" for u in index.units) else []
        for u in index.units:
            fmt = FORMATS[allocation.formats[u.key]]
            if fmt.kind == "float":
                ignore.append(u.key)
            elif path := experts_path(u):
                stacks[fmt.name, path].append(u)
            else:
                by_format[fmt.name].append(u.key)
        whole: dict[str, set[str]] = defaultdict(set)
        for name, path in stacks:
            whole[path].add(name)
        for (name, path), units in stacks.items():
            if len(whole[path]) == 1:
                leaves = sorted({u.key.rpartition(".")[2] for u in units})
                by_format[name].append(f"re:{alternatives([path])}\\.\\d+\\.{alternatives(leaves)}$")
            else:
                by_format[name] += [u.key for u in units]
        routers = [k.name.removesuffix(".weight") for k in index.kept if len(k.shape) == 2]
        groups = {
            f"group_{i}": {"targets": by_format[name], "weights": _scheme(FORMATS[name]),
                           "input_activations": None, "output_activations": None, "format": _FLOAT if FORMATS[name].codebook else _PACKED}
            for i, name in enumerate(f for f in FORMATS if f in by_format)
        }  # fmt: skip
        return groups, ignore + routers

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """llm-compressor's recipe, the config that results, a script and the commands."""
        groups, ignore = self._groups(allocation, index)
        recipe = {
            "quant_stage": {
                "quant_modifiers": {"QuantizationModifier": {"config_groups": groups, "ignore": ignore}}
            }
        }
        config = {"quantization_config": self.quantization_config(allocation, index)}
        return {
            # JSON is YAML.
            "recipe.yaml": json.dumps(recipe, indent=1) + "\n",
            "quantization_config.json": json.dumps(config, indent=1) + "\n",
            "quantize.py": _SCRIPT,
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Quantise, then serve."""
        out = f"{index.name}-compressed"
        serve = self.serve_command(out, allocation, index)
        return f"python quantize.py {shlex.quote(index.path)} {shlex.quote(out)}\n{serve}"

    def serve_command(self, folder: str, allocation: Allocation, index: ModelIndex) -> str:
        """`vllm serve` of the folder."""
        return f"vllm serve {shlex.quote(folder)} {self.kv(allocation, index).flags}".rstrip()


class Vllm(CompressedTensors):
    """The same container, read by vLLM only: layers may differ in their experts."""

    NAME = "vllm"
    TITLE = "vLLM (compressed-tensors)"
    SERVES = "vLLM"
    ASYMMETRIC_BITS = (4, 8)
    ASYMMETRIC_RULE = "vLLM takes asymmetric weights at 4 and 8 bits only"

    def _expert_ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        reason = "vLLM reads the scheme of expert 0 and takes it for all experts of the layer"
        return layer_experts(index, reason)

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Also widths that its MoE kernels do not have."""
        found = super().refuses(unit, fmt, index)
        if found is None and unit.expert >= 0 and fmt.kind == "int" and fmt.bits not in _EXPERT_BITS:
            return Finding(REJECTED, f"vLLM has no kernel for experts of {fmt.bits} bits", (unit.key,))
        return found

    def tie_status(self, tie: TieGroup, formats: Mapping[str, str]) -> str:
        """vLLM compares the projections of expert 0, and nothing else of the experts."""
        if "experts" not in tie.name:
            return REJECTED
        first = [u for u in tie.units if ".experts.0." in u]
        return REJECTED if len({formats[u] for u in first}) > 1 else WRONG

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """Also that transformers will not read it right."""
        yield from super().notes(allocation, index)
        if len({allocation.formats[u.key] for u in index.units if u.expert >= 0}) > 1:
            yield "vLLM only: transformers would decode the experts wrong, because layers differ"


def _scheme(fmt: Format) -> dict[str, Any]:
    strategy = "tensor" if fmt.per_tensor else "group" if fmt.group_size else "channel"
    return {
        "num_bits": fmt.bits, "type": "float" if fmt.codebook else "int", "symmetric": fmt.symmetric,
        "strategy": strategy, "group_size": fmt.group_size, "dynamic": False,
    }  # fmt: skip


_SCRIPT = '''"""Quantise with llm-compressor: python quantize.py MODEL OUT"""
import sys

from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

source, out = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
oneshot(model=model, recipe="recipe.yaml")
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
'''
