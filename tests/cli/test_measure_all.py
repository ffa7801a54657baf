"""``--metric all``: every metric that applies to the model, the others named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitatlas.analysis.metrics import METRICS
from bitatlas.app import tasks
from bitatlas.app.cli import app
from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.tasks import estimating, measuring
from bitatlas.app.tasks.measuring import measure_params

MOE_ONLY = {"routing", "coactivation", "expert_error", "topk_flip"}
OPTIONS: dict[str, Any] = {"formats": "int4-g64", "tokens": 64, "seq_len": 16}


@pytest.mark.parametrize(("family", "missing"), [("llama", MOE_ONLY), ("mixtral", set())])
def test_all_is_what_applies(
    home: Path, tiny_checkpoint: Callable[..., Path], text: Path, family: str, missing: set[str]
):
    model = tiny_checkpoint(family)
    names, skipped = tasks.applicable_metrics(model, calibration=text, **OPTIONS)
    assert set(names) | set(skipped) == set(METRICS)
    assert not set(names) & set(skipped)
    assert missing <= set(skipped)
    assert MOE_ONLY - missing <= set(names)
    assert all("no routed experts" in skipped[name] for name in missing)
    request = measure_params(model, "all", calibration=text, seed=0, settings=None, **OPTIONS)
    assert request["metrics"] == list(names)
    # Cheap answers come first.
    reads_nothing = [METRICS[n].NEEDS == "weights" for n in names]
    assert reads_nothing == sorted(reads_nothing, reverse=True)


def test_without_a_text_only_the_weights_are_measured(
    cli: Callable[..., Any], tiny_checkpoint: Callable[..., Path]
):
    model = tiny_checkpoint("llama")
    names, skipped = tasks.applicable_metrics(model, **OPTIONS)
    assert {METRICS[n].NEEDS for n in names} == {"weights"}
    assert "calibration text" in skipped["lim"]
    rows = cli("estimate", model, "--metric", "all", "--formats", "int4-g64", "--tokens", 64)
    by_name = {r["metric"]: r for r in rows}
    assert by_name.pop("loading")["seconds"] > 1
    assert set(by_name) == set(METRICS)
    for name, row in by_name.items():
        assert (row["seconds"] is None) == bool(row["skipped"]) == (name in MOE_ONLY)


def test_the_estimate_of_all_is_of_what_will_be_measured(
    home: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """Without a text the metrics that read one are left out, so they cost nothing; all of them are looked at once."""
    model, told, looked = tiny_checkpoint("llama"), list[dict[str, Any]](), list[str]()
    found = measuring.applicable_metrics
    monkeypatch.setattr(measuring, "applicable_metrics", lambda *a, **k: looked.append("") or found(*a, **k))
    monkeypatch.setattr(estimating, "applicable_metrics", measuring.applicable_metrics)
    monkeypatch.setattr(measuring, "submit", lambda kind, params, title: "job")
    monkeypatch.setattr(
        measuring, "submit_and_wait", lambda job, *_: JobStatus(job, "measure", "", {}, "queued")
    )
    done = CliRunner().invoke(app, ["measure", str(model), "--metric", "all", "--formats", "int4-g64", "--tokens", "64", "--seq-len", "16"])  # fmt: skip
    assert done.exit_code == 0
    assert "estimate: about" in done.stderr
    assert "tokens through the model" not in done.stderr
    assert len(looked) == 1
    assert set(tasks.measure(model, "all", on_estimate=told.append, **OPTIONS)["skipped"]) > MOE_ONLY
    assert told[0]["forward_tokens"] == told[0]["backward_tokens"] == 0 < told[0]["steps"]


@pytest.mark.slow  # starts a worker
def test_a_job_of_everything_without_text_says_what_it_left_out(
    home: Path, tiny_checkpoint: Callable[..., Path]
):
    done = tasks.measure(tiny_checkpoint("llama"), "all", wait=True, **OPTIONS)
    assert done["state"] == "done"
    assert set(done["result"]["runs"]) == {n for n, m in METRICS.items() if m.NEEDS == "weights"}
    assert set(done["skipped"]) == {n for n, m in METRICS.items() if m.NEEDS != "weights"}
