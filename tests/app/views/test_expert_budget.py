"""The expert budget's view: rows add up, rules cost, two axes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitatlas.analysis.schema import FORMATS, UserError, null_nan
from bitatlas.app.charts import expert_budget as charts
from bitatlas.app.expert_groups import group_experts
from bitatlas.app.expert_rules import ExpertRules, under_rules
from bitatlas.app.side_budgets import active_bytes
from bitatlas.app.theme import DARK
from bitatlas.app.views import expert_budget as views
from bitatlas.solvers import FrontCache, Problem


@pytest.fixture(scope="module")
def small(fakes):
    index = fakes.moe_index(4, 8, "budget-4x8")
    table = fakes.damage_table(index)
    size = index.bytes_table([FORMATS[f] for f in table.formats])
    return index, table, Problem.build(index, table, table.formats, int(size[:, -1].sum()))


def test_rows_add_up_and_rules_cost(small):
    index, table, problem = small
    groups = group_experts(index, {table.metric: table}, "damage:3", table.metric)
    free = FrontCache.of(problem)
    limited = under_rules(
        problem, index, {table.metric: table}, ExpertRules("damage:3", ("q3=3",)), table.metric
    )
    cache = FrontCache.of(limited)
    limit = int(4 * index.params / 8)
    reached = np.where(problem.experts >= 0, 10.0, np.nan)
    view = views.build(index, limited, cache, limit, groups, reached, free)
    point = cache.at(limit)
    assert sum(r.nbytes for r in view.rows) == point.payload_bytes <= limit
    assert sum(r.damage for r in view.rows) == pytest.approx(point.objective)
    assert sum(r.experts for r in view.rows) == 32
    assert view.rows[-1].group == "no experts"
    row = next(r for r in view.rows if r.group == "q3")
    assert row.bits <= 3
    assert row.nbytes <= row.limit
    assert view.here[2] > view.free > 0
    assert "the rules cost" in view.detail
    assert view.here[1] == round(
        active_bytes(index, limited.formats)[np.arange(len(index.units)), point.choice].sum()
    )
    json.dumps(null_nan(view.to_dict()), allow_nan=False)
    with pytest.raises(UserError, match="too small for these rules"):
        views.build(index, limited, cache, 10, groups, reached)


def test_each_front_is_best_on_its_own_axis(small):
    index, _, problem = small
    both = views.fronts(index, problem, FrontCache.of(problem))
    for axis, own, other in ((0, both.by_size, both.by_reading), (1, both.by_reading, both.by_size)):
        assert (np.diff(own[:, axis]) > 0).all()
        assert (np.diff(own[:, 2]) < 0).all()
        # Between its points a front is convex, so its own line bounds the other from below.
        line = np.interp(other[:, axis], own[:, axis], own[:, 2])
        inside = (other[:, axis] >= own[0, axis]) & (other[:, axis] <= own[-1, axis])
        assert (other[inside, 2] >= 0.9 * line[inside]).all()
    view = views.build(
        index,
        problem,
        FrontCache.of(problem),
        int(3.5 * index.params / 8),
        None,
        np.full(len(index.units), np.nan),
    )
    for axis in charts.AXES:
        assert len(charts.front(both, view, axis, "fisher", "nats", DARK).data) == 3
