"""Round-to-nearest quantise and dequantise in plain torch: what every kernel is checked against.

Asymmetric, per row and group of columns (zero is always representable, as in GPTQ and AWQ):
    lo = min(0, min w), hi = max(0, max w); s = fp16((hi - lo) / (2^b - 1)); z = round(-lo / s) in [0, 2^b - 1]
    q = clamp(round(w / s) + z, 0, 2^b - 1);  w' = (q - z) s
Symmetric, the convention of compressed-tensors: s = fp16(max|w| / ((2^b - 1) / 2)), codes stored as
q + 2^(b-1) unsigned, so z = 2^(b-1) is implied.
Tables (`kernels.codebooks`): w' = table[q] s, q the entry next to w / s.
Outliers: the weights with the largest |w| of every row (times the root mean square of their input, where it is
known) are stored as float16 and count as 0 for the codes; their codes are those of 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitatlas.kernels.codebooks import entries, nearest, scale_of, scale_values
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format

__all__ = [
    "Quantized",
    "dequantize",
    "half",
    "outlier_columns",
    "quantize",
    "quantize_dequantize",
    "with_outliers",
]

_MIN_SCALE = 2.0**-24  # the smallest positive float16; keeps all-zero groups at zero and divisions finite
_MAX_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised (rows, cols) matrix, unpacked.

    Attributes:
        codes: (rows, cols) uint8, unsigned codes in [0, 2^bits - 1].
        scales: (rows, groups) float16, (1, 1) for one scale per tensor; uint8 exponents for E8M0.
        zeros: (rows, groups) uint8, or None for symmetric formats (z = 2^(bits-1) is implied).
        format: the format.
        columns, values: (rows, outliers) int64 and float16, or None: weights that are stored as they are.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format
    columns: Tensor | None = None
    values: Tensor | None = None


def _grouped(weight: Tensor, group: int) -> Tensor:
    """(rows, cols) -> (rows, groups, group); a ragged last group is filled with its own last column."""
    rows, cols = weight.shape
    ragged = -cols % group
    if ragged:
        # Repeating a real value leaves the group's min and max, hence its scale, unchanged.
        weight = torch.cat([weight, weight[:, -1:].expand(rows, ragged)], dim=1)
    return weight.reshape(rows, -1, group)  # (rows, groups, group)


def _refuse_odd(weight: Tensor, *extremes: Tensor) -> None:
    if not all(bool(torch.isfinite(e).all()) for e in extremes):
        raise UserError(
            "the weight holds NaN or Inf", found=f"{int((~torch.isfinite(weight)).sum())} such values"
        )


def _grid(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Groups (rows, groups, group), float16 scales and float32 zero points (rows, groups) of a float32 matrix."""
    g = _grouped(weight, fmt.group_size or weight.shape[1])
    if fmt.symmetric:
        lo = hi = g.abs().amax(-1)  # (rows, groups)
        scale = hi / (fmt.qmax / 2)
    else:
        # amin and amax are vectorised along short groups, aminmax and isfinite are not: 15 times slower.
        lo, hi = g.amin(-1), g.amax(-1)
        scale = (hi.clamp_min(0) - lo.clamp_max(0)) / fmt.qmax
    # NaN and Inf reach the extremes of their group, so that looking there is enough.
    _refuse_odd(weight, lo, hi)
    scales = scale.clamp(_MIN_SCALE, _MAX_SCALE).to(torch.float16)
    if fmt.symmetric:
        return g, scales, torch.full_like(scale, float(1 << (fmt.bits - 1)))
    return g, scales, (-lo.clamp_max(0) / scales.to(torch.float32)).round().clamp(0, fmt.qmax)


def _codes(g: Tensor, scales: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Codes as float32 (rows, groups, group)."""
    q = g / scales.to(torch.float32).unsqueeze(-1)
    return q.round_().add_(zero.unsqueeze(-1)).clamp_(0, fmt.qmax)


def with_outliers(
    weight: Tensor, fmt: Format, dense: Callable[[Tensor], Quantized], importance: Tensor | None = None
) -> Quantized:
    """``dense`` of the weight without its outliers, and these beside it; ``dense`` alone for formats that have none.

    Args:
        weight: (rows, cols).
        dense: quantises a (rows, cols) float32 matrix.
        importance: (cols,) mean square of each input, or None.
    """
    if fmt.kind != "sparse":
        return dense(weight)
    w = weight.detach().to(torch.float32)
    columns = outlier_columns(w, fmt, importance)
    return replace(dense(w.scatter(1, columns, 0.0)), columns=columns, values=half(w.gather(1, columns)))


def half(values: Tensor) -> Tensor:
    """float16, saturating."""
    return values.clamp(-_MAX_SCALE, _MAX_SCALE).to(torch.float16)


def outlier_columns(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """(rows, outliers) int64, rising: where the weights of a (rows, cols) matrix that matter most are.

    Raises:
        UserError: NaN or Inf in the weight.
    """
    # NaN and Inf are always among the outliers, where the check of the rest would not see them.
    _refuse_odd(weight, weight.abs().amax(1))
    score = weight.abs() if importance is None else weight.abs() * importance.to(weight).sqrt()
    return score.topk(fmt.outlier_count(weight.shape[1]), dim=1).indices.sort(1).values


def quantize(weight: Tensor, fmt: Format, largest: Tensor | None = None) -> Quantized:
    """Round-to-nearest codes of a (rows, cols) float matrix.

    Args:
        weight: the matrix, or some of its rows.
        largest: the largest |w| of the whole matrix; only formats with one scale for it look at this.

    Raises:
        UserError: the weight holds NaN or Inf, or the format is a pass-through type.
    """
    if fmt.kind == "float":
        raise UserError(f"{fmt.name} stores weights as they are; there is nothing to quantise")
    return with_outliers(weight, fmt, lambda w: _quantize(w, fmt, largest))


def _quantize(weight: Tensor, fmt: Format, tensor_largest: Tensor | None) -> Quantized:
    w = weight.detach().to(torch.float32)
    if fmt.kind == "codebook":
        g = _grouped(w, fmt.group_size or w.shape[1])
        largest = g.abs().amax(-1)
        _refuse_odd(w, largest)
        if fmt.per_tensor:
            largest = (largest.amax() if tensor_largest is None else tensor_largest).reshape(1, 1)
        scales = scale_of(largest, fmt)
        codes = nearest(g / scale_values(scales).unsqueeze(-1), fmt.codebook)
        return Quantized(codes.reshape(w.shape[0], -1)[:, : w.shape[1]].contiguous(), scales, None, fmt)
    g, scales, zero = _grid(w, fmt)
    codes = _codes(g, scales, zero, fmt).reshape(w.shape[0], -1)[:, : w.shape[1]].to(torch.uint8).contiguous()
    return Quantized(codes, scales, None if fmt.symmetric else zero.to(torch.uint8), fmt)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (rows, cols) matrix that the codes stand for: (code - zero) * scale."""
    cols = q.codes.shape[1]
    group = q.format.group_size or cols
    repeat = torch.arange(cols, device=q.codes.device) // group  # (cols,) group of each column
    s = scale_values(q.scales)[:, repeat]  # (rows, cols)
    if q.format.kind == "codebook":
        return (entries(q.format.codebook).to(s.device)[q.codes.long()] * s).to(dtype)
    if q.zeros is None:
        zero: Tensor | float = float(1 << (q.format.bits - 1))
    else:
        zero = q.zeros.to(torch.float32)[:, repeat]
    out = (q.codes.to(torch.float32) - zero) * s
    if q.columns is not None and q.values is not None:
        out.scatter_(1, q.columns, q.values.to(torch.float32))
    return out.to(dtype)


def quantize_dequantize(weight: Tensor, fmt: Format, largest: Tensor | None = None) -> Tensor:
    """What the weight becomes under ``fmt``: (rows, cols) float32. Pass-through types only round.

    The same numbers as `dequantize` of `quantize`, to the last bit, without making the codes.

    Raises:
        UserError: the weight holds NaN or Inf.
    """
    if fmt.kind == "float":
        dtype = torch.bfloat16 if fmt.name == "bf16" else torch.float16
        return weight.detach().to(dtype).to(torch.float32)
    if fmt.kind != "int":
        return dequantize(quantize(weight, fmt, largest))
    w = weight.detach().to(torch.float32)
    g, scales, zero = _grid(w, fmt)
    q = _codes(g, scales, zero, fmt)
    out = q.sub_(zero.unsqueeze(-1)).mul_(scales.to(torch.float32).unsqueeze(-1))
    return out.reshape(w.shape[0], -1)[:, : w.shape[1]].contiguous()
