"""The label of a noise floor, on a logarithmic axis."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from bitatlas.app.theme import Palette

__all__ = ["add_floor_label"]


def add_floor_label(figure: go.Figure, floor: float, p: Palette) -> None:
    """Write "noise floor" above the line at ``floor``: on a logarithmic axis a line stands at a value, a label at an exponent."""
    figure.add_annotation(
        xref="paper", x=1, y=math.log10(floor), text="noise floor", showarrow=False, xanchor="right", yanchor="bottom", font={"color": p.muted}
    )  # fmt: skip
