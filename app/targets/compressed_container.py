"""The tensors of a pack-quantized module of compressed-tensors.

``weight_packed`` is our own bit stream (rows padded to 32-bit words); asymmetric zero points are one stream per group,
packed along the rows; ``weight_shape`` is (rows, cols). FP8 (float-quantized) is a ``weight`` of that type and its scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitatlas.analysis.schema import Allocation, Format, ModelIndex, QuantUnit
from bitatlas.app.targets.compressed_tensors import CompressedTensors
from bitatlas.kernels.packed.shards import TensorSpec
from bitatlas.kernels.packing import pack_codes, packed_words
from bitatlas.kernels.reference import Quantized

__all__ = ["PackQuantized"]


class PackQuantized:
    """A `Container`."""

    def __init__(self, target: CompressedTensors) -> None:
        self.target = target

    def groups(self, index: ModelIndex) -> list[list[QuantUnit]]:
        """Every unit is a module of its own."""
        return [[u] for u in index.units]

    def specs(self, units: Sequence[QuantUnit], fmt: Format, dtype: torch.dtype) -> list[TensorSpec]:
        """Packed codes, scales, shape, and zero points where there are any; the weight as it is without codes."""
        [unit] = units
        if fmt.kind == "float":
            return [TensorSpec(unit.tensor, dtype, (unit.rows, unit.cols))]
        groups = fmt.groups(unit.cols)
        if fmt.codebook:
            shape = (1,) if fmt.per_tensor else (unit.rows, 1)
            return [
                TensorSpec(f"{unit.key}.weight", torch.float8_e4m3fn, (unit.rows, unit.cols)),
                TensorSpec(f"{unit.key}.weight_scale", torch.float16, shape),
            ]
        out = [
            TensorSpec(
                f"{unit.key}.weight_packed", torch.int32, (unit.rows, packed_words(unit.cols, fmt.bits))
            ),
            TensorSpec(f"{unit.key}.weight_scale", torch.float16, (unit.rows, groups)),
            TensorSpec(f"{unit.key}.weight_shape", torch.int64, (2,)),
        ]
        if not fmt.symmetric:
            zeros = (packed_words(unit.rows, fmt.bits), groups)
            out.append(TensorSpec(f"{unit.key}.weight_zero_point", torch.int32, zeros))
        return out

    def tensors(
        self, units: Sequence[QuantUnit], qs: Sequence[Quantized], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The same, filled."""
        [unit], [q] = units, qs
        if q.format.codebook:
            # Our codes are the bytes of the type itself.
            return {
                f"{unit.key}.weight": q.codes.view(torch.float8_e4m3fn),
                f"{unit.key}.weight_scale": q.scales.reshape(-1) if q.format.per_tensor else q.scales,
            }
        out = {
            f"{unit.key}.weight_packed": pack_codes(q.codes, q.format.bits),
            f"{unit.key}.weight_scale": q.scales,
            f"{unit.key}.weight_shape": torch.tensor([unit.rows, unit.cols], dtype=torch.int64),
        }
        if q.zeros is not None:
            packed = pack_codes(q.zeros.T.contiguous(), q.format.bits).T.contiguous()
            out[f"{unit.key}.weight_zero_point"] = packed
        return out

    def config(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """``quantization_config``."""
        return {"quantization_config": self.target.quantization_config(allocation, index)}
