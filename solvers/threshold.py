"""LayerwiseQuant's rule: what a score calls important gets the wider of two formats, the rest the narrower."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitatlas.analysis.schema import UserError
from bitatlas.solvers.mixes import HandMix, neighbours
from bitatlas.solvers.problem import Problem

__all__ = ["Threshold"]


class Threshold(HandMix):
    """Units ranked by one score, the upper share wide and the rest narrow.

    Published: blocks ranked by LIM or ZD, a chosen share of them at 4 bits and the others at 2 (or 8 and 4). The
    two values stand at every unit of a block, so here too whole blocks are ranked. Ours: the formats are the two
    neighbours around the budget, the share is what the bytes allow, and the block at the threshold is split, as is
    whatever comes after and still fits. Embedding and head, which LIM does not judge and the paper leaves
    alone, come first; an unknown unit of a block ranks as the mean of its block.

    A metric per format ranks by its damage in the narrower one.
    """

    NAME: ClassVar[str] = "threshold"
    TITLE: ClassVar[str] = "LIM/ZD threshold (LayerwiseQuant)"
    SOURCE: ClassVar[str] = "LayerwiseQuant (arXiv 2406.17415), eq. 1 and 2; formats and share from the bytes"
    RANKS: ClassVar[bool] = True
    METRICS: ClassVar[tuple[str, ...]] = ("lim", "zd")

    def check(self, problem: Problem) -> None:
        """Also refuses a problem with nothing to rank by."""
        super().check(problem)
        if problem.score is None and not problem.has_damage:
            raise UserError(f"{self.NAME} needs a score or a damage", found="no metric",
                            fix="name one with --metric: lim, zd or any other")  # fmt: skip

    def rank(self, problem: Problem) -> np.ndarray:
        if problem.score is None:
            low, _ = neighbours(problem)
            return problem.damage[np.arange(len(problem.units)), low[problem.classes.of_unit]]
        score = problem.score.copy()
        for layer in np.unique(problem.layers):
            inside = problem.layers == layer
            known = score[inside & np.isfinite(score)]
            score[inside & ~np.isfinite(score)] = known.mean() if layer >= 0 and known.size else np.inf
        return score
