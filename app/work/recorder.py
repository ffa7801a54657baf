"""What a search asked of the real model, as rows of the store."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.schema import Scores, Spent
from bitatlas.cache.keys import digest
from bitatlas.cache.plans import Candidate
from bitatlas.solvers import Problem

__all__ = ["Recorder", "packed_choice", "unpacked_choice"]


class Recorder:
    """An objective that remembers what it was asked: the candidates since the last `take`."""

    def __init__(self, evaluator: Evaluator, problem: Problem) -> None:
        self.evaluator, self._problem = evaluator, problem
        self._rows: list[tuple[np.ndarray, float, float, int, int, str, int]] = []
        self._start = 0

    @property
    def spent(self) -> Spent:
        """The evaluator's account."""
        return self.evaluator.spent

    def scores(self, choices: np.ndarray, tokens: int, seed: int, pool: str = "all") -> Scores:
        """As the evaluator; one row per candidate."""
        choices = np.atleast_2d(choices)
        scores = self.evaluator.scores(choices, tokens, seed, pool)
        at = self.spent.forward_equivalents
        for choice, mean, error in zip(choices, scores.mean.tolist(), scores.stderr.tolist()):
            self._rows.append((choice, mean, error, int(scores.tokens.sum()), seed, pool, at))
        return scores

    def slopes(
        self, choice: np.ndarray, tokens: int, seed: int, pool: str = "all"
    ) -> tuple[np.ndarray, float]:
        """As the evaluator; the point itself is a candidate too."""
        slope, kl = self.evaluator.slopes(choice, tokens, seed, pool)
        self._rows.append((choice, kl, float("nan"), tokens, seed, pool, self.spent.forward_equivalents))
        return slope, kl

    def distances(self, choice: np.ndarray) -> np.ndarray:
        """As the evaluator."""
        return self.evaluator.distances(choice)

    def take(self, step: int, before: int) -> list[Candidate]:
        """Rows since the last call; ``before`` is what earlier steps had spent."""
        out = []
        for choice, mean, error, tokens, seed, pool, at in self._rows:
            packed = packed_choice(choice)
            extra = {"choice": packed, "stderr": error, "step": step, "pool": pool, "seed": seed,
                     "forward_equivalents": before + at - self._start}  # fmt: skip
            key = digest([packed, step, tokens, seed, pool])
            out.append(Candidate(key, mean, self._problem.payload(choice), tokens, extra))
        self._rows.clear()
        self._start = self.spent.forward_equivalents
        return list({c.choice_hash: c for c in out}.values())


def packed_choice(choice: np.ndarray) -> str:
    """Format indices as text: bytes, deflated, base64."""
    return base64.b64encode(zlib.compress(np.asarray(choice, np.uint8).tobytes(), 9)).decode()


def unpacked_choice(text: str) -> np.ndarray:
    """Inverse of `packed_choice`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).astype(np.int64)
