"""Settings of solvers and searches: a table of defaults, and overrides of the same kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitatlas.analysis.schema import UserError

__all__ = ["checked_settings"]


def checked_settings(owner: str, defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults`` with overrides; values keep the type of their default, tuples may come as ``16/4/1``.

    Raises:
        UserError: an unknown name, or a value of another kind; ``owner`` is who the message names.
    """
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise UserError(
            f"{owner} has no setting {', '.join(unknown)}", found=f"settings: {', '.join(defaults) or 'none'}"
        )
    out = dict(defaults)
    for name, value in settings.items():
        default = defaults[name]
        like = "/".join(map(str, default)) if isinstance(default, tuple) else str(default)
        wrong = UserError(f"the setting {name} of {owner} has the wrong kind", found=repr(value), fix=f"something like {like}")  # fmt: skip
        try:
            if isinstance(default, bool):
                out[name], ok = value, isinstance(value, bool)
            elif isinstance(default, str):
                out[name], ok = str(value), True
            elif isinstance(default, tuple):
                parts = value.split("/") if isinstance(value, str) else list(np.atleast_1d(value))
                out[name] = tuple(_number(v, default[0]) for v in parts)
                ok = bool(out[name]) and min(out[name]) > 0
            else:
                out[name] = _number(value, default)
                ok = bool(np.isfinite(out[name]) and out[name] >= 0)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not ok:
            raise wrong
    return out


def _number(value: Any, like: float) -> float:
    """``value`` as a number of the kind of ``like``.

    Raises:
        TypeError, ValueError, OverflowError: it is none, or a whole number was wanted.
    """
    found = type(like)(value)
    if isinstance(value, bool) or (not isinstance(value, str) and found != value):
        raise ValueError(value)
    return found
