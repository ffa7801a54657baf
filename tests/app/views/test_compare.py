from __future__ import annotations

import json

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError, null_nan, parse_format
from bitatlas.app.charts import compare as charts
from bitatlas.app.comparing import kept_share
from bitatlas.app.theme import palette
from bitatlas.app.views.compare import Side, build_compare
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


def test_stability_knows_certain_from_uncertain(dense, pair):
    table, a, *_ = pair
    sure = kept_share(dense.index, a, _with_errors(table, 1e-9), replicates=5)
    assert np.nanmin(sure) == pytest.approx(1)
    unsure = kept_share(dense.index, a, _with_errors(table, 1.0), replicates=20)
    assert np.nanmean(unsure) < np.nanmean(sure) - 0.05
    assert kept_share(dense.index, dict.fromkeys(dense.keys, "bf16"), table) is None
    # Resampling sequences that all say the same changes nothing.
    samples = np.repeat(table.damage[None], 4, axis=0)
    np.testing.assert_allclose(kept_share(dense.index, a, table, samples, replicates=3), sure, atol=0.02)


def _with_errors(table, share):
    from dataclasses import replace

    return replace(table, stderr=table.damage * share)


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
