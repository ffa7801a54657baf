"""The familiar hand-made mixes, over any formats and budget: the wider of two neighbouring formats for a few.

The narrower format is the widest that fits everywhere; then the units of the rule's list get the next wider
one, in the rule's order, as long as it fits. So every mix fills the same budget as the solvers do.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import Found, Solver
from bitatlas.solvers.problem import Problem
from bitatlas.solvers.uniform import spread

__all__ = ["AttentionHigh", "FirstLast", "Q4KM"]


class HandMix(Solver):
    """Two neighbouring formats and an order of who gets the wider one. Needs no damage."""

    NEEDS_DAMAGE: ClassVar[bool] = False

    @abstractmethod
    def rank(self, problem: Problem) -> np.ndarray:
        """(U,) float64, the highest is widened first; a class of tied units ranks as its highest member."""

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        low, high = neighbours(problem)
        best = np.full(len(c.bytes), -np.inf)
        np.maximum.at(best, c.of_unit, self.rank(problem))
        extra = c.bytes[np.arange(len(low)), high] - c.bytes[np.arange(len(low)), low]
        room = problem.limit_bytes - c.payload(low)
        choice = low.copy()
        for i in np.argsort(-best, kind="stable").tolist():
            if extra[i] <= room:
                choice[i] = high[i]
                room -= int(extra[i])
        return Found(c.expand(choice))


class FirstLast(HandMix):
    """Embeddings, head and the blocks nearest to both ends first."""

    NAME: ClassVar[str] = "first_last"
    TITLE: ClassVar[str] = "First and last layers high"
    SOURCE: ClassVar[str] = "common practice since DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160)"

    def rank(self, problem: Problem) -> np.ndarray:
        return _from_the_ends(problem)


class AttentionHigh(HandMix):
    """Attention first, then embeddings and head, then the rest; within each from both ends inwards."""

    NAME: ClassVar[str] = "attention_high"
    TITLE: ClassVar[str] = "Attention high"
    SOURCE: ClassVar[str] = "MC-MoE and AlphaQ keep attention at 4 bits while the experts get less"

    def rank(self, problem: Problem) -> np.ndarray:
        roles = np.array(problem.roles)
        group = np.where(_is_attention(roles), 2, np.where(problem.layers < 0, 1, 0))
        return group + _from_the_ends(problem)


class Q4KM(HandMix):
    """llama.cpp's Q4_K_M: the head, and v and down of the first, the last and every third block, one width up.

    The blocks are those of ``use_more_bits``: i < n/8, i >= 7n/8, or (i - n/8) % 3 = 2. If room is left, the
    other v and down follow, then the rest from both ends. A model without a head of its own has it in the
    embedding.
    """

    NAME: ClassVar[str] = "q4_k_m"
    TITLE: ClassVar[str] = "Q4_K_M rule (v and down high)"
    SOURCE: ClassVar[str] = "llama.cpp, llama-quant.cpp: llama_tensor_get_type_impl, use_more_bits"

    def rank(self, problem: Problem) -> np.ndarray:
        roles = np.array(problem.roles)
        n = int(problem.layers.max()) + 1
        eighth = n // 8
        layer = problem.layers
        chosen = (layer < eighth) | (layer >= 7 * n // 8) | ((layer - eighth) % 3 == 2)
        wide = np.isin(roles, ("v", "down", "shared_down", "fc2"))
        head = roles == ("head" if "head" in problem.roles else "embed")
        group = np.where(head | (wide & chosen & (layer >= 0)), 2, np.where(wide, 1, 0))
        return group + _from_the_ends(problem)


def neighbours(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(C,) the widest format that fits everywhere, and (C,) the next wider one; equal when there is none wider.

    Below the smallest uniform allocation the narrower one is each class's smallest format.
    """
    c = problem.classes
    ladder = sorted((spread(problem, j) for j in range(len(problem.formats))), key=c.payload)
    ladder.insert(0, c.smallest())
    fits = [i for i, choice in enumerate(ladder) if c.payload(choice) <= problem.limit_bytes]
    low = fits[-1]
    wider = [choice for choice in ladder[low + 1 :] if c.payload(choice) > c.payload(ladder[low])]
    high = wider[0] if wider else ladder[low]
    # A class that the wider format would shrink stays.
    rows = np.arange(len(high))
    shrinks = c.bytes[rows, high] < c.bytes[rows, ladder[low]]
    return ladder[low], np.where(shrinks, ladder[low], high)


def _from_the_ends(problem: Problem) -> np.ndarray:
    """(U,) in (0, 1): 0.99 outside the blocks, falling from the outermost blocks to the middle."""
    layer = problem.layers
    n = int(layer.max()) + 1
    depth = np.minimum(layer, n - 1 - layer)
    return np.where(layer < 0, 0.99, 0.9 * (1 - depth / max(n, 1)))


def _is_attention(roles: np.ndarray) -> np.ndarray:
    """(U,) bool: projections of the attention, also fused and low-rank ones."""
    return np.isin(roles, ("q", "k", "v", "o", "qkv", "kv", "q_a", "q_b", "kv_a", "kv_b"))
