"""How the KL changes around an allocation that is already quantised, rather than around the original model.

A second-order prediction is made at the original weights, where the KL has no gradient. An allocation that was optimised
on it picks the units whose damage is underestimated, and at two or three bits the damages of many units add up to more
than their sum. At the allocation itself the KL does have a gradient, so one forward and backward of the real loss
orders all single changes of format from there:
    KL(w + d) - KL(w) ~ <grad KL(w), d> + 1/2 d' F d,  d = Q_new(W) - Q_now(W)
(first-order reading of a vertex: RCO, arXiv 2605.00649; the second term keeps the step short).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.formats import Format, parse_format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["OperatingPoint", "Slopes"]


@dataclass(frozen=True, slots=True)
class Slopes:
    """One linearisation.

    Attributes:
        first: (U, F) first-order change of the KL in nats per token when a unit goes to a format.
        squared: (U, F) squared distance of the new weights from those in place.
        kl: KL(original || allocation) on the same text, nats per token.
    """

    first: np.ndarray
    squared: np.ndarray
    kl: float


class OperatingPoint:
    """Measures allocations, and the slopes around them, on calibration sequences.

    Args:
        loaded: the model with its original weights; they are in place again after every call.
        units: the unit keys, in order.
        formats: the columns.
        tokens: (S, T) int64.
        batch: sequences in one pass.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        units: Sequence[str],
        formats: Sequence[Format],
        tokens: np.ndarray,
        batch: int = 2,
    ) -> None:
        self.loaded, self._units, self._formats = loaded, tuple(units), tuple(formats)
        self._batches = [
            torch.from_numpy(np.ascontiguousarray(tokens[i : i + batch]))
            for i in range(0, len(tokens), batch)
        ]
        self._sequences = len(tokens)
        self.forward_tokens = 0
        self.backward_tokens = 0

    def weights(self, formats: Mapping[str, str]) -> dict[str, Tensor]:
        """Quantised weights of an allocation, (rows, cols) float32 each."""
        return {
            u: quantize_dequantize(self.loaded.handle(u).get(), parse_format(formats[u])) for u in self._units
        }

    @torch.no_grad()
    def kl(self, formats: Mapping[str, str]) -> float:
        """KL(original || allocation), nats per token."""
        weights, total = self.weights(formats), 0.0
        for ids in self._batches:
            original = self.loaded.logits(ids)
            with self.loaded.swapped(weights):
                total += float(token_kl(original, self.loaded.logits(ids)).mean()) * len(ids)
            self.forward_tokens += 2 * ids.numel()
        return total / self._sequences

    def slopes(self, formats: Mapping[str, str], reach: int = 1) -> Slopes:
        """Slopes towards the formats at most ``reach`` columns away; the others are infinite, the one in place 0."""
        now = self.weights(formats)
        column = {f.name: j for j, f in enumerate(self._formats)}
        shape = (len(self._units), len(self._formats))
        first, squared = np.full(shape, np.inf), np.full(shape, np.inf)
        originals = {u: self.loaded.handle(u).get().detach().clone() for u in self._units}
        total = 0.0
        # What is swapped in gets the gradients, so the exchange comes first.
        with self.loaded.swapped(now), self.loaded.requires_grad(self._units):
            for ids in self._batches:
                with torch.no_grad(), self.loaded.swapped(originals):
                    target = torch.log_softmax(self.loaded.logits(ids), -1)
                with torch.enable_grad():
                    found = torch.log_softmax(self.loaded.logits(ids), -1)
                    loss = (target.exp() * (target - found)).sum(-1).mean() * (len(ids) / self._sequences)
                    loss.backward()
                total += float(loss.detach())
                self.forward_tokens += 2 * ids.numel()
                self.backward_tokens += ids.numel()
            for i, u in enumerate(self._units):
                gradient, here = self.loaded.handle(u).grad(), column[formats[u]]
                for j, fmt in enumerate(self._formats):
                    if abs(j - here) > reach:
                        continue
                    change = quantize_dequantize(originals[u], fmt) - now[u]
                    first[i, j] = 0.0 if gradient is None else float((gradient * change).sum())
                    squared[i, j] = float(change.pow(2).sum())
        return Slopes(first, squared, total)
