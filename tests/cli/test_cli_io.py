"""What the command line prints for people."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from bitatlas.app.cli_io import emit

JOB = {
    "id": "a1", "state": "done", "done": 6, "total": 6, "fraction": 0.0, "rate": None, "created": 1795000000.25, "started": 1795000001.0,
    "ended": None, "params": {"settings": {"draws": 1}, "metrics": ["prune", "zd"]}, "result": {}, "skipped": {},
}  # fmt: skip


def test_a_finished_job(capsys: pytest.CaptureFixture[str]) -> None:
    emit(JOB, False, "job")
    out = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith(" ") and " " in line)
    assert datetime.fromisoformat(lines["created"]).timestamp() == 1795000000
    assert datetime.fromisoformat(lines["started"]).utcoffset() is not None
    assert "ended" not in lines
    assert "fraction" not in out
    assert "skipped" not in out
    assert "result" not in out
    assert "  settings: draws=1" in out
    assert "  metrics: prune, zd" in out


def test_a_running_job_says_how_far_its_step_is(capsys: pytest.CaptureFixture[str]) -> None:
    emit(JOB | {"state": "running", "fraction": 0.25}, False, "job")
    assert "of this step  25%" in capsys.readouterr().out


def test_what_was_skipped_and_why_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"skipped": {"routing": "there are no experts"}, **{k: v for k, v in JOB.items() if k != "skipped"}}, False, "job")  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-2:] == ["skipped:", "  routing: there are no experts"]


def test_json_is_the_status_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    emit(JOB, True, "job")
    assert json.loads(capsys.readouterr().out) == JOB
