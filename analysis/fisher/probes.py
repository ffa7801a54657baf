"""The probe: one backward pass gives <G, Q(W) - W> for every unit and every format.

G = sum over tokens of the gradient of a random score whose second moment is the model's Fisher information
(Martens 2020, "New insights and perspectives on the natural gradient method"). Two kinds of score:

- ``labels``: log p(y_t | x_<t) with y_t drawn from the model itself, so d/dlogits = onehot(y_t) - p_t;
- ``signs``: d/dlogits = sqrt(p) * e - p <sqrt(p), e> with independent random signs e. Its covariance is
  diag(p) - p p^T, the same as that of a drawn label, and its fourth moment is far smaller (a label of
  probability 1e-3 that happens to be drawn is a large, rare kick), so fewer probes are needed.

In both, E[score_t | x] = 0 and the positions are independent, so cross terms vanish in expectation and
E<G, d>^2 = d^T F d summed over the tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.fisher.deltas import DeltaStore
from bitatlas.analysis.loaded import LoadedModel

__all__ = ["SCORES", "ProbeChunk", "ProbePass", "score_gradient"]

SCORES = ("signs", "labels")


@dataclass(frozen=True, slots=True)
class ProbeChunk:
    """What the probes of one sequence gave.

    Attributes:
        a: (P, U, F) float32, <G_u, Q_f(W_u) - W_u>.
        gsq: (P, U) float64, ||G_u||^2.
        reached: (U,) int64, tokens that passed through each unit; fewer than T for experts only.
    """

    a: np.ndarray
    gsq: np.ndarray
    reached: np.ndarray


def score_gradient(logits: Tensor, score: str, generator: torch.Generator, chunk: int = 256) -> Tensor:
    """Gradient of the random score with respect to the logits.

    Args:
        logits: (T, V), any float type; computed in float32 over ``chunk`` positions at a time.
        score: ``signs`` or ``labels``.
        generator: source of randomness, on the CPU.

    Returns:
        (T, V) in the type of the logits, zero mean, covariance diag(p) - p p^T in each position.
    """
    out = torch.empty_like(logits, requires_grad=False)
    for start in range(0, logits.shape[0], chunk):
        part = logits.detach()[start : start + chunk].float()
        p = torch.softmax(part, dim=-1)  # (n, V)
        if score == "labels":
            u = torch.rand((p.shape[0], 1), generator=generator, dtype=torch.float64).to(p.device)
            # The inverse of the cumulative distribution in double: float32 loses the tail of a large vocabulary.
            y = torch.searchsorted(p.double().cumsum(-1), u).clamp_max(p.shape[1] - 1)
            v = p.neg_().scatter_add_(-1, y, torch.ones_like(u, dtype=p.dtype))
        else:
            bits = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
            signed = p.sqrt() * (bits * 2 - 1)  # sqrt(p) * e
            v = signed - p * signed.sum(-1, keepdim=True)
        out[start : start + chunk] = v.to(out.dtype)
    return out


class ProbePass:
    """Runs probes on a loaded model; gradients are consumed and freed parameter by parameter.

    Args:
        loaded: the model.
        units: keys in the order of the result's U axis.
        store: the errors of these units.
        score: see the module's text.
    """

    def __init__(self, loaded: LoadedModel, units: Sequence[str], store: DeltaStore, score: str) -> None:
        self.store = store
        self._loaded, self._units, self._score = loaded, tuple(units), score
        self._experts = [i for i, key in enumerate(self._units) if loaded.handle(key).unit.expert >= 0]
        self._members: dict[int, list[int]] = {}
        for i, key in enumerate(self._units):
            self._members.setdefault(id(loaded.handle(key).param), []).append(i)

    @contextmanager
    def _consumed(self, a: np.ndarray, gsq: np.ndarray, row: list[int]) -> Iterator[None]:
        """Each gradient is projected into ``a[row]`` and dropped as soon as it is whole."""

        def consume(p: Tensor) -> None:
            for i in self._members[id(p)]:
                grad = self._loaded.handle(self._units[i]).grad()
                if grad is not None:
                    dots, gsq[row[0], i] = self.store.get(self._units[i]).dot(grad)
                    a[row[0], i] = dots.numpy()
            p.grad = None

        handles: list[torch.utils.hooks.RemovableHandle] = []
        with self._loaded.requires_grad(self._units) as parameters:
            try:
                handles += [p.register_post_accumulate_grad_hook(consume) for p in parameters]
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def run(self, tokens: Tensor, seeds: Sequence[int]) -> ProbeChunk:
        """Probes of one sequence; the forward pass is shared.

        Args:
            tokens: (T,) int64.
            seeds: one per draw.
        """
        a = np.zeros((len(seeds), len(self._units), self.store.n_formats), np.float32)
        gsq = np.zeros((len(seeds), len(self._units)))
        row = [0]
        reached = np.full(len(self._units), len(tokens), np.int64)
        reached[self._experts] = 0
        with self._consumed(a, gsq, row), torch.enable_grad():
            with self._counted(reached):
                logits = self._loaded.logits(tokens.unsqueeze(0))[0]  # (T, V)
            for row[0], seed in enumerate(seeds):
                v = score_gradient(logits, self._score, torch.Generator().manual_seed(seed))
                logits.backward(v, retain_graph=row[0] + 1 < len(seeds))
        return ProbeChunk(a, gsq, reached)

    @contextmanager
    def _counted(self, reached: np.ndarray) -> Iterator[None]:
        """Adds the tokens routed to each expert to ``reached`` (U,)."""
        if not self._experts:
            yield
            return
        at = {self._units[i]: i for i in self._experts}

        def count(key: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
            reached[at[key]] += len(token)

        with self._loaded.capture(count, at):
            yield
