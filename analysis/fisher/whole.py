"""The whole model in one format, measured: what a sum of second-order damages comes to when all of them happen at once.

Single damages of a few nats are predicted well and their sum is not: units at 2 bits together cost up to twice what they
cost alone. An optimiser that believes the sum buys 2-bit units with it. One measured KL per format tells by how much, for
the price of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import batch_noise, token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import QuantUnit

__all__ = ["WholeModel", "format_scales"]

_BATCH_TOKENS = 1024
_ABOVE_NOISE = 100.0
"""Times the noise of the arithmetic that a measured KL has to be, to say anything about a prediction."""


class WholeModel:
    """A model measured with all its units quantised at once; the original's logits are kept in between.

    Args:
        loaded: the model with its original weights; they are in place again after every call.
        tokens: (S, T) int64. original: the (rows, cols) weight of a unit as the checkpoint has it.

    Attributes:
        batches: (B, T) int64 ids each, and the original's (B, T, V) logits of them.
    """

    @torch.no_grad()
    def __init__(
        self,
        loaded: LoadedModel,
        tokens: np.ndarray,
        units: Sequence[QuantUnit],
        original: Callable[[QuantUnit], Tensor],
    ) -> None:
        size = max(1, _BATCH_TOKENS // tokens.shape[1])
        parts = [np.ascontiguousarray(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self._loaded, self._units, self._weight = loaded, tuple(units), original
        self.batches = [(ids, loaded.logits(ids)) for ids in map(torch.from_numpy, parts)]

    @cached_property
    def noise(self) -> float:
        """KL that the order of summation alone makes, nats per token; the original's weights must be in place."""
        with torch.no_grad():
            return batch_noise(self._loaded.logits, *self.batches[0])

    @contextmanager
    def placed(self, candidate: Callable[[QuantUnit], Tensor]) -> Iterator[None]:
        """All units as ``candidate`` says.

        Weights are exchanged one by one and read again at the end: there is never a second model in memory.
        """
        try:
            with torch.no_grad():
                for unit in self._units:
                    handle = self._loaded.handle(unit.key)
                    handle.exchange(candidate(unit).to(handle.param))
            yield
        finally:
            with torch.no_grad():
                for unit in self._units:
                    self._loaded.handle(unit.key).set(self._weight(unit))

    @torch.no_grad()
    def kl(self, candidate: Callable[[QuantUnit], Tensor]) -> np.ndarray:
        """(S,) KL(original || all units as ``candidate`` says) of each sequence, nats per token."""
        with self.placed(candidate):
            each = [token_kl(logits, self._loaded.logits(ids)).mean(1) for ids, logits in self.batches]
        return torch.cat(each).numpy()


def format_scales(predicted: np.ndarray, measured: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(F,) measured over predicted damage of the uniform models; 1 where either says nothing.

    Args:
        predicted: (U, F) damages, NaN = unknown. measured, noise: (F,) KL of the uniform models, NaN = not measured.
    """
    total = np.nansum(predicted, 0)
    said = np.isfinite(measured) & (total > 0) & (measured > _ABOVE_NOISE * noise)
    return np.where(said, measured / np.where(total > 0, total, 1.0), 1.0)
