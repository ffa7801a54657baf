"""Metrics, drawn: two of them unit by unit, and the matrix of all."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, template
from bitatlas.app.views.metric_agreement import BOTH, NEITHER, ONLY_X, ONLY_Y, MetricsView

__all__ = ["agreement_matrix", "rank_scatter"]

_NAMES_UP_TO = 2000


def rank_scatter(view: MetricsView, x: str, y: str, keys: tuple[str, ...], p: Palette) -> go.Figure:
    """Each unit a point; the top k of either metric stand out by colour and shape."""
    figure = go.Figure()
    looks = (
        (NEITHER, "in neither top", p.muted, "circle", 0.45),
        (BOTH, "in both tops", p.accent, "circle", 1.0),
        (ONLY_X, f"only in the top of {x}", "#c2410c", "triangle-right", 1.0),
        (ONLY_Y, f"only in the top of {y}", "#b8860b", "triangle-up", 1.0),
    )
    named = len(view.ids) <= _NAMES_UP_TO
    for state, name, colour, symbol, opacity in looks:
        at = np.flatnonzero(view.top == state)
        if len(at):
            figure.add_scattergl(
                x=view.x[at], y=view.y[at], mode="markers", name=name, customdata=view.ids[at].astype(np.float32),
                text=[keys[i] for i in view.ids[at]] if named or state != NEITHER else None,
                marker={"color": colour, "symbol": symbol, "size": 6 if state == NEITHER else 8, "opacity": opacity},
                hovertemplate="%{text}<br>" * (named or state != NEITHER) + "%{x:.3~g}, %{y:.3~g}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(
        template=template(p), height=430, uirevision=f"{x}|{y}", dragmode="select",
        xaxis={"title": f"{x} ({view.x_unit})", "type": "log" if view.x_log else "linear", "exponentformat": "power"},
        yaxis={"title": f"{y} ({view.y_unit})", "type": "log" if view.y_log else "linear", "exponentformat": "power"},
    )  # fmt: skip
    return figure


def agreement_matrix(names: tuple[str, ...], rho: np.ndarray, p: Palette) -> go.Figure:
    """Rank correlations as squares, blue to red; grey where nothing can be said."""
    figure = go.Figure()
    unknown = np.where(np.isfinite(rho), np.nan, 1.0).astype(np.float32)
    figure.add_heatmap(z=unknown, x=names, y=names, colorscale=[[0, p.unknown], [1, p.unknown]], showscale=False, hoverinfo="skip")  # fmt: skip
    scale = [(1 - at, colour) for at, colour in reversed(p.diverging)]
    figure.add_heatmap(
        z=rho.astype(np.float32), x=names, y=names, zmin=-1, zmax=1, colorscale=scale, xgap=1, ygap=1,
        text=[[f"{v:.2f}" if np.isfinite(v) else "" for v in row] for row in rho] if len(names) <= 16 else None,
        texttemplate="%{text}" if len(names) <= 16 else None, colorbar={"thickness": 12, "outlinewidth": 0},
        hovertemplate="%{y} and %{x}<br>rank correlation %{z:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(template=template(p), height=max(300, 150 + 17 * len(names)), dragmode=False)
    figure.update_xaxes(tickangle=-45, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure
