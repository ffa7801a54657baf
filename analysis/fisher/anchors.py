"""Damages re-read on the front: slopes of the KL at a few good allocations beside the table of the original. NumPy only.

A table measured at the original weights prices each change as if all other units were untouched. At two and three bits they
are not, and an optimiser buys exactly the changes that only look cheap alone. So the table's own front is walked once: at
allocations that it predicts to cost so many nats (`front_choices`), one backward pass gives the slope of the real KL towards
every format of every unit. With the second order that the table knows, an anchor x says of each unit

    T[f] - T[x] = <grad KL(x), Q_f - Q_x> + BEND (D[f] + D[x])

(rounding errors of two formats are independent, so |Q_f - Q_x|^2 is the sum of theirs). All anchors together, weighted by how
near the format lies, have a least-squares table (`slope_table`). Where a format is bought at a level of KL at which the
original's table still holds, that is kept; the higher the level, the more the slopes say (`belief`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bitatlas.analysis.fisher.monotone import make_monotone

__all__ = ["BEND", "LEVELS", "SHARE", "anchored", "belief", "front_choices", "slope_table"]

LEVELS = (0.25, 0.6, 1.4, 3.2)
"""Predicted KL of the anchors, nats per token: below, the original's table is right; above, there is no model left."""

BEND = 1.5
"""Of the second order: 1 is the table's own; where damages add up to more than their sum it is more."""

SHARE = 0.4
"""Of the slopes in the average where the KL is high; half of that at the second level. They know the allocation and come from
little text, the table comes from more."""

_LEAST = 0.05  # of the original's damage: less is not believed of slopes
_PRICES = (-40.0, 10.0)  # ln of nats per byte: from nothing to everything
_FIXED = 1e3  # weight of the best format's damage, which stays, over the largest weight of an observation
_NEAREST = 1e-4  # of a unit's largest damage: nearer formats weigh no more


def front_choices(damage: np.ndarray, nbytes: np.ndarray, levels: tuple[float, ...] = LEVELS) -> np.ndarray:
    """Allocations on the lower hull of damage over bytes whose damages sum up to each level, or come nearest from below.

    Args:
        damage: (U, F) nats per token; units with a NaN keep their largest format.
        nbytes: (U, F).

    Returns:
        (A, U) format numbers, each allocation once, the lowest level first.
    """
    known = np.isfinite(damage).all(1)
    cost = np.where(known[:, None], damage, 0.0)
    # A unit of which nothing is known asks for bytes only.
    size = np.where(known[:, None], nbytes, -nbytes).astype(np.float64)
    rows = np.arange(len(damage))
    found: list[np.ndarray] = []
    for level in levels:
        low, high = _PRICES
        for _ in range(60):
            middle = 0.5 * (low + high)
            total = cost[rows, _bought(cost, size, middle)].sum()
            low, high = (middle, high) if total <= level else (low, middle)
        choice = _bought(cost, size, low)
        if not any((choice == other).all() for other in found):
            found.append(choice)
    return np.stack(found)


def _bought(damage: np.ndarray, nbytes: np.ndarray, price: float) -> np.ndarray:
    """(U,) what each unit takes when a byte costs exp(``price``) nats."""
    return (damage + np.exp(price) * nbytes).argmin(1)


def belief(damage: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """(U, F) share of the slopes in each damage: by the predicted KL of the front where a byte is worth what the format saves.

    Args:
        damage: (U, F), finite. nbytes: (U, F).
    """
    rows, best = np.arange(len(damage)), damage.argmin(1)
    prices = np.linspace(*_PRICES, 201)
    levels = [damage[rows, _bought(damage, nbytes, price)].sum() for price in prices.tolist()]
    saved = nbytes[rows, best][:, None] - nbytes
    worth = np.where(saved > 0, damage - damage[rows, best][:, None], 0.0) / np.maximum(saved, 1)
    level = np.interp(np.log(np.maximum(worth, np.exp(_PRICES[0]))), prices, levels)
    return SHARE * level / (level + LEVELS[1])


def slope_table(
    damage: np.ndarray, choices: np.ndarray, slopes: np.ndarray, bend: float = BEND
) -> np.ndarray:
    """The damages that slopes at several allocations say, in least squares.

    Args:
        damage: (U, F) of the original's table, finite; each unit's smallest stays as it is.
        choices: (A, U) the allocations. slopes: (A, U, F) first-order change of the KL towards every format.

    Returns:
        (U, F) nats per token; may be negative where slopes are noise.
    """
    units, formats = damage.shape
    rows, best = np.arange(units), damage.argmin(1)
    matrix, right = np.zeros((units, formats, formats)), np.zeros((units, formats))
    nearest = np.maximum(_NEAREST * damage.max(1, keepdims=True), 1e-12)
    for x, slope in zip(choices, slopes):
        both = damage + damage[rows, x][:, None]
        weight = np.maximum(both, nearest) ** -2.0
        weight[rows, x] = 0.0
        said = weight * (slope - slope[rows, x][:, None] + bend * both)
        matrix[:, range(formats), range(formats)] += weight
        matrix[rows, x, x] += weight.sum(1)
        matrix[rows, x] -= weight
        matrix[rows, :, x] -= weight
        right += said
        right[rows, x] -= said.sum(1)
    fixed = _FIXED * np.maximum(matrix.max((1, 2)), 1e-12)
    matrix[rows, best, best] += fixed
    right[rows, best] += fixed * damage[rows, best]
    return np.linalg.solve(matrix, right[:, :, None])[:, :, 0]


def anchored(
    scaled: np.ndarray,
    stderr: np.ndarray,
    damage: np.ndarray,
    nbytes: np.ndarray,
    parts: Sequence[Mapping[str, np.ndarray]],
    formats: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """The table to solve with and its standard errors.

    Args:
        scaled, stderr: (U, F) of the original, predicted as whole models measure; NaN = unknown.
        damage: (U, F) second order at the original, for the bend.
        nbytes: (U, F).
        parts: ``choice`` (A, U); ``slopes`` (A, u, F), <gradient, Q_f(W) - W> summed over the tokens, of the units ``place`` (u,);
            ``sequences`` (n,) they are from, and ``tokens`` in these. Parts of the same sequences hold different units.
        formats: (F,) names.
    """
    known = np.isfinite(scaled).all(1)
    choices = parts[0]["choice"][:, known]
    chunks: dict[bytes, tuple[float, np.ndarray]] = {}
    for part in parts:
        empty = float(part["tokens"]), np.zeros((len(choices), *scaled.shape))
        tokens, slopes = chunks.setdefault(part["sequences"].tobytes(), empty)
        slopes[:, part["place"]] = part["slopes"] / tokens
    total = np.array([tokens for tokens, _ in chunks.values()])
    weight = total[:, None, None] / total.sum()
    each = np.stack([slope_table(damage[known], choices, slopes[:, known]) for _, slopes in chunks.values()])
    said = (weight * each).sum(0)
    best = damage[known].argmin(1)[:, None]
    offset = np.take_along_axis((scaled - damage)[known], best, 1)
    share = belief(scaled[known], nbytes[known])
    value, error = scaled.copy(), stderr.copy()
    mixed = (1 - share) * scaled[known] + share * (said + offset)
    value[known] = make_monotone(np.maximum(mixed, _LEAST * scaled[known]), formats)
    if len(each) > 1:
        spread = np.sqrt((weight**2 * (each - said) ** 2).sum(0) * len(each) / (len(each) - 1))
        error[known] = np.hypot((1 - share) * stderr[known], share * spread)
    return value, error
