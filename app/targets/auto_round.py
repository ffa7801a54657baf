"""Intel AutoRound: ``layer_config``, one entry per layer; AutoRound tunes the rounding and writes the checkpoint."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup
from bitatlas.app.targets.base import REJECTED, Finding, Target
from bitatlas.app.targets.fusion import fused_gate_up, fused_qkv, layer_experts
from bitatlas.app.targets.names import is_linear, stacked_on_disk

__all__ = ["AutoRound"]


class AutoRound(Target):
    """Bits, group size and symmetry by full layer name."""

    NAME = "auto-round"
    TITLE = "AutoRound"
    MEASURE = "int{2,3,4,5,6}-g64,int8-g64-sym"
    SERVES = "AutoRound, and what it exports to: transformers, vLLM, SGLang"

    def loads(self, fmt: Format) -> bool:
        """Every integer format but asymmetric 8 bits, and 16 bits."""
        return fmt.kind == "float" or (fmt.kind == "int" and (fmt.bits < 8 or fmt.symmetric))

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Linears only; the head too, not the embedding; whole groups and words of 32 columns."""
        if self.ours(fmt):
            return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))
        if fmt.kind == "float":
            return None
        if unit.role == "embed":
            return Finding(REJECTED, "the embedding stays at 16 bits", (unit.key,))
        if stacked_on_disk(unit):
            return Finding(
                REJECTED,
                "experts that are fused in the checkpoint have no layer names of their own",
                (unit.key,),
            )
        if not is_linear(unit) and unit.role != "head":
            return Finding(REJECTED, "only nn.Linear is quantised; this is a Conv1D", (unit.key,))
        if fmt.bits == 8 and not fmt.symmetric:
            return Finding(
                REJECTED, "AutoRound refuses 8 bits with zero points: its readers have none", (unit.key,)
            )
        if unit.cols % (fmt.group_size or 32) or unit.cols % 32:
            return Finding(
                REJECTED,
                f"{unit.cols} columns are no whole groups of {fmt.group_size or 'a row'} in words of 32",
                (unit.key,),
            )
        return None

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """What the engines that read the checkpoint fuse."""
        return (
            *fused_qkv(index, "vLLM"),
            *fused_gate_up(index, "vLLM"),
            *layer_experts(
                index, "no engine that reads AutoRound checkpoints serves experts of different widths"
            ),
        )

    def layer_config(self, allocation: Allocation, index: ModelIndex) -> dict[str, dict[str, Any]]:
        """Layer name -> scheme, for everything that AutoRound would touch."""
        return {
            u.key: _scheme(FORMATS[allocation.formats[u.key]])
            for u in index.units
            if u.role != "embed" and not stacked_on_disk(u)
        }

    def base(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """The scheme of most weights."""
        weights: Counter[str] = Counter()
        for u in index.units:
            if FORMATS[allocation.formats[u.key]].kind == "int" and is_linear(u):
                weights[allocation.formats[u.key]] += u.params
        return (
            _scheme(FORMATS[weights.most_common(1)[0][0]]) if weights else {"bits": 16, "data_type": "float"}
        )

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The layer config, a script and the command."""
        config = self.layer_config(allocation, index)
        rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in config.items()]
        base = self.base(allocation, index)
        return {
            "layer_config.json": "{\n" + ",\n".join(rows) + "\n}\n",
            "quantize.py": _SCRIPT % base,
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
            **self.kv(allocation, index).files,
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Tune and save."""
        return f"python quantize.py {shlex.quote(index.path)} {shlex.quote(index.name + '-auto-round')}"


def _scheme(fmt: Format) -> dict[str, Any]:
    if fmt.kind == "float":
        return {"bits": 16, "data_type": "float"}
    return {"bits": fmt.bits, "group_size": fmt.group_size or -1, "sym": fmt.symmetric}


_SCRIPT = '''"""Tune and save with AutoRound: python quantize.py MODEL OUT"""
import json
import sys

from auto_round import AutoRound

source, out = sys.argv[1:3]
with open("layer_config.json") as f:
    layer_config = json.load(f)
base = %r
AutoRound(source, layer_config=layer_config, **base).quantize_and_save(out, format="auto_round")
'''
