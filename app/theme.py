"""Colours and the Plotly template; the only place where a chart's colour is written down.

Bits are ordered, so they get a sequential, colour-blind-safe scale, and the same width has the same colour on every
page. Damage is sequential too, but warm, so that the two are never confused. Grey means unknown, never "zero".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from PIL import Image

__all__ = ["BIT_COLOURS", "DARK", "LIGHT", "Palette", "bit_colour", "favicon", "logo", "palette", "template"]

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


def template(p: Palette) -> go.layout.Template:
    """Plotly template: quiet grid, the page's own font and ink, transparent background."""
    family = '"Source Sans", "Source Sans 3", sans-serif'
    axis = {
        "gridcolor": p.grid, "zeroline": False, "linecolor": p.grid, "ticks": "", "automargin": True,
        "title": {"font": {"size": 13, "color": p.muted}, "standoff": 8}, "tickfont": {"color": p.muted, "size": 12},
    }  # fmt: skip
    return go.layout.Template(
        layout={
            "font": {"family": family, "size": 13, "color": p.ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "colorway": [BIT_COLOURS[b] for b in (4, 8, 3, 16, 5, 2, 6)],
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "hoverlabel": {
                "bgcolor": p.paper,
                "bordercolor": p.grid,
                "font": {"family": family, "color": p.ink, "size": 13},
            },
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": p.ink}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": p.muted, "activecolor": p.accent},
        }
    )
