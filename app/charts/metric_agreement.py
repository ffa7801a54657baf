"""Metrics, drawn: two of them unit by unit, and the matrix of all."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.metric_agreement import BOTH, NEITHER, ONLY_X, ONLY_Y, MetricsView

__all__ = ["agreement_matrix", "rank_scatter"]

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
    longest = 7 * max(map(len, names), default=0)  # pixels of the widest name
    margin = fixed_margin(longest + 16, 70, 8, int(0.75 * longest) + 20)
    figure.update_layout(height=max(300, 150 + 17 * len(names)), dragmode=False, margin=margin)
    figure.update_xaxes(tickangle=-45, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return dress(figure, p)
