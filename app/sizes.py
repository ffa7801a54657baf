"""Bytes in words and back: ``8GiB`` -> 8589934592 -> ``8.0 GiB``."""

from __future__ import annotations

import re

from bitatlas.kernels.errors import UserError

__all__ = ["axis_scale", "format_bytes", "format_least", "parse_bytes"]

_UNITS = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """Bytes from ``8GiB``, ``500 MB``, ``123456``. ``G`` alone means GiB, as memory is sold.

    Raises:
        UserError: not a size, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise UserError("this is not a size", found=repr(text), fix="write for example 8GiB, 500MB or 123456")
    return int(float(match[1]) * unit)


def axis_scale(top: float) -> tuple[int, str]:
    """Bytes of an axis' unit and its name, for an axis that ends at ``top`` bytes."""
    return (1 << 30, "GiB") if top >= 1 << 30 else (1 << 20, "MiB")


def format_least(count: int) -> str:
    """A size that is enough, in words: never rounded below ``count``. ``2162689`` -> ``2.1 MiB``."""
    for scale, word in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= scale:
            return f"{-(-count * 10 // scale) / 10:.1f} {word}"
    return f"{count} B"


def format_bytes(count: float) -> str:
    """``1610612736`` -> ``1.5 GiB``; whole bytes below 1 KiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
