"""Grids: the scale and zero point of every row and group. Shared by all quantisers.

The minimum-maximum grid is that of `kernels.reference`. The searched grid shrinks the range step by step and keeps, for
every group on its own, the range whose rounding costs least: sum_j d_j |w_j - w'_j|^2, with d_j the mean square of
input j where it is known (the diagonal of the layer's Hessian), else 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitatlas.kernels.codebooks import entries, nearest, scale_of, scale_values
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import Quantized

__all__ = ["Grid", "codes_of", "finished", "minmax_grid", "round_to", "search_grid", "values_of"]

_MIN_SCALE, _MAX_SCALE = 2.0**-24, 65504.0  # float16
_STEPS = 20
_LEAST = 0.4  # the smallest range tried, as a share of the largest
_BLOCK_WEIGHTS = (
    1 << 18
)  # searched at a time: the search passes over them hundreds of times, so they stay in cache


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales (rows, groups) as stored, (1, 1) for one per tensor, and zeros (rows, groups) float32 holding integers (0 for tables)."""

    scales: Tensor
    zeros: Tensor
    format: Format

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of columns ``start`` to ``stop``: (rows, columns) each, float32."""
        group = self.format.group_size
        index = torch.arange(start, stop, device=self.scales.device)
        index = torch.zeros_like(index) if group is None else index // group
        return scale_values(self.scales)[:, index], self.zeros[:, index]


def codes_of(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Nearest codes, as float32 integers; the arguments broadcast."""
    if fmt.kind == "codebook":
        return nearest(w / scale, fmt.codebook).to(torch.float32)
    return ((w / scale).round_() + zero).clamp_(0, fmt.qmax)


def values_of(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """What float32 codes stand for."""
    if fmt.kind == "codebook":
        return entries(fmt.codebook).to(codes.device)[codes.long()] * scale
    return (codes - zero) * scale


def _groups(weight: Tensor, fmt: Format) -> Tensor:
    """(rows, groups, group); a ragged last group is filled with its own last column."""
    rows, cols = weight.shape
    group = fmt.group_size or cols
    if missing := -cols % group:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
    return weight.reshape(rows, -1, group)


def _grid(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Stored scales and zeros of ranges that include 0."""
    if fmt.kind == "codebook":
        return scale_of(torch.maximum(-low, high), fmt), torch.zeros_like(low)
    if fmt.symmetric:
        scale = torch.maximum(-low, high) / (fmt.qmax / 2)
        scales = scale.clamp(_MIN_SCALE, _MAX_SCALE).half()
        return scales, torch.full_like(low, float(1 << (fmt.bits - 1)))
    scales = ((high - low) / fmt.qmax).clamp(_MIN_SCALE, _MAX_SCALE).half()
    return scales, (-low / scales.float()).round().clamp(0, fmt.qmax)


def _checked(weight: Tensor, fmt: Format) -> Tensor:
    if fmt.kind == "float":
        raise UserError(f"{fmt.name} stores weights as they are; there is nothing to quantise")
    w = weight.detach().to(torch.float32)
    if not torch.isfinite(w).all():
        raise UserError("the weight holds NaN or Inf", found=f"{int((~torch.isfinite(w)).sum())} such values")
    return w


def minmax_grid(weight: Tensor, fmt: Format) -> Grid:
    """The grid that spans each group of a (rows, cols) weight.

    Raises:
        UserError: NaN or Inf, or a pass-through format.
    """
    if fmt.per_tensor:
        return search_grid(weight, fmt)
    g = _groups(_checked(weight, fmt), fmt)
    return Grid(*_grid(g.amin(-1).clamp_max(0), g.amax(-1).clamp_min(0), fmt), fmt)


def search_grid(
    weight: Tensor, fmt: Format, importance: Tensor | None = None, largest: Tensor | None = None
) -> Grid:
    """The grid with the least weighted rounding error of each group.

    A single scale of a matrix is not searched: it would take the whole matrix, and floating-point codes do not gain.

    Args:
        weight: (rows, cols).
        importance: (cols,) not negative, or None.
        largest: the largest |w| of the matrix that these rows are of, for one scale per tensor; None = of these.

    Raises:
        UserError: NaN or Inf, or a pass-through format.
    """
    w = _checked(weight, fmt)
    if fmt.per_tensor:
        scales = scale_of((w.abs().amax() if largest is None else largest).reshape(1, 1), fmt)
        return Grid(scales, torch.zeros(1, 1, device=w.device), fmt)
    cols = w.shape[1]
    d = torch.ones(1, cols, device=w.device) if importance is None else importance.to(w).reshape(1, -1)
    group = fmt.group_size or cols
    # Columns that only fill a ragged group must not count.
    d = torch.nn.functional.pad(d, (0, -cols % group)).reshape(1, -1, group)
    found = [_searched(_groups(b, fmt), fmt, d) for b in w.split(max(_BLOCK_WEIGHTS // max(cols, 1), 1))]
    return Grid(torch.cat([s for s, _ in found]), torch.cat([z for _, z in found]), fmt)


def _searched(g: Tensor, fmt: Format, d: Tensor) -> tuple[Tensor, Tensor]:
    """Best scales and zeros of (rows, groups, group) weights."""
    low, high = g.amin(-1).clamp_max(0), g.amax(-1).clamp_min(0)
    best_scales, best_zeros = _grid(low, high, fmt)
    best = torch.full_like(low, torch.inf)
    for step in range(_STEPS):
        share = 1 - (1 - _LEAST) * step / _STEPS
        scales, zeros = _grid(low * share, high * share, fmt)
        s, z = scale_values(scales).unsqueeze(-1), zeros.unsqueeze(-1)
        rounded = values_of(codes_of(g, s, z, fmt), s, z, fmt)
        error = rounded.sub_(g).square_().mul_(d).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def round_to(weight: Tensor, grid: Grid) -> Quantized:
    """Nearest codes on a grid."""
    s, z = grid.columns(0, weight.shape[1])
    return finished(codes_of(weight.to(torch.float32), s, z, grid.format), grid)


def finished(codes: Tensor, grid: Grid) -> Quantized:
    """Codes (rows, cols) holding integers, with their grid, in storage types."""
    zeros = None if grid.format.symmetric else grid.zeros.to(torch.uint8)
    return Quantized(codes.to(torch.uint8), grid.scales, zeros, grid.format)
