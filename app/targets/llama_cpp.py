"""llama.cpp: a ``--tensor-type-file`` for llama-quantize, with the size it will really have.

Rules of llama-quantize (source, 2026-07): one entry per tensor, PATTERN=type, lower case, searched unanchored, first
match wins, no comments and no spaces; the embedding and the output have options of their own, which beat the file;
an override equal to the base type was ignored by some versions, so a base type is chosen that no tensor uses. The
experts of a projection are one 3-D tensor with one type.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit, TieGroup
from bitatlas.app.targets.base import REJECTED, Finding, Target
from bitatlas.app.targets.fusion import expert_stacks
from bitatlas.app.targets.ggml import (
    ARCHITECTURES,
    MAKEABLE,
    WRITTEN,
    exact_type,
    fallback,
    ggml_type,
    gguf_name,
    has_type,
    tensor_bytes,
    type_of,
)

if TYPE_CHECKING:
    from bitatlas.analysis.calibration import CalibrationSet

__all__ = ["LlamaCpp"]

_ALIGNMENT = 32
# Base file types, best loved first, with the tensor types each may fall on by its own rules.
_BASES = {"Q4_K_M": "q4_k", "Q5_K_M": "q5_k", "Q6_K": "q6_k", "Q3_K_M": "q3_k", "Q8_0": "q8_0", "Q2_K": "q2_k",
          "Q5_1": "q5_1", "Q4_1": "q4_1"}  # fmt: skip


class LlamaCpp(Target):
    """llama-quantize with a type for every tensor."""

    NAME = "llama.cpp"
    TITLE = "llama.cpp (GGUF)"
    SERVES = "llama.cpp, Ollama, LM Studio and everything else that reads GGUF"
    KV_ENGINE = "llama.cpp"
    MEASURE = "int{2,3,4,5,6}-g32,int{4,5,8}-g32-sym"
    TAKES_TEXT = True

    def loads(self, fmt: Format) -> bool:
        """Every integer format has a ggml type of the same bits; MXFP4 is one itself."""
        return has_type(fmt)

    def own(self, fmt: Format) -> bool:
        """Blocks of 32; the k-quants that stand for other groups have only the bits in common."""
        return fmt.kind == "float" or fmt.group_size == 32

    def refuses(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> Finding | None:
        """Only what the GGUF of this architecture has no tensor for."""
        if not has_type(fmt):
            return Finding(REJECTED, f"{self.NAME} has no {fmt.name}", (unit.key,))
        if index.model_type not in ARCHITECTURES:
            return Finding(REJECTED, f"llama.cpp does not know {index.model_type}", (unit.key,))
        if not gguf_name(unit):
            return Finding(REJECTED, "no GGUF tensor of this kind is known", (unit.key,))
        return None

    def keeps(self, unit: QuantUnit, fmt: Format, index: ModelIndex) -> bool:
        """Not where the rows are no whole blocks: llama-quantize then takes a type of other bits and other damage."""
        return super().keeps(unit, fmt, index) and ggml_type(fmt, unit.cols) == type_of(fmt)

    def ties(self, index: ModelIndex) -> tuple[TieGroup, ...]:
        """The experts of a projection."""
        return expert_stacks(
            index, "llama.cpp keeps all experts of a projection in one tensor, which has one type"
        )

    def types(self, allocation: Allocation, index: ModelIndex) -> dict[str, tuple[str, str, int]]:
        """GGUF tensor -> (type asked for, type it gets, weights)."""
        out: dict[str, tuple[str, str, int]] = {}
        for unit in index.units:
            name = gguf_name(unit)
            if name:
                asked = type_of(FORMATS[allocation.formats[unit.key]])
                have = out.get(name)
                weights = unit.params + (have[2] if have else 0)
                out[name] = (asked, fallback(asked, unit.cols), weights)
        return out

    def engine_bytes(self, allocation: Allocation, index: ModelIndex) -> int:
        """Tensor data of the GGUF: types after fallback, kept tensors in float32, each tensor aligned."""
        sizes = [tensor_bytes(got, n) for _, got, n in self.types(allocation, index).values()]
        return sum(-(-s // _ALIGNMENT) * _ALIGNMENT for s in sizes) + self.kept_bytes(index)

    def unit_bytes(self, unit: QuantUnit, fmt: Format) -> int:
        """The type after fallback, aligned."""
        size = tensor_bytes(ggml_type(fmt, unit.cols), unit.params)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def kept_bytes(self, index: ModelIndex) -> int:
        """In float32, each tensor aligned."""
        return sum(-(-math.prod(k.shape) * 4 // _ALIGNMENT) * _ALIGNMENT for k in index.kept)

    def notes(self, allocation: Allocation, index: ModelIndex) -> Iterable[str]:
        """Types that fall back, the size, and that ggml has its own codes."""
        types = self.types(allocation, index)
        fell = Counter(f"{a} -> {g}" for a, g, _ in types.values() if a != g)
        if fell:
            what = ", ".join(f"{n} x {k}" for k, n in fell.most_common(4))
            yield f"{sum(fell.values())} of {len(types)} tensors fall back because their rows are not whole blocks ({what})"
        size = self.engine_bytes(allocation, index)
        yield f"{size} bytes of tensor data in GGUF, {allocation.weights_bytes} in the allocation's own formats"
        if not all(
            exact_type(FORMATS[allocation.formats[u.key]]) == types[gguf_name(u)][1]
            for u in index.units
            if gguf_name(u)
        ):
            yield (
                "ggml rounds some of these formats in its own way: damage was measured for the formats of the allocation; "
                "int{4,5,8}-g32-sym, int{4,5}-g32, mxfp4 and bf16 are its very grids"
            )
        if index.model_type == "mixtral":
            yield "llama.cpp only: transformers reads the GGUF of a Mixtral as a dense Llama, without a word"
        if any(g in ("q2_k", "q3_k") for _, g, _ in types.values()):
            yield "use an imatrix at 2 and 3 bits (--calibration TEXT writes one)"
        makeable = index.model_type in WRITTEN and all(g in MAKEABLE for _, g, _ in types.values())
        yield "with --weights the GGUF is written here" if makeable else "llama-quantize has to make this one"

    def _base(self, types: dict[str, tuple[str, str, int]]) -> str:
        used = {asked for asked, _, _ in types.values()}
        return next((base for base, kind in _BASES.items() if kind not in used), "Q4_K_M")

    def check_weights(self, allocation: Allocation, index: ModelIndex, quantizer: str = "rtn") -> None:
        """The architectures and types of `app.work.gguf_checkpoint`."""
        from bitatlas.app.work.gguf_checkpoint import check_gguf

        check_gguf(index, allocation, quantizer)

    def write_weights(
        self, allocation: Allocation, index: ModelIndex, out: str | Path, *, quantizer: str = "rtn",
        calibration: CalibrationSet | None = None,
    ) -> list[Path]:  # fmt: skip
        """One GGUF file in the folder, for the types that the gguf package can make."""
        from bitatlas.app.work.gguf_checkpoint import write_gguf

        file = Path(out) / _file_name(index)
        return [write_gguf(index, allocation, file, quantizer=quantizer, calibration=calibration)]

    def serve_command(self, folder: str, allocation: Allocation, index: ModelIndex) -> str:
        """`llama-server` on the file in the folder."""
        file = shlex.quote(str(Path(folder) / _file_name(index)))
        return f"llama-server -m {file} {self.kv(allocation, index).flags}".rstrip()

    def write_text_files(self, index: ModelIndex, text: CalibrationSet, out: Path) -> list[Path]:
        """``imatrix.gguf``, which run.sh uses when it is there."""
        from bitatlas.analysis.loaded import LoadedModel
        from bitatlas.app.work.imatrix import write_imatrix

        return [write_imatrix(LoadedModel.open(index), text, out / "imatrix.gguf")]

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The tensor type file and the commands."""
        lines = []
        for name, (asked, _, _) in self.types(allocation, index).items():
            pattern = name.replace(".", r"\.")
            if name.endswith("attn_kv_b"):  # newer converters split it
                pattern = pattern.replace("attn_kv_b", "attn_(kv_b|k_b|v_b)")
            lines.append(f"^{pattern}\\.weight$={asked}")
        script = "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n"
        return {"tensor-types.txt": "\n".join(lines) + "\n", "run.sh": script}

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Convert, then quantise."""
        types = self.types(allocation, index)
        special = ""
        for name, option in (("token_embd", "--token-embedding-type"), ("output", "--output-tensor-type")):
            if name in types:
                special += f" {option} {types[name][0]}"
        name = shlex.quote(index.name)
        return (
            f"python convert_hf_to_gguf.py {shlex.quote(index.path)} --outtype bf16 --outfile {name}-bf16.gguf\n"
            f"llama-quantize $([ -f imatrix.gguf ] && echo --imatrix imatrix.gguf) --tensor-type-file tensor-types.txt{special} {name}-bf16.gguf {name}-mix.gguf {self._base(types)}"
            + (
                f"\nllama-server -m {name}-mix.gguf {flags}"
                if (flags := self.kv(allocation, index).flags)
                else ""
            )
        )


def _file_name(index: ModelIndex) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in index.name) + "-mix.gguf"
