"""Experts, drawn: layer x expert as one image with an invisible layer for the mouse, and the profile by layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, template
from bitatlas.app.views.experts import KNOWN, UNKNOWN, ZERO, ExpertsView, LayerProfile

__all__ = ["HEIGHT", "expert_map", "profile"]

HEIGHT = 500


def expert_map(view: ExpertsView, p: Palette) -> go.Figure:
    """The map; unknown experts are hatched. ``customdata[0]`` of a marker is its slot (layer row x experts + expert)."""
    figure = go.Figure()
    flat = [[0, p.below_floor], [1, p.unknown]]
    ground = np.where(view.state == UNKNOWN, 1.0, np.where(view.state == ZERO, 0.0, np.nan)).astype(np.float32)  # fmt: skip
    gap = 1 if max(view.z.shape) <= 64 else 0
    figure.add_heatmap(z=ground, colorscale=flat, zmin=0, zmax=1, showscale=False, hoverinfo="skip", xgap=gap, ygap=gap)  # fmt: skip
    bar = {"title": {"text": ("log10 " if view.log else "") + view.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0}  # fmt: skip
    figure.add_heatmap(z=view.z, colorscale=p.damage, colorbar=bar, hoverinfo="skip", xgap=gap, ygap=gap)
    size = 9 if max(view.z.shape) <= 40 else 5
    for hatch in (False, True):
        wanted = view.state == UNKNOWN if hatch else (view.state == KNOWN) | (view.state == ZERO)
        y, x = np.nonzero(wanted)
        if not len(y):
            continue
        data = np.stack([y * view.experts + x, view.value[y, x], view.tokens[y, x], np.array(view.layers)[y]], 1).astype(np.float32)  # fmt: skip
        marker = {"symbol": "square", "size": size, "color": p.accent, "opacity": 0}
        words = "<b>%{customdata[1]:.3~g}</b> " + view.unit
        if hatch:
            marker = {"symbol": "line-ne-open", "size": size, "color": p.muted, "opacity": 0.8}
            words = "unknown: no token reached it, or not measured"
        traffic = (
            "<br>%{customdata[2]:,.0f} tokens" if np.isfinite(view.tokens[y, x]).any() and not hatch else ""
        )
        figure.add_scattergl(
            x=x.astype(np.int32), y=y.astype(np.int32), mode="markers", marker=marker, customdata=data, showlegend=hatch,
            name="unknown: never reached", hovertemplate="layer %{customdata[3]} · expert %{x}<br>" + words + traffic + "<extra></extra>",
            selected={"marker": {"opacity": 1, "color": p.accent, "size": size}}, unselected={"marker": {"opacity": 0.8 if hatch else 0}},
        )  # fmt: skip
    step = max(1, -(-len(view.layers) // 24))
    at = list(range(0, len(view.layers), step))
    figure.update_layout(
        template=template(p), height=HEIGHT, dragmode="select", hovermode="closest", uirevision="experts", margin={"l": 8, "r": 8, "t": 28, "b": 8},
        xaxis={"title": "expert", "range": [-0.5, view.experts - 0.5], "showgrid": False},
        yaxis={"title": "layer", "range": [len(view.layers) - 0.5, -0.5], "showgrid": False, "tickmode": "array", "tickvals": at,
               "ticktext": [str(view.layers[i]) for i in at]},
        newselection={"line": {"color": p.accent, "width": 1.5, "dash": "solid"}},
    )  # fmt: skip
    return figure


def profile(view: LayerProfile, p: Palette) -> go.Figure:
    """Every score over the layers, as a share of its largest value."""
    figure = go.Figure()
    for name, values in view.scores.items():
        figure.add_scatter(
            x=list(view.layers), y=values, mode="lines+markers", name=name, marker={"size": 5}, customdata=values * view.largest[name],
            hovertemplate="layer %{x}<br>" + name + " %{customdata:.3~g}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(template=template(p), height=300, dragmode=False, xaxis={"title": "layer"}, yaxis={"title": "share of the largest"})  # fmt: skip
    return figure
