"""Round to nearest on a searched grid: every group's range is shrunk to where its squared error is least."""

from __future__ import annotations

from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers.base import Quantizer
from bitatlas.kernels.quantizers.grid import round_to, search_grid
from bitatlas.kernels.reference import Quantized

__all__ = ["Mse"]


class Mse(Quantizer):
    """Weights only; no calibration text."""

    NAME = "mse"
    TITLE = "Searched clipping"
    SOURCE = "least squared error over 40 shrunk ranges per group"

    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Nearest codes on the searched grid."""
        return round_to(weight, search_grid(weight, fmt))
