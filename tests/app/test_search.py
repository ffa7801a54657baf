"""The search job, run inline: rows, resuming, what it leaves; the task's checks."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bitatlas.analysis.schema import Allocation, DamageRow, KvLayout, UserError, kv_unit
from bitatlas.app.cli_io import emit
from bitatlas.app.kv_plan import kv_pairs
from bitatlas.app.tasks import searching
from bitatlas.app.tasks.describing import describe_allocation
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.refining import submit_refine
from bitatlas.app.tasks.solving import solve
from bitatlas.app.work.recorder import packed_choice, unpacked_choice
from bitatlas.app.work.search import SearchWork
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

FORMATS = "int{2,3,4,8}-g64"
SMALL = {"offspring": 4, "survivors": "2/1", "tokens": "48/96", "initial": 3, "initial_tokens": 48}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A data folder, a model, a text, and `submit` that keeps the parameters instead of starting a worker."""
    folder = tmp_path_factory.mktemp("home")
    text = folder / "text.txt"
    words = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are", "as", "with"]
    text.write_text(
        "\n".join(" ".join(words[(i * 7 + j * j * 3) % len(words)] for j in range(30)) for i in range(60))
    )
    kept: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITATLAS_HOME", str(folder))
        patch.setattr(searching, "submit", lambda kind, params, title: kept.append(params) or "job")
        model = tiny_checkpoint("qwen3_moe")
        index, store = register(model), Store(Home.default())
        rng = np.random.default_rng(0)
        run = "run-of-the-test"
        store.begin_run(run=run, model_digest=index.digest, metric="weight_error", settings={}, calibration="", provenance={},
                        formats=[f"int{b}-g64" for b in (2, 3, 4, 8)])  # fmt: skip
        scale = rng.lognormal(0, 1, len(index.units))
        store.write_step(run, "all", [DamageRow("weight_error", u.key, f"int{b}-g64", float(s * 4.0**-b), 0.0, 1, 0.0)
                                      for u, s in zip(index.units, scale) for b in (2, 3, 4, 8)])  # fmt: skip
        store.finish_run(run)
        yield {"model": model, "text": text, "kept": kept, "index": index, "folder": folder}


def params(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Parameters of a search as the job gets them: through JSON."""
    options = {
        "bits": 4.0,
        "solver": "evopress",
        "formats": FORMATS,
        "calibration": case["text"],
        "tokens": 192,
        "seq_len": 24,
    } | options
    searching.submit_search(case["model"], **options)
    return json.loads(json.dumps(case["kept"][-1]))


def finished(work: SearchWork) -> dict[str, Any]:
    for key in work.plan():
        work.run(key)
    return work.finish()


@pytest.fixture(scope="module")
def evolved(case: dict[str, Any]) -> dict[str, Any]:
    p = params(case, solver="evopress", steps=2, settings=SMALL)
    work = SearchWork(p, Home.default())
    return {"params": p, "work": work, "result": finished(work)}


def test_every_candidate_is_a_row(case: dict[str, Any], evolved: dict[str, Any]):
    work, result = evolved["work"], evolved["result"]
    rows = Store(Home.default()).candidates(result["candidates"])
    # 3 starts, then 4 offspring and 2 + the parent in each of two generations.
    assert len(rows) == 3 + 2 * (4 + 3)
    assert all(r.payload_bytes <= work.problem.limit_bytes and np.isfinite(r.objective) for r in rows)
    for row in rows[:3]:
        choice = unpacked_choice(row.extra["choice"])
        assert work.problem.payload(choice) == row.payload_bytes
    assert max(r.extra["forward_equivalents"] for r in rows) == result["forward_equivalents"]
    assert result["forward_tokens"] == (3 + 1) * 48 + 2 * ((4 + 1) * 48 + (3 + 1) * 96)


def test_the_tokens_told_beforehand_are_those_that_were_spent(case: dict[str, Any], evolved: dict[str, Any]):
    told = searching.search_tokens("evopress", tokens=192, steps=2, settings=SMALL)
    assert told == evolved["result"]["forward_equivalents"]
    # The published schedule, read with a pool that holds its longest text.
    assert (
        searching.search_tokens("evopress", tokens=1 << 20, steps=1)
        == 33 * 2048 + 129 * 2048 + 17 * 16384 + 6 * 131072
    )


def test_a_pool_shorter_than_the_schedule_is_said(evolved: dict[str, Any]):
    assert evolved["result"]["notes"] == []
    (note,) = searching.text_notes("evopress", 65536, {})
    assert "131,072" in note
    assert "65,536" in note
    assert "--tokens 131072" in note
    assert searching.text_notes("evopress", 131072, {}) == []
    assert searching.text_notes("evopress", 65536, {"scale": 0.5}) == []
    assert searching.text_notes("random_search", 1 << 20, {}) == []


def test_a_short_pool_is_a_note_of_the_result(case: dict[str, Any]):
    work = SearchWork(params(case, steps=1, tokens=72, settings=SMALL), Home.default())
    result = finished(work)
    assert "texts of 96 tokens and the pool has 72" in result["notes"][0]
    told = Store(Home.default()).allocation(result["allocation"]).provenance.settings["search"]
    assert told["notes"] == result["notes"]


def test_path_is_the_default(case: dict[str, Any]):
    searching.submit_search(
        case["model"], metric="weight_error", bits=3.5, formats=FORMATS, calibration=case["text"], tokens=192
    )
    assert case["kept"][-1]["solver"] == "path"


def test_candidates_can_be_followed_while_it_runs(evolved: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    jobs = SimpleNamespace(job=lambda job: SimpleNamespace(params=evolved["params"]))
    monkeypatch.setattr(searching, "the_jobs", lambda: jobs)
    found = searching.search_candidates("any")
    assert len(found) == len(Store(Home.default()).candidates(evolved["result"]["candidates"]))
    spent = [row["forward_equivalents"] for row in found]
    assert spent == sorted(spent)
    assert {row["step"] for row in found} == {0, 1, 2}


def printed(described: dict[str, Any]) -> str:
    with io.StringIO() as out, contextlib.redirect_stdout(out):
        emit(described, False, "allocation")
        return out.getvalue()


def test_what_it_leaves(case: dict[str, Any], evolved: dict[str, Any]):
    store, result = Store(Home.default()), evolved["result"]
    allocation = store.allocation(result["allocation"])
    allocation.check_model(case["index"])
    assert allocation.solver == "evopress"
    assert allocation.predicted == result["kl"] > 0
    assert (allocation.metric, allocation.searched) == ("kl", True)
    words = printed(describe_allocation(allocation))
    assert f"measured KL {result['kl']:.4g} nats per token on the search's text" in words
    assert "predicted" not in words
    assert (
        allocation.weights_bytes
        <= evolved["params"]["limit_bytes"] + case["index"].kept_bytes
        == allocation.budget.weights_bytes
    )
    front = store.frontier(result["frontier"])
    assert (front.evaluations, front.tokens) == (result["evaluations"], result["forward_equivalents"])
    assert front.seconds > 0
    assert (np.diff(front.payload_bytes) > 0).all()
    assert (np.diff(front.predicted) < 0).all()


def test_a_killed_search_goes_on_where_it_was(case: dict[str, Any], evolved: dict[str, Any]):
    """Steps whose file is gone are computed again, to the same numbers; rows are not doubled."""
    work, result = evolved["work"], evolved["result"]
    folder = Home.default().runs(result["candidates"])
    before = len(Store(Home.default()).candidates(result["candidates"]))
    files = sorted(folder.glob("*.npz"), key=lambda f: f.stat().st_mtime)
    for file in files[1:]:
        file.unlink()
    again = SearchWork(evolved["params"], Home.default())
    again.run(again.plan()[-1])  # the last step only: what is missing before it is made first
    assert finished(again)["kl"] == result["kl"]
    assert again.finish()["allocation"] == result["allocation"]
    assert len(Store(Home.default()).candidates(result["candidates"])) == before
    assert work.plan() == again.plan()


def test_refining_starts_from_the_plan_and_uses_its_budget(case: dict[str, Any]):
    plan = solve(case["model"], metric="weight_error", bits=4.0, formats=FORMATS)
    submit_refine(case["model"], plan, calibration=case["text"], tokens=192, seq_len=24, rounds=2)
    p = case["kept"][-1]
    work = SearchWork(p, Home.default())
    result = finished(work)
    refined = Store(Home.default()).allocation(result["allocation"])
    assert refined.solver == "mckp+refine"
    assert refined.payload_bytes <= plan.budget.weights_bytes - plan.kept_bytes == p["limit_bytes"]
    assert result["kl"] <= result["kl_before"]
    assert result["backward_tokens"] > 0
    # Refining what was refined is possible: what it was measured by is still known.
    assert (refined.metric, refined.provenance.settings["metric"]) == ("kl", "weight_error")
    submit_refine(case["model"], refined, calibration=case["text"], tokens=192, seq_len=24, rounds=1)
    assert (case["kept"][-1]["run"], case["kept"][-1]["metric"]) == (p["run"], "weight_error")
    # As it was before a search said that its KL is measured.
    older = replace(refined, metric="weight_error", provenance=replace(refined.provenance, settings={
        k: v for k, v in refined.provenance.settings.items() if k != "metric"}))  # fmt: skip
    older = Allocation.from_json(older.to_json())
    assert older.searched
    submit_refine(case["model"], older, calibration=case["text"], tokens=192, seq_len=24, rounds=1)
    assert case["kept"][-1]["metric"] == "weight_error"


def test_a_search_fits_weights_and_cache_into_a_memory(case: dict[str, Any]):
    plan = solve(case["model"], metric="weight_error", bits=4.0, formats=FORMATS)
    memory = {"context": 64, "batch": 2, "reserve": 0, "bits": None}
    wide = params(case, fit=10 * plan.weights_bytes, **memory)
    narrow = params(case, fit=10 * plan.weights_bytes, kv_plan="8/4", **memory)
    kv, layout = case["index"].kv, KvLayout()
    pairs = kv_pairs(case["index"], "8/4")
    assert narrow["limit_bytes"] - wide["limit_bytes"] == kv.plan_bytes({}, 64, 2, layout) - kv.plan_bytes(pairs, 64, 2, layout) > 0  # fmt: skip
    assert wide["kv"] == {}
    found = finished(SearchWork(params(case, solver="random_search", steps=0, fit=3 * plan.weights_bytes, kv_plan="8/4", settings={"samples": 2, "tokens": 48, "final_tokens": 48}, **memory), Home.default()))  # fmt: skip
    pair = ("kv8-channel", "kv4-token")
    assert Store(Home.default()).allocation(found["allocation"]).kv == dict.fromkeys(kv.layers, pair)
    with pytest.raises(UserError, match="bits twice"):
        params(case, fit=10**9, kv_bits=8, kv_plan="8/4", **memory)


def test_refining_keeps_the_cache_of_the_plan(case: dict[str, Any]):
    plan = solve(case["model"], metric="weight_error", fit="1GiB", context=64, kv_plan="4/2", formats=FORMATS)
    submit_refine(case["model"], plan, calibration=case["text"], tokens=192, seq_len=24, rounds=0)
    result = finished(SearchWork(json.loads(json.dumps(case["kept"][-1])), Home.default()))
    assert Store(Home.default()).allocation(result["allocation"]).kv == plan.kv != {}


@pytest.mark.parametrize("old", [False, True])
def test_refining_a_plan_of_weights_and_cache(case: dict[str, Any], old: bool):
    index, store = case["index"], Store(Home.default())
    layout = KvLayout(32, 0)
    rows = [
        DamageRow("kv_output", kv_unit(layer), f"kv{k}-channel/kv{v}-token", 4.0**-k + 4.0**-v, count=1)
        for layer in index.kv.layers for k in (2, 4, 8) for v in (2, 4, 8)
    ]  # fmt: skip
    if "kv-run" not in [r.run for r in store.runs(index.digest)]:
        store.begin_run(
            "kv-run", index.digest, "kv_output", settings={"kv_block": 32, "kv_residual": 0}, formats=("kv2",)
        )
        store.write_step("kv-run", "all", rows)
        store.finish_run("kv-run")
    wide = solve(case["model"], metric="weight_error", bits=4.0, formats=FORMATS).weights_bytes
    plan = solve(
        case["model"],
        metric="weight_error",
        fit=wide + 28_000,
        context=512,
        reserve=0,
        kv=True,
        formats=FORMATS,
    )
    assert (plan.metric, plan.kv_layout) == ("weight_error+kv_output", layout)
    assert plan.kv
    if old:
        kept = {k: v for k, v in plan.provenance.settings.items() if k != "metric"}
        plan = replace(plan, provenance=replace(plan.provenance, settings=kept))
    submit_refine(case["model"], plan, calibration=case["text"], tokens=192, seq_len=24, rounds=0)
    assert case["kept"][-1]["metric"] == "weight_error"
    result = finished(SearchWork(json.loads(json.dumps(case["kept"][-1])), Home.default()))
    refined = store.allocation(result["allocation"])
    assert (refined.kv, refined.kv_layout) == (plan.kv, layout)
    assert refined.weights_bytes + plan.budget.kv_bytes <= wide + 28_000


def test_a_policy_is_a_file_that_another_search_applies_unchanged(case: dict[str, Any]):
    small = {"episodes": 2, "tokens": 24, "judge_tokens": 48, "updates": 2, "hidden": 8}
    trained = finished(SearchWork(params(case, solver="ramp", steps=1, settings=small), Home.default()))
    path = Path(trained["policy"])
    assert json.loads(path.with_suffix(".json").read_text())["trained_on"] == case["index"].name
    applied = params(case, solver="ramp", steps=0, settings={"hidden": 8}, policy=path, bits=5.0)
    result = finished(SearchWork(applied, Home.default()))
    assert result["evaluations"] == 1
    before, after = load_file(path), load_file(result["policy"])
    assert all((before[k] == after[k]).all() for k in before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "mckp"}, "no search called"),
        ({"solver": "refine"}, "fisher has not been measured"),
        ({"metric": "fisher"}, "not been measured"),
        ({"bits": 1.0}, "smallest"),
        ({"settings": {"groups": "colour"}}, "schedule"),
        ({"policy": "nowhere.safetensors"}, "policy"),
        ({"calibration": None}, "calibration text"),
        ({"pins": ["no_such_unit=int4-g64"]}, "matches no unit"),
    ],
)
def test_what_cannot_be_is_said_before_the_job(case: dict[str, Any], options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        params(case, **options)


def test_choices_survive_the_store():
    choice = np.random.default_rng(0).integers(0, 7, 300)
    assert (unpacked_choice(packed_choice(choice)) == choice).all()
