"""The tensors of an MLX affine module: ``weight`` (our bit stream, rows are whole words), ``scales``, ``biases`` = -zero * scale.

Scales and biases have the checkpoint's own type, as mlx-lm writes them: another one would promote every activation. The
experts of a projection are one module with a leading dimension.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitatlas.analysis.schema import Allocation, Format, ModelIndex, QuantUnit
from bitatlas.app.targets.mlx import Mlx, mlx_name
from bitatlas.kernels.packed.shards import TensorSpec
from bitatlas.kernels.packing import pack_codes, packed_words
from bitatlas.kernels.reference import Quantized

__all__ = ["MlxAffine"]


class MlxAffine:
    """A `Container`."""

    def __init__(self, target: Mlx) -> None:
        self.target = target

    def groups(self, index: ModelIndex) -> list[list[QuantUnit]]:
        """The experts of a projection together, everything else alone."""
        modules: dict[str, list[QuantUnit]] = defaultdict(list)
        for u in index.units:
            modules[mlx_name(u)].append(u)
        return list(modules.values())

    def specs(self, units: Sequence[QuantUnit], fmt: Format, dtype: torch.dtype) -> list[TensorSpec]:
        """Codes, scales and biases of a module; the weight alone where it is not quantised."""
        u, name = units[0], mlx_name(units[0])
        stack = (len(units),) if u.expert >= 0 else ()
        if fmt.kind == "float":
            return [TensorSpec(f"{name}.weight", dtype, (*stack, u.rows, u.cols))]
        words = packed_words(u.cols, fmt.bits)
        shape = (*stack, u.rows, fmt.groups(u.cols))
        return [
            TensorSpec(f"{name}.weight", torch.uint32, (*stack, u.rows, words)),
            TensorSpec(f"{name}.scales", dtype, shape),
            TensorSpec(f"{name}.biases", dtype, shape),
        ]

    def tensors(
        self, units: Sequence[QuantUnit], qs: Sequence[Quantized], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The same, filled."""
        name = mlx_name(units[0])
        weights, scales, biases = [], [], []
        for q in qs:
            scale = q.scales.float()
            zero = float(1 << (q.format.bits - 1)) if q.zeros is None else q.zeros.float()
            weights.append(pack_codes(q.codes, q.format.bits).view(torch.uint32))
            scales.append(scale.to(dtype))
            biases.append((-zero * scale).to(dtype))
        whole = torch.stack if units[0].expert >= 0 else lambda parts: parts[0]
        return {
            f"{name}.weight": whole(weights),
            f"{name}.scales": whole(scales),
            f"{name}.biases": whole(biases),
        }

    def config(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """``quantization`` twice, as mlx-lm writes it, and the rotary embedding as it reads it."""
        table = self.target.quantization(allocation, index)
        config = json.loads((Path(index.path) / "config.json").read_text(encoding="utf-8"))
        return {"quantization": table, "quantization_config": table, **_older_names(config)}


def _older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding and expert count in the older spelling, which mlx-lm's model files read."""
    out: dict[str, Any] = {}
    if experts := config.get("num_local_experts"):
        out["num_experts"] = experts
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
        out["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return out
