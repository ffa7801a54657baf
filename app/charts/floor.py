"""A noise floor on a logarithmic axis."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from bitatlas.app.theme import Palette

__all__ = ["add_floor"]


def add_floor(figure: go.Figure, floor: float, p: Palette, dash: str) -> None:
    """A line at ``floor`` and its name above: on a logarithmic axis a line stands at a value, a label at an exponent."""
    figure.add_hline(y=floor, line={"color": p.muted, "width": 1, "dash": dash})
    figure.add_annotation(
        xref="paper", x=1, y=math.log10(floor), text="noise floor", showarrow=False, xanchor="right", yanchor="bottom", font={"color": p.muted}
    )  # fmt: skip
