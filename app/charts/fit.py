"""Fit, drawn: the front with "you are here"."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.fit import FitView, FrontLine, MeasuredPoint

__all__ = ["front_chart"]

_MIB = 1 << 20
_GIB = 1 << 30


def _scale(nbytes: float) -> tuple[float, str]:
    return (_GIB, "GiB") if nbytes >= _GIB else (_MIB, "MiB")


def front_chart(
    view: FitView | None,
    line: FrontLine,
    measured: Sequence[MeasuredPoint],
    limit_bytes: int,
    p: Palette,
    metric: str,
    unit: str,
) -> go.Figure:
    """Predicted damage over size; the answer marked, the budget as a line, measured KL as its own mark."""
    scale, word = _scale(float(line.weights_bytes[-1]))
    figure = go.Figure()
    figure.add_scatter(
        x=line.weights_bytes / scale, y=line.damage, mode="lines", name="predicted, best at each size",
        line={"color": p.accent, "width": 2}, hovertemplate=f"%{{x:.3f}} {word}<br>predicted %{{y:.4g}} {unit}<extra></extra>",
    )  # fmt: skip
    if measured:
        figure.add_scatter(
            x=[m.weights_bytes / scale for m in measured], y=[m.kl for m in measured], mode="markers", name="measured KL",
            marker={"symbol": "diamond", "size": 10, "color": "#c2410c", "line": {"color": p.paper, "width": 1}},
            error_y={"type": "data", "array": [m.stderr for m in measured], "thickness": 1, "width": 3},
            text=[m.label for m in measured], hovertemplate=f"%{{text}}<br>%{{x:.3f}} {word}<br>measured %{{y:.4g}} nats/token<extra></extra>",
        )  # fmt: skip
    if view is not None:
        figure.add_scatter(
            x=[view.here[0] / scale], y=[view.here[1]], mode="markers+text", name="you are here", text=["you are here"],
            textposition="top right", marker={"size": 14, "color": p.accent, "line": {"color": p.paper, "width": 2}},
            hovertemplate=f"{view.bits_per_weight:.3f} bits per weight<br>%{{x:.3f}} {word}<br>predicted %{{y:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=limit_bytes / scale, line={"color": p.muted, "width": 1, "dash": "dot"})
    positive = line.damage[line.damage > 0]
    figure.update_layout(
        height=360, dragmode=False, uirevision="front", margin=fixed_margin(),
        xaxis={"title": f"weights ({word}), kept tensors included"},
        yaxis={"title": f"predicted damage, {metric} ({unit})", "type": "log" if positive.size > 1 else "linear"},
    )  # fmt: skip
    return dress(figure, p)
