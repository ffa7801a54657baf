from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from bitatlas.app.jobs.service import Jobs
from bitatlas.cache.paths import Home


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
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Bench:
    """A home, its jobs, and ways to look at and kill its processes."""

    def __init__(self, home: Home) -> None:
        self.home, self.jobs = home, Jobs(home)
        self.workers, self.engines, self.until = lambda: workers_of(home), lambda: engines_of(home), until

    def kill_workers(self) -> int:
        found = self.workers()
        for p in found:
            p.send_signal(signal.SIGKILL)
        # This process started them, so their bodies are its to bury.
        psutil.wait_procs(found, timeout=5)
        return len(found)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("BITATLAS_WORKS", "toy=toy_work:Toy")
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("BITATLAS_JOBS_URL", raising=False)
    bench = Bench(Home(tmp_path / "home"))
    yield bench
    bench.kill_workers()
    until(lambda: not bench.engines(), 10, "engines end with their worker")
