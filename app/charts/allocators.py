"""Allocators, drawn: every front over size, with the lower bound and what was measured."""

from __future__ import annotations

import plotly.graph_objects as go

from bitatlas.app.sizes import axis_scale
from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.allocators import AllocatorsView

__all__ = ["fronts_chart"]

_DASH = ("solid", "dash", "dot", "dashdot", "longdash")


def fronts_chart(view: AllocatorsView, p: Palette) -> go.Figure:
    """Predicted fronts as lines, searches on the real model as lines with marks, verified allocations as diamonds."""
    top = max(
        [int(view.bound.weights_bytes[-1]), *(r.weights_bytes[-1] for r in view.rows if r.weights_bytes)]
    )
    scale, word = axis_scale(top)
    figure = go.Figure()
    figure.add_scatter(
        x=view.bound.weights_bytes / scale, y=view.bound.damage, mode="lines", name="lower bound",
        line={"color": p.muted, "width": 6}, opacity=0.35, hovertemplate=f"%{{x:.3f}} {word}<br>no allocation below %{{y:.4g}}<extra></extra>",
    )  # fmt: skip
    for i, row in enumerate(r for r in view.rows if r.damage):
        words = "measured" if row.measured else "predicted"
        figure.add_scatter(
            x=[b / scale for b in row.weights_bytes], y=list(row.damage), name=row.title,
            mode="lines+markers" if row.measured or len(row.damage) < 3 else "lines",
            line={"width": 2, "dash": _DASH[i // 7 % len(_DASH)]}, marker={"size": 7},
            hovertemplate=f"{row.title}<br>%{{x:.3f}} {word}<br>{words} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    if view.measured:
        figure.add_scatter(
            x=[m.weights_bytes / scale for m in view.measured], y=[m.kl for m in view.measured], mode="markers", name="verified, nats/token",
            marker={"symbol": "diamond", "size": 10, "color": "#c2410c", "line": {"color": p.paper, "width": 1}},
            error_y={"type": "data", "array": [m.stderr for m in view.measured], "thickness": 1, "width": 3},
            text=[m.label for m in view.measured], hovertemplate=f"%{{text}}<br>%{{x:.3f}} {word}<br>%{{y:.4g}} nats/token<extra></extra>",
        )  # fmt: skip
    positive = any(d > 0 for r in view.rows for d in r.damage)
    figure.update_layout(
        height=460, dragmode=False, uirevision="allocators",
        xaxis={"title": f"weights ({word}), kept tensors included"},
        yaxis={"title": f"damage, {view.metric} ({view.unit})", "type": "log" if positive else "linear"},
    )  # fmt: skip
    return dress(figure, p)
