"""Formats whose codes name entries of a table: NF4, FP4 (E2M1), MXFP4 and FP8 (E4M3).

A weight is table[code] * scale. Scales are float16, the largest |w| of the group over the table's largest entry; MXFP4's
are powers of two in one byte (E8M0, OCP Microscaling v1.0: the exponent of the largest |w| less that of the largest
entry, so that values above 6 scales saturate). Ties go to the code with an even last bit, as in IEEE rounding.
NF4: Dettmers et al. 2023 (QLoRA), appendix E.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bitatlas.kernels.formats import Format

__all__ = ["entries", "nearest", "scale_of", "scale_values"]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_EXPONENT = 2  # of its largest entry, 6 = 1.5 * 2^2
_E8M0_BIAS = 127
_MIN_SCALE, _MAX_SCALE = 2.0**-24, 65504.0  # float16


@cache
def entries(name: str) -> Tensor:
    """(codes,) float32: what each code of a table stands for before scaling; NaN for FP8's two NaN codes."""
    if name == "nf4":
        return torch.tensor(_NF4)
    if name == "fp4":
        return torch.tensor([*_E2M1, *(-v for v in _E2M1)])
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def _borders(name: str) -> tuple[Tensor, Tensor]:
    """Codes by rising value, and the borders between them; a value on a border goes below it."""
    values = entries(name)
    # The second zero, -0, is never chosen.
    codes = torch.tensor(
        [c for c, v in enumerate(values.tolist()) if v == v and not (v == 0 and c >= len(values) // 2)]
    )
    codes = codes[values[codes].argsort()]
    ordered = values[codes].double()
    middle = ((ordered[1:] + ordered[:-1]) / 2).float()
    up = codes[1:] % 2 == 0
    return codes.to(torch.uint8), torch.where(up, torch.nextafter(middle, torch.tensor(-torch.inf)), middle)


def nearest(x: Tensor, name: str) -> Tensor:
    """uint8 codes of the entries next to ``x`` (any shape, finite); beyond the largest entry it saturates."""
    codes, borders = _borders(name)
    return codes.to(x.device)[torch.bucketize(x.float(), borders.to(x.device))]


def scale_of(largest: Tensor, fmt: Format) -> Tensor:
    """Stored scales of groups whose largest |w| is ``largest``: float16, or uint8 exponents for MXFP4."""
    if fmt.scale == "e8m0":
        exponent = torch.frexp(largest.float())[1] - 1 - _E2M1_EXPONENT + _E8M0_BIAS
        return torch.where(largest > 0, exponent, 0).clamp(0, 2 * _E8M0_BIAS).to(torch.uint8)
    top = float(entries(fmt.codebook).nan_to_num(0).max())
    return (largest.float() / top).clamp(_MIN_SCALE, _MAX_SCALE).to(torch.float16)


def scale_values(scales: Tensor) -> Tensor:
    """Stored scales as float32 factors."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.to(torch.float32) - _E8M0_BIAS)
    return scales.to(torch.float32)
