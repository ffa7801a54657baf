"""Verify, drawn: predicted against measured, and measured KL over size."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from bitatlas.app.charts.floor import add_floor
from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.verify import VerifyView

__all__ = ["predicted_chart", "size_chart"]


def predicted_chart(view: VerifyView, p: Palette) -> go.Figure:
    """Measured over predicted KL on log axes, with the line where both agree and the noise floor."""
    rows = [r for r in view.rows if r.predicts_kl and r.predicted > 0 and r.kl_mean > 0]
    figure = go.Figure()
    if rows:
        values = [v for r in rows for v in (r.predicted, r.kl_mean)]
        low, high = min(values) / 1.5, max(values) * 1.5
        figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="prediction = measurement",
                           line={"color": p.muted, "dash": "dash", "width": 1}, hoverinfo="skip")  # fmt: skip
        figure.add_scatter(
            x=[r.predicted for r in rows], y=[r.kl_mean for r in rows], mode="markers", name="allocations",
            error_y={"type": "data", "array": [r.kl_stderr for r in rows], "thickness": 1, "width": 3},
            marker={"size": 11, "symbol": "diamond", "color": "#c2410c", "line": {"color": p.paper, "width": 1}},
            text=[f"{r.label}, {r.bits_per_weight:.2f} bits" for r in rows], customdata=[r.ratio for r in rows],
            hovertemplate="%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g} nats/token<br>predicted / measured %{customdata:.2f}<extra></extra>",
        )  # fmt: skip
    if view.floor > 0 and rows and view.floor > min(r.kl_mean for r in rows) / 50:
        add_floor(figure, view.floor, p, "dot")
    figure.update_layout(
        height=380, dragmode=False,
        xaxis={"title": "predicted KL (nats per token)", "type": "log"}, yaxis={"title": "measured KL (nats per token)", "type": "log"},
    )  # fmt: skip
    return dress(figure, p)


def size_chart(view: VerifyView, p: Palette) -> go.Figure:
    """Measured KL, mean and 99th percentile, over effective bits per weight."""
    figure = go.Figure()
    for name, value, symbol, colour in (
        ("mean", "kl_mean", "diamond", "#c2410c"),
        ("99th percentile", "kl_p99", "line-ew-open", p.muted),
    ):
        rows = [r for r in view.rows if getattr(r, value) > 0 and math.isfinite(getattr(r, value))]
        figure.add_scatter(
            x=[r.bits_per_weight for r in rows], y=[getattr(r, value) for r in rows], mode="markers", name=name,
            marker={"symbol": symbol, "size": 11, "color": colour}, text=[r.label for r in rows],
            hovertemplate="%{text}<br>%{x:.3f} bits per weight<br>%{y:.4g} nats/token<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=380, dragmode=False, xaxis={"title": "effective bits per weight"},
        yaxis={"title": "measured KL (nats per token)", "type": "log"},
    )  # fmt: skip
    return dress(figure, p)
