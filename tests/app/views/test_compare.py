from __future__ import annotations

import json

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError, null_nan, parse_format
from bitatlas.app.charts import compare as charts
from bitatlas.app.theme import palette
from bitatlas.app.views.compare import Side, Stability, build_compare, rival
from bitatlas.solvers import Problem, get_solver


@pytest.fixture(scope="module")
def pair(dense):
    table = dense.tables["fisher_projection"]
    formats = [parse_format(f) for f in table.formats]
    size = dense.index.bytes_table(formats)
    limit = int(size.min(1).sum() + 0.5 * (size.max(1) - size.min(1)).sum())

    def solved(pins):
        problem = Problem.build(dense.index, table, formats, limit, pins=pins)
        choice = get_solver("hull").solve(problem).choice
        return {k: table.formats[j] for k, j in zip(dense.keys, choice)}

    free = solved({})
    lowest = min(dense.keys, key=lambda k: table.formats.index(free[k]))
    return table, free, solved({lowest: table.formats[-1]}), dense.keys.index(lowest)


def test_the_waterfall_adds_up_unit_by_unit(dense, pair):
    table, a, b, pinned = pair
    view = build_compare(dense.index, Side("a", a), Side("b", b), table, "nats/token")
    assert sum(r.nbytes for r in view.roles) == view.nbytes[1] - view.nbytes[0]
    assert sum(r.damage for r in view.roles) == pytest.approx(view.damage[1] - view.damage[0])
    differ = [k for k in dense.keys if a[k] != b[k]]
    assert dense.keys[pinned] in differ
    assert {u.unit for u in view.units} == set(differ)
    assert int(view.changed.sum()) == len(differ) == sum(r.units for r in view.roles)
    cell = (
        view.rows.index(str(dense.index.units[pinned].layer)),
        view.columns.index(dense.index.units[pinned].role),
    )
    bits = parse_format(b[dense.keys[pinned]]).bits - parse_format(a[dense.keys[pinned]]).bits
    assert view.bits[cell] == bits
    json.dumps(null_nan(view.to_dict()))


def test_equal_and_unmeasured_and_wrong(dense, pair):
    table, a, b, _ = pair
    same = build_compare(dense.index, Side("a", a), Side("a", a), table)
    assert same.title == "Both give every unit the same bits"
    assert same.units == ()
    plain = build_compare(dense.index, Side("a", a), Side("b", b), None)
    assert np.isnan(plain.damage).all()
    assert "B takes" in plain.title
    measured = build_compare(dense.index, Side("a", a, 0.5, 0.01), Side("b", b, 0.51, 0.01), table)
    assert "within the noise" in measured.title
    with pytest.raises(UserError, match="not for this model"):
        build_compare(dense.index, Side("a", {"x": "bf16"}), Side("b", b), table)


def test_stability_in_words(dense, pair):
    table, a, b, pinned = pair
    kept = np.full(len(dense.keys), 0.75)
    said = build_compare(
        dense.index, Side("a", a), Side("b", b), table, "", Stability(kept, "30 times with x", 0.75)
    )
    assert "Solved again 30 times with x, a unit gets A's bits 75% of the time." in said.detail
    assert (said.stable, said.stable_how) == (0.75, "30 times with x")
    assert {u.kept for u in said.units} == {0.75}
    unknown = build_compare(
        dense.index, Side("a", a), Side("b", b), table, "", Stability(None, "x reads no text")
    )
    assert unknown.detail.endswith("How stable A is cannot be said: x reads no text.")
    assert "%" not in unknown.detail
    assert np.isnan(unknown.stable)
    assert "Solved again" not in build_compare(dense.index, Side("a", a), Side("b", b), table).detail


@pytest.mark.parametrize("dark", [False, True])
def test_charts(dense, pair, dark):
    table, a, b, _ = pair
    view = build_compare(dense.index, Side("a", a), Side("b", b), table, "nats/token")
    grid = charts.change_map(view, palette(dark))
    assert np.asarray(grid.data[0].z).shape == (len(view.rows), len(view.columns))
    fall = charts.waterfall(view, palette(dark), "bytes")
    assert sum(fall.data[0].y) * (1 << 30 if view.nbytes[0] >= 1 << 30 else 1 << 20) == pytest.approx(
        view.nbytes[1]
    )
    assert fall.layout.yaxis.title.text
    assert charts.waterfall(view, palette(dark), "damage").layout.yaxis.title.text


def test_the_newest_meets_the_best_of_its_size():
    nan = float("nan")
    assert rival([100, 300, 101, 99, 100], [0.4, 0.01, 0.3, 0.2, nan]) == 3
    assert rival([100, 300, 50], [0.4, 0.01, 0.1]) == 1  # none as large
    assert rival([100, 100], [nan, nan]) == 1  # none verified
