"""GPTQ (Frantar et al., 2023): columns are rounded one after another, each error spread over those still to come.

With H = sum x xᵀ (damped) and H⁻¹ = Uᵀ U, U upper triangular: err = (w_i - w'_i) / U_ii and W_:,i: -= err U_i,i:.
Columns go by descending diagonal of H (act-order) on grids that are fixed beforehand (static groups), so the stored
layout does not change. The sum of err² is the layer's error tr(dW H dWᵀ), exactly, and costs nothing.

An expert that saw fewer tokens than it has columns has a Hessian that says little: damping then rises from 1 % of the
mean diagonal to 100 % of it; one that saw none is rounded to nearest on the searched grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers.base import InputStats, Quantizer
from bitatlas.kernels.quantizers.grid import Grid, codes_of, finished, round_to, search_grid, values_of
from bitatlas.kernels.reference import Quantized, half, outlier_columns, with_outliers

__all__ = ["Gptq"]

_DAMPING = 0.01
_BLOCK = 128


class Gptq(Quantizer):
    """Attributes: loss — the damped layer error summed over the rows quantised so far."""

    NAME = "gptq"
    TITLE = "GPTQ"
    SOURCE = "Frantar et al. 2023, act-order, static groups"
    NEEDS_INPUTS = True

    def __init__(self, inputs: InputStats | None = None) -> None:
        super().__init__(inputs)
        self._factor: Tensor | None = None
        if inputs is not None and inputs.tokens:
            self.loss = 0.0
            self._order, self._factor, self._mean_square = _prepare(inputs)

    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Codes with the error compensated."""
        if self._factor is None:
            return with_outliers(weight, fmt, lambda w: round_to(w, search_grid(w, fmt, None, self.largest)))
        w, columns = weight.to(torch.float32), None
        if fmt.kind == "sparse":
            columns = outlier_columns(w, fmt, self._mean_square)
        dense = w if columns is None else w.scatter(1, columns, 0.0)
        grid = search_grid(dense, fmt, self._mean_square, self.largest)
        codes, values, loss = _compensate(w, grid, self._order, self._factor, columns)
        self.loss = (self.loss or 0.0) + loss
        return replace(finished(codes, grid), columns=columns, values=values)


def _prepare(inputs: InputStats) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the columns, U of the damped inverse in that order, mean square of each input."""
    h = inputs.hessian.to(torch.float64) / inputs.tokens
    cols = h.shape[0]
    mean_square = h.diagonal().clone()
    mean = mean_square.mean()
    if mean <= 0:  # the inputs were all zero: any codes do
        h, mean = torch.eye(cols, dtype=torch.float64, device=h.device), torch.tensor(1.0)
    damping = max(_DAMPING, 1 - inputs.tokens / cols)
    # In place, one name for all: each of these matrices is twice the size of the statistics.
    h.diagonal().add_(damping * mean)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h[order.unsqueeze(1), order]
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    h = torch.linalg.cholesky(h, upper=True)
    return order, h.float(), mean_square.float()


def _compensate(
    weight: Tensor, grid: Grid, order: Tensor, factor: Tensor, columns: Tensor | None
) -> tuple[Tensor, Tensor | None, float]:
    """Codes (rows, cols) in the original order of the columns, values of the outliers, and sum of err².

    An outlier is stored as it is when its turn comes, what was spread onto it included.
    """
    cols, fmt = weight.shape[1], grid.format
    spared = None
    if columns is not None:
        spared = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns, True)[:, order]
    stored = None if spared is None else torch.zeros_like(weight, dtype=torch.float16)
    scales, zeros = grid.columns(0, cols)
    w, scales, zeros = weight[:, order], scales[:, order], zeros[:, order]
    codes = torch.empty_like(w)
    loss = 0.0
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        errors = torch.empty(w.shape[0], stop - start, device=w.device)
        for i in range(start, stop):
            s, z = scales[:, i], zeros[:, i]
            now = w[:, i]
            q = codes_of(now, s, z, fmt)
            value = values_of(q, s, z, fmt)
            if spared is not None and stored is not None:
                stored[:, i] = half(now)
                q, value = (
                    torch.where(spared[:, i], z, q),
                    torch.where(spared[:, i], stored[:, i].float(), value),
                )
            codes[:, i] = q
            err = (now - value) / factor[i, i]
            w[:, i:stop].addr_(err, factor[i, i:stop], alpha=-1)
            errors[:, i - start] = err
        w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        loss += errors.square().sum().item()
    back = torch.empty_like(codes)
    back[:, order] = codes
    values = None
    if stored is not None and columns is not None:
        unsorted = torch.empty_like(stored)
        unsorted[:, order] = stored
        values = unsorted.gather(1, columns)
    return back, values, loss
