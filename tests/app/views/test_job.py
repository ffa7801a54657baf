"""A job in words."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.app.jobs.status import JobStatus
from bitatlas.app.views.job import STALLED_S, by_layer, job_view, ribbon


def _status(**changes):
    base = {"id": "abc", "kind": "measure", "title": "", "params": {"metrics": ["hawq_trace"], "model": "/m/smollm2"}, "state": "running"}  # fmt: skip
    return JobStatus(**{**base, **changes})


def test_running():
    view = job_view(
        _status(done=12, total=30, fraction=0.5, eta_s=(125.0, 250.0), heartbeat_age_s=2.0, note="layer 12")
    )
    assert view.name == "hawq_trace on smollm2"
    assert view.fraction == pytest.approx(12.5 / 30)
    assert view.eta == "2 to 4 min left"
    assert view.line == "12 of 30 steps · 2 to 4 min left · layer 12"
    assert (view.active, view.can_cancel, view.can_resume) == (True, True, False)


@pytest.mark.parametrize(
    ("range_s", "words"),
    [
        ((50.0, 70.0), "50 s to 1 min left"),
        ((8.0, 8.3), "about 8 s left"),
        ((3600.0, 9000.0), "1 h to 2 h 30 min left"),
    ],
)
def test_time_left_is_a_range(range_s, words):
    assert job_view(_status(done=1, total=3, eta_s=range_s)).eta == words


def test_stalled_is_its_own_state():
    view = job_view(_status(done=3, total=9, heartbeat_age_s=STALLED_S + 15))
    assert view.state == "stalled"
    assert view.line == "no sign of life for 1 min; 3 of 9 steps are safe"
    assert job_view(_status(heartbeat_age_s=STALLED_S - 1)).state == "running"


@pytest.mark.parametrize(
    ("state", "active", "cancel", "resume"),
    [("queued", True, True, False), ("done", False, False, False), ("failed", False, False, True),
     ("cancelled", False, False, True), ("interrupted", True, True, True)],
)  # fmt: skip
def test_buttons_make_sense(state, active, cancel, resume):
    view = job_view(_status(state=state, error="no text" if state == "failed" else ""))
    assert (view.active, view.can_cancel, view.can_resume) == (active, cancel, resume)
    if state == "failed":
        assert view.line == "no text"


def test_done_says_how_long_it_took():
    view = job_view(_status(state="done", started=100.0, ended=340.0, done=5, total=5))
    assert view.line == "done in 4 min"
    assert view.fraction == 1.0


def test_ribbon_prefers_what_runs():
    jobs = [job_view(_status(id="a", state="queued")), job_view(_status(id="b", done=1, total=4, eta_s=(60.0, 120.0))), job_view(_status(id="c", state="done"))]  # fmt: skip
    assert ribbon(jobs) == "25% · 1 to 2 min left · 1 more · hawq_trace on smollm2"
    assert ribbon(jobs[2:]) == ""


def test_progress_by_layer():
    view = by_layer(6, {"weight_error": ["weight_error/layer 0", "weight_error/layer 3", "weight_error/outside the layers"],
                        "activation_error": ["activation_error/layers 0-3"], "fisher_projection": ["fisher_projection/batch 4"]}, 0.25)  # fmt: skip
    assert np.flatnonzero(view.done[0]).tolist() == [0, 3]
    assert np.flatnonzero(view.done[1]).tolist() == [0, 1, 2, 3]
    assert (view.done[2] == 0.25).all()
    assert by_layer(6, {"a": ["layer 1"], "b": ["layer 1", "layer 2"]}).title == "1 of 6 layers measured"
