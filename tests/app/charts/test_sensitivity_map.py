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
def test_every_cell_can_be_picked(moe, dark):
    view = build(moe, MapControls("fisher_projection", "int3-g64"))
    fig = sensitivity_map.figure(view, theme.palette(dark), moe.keys)
    ghosts = [t for t in fig.data if t.type == "scattergl"]
    ids = np.concatenate([np.asarray(t.customdata)[:, 0] for t in ghosts])
    assert sorted(ids.astype(int).tolist()) == list(range(view.cells))
    assert len(fig.to_json()) < 500_000  # 18 432 experts, all three projections
    assert len([t for t in fig.data if t.type == "heatmap"]) == 4


def test_selected_cells_are_marked(dense):
    view = build(dense, MapControls("fisher_projection", "int3-g64"))
    chosen = view.cells_of(Selection.of([0, 7, 8]))
    fig = sensitivity_map.figure(view, theme.LIGHT, dense.keys, chosen)
    (ghost,) = [t for t in fig.data if t.type == "scattergl"]
    marked = np.asarray(ghost.customdata)[list(ghost.selectedpoints), 0].astype(int)
    assert view.units_of(marked).ids == (0, 7, 8)


def test_unknown_cells_get_a_trace_and_a_legend(moe):
    view = build(moe, MapControls("fisher_projection", "int3-g64", projection="up"))
    fig = sensitivity_map.figure(view, theme.LIGHT, moe.keys)
    assert [t.name for t in fig.data if t.type == "scatter"] == ["unknown: never reached"]
    hatched = [t for t in fig.data if t.type == "scattergl" and t.marker.symbol == "line-ne-open"]
    assert sum(len(t.x) for t in hatched) == int(np.isnan(view.value[view.unit_cell >= 0]).sum())


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
