"""The map's figure: one invisible marker a cell, ids as numbers, small on the wire."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.app import theme
from bitatlas.app.charts import progress, sensitivity_map
from bitatlas.app.selection import Selection
from bitatlas.app.views.job import by_layer
from bitatlas.app.views.sensitivity_map import MapControls, build


@pytest.mark.parametrize("dark", [False, True])
def test_every_cell_has_its_value_and_its_hover(moe, dark):
    view = build(moe, MapControls("fisher_projection", "int3-g64"))
    fig = sensitivity_map.figure(view, theme.palette(dark), moe.keys)
    assert {t.type for t in fig.data} == {"heatmap", "scatter"}  # no WebGL, whose contexts are slow to make
    drawn = [t for t in fig.data if t.type == "heatmap" and t.coloraxis]
    assert sum(int(np.isfinite(np.asarray(t.customdata)[..., 0]).sum()) for t in drawn) == view.cells
    for panel, trace in zip(view.panels, drawn):
        told = np.asarray(trace.customdata)[panel.cell_y, panel.cell_x]
        np.testing.assert_allclose(
            told, np.stack([panel.layer, panel.expert, panel.value, panel.stderr, panel.rank], 1), rtol=1e-6
        )
    assert len(fig.to_json()) < 700_000  # 18 432 experts, all three projections


def test_while_clicks_pick_every_cell_has_a_marker(moe):
    view = build(moe, MapControls("fisher_projection", "int3-g64"))
    fig = sensitivity_map.figure(view, theme.LIGHT, moe.keys, pick="click")
    ids = np.concatenate([np.asarray(t.customdata)[:, 0] for t in fig.data if t.type == "scattergl"])
    assert sorted(ids.astype(int).tolist()) == list(range(view.cells))


def test_selected_cells_are_marked(dense):
    view = build(dense, MapControls("fisher_projection", "int3-g64"))
    chosen = view.cells_of(Selection.of([0, 7, 8]))
    fig = sensitivity_map.figure(view, theme.LIGHT, dense.keys, chosen)
    (panel,) = view.panels
    mark = np.asarray(fig.data[-1].z if fig.data[-1].type == "heatmap" else fig.data[-2].z)
    marked = panel.cell[np.isfinite(mark[panel.cell_y, panel.cell_x])]
    assert np.isfinite(mark).sum() == 3
    assert view.units_of(marked).ids == (0, 7, 8)


def test_unknown_cells_are_hatched_and_in_the_legend(moe):
    view = build(moe, MapControls("fisher_projection", "int3-g64", projection="up"))
    fig = sensitivity_map.figure(view, theme.LIGHT, moe.keys)
    assert [t.name for t in fig.data if t.type == "scatter"] == ["unknown: never reached"]
    unknown = int(np.isnan(view.value[view.unit_cell >= 0]).sum())
    assert sum(shape.path.count("M") for shape in fig.layout.shapes) == 3 * unknown


def test_boxes_and_lassos_pick_the_cells_inside(moe):
    view = build(moe, MapControls("fisher_projection", "int3-g64"))
    roles, experts = view.panels
    box = {"xref": "x2", "yref": "y", "x": [9.6, 3.5], "y": [10.2, 12.7]}
    found = view.cells_in({"selection": {"box": [box], "lasso": []}})
    want = experts.cell[
        (experts.cell_x >= 4) & (experts.cell_x <= 9) & (experts.cell_y >= 11) & (experts.cell_y <= 12)
    ]
    assert sorted(found) == sorted(want.tolist())
    at = lambda cells: sorted(zip(roles.cell_x[cells].tolist(), roles.cell_y[cells].tolist()))  # noqa: E731
    triangle = {"xref": "x", "x": [-0.4, 2.4, -0.4], "y": [0.6, 0.6, 3.4]}
    assert at(view.cells_in({"selection": {"lasso": [triangle]}})) == [(0, 1), (0, 2), (1, 1)]
    assert view.cells_in(None) == []
    assert view.cells_in({"selection": {"box": [], "lasso": [], "points": []}}) == []


def test_bits_have_one_colour_each_in_order_of_brightness():
    def luminance(colour: str) -> float:
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    shades = [luminance(theme.bit_colour(b)) for b in (2, 3, 4, 5, 6, 8, 16)]
    assert shades == sorted(shades, reverse=True)
    assert theme.bit_colour(7) == theme.bit_colour(8)


def test_progress_draws_one_row_a_metric():
    fig = progress.figure(by_layer(5, {"a": ["layer 1"], "b": []}, 0.5), theme.DARK)
    assert np.asarray(fig.data[0].z).tolist() == [[0, 1, 0, 0, 0], [0.5] * 5]
