"""Colours and the look of charts; the only place where a chart's colour is written down.

Bits are ordered, so they get a sequential, colour-blind-safe scale, and the same width has the same colour on every
page. Damage is sequential too, but warm, so that the two are never confused. Grey means unknown, never "zero".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
from PIL import Image

__all__ = [
    "BIT_COLOURS",
    "DARK",
    "LIGHT",
    "Palette",
    "bit_colour",
    "favicon",
    "fixed_margin",
    "logo",
    "palette",
]

plotly.io.templates.default = None  # `dress` has the whole look

# Monotone in luminance (few bits = bright), readable on white and on near-black.
BIT_COLOURS: dict[int, str] = {
    2: "#f4cf3b",
    3: "#b5cf4b",
    4: "#5dbb78",
    5: "#2f9c8c",
    6: "#2f7c92",
    8: "#41609c",
    16: "#6a4a94",
}


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one theme, as CSS strings; scales are Plotly colour scales."""

    dark: bool
    paper: str
    ink: str
    muted: str
    grid: str
    accent: str
    unknown: str
    below_floor: str
    damage: tuple[tuple[float, str], ...]
    diverging: tuple[tuple[float, str], ...]


def _scale(*colours: str) -> tuple[tuple[float, str], ...]:
    return tuple((i / (len(colours) - 1), c) for i, c in enumerate(colours))


LIGHT = Palette(
    dark=False, paper="#ffffff", ink="#1d2530", muted="#5d6875", grid="#e4e8ed", accent="#1f5fbf",
    unknown="#b4bbc4", below_floor="#eef1f4",
    damage=_scale("#fdf0d5", "#fbd28f", "#f6a55b", "#e3703f", "#bf3f3f", "#86204d", "#4a1048"),
    diverging=_scale("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"),
)  # fmt: skip
DARK = Palette(
    dark=True, paper="#12161c", ink="#e4e8ee", muted="#98a3b0", grid="#2a323d", accent="#4a86e8",
    unknown="#4d5763", below_floor="#1e252e",
    damage=_scale("#38203f", "#6b2350", "#a2344f", "#d1553f", "#ee8544", "#f8b96a", "#fdeebf"),
    diverging=_scale("#67a9ff", "#3d73b3", "#274466", "#20262e", "#6b3a2c", "#b3603d", "#ff9b66"),
)  # fmt: skip


def palette(dark: bool) -> Palette:
    """The palette of the dark or the light theme."""
    return DARK if dark else LIGHT


def bit_colour(bits: int) -> str:
    """The colour of a code width; a width without its own colour takes that of the next wider one."""
    return BIT_COLOURS[min((b for b in BIT_COLOURS if b >= bits), default=16)]


_AXIS = re.compile(r"[xy]axis\d*")
_TILES = ((2, 3, 5, 8), (3, 2, 4, 6), (4, 5, 3, 16), (8, 6, 16, 4))


def favicon() -> Image.Image:
    """A little map, 32 x 32. Drawn here because an icon font would be fetched from outside."""
    tiles = np.array(
        [[[int(BIT_COLOURS[b][i : i + 2], 16) for i in (1, 3, 5)] for b in row] for row in _TILES]
    )
    return Image.fromarray(np.kron(tiles, np.ones((8, 8, 1))).astype(np.uint8))


def logo() -> str:
    """The same map with the name beside it, as SVG; the grey reads on both themes."""
    squares = "".join(
        f'<rect x="{6 * x}" y="{6 * y}" width="5" height="5" rx="1" fill="{BIT_COLOURS[b]}"/>'
        for y, row in enumerate(_TILES)
        for x, b in enumerate(row)
    )
    name = '<text x="33" y="18" font-family="sans-serif" font-size="17" font-weight="600" fill="#6f8096">bitatlas</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="110" height="24" viewBox="0 0 110 24">{squares}{name}</svg>'


def fixed_margin(left: int = 76, right: int = 12, top: int = 34, bottom: int = 50) -> dict[str, object]:
    """Margins in pixels that stay as they are: to fit them to labels and legend, Plotly draws a chart twice.

    For charts that are redrawn while a slider moves; the others fit theirs.
    """
    return {"l": left, "r": right, "t": top, "b": bottom, "autoexpand": False}


def _axis(p: Palette, log: bool) -> dict[str, Any]:
    return {
        "exponentformat": "power" if log else "B",  # 10^-4 nats, not 100 µ; but 20k weights
        "gridcolor": p.grid, "zeroline": False, "linecolor": p.grid, "ticks": "", "automargin": True, "ticklabeloverflow": "allow",
        "title": {"font": {"size": 13, "color": p.muted}, "standoff": 8}, "tickfont": {"color": p.muted, "size": 12},
    }  # fmt: skip


def _layout(p: Palette) -> dict[str, Any]:
    family = '"Source Sans", "Source Sans 3", sans-serif'
    return {
        "font": {"family": family, "size": 13, "color": p.ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [BIT_COLOURS[b] for b in (4, 8, 3, 16, 5, 2, 6)],
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hoverlabel": {"bgcolor": p.paper, "bordercolor": p.grid, "font": {"family": family, "color": p.ink, "size": 13}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": p.ink}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": p.muted, "activecolor": p.accent},
        "datarevision": 1,
    }  # fmt: skip


def dress(figure: go.Figure, p: Palette) -> go.Figure:
    """Lay the theme under the figure's own layout: quiet grid, the page's font and ink, transparent background.

    Streamlit draws each new chart twice, the second time from a copy of its figure. Plotly leaves that second drawing out where it
    finds nothing new, so there is no template (any copy of one counts as new), a fixed ``datarevision`` and no typed array in one
    dimension. A figure that did change is a new chart.
    """
    own = figure.layout.to_plotly_json()
    own.pop("template", None)
    names = {"xaxis", "yaxis", *filter(_AXIS.fullmatch, own)}
    axes = {name: _axis(p, own.get(name, {}).get("type") == "log") for name in names}
    figure.layout = _merged(_layout(p) | axes, own)
    figure.layout.template = None  # assigning a layout brings the default one back
    for trace in figure.data:
        for path, value in _lines(trace.to_plotly_json()):
            trace[path] = None  # an equal value would not be taken
            trace[path] = value.tolist()
    return figure


def _lines(properties: dict[str, Any], above: str = "") -> list[tuple[str, np.ndarray]]:
    """The arrays of one dimension in a trace, with their dotted paths."""
    out = []
    for name, value in properties.items():
        if isinstance(value, dict):
            out += _lines(value, f"{above}{name}.")
        elif isinstance(value, np.ndarray) and value.ndim == 1:
            out.append((above + name, value))
    return out


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in own.items():
        below = out.get(name)
        out[name] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return out
