from __future__ import annotations

import math

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.service import JobRequest, Jobs
from bitatlas.cache.store import Store


def toy(run="r", **params) -> JobRequest:
    return JobRequest("toy", {"run": run, **params}, title="a toy")


def computed(bench, job) -> list[str]:
    return [
        line.split()[1] for line in bench.jobs.logs(job, 10_000).splitlines() if line.startswith("computing ")
    ]


def assert_complete(bench, run: str, steps: int) -> None:
    rows = Store(bench.home).rows(run)
    want = {("toy", f"u{i}.{j}"): i + j / 8 for i in range(steps) for j in range(3)} | {
        ("toy_sum", "all"): 1.5
    }
    assert {(r.metric, r.unit): r.value for r in rows} == want
    assert len(rows) == len(want)
    assert all(math.isnan(r.stderr) for r in rows)
    assert Store(bench.home).run(run).finished is not None


def test_same_request_same_id():
    a, b = JobRequest("k", {"x": 1, "y": [2]}), JobRequest("k", {"y": [2], "x": 1}, title="other")
    assert a.id == b.id
    assert len(a.id) == 16
    assert a.id != JobRequest("k", {"x": 2, "y": [2]}).id
    assert a.id != JobRequest("l", {"x": 1, "y": [2]}).id


def test_a_job_from_submit_to_result(bench):
    with pytest.raises(UserError, match="no kind of job called 'nope'"):
        bench.jobs.submit(JobRequest("nope"))
    assert bench.jobs.jobs() == []
    with pytest.raises(UserError, match="no such job"):
        bench.jobs.job("0" * 16)
    job = bench.jobs.submit(toy(steps=5))
    seen = []
    status = bench.jobs.wait(job, seen.append, timeout_s=60)
    assert (status.state, status.error, status.done, status.total) == ("done", "", 5, 5)
    assert status.result["answer"] == 42
    assert (status.kind, status.title, status.params) == ("toy", "a toy", {"run": "r", "steps": 5})
    assert status.created <= status.started <= status.ended
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    assert_complete(bench, "r", 5)
    log = bench.jobs.logs(job)
    assert "step 5/5 s4" in log
    assert computed(bench, job) == [f"s{i}" for i in range(5)]
    # Asked again: the same job, nothing computed again; with again=True it runs, and the store has the steps.
    assert bench.jobs.submit(toy(steps=5)) == job
    assert bench.jobs.job(job).state == "done"
    assert len(bench.workers()) == 1
    bench.jobs.submit(toy(steps=5), again=True)
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    assert len(computed(bench, job)) == 5
    assert not bench.engines()


def test_two_submits_are_one_job_and_two_clients_see_the_same(bench):
    other = Jobs(bench.home)
    job = bench.jobs.submit(toy(steps=6, seconds=0.5))
    assert other.submit(toy(steps=6, seconds=0.5)) == job
    bench.until(lambda: bench.jobs.job(job).done >= 2, what="two steps")
    a, b = bench.jobs.job(job), other.job(job)
    assert abs(a.done - b.done) <= 1
    assert (a.state, a.total, b.total) == ("running", 6, 6)
    assert a.heartbeat_age_s < 10
    bench.until(lambda: bench.jobs.job(job).eta_s, what="an ETA")
    assert [j.id for j in other.jobs()] == [job]
    assert len(bench.workers()) == 1
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    assert_complete(bench, "r", 6)


def test_cancel_frees_everything_and_resume_goes_on(bench):
    job = bench.jobs.submit(toy(steps=4, faults={"s2": "child"}, once=True))
    pid_file = bench.home.root / "child.pid"
    bench.until(lambda: pid_file.exists() and pid_file.read_text(), what="the step runs")
    import psutil

    child = psutil.Process(int(pid_file.read_text()))
    bench.jobs.cancel(job)
    bench.until(lambda: not bench.engines(), 10, "the engine is gone")
    bench.until(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10, "its child is gone"
    )
    assert bench.jobs.job(job).state == "cancelled"
    assert bench.jobs.wait(job).state == "cancelled"
    assert Store(bench.home).steps_done("r") == {"s0", "s1"}
    bench.jobs.resume(job)
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    assert_complete(bench, "r", 4)
    assert computed(bench, job) == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("user", "the toy is broken. Found: a crack. Try: glue."), ("bug", "KeyError"), ("memory", "out of memory"),
     ("kill", "signal 9"), ("bus", "bus error")],
)  # fmt: skip
def test_failures_in_words_and_resume(bench, fault, words):
    request = toy(steps=3, faults={"s1": fault}, once=True)
    job = bench.jobs.submit(request)
    status = bench.jobs.wait(job, timeout_s=60)
    assert status.state == "failed"
    assert words in status.error
    assert words in bench.jobs.logs(job)
    assert (status.done, status.total) == (1, 3)
    assert not bench.engines()
    bench.jobs.submit(request)
    status = bench.jobs.wait(job, timeout_s=60)
    assert (status.state, status.error) == ("done", "")
    assert_complete(bench, "r", 3)
    assert computed(bench, job) == ["s0", "s1", "s2"]
