"""Layers of a map of cells, all of them heat maps: what is unknown, what is noise, what is selected.

A layer of markers for the mouse would need WebGL, and three new contexts each time that the figure changes: half a second
on a machine without a GPU. Boxes and lassos come back as coordinates instead (`views.regions`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette

__all__ = ["add_chosen", "add_ground", "gap_of"]

_FINE_UP_TO = 2000  # unknown cells get three strokes each, more of them one


def gap_of(shape: tuple[int, ...]) -> int:
    """Pixels between cells: none where there are too many to see it."""
    return 1 if max(shape) <= 64 else 0


def add_ground(
    figure: go.Figure, unknown: np.ndarray, noise: np.ndarray, p: Palette, words: str, **on: Any
) -> None:
    """The cells (Y, X) below the values: unknown ones grey and hatched, with ``words`` as their hover; noise pale.

    Each layer is an image of its own that the browser encodes and decodes: nothing is added where all cells are known.
    """
    if not (unknown.any() or noise.any()):
        return
    ground = np.where(unknown, 1.0, np.where(noise, 0.0, np.nan)).astype(np.float32)
    gap = gap_of(ground.shape)
    flat = [[0, p.below_floor], [1, p.unknown]]
    figure.add_heatmap(z=ground, colorscale=flat, zmin=0, zmax=1, showscale=False, xgap=gap, ygap=gap, hoverongaps=False,
                       hovertemplate=words + "<extra></extra>", **on)  # fmt: skip
    if unknown.any():
        # One path for all of them: a shape or a trace for each would be an element of the page each.
        lines = [(-0.5, 0.5, 0.5, -0.5)]
        if unknown.sum() <= _FINE_UP_TO:
            lines += [(-0.5, 0, 0, -0.5), (0, 0.5, 0.5, 0)]
        y, x = np.nonzero(unknown)
        path = "".join(
            f"M{c + x0},{r + y0}L{c + x1},{r + y1}"
            for r, c in zip(y.tolist(), x.tolist())
            for x0, y0, x1, y1 in lines
        )
        figure.add_shape(type="path", path=path, xref=on.get("xaxis", "x"), yref=on.get("yaxis", "y"), line={"color": p.muted, "width": 1})  # fmt: skip


def add_chosen(figure: go.Figure, chosen: np.ndarray, p: Palette, **on: Any) -> None:
    """The selected cells (Y, X) in the accent colour; nothing where there are none."""
    if chosen.any():
        figure.add_heatmap(z=np.where(chosen, 1.0, np.nan).astype(np.float32), colorscale=[[0, p.accent], [1, p.accent]], showscale=False,
                           opacity=0.7, xgap=gap_of(chosen.shape), ygap=gap_of(chosen.shape), hoverinfo="skip", **on)  # fmt: skip
