"""The KV page's views: the map says which half hurts, the split is the best of all splits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitatlas.analysis.schema import (
    DamageRow,
    Frontier,
    KvGeometry,
    KvLayout,
    KvTable,
    UserError,
    kv_unit,
    null_nan,
)
from bitatlas.app.charts import kv as charts
from bitatlas.app.theme import LIGHT
from bitatlas.app.views.kv import build_joint_front, build_map, build_split
from bitatlas.solvers import FrontCache, Problem

GEOMETRY = KvGeometry((2, 0, 2, 2), 16, (0, 0, 0, 0))
LAYOUT = KvLayout(8, 8)


def rows(v_hurts=1.0):
    out = []
    for layer, base in ((0, 1.0), (2, 3.0), (3, 0.5)):
        for bits in (2, 4, 8):
            out.append(
                DamageRow(
                    "kv_fisher", kv_unit(layer, "k"), f"kv{bits}-channel", base * 4.0**-bits * 5, count=9
                )
            )
            out.append(
                DamageRow(
                    "kv_fisher", kv_unit(layer, "v"), f"kv{bits}-token", base * 4.0**-bits * v_hurts, count=9
                )
            )
            for other in (2, 4, 8):
                pair = f"kv{bits}-channel/kv{other}-token"
                out.append(
                    DamageRow(
                        "kv_fisher",
                        kv_unit(layer),
                        pair,
                        base * (4.0**-bits * 5 + 4.0**-other * v_hurts),
                        count=9,
                    )
                )
    return out


@pytest.fixture(scope="module")
def table():
    return KvTable.from_rows(rows(), "kv_fisher", LAYOUT, "run")


def test_relative_errors_have_panels_of_their_own():
    """Of K, V and the scores, which the same run says under other names; before and after rotation apart."""
    found = []
    for suffix, factor in (("", 1.0), ("_pre", 0.5)):
        for layer in (0, 2):
            for metric, part, fmt, value in (
                ("kv_tensor_error", "k", "kv4-token", 0.3), ("kv_score_error", "k", "kv4-token", 0.2),
                ("kv_tensor_error", "v", "kv4-token", 0.1), ("kv_error", "", "kv4-token/kv4-token", 0.05),
            ):  # fmt: skip
                if not (suffix and part == "v"):
                    found.append(
                        DamageRow(metric + suffix, kv_unit(layer, part), fmt, factor * value, count=9)
                    )
    view = build_map(KvTable.from_rows(found, "kv_error", LAYOUT, "run"))
    assert [p.name for p in view.panels] == ["K", "V", "Scores", "Output"]
    assert [p.values[0, 0] for p in view.panels] == [0.3, 0.1, 0.2, 0.05]
    assert view.title.startswith("K at 4 bits is off by 3.0 times as much as V")
    assert view.quantity == "relative error"
    before = build_map(KvTable.from_rows(found, "kv_error_pre", LAYOUT, "run"))
    assert [p.values[1, 0] for p in before.panels] == [0.15, 0.1, 0.1, 0.025]
    assert len(charts.map_chart(view, LIGHT).data) == 4


def weights():
    bits = np.array([2, 4, 8])
    return Problem.of(np.array([[3.0], [1.0]]) * 4.0**-bits, np.array([[900], [700]]) * bits, 0)


def test_the_map_tells_k_from_v(table):
    view = build_map(table)
    assert view.title == "K at 4 bits hurts 5.0 times as much as V; layer 2 is hurt most"
    assert [p.name for p in view.panels] == ["K", "V", "K and V"]
    assert view.panels[0].columns == ("kv8-channel", "kv4-channel", "kv2-channel")
    assert view.panels[0].values[1, 2] == pytest.approx(3.0 / 16 * 5)
    assert view.panels[2].values.shape == (3, 9)
    columns = view.columns()
    assert {len(c) for c in columns.values()} == {3 * (3 + 3 + 9)}
    json.dumps(null_nan(view.to_dict()), allow_nan=False)
    assert build_map(KvTable.from_rows(rows(20.0), "kv_fisher", LAYOUT)).title.startswith(
        "V at 4 bits hurts 4.0 times"
    )
    assert len(charts.map_chart(view, LIGHT).data) == 3


def test_the_split_is_the_best_point_of_its_own_curve_and_near_the_joint_optimum(table):
    from bitatlas.solvers import get_solver
    from bitatlas.solvers.joint import join_kv

    memory = 110_000
    view = build_split(FrontCache.of(weights()), table, GEOMETRY, memory=memory, context=512, batch=1)
    assert view.best == int(np.argmin(view.total))
    assert (np.diff(view.kv_bytes) > 0).all()
    joint = join_kv(
        weights(), GEOMETRY, table.formats(), table.damage, context=512, layout=LAYOUT, limit_bytes=memory
    )
    best = get_solver("mckp").solve(joint.problem).certificate.objective
    assert best <= view.total[view.best] + 1e-12 <= 3 * best
    assert set(view.plan) == {0, 2, 3}
    assert "Give the KV cache" in view.title
    assert len(charts.split_chart(view, LIGHT).data) == 4
    longer = build_split(FrontCache.of(weights()), table, GEOMETRY, memory=memory, context=700, batch=1)
    assert longer.total[longer.best] > view.total[view.best]


def test_too_little_memory_is_said(table):
    with pytest.raises(UserError, match="too small"):
        build_split(FrontCache.of(weights()), table, GEOMETRY, memory=4_000, context=512, batch=1)
    with pytest.raises(UserError, match="context"):
        build_split(FrontCache.of(weights()), table, GEOMETRY, memory=4_000, context=0, batch=1)


def test_the_front_of_every_memory():
    payload, cache = np.array([100, 200, 400, 900]), np.array([20, 30, 200, 100])
    front = Frontier(
        ("w", "kv.0"),
        ("int4", "kv8/kv8"),
        payload,
        np.array([4.0, 2.0, 1.0, 0.0]),
        np.zeros((4, 2), np.uint8),
        kv_bytes=cache,
    )
    view = build_joint_front(front, 100, 550)
    assert view.total_bytes.tolist() == [200, 300, 500, 1000]
    assert view.at == 2
    assert view.title == "The KV cache should get 10% to 40% of the memory"
    assert "40% at 550" in view.detail
    assert build_joint_front(front, 100, 150).at == -1
    assert "150 B is too small" in build_joint_front(front, 100, 150).detail
    columns = view.columns()
    assert columns["kv_share"] == [0.1, 0.1, 0.4, 0.1]
    assert json.loads(json.dumps(columns)) == columns
    figure = charts.joint_chart(view, LIGHT)
    weights, kept_cache = (next(t for t in figure.data if t.name == name) for name in ("weights", "KV cache"))
    stacked = (np.array(weights.y) + np.array(kept_cache.y)) * (1 << 20)
    np.testing.assert_allclose(stacked, view.total_bytes)
    mark = next(t for t in figure.data if t.mode == "markers+text")
    assert mark.y[0] == 1.0
    assert not any(
        t.mode == "markers+text" for t in charts.joint_chart(build_joint_front(front, 100, 1), LIGHT).data
    )
