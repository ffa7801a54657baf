"""A weights-only measurement on several processes: the rows of one process, and nothing left behind after kill -9."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import UserError, expand_formats
from bitatlas.app import tasks
from bitatlas.app.work.ahead import processes
from bitatlas.app.work.measure import MeasureWork
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

FORMATS = "int2-g64,int4-g64"
METRICS = "weight_error,zd,quantmoe_outlier"


def until(check: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_rows_are_those_of_one_process_and_a_killed_job_goes_on(
    workers: Callable[[], list[psutil.Process]], tiny_checkpoint: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def family() -> list[psutil.Process]:
        """The worker and everything below it."""
        return [p for worker in workers() for p in (worker, *worker.children(recursive=True))]

    monkeypatch.setenv("BITATLAS_PROCESSES", "2")
    model = tiny_checkpoint("qwen3_moe")
    job = tasks.submit_measure(model, METRICS, formats=FORMATS)
    until(lambda: sum("spawn_main" in " ".join(p.cmdline()) for p in family()) == 2)
    killed = family()
    killed[0].send_signal(signal.SIGKILL)
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in killed))
    done = tasks.measure(model, METRICS, formats=FORMATS, wait=True)
    assert done["id"] == job
    with MeasureContext(index_model(model), expand_formats(FORMATS)) as ctx:
        for name, run in done["result"]["runs"].items():
            want = run_metric(get_metric(name), ctx, tmp_path / name)
            assert sorted(map(repr, Store(Home.default()).rows(run))) == sorted(map(repr, want))


def test_errors_of_a_child_are_those_of_the_work(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITATLAS_PROCESSES", "2")
    model = tiny_checkpoint("llama")
    index = index_model(model)
    params = {"metrics": ["zd"], "model": str(model), "digest": index.digest, "formats": [], "settings": {},
              "seed": 0, "calibration": "", "tokens": 0, "seq_len": 0}  # fmt: skip
    work = MeasureWork(params, Home(tmp_path))
    _ = work.context
    params["digest"] = "another"  # the children find that the checkpoint is not the one that was asked for
    work.params = params
    with pytest.raises(UserError, match="changed since"):
        work.run(work.plan()[0])
    work._ahead.close()
    work = MeasureWork({**params, "digest": index.digest}, Home(tmp_path))
    assert work._ahead._pool is not None
    for process in list(work._ahead._pool._processes.values()):
        process.kill()
    with pytest.raises(UserError, match="was killed"):
        work.run(work.plan()[-2])
    work._ahead.close()


def test_little_work_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITATLAS_PROCESSES", raising=False)
    assert processes(1000) == 1
    assert 1 <= processes(1 << 40) <= (os.cpu_count() or 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    assert processes(1 << 40) == 1
    monkeypatch.setenv("BITATLAS_PROCESSES", "3")
    assert processes(1000) == 3
