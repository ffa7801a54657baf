"""Second moments of the units' inputs, sum of x xᵀ over calibration tokens: what GPTQ-like quantisers need.

Units with the same input (q, k and v; gate and up) share one matrix, and units are taken in batches whose matrices
fit into a memory limit; every batch costs one pass of the calibration text through the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import QuantUnit
from bitatlas.kernels.quantizers.base import InputStats

__all__ = ["InputSource", "collect_inputs", "input_key"]

_SHARED = {"q": "attention", "k": "attention", "v": "attention", "q_a": "attention", "kv_a": "attention",
           "gate": "mlp", "up": "mlp", "shared_gate": "shared", "shared_up": "shared"}  # fmt: skip
_BATCH_TOKENS = 1024  # with a large vocabulary, logits are what takes the memory


class _Reached(Exception):
    """The last layer that was asked for has been passed."""


def input_key(unit: QuantUnit) -> tuple[int, int, str]:
    """Equal for units that see the same input."""
    return unit.layer, unit.expert, _SHARED.get(unit.role, unit.key)


def collect_inputs(
    loaded: LoadedModel, tokens: np.ndarray, units: Iterable[QuantUnit], batch_tokens: int = _BATCH_TOKENS
) -> dict[str, InputStats]:
    """Unit -> its input statistics from one pass of ``tokens`` (S, T). An expert nobody chose has 0 tokens.

    Embeddings are left out: a look-up has no input. The model is run as far as the units go.
    """
    wanted = [u for u in units if u.role != "embed"]
    first: dict[tuple[int, int, str], QuantUnit] = {}
    for u in wanted:
        first.setdefault(input_key(u), u)
    key_of = {u.key: key for key, u in first.items()}
    sums = {key: torch.zeros(u.cols, u.cols) for key, u in first.items()}
    counts = dict.fromkeys(first, 0)

    head = any(u.layer < 0 for u in wanted)
    last = max((u.layer for u in wanted), default=-1)
    behind = [] if head else [u.key for u in loaded.index.units if u.layer == last + 1]

    def add(unit: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        if unit not in key_of:
            raise _Reached
        key, flat = key_of[unit], x.float()
        sums[key].addmm_(flat.T.cpu(), flat.cpu())
        counts[key] += len(flat)

    step = max(1, batch_tokens // tokens.shape[1])
    with torch.no_grad(), loaded.capture(add, [*key_of, *behind]):
        for start in range(0, len(tokens), step):
            ids = torch.from_numpy(np.ascontiguousarray(tokens[start : start + step]))
            with suppress(_Reached):
                loaded.logits(ids) if head else loaded.run_body(ids)
    return {u.key: InputStats(sums[input_key(u)], counts[input_key(u)]) for u in wanted}


class InputSource:
    """Statistics on demand for units asked for in order, a batch ahead at a time.

    Args:
        loaded: the model.
        tokens: (S, T) calibration tokens.
        units: in the order in which they will be asked for.
        limit_bytes: of all matrices held at once (one is always allowed).
    """

    def __init__(
        self, loaded: LoadedModel, tokens: np.ndarray, units: Sequence[QuantUnit], limit_bytes: int = 1 << 28
    ) -> None:
        self.loaded, self.tokens, self.limit_bytes = loaded, tokens, limit_bytes
        self._units = [u for u in units if u.role != "embed"]
        self._at = {u.key: i for i, u in enumerate(self._units)}
        self._held: dict[str, InputStats] = {}
        self.passes = 0

    def get(self, unit: str) -> InputStats | None:
        """The unit's statistics; None for an embedding."""
        if unit not in self._at:
            return None
        if unit not in self._held:
            self._held = {}  # before the next batch is made
            self._held = collect_inputs(self.loaded, self.tokens, self._batch(self._at[unit]))
            self.passes += 1
        return self._held[unit]

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum({input_key(u): u.cols * u.cols * 4 for u in self._units}.values())

    def fill(self) -> None:
        """Make the first batch now: everything, where the limit allows it."""
        if self._units and not self._held:
            self.get(self._units[0].key)

    def _batch(self, start: int) -> list[QuantUnit]:
        batch: list[QuantUnit] = []
        seen: dict[tuple[int, int, str], int] = {}
        for u in self._units[start:]:
            size = 0 if input_key(u) in seen else u.cols * u.cols * 4
            if batch and sum(seen.values()) + size > self.limit_bytes:
                break
            seen.setdefault(input_key(u), size)
            batch.append(u)
        return batch
