"""Quantisers: how the codes of a unit are chosen. An explicit table; one file each, named as in the table."""

from __future__ import annotations

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.quantizers.awq import Awq
from bitatlas.kernels.quantizers.base import InputStats, Quantizer
from bitatlas.kernels.quantizers.gptq import Gptq
from bitatlas.kernels.quantizers.mse import Mse
from bitatlas.kernels.quantizers.rtn import Rtn

__all__ = ["QUANTIZERS", "InputStats", "Quantizer", "get_quantizer"]

QUANTIZERS: dict[str, type[Quantizer]] = {q.NAME: q for q in (Rtn, Mse, Gptq, Awq)}


def get_quantizer(name: str) -> type[Quantizer]:
    """The quantiser called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in QUANTIZERS:
        raise UserError(f"there is no quantizer called {name!r}", found=f"known: {', '.join(QUANTIZERS)}",
                        fix=f"--quantizer {next(iter(QUANTIZERS))}")  # fmt: skip
    return QUANTIZERS[name]
