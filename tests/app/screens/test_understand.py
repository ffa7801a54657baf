"""Metrics, Unit and Experts without a browser: empty store, sample study, deep links."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import DamageRow
from bitatlas.cache.store import Store
from tests.app.screens.pages import heading, index_of, open_page


@pytest.mark.parametrize("address", ["metrics", "unit", "experts"])
def test_empty_store(home, address):
    at = open_page(address)
    assert "yet" in heading(at)
    assert "Measure a model" in [e.proto.label for e in at.get("page_link")]


def test_metrics_from_a_link(filled):
    at = open_page(
        "metrics",
        study=filled[0],
        metric_x="fisher_projection",
        metric_y="alphaq_alpha",
        format="int4-g64",
        top_k="5",
    )
    assert "fisher\\_projection and alphaq\\_alpha" in heading(at)
    assert at.number_input(key="top_k").value == 5
    assert any("bitatlas truth" in c.value for c in at.code)  # no truth here: how to get one


def test_unit_from_a_link_and_on_by_rank(filled):
    at = open_page("unit", study=filled[0], unit="model.layers.0.mlp.down_proj")
    assert heading(at).startswith("## model.layers.0.mlp.down\\_proj is")
    before = heading(at)
    at.button(key="unit_Better").click().run()
    assert not at.exception
    assert heading(at) != before
    at.text_input(key="unit").set_value("layers[").run()
    assert any("regular expression is not valid" in e.value for e in at.error)


def test_experts_from_a_link(filled):
    at = open_page("experts", study=filled[1], quantity="alpha")
    assert "has the largest alpha" in heading(at)
    dense = open_page("experts", study=filled[0])
    assert "is dense" in heading(dense)


def test_a_units_inputs_and_how_to_get_them(filled, home, tmp_path):
    name = "model.layers.0.mlp.down_proj"
    at = open_page("unit", study=filled[0], unit=name, weights="true")
    assert any("--metric massive_activations" in c.value for c in at.code)
    store, index = Store(home), index_of(filled[0])
    store.begin_run("watched", index.digest, "massive_activations")
    rows = [DamageRow("massive_activations", u.key, "-", 0.0, count=9) for u in index.units]
    store.write_step("watched", "all", rows)
    counts = np.tile([0, 60, 40, 0], (len(rows), 1))
    store.put_arrays("watched", {"edges": np.array([0.1, 1.0, 10.0]), "counts": counts})
    store.finish_run("watched")
    at = open_page("unit", study=filled[0], unit=name, weights="true")
    assert any("Half of the 100 values are below 1," in c.value for c in at.caption)
    assert not any("--metric massive_activations" in c.value for c in at.code)


def test_a_budget_for_groups_of_experts(filled):
    page = open_page(
        "experts",
        study=filled[1],
        expert_budget="true",
        expert_group="damage",
        expert_parts="3",
        expert_limits="q3=3",
        expert_floor="int4-g64",
    )
    assert not page.exception
    words = " ".join(m.value for m in page.markdown)
    assert "Experts get" in words
    assert "the rules cost" in words
    line = next(c.value for c in page.code if "--expert-groups" in c.value)
    assert "--group-limit q3=3" in line
    assert "--rare-floor int4-g64" in line
    wrong = open_page(
        "experts", study=filled[1], expert_budget="true", expert_group="damage", expert_limits="q9=3"
    )
    assert not wrong.exception
    assert any("no group called" in e.value for e in wrong.error)
