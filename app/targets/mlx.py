"""MLX-LM (Apple silicon): ``quantization`` with an entry per module.

Affine quantisation with a scale and a bias per group, so symmetric and asymmetric cost the same. Module names are those
after mlx-lm's own renaming: the experts of a projection are one ``switch_mlp`` module with one width.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup
from bitatlas.app.targets.base import REJECTED, Finding, Target
from bitatlas.app.targets.fusion import expert_stacks

if TYPE_CHECKING:
    from bitatlas.app.work.engine_checkpoint import Container

__all__ = ["Mlx", "mlx_name"]

# Families whose module names in mlx-lm are those of the checkpoint, experts aside.
_KNOWN = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phi3",
    "gemma3_text",
)
_GROUPS = (32, 64, 128)
_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)$")
_W = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mlx_name(unit: QuantUnit) -> str:
    """The module's path in mlx-lm."""
    return _EXPERT.sub(lambda m: f".switch_mlp.{_W.get(m[1], m[1])}", unit.key)


class Mlx(Target):
    """A width and a group size per module."""

    NAME = "mlx"
    TITLE = "MLX-LM"
    SERVES = "mlx-lm on Apple silicon"
    KV_ENGINE = "mlx"

    def loads(self, fmt: Format) -> bool:
        """2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128."""
        return fmt.kind == "float" or (fmt.kind == "int" and fmt.group_size in _GROUPS)

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Whole groups; families whose names are known."""
        if self.ours(fmt):
            return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))
        if index.model_type not in _KNOWN:
            return Finding(
                REJECTED, f"the module names of {index.model_type} in mlx-lm are not known", (unit.key,)
            )
        if fmt.kind == "float":
            return None
        if not self.loads(fmt):
            return Finding(REJECTED, "MLX needs groups of 32, 64 or 128", (unit.key,))
        if unit.cols % (fmt.group_size or 1):
            return Finding(
                REJECTED, f"groups of {fmt.group_size} do not divide {unit.cols} columns", (unit.key,)
            )
        return None

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """The experts of a projection."""
        return expert_stacks(
            index, "MLX keeps all experts of a projection in one module, which has one width"
        )

    def unit_bytes(self, unit: QuantUnit, fmt: Format) -> int:
        """Codes, a 16-bit scale and a 16-bit bias per group; else 16 bits."""
        if fmt.kind == "float":
            return unit.params * 2
        return fmt.code_bytes(unit.rows, unit.cols) + 2 * fmt.scale_bytes(unit.rows, unit.cols)

    def container(self) -> Container:
        """Affine modules."""
        from bitatlas.app.targets.mlx_container import MlxAffine

        return MlxAffine(self)

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """That zero points are biases here."""
        yield (
            f"{self.engine_bytes(allocation, index)} bytes in MLX, {allocation.weights_bytes} in the allocation's own "
            "formats: MLX stores a 16-bit bias with every scale"
        )

    def quantization(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """What stands in config.json: the base, and an entry (or false) for every module."""
        counts: Counter[str] = Counter()
        for u in index.units:
            if FORMATS[allocation.formats[u.key]].kind == "int":
                counts[allocation.formats[u.key]] += u.params
        base = FORMATS[counts.most_common(1)[0][0]] if counts else FORMATS["int4-g64"]
        out: dict[str, Any] = {**_entry(base), "mode": "affine"}
        for u in index.units:
            fmt = FORMATS[allocation.formats[u.key]]
            out[mlx_name(u)] = False if fmt.kind == "float" else _entry(fmt)
        return out

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The config entry, a script and the commands."""
        table = self.quantization(allocation, index)
        rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()]
        return {
            "quantization.json": "{\n" + ",\n".join(rows) + "\n}\n",
            "convert.py": _SCRIPT,
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Convert, then try it."""
        out = f"{index.name}-mlx"
        generate = self.serve_command(out, allocation, index)
        return f"python convert.py {shlex.quote(index.path)} {shlex.quote(out)}\n{generate}"

    def serve_command(self, folder: str, allocation: Allocation, index: ModelIndex) -> str:
        """Generate with the folder; mlx_lm's server has no option for the KV cache."""
        flags = self.kv(allocation, index).flags
        return f"mlx_lm.generate --model {shlex.quote(folder)} --prompt 'Once upon a time' {flags}".rstrip()


def _entry(fmt: Format) -> dict[str, Any]:
    return {"group_size": fmt.group_size, "bits": fmt.bits}


_SCRIPT = '''"""Convert with mlx-lm: python convert.py MODEL OUT"""
import json
import sys

from mlx_lm import convert

source, out = sys.argv[1:3]
with open("quantization.json") as f:
    table = json.load(f)
base = {"q_group_size": table.pop("group_size"), "q_bits": table.pop("bits")}
table.pop("mode")


def predicate(path, module, *_):
    return table.get(path, False) if hasattr(module, "to_quantized") else False


convert(source, out, quantize=True, quant_predicate=predicate, **base)
'''
