"""Round to nearest on the minimum-maximum grid: no data, no search. The baseline of every other quantiser."""

from __future__ import annotations

from torch import Tensor

from bitatlas.kernels import cpu_rounding
from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers.base import Quantizer
from bitatlas.kernels.reference import Quantized, quantize

__all__ = ["Rtn"]


class Rtn(Quantizer):
    """`kernels.reference.quantize`, in C where there is a compiler."""

    NAME = "rtn"
    TITLE = "Round to nearest"
    SOURCE = "minimum-maximum grid per group"

    @classmethod
    def takes_stored(cls, fmt: Format) -> bool:
        """Where it rounds in C."""
        return cpu_rounding.available(fmt)

    def __call__(self, weight: Tensor, fmt: Format) -> Quantized:
        """Nearest codes; a matrix on the CPU may come as it is stored."""
        found = cpu_rounding.rounded(weight, fmt)
        return quantize(weight, fmt, self.largest) if found is None else found
