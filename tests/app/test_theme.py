"""The look of charts: laid under a figure's own layout, and nothing in a figure that makes Plotly draw it twice."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from bitatlas.app.theme import DARK, LIGHT, dress, fixed_margin


def figure() -> go.Figure:
    out = go.Figure(
        layout={"xaxis": {"title": "bits"}, "yaxis2": {"type": "log"}, "margin": fixed_margin(10)}
    )
    out.add_scatter(
        x=np.array([2.0, 3.0]), y=np.array([1.0, np.nan]), error_y={"array": np.ones(2)}, customdata=np.ones((2, 3))
    )  # fmt: skip
    return out


@pytest.mark.parametrize("look", [LIGHT, DARK])
def test_own_layout_stands_above_the_theme(look: Any) -> None:
    layout = dress(figure(), look).layout
    assert layout.xaxis.title.text == "bits"
    assert layout.xaxis.title.font.color == look.muted
    assert layout.yaxis2.type == "log"
    assert (layout.xaxis.exponentformat, layout.yaxis2.exponentformat) == ("B", "power")
    assert layout.yaxis2.gridcolor == layout.yaxis.gridcolor == look.grid
    assert layout.margin.l == 10
    assert layout.margin.autoexpand is False
    assert layout.font.color == look.ink


def test_a_copy_of_the_figure_is_nothing_new_to_plotly() -> None:
    sent = json.loads(dress(figure(), LIGHT).to_json())
    assert "template" not in sent["layout"]
    assert sent["layout"]["datarevision"] == 1
    trace = sent["data"][0]
    assert trace["x"] == [2.0, 3.0]
    assert trace["y"] == [1.0, None]
    assert trace["error_y"]["array"] == [1.0, 1.0]
    assert trace["customdata"]["shape"] == "2, 3"  # an array of arrays may stay as it is
