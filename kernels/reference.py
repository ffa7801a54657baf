"""Round-to-nearest quantise and dequantise in plain torch: what every kernel is checked against.

Asymmetric, per row and group of columns (zero is always representable, as in GPTQ and AWQ):
    lo = min(0, min w), hi = max(0, max w); s = fp16((hi - lo) / (2^b - 1)); z = round(-lo / s) in [0, 2^b - 1]
    q = clamp(round(w / s) + z, 0, 2^b - 1);  w' = (q - z) s
Symmetric, the convention of compressed-tensors: s = fp16(max|w| / ((2^b - 1) / 2)), codes stored as
q + 2^(b-1) unsigned, so z = 2^(b-1) is implied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format

__all__ = ["Quantized", "dequantize", "quantize", "quantize_dequantize"]

_MIN_SCALE = 2.0**-24  # the smallest positive float16; keeps all-zero groups at zero and divisions finite
_MAX_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised (rows, cols) matrix, unpacked.

    Attributes:
        codes: (rows, cols) uint8, unsigned codes in [0, 2^bits - 1].
        scales: (rows, groups) float16.
        zeros: (rows, groups) uint8, or None for symmetric formats (z = 2^(bits-1) is implied).
        format: the format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format


def _grouped(weight: Tensor, group: int) -> Tensor:
    """(rows, cols) -> (rows, groups, group); a ragged last group is filled with its own last column."""
    rows, cols = weight.shape
    ragged = -cols % group
    if ragged:
        # Repeating a real value leaves the group's min and max, hence its scale, unchanged.
        weight = torch.cat([weight, weight[:, -1:].expand(rows, ragged)], dim=1)
    return weight.reshape(rows, -1, group)  # (rows, groups, group)


def quantize(weight: Tensor, fmt: Format) -> Quantized:
    """Round-to-nearest codes of a (rows, cols) float matrix.

    Raises:
        UserError: the weight holds NaN or Inf, or the format is a pass-through type.
    """
    if fmt.kind != "int":
        raise UserError(f"{fmt.name} stores weights as they are; there is nothing to quantise")
    w = weight.detach().to(torch.float32)
    if not torch.isfinite(w).all():
        raise UserError("the weight holds NaN or Inf", found=f"{int((~torch.isfinite(w)).sum())} such values")
    rows, cols = w.shape
    g = _grouped(w, fmt.group_size or cols)  # (rows, groups, group)
    if fmt.symmetric:
        scale = g.abs().amax(-1) / (fmt.qmax / 2)  # (rows, groups)
    else:
        lo, hi = g.amin(-1).clamp_max(0), g.amax(-1).clamp_min(0)
        scale = (hi - lo) / fmt.qmax
    scales = scale.clamp(_MIN_SCALE, _MAX_SCALE).to(torch.float16)
    s = scales.to(torch.float32)
    if fmt.symmetric:
        zero = torch.full_like(s, float(1 << (fmt.bits - 1)))
    else:
        zero = (-lo / s).round().clamp(0, fmt.qmax)
    q = ((g / s.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, fmt.qmax)
    codes = q.reshape(rows, -1)[:, :cols].to(torch.uint8).contiguous()
    return Quantized(codes, scales, None if fmt.symmetric else zero.to(torch.uint8), fmt)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (rows, cols) matrix that the codes stand for: (code - zero) * scale."""
    cols = q.codes.shape[1]
    group = q.format.group_size or cols
    repeat = torch.arange(cols, device=q.codes.device) // group  # (cols,) group of each column
    s = q.scales.to(torch.float32)[:, repeat]  # (rows, cols)
    if q.zeros is None:
        zero: Tensor | float = float(1 << (q.format.bits - 1))
    else:
        zero = q.zeros.to(torch.float32)[:, repeat]
    return ((q.codes.to(torch.float32) - zero) * s).to(dtype)


def quantize_dequantize(weight: Tensor, fmt: Format) -> Tensor:
    """What the weight becomes under ``fmt``: (rows, cols) float32. Pass-through types only round."""
    if fmt.kind == "float":
        dtype = torch.bfloat16 if fmt.name == "bf16" else torch.float16
        return weight.detach().to(dtype).to(torch.float32)
    return dequantize(quantize(weight, fmt))
