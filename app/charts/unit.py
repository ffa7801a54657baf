"""One unit, drawn: damage against bits, weight histogram, eigenvalue spectrum."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.charts.floor import add_floor
from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.unit import Evidence, UnitView
from bitatlas.app.views.unit_inputs import InputsView

__all__ = ["damage_curve", "histogram", "input_histogram", "spectrum"]

_POINTS = 600  # of a spectrum; more than a chart has pixels for


def damage_curve(view: UnitView, p: Palette) -> go.Figure:
    """Damage over effective bits with its standard error, the unit's siblings as a band, the noise floor as a line."""
    figure = go.Figure()
    order = np.argsort(view.bits)
    bits = view.bits[order]
    known = np.isfinite(view.middle[order])
    if view.siblings > 1 and known.any():
        x = bits[known]
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(x=x, y=view.high[order][known], showlegend=False, **band)
        figure.add_scatter(x=x, y=view.low[order][known], fill="tonexty", fillcolor=p.below_floor,
                           name=f"80 % of {view.siblings:,} units of this role", **band)  # fmt: skip
        figure.add_scatter(x=x, y=view.middle[order][known], mode="lines", name="their median", line={"color": p.muted, "dash": "dot", "width": 1},
                           hoverinfo="skip")  # fmt: skip
    error = view.stderr[order]
    figure.add_scatter(
        x=bits, y=view.damage[order], mode="lines+markers", name="this unit", marker={"size": 9, "color": p.accent},
        line={"color": p.accent, "width": 2}, error_y={"type": "data", "array": np.nan_to_num(error), "thickness": 1.2, "width": 4},
        text=[view.formats[i] for i in order], customdata=np.stack([error], 1),
        hovertemplate="%{text}, %{x:.2f} bits<br><b>%{y:.3~g}</b> ± %{customdata[0]:.2~g} " + view.unit_name + "<extra></extra>",
    )  # fmt: skip
    if view.floor > 0:
        add_floor(figure, view.floor, p, "dash")
    figure.update_layout(
        height=380, dragmode=False, margin=fixed_margin(top=56), xaxis={"title": "effective bits per weight"},
        yaxis={"title": f"{view.metric} ({view.unit_name})", "type": "log"},
    )  # fmt: skip
    return dress(figure, p)


def histogram(evidence: Evidence, p: Palette) -> go.Figure:
    """Weights by value, the count on a log axis so that outliers can be seen."""
    middle = (evidence.edges[1:] + evidence.edges[:-1]) / 2
    figure = go.Figure(go.Bar(x=middle, y=evidence.counts, marker={"color": p.accent, "line": {"width": 0}},
                              hovertemplate="%{x:.3~g}<br>%{y:,} weights<extra></extra>"))  # fmt: skip
    figure.update_layout(height=300, bargap=0, dragmode=False, margin=fixed_margin(top=8), xaxis={"title": "weight"},
                         yaxis={"title": "weights", "type": "log"})  # fmt: skip
    return dress(figure, p)


def input_histogram(view: InputsView, p: Palette) -> go.Figure:
    """Inputs by magnitude, both axes logarithmic."""
    log = np.log10(view.edges)
    figure = go.Figure(go.Bar(
        x=(log[1:] + log[:-1]) / 2, y=view.counts, width=np.diff(log), marker={"color": p.accent, "line": {"width": 0}},
        customdata=np.stack([view.edges[:-1], view.edges[1:]], 1),
        hovertemplate="%{customdata[0]:.3~g} to %{customdata[1]:.3~g}<br>%{y:,} inputs<extra></extra>",
    ))  # fmt: skip
    # Bars of even width need a linear axis of exponents.
    ticks = np.arange(np.floor(log[0]), np.ceil(log[-1]) + 1) if len(log) else np.zeros(0)
    names = [f"{10.0**t:g}" for t in ticks]
    figure.update_layout(height=300, bargap=0, dragmode=False, margin=fixed_margin(top=8),
                         xaxis={"title": "|input|", "tickvals": ticks, "ticktext": names}, yaxis={"title": "inputs", "type": "log"})  # fmt: skip
    return dress(figure, p)


def spectrum(evidence: Evidence, p: Palette) -> go.Figure:
    """Share of eigenvalues above a value, both axes logarithmic, with the fitted power law on its tail."""
    lam = np.asarray(evidence.eigenvalues, np.float64)
    lam = np.sort(lam[lam > 0])[::-1]
    share = np.arange(1, len(lam) + 1) / max(len(lam), 1)
    at = np.unique(np.geomspace(1, max(len(lam), 1), _POINTS).astype(int)) - 1 if len(lam) else np.zeros(0, int)  # fmt: skip
    figure = go.Figure(go.Scatter(x=lam[at], y=share[at], mode="markers", name="eigenvalues", marker={"size": 5, "color": p.accent},
                                  hovertemplate="%{y:.3~%} above %{x:.3~g}<extra></extra>"))  # fmt: skip
    if np.isfinite(evidence.alpha) and len(lam):
        x = np.array([evidence.xmin, lam[0]])
        y = evidence.tail / len(lam) * (x / evidence.xmin) ** (1 - evidence.alpha)
        figure.add_scatter(x=x, y=y, mode="lines", name=f"power law, alpha {evidence.alpha:.2f} ± {evidence.sigma:.2f}",
                           line={"color": "#c2410c", "dash": "dash", "width": 2}, hoverinfo="skip")  # fmt: skip
    figure.update_layout(
        height=300, dragmode=False, margin=fixed_margin(),
        xaxis={"title": "eigenvalue", "type": "log"}, yaxis={"title": "share above", "type": "log"},
    )  # fmt: skip
    return dress(figure, p)
