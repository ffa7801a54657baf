"""Searches on the real model under limits on groups of experts, floors and ties."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bitatlas.analysis.schema import DamageRow, UserError, parse_format
from bitatlas.app import tasks
from bitatlas.app.cli import app
from bitatlas.app.expert_rules import ExpertRules
from bitatlas.app.tasks import searching
from bitatlas.app.tasks.refining import submit_refine
from bitatlas.app.tasks.solving import solve
from bitatlas.app.work.recorder import unpacked_choice
from bitatlas.app.work.search import SearchWork
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store
from bitatlas.solvers import certify
from tests.app.test_search import FORMATS, SMALL, case, finished, params

__all__ = ["case"]

RULES = ExpertRules("frequency:2", ("q1=4.2", "q2=5.0"), ties="gate-up")


def routed(case: dict[str, Any], run: str, order: int) -> None:
    """A finished measurement of routing in which expert e is reached ``10 * order * (e + 1)`` times, plus 100."""
    store, index = Store(Home.default()), case["index"]
    store.begin_run(run, index.digest, "routing", settings={}, formats=("-",))
    store.write_step(run, "all", [
        DamageRow("routing_count", u.key, "-", 100.0 + 10 * order * (u.expert + 1), count=1) for u in index.units if u.expert >= 0
    ])  # fmt: skip
    store.finish_run(run)


@pytest.fixture(scope="module")
def rules(case: dict[str, Any]) -> ExpertRules:
    """Rules by how often experts are chosen; the expert with the lowest number is the rarest."""
    routed(case, "routing-first", 1)
    return RULES


def bits_of(case: dict[str, Any], formats: dict[str, str], experts: set[int]) -> float:
    """Effective bits of some experts."""
    units = [u for u in case["index"].units if u.expert in experts]
    taken = sum(parse_format(formats[u.key]).payload_bytes(u.rows, u.cols) for u in units)
    return taken * 8 / sum(u.params for u in units)


def halves(case: dict[str, Any]) -> tuple[set[int], set[int]]:
    numbers = sorted({u.expert for u in case["index"].units if u.expert >= 0})
    return set(numbers[: len(numbers) // 2]), set(numbers[len(numbers) // 2 :])


def holds(case: dict[str, Any], formats: dict[str, str]) -> bool:
    rare, often = halves(case)
    tied = all(f == formats[k.replace("gate", "up")] for k, f in formats.items() if k.endswith("gate"))
    return bits_of(case, formats, rare) <= 4.2 and bits_of(case, formats, often) <= 5.0 and tied


def test_every_candidate_and_the_answer_keep_the_rules(case: dict[str, Any], rules: ExpertRules):
    free = finished(SearchWork(params(case, bits=5.0, steps=1, settings=SMALL), Home.default()))
    store = Store(Home.default())
    assert not holds(case, store.allocation(free["allocation"]).formats)
    p = params(case, bits=5.0, steps=2, settings=SMALL, experts=rules)
    work = SearchWork(p, Home.default())
    result = finished(work)
    found = store.allocation(result["allocation"])
    assert holds(case, found.formats)
    assert found.provenance.settings["experts"] == rules.settings()["experts"] | {
        "limits": list(rules.limits)
    }
    rows = store.candidates(result["candidates"])
    assert len(rows) == 3 + 2 * (4 + 3)
    for row in rows:
        choice = unpacked_choice(row.extra["choice"])
        assert certify(work.problem, choice).feasible
        assert holds(case, {u: work.problem.formats[j] for u, j in zip(work.problem.units, choice)})
    front = store.frontier(result["frontier"])
    assert all(holds(case, dict(zip(front.units, np.array(front.formats)[c]))) for c in front.choice)


def test_without_rules_the_question_and_its_key_are_what_they_were(case: dict[str, Any], rules: ExpertRules):
    assert params(case, bits=5.0, steps=1) == params(case, bits=5.0, steps=1, experts=ExpertRules())
    assert not {"experts", "rules_seed", "evidence"} & params(case, bits=5.0, steps=1).keys()
    with_rules = params(case, bits=5.0, steps=1, experts=rules)
    assert searching.search_run(with_rules) != searching.search_run(params(case, bits=5.0, steps=1))


def test_a_search_that_goes_on_has_the_groups_that_it_began_with(case: dict[str, Any], rules: ExpertRules):
    p = params(case, bits=5.0, steps=2, settings=SMALL, experts=rules, seed=3)
    expected = finished(SearchWork(p, Home.default()))
    before = SearchWork(p, Home.default()).problem
    for file in sorted(
        Home.default().runs(expected["candidates"]).glob("*.npz"), key=lambda f: f.stat().st_mtime
    )[1:]:
        file.unlink()
    # Measured again in between, with the traffic turned round: a new question would have other groups.
    routed(case, "routing-second", -1)
    assert params(case, bits=5.0, steps=2, settings=SMALL, experts=rules, seed=3)["evidence"] != p["evidence"]
    again = SearchWork(p, Home.default())
    assert [(s.cost == t.cost).all() for s, t in zip(before.side, again.problem.side)] == [True, True]
    result = finished(again)
    assert (result["kl"], result["allocation"]) == (expected["kl"], expected["allocation"])
    assert holds(case, Store(Home.default()).allocation(result["allocation"]).formats)
    routed(case, "routing-third", 1)


def test_floors_bind_rare_experts(case: dict[str, Any], rules: ExpertRules):
    floor = ExpertRules(floor="int4-g64", below=115)  # expert 0 is reached 110 times, the next 120
    small = {"samples": 3, "tokens": 48, "final_tokens": 48}
    p = params(case, solver="random_search", steps=1, settings=small, experts=floor, bits=5.0)
    found = Store(Home.default()).allocation(finished(SearchWork(p, Home.default()))["allocation"]).formats
    first = [u.key for u in case["index"].units if u.expert == 0]
    assert {found[k] for k in first} <= {"int4-g64", "int8-g64"}
    assert any(found[u.key] < "int4" for u in case["index"].units if u.expert > 0)


def test_a_start_that_breaks_a_limit_is_left_out_and_told(case: dict[str, Any], rules: ExpertRules):
    wide = solve(case["model"], metric="weight_error", bits=5.0, formats=FORMATS)
    assert not holds(case, wide.formats)
    small = {"samples": 2, "tokens": 48, "final_tokens": 48}
    p = params(case, bits=5.0, solver="random_search", steps=0, settings=small, experts=rules, start=[wide])
    result = finished(SearchWork(p, Home.default()))
    assert any("left out: " in note for note in result["notes"])
    assert holds(case, Store(Home.default()).allocation(result["allocation"]).formats)


def test_refining_keeps_the_rules_of_the_plan(case: dict[str, Any], rules: ExpertRules):
    plan = solve(case["model"], metric="weight_error", bits=5.0, formats=FORMATS, experts=rules, seed=5)
    submit_refine(case["model"], plan, calibration=case["text"], tokens=192, seq_len=24, rounds=2)
    p = json.loads(json.dumps(case["kept"][-1]))
    assert ExpertRules.of(p["experts"]) == rules
    assert p["rules_seed"] == 5
    result = finished(SearchWork(p, Home.default()))
    assert result["notes"] == []
    refined = Store(Home.default()).allocation(result["allocation"])
    assert holds(case, refined.formats)
    assert np.isfinite(result["kl_before"])
    submit_refine(case["model"], refined, calibration=case["text"], tokens=192, seq_len=24, rounds=0)
    assert ExpertRules.of(case["kept"][-1]["experts"]) == rules
    tied = replace(rules, limits=(), groups="")
    plan = solve(case["model"], metric="weight_error", bits=5.0, formats=FORMATS, experts=tied)
    submit_refine(case["model"], plan, calibration=case["text"], tokens=192, seq_len=24, rounds=0)
    assert ExpertRules.of(case["kept"][-1]["experts"]).ties == "gate-up"


def test_groups_by_damage_take_a_measured_one(case: dict[str, Any], rules: ExpertRules):
    by_damage = ExpertRules("damage:2", ("q1=4.2",))
    assert params(case, bits=5.0, experts=by_damage, metric="weight_error")["metric"] == "weight_error"
    with pytest.raises(UserError, match="fisher has not been measured"):
        params(case, bits=5.0, experts=by_damage)
    with pytest.raises(UserError, match="no evidence to cluster"):
        params(case, bits=5.0, experts=ExpertRules("cluster:2", ("c1=5",)))
    clusters = params(case, bits=5.0, experts=ExpertRules("cluster:2", ("c1=5",)), metric="weight_error")
    assert (clusters["metric"], clusters["solver"]) == ("weight_error", "evopress")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (ExpertRules("layer", ("0=1",)), "cannot be met"),
        (ExpertRules("frequency:2", ("q7=3",)), "no group called"),
        (ExpertRules("", ("q1=4.2",)), "need a way to group"),
        (ExpertRules("frequency:2", ("q1=4.2",), ties="layer"), "different groups"),
        (ExpertRules("somehow", ("q1=4.2",)), "cannot be grouped"),
    ],
)
def test_rules_that_cannot_be_are_said_before_the_job(case: dict[str, Any], rules: ExpertRules, words: str):
    count = len(case["kept"])
    with pytest.raises(UserError, match=words):
        params(case, bits=5.0, experts=rules)
    assert len(case["kept"]) == count


def test_the_command_line_hands_the_rules_on(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def search(model: str, **options: Any) -> dict[str, Any]:
        searching.submit_search(
            model, **{k: v for k, v in options.items() if k not in ("output", "wait", "on_progress")}
        )
        asked.append(case["kept"][-1])
        return {"id": "job", "kind": "search", "title": "t", "state": "queued"}

    monkeypatch.setattr(tasks, "search", search)
    line = ["search", str(case["model"]), "--solver", "random_search", "--bits", "5", "--formats", FORMATS, "--calibration", str(case["text"]),
            "--tokens", "192", "--seq-len", "24", "--expert-groups", "frequency:2", "--group-limit", "q1=4.2", "--group-limit", "q2=5.0",
            "--rare-floor", "int3-g64", "--rare-below", "5", "--expert-ties", "gate-up", "--detach", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert ExpertRules.of(asked[0]["experts"]) == replace(RULES, floor="int3-g64", below=5)
    refused = CliRunner().invoke(app, [*line[:-2], "--expert-ties", "layer"])
    assert refused.exit_code == 2
    assert "different groups" in refused.output
