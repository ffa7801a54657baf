"""Fit, drawn: the memory bar and the front with "you are here"."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from bitatlas.app.sizes import format_bytes
from bitatlas.app.theme import Palette, bit_colour, dress, fixed_margin
from bitatlas.app.views.fit import FitView, FrontLine, MeasuredPoint

__all__ = ["front_chart", "memory_bar"]

_MIB = 1 << 20
_GIB = 1 << 30
_LEGEND_COLUMNS = 3  # beside the controls on a 1280-pixel screen


def _scale(nbytes: float) -> tuple[float, str]:
    return (_GIB, "GiB") if nbytes >= _GIB else (_MIB, "MiB")


def memory_bar(view: FitView, p: Palette) -> go.Figure:
    """One stacked bar that adds up to the memory asked for."""
    unit, word = _scale(view.total_bytes)
    colours = {"kept": p.muted, "kv": "#c77d3a", "reserve": p.grid, "free": p.below_floor}
    figure = go.Figure()
    for s in view.segments:
        share = s.nbytes / view.total_bytes
        figure.add_bar(
            x=[s.nbytes / unit], y=[""], orientation="h", name=f"{s.label} {format_bytes(s.nbytes)}",
            marker={"color": bit_colour(s.bits) if s.kind == "weights" else colours[s.kind], "line": {"width": 0}},
            # A label only where it fits; the legend and the hover have every number.
            text=format_bytes(s.nbytes) if share > 0.08 else "", textposition="inside", insidetextanchor="middle",
            hovertemplate=f"{s.label}<br>{s.nbytes:,} bytes ({share:.1%})<extra></extra>",
        )  # fmt: skip
    legend = 12 + 20 * -(-len(view.segments) // _LEGEND_COLUMNS)
    figure.update_layout(
        barmode="stack", height=120 + legend, bargap=0.1,
        xaxis={"title": f"memory ({word})", "range": [0, view.total_bytes / unit]}, yaxis={"visible": False},
        legend={"traceorder": "normal", "font": {"size": 12}, "y": 1.05}, dragmode=False,
        margin=fixed_margin(8, 8, legend, 44),
    )  # fmt: skip
    return dress(figure, p)


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
