"""What a search asks of the real model, as types without torch: scores of whole allocations, and slopes around one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Objective", "Scores", "Spent"]


@dataclass(frozen=True, slots=True)
class Spent:
    """What evaluations have cost so far.

    Attributes:
        forward_tokens: tokens of forward passes, the original model's included, as if every pass ran the whole model.
        backward_tokens: tokens of backward passes.
        computed_tokens: forward tokens after prefix reuse, a pass counted by the share of the weights that it ran.
        evaluations: candidates scored.
    """

    forward_tokens: int = 0
    backward_tokens: int = 0
    computed_tokens: float = 0.0
    evaluations: int = 0

    @property
    def forward_equivalents(self) -> int:
        """Forward tokens, a backward pass counted as two forward passes; prefix reuse is not credited."""
        return self.forward_tokens + 2 * self.backward_tokens

    def plus(self, other: Spent) -> Spent:
        """The sum of two accounts."""
        return Spent(
            self.forward_tokens + other.forward_tokens,
            self.backward_tokens + other.backward_tokens,
            self.computed_tokens + other.computed_tokens,
            self.evaluations + other.evaluations,
        )

    def minus(self, other: Spent) -> Spent:
        """What was spent since ``other``."""
        return Spent(
            self.forward_tokens - other.forward_tokens,
            self.backward_tokens - other.backward_tokens,
            self.computed_tokens - other.computed_tokens,
            self.evaluations - other.evaluations,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """KL(original || allocation) of N allocations on the same S sequences.

    Attributes:
        kl: (N, S) float64, nats per token, mean of each sequence.
        tokens: (S,) int64 tokens of each sequence; the last may be cut short.
    """

    kl: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(N,) nats per token."""
        return self.kl @ (self.tokens / self.tokens.sum())

    @property
    def stderr(self) -> np.ndarray:
        """(N,) standard error over sequences; NaN for one sequence."""
        return np.array([_stderr(row, self.tokens) for row in self.kl])

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """Paired KL of candidate i minus candidate j: mean and standard error over sequences."""
        each = self.kl[i] - self.kl[j]
        return float(each @ (self.tokens / self.tokens.sum())), _stderr(each, self.tokens)


def _stderr(each: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of a token-weighted mean over sequences."""
    if len(each) < 2:
        return float("nan")
    w = tokens / tokens.sum()
    return float(np.sqrt((w**2 * (each - each @ w) ** 2).sum() * len(each) / (len(each) - 1)))


class Objective(Protocol):
    """The real model, as a search sees it. ``pool`` is ``"all"``, or one of two halves, ``"learn"`` and ``"judge"``.

    The same (tokens, seed, pool) always means the same text, and all candidates of a call see the same text.
    """

    @property
    def spent(self) -> Spent:
        """The account so far."""

    def scores(self, choices: np.ndarray, tokens: int, seed: int, pool: str = "all") -> Scores:
        """Run (N, U) choices of format indices on ``tokens`` tokens."""

    def slopes(
        self, choice: np.ndarray, tokens: int, seed: int, pool: str = "all"
    ) -> tuple[np.ndarray, float]:
        """(U, F) first-order change of the KL when one unit goes to a format, and the KL at ``choice`` (U,)."""

    def distances(self, choice: np.ndarray) -> np.ndarray:
        """(U, F) squared distance of every unit's weights in a format from those that ``choice`` gives it."""
