"""Small words shared by the views: counts, sizes, durations, units of metrics."""

from __future__ import annotations

__all__ = ["count", "duration", "metric_unit", "params", "short_bytes"]

_NATS = (
    "fisher_projection", "fisher_trace", "fisher", "fisher_scaled", "fisher_anchored", "kl_flip", "logit_gram", "fisher_diag", "kfac", "ekfac", "delta_ce", "ce_first_order",
    "ce_gauss_newton", "hawq_trace", "mixllm_salience", "taylor", "taylor_output", "prune", "kv_output", "kv_fisher", "kv_flip",
)  # fmt: skip
_OUTPUT = "squared activation per token"
_UNITS = dict.fromkeys(_NATS, "nats/token") | {
    "hessian_trace": "trace of the Hessian",
    "hawq_eigenvalue": "nats/token, at most",
    "hessian_eigenvalue": "eigenvalue of the Hessian",
    "weight_error": "squared weight",
    "weight_error_rel": "relative squared error",
    "activation_error": _OUTPUT,
    "activation_error_rel": "relative squared error",
    "gptq_error": _OUTPUT,
    "awq_stats": _OUTPUT,
    "activation_magnitude": "activation x squared weight",
    "massive_activations": "activations",
    "slim_salience": "nats over output features",
    "lrp": "logit",
    "alphaq": "squared weight",
    "alpha_hill": "power-law exponent",
    "alpha_hill_plain": "power-law exponent",
    "alphaq_alpha": "power-law exponent",
    "spectral_alpha": "power-law exponent",
    "quantmoe_outlier": "ratio",
    "lim": "cosine",
    "block_influence": "cosine distance",
    "cka": "similarity",
    "cca": "similarity",
    "zd": "share",
    "routing_count": "tokens",
    "routing_frequency": "share of tokens",
    "routing_weight": "routing weight",
    "coactivation": "share",
    "expert_error": _OUTPUT,
    "camera_energy": _OUTPUT,
    "kv_error": "relative",
    "topk_flip": "share of decisions",
}


def metric_unit(name: str) -> str:
    """The unit of a metric's values; ``score`` for further values of a metric that have none of their own here.

    The metrics' own table would say it too, but loads torch, and a page must open without.
    """
    return _UNITS.get(name, "score")


def count(n: int, noun: str, plural: str = "s") -> str:
    """``1 unit``, ``1,024 units``; ``plural`` is the ending."""
    return f"{n:,} {noun}" + ("" if n == 1 else plural)


def params(n: float) -> str:
    """``135 M``, ``30.5 B``, ``820 k``."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            shown = n / limit
            return f"{shown:.0f} {letter}" if shown >= 100 else f"{shown:.3g} {letter}"
    return f"{n:.0f}"


def short_bytes(n: float) -> str:
    """``22.4 GiB``, ``8.0 MiB``, ``512 B``."""
    for limit, letters in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= limit:
            return f"{n / limit:.1f} {letters}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """``8 s``, ``3 min``, ``2 h 10 min``; ``unknown`` for NaN."""
    if not seconds >= 0:
        return "unknown"
    if seconds < 1:
        return "1 s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(int(round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
