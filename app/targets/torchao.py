"""torchao: an ``FqnToConfig`` of weight-only configs, one per module.

IntxWeightOnlyConfig knows 1 to 8 bits, per group or per row, symmetric or asymmetric, but keeps every code in a byte: it
shows what a mix does to the model, it saves memory only at 8 bits. Float8WeightOnlyConfig has a scale per row or one, in
float32. What was tried with torchao 0.18 on a CPU: it rejects the 3-D parameters that experts are in transformers 5.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit
from bitatlas.app.targets.base import REJECTED, Finding, Target
from bitatlas.app.targets.names import is_linear

__all__ = ["TorchAo"]


class TorchAo(Target):
    """A config per linear, by its full name."""

    NAME = "torchao"
    TITLE = "torchao"
    SERVES = "transformers with torchao"

    def loads(self, fmt: Format) -> bool:
        """Every integer width, and FP8."""
        return fmt.kind in ("int", "float") or fmt.codebook == "fp8"

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """nn.Linear only, whole groups, no experts."""
        if fmt.kind == "float":
            return None
        if not self.loads(fmt):
            return super().refuses(unit, fmt, index)
        if unit.role in ("embed", "head"):
            return Finding(REJECTED, "the embedding and the head stay at 16 bits", (unit.key,))
        if unit.expert >= 0:
            return Finding(
                REJECTED, "experts are 3-D parameters in transformers, which torchao rejects", (unit.key,)
            )
        if not is_linear(unit):
            return Finding(REJECTED, "only nn.Linear is quantised; this is a Conv1D", (unit.key,))
        if unit.cols % (fmt.group_size or 1):
            return Finding(
                REJECTED, f"groups of {fmt.group_size} do not divide {unit.cols} columns", (unit.key,)
            )
        return None

    def unit_bytes(self, unit: QuantUnit, fmt: Format) -> int:
        """A byte for every code, a 16-bit scale and an 8-bit zero point per group, FP8 a 32-bit scale; else 16 bits."""
        if fmt.kind == "float":
            return unit.params * 2
        if fmt.codebook == "fp8":
            return unit.params + 4 * fmt.scale_rows(unit.rows)
        return unit.params + 3 * unit.rows * fmt.groups(unit.cols)

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """That nothing gets smaller below 8 bits, and whose rounding it is."""
        if any(FORMATS[f].bits < 8 for f in allocation.formats.values()):
            yield f"torchao keeps a byte for every weight: {self.engine_bytes(allocation, index)} bytes in memory"
        yield "torchao rounds in its own way: symmetric codes are scaled to the negative end of the range"

    def table(self, allocation: Allocation, index: ModelIndex) -> dict[str, dict[str, Any] | None]:
        """Module -> its weights' type, and what shares a scale; None for those left alone."""
        out: dict[str, dict[str, Any] | None] = {}
        for u in index.units:
            if not is_linear(u) or u.expert >= 0:
                continue
            out[u.key] = _entry(FORMATS[allocation.formats[u.key]])
        return out

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The table, a script and the command."""
        rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in self.table(allocation, index).items()]
        return {
            "fqn_to_config.json": "{\n" + ",\n".join(rows) + "\n}\n",
            "quantize.py": _SCRIPT,
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
            **self.kv(allocation, index).files,
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Load with the config, save."""
        return f"python quantize.py {shlex.quote(index.path)} {shlex.quote(index.name + '-torchao')}"


def _entry(fmt: Format) -> dict[str, Any] | None:
    if fmt.kind == "float":
        return None
    if fmt.codebook == "fp8":
        return {"weight_dtype": "float8_e4m3fn", "scales": "tensor" if fmt.per_tensor else "row"}
    mapping = "SYMMETRIC" if fmt.symmetric else "ASYMMETRIC"
    return {"weight_dtype": f"int{fmt.bits}", "group_size": fmt.group_size, "mapping_type": mapping}


_SCRIPT = '''"""Quantise with torchao: python quantize.py MODEL OUT"""
import json
import sys
from collections import OrderedDict

import torch
from torchao.quantization import (
    Float8WeightOnlyConfig, FqnToConfig, IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, PerRow, PerTensor,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig


def weights_as(weight_dtype, group_size=None, mapping_type=None, scales=None):
    dtype = getattr(torch, weight_dtype)
    if scales:
        return Float8WeightOnlyConfig(dtype, granularity=PerRow() if scales == "row" else PerTensor())
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group_size) if group_size else PerAxis(0),
                                mapping_type=MappingType[mapping_type])


def fqn_to_config(path):
    with open(path) as f:
        table = json.load(f)
    return FqnToConfig(OrderedDict((name, entry and weights_as(**entry)) for name, entry in table.items()))


if __name__ == "__main__":
    source, out = sys.argv[1:3]
    config = TorchAoConfig(fqn_to_config("fqn_to_config.json"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=config)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
'''
