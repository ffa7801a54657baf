"""The probe: one backward pass gives <G, Q(W) - W> for every unit and every format.

G = sum over tokens of the gradient of a random score whose second moment is the model's Fisher information
(Martens 2020, "New insights and perspectives on the natural gradient method"). Two kinds of score:

- ``labels``: log p(y_t | x_<t) with y_t drawn from the model itself, so d/dlogits = onehot(y_t) - p_t;
- ``signs``: d/dlogits = sqrt(p) * e - p <sqrt(p), e> with independent random signs e. Its covariance is
  diag(p) - p p^T, the same as that of a drawn label, and its fourth moment is far smaller (a label of
  probability 1e-3 that happens to be drawn is a large, rare kick), so fewer probes are needed.

- ``data``: log p of the text's own next token; the empirical Fisher of SqueezeLLM and FIT, whose mean is not zero.

In the first two, E[score_t | x] = 0 and the positions are independent, so cross terms vanish in expectation and
E<G, d>^2 = d^T F d summed over the tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.fisher.deltas import DeltaStore
from bitatlas.analysis.loaded import LoadedModel

__all__ = ["SCORES", "ProbeChunk", "ProbePass", "score_gradient"]

SCORES = ("signs", "labels")
"""Whose covariance is the Fisher information."""


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


def score_gradient(
    logits: Tensor,
    score: str,
    generator: torch.Generator,
    chunk: int = 256,
    next_tokens: Tensor | None = None,
) -> Tensor:
    """Gradient of the random score with respect to the logits.

    Args:
        logits: (T, V), any float type; computed in float32 over ``chunk`` positions at a time.
        score: ``signs``, ``labels``, or ``data``.
        generator: source of randomness, on the CPU.
        next_tokens: (T - 1,) int64, needed for ``data``; the last position has none, its gradient is zero.

    Returns:
        (T, V) in the type of the logits, zero mean, covariance diag(p) - p p^T in each position.
    """
    out = torch.empty_like(logits, requires_grad=False)
    for start in range(0, logits.shape[0], chunk):
        part = logits.detach()[start : start + chunk].float()
        p = torch.softmax(part, dim=-1)  # (n, V)
        if score == "data":
            assert next_tokens is not None
            y = next_tokens[start : start + chunk].to(p.device)
            n = len(y)
            v = p.neg_()
            v[torch.arange(n, device=p.device), y] += 1.0
            v[n:] = 0.0
        elif score == "labels":
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
        self.loaded, self._units, self._score = loaded, tuple(units), score
        self._experts = [i for i, key in enumerate(self._units) if loaded.handle(key).unit.expert >= 0]
        self._members: dict[int, list[int]] = {}
        for i, key in enumerate(self._units):
            self._members.setdefault(id(loaded.handle(key).param), []).append(i)

    @contextmanager
    def _consumed(self, a: np.ndarray, gsq: np.ndarray, row: list[int]) -> Iterator[None]:
        """Each gradient is projected into ``a[row]`` and dropped as soon as it is whole."""

        def consume(p: Tensor) -> None:
            for i in self._members[id(p)]:
                grad = self.loaded.handle(self._units[i]).grad()
                if grad is not None:
                    dots, gsq[row[0], i] = self.store.get(self._units[i]).dot(grad)
                    a[row[0], i] = dots.numpy()
            p.grad = None

        handles: list[torch.utils.hooks.RemovableHandle] = []
        with self.loaded.requires_grad(self._units) as parameters:
            try:
                handles += [p.register_post_accumulate_grad_hook(consume) for p in parameters]
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def run(
        self, tokens: Tensor, seeds: Sequence[int], weights: Tensor | None = None, ce: bool = False
    ) -> ProbeChunk:
        """Probes of one sequence; the forward pass is shared.

        Args:
            tokens: (T,) int64.
            seeds: one per draw.
            weights: (T,) of the positions, None = all 1.
            ce: one more row at the end: the gradient of sum_t w_t CE_t on the text's own next tokens.
        """
        rows = len(seeds) + ce
        a = np.zeros((rows, len(self._units), self.store.n_formats), np.float32)
        gsq = np.zeros((rows, len(self._units)))
        row = [0]
        reached = np.full(len(self._units), len(tokens), np.int64)
        reached[self._experts] = 0
        with self._consumed(a, gsq, row), torch.enable_grad():
            with self._counted(reached):
                logits = self.loaded.logits(tokens.unsqueeze(0))[0]  # (T, V)
            generator = torch.Generator()
            for row[0] in range(rows):
                data = row[0] == len(seeds)
                if not data:
                    generator.manual_seed(seeds[row[0]])
                score = "data" if data else self._score
                v = score_gradient(logits, score, generator, next_tokens=tokens[1:])
                if weights is not None:
                    # The square root: a Fisher is the square of its scores.
                    v *= (weights if data else weights.sqrt()).to(v.device)[:, None]
                logits.backward(-v if data else v, retain_graph=row[0] + 1 < rows)
        return ProbeChunk(a, gsq, reached)

    def slopes(self, ids: Tensor, reference: Tensor) -> tuple[np.ndarray, float]:
        """Of the KL summed over all positions, with whatever weights are in place.

        Args:
            ids: (B, T) int64. reference: (B, T, V) logits of the original.

        Returns:
            <gradient, Q_f(W) - W> (U, F) and the KL, nats.
        """
        a = np.zeros((1, len(self._units), self.store.n_formats), np.float32)
        gsq = np.zeros((1, len(self._units)))
        with self._consumed(a, gsq, [0]), torch.enable_grad():
            logits = self.loaded.logits(ids)
            # d KL(p || q) / d logits of q = q - p
            pull = torch.softmax(logits.detach().float(), -1) - torch.softmax(reference.float(), -1)
            logits.backward(pull.to(logits.dtype))
        return a[0].astype(np.float64), float(token_kl(reference, logits.detach()).sum())

    @contextmanager
    def _counted(self, reached: np.ndarray) -> Iterator[None]:
        """Adds the tokens routed to each expert to ``reached`` (U,)."""
        if not self._experts:
            yield
            return
        at = {self._units[i]: i for i in self._experts}

        def count(key: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
            reached[at[key]] += len(token)

        with self.loaded.capture(count, at):
            yield
