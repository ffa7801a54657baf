"""The table of selected units."""

from __future__ import annotations

import numpy as np

from bitatlas.analysis.schema import parse_format
from bitatlas.app.selection import Selection
from bitatlas.app.views import unit_table
from bitatlas.app.views.sensitivity_map import MapControls, build

CONTROLS = MapControls("fisher_projection", "int4-g64")


def test_all_units_worst_first(moe):
    view = build(moe, CONTROLS)
    table = unit_table.build(moe, view, CONTROLS, Selection(), {})
    assert table.title == "All 18,626 units, worst first"
    values = np.array(table.columns["value"])
    known = np.isfinite(values)
    assert (np.diff(values[known]) <= 0).all()
    assert not known[known.sum() :].any()  # unknown ones are last
    assert set(np.array(table.columns["rank"])[~known]) == {0}


def test_selected_units(dense):
    view = build(dense, CONTROLS)
    chosen = Selection.of([3, 4, 5])
    table = unit_table.build(dense, view, CONTROLS, chosen, {4: "int8-g64"})
    damage = dense.tables["fisher_projection"].damage[:, 2]
    weights = np.array([u.params for u in dense.index.units])
    share, mass = damage[3:6].sum() / damage.sum(), weights[3:6].sum() / weights.sum()
    assert table.title == f"3 units selected: {share:.1%} of the damage in {mass:.1%} of the weights"
    assert sorted(table.ids.tolist()) == [3, 4, 5]
    by_unit = dict(zip(table.columns["unit"], table.columns["pin"]))
    assert by_unit[dense.keys[4]] == "int8-g64"
    assert by_unit[dense.keys[3]] == ""
    u = dense.index.units[int(table.ids[0])]
    assert table.columns["bytes"][0] == parse_format("int4-g64").payload_bytes(u.rows, u.cols)


def test_unknown_units_are_counted_in_the_title(moe):
    view = build(moe, CONTROLS)
    unknown = np.flatnonzero(np.isnan(view.value))[:6]
    table = unit_table.build(moe, view, CONTROLS, Selection.of([*unknown.tolist(), 1]), {})
    assert table.title.endswith("; 6 unknown")


def test_only_the_worst_are_drawn_at_once(moe):
    view = build(moe, CONTROLS)
    table = unit_table.build(moe, view, CONTROLS, Selection(), {}, 500)
    assert table.title == "The 500 worst of 18,626 units"
    assert len(table.ids) == len(table.columns["unit"]) == 500
    assert set(table.ids.tolist()) == set(np.argsort(-np.nan_to_num(view.value))[:500].tolist())
    some = unit_table.build(moe, view, CONTROLS, Selection.of(range(1000)), {}, 10)
    assert some.title.startswith("1,000 units selected")
    assert len(some.ids) == 10
