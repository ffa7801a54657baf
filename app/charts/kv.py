"""The KV page, drawn: maps of K and V side by side, and the split of one memory."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bitatlas.app.sizes import format_bytes
from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.kv import JointFront, KvMap, Split

__all__ = ["joint_chart", "map_chart", "split_chart"]

_MIB = 1 << 20


def map_chart(view: KvMap, p: Palette) -> go.Figure:
    """One heat map a panel, layers downwards, one colour scale (log) for all."""
    values = np.concatenate([panel.values.ravel() for panel in view.panels])
    seen = values[np.isfinite(values) & (values > 0)]
    low, high = (np.log10([seen.min(), seen.max()])) if seen.size else (-1.0, 0.0)
    figure = make_subplots(
        1, len(view.panels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[x.name for x in view.panels],
        column_widths=[len(x.columns) for x in view.panels],
    )  # fmt: skip
    for i, panel in enumerate(view.panels):
        z = np.log10(np.where(panel.values > 0, panel.values, np.nan))
        figure.add_heatmap(
            z=z, x=list(panel.columns), y=list(view.layers), customdata=panel.values, zmin=low, zmax=high, xgap=1, ygap=1,
            colorscale=[list(c) for c in p.damage], showscale=i == 0, hoverongaps=False,
            colorbar={"title": {"text": f"log10 {view.quantity}", "side": "right"}, "thickness": 10},
            hovertemplate=f"layer %{{y}}<br>{panel.name} %{{x}}<br>%{{customdata:.3g}}<extra></extra>",
            row=1, col=i + 1,
        )  # fmt: skip
    longest = max((len(c) for panel in view.panels for c in panel.columns), default=0)
    below = 24 + 6 * longest
    figure.update_layout(
        height=below + 60 + 16 * max(len(view.layers), 6),
        dragmode=False,
        margin=fixed_margin(60, 104, 28, below),
    )
    ends = [max(view.layers, default=0) + 0.5, min(view.layers, default=0) - 0.5]
    figure.update_yaxes(range=ends, showgrid=False)
    figure.update_yaxes(title_text="layer", row=1, col=1)
    figure.update_xaxes(showgrid=False, tickangle=-60)
    return dress(figure, p)


def split_chart(view: Split, p: Palette) -> go.Figure:
    """Predicted damage of weights, cache and both over the cache's share of the memory; the best split marked."""
    figure = go.Figure()
    x = view.kv_bytes / _MIB
    for name, y, line in (
        ("weights", view.weights, {"color": p.muted, "width": 1.5, "dash": "dot"}),
        ("KV cache", view.cache, {"color": "#c77d3a", "width": 1.5, "dash": "dot"}),
        ("both", view.total, {"color": p.accent, "width": 2.5}),
    ):
        figure.add_scatter(x=x, y=y, mode="lines", name=name, line=line,
                           hovertemplate=f"cache %{{x:.1f}} MiB<br>{name} %{{y:.4g}} nats/token<extra></extra>")  # fmt: skip
    figure.add_scatter(
        x=[x[view.best]], y=[view.total[view.best]], mode="markers+text", name="best split", text=["best split"],
        textposition="top center", marker={"size": 13, "color": p.accent, "line": {"color": p.paper, "width": 2}},
        hovertemplate=f"{format_bytes(int(view.kv_bytes[view.best]))} of cache<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=view.whole_kv_bytes / _MIB, line={"color": p.muted, "width": 1, "dash": "dash"},
                     annotation={"text": "16-bit cache", "font": {"color": p.muted}})  # fmt: skip
    figure.update_layout(
        height=340, dragmode=False, margin=fixed_margin(),
        xaxis={"title": "KV cache (MiB); the weights take the rest", "range": [0, float(max(x[-1], x[view.best])) * 1.05]},
        yaxis={"title": "predicted damage (nats/token)", "type": "log"},
    )  # fmt: skip
    return dress(figure, p)


def joint_chart(view: JointFront, p: Palette) -> go.Figure:
    """Above: predicted damage of both over the memory. Below: the bytes of weights and cache that it is made of."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.55, 0.45])
    x, cache = view.total_bytes / _MIB, view.kv_bytes / _MIB
    share = view.kv_bytes / view.total_bytes
    figure.add_scatter(x=x, y=view.damage, customdata=share, mode="lines+markers", name="both", showlegend=False,
                       line={"color": p.accent, "width": 2.5}, marker={"size": 4, "color": p.accent},
                       hovertemplate="%{x:.1f} MiB, %{customdata:.0%} of it cache<br>%{y:.4g} nats/token<extra></extra>", row=1, col=1)  # fmt: skip
    if view.at >= 0:
        figure.add_scatter(x=[x[view.at]], y=[view.damage[view.at]], mode="markers+text", text=["this memory"], textposition="top right",
                           marker={"size": 13, "color": p.accent, "line": {"color": p.paper, "width": 2}}, showlegend=False,
                           hoverinfo="skip", row=1, col=1)  # fmt: skip
    for name, y, colour in (("weights", x - cache, p.muted), ("KV cache", cache, "#c77d3a")):
        figure.add_scatter(x=x, y=y, mode="lines", stackgroup="bytes", name=name, line={"color": colour, "width": 1},
                           hovertemplate=f"{name} %{{y:.1f}} MiB<extra></extra>", row=2, col=1)  # fmt: skip
    figure.update_layout(height=440, dragmode=False, margin=fixed_margin())
    figure.update_yaxes(title_text="predicted damage", type="log", row=1, col=1)
    figure.update_yaxes(title_text="MiB", row=2, col=1)
    figure.update_xaxes(title_text="weights and KV cache (MiB)", row=2, col=1)
    return dress(figure, p)
