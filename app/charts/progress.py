"""Progress by layer: one strip a metric, one square a layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.job import LayerProgress

__all__ = ["figure"]


def figure(view: LayerProgress, palette: Palette) -> go.Figure:
    """Done squares in the accent colour, the rest pale."""
    done = np.nan_to_num(view.done, nan=0.0)
    fig = go.Figure(
        go.Heatmap(
            z=done, x=list(view.layers), y=list(view.metrics), zmin=0, zmax=1, showscale=False, xgap=2, ygap=4,
            colorscale=[[0, palette.below_floor], [1, palette.accent]],
            hovertemplate="layer %{x}<br>%{y}: %{z:.0%} done<extra></extra>",
        )
    )  # fmt: skip
    fig.update_layout(height=70 + 34 * max(len(view.metrics), 1), dragmode=False)
    fig.update_xaxes(title_text="layer", showgrid=False)
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return dress(fig, palette)
