"""Round to nearest on a searched grid: every group's range is shrunk to where its squared error is least.

Each input's error counts with the input's mean square where calibration text is given. Without it all count alike, and
clipping hits the large weights, which tend to sit on the large inputs: see docs/decisions.md.
"""

from __future__ import annotations

from torch import Tensor

from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers.base import Quantizer
from bitatlas.kernels.quantizers.grid import round_to, search_grid
from bitatlas.kernels.reference import Quantized, with_outliers

__all__ = ["Mse"]


class Mse(Quantizer):
    """Works without calibration text, better with it."""

    NAME = "mse"
    TITLE = "Searched clipping"
    SOURCE = "least squared error over 20 shrunk ranges per group, weighted by the inputs' mean squares"
    TAKES_INPUTS = True

    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Nearest codes on the searched grid."""
        d = self.importance
        return with_outliers(weight, fmt, lambda w: round_to(w, search_grid(w, fmt, d, self.largest)), d)
