"""Library, Run and Map without a browser: on an empty store, on a sample study, from a deep link."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.schema import DamageRow, Frontier
from bitatlas.app import fronts, state
from bitatlas.app.screens import SCREENS
from bitatlas.app.selection import Selection
from bitatlas.cache.store import Store
from bitatlas.solvers import SOLVERS
from tests.app.screens.pages import heading, index_of, open_page


@pytest.mark.parametrize("screen", [s.name for s in SCREENS])
def test_every_page_is_a_file_with_a_page_function(screen):
    import importlib

    assert callable(importlib.import_module(f"bitatlas.app.screens.{screen}").page)


@pytest.mark.parametrize(
    ("address", "title", "button"),
    [("library", "No model here yet", "Open the sample study"), ("run", "There is no model to measure yet", "Go to the library"),
     ("map", "No damage has been measured yet", "Measure a model"),
     ("allocators", "There is nothing to allocate with yet", "Measure a model"),
     ("compare", "There are no two allocations to compare yet", "Make an allocation")],
)  # fmt: skip
def test_empty_store(home, address, title, button):
    at = open_page(address)
    assert heading(at) == f"## {title}"
    labels = [b.label for b in at.button] + [e.proto.label for e in at.get("page_link")]
    assert button in labels
    assert not home.db.exists() or home.db.stat().st_size < 10 << 20


def test_library_lists_the_studies(filled):
    at = open_page("library")
    assert heading(at) == "## 2 of 2 models measured; moe-4x8 knows 2 metrics"
    table = at.dataframe[0].value
    assert sorted(table["model"]) == ["dense-6", "moe-4x8"]
    assert (table["coverage"] == 1.0).all()
    assert set(table["freshness"]) == {"checkpoint not found"}


def test_map_draws_and_names_the_answer(filled):
    at = open_page("map", study=filled[0], metric="fisher_projection", format="int4-g64")
    assert "carry half the damage of int4-g64" in heading(at)
    assert at.selectbox(key="study").value == filled[0]
    table = at.dataframe[0].value
    assert len(table) == 6 * 7 + 1
    assert table["value"].is_monotonic_decreasing


def test_map_opens_on_the_damage_to_solve_with_not_on_the_newest(filled, home):
    store, index = Store(home), index_of(filled[0])
    for name in ("fisher_scaled", "alphaq_alpha"):  # the newest comes first in the picker
        store.begin_run(f"late {name}", index.digest, name)
        store.write_step(
            f"late {name}", "a", [DamageRow(name, u, "int3-g64", 1.0) for u in index.unit_keys()]
        )
        store.finish_run(f"late {name}")
    at = open_page("map", study=filled[0])
    assert at.selectbox(key="metric").options.index("alphaq_alpha") == 0
    assert at.selectbox(key="metric").value == "fisher_scaled"


def test_map_deep_link_with_selection_and_pins(filled):
    at = open_page("map", study=filled[0], metric="fisher_projection", sel="1-3,8", pins="2=int8-g64")
    table = at.dataframe[0].value
    assert len(table) == 4
    assert sorted(p for p in table["pin"] if p) == ["int8-g64"]
    assert any("4 units" in m.value for m in at.markdown)
    at.button(key="clear_selection").click().run()
    assert len(at.dataframe[0].value) == 6 * 7 + 1


def test_map_pins_the_selection_and_takes_it_back(filled):
    at = open_page("map", study=filled[0], metric="fisher_projection", sel="1-3")
    at.selectbox(key="pin_format").set_value("int2-g64")
    at.button(key="pin").click().run()
    assert list(at.dataframe[0].value["pin"]) == ["int2-g64"] * 3
    at.button(key="undo").click().run()
    assert list(at.dataframe[0].value["pin"]) == [""] * 3
    at.button(key="redo").click().run()
    assert list(at.dataframe[0].value["pin"]) == ["int2-g64"] * 3
    at.button(key="free").click().run()
    assert list(at.dataframe[0].value["pin"]) == [""] * 3


def test_a_box_on_the_chart_selects_units(filled):
    at = open_page("map", study=filled[1], metric="fisher_projection", projection="down")
    points = [{"customdata": {"0": 20.0}}, {"customdata": {"0": 21.0}}]
    at.session_state["map_chart"] = {"selection": {"points": points}}
    at.run()
    assert not at.exception


def test_search_selects_by_regular_expression(filled):
    at = open_page("map", study=filled[0], metric="fisher_projection", search="layers.0.*proj")
    assert at.button(key="select_matches").label == "Select 7 matches"
    at.button(key="select_matches").click().run()
    assert len(at.dataframe[0].value) == 7
    at.text_input(key="search").set_value("layers[").run()
    assert any("regular expression is not valid" in e.value for e in at.error)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sel", "5-9999"), ("sel", "@0123456789abcdef"), ("pins", "1=int7"), ("budget", "lots")],
)
def test_a_broken_link_is_explained_and_the_page_still_draws(filled, key, value):
    at = open_page("map", study=filled[0], **{key: value})
    assert heading(at)
    assert key not in at.query_params


def test_changing_the_study_forgets_the_selection(filled):
    at = open_page("map", study=filled[0], metric="fisher_projection", sel="1-3")
    at.selectbox(key="study").set_value(filled[1]).run()
    assert len(at.dataframe[0].value) == 4 * (4 + 8 * 3) + 2


@pytest.mark.slow  # the first use of the metrics loads torch and transformers
def test_run_estimates_before_it_starts(filled, home, tiny_checkpoint, monkeypatch):
    from bitatlas.app import tasks

    index = tasks.register(tiny_checkpoint("llama"))
    at = open_page("run", study=f"{index.name}@{index.digest[:8]}", metrics="weight_error")
    assert "takes about" in heading(at)
    assert at.button(key="start").label == "Measure"
    assert any("bitatlas measure" in c.value and "--metric weight_error" in c.value for c in at.code)
    at.button(key="all_metrics").click().run()
    chosen = at.multiselect(key="metrics").value
    assert "fisher_projection" in chosen
    assert "routing" not in chosen
    assert "takes about" in heading(at)
    at.text_input(key="options").set_value("draws=abc").run()
    assert any("draws" in e.value and "whole number" in e.value for e in at.error)
    at.text_input(key="options").set_value("draws=1").run()
    asked = []
    monkeypatch.setattr(
        tasks, "submit_measure", lambda path, metrics, **options: asked.append(options) or "job"
    )
    for named in ("self", "datasets:wiki/raw:test", "/etc/passwd", "datasets:../secret"):
        at.text_input(key="calibration").set_value(named).run()
        at.toggle(key="per_document").set_value(True).run()
        at.button(key="start" if any(b.key == "start" for b in at.button) else "ask").click().run()
        if any(b.key == "start_long" for b in at.button):
            at.button(key="start_long").click().run()
    assert [o["calibration"] for o in asked] == ["self", "datasets:wiki/raw:test"]
    assert asked[0]["settings"] == {"draws": 1}
    assert asked[0]["text_mode"] == "document"
    assert any("outside the model roots" in e.value for e in at.error)
    line = next(c.value for c in at.code if "bitatlas measure" in c.value)
    assert "--text-mode document" in line
    assert "--set draws=1" in line
    at.number_input(key="seq_len").set_value(512).run()
    assert any("256 positions" in c.value for c in at.caption)
    at.multiselect(key="metrics").set_value([]).run()
    assert any("no metric is chosen" in e.value.lower() for e in at.error)


def test_allocators_solve_a_front_once(filled, home, monkeypatch):
    """What one server has solved, the next one reads."""
    before = open_page("allocators", study=filled[0]).dataframe[0].value
    store = Store(home)
    kept = [f for m in store.models() for f in store.frontiers(m["digest"])]
    assert {"hull", "mckp", "uniform"} <= {f["solver"] for f in kept}
    monkeypatch.setattr(fronts, "frontier", lambda *_, **__: pytest.fail("solved again"))
    after = open_page("allocators", study=filled[0]).dataframe[0].value
    assert after.equals(before)


def test_allocators_say_what_they_cost(filled, home):
    """A search's cost comes from its front; a solver that counts pairs is offered where probes are stored."""
    store, index = Store(home), index_of(filled[0])
    run = next(r for r in store.runs(index.digest) if r.metric == "fisher_projection")
    table = store.table(run.run, run.metric, index.unit_keys())
    pairs_title = SOLVERS["projection_descent"].TITLE
    assert pairs_title not in open_page("allocators", study=filled[0]).multiselect(key="allocators").options
    rng, shape = np.random.default_rng(0), table.damage.shape
    a = np.sqrt(2 * 32 * table.damage) * rng.normal(size=(16, *shape))
    ProbeMatrix(table.units, table.formats, a.astype(np.float32), np.ones((16, shape[0])), np.arange(16), np.full(16, 32.0),
                np.full((16, shape[0]), 32), table.damage).save(home.runs(run.run) / "probes.npz")  # fmt: skip
    choice = np.zeros((1, shape[0]), np.uint8)
    front = Frontier(table.units, table.formats, np.array([100_000]), np.array([0.4]), choice, "kl", "path", seconds=12.5, evaluations=9, tokens=32768)  # fmt: skip
    store.put_frontier(index.digest, front, "search-x")
    at = open_page("allocators", study=filled[0])
    assert pairs_title in at.multiselect(key="allocators").options
    at.multiselect(key="allocators").set_value(["hull", "projection_descent"]).run()
    assert not at.exception
    rows = at.dataframe[0].value.set_index("allocator")
    path = rows.loc["path (search)"]
    assert (path["seconds"], path["evaluations"], path["tokens"]) == (12.5, 9, 32768)
    pairs = rows.loc[pairs_title]
    assert pairs["gap"] >= 0
    assert pairs["evaluations"] > 0
    assert "pairs" in pairs["remark"]


def test_compare_with_the_unpinned_answer(filled):
    at = open_page("fit", study=filled[0], pins="2-9=int8-g64")
    ask = at.query_params["ask"]
    at = open_page("compare", study=filled[0], pins="2-9=int8-g64", ask=ask)
    assert at.selectbox(key="compare_a").value == "Fit, without the pins"
    assert float(re.search(r"damage is ([\d.]+) times", heading(at))[1]) > 1
    table = at.dataframe[0].value
    assert (table["A"] != table["B"]).all()
    at.button(key="compare_undo")
    at = open_page("compare", study=filled[0], ask=ask)
    assert heading(at) == "## Both give every unit the same bits"
    at = open_page("compare", study=filled[0], ask="[1,2")
    assert any("cannot be read" in e.value for e in [*at.error, *at.markdown])


def test_allocators_overlay_and_rank(filled):
    at = open_page("allocators", study=filled[0])
    assert "above the lower bound" in heading(at)
    table = at.dataframe[0].value
    assert {"Uniform", "Exact"} & {w.split()[0] for w in table["allocator"]}
    judged = table["gap"].dropna()
    assert judged.is_monotonic_increasing
    assert (judged >= 0).all()


def test_long_selections_are_kept_on_the_shelf(home):
    from bitatlas.app.shelf import INLINE, Shelf

    shelf = Shelf(home.root / "views")
    text = Selection.of(range(0, 4000, 7)).encode() + "," + ",".join(str(i * i) for i in range(90))
    assert len(text) > INLINE
    word = shelf.put(text)
    assert word.startswith("@")
    assert shelf.get(word) == text
    assert shelf.put(text) == word
    assert len(list((home.root / "views").iterdir())) == 1
    assert state.KEYS[0] == "sel"


def test_k_and_v_by_layer_move_the_memory_bar(filled):
    def cache_bytes(**query: str) -> str:
        at = open_page("fit", study=filled[0], context="256", **query)
        assert not at.exception
        return next(c.value for c in at.caption if "of cache" in c.value)

    assert "K 16, V 16 bits" in cache_bytes()
    assert "K 8, V 4 bits" in cache_bytes(kv_preset="K 8 / V 4")
    words = cache_bytes(kv_preset="layer by layer", kv_plan="0-2=8/8;3=4/2")
    assert "9.8 bits on average" in words  # (3 x 16 + 6 + 2 x 32) / 12
    at = open_page("fit", study=filled[0], context="256", kv_preset="layer by layer", kv_plan="0-2=8/8;3=4/2")
    assert any("--kv-plan '0-2=8/8;3=4/2'" in c.value for c in at.code)
    assert "0-2=8/8;3=4/2" in at.query_params["ask"]
    wrong = open_page("fit", study=filled[0], context="256", kv_preset="layer by layer", kv_plan="9=8/8")
    assert any("cannot be read" in e.value for e in wrong.error)


def test_export_shows_the_notes_and_the_refused_units(filled, home):
    from bitatlas.analysis.schema import Allocation

    index = index_of(filled[0])
    formats = {u.key: "bf16" if u.layer < 0 else "int5-g32-sym" for u in index.units}
    made = Allocation(index.digest, index.name, formats, 1, index.kept_bytes, 5.5, solver="made")
    Store(home).put_allocation(made)
    at = open_page("export", study=filled[0])
    at.selectbox(key="target").set_value("vllm").run()
    assert heading(at) == "## vLLM (compressed-tensors) loads and serves this allocation"
    assert any("Humming" in c.value for c in at.caption)
    assert any("of weights in the engine's container" in s.value for s in at.success)
    assert not any("planned" in d.value for d in at.dataframe)
    at.selectbox(key="target").set_value("gptqmodel").run()
    assert "cannot load" in heading(at)
    refused = next(d.value for d in at.dataframe if "planned" in d.value)
    assert set(refused["planned"]) == {"int5-g32-sym"}


def test_fit_solves_under_an_engine_and_under_limits_on_groups(filled, home):
    from bitatlas.analysis.schema import FORMATS

    index, store = index_of(filled[0]), Store(home)

    def plan(**query):
        at = open_page("fit", study=filled[0], context="0", **query)
        before = {a.id for a in store.allocations(index.digest)}
        at.button(key="keep_allocation").click().run()
        (new,) = {a.id for a in store.allocations(index.digest)} - before
        return at, store.allocation(new)

    _, free = plan()
    at, limited = plan(fit_groups="role", fit_limits="down=2.5")
    down = [u for u in index.units if u.role == "down"]

    def bits(of):
        return sum(8 * FORMATS[of.formats[u.key]].payload_bytes(u.rows, u.cols) for u in down) / sum(
            u.params for u in down
        )

    assert bits(limited) <= 2.5 < bits(free)
    assert any("--expert-groups role --group-limit down=2.5" in c.value for c in at.code)
    at, served = plan(fit_target="vllm")
    assert served.provenance.settings["target"] == "vllm"
    assert any("--target vllm" in c.value for c in at.code)
    fused = {(u.layer, served.formats[u.key]) for u in index.units if u.role in ("q", "k", "v")}
    assert len(fused) == index.n_layers  # one format a layer, as the engine fuses them
    wrong = open_page("fit", study=filled[0], fit_groups="role", fit_limits="nobody=3")
    assert any("no group called" in e.value for e in wrong.error)
