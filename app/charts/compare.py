"""Compare, drawn: the map of changed bits, and the waterfalls of bytes and damage."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.compare import CompareView

__all__ = ["change_map", "waterfall"]


def change_map(view: CompareView, p: Palette) -> go.Figure:
    """Layer x role, B minus A in bits; red gets more bits, blue fewer."""
    widest = float(np.nanmax(np.abs(view.bits))) if np.isfinite(view.bits).any() else 0.0
    figure = go.Figure(
        go.Heatmap(
            z=view.bits, x=list(view.columns), y=list(view.rows), customdata=view.changed, zmid=0, zmin=-max(widest, 1.0), zmax=max(widest, 1.0),
            colorscale=[list(c) for c in p.diverging], xgap=1, ygap=1, hoverongaps=False,
            colorbar={"title": {"text": "bits, B − A"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="layer %{y}, %{x}<br>%{z:+.2f} bits, %{customdata} units changed<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(
        height=max(300, 60 + 14 * len(view.rows)), dragmode=False,
        xaxis={"title": "role", "type": "category"}, yaxis={"title": "layer", "type": "category", "autorange": "reversed"},
    )  # fmt: skip
    return dress(figure, p)


def waterfall(view: CompareView, p: Palette, of: str) -> go.Figure:
    """From A's total to B's, role by role. ``of``: ``bytes`` or ``damage``."""
    totals = view.nbytes if of == "bytes" else view.damage
    steps = [r.nbytes if of == "bytes" else r.damage for r in view.roles]
    big = max(view.nbytes, default=0) >= 1 << 30
    scale = (1 << 30 if big else 1 << 20) if of == "bytes" else 1.0
    word = ("GiB" if big else "MiB") if of == "bytes" else view.unit
    figure = go.Figure(
        go.Waterfall(
            x=["A", *(r.role for r in view.roles), "B"],
            y=[totals[0] / scale, *(s / scale for s in steps), 0],
            measure=["absolute", *("relative" for _ in steps), "total"],
            increasing={"marker": {"color": "#c2410c"}}, decreasing={"marker": {"color": "#2f9c8c"}},
            totals={"marker": {"color": p.accent}}, connector={"line": {"color": p.grid}},
            customdata=[0, *(r.units for r in view.roles), 0],
            hovertemplate=f"%{{x}}: %{{delta:+.4g}} {word}, %{{customdata}} units<extra></extra>",
        )
    )  # fmt: skip
    levels = [totals[0], totals[1], *(totals[0] + float(s) for s in np.cumsum(steps))]
    low, high = min(levels) / scale, max(levels) / scale
    # Allocations of one budget differ by little: the bars of bytes begin where the difference can be seen.
    near = of == "bytes" and high - low < 0.2 * high
    room = max(high - low, 0.01 * high)
    figure.update_layout(
        height=320, dragmode=False, showlegend=False,
        xaxis={"title": "from A to B by role", "type": "category"},
        yaxis={"title": f"weights ({word})" if of == "bytes" else f"predicted damage ({word})",
               "range": [low - 0.5 * room, high + 0.2 * room] if near else None},
    )  # fmt: skip
    return dress(figure, p)
