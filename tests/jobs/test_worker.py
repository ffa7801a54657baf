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


def _through(plan, weights, seconds, upto):
    p = Progress()
    p.begin(plan, weights)
    for s in seconds[:upto]:
        p.step_done(s)
    return p


def test_eta_weighs_the_steps_left_by_their_metric():
    """Cheap metrics come first: their pace says little about the dear ones, the estimates do."""
    plan = [f"{m}/{i}" for m in ("a", "b", "c", "d", "dear") for i in range(8)]
    estimated = {"a": 0.1, "b": 0.2, "c": 0.1, "d": 0.3, "dear": 4.0}
    off = {"a": 1.5, "b": 2.5, "c": 2.0, "d": 1.8, "dear": 2.4}  # seconds per estimated second
    weights = [estimated[key[:-2]] for key in plan]
    seconds = [w * off[key[:-2]] for w, key in zip(weights, plan)]
    for done in (3, 10, 31, 32, 36):
        low, high = _through(plan, weights, seconds, done).eta()
        assert low <= sum(seconds[done:]) <= high
        assert high < 10 * low
    blind = _through(plan, (), seconds, 31)
    assert blind.eta()[1] < 0.5 * sum(seconds[31:])
    # Once a metric runs, its own steps count; steps that have gone before it no longer do.
    assert _through(plan, weights, seconds, 36).eta() == pytest.approx((4 * 4.0 * 2.4,) * 2)
    assert _through(plan, weights, seconds, 40).eta() == pytest.approx((0, 0))


def test_eta_knows_that_a_step_costs_something_beside_its_work():
    """Steps of nothing but overhead do not make the dear ones look 50 times as dear as estimated."""
    plan = (
        [f"cheap/{i}" for i in range(20)]
        + [f"middle/{i}" for i in range(8)]
        + [f"dear/{i}" for i in range(20)]
    )
    weights = [0.01] * 20 + [0.5] * 8 + [2.0] * 20
    seconds = [0.5 + 1.3 * w for w in weights]
    for done in (5, 20, 28):
        low, high = _through(plan, weights, seconds, done).eta()
        assert low <= sum(seconds[done:]) <= high
        assert high < 7 * low


def test_eta_takes_estimates_as_they_come():
    p = _through(["a/0", "a/1", "b/0"], [float("nan"), 0.0, -1.0], [2.0, 2.0], 2)
    low, high = p.eta()
    assert 0 < low < 2 < high
    half = Progress()
    half.begin(["a", "b"], [1.0])  # not of this plan
    half.step_done(3.0)
    assert half.eta() is not None


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
