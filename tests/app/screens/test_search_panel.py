"""A search begun and followed on the Allocators page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app import tasks
from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.views.fit_controls import Asked, encode_question
from bitatlas.app.widgets import search_panel
from tests.app.screens.pages import index_of, open_page

ASKED = Asked("fisher_projection", ("int2-g64", "int4-g64"), 2_000_000, 256, 2, "8/4", 5000, "vllm")


def test_without_a_question_the_fit_page_is_named(filled):
    at = open_page("allocators", study=filled[0])
    assert "Ask on the Fit page" in [e.proto.label for e in at.get("page_link")]
    assert "start_search" not in [b.key for b in at.button]


def test_a_search_is_begun_for_the_question_of_fit(filled, monkeypatch):
    begun: list[dict] = []

    def submit(model, **options):
        begun.append(options)
        return "job1"

    monkeypatch.setattr(tasks, "submit_search", submit)
    at = open_page(
        "allocators", study=filled[0], ask=encode_question(ASKED), pins="2-3=int8-g64", search="evopress"
    )
    told = next(c.value for c in at.caption if "forward-equivalent" in c.value)
    assert f"{tasks.search_tokens('evopress'):,}" in told
    at.number_input(key="search_steps_evopress").set_value(3).run()
    at.button(key="start_search").click().run()
    assert not at.exception
    asked = begun[0]
    want = {"solver": "evopress", "steps": 3, "fit": 2_000_000, "context": 256, "batch": 2, "kv_plan": "8/4", "reserve": 5000,
            "formats": ASKED.formats, "target": "vllm"}  # fmt: skip
    assert {name: asked[name] for name in want} == want
    assert set(asked["pins"].values()) == {"int8-g64"}
    assert len(asked["pins"]) == 2
    assert at.query_params["job"] in ("job1", ["job1"])
    line = next(c.value for c in at.code if "bitatlas search" in c.value)
    assert "--solver evopress" in line
    assert "--generations 3" in line
    assert "--pin" in line


def test_the_limits_on_groups_of_fit_go_with_it(filled, monkeypatch):
    begun: list[dict] = []
    monkeypatch.setattr(tasks, "submit_search", lambda model, **options: begun.append(options) or "job1")
    limited = replace(ASKED, groups="role", group_limits=("down=3", "*=5"))
    at = open_page("allocators", study=filled[0], ask=encode_question(limited))
    assert any("keeps to down=3, *=5" in c.value for c in at.caption)
    line = next(c.value for c in at.code if "bitatlas search" in c.value)
    assert "--expert-groups role --group-limit down=3 --group-limit '*=5'" in line
    at.button(key="start_search").click().run()
    assert begun[0]["experts"] == limited.rules
    assert begun[0]["experts"].limits == ("down=3", "*=5")


def test_what_a_search_cannot_take_is_told_on_the_page(filled, monkeypatch):
    def refuse(model, **options):
        raise UserError("searching needs a calibration text")

    monkeypatch.setattr(tasks, "submit_search", refuse)
    at = open_page("allocators", study=filled[0], ask=encode_question(ASKED))
    at.button(key="start_search").click().run()
    assert any("needs a calibration text" in e.value for e in at.error)


@pytest.mark.parametrize(("state", "seen"), [("running", True), ("cancelled", True), ("done", False)])
def test_the_front_of_an_unfinished_search_is_shown(filled, monkeypatch, state, seen):
    jobs = [JobStatus("j", "search", "EvoPress on dense-6", {"digest": index_of(filled[0]).digest, "solver": "evopress"}, state),
            JobStatus("k", "search", "of another model", {"digest": "x", "solver": "evopress"}, "running")]  # fmt: skip
    rows = [
        {"payload_bytes": b, "kl": k, "tokens": 64, "forward_equivalents": n}
        for b, k, n in ((100, 0.5, 64), (200, 0.25, 128))
    ]
    monkeypatch.setattr(search_panel, "jobs_now", lambda: jobs)
    monkeypatch.setattr(search_panel, "follow", lambda: None)
    monkeypatch.setattr(tasks, "search_candidates", lambda job: rows)
    at = open_page("allocators", study=filled[0])
    words = [m.value for m in at.markdown if "measured KL 0.25" in m.value]
    assert bool(words) == seen
    assert all(state in w for w in words)
    assert len(words) < 2  # the other model's is not shown
