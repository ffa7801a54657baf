"""Small words shared by the views: counts, sizes, durations, units of metrics."""

from __future__ import annotations

__all__ = ["count", "duration", "metric_unit", "params", "short_bytes"]

_NATS = ("fisher_projection", "fisher_trace", "fisher", "kl_flip", "logit_gram", "hawq_trace")
_UNITS = dict.fromkeys(_NATS, "nats/token") | {
    "weight_error": "squared weight",
    "weight_error_rel": "relative squared error",
    "activation_error": "squared activation per token",
    "activation_error_rel": "relative squared error",
    "hessian_trace": "trace of the Hessian",
    "alphaq": "squared weight",
    "alpha_hill": "power-law exponent",
    "alpha_hill_plain": "power-law exponent",
    "alphaq_alpha": "power-law exponent",
    "spectral_alpha": "power-law exponent",
    "routing_count": "tokens",
    "routing_frequency": "share of tokens",
    "routing_weight": "routing weight",
}


def metric_unit(name: str) -> str:
    """The unit of a metric's values; its name where the unit is not known here.

    The metrics' own table would say it too, but loads torch, and a page must open without.
    """
    return _UNITS.get(name, name)


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
