"""Damage of units that were never measured (an expert that no calibration token reached).

Unknown is not zero: a zero would send every rare expert to the fewest bits. The rule, first match wins:

1. the mean of the measured units of the same layer, role and shape (the other experts of the block);
2. the mean of the measured units of the same role and shape in any layer;
3. the mean damage per weight of the same role, times the unit's weights;
4. the mean damage per weight of all measured units, times the unit's weights.

Imputed units are flagged and counted in the certificate.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from bitatlas.analysis.schema import QuantUnit, UserError

__all__ = ["impute_unknown"]


def impute_unknown(
    units: Sequence[QuantUnit], damage: np.ndarray, metric: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Fill the rows of ``damage`` (U, F) that are NaN throughout; rows known in part are left alone.

    Returns:
        The filled copy (U, F) and the flags (U,) of the imputed rows.

    Raises:
        UserError: no unit at all was measured.
    """
    unknown = np.isnan(damage).all(axis=1)
    if not unknown.any():
        return damage.copy(), unknown
    known = np.isfinite(damage).all(axis=1)
    if not known.any():
        raise UserError(
            f"{metric or 'the metric'} has no unit measured in all formats",
            found=f"{int(unknown.sum())} of {len(units)} units without any value",
            fix="measure again with more calibration tokens",
        )
    out = damage.copy()
    params = np.array([u.params for u in units], np.float64)[:, None]  # (U, 1)
    rate = damage / params
    # Three passes, the most specific last, so that each overwrites the coarser estimate.
    out[unknown] = rate[known].mean(axis=0) * params[unknown]
    for keys, values, scale in (
        ([(u.role,) for u in units], rate, params),
        ([(u.role, u.rows, u.cols) for u in units], damage, np.ones_like(params)),
        ([(u.layer, u.role, u.rows, u.cols) for u in units], damage, np.ones_like(params)),
    ):
        means = _group_means(keys, values, known)
        for i in np.flatnonzero(unknown).tolist():
            mean = means.get(keys[i])
            if mean is not None:
                out[i] = mean * scale[i]
    return out, unknown


def _group_means(
    keys: Sequence[Hashable], values: np.ndarray, known: np.ndarray
) -> dict[Hashable, np.ndarray]:
    """Mean row (F,) of the known rows of each key."""
    rows: dict[Hashable, list[int]] = {}
    for i in np.flatnonzero(known).tolist():
        rows.setdefault(keys[i], []).append(i)
    return {key: values[members].mean(axis=0) for key, members in rows.items()}
