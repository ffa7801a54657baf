"""The study that ships with the demo: every page finds something in it at the first start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import bitatlas.app
from bitatlas.app import evidence, tasks
from bitatlas.app.studies import load_study, open_store
from bitatlas.app.tasks.agreeing import trust_rows

SHIPPED = Path(next(iter(bitatlas.app.__path__))) / "demo" / "study"


@pytest.fixture
def study(home):
    store = open_store()
    return load_study(store, tasks.demo()["digest"])


def test_first_start_has_something_for_every_page(study, home):
    assert {"kv_output", "kv_fisher", "kv_flip", "kv_error"} <= study.kv.keys()
    assert {"fisher", "kl_flip", "alphaq", "routing_count"} <= study.tables.keys()
    assert study.allocations
    assert study.verifications
    # The newest measured flips are those that plans can be made of, not the ones that metrics are judged by.
    assert len(study.tables["kl_flip"].formats) == len(study.tables["fisher"].formats) > 3
    for unit in (0, len(study.keys) - 1):
        assert evidence.input_evidence(study, unit).total > 0
    rows = {r.metric: r for r in trust_rows(open_store(), study.index, home)}
    assert rows["fisher"].flips >= 200
    assert rows["fisher"].allocations == 96
    assert rows["fisher"].badge == "trusted"
    assert np.isfinite(rows["fisher"].band_least)
    assert not rows["kl_flip"].same_text
    assert not [name for name in rows if name.startswith("kv_")]


def test_an_older_sample_study_gets_what_the_new_one_has_more(study):
    store = open_store()
    before = {r.run for r in store.runs(study.index.digest)}
    newest = max(store.runs(study.index.digest), key=lambda r: r.started).run
    with store.db.write() as con:
        con.execute("DELETE FROM runs WHERE run = ?", [newest])
    assert newest not in {r.run for r in store.runs(study.index.digest)}
    tasks.demo()
    assert {r.run for r in store.runs(study.index.digest)} == before


def test_it_stays_small():
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 2_000_000
