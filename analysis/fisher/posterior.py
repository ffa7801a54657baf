"""Posterior damage: the projection as likelihood, trace x error as prior, empirical Bayes between them. NumPy only.

The projection is unbiased but noisy (relative standard error about sqrt(2 / probes) per unit and format), and an
optimiser picks exactly the units whose damage came out too small: the winner's curse. Trace x error averages over
all weights of a unit, so it is far steadier, but it ignores how the error lies to the Fisher's eigenvectors. In
x[u, f] = ln(projection / trace form) the model is

    x[u, :] = b[role(u), :] + N(0, s_u (between^2 11' + diag within[role(u), :]^2)) + N(0, C_u)

with the bias b of the trace form per role and format, its spread shared by the formats of a unit (between) and own
to each role and format (within, by moments: 2 bits behave unlike 4, value projections unlike the rest), and the
sampling noise C_u over sequences. s_u is 1 for most units and large for a few (massive activations), decided by
how likely the unit's numbers are under either. The posterior mean of x corrects the trace form as far as the
evidence goes, for each unit and format.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from bitatlas.analysis.fisher.empirical_bayes import (
    posterior_mixture,
    prior_spreads,
    role_bias,
    sampling_noise,
)
from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.fisher.monotone import make_monotone
from bitatlas.analysis.schema import QuantUnit

__all__ = ["Posterior", "posterior", "posterior_of_units", "shrink_rare", "trace_form"]


@dataclass(frozen=True, slots=True)
class Posterior:
    """The result.

    Attributes:
        value: (U, F) posterior mean damage, nats per token; NaN where no token reached the unit.
        stderr: (U, F) posterior standard deviation.
        between, within: fitted spreads of ln(projection / trace form), see the module's text; within is the
            median over units and formats.
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
    noise = sampling_noise(asq, gsq, fine)  # (U, F, F)
    x = x + 0.5 * np.diagonal(noise, axis1=1, axis2=2)  # E ln(mean) is low by half the relative variance

    bias = role_bias(x, noise, live, np.asarray(roles))
    r = np.where(fine, x - bias, 0.0)
    missing = np.where(fine, 0.0, 1e6)  # an exact format tells nothing about the others
    noise = noise + missing[:, :, None] * np.eye(n_formats)
    between, within = prior_spreads(r, noise, fine & live[:, None], np.asarray(roles))
    prior_cov = between**2 + within[:, :, None] ** 2 * np.eye(n_formats)  # (U, F, F)
    shift, var = posterior_mixture(r, noise, prior_cov)
    mean = bias + shift
    trace_var = _relative_sd(gsq) ** 2
    value = np.where(prior > 0, prior * np.exp(np.where(live[:, None], mean + var / 2, 0.0)), 0.0)
    spread = np.sqrt(np.expm1(np.minimum(var + trace_var[:, None], 20.0)))
    if monotone:
        value = make_monotone(value, probes.formats)
    reached = probes.reached.sum(0) > 0
    value[~reached] = np.nan
    typical = (
        np.sqrt(np.median(np.diagonal(noise[live], axis1=1, axis2=2)[fine[live]])) if live.any() else 0.0
    )
    return Posterior(value, value * spread, between, float(np.median(within)), float(typical))


def posterior_of_units(probes: ProbeMatrix, units: Sequence[QuantUnit]) -> Posterior:
    """`posterior` of a model's units: roles share the bias, experts of one layer and projection are a pool."""
    pools = [(u.layer, u.role) if u.expert >= 0 else None for u in units]
    return posterior(
        probes, np.array([u.params for u in units], np.float64), [u.role for u in units], pools=pools
    )


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
