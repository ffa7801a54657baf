"""Quantisers: a (rows, cols) weight and a format to codes, scales and zeros. One file each, named as in the table."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format
from bitatlas.kernels.quantizers import rtn
from bitatlas.kernels.reference import Quantized

__all__ = ["QUANTIZERS", "Quantizer", "get_quantizer"]

Quantizer = Callable[[Tensor, Format], Quantized]

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn.quantize,
}


def get_quantizer(name: str) -> Quantizer:
    """The quantiser called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in QUANTIZERS:
        raise UserError(f"there is no quantizer called {name!r}", found=f"known: {', '.join(QUANTIZERS)}",
                        fix=f"--quantizer {next(iter(QUANTIZERS))}")  # fmt: skip
    return QUANTIZERS[name]
