"""The pieces of the posterior's model: sampling noise, bias of the prior by role, spreads, mixture. NumPy only.

Everywhere x (U, F) = ln(projection / trace form); see `analysis.fisher.posterior` for the model.
"""

from __future__ import annotations

import numpy as np

__all__ = ["posterior_mixture", "prior_spreads", "role_bias", "sampling_noise"]

_SCALES = ((1.0, 0.9), (16.0, 0.1))  # of the prior's variance, with their prior probabilities
_POOLED = 6.0
_MIN_FITTED = 8  # values; with fewer the trace form stays as it is


def sampling_noise(asq: np.ndarray, gsq: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Covariance (U, F, F) of ln(projection / trace form) over sequences: the infinite bootstrap to first order.

    A unit's own variance is low exactly when its estimate is low (the rare large probe was missed), so
    it is averaged, on the log scale, with what is typical for as many effective sequences as the unit had.
    """
    n = len(asq)
    if n < 2:  # no spread to look at: one squared Gaussian has a relative variance of 2
        return np.broadcast_to(2.0 * np.eye(asq.shape[2]), (*asq.shape[1:], asq.shape[2])).copy()
    total_a, total_g = asq.sum(0), gsq.sum(0)
    d = n * (
        np.divide(asq, total_a, out=np.zeros_like(asq), where=total_a > 0)
        - np.divide(gsq, total_g, out=np.zeros_like(gsq), where=total_g > 0)[:, :, None]
    )  # (N, U, F)
    cov = np.einsum("nuf,nug->ufg", d, d) / max(n * (n - 1), 1)
    var = np.einsum("uff->uf", cov)
    kish = np.divide(total_g**2, (gsq**2).sum(0), out=np.ones_like(total_g), where=total_g > 0)  # (U,)
    per_sequence = (var * kish[:, None])[fine]
    typical = (np.median(per_sequence) if per_sequence.size else 1.0) / kish[:, None]
    safe = np.where(fine & (var > 0), var, typical)
    scale = np.sqrt(np.sqrt(safe * typical) / safe)  # pulls the standard deviation half way
    cov = cov * scale[:, :, None] * scale[:, None, :]
    floor = np.where(np.einsum("uff->uf", cov) > 0, 0.0, typical)
    return cov + floor[:, :, None] * np.eye(asq.shape[2])


def role_bias(x: np.ndarray, noise: np.ndarray, live: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """(U, F): mean of x by format and role, a role's own mean shrunk towards the common one (as 2 more units)."""
    common = np.zeros(x.shape[1])
    for f in range(x.shape[1]):
        column = x[live, f]
        common[f] = np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else 0.0
    out = np.broadcast_to(common, x.shape).copy()
    for role in np.unique(roles):
        members = (roles == role) & live
        for f in range(x.shape[1]):
            column = x[members, f] - common[f]
            column = column[np.isfinite(column)]
            if column.size:
                out[roles == role, f] += column.sum() / (column.size + 2)
    return out


def prior_spreads(
    r: np.ndarray, noise: np.ndarray, fine: np.ndarray, roles: np.ndarray
) -> tuple[float, np.ndarray]:
    """Spreads that explain the residuals r (U, F) beyond their noise (U, F, F): between, and within (U, F).

    Squares are clipped at three times their typical size, so that a few units far outside do not set the
    spread of all. A role's own within counts against the format's as much as ``_POOLED`` more units would.
    """
    if fine.sum() < _MIN_FITTED or noise.shape[0] < 2:
        return 0.0, np.zeros(r.shape)
    z = np.where(fine, r, 0.0)
    var = np.einsum("uff->uf", noise)
    pairs = z[:, :, None] * z[:, None, :] - np.where(fine[:, :, None] & fine[:, None, :], noise, 0.0)
    both = fine[:, :, None] & fine[:, None, :] & ~np.eye(r.shape[1], dtype=bool)
    between_sq = max(_clipped_mean(pairs[both]), 0.0)
    within_sq = np.zeros(r.shape)
    for f in range(r.shape[1]):
        excess = z[:, f] ** 2 - var[:, f] - between_sq
        column = fine[:, f]
        if not column.any():
            continue
        common = _clipped_mean(excess[column])
        for role in np.unique(roles):
            members = (roles == role) & column
            n = int(members.sum())
            own = _clipped_mean(excess[members]) if n else common
            within_sq[roles == role, f] = max((n * own + _POOLED * common) / (n + _POOLED), 0.0)
    return float(np.sqrt(between_sq)), np.sqrt(within_sq)


def _clipped_mean(values: np.ndarray) -> float:
    """Mean with values further than six median absolute deviations from the median pulled in; 0 of nothing."""
    if not values.size:
        return 0.0
    middle = np.median(values)
    reach = 6 * np.median(np.abs(values - middle)) + 1e-300
    return float(np.clip(values, middle - reach, middle + reach).mean())


def posterior_mixture(
    r: np.ndarray, noise: np.ndarray, prior_cov: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and variance (U, F) of x - b under the two scales of s_u, weighted by their evidence."""
    eye = 1e-9 * np.eye(r.shape[1])
    means, variances, evidence = [], [], []
    for scale, weight in _SCALES:
        cov = scale * prior_cov
        total = cov + noise + eye
        gain = cov @ np.linalg.inv(total)  # (U, F, F)
        means.append(np.einsum("ufg,ug->uf", gain, r))
        variances.append(np.maximum(np.einsum("uff->uf", cov - gain @ cov), 0.0))
        quad = np.einsum("uf,uf->u", r, np.linalg.solve(total, r[:, :, None])[:, :, 0])
        evidence.append(np.log(weight) - 0.5 * (np.linalg.slogdet(total)[1] + quad))
    w = np.exp(np.array(evidence) - np.max(evidence, axis=0))
    w = (w / w.sum(0))[:, :, None]  # (scales, U, 1)
    m, v = np.array(means), np.array(variances)
    mean = (w * m).sum(0)
    return mean, (w * (v + (m - mean) ** 2)).sum(0)
