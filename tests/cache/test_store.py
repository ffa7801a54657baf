from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bitatlas.analysis.schema import Allocation, DamageRow, Frontier, SensitivityTable, UserError
from bitatlas.cache.keys import digest, run_key
from bitatlas.cache.plans import Candidate
from bitatlas.cache.store import Store, rebuild

D = "d" * 20


def test_model_round_trip_and_new_path(store, index):
    from dataclasses import replace

    assert store.put_model(index) == D
    assert store.model(D) == index
    moved = replace(index, path="/elsewhere/tiny")
    store.put_model(moved)
    assert store.model(D) == moved
    (known,) = store.models()
    assert (known["n_units"], known["params"], known["architecture"]) == (
        len(index.units),
        index.params,
        "TinyForCausalLM",
    )
    with pytest.raises(UserError, match="not in the store"):
        store.model("nothing")


def test_rows_are_idempotent_and_first_write_stays(store, index, rows):
    assert store.write_rows("r", rows) == len(rows)
    assert store.write_rows("r", rows) == 0
    changed = [DamageRow(r.metric, r.unit, r.format, r.value + 1) for r in rows]
    assert store.write_rows("r", changed + [DamageRow("other", "u", "-", 1.0)]) == 1
    assert sorted(map(repr, store.rows("r", "weight_error"))) == sorted(map(repr, rows))
    assert len(store.rows("r")) == len(rows) + 1
    # The same row twice in one call is one row.
    assert store.write_rows("r2", [rows[0], rows[0]]) == 1


def test_unknown_stays_unknown(store):
    store.write_rows("r", [DamageRow("m", "u", "-", math.nan), DamageRow("m", "v", "-", math.inf)])
    a, b = store.rows("r")
    assert math.isnan(a.value)
    assert math.isnan(a.stderr)
    assert b.value == math.inf


def test_table_equals_the_one_made_from_rows(store, index, rows):
    keys = index.unit_keys()
    store.write_rows("r", rows[:-3])
    got = store.table("r", "weight_error", keys)
    want = SensitivityTable.from_rows(rows[:-3], keys, "r")
    assert (got.metric, got.units, got.formats, got.floor, got.run) == (
        want.metric, want.units, want.formats, want.floor, want.run,
    )  # fmt: skip
    for name in ("damage", "stderr", "count"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert np.isnan(got.damage).sum() == 3
    with pytest.raises(UserError, match="has no hessian"):
        store.table("r", "hessian", keys)


def test_steps_and_their_rows_are_one(store, rows):
    assert store.write_step("r", "a", rows[:4])
    assert not store.write_step("r", "a", rows[4:])
    assert store.write_step("r", "empty", [])
    assert store.steps_done("r") == {"a", "empty"}
    assert len(store.rows("r")) == 4
    assert store.steps_done("unknown") == set()


def test_runs_and_latest(store, index, rows):
    store.put_model(index)
    for run, formats in (("r1", ("int2-g64", "int4-g64")), ("r2", ("int2-g64",)), ("r3", ("int4-g64",))):
        store.begin_run(
            run,
            D,
            "weight_error",
            settings={"a": 1},
            provenance={"seed": 3},
            formats=formats,
            calibration="c",
        )
        store.write_step(run, "s", [r for r in rows if r.format in formats])
        if run != "r3":
            store.finish_run(run)
    store.write_rows("r1", [])
    info = store.run("r1")
    assert (info.metric, info.formats, info.settings, info.provenance, info.steps) == (
        "weight_error", ("int2-g64", "int4-g64"), {"a": 1}, {"seed": 3}, 1,
    )  # fmt: skip
    assert info.finished is not None
    assert info.finished >= info.started
    assert store.run("r3").finished is None
    assert [r.run for r in store.runs(D)] == ["r3", "r2", "r1"]
    assert store.runs("other") == []
    assert store.latest_run(D, "weight_error") == "r2"
    assert store.latest_run(D, "weight_error", ["int4-g64"]) == "r1"
    assert store.latest_run(D, "weight_error", ["int8-g64"]) is None
    assert {(e.run, e.rows) for e in store.metrics_of(D)} == {("r1", 16), ("r2", 8)}
    with pytest.raises(UserError, match="no such run"):
        store.finish_run("nope")


def test_a_run_that_emits_several_metrics(store, index):
    store.begin_run("r", D, "routing")
    store.write_step(
        "r", "s", [DamageRow("routing", "u", "-", 1.0), DamageRow("routing_share", "u", "-", 0.5)]
    )
    store.finish_run("r")
    assert store.latest_run(D, "routing_share", ["int4-g64"]) == "r"


def allocation(index) -> Allocation:
    formats = dict.fromkeys(index.unit_keys(), "int4-g64")
    return Allocation(
        D, "tiny", formats, 1000, 10, 4.25, 0.5, "weight_error", "hull", kv={0: ("kv4-token", "kv2-token")}
    )


def test_allocations_verifications_frontiers_candidates(store, index):
    a = allocation(index)
    key = store.put_allocation(a)
    assert store.put_allocation(a) == key
    assert store.allocation(key).to_json() == a.to_json()
    (info,) = store.allocations(D)
    assert (info.id, info.weights_bytes, info.solver) == (key, 1010, "hull")

    v = {"model_digest": D, "allocation": key, "text_digest": "t", "tokens": 99, "kl_mean": 0.1, "kl_p50": 0.05,
         "kl_p99": math.nan, "kl_stderr": 0.01, "flips": 0.02, "ppl_before": 10.0, "ppl_after": 11.0, "floor": 0.0,
         "sequences": [{"kl": 0.1}], "versions": {"torch": "x"}}  # fmt: skip
    assert store.put_verification(v) == store.put_verification({**v, "kl_mean": 0.2})
    (got,) = store.verifications(D)
    assert math.isnan(got["kl_p99"])
    assert {k: got[k] for k in v if k != "kl_p99"} == {k: v[k] for k in v if k != "kl_p99"}
    assert store.verifications(D, allocation="other") == []
    with pytest.raises(UserError, match="incomplete"):
        store.put_verification({"tokens": 3})

    f = Frontier(index.unit_keys(), ("int2-g64", "int4-g64"), np.array([5, 9]), np.array([0.5, math.nan]),
                 np.zeros((2, len(index.units)), np.uint8), "weight_error", "hull")  # fmt: skip
    fk = store.put_frontier(D, f, "r")
    back = store.frontier(fk)
    assert np.isnan(back.seconds)
    cost = replace(f, solver="priced", supported=np.arange(len(f.predicted)) % 2 == 0, seconds=1.5, evaluations=7,
                   tokens=900)  # fmt: skip
    newest = store.put_frontier(D, cost, "r")
    priced = store.frontier(newest)
    assert (priced.seconds, priced.evaluations, priced.tokens) == (1.5, 7, 900)
    assert np.array_equal(priced.supported, cost.supported)
    assert (back.units, back.formats, back.metric, back.solver) == (f.units, f.formats, f.metric, f.solver)
    for name in ("payload_bytes", "predicted", "choice"):
        np.testing.assert_array_equal(getattr(back, name), getattr(f, name))
    assert [found["id"] for found in store.frontiers(D)] == [newest, fk]

    cs = [Candidate("h1", 2.0, 7, 100, {"gen": 1}), Candidate("h2", 1.0, 7, 100), Candidate("h3", math.nan)]
    assert store.put_candidates("r", cs) == 3
    assert store.put_candidates("r", cs) == 0
    assert [c.choice_hash for c in store.candidates("r")] == ["h2", "h1", "h3"]


def dump(store: Store):
    with store.db.read() as con:
        names = [
            "models",
            "units",
            "runs",
            "finished",
            "steps",
            "damage",
            "emitted",
            "allocations",
            "verifications",
            "frontiers",
            "candidates",
        ]
        out = {}
        for n in names:
            columns = [c[0] for c in con.execute(f"DESCRIBE {n}").fetchall() if c[0] != "stamp"]
            picked = ", ".join(f'"{c}"' for c in columns)
            out[n] = sorted(map(repr, con.execute(f"SELECT {picked} FROM {n}").fetchall()))
        return out


def fill(store, index, rows) -> None:
    store.put_model(index)
    store.begin_run("r1", D, "weight_error", settings={"x": [1, 2]}, formats=["int2-g64", "int4-g64"])
    store.write_step("r1", "a", rows[:7])
    store.write_step("r1", "b", rows[7:] + [DamageRow("extra", "u", "-", math.nan)])
    store.put_candidates("r1", [Candidate("h", 1.0)])
    store.finish_run("r1")
    key = store.put_allocation(allocation(index))
    store.put_verification(
        {"model_digest": D, "allocation": key, "text_digest": "t", "tokens": 5, "kl_mean": 0.1}
    )
    choice = np.zeros((1, len(index.units)), np.uint8)
    store.put_frontier(
        D, Frontier(index.unit_keys(), ("int2-g64",), np.array([5]), np.array([0.5]), choice), "r1"
    )


def test_rebuild_gives_the_same_store(store, index, rows, home):
    fill(store, index, rows)
    before = dump(store)
    assert all(before.values())
    rebuild(home)
    assert dump(store) == before
    assert list(home.root.glob("bitatlas.duckdb.replaced-*"))


def test_study_goes_to_another_home(store, index, rows, tmp_path):
    from bitatlas.cache.paths import Home

    fill(store, index, rows)
    store.begin_run("unfinished", D, "x")
    kept = {"edges": np.array([1.0, 2.0]), "counts": np.arange(9).reshape(3, 3)}
    for run in ("r1", "unfinished"):
        store.put_arrays(run, kept)
    store.put_arrays("r1", {})  # nothing to keep is nothing lost
    assert store.export_study(D, tmp_path / "study") >= 6
    assert [p.name for p in (tmp_path / "study" / "arrays").iterdir()] == ["r1.npz"]
    assert "/models/tiny" not in "".join(
        p.read_bytes().decode("latin1") for p in (tmp_path / "study").rglob("*.*")
    )
    other = Store(Home(tmp_path / "other"))
    done = other.import_study(tmp_path / "study", model_path="/here/tiny")
    assert other.import_study(tmp_path / "study", model_path="/here/tiny") == done
    assert other.model(D).path == "/here/tiny"
    a, b = dump(store), dump(other)
    for name in ("units", "damage", "steps", "allocations", "verifications", "frontiers", "candidates"):
        assert a[name] == b[name], name
    rebuild(other.home)
    assert dump(other)["damage"] == a["damage"]
    assert {n: v.tolist() for n, v in other.arrays("r1").items()} == {n: v.tolist() for n, v in kept.items()}
    assert other.arrays("unfinished") == {}
    with pytest.raises(UserError, match="not a study folder"):
        other.import_study(tmp_path / "nothing")


@pytest.mark.parametrize("file", ["runs/r1.parquet", "arrays/r1.npz"])
def test_a_bad_study_file_loads_nothing(store, index, rows, tmp_path, file):
    from bitatlas.cache.paths import Home

    fill(store, index, rows)
    store.put_arrays("r1", {"counts": np.zeros(3)})
    store.export_study(D, tmp_path / "study")
    (tmp_path / "study" / file).write_bytes(b"PAR1 not really")
    other = Store(Home(tmp_path / "other"))
    with pytest.raises(UserError, match="cannot be read"):
        other.import_study(tmp_path / "study")
    assert other.models() == []


def test_keys():
    base = {
        "model_digest": "m",
        "metric": "x",
        "version": 1,
        "formats": ["a", "b"],
        "calibration_digest": "c",
        "settings": {"p": 1},
        "seed": 0,
    }
    key = run_key(**base)
    assert len(key) == 20
    assert run_key(**{**base, "formats": ["b", "a", "a"]}) == key
    for name, value in (("model_digest", "n"), ("metric", "y"), ("version", 2), ("formats", ["a"]), ("calibration_digest", "d"), ("settings", {"p": 2}), ("seed", 1)):  # fmt: skip
        assert run_key(**{**base, name: value}) != key
    assert digest({"b": 1, "a": math.nan}) == digest({"a": None, "b": 1})
    with pytest.raises(TypeError):
        digest({"x": object()})


def test_no_torch():
    code = "import bitatlas.cache.store, sys; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
