"""Options of metrics, checked before anything runs: known names, the kind of their default, a sensible range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bitatlas.analysis.metrics.base import Metric
from bitatlas.kernels.errors import UserError

__all__ = ["check_settings", "plain_settings"]


def plain_settings(metrics: Iterable[Metric | type[Metric]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``METRIC.NAME`` as ``NAME``: the setting of that metric alone, which it is where no other of ``metrics`` has the name.

    Raises:
        UserError: a metric that is not among these, or a setting that others of them would get too.
    """
    metrics, out = list(metrics), dict[str, Any]()
    for key, value in settings.items():
        owner, dot, name = key.rpartition(".")
        if not dot:
            out[key] = value
            continue
        options = {m.NAME: m.SETTINGS for m in metrics}
        if owner not in options:
            raise UserError(f"{owner} is not measured here", found=f"--set {key}", fix=f"--metric {owner}")
        if name not in options.pop(owner):
            raise UserError(f"{owner} has no option {name}", found=f"--set {key}", fix="bitatlas metrics")
        others = [metric for metric, have in options.items() if name in have]
        if others:
            raise UserError(f"{', '.join(others)} would get the option {name} of {owner} too", found=f"--set {key}",
                            fix=f"measure {owner} alone, with --set {name}={value}")  # fmt: skip
        if name in settings or name in out:
            raise UserError(f"the option {name} is given twice", found=f"{name} and {key}")
        out[name] = value
    return out


def check_settings(metrics: Iterable[Metric | type[Metric]], settings: Mapping[str, Any]) -> None:
    """Whether every setting belongs to one of ``metrics`` and is a value that each of its owners can work with.

    Raises:
        UserError: an unknown name; a value of another kind than the default, or outside `Metric.LIMITS`.
    """
    metrics = list(metrics)
    known = sorted({key for m in metrics for key in m.SETTINGS})
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(
            f"no metric here has an option {', '.join(unknown)}",
            found=f"options: {', '.join(known) or 'none'}",
        )
    for name, value in settings.items():
        for owner in (m for m in metrics if name in m.SETTINGS):
            default = owner.SETTINGS[name]
            wanted = _refused(value, default, owner.LIMITS.get(name))
            if wanted:
                raise UserError(
                    f"the option {name} of {owner.NAME} must be {wanted}",
                    found=repr(value),
                    fix=f"--set {name}={str(default).lower() if isinstance(default, bool) else default}, the default",
                )
    if "quantizer" in settings:
        from bitatlas.kernels.quantizers import get_quantizer

        get_quantizer(str(settings["quantizer"]))


def _refused(value: Any, default: Any, limits: tuple[Any, ...] | None) -> str:
    """What the value should have been, "" when it is fine."""
    if isinstance(default, str):
        words = limits or ()
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            return "a text"
        return (
            f"one of {', '.join(w or '(empty)' for w in words)}" if words and str(value) not in words else ""
        )
    if isinstance(default, bool):
        return "" if isinstance(value, bool) or value in (0, 1) else "true or false"
    whole = isinstance(default, int)
    least, most = limits or (int(whole and default > 0), math.inf)
    wanted = f"a {'whole number' if whole else 'number'} from {least} " + (
        "on" if most == math.inf else f"to {most}"
    )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return wanted
    return "" if least <= value <= most and (not whole or value == int(value)) else wanted
