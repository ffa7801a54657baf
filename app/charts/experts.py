"""Experts, drawn: layer x expert as one image, and the profile by layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.charts.cells import add_chosen, add_ground, gap_of
from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.experts import UNKNOWN, ZERO, ExpertsView, LayerProfile

__all__ = ["HEIGHT", "expert_map", "profile"]

HEIGHT = 500


def expert_map(view: ExpertsView, p: Palette, chosen: np.ndarray | None = None) -> go.Figure:
    """The map; unknown experts are hatched. ``chosen``: slots (layer row x experts + expert) drawn as selected."""
    figure = go.Figure()
    gap = gap_of(view.z.shape)
    here = "layer %{customdata[0]} · expert %{x}<br>"
    rows = np.broadcast_to(np.array(view.layers)[:, None], view.z.shape)
    unknown = view.state == UNKNOWN
    add_ground(figure, unknown, view.state == ZERO, p, here + "unknown: no token reached it, or not measured",
               customdata=rows[:, :, None].astype(np.float32))  # fmt: skip
    bar = {"title": {"text": ("log10 " if view.log else "") + view.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0}  # fmt: skip
    data = np.stack([rows, view.value, view.tokens], 2).astype(np.float32)
    traffic = "<br>%{customdata[2]:,.0f} tokens" if np.isfinite(view.tokens).any() else ""
    figure.add_heatmap(
        z=view.z, colorscale=p.damage, colorbar=bar, xgap=gap, ygap=gap, customdata=data, hoverongaps=False,
        hovertemplate=here + "<b>%{customdata[1]:.3~g}</b> " + view.unit + traffic + "<extra></extra>",
    )  # fmt: skip
    mark = np.zeros(view.z.size, bool)
    mark[[] if chosen is None else chosen] = True
    add_chosen(figure, mark.reshape(view.z.shape), p)
    step = max(1, -(-len(view.layers) // 24))
    figure.add_scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 11, "color": p.unknown}, hoverinfo="skip",
                       name="unknown: never reached", showlegend=bool(unknown.any()))  # fmt: skip
    figure.update_layout(
        height=HEIGHT, dragmode="select", clickmode="event", hovermode="closest", uirevision="experts",
        margin=fixed_margin(56, 96, 28, 48),
        xaxis={"title": "expert", "range": [-0.5, view.experts - 0.5], "showgrid": False, "automargin": False},
        yaxis={"title": "layer", "range": [len(view.layers) - 0.5, -0.5], "showgrid": False, "automargin": False,
               "tickmode": "array", "tickvals": list(range(0, len(view.layers), step)),
               "ticktext": [str(n) for n in view.layers[::step]]},
        newselection={"line": {"color": p.accent, "width": 1.5, "dash": "solid"}},
    )  # fmt: skip
    return dress(figure, p)


def profile(view: LayerProfile, p: Palette) -> go.Figure:
    """Every score over the layers, as a share of its largest value."""
    figure = go.Figure()
    for name, values in view.scores.items():
        figure.add_scatter(
            x=list(view.layers), y=values, mode="lines+markers", name=name, marker={"size": 5}, customdata=values * view.largest[name],
            hovertemplate="layer %{x}<br>" + name + " %{customdata:.3~g}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(height=300, dragmode=False, margin=fixed_margin(60), xaxis={"title": "layer"}, yaxis={"title": "share of the largest"})  # fmt: skip
    return dress(figure, p)
