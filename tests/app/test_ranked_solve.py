"""Solving with a metric that does not depend on the format: from the store to the allocation."""

from __future__ import annotations

import pytest

from bitatlas.analysis.schema import NO_FORMAT, DamageRow, UserError
from bitatlas.app.tasks import solving
from bitatlas.cache.store import Store


@pytest.fixture
def lim(home, index):
    """Block 2 turns its input most, block 5 least."""
    store, value = Store(home), (-0.6, -0.5, -0.1, -0.4, -0.7, -0.9)
    store.begin_run("limrun", index.digest, "lim", formats=(NO_FORMAT,))
    rows = [DamageRow("lim", u.key, NO_FORMAT, value[u.layer]) for u in index.units if u.layer >= 0]
    store.write_step("limrun", "all", rows)
    store.finish_run("limrun")
    return value


def test_the_threshold_asks_for_lim_and_ranks_whole_blocks(index, lim):
    plan = solving.solve("m", solver="threshold", bits=2.9, formats="int{2,3,4}-g64")
    assert plan.metric == "lim"
    assert plan.provenance.settings["run"] == "limrun"
    assert plan.bits_per_weight <= 2.9
    share = []
    for layer in (2, 3, 1, 0, 4, 5):  # by importance
        mine = [plan.formats[u.key] for u in index.units if u.layer == layer]
        assert set(mine) <= {"int2-g64", "int3-g64"}
        share.append(mine.count("int3-g64"))
    assert share[0] == 7
    assert share[-1] < 7
    assert plan.formats["model.embed_tokens"] == "int3-g64"


def test_without_a_measurement_the_first_published_metric_is_named(index):
    with pytest.raises(UserError, match="lim has not been measured"):
        solving.solve("m", solver="threshold", bits=3.5)


def test_a_score_of_ones_own_choice_and_a_damage(index):
    assert solving.solve("m", solver="threshold", metric="alphaq_alpha", bits=3.5).metric == "alphaq_alpha"
    plan = solving.solve("m", solver="threshold", metric="fisher_projection", bits=3.5)
    assert plan.predicted > plan.lower_bound > 0


def test_others_cannot_choose_a_format_by_it(index, lim):
    with pytest.raises(UserError, match="does not depend on the format") as told:
        solving.solve("m", solver="mckp", metric="lim", bits=3.5)
    assert "--solver threshold" in told.value.to_dict()["fix"]


def test_a_front_by_bytes(index, lim):
    front = solving.frontier("m", solver="threshold", formats="int{2,3,4}-g64", points=5)
    assert len(front.payload_bytes) > 3
    assert front.metric == "lim"
