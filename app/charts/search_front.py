"""A search on its way, drawn: its front over size, and its best KL over the tokens that it has spent."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bitatlas.app.sizes import axis_scale
from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.search_front import SearchFront

__all__ = ["figure"]


def figure(view: SearchFront, p: Palette) -> go.Figure:
    """Left the front, right the curve."""
    scale, word = axis_scale(view.weights_bytes[-1])
    out = make_subplots(cols=2, horizontal_spacing=0.12)
    out.add_scatter(x=[b / scale for b in view.weights_bytes], y=list(view.kl), mode="lines+markers", name="front", row=1, col=1,
                    line={"color": p.accent}, hovertemplate=f"%{{x:.3f}} {word}<br>measured %{{y:.4g}}<extra></extra>")  # fmt: skip
    out.add_scatter(x=list(view.spent), y=list(view.best), mode="lines", name="best so far", row=1, col=2,
                    line={"color": p.muted, "shape": "hv"}, hovertemplate="%{x:,} tokens<br>%{y:.4g}<extra></extra>")  # fmt: skip
    out.update_xaxes(title=f"weights ({word}), kept tensors included", row=1, col=1)
    out.update_xaxes(title="forward-equivalent tokens", row=1, col=2)
    out.update_yaxes(title="measured KL (nats per token)", row=1, col=1)
    out.update_layout(height=300, dragmode=False, showlegend=False)
    return dress(out, p)
