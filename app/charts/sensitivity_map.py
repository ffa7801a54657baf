"""The map's figure: heat maps for the eye, an invisible layer of square markers for the mouse.

Plotly reports clicks and boxes for scatter traces only, so each panel is a heat map plus a scattergl layer with one
marker a cell; `customdata[0]` of a marker is the cell id. The figure depends on the selection only through
``selected``, which the page changes when a selection comes from elsewhere (link, search, undo), never after a box.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.theme import Palette, template
from bitatlas.app.views.map_cells import BELOW_FLOOR, UNKNOWN, MapPanel
from bitatlas.app.views.sensitivity_map import MapView

__all__ = ["HEIGHT", "figure"]

HEIGHT = 560
_NAMES_UP_TO = 1500


def figure(view: MapView, palette: Palette, keys: tuple[str, ...], selected: np.ndarray | None = None) -> go.Figure:  # fmt: skip
    """Draw ``view``; ``keys`` are the unit names for the hover, ``selected`` cell ids to show as selected."""
    fig = go.Figure(layout={"template": template(palette), "height": HEIGHT, "uirevision": "map"})
    wide = len(view.panels) > 1
    gap = 0.045
    share = _role_share(view) if wide else 1.0
    for i, panel in enumerate(view.panels):
        axis = "" if i == 0 else str(i + 1)
        domain = [0.0, 1.0] if not wide else ([0.0, share] if i == 0 else [share + gap, 1.0])
        _add_panel(fig, view, panel, axis, palette, keys, selected)
        fig.update_layout(
            {f"xaxis{axis}": _axis(panel.x, panel.x_title, domain, 1100 * (domain[1] - domain[0]))}
        )
        y = _axis(panel.y, panel.y_title if i == 0 else "", None, 0)
        y |= {"autorange": "reversed", "anchor": f"x{axis}"}
        fig.update_layout({f"yaxis{axis}": y})
    fig.update_layout(
        coloraxis={
            "colorscale": palette.damage,
            "colorbar": _colorbar(view),
        },
        hovermode="closest",
        hoverdistance=60,
        showlegend=True,
        margin={"l": 8, "r": 8, "t": 30, "b": 8},
        newselection={"line": {"color": palette.accent, "width": 1.5, "dash": "solid"}},
    )
    return fig


def _role_share(view: MapView) -> float:
    """Width of the role panel: a third at most, never thinner than its labels need."""
    return min(0.3, max(0.12, 0.03 * len(view.panels[0].x)))


def _axis(
    labels: tuple[str, ...], title: str, domain: list[float] | None, pixels: float
) -> dict[str, object]:
    n = len(labels)
    step = 1 if n <= 40 else 2 if n <= 64 else 8 if n <= 160 else 16
    if pixels and n > pixels / 18:
        step = max(step, next(s for s in (2, 4, 5, 8, 10, 16, 20, 32, 64, 10**9) if n / s <= pixels / 24))
    if any(not t.isdigit() for t in labels) and n <= 40:
        step = 1
    at = list(range(0, n, step))
    axis: dict[str, object] = {
        "title": {"text": title}, "tickmode": "array", "tickvals": at, "ticktext": [labels[i] for i in at],
        "showgrid": False, "range": [-0.5, n - 0.5], "tickangle": 0 if n <= 60 else None,
    }  # fmt: skip
    if domain:
        axis["domain"] = domain
    return axis


def _colorbar(view: MapView) -> dict[str, object]:
    bar: dict[str, object] = {
        "title": {"text": view.unit, "side": "right"}, "thickness": 12, "outlinewidth": 0, "x": 1.01,
    }  # fmt: skip
    if view.log:
        z = np.concatenate([p.z[np.isfinite(p.z)] for p in view.panels]) if view.panels else np.zeros(0)
        if len(z):
            low, high = float(z.min()), float(z.max())
            exponents = range(int(np.floor(low)), int(np.ceil(high)) + 1)
            marks = [
                (e + d, 10.0**e * m)
                for e in exponents
                for d, m in ((0.0, 1), (np.log10(2), 2), (np.log10(5), 5))
            ]
            if high - low > 2:
                marks = [(float(e), 10.0**e) for e in exponents]
            marks = [(t, v) for t, v in marks if low <= t <= high]
            bar |= {
                "tickmode": "array",
                "tickvals": [t for t, _ in marks],
                "ticktext": [f"{v:g}" for _, v in marks],
            }
    return bar


def _add_panel(
    fig: go.Figure, view: MapView, p: MapPanel, axis: str, palette: Palette, keys: tuple[str, ...], selected: np.ndarray | None,
) -> None:  # fmt: skip
    on = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    gap = 1 if max(len(p.x), len(p.y)) <= 64 else 0
    ground = np.where(p.state == UNKNOWN, 1.0, np.where(p.state == BELOW_FLOOR, 0.0, np.nan)).astype(
        np.float32
    )
    flat = [[0, palette.below_floor], [1, palette.unknown]]
    fig.add_heatmap(z=ground, colorscale=flat, zmin=0, zmax=1, showscale=False, hoverinfo="skip", xgap=gap, ygap=gap, **on)  # fmt: skip
    fig.add_heatmap(z=p.z, coloraxis="coloraxis", hoverinfo="skip", xgap=gap, ygap=gap, **on)
    state = p.state[p.cell_y, p.cell_x]
    known = state != UNKNOWN
    for mask, name in ((known, "known"), (~known, "unknown")):
        if mask.any():
            fig.add_trace(_ghost(view, p, mask, name == "unknown", palette, keys, selected).update(on))
    if axis:
        return
    legend = []
    if any((q.state == UNKNOWN).any() for q in view.panels):
        legend.append(("unknown: never reached", palette.unknown))
    if any((q.state == BELOW_FLOOR).any() for q in view.panels):
        legend.append(("at or below the noise floor", palette.below_floor))
    for name, colour in legend:
        marker = {
            "symbol": "square",
            "size": 12,
            "color": colour,
            "line": {"width": 1, "color": palette.grid},
        }
        fig.add_scatter(
            x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True
        )


def _ghost(
    view: MapView, p: MapPanel, mask: np.ndarray, hatch: bool, palette: Palette, keys: tuple[str, ...], selected: np.ndarray | None,
) -> go.Scattergl:  # fmt: skip
    cells = p.cell[mask]
    data = np.stack([cells, p.value[mask], p.stderr[mask], p.rank[mask], p.expert[mask]], axis=1)
    unit = "" if not view.unit else f" {view.unit}"
    named = len(p.cell) <= _NAMES_UP_TO and p.size.max() == 1
    where = (
        "%{text}"
        if named
        else "layer %{y}" + (" · expert %{customdata[4]}" if p.kind == "experts" else " · %{x}")
    )
    numbers = (
        "unknown: no token reached it"
        if hatch
        else "<b>%{customdata[1]:.3~g}</b>" + unit + "  ± %{customdata[2]:.2~g}"
        + (f"<br>noise floor {view.floor:.2g}" if view.log else "")
        + f"<br>rank %{{customdata[3]}} of {view.cells:,}"
    )  # fmt: skip
    size = 9 if len(p.y) <= 40 and len(p.x) <= 40 else 5
    marker: dict[str, object] = {"symbol": "square", "size": size, "color": palette.accent, "opacity": 0}
    unselected: dict[str, object] = {"opacity": 0}
    if hatch:
        marker = {"symbol": "line-ne-open", "size": size, "color": palette.muted, "opacity": 0.8}
        unselected = {"opacity": 0.8}
    chosen = None if selected is None else np.flatnonzero(np.isin(cells, selected))
    return go.Scattergl(
        x=p.cell_x[mask].astype(np.int32), y=p.cell_y[mask].astype(np.int32), mode="markers", marker=marker,
        customdata=data, text=[keys[u] for u in p.unit[mask]] if named else None,
        hovertemplate=where + "<br>" + numbers + "<extra></extra>", showlegend=False, selectedpoints=chosen,
        selected={"marker": {"opacity": 1, "color": palette.accent, "size": size}}, unselected={"marker": unselected},
    )  # fmt: skip
