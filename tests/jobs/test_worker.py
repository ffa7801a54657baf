"""The worker process by itself; and the small parts that need no process."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.gpu import claim_gpu, visible_gpus
from bitatlas.app.jobs.progress import Progress
from bitatlas.app.jobs.session import death_in_words
from bitatlas.app.jobs.work import load_work
from bitatlas.cache.paths import Home


def start(bench, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bitatlas.app.worker", "--home", str(bench.home.root), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_one_worker_and_it_leaves_when_idle(bench):
    bench.home.folder()
    first = start(bench, "--idle-minutes", "0.12")
    bench.until(bench.jobs.worker_alive, 30, "the first one")
    second = start(bench)
    assert second.wait(60) == 0
    assert "another worker is there already" in second.stderr.read()
    assert first.wait(90) == 0
    words = first.stderr.read()
    assert "leaving" in words
    # Nothing of DBOS's console line, and no port opened.
    assert "console" not in words.lower()
    assert not bench.jobs.worker_alive()
    assert bench.jobs.jobs() == []


def test_terminated_worker_leaves_a_job_that_goes_on(bench):
    job = bench.jobs.submit(bench.toy(steps=4, faults={"s1": "hang"}, once=True))
    bench.until(lambda: bench.jobs.job(job).done == 1 and bench.engines(), 30, "the second step")
    (worker,) = bench.workers()
    worker.send_signal(signal.SIGTERM)
    bench.until(lambda: not bench.workers() and not bench.engines(), 15, "both are gone")
    status = bench.jobs.job(job)
    assert (status.state, status.final, status.error) == ("interrupted", False, "")
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    bench.assert_complete("r", 4)


def test_a_worker_that_dies_at_its_start_is_replaced_at_once(bench):
    job = bench.jobs.submit(bench.toy(steps=2))
    assert not bench.jobs.start_worker_if_needed()  # one is on its way
    bench.until(bench.workers, 10, "a process")
    assert bench.kill_workers() == 1
    assert bench.jobs.start_worker_if_needed()
    assert bench.jobs.wait(job, timeout_s=60).state == "done"


def test_damaged_file_of_jobs_is_said_so(bench):
    bench.home.folder()
    bench.home.jobs_db.write_bytes(b"not a database, " * 100)
    with pytest.raises(UserError, match="file of jobs is damaged"):
        bench.jobs.jobs()
    assert bench.home.jobs_db.read_bytes().startswith(b"not a database")


def test_a_client_loads_no_torch():
    code = """
import sys
import bitatlas.app.jobs.service, bitatlas.app.worker
from bitatlas.app.jobs import workflow
assert not {"torch", "transformers", "streamlit"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_eta_from_the_spread_of_the_steps():
    p = Progress(total=12)
    assert (p.rate(), p.eta()) == (None, None)
    p.step_done(30.0)  # loads the model
    low, high = p.eta()
    assert low == 0.0
    assert high > 11 * 30
    p.step_done(2.0)
    assert p.rate() == pytest.approx(0.5)
    for _ in range(4):
        p.step_done(2.0)
    assert p.eta() == pytest.approx((12.0, 12.0))
    p.step_done(4.0)
    low, high = p.eta()
    mean = (5 * 2 + 4) / 6
    sd = math.sqrt((5 * (2 - mean) ** 2 + (4 - mean) ** 2) / 5)
    half = 1.645 * sd * math.sqrt(5 + 25 / 6)
    assert (low, high) == pytest.approx((5 * mean - half, 5 * mean + half))
    p.fraction = 0.5
    assert sum(p.eta()) / 2 == pytest.approx(4.5 * mean)
    event = p.to_dict()
    assert (event["done"], event["total"]) == (7, 12)


def test_deaths_in_words():
    for code, word in (
        (-9, "memory"),
        (-7, "bus error"),
        (-11, "segmentation"),
        (-15, "signal 15"),
        (3, "status 3"),
    ):
        assert word in death_in_words(code)


def test_one_gpu_for_one_process(tmp_path, monkeypatch):
    driver = tmp_path / "gpus"
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (driver / name).mkdir(parents=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(driver) == ["0", "1"]
    assert visible_gpus(tmp_path / "none") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert visible_gpus(driver) == ["3", "GPU-abc"]
    home = Home(tmp_path / "home")
    code = """
import os, sys
from pathlib import Path
from bitatlas.app.jobs.gpu import claim_gpu
from bitatlas.cache.paths import Home
print(claim_gpu(Home(Path(sys.argv[1])), ["3", "GPU-abc"]), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(home.root)]
    others = []
    for want in ("3 3", "GPU-abc GPU-abc", "None"):
        others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert others[-1].stdout.readline().strip() == want
    others[0].kill()
    others[0].wait()
    assert claim_gpu(home, ["3", "GPU-abc"]) == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    for p in others[1:]:
        p.kill()
        p.wait()


def test_unknown_kind(tmp_path):
    with pytest.raises(UserError, match="no kind of job called 'nothing'"):
        load_work("nothing", {}, Home(tmp_path))
