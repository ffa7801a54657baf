"""Which cells or points lie in the boxes and lassos that a person drew on a chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["inside"]


def inside(event: Mapping[str, Any] | None, x: np.ndarray, y: np.ndarray, axes: str = "") -> np.ndarray:
    """(N,) bool, which of the points (x, y) lie in a box or lasso of a chart's selection.

    Args:
        event: what Streamlit hands over: ``selection`` with ``box`` and ``lasso``, each with ``xref``, ``x``, ``y``.
        axes: suffix of the x axis that the points are drawn on, "" for the first.
    """
    out = np.zeros(len(x), bool)
    drawn = (event or {}).get("selection") or {}
    for box in drawn.get("box") or ():
        if _on(box, axes) and len(box.get("x", ())) == 2 == len(box.get("y", ())):
            (left, right), (low, high) = sorted(box["x"]), sorted(box["y"])
            out |= (x >= left) & (x <= right) & (y >= low) & (y <= high)
    for lasso in drawn.get("lasso") or ():
        if _on(lasso, axes) and len(lasso.get("x", ())) == len(lasso.get("y", ())) >= 3:
            out |= _in_polygon(x, y, np.asarray(lasso["x"], float), np.asarray(lasso["y"], float))
    return out


def _on(shape: Mapping[str, Any], axes: str) -> bool:
    return str(shape.get("xref") or "x") == f"x{axes}"


def _in_polygon(x: np.ndarray, y: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Even-odd rule: how often a ray to the right crosses the border."""
    out = np.zeros(len(x), bool)
    box = (x >= px.min()) & (x <= px.max()) & (y >= py.min()) & (y <= py.max())
    x, y = x[box], y[box]
    odd = np.zeros(len(x), bool)
    for ax, ay, bx, by in zip(px, py, np.roll(px, -1), np.roll(py, -1)):
        if ay != by:
            odd ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    out[box] = odd
    return out
