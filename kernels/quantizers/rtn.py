"""Round to nearest on the minimum-maximum grid: no data, no search. The baseline of every other quantiser."""

from __future__ import annotations

from bitatlas.kernels.reference import quantize

__all__ = ["quantize"]
