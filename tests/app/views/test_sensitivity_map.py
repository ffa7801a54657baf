"""The map's view against plain loops over the units."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError, parse_format
from bitatlas.app.selection import Selection
from bitatlas.app.views.map_cells import ABSENT, BELOW_FLOOR, KNOWN, UNKNOWN
from bitatlas.app.views.sensitivity_map import MapControls, build, projections, search


def _controls(**changes):
    return MapControls("fisher_projection", "int3-g64", **changes)


def test_dense_cells_hold_the_measured_values(dense):
    view = build(dense, _controls())
    (panel,) = view.panels
    assert panel.x == ("outside", *map(str, range(30)))
    assert panel.y == ("q", "k", "v", "o", "gate", "up", "down", "embed")
    table = dense.tables["fisher_projection"]
    column = table.formats.index("int3-g64")
    for i, u in enumerate(dense.index.units):
        x, y = u.layer + 1, panel.y.index(u.role)
        assert panel.z[y, x] == pytest.approx(math.log10(table.damage[i, column]), rel=1e-6)
        cell = int(np.flatnonzero((panel.cell_x == x) & (panel.cell_y == y))[0])
        assert view.unit_cell[i] == panel.cell[cell]
        assert panel.stderr[cell] == pytest.approx(table.stderr[i, column])
    assert (panel.state == ABSENT).sum() == 8 * 31 - len(dense.index.units)


def test_rank_one_is_the_worst(dense):
    panel = build(dense, _controls()).panels[0]
    order = np.argsort(panel.rank)
    assert panel.rank[order[0]] == 1
    assert (np.diff(panel.value[order]) <= 0).all()


def test_title_counts_the_layers_with_half_the_damage(dense):
    table = dense.tables["fisher_projection"]
    column = table.formats.index("int3-g64")
    by_layer = [0.0] * 30
    for i, u in enumerate(dense.index.units):
        if u.layer >= 0:
            by_layer[u.layer] += table.damage[i, column]
    total, so_far, layers = sum(by_layer), 0.0, 0
    for d in sorted(by_layer, reverse=True):
        so_far, layers = so_far + d, layers + 1
        if so_far >= total / 2:
            break
    view = build(dense, _controls())
    assert view.title == f"{layers} of 30 layers carry half the damage of int3-g64"
    assert dense.keys[int(np.argmax(table.damage[:, column]))] in view.subtitle


def test_experts_sum_their_projections_and_unknown_is_not_zero(moe):
    view = build(moe, _controls())
    roles, experts = view.panels
    assert (roles.kind, experts.kind) == ("roles", "experts")
    assert roles.y == experts.y  # the rows of both panels line up
    table = moe.tables["fisher_projection"]
    column = table.formats.index("int3-g64")
    want = {}
    for i, u in enumerate(moe.index.units):
        if u.expert >= 0:
            want[u.layer, u.expert] = want.get((u.layer, u.expert), 0.0) + table.damage[i, column]
    assert len(experts.cell) == 48 * 128 == len(want)
    unknown = 0
    for (layer, expert), value in want.items():
        y = experts.y.index(str(layer))
        if math.isnan(value):
            unknown += 1
            assert experts.state[y, expert] == UNKNOWN
            assert math.isnan(experts.z[y, expert])
        else:
            assert experts.state[y, expert] == KNOWN
            assert experts.z[y, expert] == pytest.approx(math.log10(value), abs=1e-5)
    assert unknown > 0
    assert f"{3 * unknown:,} unknown" in view.subtitle
    assert (experts.rank[np.isnan(experts.value)] == 0).all()


def test_one_projection_has_one_unit_a_cell(moe):
    view = build(moe, _controls(projection="down"))
    experts = view.panels[1]
    assert (experts.size == 1).all()
    units = view.units_of([int(experts.cell[17])])
    assert [moe.index.units[i].role for i in units.ids] == ["down"]
    assert view.cells_of(units).tolist() == [int(experts.cell[17])]


def test_worst_experts_first_keeps_each_layer_its_own_experts(moe):
    view = build(moe, _controls(sort_experts=True))
    experts = view.panels[1]
    for y in range(1, 49):
        row = experts.cell_y == y
        order = np.argsort(experts.cell_x[row])
        values = experts.value[row][order]
        known = values[np.isfinite(values)]
        assert (np.diff(known) <= 0).all()
        assert np.isnan(values[len(known) :]).all()
        assert sorted(experts.expert[row].tolist()) == list(range(128))


def test_values_at_the_floor_are_masked(dense, fakes):
    from dataclasses import replace

    table = dense.tables["fisher_projection"]
    column = table.formats.index("int8-g64")
    floor = float(np.median(table.damage[:, column]))
    study = type(dense)(dense.index, {"fisher_projection": replace(table, floor=floor)})
    view = build(study, MapControls("fisher_projection", "int8-g64"))
    panel = view.panels[0]
    below = int((table.damage[:, column] <= floor).sum())
    assert (panel.state == BELOW_FLOOR).sum() == below
    assert np.isnan(panel.z[panel.state == BELOW_FLOOR]).all()
    assert f"{below} at or below the noise floor" in view.subtitle


@pytest.mark.parametrize("how", ["per MiB saved", "per M weights"])
def test_normalised_values(dense, how):
    view = build(dense, _controls(normalise=how))
    plain = build(dense, _controls())
    for i in (0, 5, 100):
        u = dense.index.units[i]
        saved = u.rows * u.cols * 2 - parse_format("int3-g64").payload_bytes(u.rows, u.cols)
        by = saved / 2**20 if how == "per MiB saved" else u.params / 1e6
        assert view.value[i] == pytest.approx(plain.value[i] / by)
    assert view.unit == f"nats/token {how}"
    assert (view.panels[0].state == plain.panels[0].state).all()


def test_a_metric_without_formats_is_linear(dense):
    view = build(dense, MapControls("alphaq_alpha", "-"))
    assert not view.log
    worst = int(np.argmax(dense.tables["alphaq_alpha"].damage[:, 0]))
    assert view.title.startswith(dense.keys[worst])
    assert np.nanmax(view.panels[0].z) == pytest.approx(dense.tables["alphaq_alpha"].damage.max())


def test_what_was_not_measured_says_so(dense):
    with pytest.raises(UserError, match="was not measured for int4-g32"):
        build(dense, MapControls("fisher_projection", "int4-g32"))
    with pytest.raises(UserError, match="hawq_trace was not measured"):
        build(dense, MapControls("hawq_trace", "int4-g64"))


def test_search(dense, moe):
    assert [dense.keys[i] for i in search(dense, r"layers\.(0|29)\..*down").ids] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.29.mlp.down_proj",
    ]
    assert search(dense, "no such thing") == Selection()
    with pytest.raises(UserError, match="not valid"):
        search(dense, "layers[")
    assert projections(dense) == ()
    assert projections(moe) == ("all", "gate", "up", "down")
