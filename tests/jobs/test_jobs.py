from __future__ import annotations

import psutil
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.service import JobRequest, Jobs
from bitatlas.app.jobs.session import thread_limits
from bitatlas.cache.store import Store


def test_same_request_same_id():
    a, b = JobRequest("k", {"x": 1, "y": [2]}), JobRequest("k", {"y": [2], "x": 1}, title="other")
    assert a.id == b.id
    assert len(a.id) == 16
    assert a.id != JobRequest("k", {"x": 2, "y": [2]}).id
    assert a.id != JobRequest("l", {"x": 1, "y": [2]}).id


def test_both_libraries_get_the_threads_that_the_user_named(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert set(thread_limits({}).values()) == {"8"}
    assert set(thread_limits({"OMP_NUM_THREADS": "1"}).values()) == {"1"}
    monkeypatch.setenv("BITATLAS_PARALLEL_JOBS", "4")
    assert set(thread_limits({}).values()) == {"2"}


def test_a_job_from_submit_to_result(calm):
    with pytest.raises(UserError, match="no kind of job called 'nope'"):
        calm.jobs.submit(JobRequest("nope"))
    assert calm.jobs.jobs() == []
    with pytest.raises(UserError, match="no such job"):
        calm.jobs.job("0" * 16)
    job = calm.jobs.submit(calm.toy(steps=5))
    seen = []
    status = calm.jobs.wait(job, seen.append, timeout_s=60)
    assert (status.state, status.error, status.done, status.total) == ("done", "", 5, 5)
    assert status.result["answer"] == 42
    assert (status.kind, status.title, status.params) == ("toy", "a toy", {"run": "r", "steps": 5})
    assert status.created <= status.started <= status.ended
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    calm.assert_complete("r", 5)
    log = calm.jobs.logs(job)
    assert "step 5/5 s4" in log
    assert calm.computed(job) == [f"s{i}" for i in range(5)]
    # Asked again: the same job, nothing computed again; with again=True it runs, and the store has the steps.
    assert calm.jobs.submit(calm.toy(steps=5)) == job
    assert calm.jobs.job(job).state == "done"
    assert len(calm.workers()) == 1
    calm.jobs.submit(calm.toy(steps=5), again=True)
    assert calm.jobs.wait(job, timeout_s=60).state == "done"
    assert len(calm.computed(job)) == 5
    assert not calm.engines()


def test_a_job_without_rows(calm):
    job = calm.jobs.submit(calm.toy("none", no_run=True))
    status = calm.jobs.wait(job, timeout_s=60)
    assert (status.state, status.total) == ("done", 4)
    assert "none" not in {r.run for r in Store(calm.home).runs()}


def test_runs_that_another_job_has_measured_are_not_measured_again(calm):
    store = Store(calm.home)
    first = calm.jobs.submit(calm.toy("x", steps=4, runs=["even", "odd"]))
    assert calm.jobs.wait(first, timeout_s=60).state == "done"
    assert store.steps_done("even") == {"s0", "s2"}
    assert store.steps_done("odd") == {"s1", "s3"}
    assert {r.unit[:2] for r in store.rows("odd")} == {"u1", "u3"}
    second = calm.jobs.submit(calm.toy("x", steps=4, runs=["even", "odd 2"]))
    assert calm.jobs.wait(second, timeout_s=60).state == "done"
    assert calm.computed(second) == ["s1", "s3"]
    assert len(store.rows("even")) == len(store.rows("odd 2")) == 6
    assert store.run("even").finished is not None


def test_two_submits_are_one_job_and_two_clients_see_the_same(calm):
    other = Jobs(calm.home)
    request = calm.toy("two", steps=6, seconds=0.5)
    job = calm.jobs.submit(request)
    assert other.submit(request) == job
    calm.until(lambda: calm.jobs.job(job).done >= 2, what="two steps")
    a, b = calm.jobs.job(job), other.job(job)
    assert abs(a.done - b.done) <= 1
    assert (a.state, a.total, b.total) == ("running", 6, 6)
    assert a.heartbeat_age_s < 10
    calm.until(lambda: calm.jobs.job(job).eta_s, what="an ETA")
    assert [j.id for j in other.jobs()].count(job) == 1
    assert len(calm.workers()) == 1
    assert calm.jobs.wait(job, timeout_s=60).state == "done"
    calm.assert_complete("two", 6)


def test_cancel_frees_everything_and_resume_goes_on(calm):
    job = calm.jobs.submit(calm.toy("cancel", faults={"s2": "child"}, once=True))
    pid_file = calm.home.root / "child.pid"
    calm.until(lambda: pid_file.exists() and pid_file.read_text(), what="the step runs")
    child = psutil.Process(int(pid_file.read_text()))
    calm.jobs.cancel(job)
    calm.until(lambda: not calm.engines(), 10, "the engine is gone")
    calm.until(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10, "its child is gone"
    )
    assert calm.jobs.job(job).state == "cancelled"
    assert calm.jobs.wait(job).state == "cancelled"
    assert Store(calm.home).steps_done("cancel") == {"s0", "s1"}
    calm.jobs.resume(job)
    assert calm.jobs.wait(job, timeout_s=60).state == "done"
    calm.assert_complete("cancel", 4)
    assert calm.computed(job) == ["s0", "s1", "s2", "s3"]


def test_cancel_and_resume_at_once(calm):
    job = calm.jobs.submit(calm.toy("flip", faults={"s1": "hang"}, once=True))
    for _ in range(3):
        calm.until(
            lambda: calm.jobs.job(job).done >= 1 or calm.jobs.job(job).state == "done", what="one step"
        )
        calm.jobs.cancel(job)
        calm.jobs.resume(job)
    assert calm.jobs.wait(job, timeout_s=90).state == "done"
    calm.assert_complete("flip", 4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("user", "the toy is broken. Found: a crack. Try: glue."), ("bug", "KeyError"), ("memory", "out of memory"),
     ("kill", "signal 9"), ("bus", "bus error"), ("segv", "signal 11")],
)  # fmt: skip
def test_failures_in_words_and_resume(calm, fault, words):
    request = calm.toy(fault, steps=3, faults={"s1": fault}, once=True)
    job = calm.jobs.submit(request)
    status = calm.jobs.wait(job, timeout_s=60)
    assert status.state == "failed"
    assert words in status.error
    assert words in calm.jobs.logs(job)
    assert (status.done, status.total) == (1, 3)
    assert not calm.engines()
    calm.jobs.submit(request)
    status = calm.jobs.wait(job, timeout_s=60)
    assert (status.state, status.error) == ("done", "")
    calm.assert_complete(fault, 3)
    assert calm.computed(job) == ["s0", "s1", "s2"]
