"""Features of units that do not depend on a model's size: what a policy sees that has to work on other models too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.evaluator import Evaluator

__all__ = ["FEATURES", "unit_features"]

FEATURES = (
    "log max |x|", "log kurtosis x", "log mean |x|", "log std W", "log max |W| / std W", "log kurtosis W",
    "kind: attention 0, into the MLP 0.5, out of it 1", "relative depth", "log share of the weights",
)  # fmt: skip
_KIND = {"gate": 0.5, "up": 0.5, "gate_up": 0.5, "fc1": 0.5, "down": 1.0, "fc2": 1.0}
_PLAIN = (6, 7)


@torch.no_grad()
def unit_features(evaluator: Evaluator, tokens: int = 1024) -> np.ndarray:
    """(U, 9) float64 `FEATURES`; all but kind and depth as robust z-scores within the model (median, 1.4826 MAD).

    What is unknown (an expert that no token reached, the input of an embedding) counts as the median.
    """
    loaded, units = evaluator.loaded, evaluator.weights.units
    inputs: dict[str, _Moments] = {}

    def watch(key: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        if x.numel():
            inputs.setdefault(key, _Moments()).add(x)

    with loaded.capture(watch):
        for numbers, length in evaluator.minibatch(tokens, 0):
            loaded.logits(evaluator.ids(numbers, length))
    out = np.full((len(units), len(FEATURES)), np.nan)
    total = sum(loaded.handle(u).unit.params for u in units)
    depth = max(loaded.index.n_layers - 1, 1)
    for i, key in enumerate(units):
        handle = loaded.handle(key)
        x, w = inputs.get(key), _Moments()
        w.add(handle.get())
        if x is not None:
            out[i, :3] = [np.log(x.largest + 1e-12), np.log(x.kurtosis + 1e-12), np.log(x.mean_size + 1e-12)]
        out[i, 3:6] = [
            np.log(w.std + 1e-12),
            np.log(w.largest / (w.std + 1e-12) + 1e-12),
            np.log(w.kurtosis + 1e-12),
        ]
        out[i, 6] = _KIND.get(handle.unit.role.removeprefix("shared_"), 0.0)
        out[i, 7] = np.clip(handle.unit.layer, 0, depth) / depth if handle.unit.role != "head" else 1.0
        out[i, 8] = np.log(handle.unit.params / total)
    for j in range(out.shape[1]):
        known = np.isfinite(out[:, j])
        if j not in _PLAIN and known.any():
            middle = np.median(out[known, j])
            spread = 1.4826 * np.median(np.abs(out[known, j] - middle))
            out[:, j] = (out[:, j] - middle) / spread if spread > 1e-9 else out[:, j] - middle
    return np.clip(np.nan_to_num(out, nan=0.0), -5.0, 5.0)


class _Moments:
    """Running moments of all elements."""

    def __init__(self) -> None:
        self._sums, self._count = np.zeros(5), 0
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        flat = x.detach().double().flatten()
        self._sums += [
            float(v)
            for v in (flat.sum(), (flat**2).sum(), (flat**3).sum(), (flat**4).sum(), flat.abs().sum())
        ]
        self._count += flat.numel()
        self.largest = max(self.largest, float(flat.abs().max()))

    @property
    def mean_size(self) -> float:
        return float(self._sums[4] / self._count)

    @property
    def std(self) -> float:
        return float(np.sqrt(max(self._central(2), 0.0)))

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance, 3 for a Gaussian."""
        variance = self._central(2)
        return float(self._central(4) / variance**2) if variance > 0 else 0.0

    def _central(self, order: int) -> float:
        m1, m2, m3, m4 = (self._sums[:4] / self._count).tolist()
        if order == 2:
            return m2 - m1**2
        return m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
