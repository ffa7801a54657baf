"""The whole model in one format, measured: what a sum of second-order damages comes to when all of them happen at once.

Single damages of a few nats are predicted well and their sum is not: units at 2 bits together cost up to twice what they
cost alone. An optimiser that believes the sum buys 2-bit units with it. One measured KL per format tells by how much, for
the price of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import QuantUnit

__all__ = ["format_scales", "uniform_kl"]

_BATCH_TOKENS = 1024
_ABOVE_NOISE = 100.0
"""Times the noise of the arithmetic that a measured KL has to be, to say anything about a prediction."""


@torch.no_grad()
def uniform_kl(
    loaded: LoadedModel, tokens: np.ndarray, units: Sequence[QuantUnit], original: Callable[[QuantUnit], Tensor],
    candidate: Callable[[QuantUnit], Tensor],
) -> tuple[np.ndarray, float]:  # fmt: skip
    """KL(original || all units as ``candidate``) of each sequence, nats per token, and the noise of the arithmetic.

    Weights are exchanged one by one and read again at the end, so that there is never a second model in memory.

    Args:
        tokens: (S, T) int64. original, candidate: (rows, cols) of a unit.
    """
    size = max(1, _BATCH_TOKENS // tokens.shape[1])
    batches = [
        torch.from_numpy(np.ascontiguousarray(tokens[i : i + size])) for i in range(0, len(tokens), size)
    ]
    before = [loaded.logits(ids) for ids in batches]
    alone = batches[0][:1] if len(batches[0]) > 1 else batches[0].expand(2, -1)
    noise = float(token_kl(before[0][:1], loaded.logits(alone)[:1]).mean())
    try:
        for unit in units:
            handle = loaded.handle(unit.key)
            handle.exchange(candidate(unit).to(handle.param))
        each = [token_kl(b, loaded.logits(ids)).mean(1).numpy() for b, ids in zip(before, batches)]
    finally:
        for unit in units:
            loaded.handle(unit.key).set(original(unit))
    return np.concatenate(each), noise


def format_scales(predicted: np.ndarray, measured: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(F,) measured over predicted damage of the uniform models; 1 where either says nothing.

    Args:
        predicted: (U, F) damages, NaN = unknown. measured, noise: (F,) KL of the uniform models, NaN = not measured.
    """
    total = np.nansum(predicted, 0)
    said = np.isfinite(measured) & (total > 0) & (measured > _ABOVE_NOISE * noise)
    return np.where(said, measured / np.where(total > 0, total, 1.0), 1.0)
