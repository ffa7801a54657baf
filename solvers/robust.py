"""Against the winner's curse: an optimiser picks the units whose damage was underestimated.

Everything here starts from ``samples`` (N, U, F), the damage that each calibration sequence alone gives (for the Fisher
projection ``a^2 / (2 T)``, draws of a sequence averaged). Rows are resampled whole, so that units keep their
correlation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from bitatlas.solvers.base import Solver
from bitatlas.solvers.problem import Problem

__all__ = [
    "Optimism",
    "bootstrap_damage",
    "error_factors",
    "monotone_in_bytes",
    "optimism",
    "robust_problem",
    "share_chosen",
    "stability",
]

_COLUMNS = 20_000


@dataclass(frozen=True, slots=True)
class Optimism:
    """What an allocation promises on the sequences it was solved on, and what the others say.

    Attributes:
        promised: mean predicted damage on the half that was solved.
        kept: mean damage of the same allocations on the other half.
        ratio: kept / promised; 1 = no winner's curse.
        stderr: of the ratio, over the splits (the splits overlap, so it is a lower estimate).
    """

    promised: float
    kept: float
    ratio: float
    stderr: float


def bootstrap_damage(
    samples: np.ndarray, *, quantile: float | None = None, replicates: int = 200, seed: int = 0
) -> np.ndarray:
    """(U, F) mean over the samples (N, U, F), or an upper quantile of its bootstrap distribution.

    A quantile of 0.8 prefers units whose damage is certain; NaN samples (a unit that the sequence did not reach)
    are left out, and a unit without any stays NaN.
    """
    samples = np.asarray(samples, np.float64)
    if quantile is None:
        return _mean(samples, np.full(len(samples), 1.0))
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    rng = np.random.default_rng(seed)
    n = len(samples)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=replicates)  # (R, N) how often each sample is taken
    flat = samples.reshape(n, -1)
    # In slices of columns: replicates x units x formats need not fit in memory.
    parts = [
        np.quantile(_means(flat[:, start : start + _COLUMNS], draws), quantile, axis=0)
        for start in range(0, flat.shape[1], _COLUMNS)
    ]
    return np.concatenate(parts).reshape(samples.shape[1:])


def robust_problem(
    problem: Problem,
    samples: np.ndarray,
    *,
    quantile: float | None = 0.8,
    monotone: bool = True,
    replicates: int = 200,
    seed: int = 0,
) -> Problem:
    """The problem with bootstrap damages; units without samples keep the damage they have.

    Args:
        samples: (N, U, F) in the problem's units and formats.
        monotone: also make damage fall as bytes rise (`monotone_in_bytes`).
    """
    damage = bootstrap_damage(samples, quantile=quantile, replicates=replicates, seed=seed)
    damage = np.where(np.isfinite(damage), damage, problem.damage)
    if monotone:
        damage = monotone_in_bytes(damage, problem.bytes, problem.allowed)
    return replace(problem, damage=damage)


def monotone_in_bytes(damage: np.ndarray, bytes_table: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """(U, F) closest damages that do not rise with the bytes of a unit (pool adjacent violators, least squares).

    More bits that hurt more are noise, and the optimiser would find them. Cells that are not allowed stay.
    """
    out = np.array(damage, np.float64)
    for i in range(len(out)):
        columns = np.flatnonzero(allowed[i])
        columns = columns[np.argsort(bytes_table[i, columns], kind="stable")]
        blocks: list[list[float]] = []  # [mean, width], means falling
        for value in out[i, columns].tolist():
            blocks.append([value, 1])
            while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
                (a, wa), (b, wb) = blocks[-2], blocks[-1]
                blocks[-2:] = [[(a * wa + b * wb) / (wa + wb), wa + wb]]
        out[i, columns] = np.concatenate([np.full(int(width), mean) for mean, width in blocks])
    return out


def share_chosen(
    problem: Problem, damages: Iterable[np.ndarray], solver: Solver, *, seed: int = 0, time_limit_s: float = 60.0
) -> np.ndarray:  # fmt: skip
    """(U, F) share of the tables ``damages``, (U, F) each, under which a unit gets a format."""
    rows, count = np.arange(len(problem.units)), 0
    times = np.zeros(problem.damage.shape)
    for damage in damages:
        drawn = replace(problem, damage=damage)
        times[rows, solver.solve(drawn, seed=seed, time_limit_s=time_limit_s).choice] += 1
        count += 1
    return times / max(count, 1)


def stability(
    problem: Problem, samples: np.ndarray, solver: Solver, *, replicates: int = 50, seed: int = 0
) -> np.ndarray:
    """(U, F) share of bootstrap replicates in which a unit gets a format: the confidence of a recommendation."""
    samples = np.asarray(samples, np.float64)
    rng = np.random.default_rng(seed)
    n = len(samples)
    means = (_mean(samples, rng.multinomial(n, np.full(n, 1 / n))) for _ in range(replicates))
    tables = (np.where(np.isfinite(mean), mean, problem.damage) for mean in means)
    return share_chosen(problem, tables, solver, seed=seed)


def error_factors(
    damage: np.ndarray, stderr: np.ndarray, replicates: int, seed: int = 0
) -> Iterator[np.ndarray]:
    """(U, F) log-normal factors of mean 1 with the relative standard errors of ``damage``, one table a replicate.

    A draw moves all formats of a unit together, as resampled text does. Without damage there is nothing to move; an
    unknown error is an unknown factor: NaN.
    """
    rng = np.random.default_rng(seed)
    relative = np.where(damage == 0, 0.0, stderr / np.where(damage > 0, damage, np.nan))
    spread = np.sqrt(np.log1p(relative**2))
    for _ in range(replicates):
        yield np.exp(spread * rng.standard_normal((len(damage), 1)) - spread**2 / 2)


def optimism(
    problem: Problem,
    samples: np.ndarray,
    solver: Solver,
    *,
    splits: int = 10,
    quantile: float | None = None,
    seed: int = 0,
) -> Optimism:
    """Solve on one half of the sequences, judge on the other, ``splits`` times.

    With ``quantile`` the half is solved with its robust damages, but promised and judged by plain means.

    Raises:
        ValueError: fewer than two samples.
    """
    samples = np.asarray(samples, np.float64)
    if len(samples) < 2:
        raise ValueError("two samples or more are needed to split them")
    rng = np.random.default_rng(seed)
    rows = np.arange(len(problem.units))
    promised, kept = np.zeros(splits), np.zeros(splits)
    for k in range(splits):
        order = rng.permutation(len(samples))
        mine, other = np.array_split(order, 2)
        solved = robust_problem(
            problem, samples[mine], quantile=quantile, monotone=quantile is not None, seed=seed
        )
        choice = solver.solve(solved, seed=seed).choice
        seen, unseen = (bootstrap_damage(samples[half])[rows, choice] for half in (mine, other))
        both = np.isfinite(seen) & np.isfinite(unseen)
        promised[k], kept[k] = seen[both].sum(), unseen[both].sum()
    ratios = kept / promised
    return Optimism(
        float(promised.mean()),
        float(kept.mean()),
        float(kept.mean() / promised.mean()),
        float(ratios.std(ddof=1) / np.sqrt(splits)) if splits > 1 else float("nan"),
    )


def _mean(samples: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(U, F) weighted mean over samples (N, U, F)."""
    return _means(samples.reshape(len(samples), -1), weight[None])[0].reshape(samples.shape[1:])


def _means(flat: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, X) means of flat (N, X) under weights (R, N), NaN left out; NaN where nothing is left."""
    known = np.isfinite(flat)
    total = weights @ known.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (weights @ np.where(known, flat, 0.0)) / total, np.nan)
