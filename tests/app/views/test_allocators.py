from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from bitatlas.analysis.schema import null_nan, parse_format
from bitatlas.app.charts.allocators import fronts_chart
from bitatlas.app.theme import palette
from bitatlas.app.views.allocators import Asked, build_allocators, cost_of
from bitatlas.cache.runs import RunInfo
from bitatlas.solvers import FrontCache, Problem, frontier, get_solver


@pytest.fixture(scope="module")
def view(dense):
    table = dense.tables["fisher_projection"]
    problem = Problem.build(dense.index, table, [parse_format(f) for f in table.formats], 1 << 60)
    asked = [Asked(n, n, frontier(problem, get_solver(n), points=7), 0.1) for n in ("hull", "uniform")]
    searched = Asked("evopress", "evopress (search)", asked[0].frontier, float("nan"), 12, 5000, True)
    broken = Asked("pmq", "PMQ", None, words="needs experts")
    return build_allocators(
        [*asked, searched, broken],
        FrontCache.of(problem),
        dense.index.kept_bytes,
        [],
        "fisher_projection",
        "nats",
    )


def test_what_asking_cost(dense, view):
    run = RunInfo(
        "r",
        "m",
        "fisher_projection",
        (),
        "",
        {},
        {"settings": {"metric": {"forward_tokens": 100, "backward_tokens": 50}}},
        10.0,
        52.0,
    )
    cost = cost_of(run)
    assert (cost.tokens, cost.seconds) == (200, 42.0)
    assert cost_of(replace(run, provenance={}, finished=None)).tokens == 0
    table = dense.tables["fisher_projection"]
    problem = Problem.build(dense.index, table, [parse_format(f) for f in table.formats], 1 << 60)
    front = frontier(problem, get_solver("random_best"), points=3)
    asked = Asked(
        "random_best",
        "random",
        front,
        front.seconds,
        front.evaluations,
        front.tokens,
        metric_tokens=cost.tokens,
    )
    told = build_allocators([asked], FrontCache.of(problem), 0, [], "fisher_projection", "nats", cost)
    assert (
        "Measuring fisher_projection took 200 forward-equivalent tokens of the real model and 42 s"
        in told.detail
    )
    (row,) = told.rows
    assert (row.metric_tokens, row.evaluations) == (200, front.evaluations)
    assert "Measuring" not in view.detail


def test_gaps_against_the_lower_bound(dense, view):
    rows = {r.name: r for r in view.rows}
    assert rows["hull"].gap == pytest.approx(0, abs=1e-9)
    assert rows["uniform"].gap > 0.01
    assert "uniform" in view.title
    assert np.isnan(rows["evopress"].gap)
    assert rows["evopress"].tokens == 5000
    assert rows["pmq"].words == "needs experts"
    assert [r.name for r in view.rows][:2] == ["hull", "uniform"]
    # By hand: uniform int4 against the bound at its own bytes.
    for size, damage in zip(rows["uniform"].weights_bytes, rows["uniform"].damage):
        bound = np.interp(size, view.bound.weights_bytes, view.bound.damage)
        assert damage >= bound * (1 - 1e-6)
    json.dumps(null_nan(view.to_dict()))


@pytest.mark.parametrize("dark", [False, True])
def test_chart(view, dark):
    figure = fronts_chart(view, palette(dark))
    assert [t.name for t in figure.data] == ["lower bound", "hull", "uniform", "evopress (search)"]
    assert "GiB" in figure.layout.xaxis.title.text or "MiB" in figure.layout.xaxis.title.text
