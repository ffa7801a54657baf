"""GPTQModel: one base format and ``dynamic`` rules for what differs.

First match wins and rules are matched from the left. vLLM asks under its fused names (``qkv_proj``, ``gate_up_proj``,
``mlp.experts``), so a rule must match those beside the shards; one on ``experts.N`` alone silently falls back to the base.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup
from bitatlas.app.targets.base import REJECTED, Finding, Target
from bitatlas.app.targets.fusion import fused_gate_up, fused_qkv, layer_experts
from bitatlas.app.targets.names import alternatives, experts_path, stacked_on_disk

if TYPE_CHECKING:
    from bitatlas.analysis.calibration import CalibrationSet

__all__ = ["GptqModel"]

_BITS = (2, 3, 4, 8)
_TOKENS = "calibration.json"
_WORD = 32  # both dimensions are packed in 32-bit words somewhere
_FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "gate": "gate_up_proj", "up": "gate_up_proj",
          "shared_gate": "gate_up_proj", "shared_up": "gate_up_proj"}  # fmt: skip


class GptqModel(Target):
    """GPTQ checkpoints with a rule per fused group of layers."""

    NAME = "gptqmodel"
    TITLE = "GPTQModel"
    MEASURE = "int{2,3,4,8}-g64"
    SERVES = "GPTQModel, vLLM and SGLang"
    TAKES_TEXT = NEEDS_TEXT = True

    def loads(self, fmt: Format) -> bool:
        """The classic widths 2, 3, 4 and 8; zero points are always written."""
        return fmt.kind == "float" or (fmt.kind == "int" and fmt.bits in _BITS)

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Layers of the blocks only, whole groups, dimensions in words of 32."""
        if self.ours(fmt):
            return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))
        if fmt.kind == "float":
            return None
        if unit.role in ("embed", "head"):
            return Finding(REJECTED, "the embedding and the head stay at 16 bits", (unit.key,))
        if stacked_on_disk(unit):
            return Finding(
                REJECTED,
                "experts that are fused in the checkpoint have no layer names of their own",
                (unit.key,),
            )
        if not self.loads(fmt):
            return Finding(REJECTED, f"GPTQ checkpoints hold 2, 3, 4 or 8 bits, not {fmt.bits}", (unit.key,))
        if unit.cols % (fmt.group_size or _WORD) or unit.cols % _WORD or unit.rows % _WORD:
            return Finding(
                REJECTED,
                f"a {unit.rows} x {unit.cols} matrix is not whole groups of {fmt.group_size or 'a row'} "
                f"and words of {_WORD}",
                (unit.key,),
            )
        return None

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """What vLLM fuses."""
        return (
            *fused_qkv(index, "vLLM"),
            *fused_gate_up(index, "vLLM"),
            *layer_experts(index, "vLLM asks for one rule for all experts of a layer"),
        )

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """The text, kernels and readers."""
        yield f"the command reads {_TOKENS}, which --calibration TEXT writes beside it"
        fmts = {FORMATS[f] for f in allocation.formats.values()}
        if any(f.kind == "int" and (f.bits not in (4, 8) or not f.symmetric) for f in fmts):
            yield "vLLM's fast kernel (Marlin) takes 4 and 8 bits, symmetric; the rest runs on slow ones, and not in MoE"
        if len(fmts) > 1:
            yield "transformers does not read `dynamic`; load with GPTQModel or vLLM"

    def base(self, allocation: Allocation, index: ModelIndex) -> Format:
        """The format of most weights."""
        weights: Counter[str] = Counter()
        for u in index.units:
            if FORMATS[allocation.formats[u.key]].kind == "int" and u.role not in ("embed", "head"):
                weights[allocation.formats[u.key]] += u.params
        return FORMATS[weights.most_common(1)[0][0]] if weights else FORMATS["int4-g128-sym"]

    def dynamic(self, allocation: Allocation, index: ModelIndex) -> dict[str, dict[str, Any]]:
        """Rules for everything that is not in the base format, in the order of the layers."""
        base = self.base(allocation, index)
        wanted: dict[tuple[str, str], list[QuantUnit]] = defaultdict(list)
        for u in index.units:
            name = allocation.formats[u.key]
            if u.role in ("embed", "head") or name == base.name:
                continue
            path = experts_path(u) or u.key.rpartition(".")[0]
            wanted[path, name].append(u)
        rules: dict[str, dict[str, Any]] = {}
        for (path, name), units in wanted.items():
            fmt = FORMATS[name]
            where = re.escape(path[path.find("layers.") :] if "layers." in path else path)
            if experts_path(units[0]) and self._whole(path, name, allocation, index):
                pattern = f".*{where}(\\.|$)"
            else:
                pattern = f".*{where}\\.{alternatives(_leaves(path, units))}$"
            sign = "-" if fmt.kind == "float" else "+"
            rules[f"{sign}:{pattern}"] = {} if fmt.kind == "float" else _override(fmt, base)
        return rules

    def _whole(self, path: str, name: str, allocation: Allocation, index: ModelIndex) -> bool:
        return all(allocation.formats[u.key] == name for u in index.units if experts_path(u) == path)

    def quantize_config(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """Keyword arguments of GPTQModel's QuantizeConfig."""
        base = self.base(allocation, index)
        return {
            "bits": base.bits, "group_size": base.group_size or -1, "sym": base.symmetric, "desc_act": False,
            "lm_head": False, "dynamic": self.dynamic(allocation, index),
        }  # fmt: skip

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The config, a script and the command."""
        return {
            "quantize_config.json": json.dumps(self.quantize_config(allocation, index), indent=1) + "\n",
            "quantize.py": _SCRIPT,
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
            **self.kv(allocation, index).files,
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Quantise with the calibration tokens."""
        out = shlex.quote(f"{index.name}-gptq")
        return f"python quantize.py {shlex.quote(index.path)} {_TOKENS} {out}"

    def write_text_files(self, index: ModelIndex, text: CalibrationSet, out: Path) -> list[Path]:
        """The sequences that `pack --quantizer gptq` would read, as token ids: a row each."""
        from bitatlas.cache.paths import atomic_write

        rows = ",\n".join(json.dumps(row) for row in text.tokens.tolist())
        atomic_write(out / _TOKENS, f"[{rows}]\n".encode(), named=True)
        return [out / _TOKENS]


def _leaves(path: str, units: list[QuantUnit]) -> list[str]:
    """Names below ``path``, and vLLM's fused name for them."""
    names = [u.key.removeprefix(path + ".") for u in units]
    return list(dict.fromkeys(names + [_FUSED[u.role] for u in units if u.role in _FUSED and u.expert < 0]))


def _override(fmt: Format, base: Format) -> dict[str, Any]:
    out: dict[str, Any] = {"bits": fmt.bits, "group_size": fmt.group_size or -1}
    return out if fmt.symmetric == base.symmetric else {**out, "sym": fmt.symmetric}


_SCRIPT = '''"""Quantise with GPTQModel: python quantize.py MODEL TOKENS OUT; TOKENS is a JSON list of token sequences."""
import json
import sys

source, tokens, out = sys.argv[1:4]
try:
    with open(tokens) as f:
        rows = json.load(f)
except FileNotFoundError:
    sys.exit(f"there is no {tokens}: run `bitatlas export` again with --calibration TEXT")

from gptqmodel import GPTQModel, QuantizeConfig

with open("quantize_config.json") as f:
    config = QuantizeConfig(**json.load(f))
model = GPTQModel.load(source, config)
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
model.save(out)
'''
