"""AWQ (Lin et al., 2023): input channels that carry much are stretched before rounding, and what feeds them is shrunk.

With s > 0 per input channel, W x = (W diag s)(x / s). Rounding W diag s instead of W moves error away from the channels
with large s. One s serves all matrices that see the same x, because x / s comes from the one layer before them, into
which 1 / s is folded: the function does not change, and the stored model needs no extra operation.

s = (rms x)^a, normalised by sqrt(max s min s), as published but for rms in the place of mean |x|. The exponent a is the
one of 20 with the least summed output error sum tr(dW H dW^T), dW = Q(W diag s) diag(1/s) - W, on round-to-nearest grids. The
published clip search follows: here the searched grid, each input weighted by its mean square.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers.base import InputStats, Quantizer
from bitatlas.kernels.quantizers.grid import round_to, search_grid
from bitatlas.kernels.reference import Quantized, quantize_dequantize, with_outliers

__all__ = ["Awq", "channel_scale", "output_errors"]

EXPONENTS = tuple(i / 20 for i in range(20))
_LEAST = 1e-4
_ROWS = 256


class Awq(Quantizer):
    """Rounds a matrix that has been scaled already, on the searched grid; ``inputs`` are those after the fold."""

    NAME = "awq"
    TITLE = "AWQ"
    SOURCE = "Lin et al. 2023 (arXiv 2306.00978), eq. 4-5, scales folded into the layer before, clip search"
    NEEDS_INPUTS = True
    FOLDS = True

    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Nearest codes on the weighted searched grid."""
        d = self.importance
        return with_outliers(weight, fmt, lambda w: round_to(w, search_grid(w, fmt, d, self.largest)), d)


def channel_scale(mean_square: Tensor, exponent: float) -> Tensor:
    """s (channels,) from the mean square of each input; 1 everywhere for exponent 0 or inputs that are all alike."""
    s = mean_square.double().clamp_min(0).sqrt().pow(exponent).clamp_min(_LEAST)
    return (s / (s.max() * s.min()).sqrt()).float()


def output_errors(weight: Tensor, fmt: Format, inputs: InputStats, scales: Iterable[Tensor]) -> list[float]:
    """sum over tokens of |dW x|^2 of a (rows, cols) weight for each of ``scales`` (cols,).

    Of at most 256 rows, evenly spread: the exponent that is best for them is the best for all.
    """
    hessian = inputs.hessian.to(weight)
    every = -(-weight.shape[0] // _ROWS)
    weight, out = weight[::every], []
    for s in scales:
        change = quantize_dequantize(weight * s, fmt).div_(s).sub_(weight)
        out.append(every * float(torch.einsum("ij,ij->", change @ hessian, change)))
    return out
