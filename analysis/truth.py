"""Measured KL of whole allocations, one after the other: what predictions of whole allocations are judged by.

The original's distributions and the quantised weights are kept, so that an allocation costs one forward pass of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import KlReference, batch_noise
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["AllocationTruth"]


class AllocationTruth:
    """KL(original || allocation) on one text.

    Args:
        loaded: the model with its original weights; they are in place again after every call.
        units: (U,) unit keys.
        formats: what the positions of a choice mean.
        tokens: (S, T) int64.
        batch_tokens: tokens of one forward pass.
        cache_gib: RAM for the original's distributions (always kept) and the quantised weights (as far as they fit).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        units: Sequence[str],
        formats: Sequence[Format],
        tokens: np.ndarray,
        *,
        batch_tokens: int = 512,
        cache_gib: float = 4.0,
    ) -> None:
        if tokens.ndim != 2 or not tokens.size:
            raise UserError("there is no text to measure on", found=f"tokens of shape {tokens.shape}")
        self._loaded, self._units, self._formats = loaded, tuple(units), tuple(formats)
        size = max(1, batch_tokens // tokens.shape[1])
        self._batches = [torch.from_numpy(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self._left = int(cache_gib * 2**30)
        self._references: dict[int, KlReference] = {}
        self._weights: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def noise(self) -> float:
        """KL of the original against itself, the same sequence in another batch layout; nats per token."""
        ids = self._batches[0]
        return batch_noise(self._loaded.logits, ids, self._loaded.logits(ids))

    @torch.no_grad()
    def kl(self, choice: np.ndarray) -> np.ndarray:
        """(S,) mean KL of every sequence, nats per token, of the allocation ``choice`` (U,)."""
        references = list(self._prepared())
        weights = {u: self._weight(u, int(f)) for u, f in zip(self._units, choice)}
        out = []
        with self._loaded.swapped(weights):
            for ids, reference in references:
                out.append(reference.kl(self._loaded.logits(ids)).mean(1).numpy())
        return np.concatenate(out)

    def _prepared(self) -> Iterator[tuple[Tensor, KlReference]]:
        """Batches with the original's distributions; they come first, while the original weights are in place."""
        for i, ids in enumerate(self._batches):
            found = self._references.get(i)
            if found is None:
                found = self._references[i] = KlReference(self._loaded.logits(ids))
                self._left -= found.nbytes
            yield ids, found

    def _weight(self, unit: str, f: int) -> Tensor:
        found = self._weights.get((unit, f))
        if found is None:
            found = quantize_dequantize(self._loaded.handle(unit).get(), self._formats[f])
            size = found.numel() * found.element_size()
            if size <= self._left:
                self._weights[unit, f] = found
                self._left -= size
        return found
