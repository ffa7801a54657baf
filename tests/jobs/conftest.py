from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from bitatlas.app.jobs.service import JobRequest, Jobs
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store


def workers_of(home: Home) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter()
        if "bitatlas.app.worker" in cmdline(p) and str(home.root) in cmdline(p)
    ]


def engines_of(home: Home) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter()
        if "bitatlas.app.jobs.engine" in cmdline(p) and str(home.root) in cmdline(p)
    ]


def cmdline(p: psutil.Process) -> list[str]:
    try:
        return p.cmdline() if p.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


def until(check, seconds: float = 20.0, what: str = ""):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        got = check()
        if got:
            return got
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


class Bench:
    """A home, its jobs, and ways to look at and kill its processes."""

    def __init__(self, home: Home) -> None:
        self.home, self.jobs = home, Jobs(home)
        self.workers, self.engines, self.until = lambda: workers_of(home), lambda: engines_of(home), until

    @staticmethod
    def toy(run: str = "r", **params) -> JobRequest:
        return JobRequest("toy", {"run": run, **params}, title="a toy")

    def computed(self, job: str) -> list[str]:
        """Step keys in the order in which an engine began them."""
        lines = self.jobs.logs(job, 10_000).splitlines()
        return [line.split()[1] for line in lines if line.startswith("computing ")]

    def assert_complete(self, run: str, steps: int) -> None:
        """Exactly the rows that the toy gives, each once, and the run finished."""
        rows = Store(self.home).rows(run)
        want = {("toy", f"u{i}.{j}"): i + j / 8 for i in range(steps) for j in range(3)}
        want[("toy_sum", "all")] = 1.5
        assert {(r.metric, r.unit): r.value for r in rows} == want
        assert len(rows) == len(want)
        assert all(math.isnan(r.stderr) for r in rows)
        assert Store(self.home).run(run).finished is not None

    def kill_workers(self) -> int:
        found = self.workers()
        for p in found:
            p.send_signal(signal.SIGKILL)
        # This process started them, so their bodies are its to bury.
        psutil.wait_procs(found, timeout=5)
        return len(found)


@pytest.fixture(scope="session")
def toy_env():
    """Kinds of job that only tests know; worker and engine inherit the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITATLAS_WORKS", "toy=toy_work:Toy")
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        patch.delenv("BITATLAS_JOBS_URL", raising=False)
        yield


def clean_up(bench: Bench) -> None:
    bench.kill_workers()
    until(lambda: not bench.engines(), 10, "engines end with their worker")


@pytest.fixture
def bench(tmp_path, toy_env):
    """A home of one's own: for tests that kill."""
    bench = Bench(Home(tmp_path / "home"))
    yield bench
    clean_up(bench)


@pytest.fixture(scope="module")
def calm(tmp_path_factory, toy_env):
    """One home and one worker for all tests that kill nothing; they use different runs."""
    bench = Bench(Home(tmp_path_factory.mktemp("calm") / "home"))
    yield bench
    clean_up(bench)
