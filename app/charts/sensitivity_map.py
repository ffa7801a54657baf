"""The map's figure: heat maps.

Boxes and lassos come back as coordinates (`views.regions`). Plotly reports clicks for scatter traces only: while clicks pick, each
panel has an invisible scattergl layer with one marker a cell; `customdata[0]` of a marker is the cell id. The figure depends on
the selection only through ``selected``, which the page changes when the figure changes anyway, never after a box.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from bitatlas.app.charts.cells import add_chosen, add_ground, gap_of
from bitatlas.app.theme import Palette, dress, fixed_margin
from bitatlas.app.views.map_cells import BELOW_FLOOR, UNKNOWN, MapPanel
from bitatlas.app.views.sensitivity_map import MapView

__all__ = ["HEIGHT", "PICKS", "figure"]

HEIGHT = 540
_WIDTH = 1050  # of the plot on a 1440-pixel screen; only the density of labels depends on it
_NAMES_UP_TO = 1500
_DRAG = {"box": "select", "lasso": "lasso", "click": "pan"}
PICKS = tuple(_DRAG)


def figure(view: MapView, palette: Palette, keys: tuple[str, ...], selected: np.ndarray | None = None, pick: str = "box") -> go.Figure:  # fmt: skip
    """Draw ``view``.

    Args:
        view: the map; palette: of the theme; keys: unit names for the hover.
        selected: ids of the cells to show as selected.
        pick: ``box``, ``lasso`` or ``click``. Streamlit answers clicks only while dragging pans.
    """
    fig = go.Figure(layout={"height": HEIGHT, "uirevision": "map"})
    two = len(view.panels) > 1
    share = min(0.3, 0.05 + 0.026 * len(view.panels[0].x)) if two else 1.0
    domains = ([0.0, share], [share + 0.02, 1.0]) if two else ([0.0, 1.0],)
    for i, (panel, domain) in enumerate(zip(view.panels, domains)):
        axis = str(i + 1) if i else ""
        _add_panel(fig, view, panel, axis, palette, keys, selected, pick)
        x = _axis(panel.x, panel.x_title, _WIDTH * (domain[1] - domain[0]) / 26)
        x |= {"domain": domain, "tickangle": -90 if two and panel.kind == "roles" else 0}
        y = _axis(panel.y, "" if i else panel.y_title, HEIGHT / 20)
        y |= {"range": [len(panel.y) - 0.5, -0.5], "anchor": f"x{axis}"}
        if i:
            y |= {"matches": "y", "showticklabels": False}
        fig.update_layout({f"xaxis{axis}": x, f"yaxis{axis}": y})
    _legend(fig, view, palette)
    fig.update_layout(
        coloraxis={"colorscale": palette.damage, "colorbar": _colorbar(view, palette)},
        hovermode="closest",
        dragmode=_DRAG[pick],
        clickmode="event+select" if pick == "click" else "event",
        margin=fixed_margin(62, 92, 28, 62),
        newselection={"line": {"color": palette.accent, "width": 1.5, "dash": "solid"}},
    )
    return dress(fig, palette)


def _axis(labels: tuple[str, ...], title: str, room: float) -> dict[str, object]:
    """An axis of squares with at most ``room`` labels, at round layer and expert numbers."""
    n = len(labels)
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, n) if n / s <= max(room, 1))
    at = [i for i, t in enumerate(labels) if not t.isdigit() or int(t) % step == 0]
    if step > 1 and labels[:2] == ("outside", "0"):
        at.remove(1)
    return {
        "title": {"text": title}, "tickmode": "array", "tickvals": at, "ticktext": [labels[i] for i in at],
        "showgrid": False, "range": [-0.5, n - 0.5], "automargin": False,
    }  # fmt: skip


def _colorbar(view: MapView, palette: Palette) -> dict[str, object]:
    bar: dict[str, object] = {
        "title": {"text": view.unit, "side": "right", "font": {"size": 13, "color": palette.muted}}, "thickness": 12,
        "outlinewidth": 0, "x": 1.01, "tickfont": {"color": palette.muted}, "len": 1, "y": 0.5,
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
    fig: go.Figure, view: MapView, p: MapPanel, axis: str, palette: Palette, keys: tuple[str, ...], selected: np.ndarray | None, pick: str,
) -> None:  # fmt: skip
    on = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    gap = gap_of(p.z.shape)
    data = np.full((*p.z.shape, 5), np.nan, np.float32)
    data[p.cell_y, p.cell_x] = np.stack([p.layer, p.expert, p.value, p.stderr, p.rank], axis=1)
    named = len(p.cell) <= _NAMES_UP_TO and p.size.max() == 1
    names = None
    if named:
        names = np.full(p.z.shape, "", object)
        names[p.cell_y, p.cell_x] = [keys[u] for u in p.unit]
    add_ground(fig, p.state == UNKNOWN, np.zeros(p.z.shape, bool), palette, _where(p, named) + "<br>unknown: no token reached it",
               customdata=np.nan_to_num(data[:, :, :2], nan=-1).astype(np.int16), text=names, **on)  # fmt: skip
    # Noise is part of the known cells: it has a value to show.
    noise = np.where(p.state == BELOW_FLOOR, 0.0, np.nan).astype(np.float32)
    words = {"hovertemplate": _where(p, named) + "<br>" + _numbers(view) + "<extra></extra>", "customdata": data, "text": names,
             "hoverongaps": False, "xgap": gap, "ygap": gap} | on  # fmt: skip
    if (p.state == BELOW_FLOOR).any():
        fig.add_heatmap(z=noise, colorscale=[[0, palette.below_floor], [1, palette.below_floor]], showscale=False, **words)  # fmt: skip
    fig.add_heatmap(z=p.z, coloraxis="coloraxis", **words)
    if selected is not None:
        chosen = np.zeros(p.z.shape, bool)
        at = np.isin(p.cell, selected)
        chosen[p.cell_y[at], p.cell_x[at]] = True
        add_chosen(fig, chosen, palette, **on)
    if pick == "click":
        fig.add_scattergl(
            x=p.cell_x.astype(np.int32), y=p.cell_y.astype(np.int32), mode="markers", customdata=p.cell.astype(np.float32)[:, None],
            marker={"symbol": "square", "size": 9 if max(p.z.shape) <= 40 else 5, "color": palette.accent, "opacity": 0}, hoverinfo="none",
            showlegend=False, selected={"marker": {"opacity": 1, "color": palette.accent}}, unselected={"marker": {"opacity": 0}}, **on,
        )  # fmt: skip


def _where(p: MapPanel, named: bool) -> str:
    if named:
        return "%{text}"
    return "layer %{customdata[0]}" + (" · expert %{customdata[1]}" if p.kind == "experts" else " · %{x}")


def _numbers(view: MapView) -> str:
    unit = "" if not view.unit else f" {view.unit}"
    floor = f"<br>noise floor {view.floor:.2g}" if view.log else ""
    return f"<b>%{{customdata[2]:.3~g}}</b>{unit}  ± %{{customdata[3]:.2~g}}{floor}<br>rank %{{customdata[4]}} of {view.cells:,}"


def _legend(fig: go.Figure, view: MapView, palette: Palette) -> None:
    for state, name, colour in (
        (UNKNOWN, "unknown: never reached", palette.unknown),
        (BELOW_FLOOR, "at or below the noise floor", palette.below_floor),
    ):
        if any((p.state == state).any() for p in view.panels):
            marker = {
                "symbol": "square",
                "size": 12,
                "color": colour,
                "line": {"width": 1, "color": palette.grid},
            }
            fig.add_scatter(
                x=[None],
                y=[None],
                mode="markers",
                marker=marker,
                name=name,
                hoverinfo="skip",
                showlegend=True,
            )
