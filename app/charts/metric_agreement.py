"""Metrics, drawn: two of them unit by unit."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.metric_agreement import BOTH, NEITHER, ONLY_X, ONLY_Y, MetricsView

__all__ = ["rank_scatter"]

_POINTS_UP_TO = 1000  # as single marks; more are drawn as their density
_BINS = (120, 84)


def rank_scatter(view: MetricsView, x: str, y: str, keys: tuple[str, ...], p: Palette) -> go.Figure:
    """Each unit a point; the top k of either metric stand out by colour and shape."""
    figure = go.Figure()
    looks = (
        (NEITHER, "in neither top", p.muted, "circle", 0.45),
        (BOTH, "in both tops", p.accent, "circle", 1.0),
        (ONLY_X, f"only in the top of {x}", "#c2410c", "triangle-right", 1.0),
        (ONLY_Y, f"only in the top of {y}", "#b8860b", "triangle-up", 1.0),
    )
    many = len(view.ids) > _POINTS_UP_TO
    for state, name, colour, symbol, opacity in looks:
        at = np.flatnonzero(view.top == state)
        if many and state == NEITHER:
            _add_density(figure, view, at, p)
        elif len(at):
            figure.add_scatter(
                x=view.x[at], y=view.y[at], mode="markers", name=name, text=[keys[i] for i in view.ids[at]],
                marker={"color": colour, "symbol": symbol, "size": 6 if state == NEITHER else 8, "opacity": opacity},
                hovertemplate="%{text}<br>%{x:.3~g}, %{y:.3~g}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(
        height=430, uirevision=f"{x}|{y}", margin=fixed_margin(top=56), dragmode="select", clickmode="event", hovermode="closest",
        xaxis={"title": f"{x} ({view.x_unit})", "type": "log" if view.x_log else "linear", "exponentformat": "power"},
        yaxis={"title": f"{y} ({view.y_unit})", "type": "log" if view.y_log else "linear", "exponentformat": "power"},
    )  # fmt: skip
    return dress(figure, p)


def _add_density(figure: go.Figure, view: MetricsView, at: np.ndarray, p: Palette) -> None:
    """How many units lie where, for the many that stand in neither top."""
    x, y = view.x[at], view.y[at]
    edges = [_edges(v, log, n) for v, log, n in ((x, view.x_log, _BINS[0]), (y, view.y_log, _BINS[1]))]
    count, *_ = np.histogram2d(x, y, bins=edges)
    figure.add_heatmap(
        x=edges[0], y=edges[1], z=np.log10(np.where(count > 0, count, np.nan)).T.astype(np.float32), customdata=count.T.astype(np.float32),
        colorscale=[[0, p.grid], [0.35, p.muted], [1, p.ink]], showscale=False, hoverongaps=False,
        hovertemplate="%{customdata:,.0f} units in neither top<br>about %{x:.3~g}, %{y:.3~g}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 10, "color": p.muted}, name="in neither top",
                       hoverinfo="skip")  # fmt: skip


def _edges(values: np.ndarray, log: bool, n: int) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not high > low:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    edges = np.geomspace(low, high, n + 1) if log else np.linspace(low, high, n + 1)
    edges[0], edges[-1] = low, high  # rounding must not leave the outermost units out
    return edges
