"""Posterior damage: the projection as likelihood, trace x error as prior, empirical Bayes between them. NumPy only.

The projection is unbiased but noisy (relative standard error about sqrt(2 / probes) per unit and format), and an
optimiser picks exactly the units whose damage came out too small: the winner's curse. Trace x error averages over
all weights of a unit, so it is far steadier, but it ignores how the error lies to the Fisher's eigenvectors. In
x[u, f] = ln(projection / trace form) the model is

    x[u, :] = b[role(u), :] + N(0, between^2 11' + within^2 I) + N(0, C_u)

with the bias b of the trace form per role and format, its spread shared by the formats of a unit (between) and own
to each (within), both by maximum marginal likelihood, and the sampling noise C_u over sequences. The posterior mean
of x corrects the trace form as far as the evidence goes, for each unit and format.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.kernels.formats import parse_format

__all__ = ["Posterior", "isotonic", "monotone_families", "posterior", "shrink_rare", "trace_form"]

_SPREADS = np.array([0.0, *np.geomspace(0.01, 2.0, 16)])
_MAX_FITTED = 512


@dataclass(frozen=True, slots=True)
class Posterior:
    """The result.

    Attributes:
        value: (U, F) posterior mean damage, nats per token; NaN where no token reached the unit.
        stderr: (U, F) posterior standard deviation.
        between, within: fitted spreads of ln(projection / trace form), see the module's text.
        noise: median standard error of ln(projection / trace form), for comparison with the spreads.
    """

    value: np.ndarray
    stderr: np.ndarray
    between: float
    within: float
    noise: float


def trace_form(probes: ProbeMatrix, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trace x error: 1/2 (E||G||^2 / (T n)) ||Q(W) - W||^2 and its standard error over sequences, (U, F) each."""
    _, gsq, tokens = probes.by_sequence
    trace = gsq.sum(0) / tokens.sum()
    rel = _relative_sd(gsq)
    value = 0.5 * (trace / params)[:, None] * probes.norm_sq
    return value, value * rel[:, None]


def posterior(
    probes: ProbeMatrix,
    params: np.ndarray,
    roles: Sequence[str],
    *,
    pools: Sequence[Hashable | None] = (),
    monotone: bool = True,
) -> Posterior:
    """Combines projection and trace form.

    Args:
        probes: the probes.
        params: (U,) weights of each unit.
        roles: (U,) names of groups that share the bias of the trace form.
        pools: (U,) experts of one layer and projection share a label, None for the others; an expert with few
            tokens is pulled towards its pool (`shrink_rare`).
        monotone: make damage non-increasing in bits within formats of one group size and symmetry.
    """
    asq, gsq, tokens = probes.by_sequence  # (N, U, F), (N, U), (N,)
    n_seq, n_units, n_formats = asq.shape
    trace = shrink_rare(gsq.sum(0) / tokens.sum(), probes.reached.sum(0), pools)
    prior = 0.5 * (trace / params)[:, None] * probes.norm_sq
    projection = asq.sum(0) / (2 * tokens.sum())
    fine = (projection > 0) & (prior > 0)
    live = fine.any(1)
    x = np.where(fine, np.log(np.where(fine, projection, 1.0) / np.where(fine, prior, 1.0)), np.nan)
    noise = _noise(asq, gsq, fine)  # (U, F, F)
    x = x + 0.5 * np.diagonal(noise, axis1=1, axis2=2)  # E ln(mean) is low by half the relative variance

    bias = _bias(x, noise, live, np.asarray(roles))
    r = np.where(fine, x - bias, 0.0)
    missing = np.where(fine, 0.0, 1e6)  # an exact format tells nothing about the others
    noise = noise + missing[:, :, None] * np.eye(n_formats)
    between, within = _spreads(r[live], noise[live]) if live.sum() >= 4 and n_seq >= 4 else (0.0, 0.0)

    prior_cov = between**2 * np.ones((n_formats, n_formats)) + within**2 * np.eye(n_formats)
    gain = prior_cov @ np.linalg.inv(prior_cov + noise + 1e-12 * np.eye(n_formats))  # (U, F, F)
    mean = bias + np.einsum("ufg,ug->uf", gain, r)
    var = np.maximum(np.einsum("uff->uf", prior_cov - gain @ prior_cov), 0.0)
    trace_var = _relative_sd(gsq) ** 2
    value = np.where(prior > 0, prior * np.exp(np.where(live[:, None], mean + var / 2, 0.0)), 0.0)
    spread = np.sqrt(np.expm1(np.minimum(var + trace_var[:, None], 20.0)))
    if monotone:
        value = _monotone(value, probes.formats)
    reached = probes.reached.sum(0) > 0
    value[~reached] = np.nan
    typical = (
        np.sqrt(np.median(np.diagonal(noise[live], axis1=1, axis2=2)[fine[live]])) if live.any() else 0.0
    )
    return Posterior(value, value * spread, between, within, float(typical))


def shrink_rare(
    trace: np.ndarray, reached: np.ndarray, pools: Sequence[Hashable | None], k: float = 64.0
) -> np.ndarray:
    """Pulls experts with few tokens towards their pool: per routed token, (n t + k t_pool) / (n + k).

    The comparison is made per routed token and multiplied back, so that a rare expert stays rare.

    Args:
        trace: (U,) per-token Fisher trace, tokens that missed the unit counted as zero.
        reached: (U,) tokens x draws that reached the unit.
        pools: (U,) labels, None = leave alone; empty = leave all alone.
        k: tokens that the pool's mean counts for.
    """
    out = trace.copy()
    members: dict[Hashable, list[int]] = {}
    for i, label in enumerate(pools):
        if label is not None:
            members.setdefault(label, []).append(i)
    for at in members.values():
        n = reached[at].astype(np.float64)
        if n.sum() > 0:
            mean = trace[at].sum() / n.sum()  # the pool's trace per routed token, in units of all tokens
            per_token = np.divide(trace[at], n, out=np.zeros(len(at)), where=n > 0)
            out[at] = n * (n * per_token + k * mean) / (n + k)
    return out


def _relative_sd(per_sequence: np.ndarray) -> np.ndarray:
    """Relative standard error of the sum over the first axis."""
    n = len(per_sequence)
    total = per_sequence.sum(0)
    if n < 2:
        return np.full(total.shape, np.nan)
    sd = per_sequence.std(0, ddof=1) * np.sqrt(n)
    return np.divide(sd, total, out=np.zeros_like(total), where=total > 0)


def _noise(asq: np.ndarray, gsq: np.ndarray, fine: np.ndarray) -> np.ndarray:
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


def _bias(x: np.ndarray, noise: np.ndarray, live: np.ndarray, roles: np.ndarray) -> np.ndarray:
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


def _spreads(r: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
    """Maximum marginal likelihood of (between, within) on a grid; r (U, F), noise (U, F, F)."""
    if len(r) > _MAX_FITTED:
        pick = np.linspace(0, len(r) - 1, _MAX_FITTED).astype(np.intp)
        r, noise = r[pick], noise[pick]
    eye, ones = np.eye(r.shape[1]), np.ones((r.shape[1], r.shape[1]))
    best, found = -np.inf, (0.0, 0.0)
    for between in _SPREADS:
        for within in _SPREADS:
            cov = noise + between**2 * ones + (within**2 + 1e-12) * eye
            sign, logdet = np.linalg.slogdet(cov)
            quad = np.einsum("uf,uf->u", r, np.linalg.solve(cov, r[:, :, None])[:, :, 0])
            # Student-like weight: a few units far outside would otherwise set the spread of all.
            loglik = -0.5 * float((logdet + (4 + r.shape[1]) * np.log1p(quad / 4)).sum())
            if np.all(sign > 0) and loglik > best:
                best, found = loglik, (float(between), float(within))
    return found


def monotone_families(formats: Sequence[str]) -> list[list[int]]:
    """Positions of formats that differ in bits only (same group size and symmetry), fewest bits first."""
    families: dict[tuple[object, ...], list[int]] = {}
    for i, name in enumerate(formats):
        fmt = parse_format(name)
        families.setdefault((fmt.kind, fmt.group_size, fmt.symmetric), []).append(i)
    return [sorted(m, key=lambda i: parse_format(formats[i]).bits) for m in families.values() if len(m) > 1]


def isotonic(values: np.ndarray) -> np.ndarray:
    """Nearest non-increasing sequence in least squares (pool adjacent violators), 1-D."""
    blocks: list[list[float]] = []
    for v in values:
        blocks.append([float(v), 1.0])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, weight = blocks.pop()
            total = blocks[-1][1] + weight
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * weight) / total, total]
    return np.concatenate([np.full(int(w), m) for m, w in blocks]) if blocks else np.zeros(0)


def _monotone(value: np.ndarray, formats: Sequence[str]) -> np.ndarray:
    out = value.copy()
    for members in monotone_families(formats):
        part = value[:, members]
        for i in np.flatnonzero((np.diff(part, axis=1) > 0).any(1)):
            if (part[i] > 0).all():
                out[i, members] = np.exp(isotonic(np.log(part[i])))
    return out
