"""The front under rules for experts, drawn over bytes of weights or over bytes that a token reads."""

from __future__ import annotations

import plotly.graph_objects as go

from bitatlas.app.sizes import axis_scale
from bitatlas.app.theme import Palette, dress
from bitatlas.app.views.expert_budget import BudgetFronts, ExpertBudgetView

__all__ = ["AXES", "front"]

AXES = ("weight bytes", "bytes read per token")


def front(
    fronts: BudgetFronts, view: ExpertBudgetView, axis: str, metric: str, unit: str, p: Palette
) -> go.Figure:
    """Best damage at every size, best damage at every reading, and where the answer stands; ``axis`` is one of `AXES`."""
    x = AXES.index(axis)
    top = max(float(fronts.by_size[:, x].max()), 1.0)
    scale, word = axis_scale(top)
    figure = go.Figure()
    for name, line, look in (
        ("best for its size", fronts.by_size, {"color": p.accent, "width": 2}),
        ("best for what a token reads", fronts.by_reading, {"color": "#c77d3a", "width": 2, "dash": "dash"}),
    ):
        figure.add_scatter(
            x=line[:, x] / scale, y=line[:, 2], mode="lines", name=name, line=look, customdata=line[:, 1 - x] / scale,
            hovertemplate=f"%{{x:.3f}} {word} {AXES[x]}<br>%{{customdata:.3f}} {word} {AXES[1 - x]}<br>%{{y:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[view.here[x] / scale], y=[view.here[2]], mode="markers", name="this budget",
        marker={"size": 13, "color": p.accent, "line": {"color": p.paper, "width": 2}},
        hovertemplate=f"%{{x:.3f}} {word}<br>%{{y:.4g}} {unit}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        height=330, dragmode=False, xaxis={"title": f"{axis} ({word})"},
        yaxis={"title": f"predicted damage, {metric} ({unit})", "type": "log" if (fronts.by_size[:, 2] > 0).all() else "linear"},
    )  # fmt: skip
    return dress(figure, p)
