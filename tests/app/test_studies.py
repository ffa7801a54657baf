"""Studies read back from a real store."""

from __future__ import annotations

import numpy as np

from bitatlas.app import studies
from bitatlas.cache.store import Store


def _measure(store, fakes, index, formats, run, seed=0, calibration="text"):
    table = fakes.damage_table(index, seed=3).select(formats)
    provenance = {"tokens": 96, "seed": seed}
    store.begin_run(
        run,
        index.digest,
        "fisher_projection",
        formats=formats,
        calibration=calibration,
        provenance=provenance,
    )
    store.write_step(run, "all", fakes.rows(table))
    store.finish_run(run)


def test_formats_measured_in_several_alike_runs_stand_side_by_side(home, fakes):
    store, index = Store(home), fakes.dense_index(3, "dense-3")
    store.put_model(index)
    _measure(store, fakes, index, ["int4-g64", "int8-g64"], "one")
    _measure(store, fakes, index, ["int2-g64", "int4-g64"], "two")
    _measure(store, fakes, index, ["int3-g64"], "old text", calibration="other")
    study = studies.load_study(store, index.digest)
    assert study.tables["fisher_projection"].formats == (
        "int3-g64",
    )  # the newest alone: nothing else is like it
    _measure(store, fakes, index, ["int6-g64"], "three")
    study = studies.load_study(store, index.digest)
    table = study.tables["fisher_projection"]
    assert table.formats == ("int2-g64", "int4-g64", "int6-g64", "int8-g64")
    want = fakes.damage_table(index, seed=3).select(table.formats)
    np.testing.assert_array_equal(table.damage, want.damage)
    assert study.runs["fisher_projection"].run == "three"


def test_stamp_changes_with_every_result(home, fakes):
    store, index = Store(home), fakes.dense_index(2, "dense-2")
    store.put_model(index)
    before = studies.stamp(store, index.digest)
    _measure(store, fakes, index, ["int4-g64"], "one")
    after = studies.stamp(store, index.digest)
    assert before != after
    assert studies.stamp(store, index.digest) == after


def test_library_lines(home, fakes):
    store = Store(home)
    fakes.fill(store, fakes.dense_index(2, "dense-2"))
    store.put_model(fakes.moe_index(2, 4, "moe-2x4"))
    first, second = studies.list_studies(store)
    assert (first.name, second.name) == ("dense-2", "moe-2x4")
    assert {m.name: m.coverage for m in first.metrics} == {"fisher_projection": 1.0, "alphaq_alpha": 1.0}
    assert studies.freshness(first) == "missing"


def test_freshness(home, fakes, tiny_checkpoint, tmp_path):
    import shutil

    from bitatlas.analysis.model_index import index_model

    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    store = Store(home)
    store.put_model(index_model(folder))
    (info,) = studies.list_studies(store)
    assert studies.freshness(info) == "fresh"
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-2000:] = bytes(2000)
    shard.write_bytes(data)
    assert studies.freshness(info) == "changed"
