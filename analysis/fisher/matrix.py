"""The probe matrix: any whole allocation scored with its cross-layer interactions. NumPy only.

KL of an allocation, per token, to second order:
    quadratic: 1/(2 sum T) sum_s (sum_u a[s, u, c_u])^2       every pair of units included
    additive:  1/(2 sum T) sum_s  sum_u a[s, u, c_u]^2        pairs left out
The quadratic form is unbiased and noisy (relative error sqrt(2 / probes) whatever the number of units), the
additive one is steadier and biased, so `score` blends them with a weight found by cross-validation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from bitatlas.analysis.fisher.parts import NAMES, NO_PROBES, Joined, join_parts, pack_names
from bitatlas.kernels.errors import UserError

__all__ = ["ProbeMatrix", "load_probes", "pack_names", "ratio_stderr", "score_allocation"]


@dataclass(frozen=True)
class ProbeMatrix:
    """Projections of the gradient probes on the quantisation errors.

    Attributes:
        units: (U,) keys; formats: (F,) names.
        a: (S, U, F) float32, <G_u, Q_f(W_u) - W_u> of every probe.
        gsq: (S, U) float64, ||G_u||^2.
        sequence: (S,) int64, which sequence a probe comes from (several label draws share one).
        tokens: (S,) tokens of that sequence; a sum of weights where positions are weighted.
        reached: (S, U) int64, tokens of the sequence that passed through the unit.
        norm_sq: (U, F) float64, ||Q_f(W_u) - W_u||^2.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    a: np.ndarray
    gsq: np.ndarray
    sequence: np.ndarray
    tokens: np.ndarray
    reached: np.ndarray
    norm_sq: np.ndarray

    @classmethod
    def from_parts(cls, parts: Mapping[str, Mapping[str, np.ndarray]]) -> ProbeMatrix:
        """All probes of a run: step key -> arrays, as `fisher_projection` leaves them."""
        return cls.of(join_parts(parts))

    @classmethod
    def of(cls, j: Joined) -> ProbeMatrix:
        """The matrix of joined probes."""
        return cls(j.units, j.formats, j.a, j.gsq, j.sequence, j.tokens, j.reached, j.norm_sq)

    @cached_property
    def by_sequence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums over the draws of each sequence: a^2 (N, U, F), ||G||^2 (N, U), tokens x draws (N,)."""
        _, at = np.unique(self.sequence, return_inverse=True)
        n = int(at.max()) + 1
        asq = np.zeros((n, *self.a.shape[1:]))
        gsq = np.zeros((n, self.gsq.shape[1]))
        tokens = np.zeros(n)
        np.add.at(asq, at, self.a.astype(np.float64) ** 2)
        np.add.at(gsq, at, self.gsq)
        np.add.at(tokens, at, self.tokens)
        return asq, gsq, tokens

    def drawn(self, sequences: np.ndarray) -> ProbeMatrix:
        """The probes of these sequences, numbers (N,) of `by_sequence`; one drawn twice counts as two."""
        _, at = np.unique(self.sequence, return_inverse=True)
        rows = [np.flatnonzero(at == s) for s in sequences.tolist()]
        keep, own = np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        out = replace(
            self, a=self.a[keep], gsq=self.gsq[keep], sequence=own, tokens=self.tokens[keep], reached=self.reached[keep]
        )  # fmt: skip
        asq, gsq, tokens = self.by_sequence
        out.__dict__["by_sequence"] = asq[sequences], gsq[sequences], tokens[sequences]
        return out

    def damage(self) -> np.ndarray:
        """(U, F) additive damage of every unit and format, nats per token; 0 where no token reached the unit."""
        return (self.a.astype(np.float64) ** 2).sum(0) / (2 * self.tokens.sum())

    def interaction_factor(self) -> tuple[np.ndarray, float]:
        """A (S, U, F) float32 and a scale: scale x mean_s (sum_u A[s, u, c_u])^2 is the quadratic form."""
        return self.a, float(len(self.a) / (2 * self.tokens.sum()))

    def forms(self, choices: np.ndarray, damage: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Additive and quadratic form of many allocations.

        Args:
            choices: (N, U) index into formats.
            damage: (U, F) additive damages to use instead of the probes' own (a posterior).

        Returns:
            (N,) additive, (N,) quadratic; nats per token. Pairs are always the probes' own.
        """
        choices = np.atleast_2d(choices)
        if choices.shape[1] != len(self.units):
            raise UserError("the allocation has another number of units than the probes",
                            found=f"{choices.shape[1]} and {len(self.units)}")  # fmt: skip
        own = self.damage()
        table = own if damage is None else np.where(np.isfinite(damage), damage, own)
        u = np.arange(len(self.units))
        additive = table[u, choices].sum(1)
        pairs = np.empty(len(choices))
        for i, choice in enumerate(choices):
            picked = self.a[:, u, choice]  # (S, U)
            total = picked.sum(1, dtype=np.float64)
            pairs[i] = (total @ total) / (2 * self.tokens.sum()) - own[u, choice].sum()
        return additive, additive + pairs

    def score(self, choices: np.ndarray, *, shrinkage: float | None = None,
              damage: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
        """Predicted KL of whole allocations, nats per token: additive + shrinkage x pairs.

        Args:
            choices: (U,) or (N, U) index into formats.
            shrinkage: weight of the pairs; None = the cross-validated `shrinkage`.
            damage: see `forms`.

        Returns:
            (N,) float64, never below zero.
        """
        additive, quadratic = self.forms(choices, damage)
        weight = self.shrinkage if shrinkage is None else shrinkage
        return np.maximum(additive + weight * (quadratic - additive), 0.0)

    @cached_property
    def shrinkage(self) -> float:
        """Weight of the pairs in [0, 1] by 5-fold cross-validation over sequences (see `cross_validate`)."""
        return self.cross_validate()[0]

    def cross_validate(
        self, folds: int = 5, allocations: int = 256, seed: int = 0, repeats: int = 8
    ) -> tuple[float, np.ndarray]:
        """Which weight of the pairs predicts held-out sequences best.

        Random allocations are predicted from the training sequences and scored on the others by the
        quasi-likelihood of a variance, y / m + ln m with y = (sum_u a)^2, whose minimum in expectation is m = E y.
        The curve is flat, so that one way of dealing sequences to folds decides by chance; several are averaged.

        Returns:
            the weight, and the mean score of each of the 21 weights 0, 0.05 ... 1 (lower is better).
        """
        weights = np.linspace(0, 1, 21)
        sequences, of = np.unique(self.sequence, return_inverse=True)
        folds = min(folds, len(sequences))
        if folds < 2:
            return 0.0, np.full(len(weights), np.nan)
        rng = np.random.default_rng(seed)
        # Allocations between neighbouring formats, at a random average: what a budget would really choose.
        centre = rng.uniform(0, len(self.formats) - 1, (allocations, 1))
        spread = rng.normal(0, 0.7, (allocations, len(self.units)))
        choices = np.clip(np.rint(centre + spread), 0, len(self.formats) - 1).astype(np.intp)
        u = np.arange(len(self.units))
        total = np.zeros((len(sequences), allocations))
        square = np.zeros_like(total)
        for i, choice in enumerate(choices):
            picked = self.a[:, u, choice].astype(np.float64)  # (S, U)
            np.add.at(total[:, i], of, picked.sum(1) ** 2)
            np.add.at(square[:, i], of, (picked**2).sum(1))
        tokens = np.bincount(of, self.tokens)
        score = np.zeros(len(weights))
        for _ in range(repeats):
            fold_of = rng.permutation(len(sequences)) % folds
            for k in range(folds):
                train, held = fold_of != k, fold_of == k
                additive = square[train].sum(0) / tokens[train].sum()
                pairs = total[train].sum(0) / tokens[train].sum() - additive
                y = total[held].sum(0) / tokens[held].sum()
                m = np.maximum(additive + weights[:, None] * pairs, 1e-3 * additive + 1e-300)
                score += (y / m + np.log(m)).mean(1) / (folds * repeats)
        return float(weights[int(np.argmin(score))]), score

    def save(self, path: str | Path) -> Path:
        """One file (npz) of the whole matrix, written beside and renamed; `load_probes` reads it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as handle:
                np.savez(
                    handle, a=self.a, gsq=self.gsq, sequence=self.sequence, tokens=self.tokens, reached=self.reached,
                    norm_sq=self.norm_sq, names=pack_names(self.units, self.formats),
                )  # fmt: skip
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def score_allocation(
    probes: ProbeMatrix,
    choice: np.ndarray,
    shrinkage: float | None = None,
    damage: np.ndarray | None = None,
) -> tuple[float, float]:
    """KL of one whole allocation, nats per token, and its standard error over sequences.

    The error is that of the additive part and the pairs together, with the weight of the pairs held fixed; what the
    quadratic form leaves out (2 bits, KL beyond 1) is not in it.

    Args:
        choice: (U,) index into the formats.
        shrinkage: weight of the pairs; None = the cross-validated one.
        damage: (U, F) additive damages to use instead of the probes' own (a posterior); the error stays theirs.
    """
    choice = np.asarray(choice)
    weight = probes.shrinkage if shrinkage is None else shrinkage
    value = float(probes.score(choice, shrinkage=weight, damage=damage)[0])
    picked = probes.a[:, np.arange(len(probes.units)), choice].astype(np.float64)  # (S, U)
    own = (picked**2).sum(1)
    per_probe = own + weight * (picked.sum(1) ** 2 - own)
    _, of = np.unique(probes.sequence, return_inverse=True)
    by_sequence, tokens = np.bincount(of, per_probe), np.bincount(of, probes.tokens)
    return value, 0.5 * float(ratio_stderr(by_sequence, tokens))


def ratio_stderr(per_sequence: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Standard error of sum(per_sequence) / sum(weight) over sequences, (N, ...) and (N,) -> (...); NaN for one."""
    n = len(per_sequence)
    if n < 2:
        return np.full(per_sequence.shape[1:], np.nan)
    mean = per_sequence.sum(0) / weight.sum()
    left = per_sequence - weight.reshape(-1, *[1] * mean.ndim) * mean
    error: np.ndarray = np.sqrt((left**2).sum(0) * n / (n - 1)) / weight.sum()
    return error


def load_probes(path: str | Path) -> ProbeMatrix:
    """The probe matrix of a finished `fisher_projection` run.

    Args:
        path: the run's folder, ``$BITATLAS_HOME/runs/RUN``, where the steps left it in parts, or a file that
            `ProbeMatrix.save` wrote.

    Raises:
        UserError: nothing there holds probes, or only some of them.
    """
    where = Path(path)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path in [where] if where.is_file() else sorted(where.glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            if {"a", "gsq", NAMES} <= set(data.files) and NO_PROBES not in data.files:
                parts[path.name] = {name: data[name] for name in data.files}
    if not parts:
        raise UserError("there are no probes here", found=str(where),
                        fix="bitatlas measure MODEL --metric fisher_projection")  # fmt: skip
    return ProbeMatrix.from_parts(parts)
