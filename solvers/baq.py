"""BAQ's closed form: bits from the logarithm of each unit's damage, then whole formats within the bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from bitatlas.solvers.base import Found, Solver
from bitatlas.solvers.code_bits import effective_bits
from bitatlas.solvers.front_cache import fill
from bitatlas.solvers.problem import Problem

__all__ = ["Baq", "closed_form", "model_constants"]


class Baq(Solver):
    """Minimise sum C_l 2^(-2 b_l) subject to sum n_l b_l = B, in closed form; then integer repair.

        b_l = B / sum n + 1/2 log2( (C_l / n_l) / GM_n(C / n) ),   GM_n the n-weighted geometric mean

    so that every unit ends with the same loss per weight. C_l comes from the damages, as the mean over the formats
    of ``log2 damage + 2 b`` with b the bits per weight including scales. Repair: the largest shift of all b_l for
    which the nearest formats fit the bytes, then single steps by the model while one fits.
    """

    NAME: ClassVar[str] = "baq"
    TITLE: ClassVar[str] = "BAQ closed form"
    SOURCE: ClassVar[str] = "BAQ (arXiv 2506.05664), equal-loss principle, with sizes as weights"

    def _solve(self, problem: Problem, seed: int, deadline: float) -> Found:
        c = problem.classes
        bits, weights = effective_bits(problem)
        log_c = model_constants(c.damage, bits, c.allowed)
        ideal = closed_form(log_c, weights, 0.0)
        best = c.smallest()
        low, high = bits.min() - ideal.max() - 1, bits.max() - ideal.min() + 1
        for _ in range(60):
            level = (low + high) / 2
            distance = np.where(c.allowed, np.abs(bits - (ideal + level)[:, None]), np.inf)
            choice = distance.argmin(axis=1)
            if c.payload(choice) <= problem.limit_bytes:
                best, low = choice, level
            else:
                high = level
        with np.errstate(over="ignore", under="ignore"):
            model = np.exp2(log_c[:, None] - log_c.max() - 2 * (bits - bits.min()))
        best = fill(replace(c, damage=np.where(c.allowed, model, np.inf)), best, problem.limit_bytes)
        return Found(c.expand(best), evaluations=1)


def model_constants(damage: np.ndarray, bits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(C,) log2 C_l of damage = C 2^(-2 b), least squares in the logarithm over the allowed formats (C, F).

    A damage of zero or less has no logarithm; it counts as 1e-12 of the largest.
    """
    top = float(np.max(np.where(allowed, damage, -np.inf)))
    floor = 1e-12 * top if top > 0 else 1.0
    logs = np.log2(np.where(allowed, np.maximum(damage, floor), 1.0)) + 2 * bits
    return np.where(allowed, logs, 0.0).sum(axis=1) / allowed.sum(axis=1)


def closed_form(log_c: np.ndarray, weights: np.ndarray, mean_bits: float) -> np.ndarray:
    """(C,) real-valued bits whose mean, weighted by ``weights`` (C,), is ``mean_bits``."""
    per_weight = log_c - np.log2(weights)
    return mean_bits + 0.5 * (per_weight - np.average(per_weight, weights=weights))
