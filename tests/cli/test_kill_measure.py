"""A real measurement whose worker is killed again and again ends with the very rows of an undisturbed one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import expand_formats
from bitatlas.app import tasks
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

FORMATS = "int2-g64,int3-g64,int4-g64"


@pytest.mark.slow
def test_killed_and_killed_again(
    workers: Callable[[], list[psutil.Process]], tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
):  # fmt: skip
    model = tiny_checkpoint("qwen3_moe")
    index = index_model(model)
    with MeasureContext(index, expand_formats(FORMATS), text=text, tokens=128, seq_len=32) as ctx:
        expected = run_metric(get_metric("kl_flip"), ctx, tmp_path / "parts")
    asked = {"formats": FORMATS, "calibration": text, "tokens": 128, "seq_len": 32}
    job = tasks.submit_measure(model, "kl_flip", **asked)
    rng, kills = random.Random(7), 0
    deadline = time.monotonic() + 300
    while kills < 5 and time.monotonic() < deadline:
        # The first worker is killed as soon as it is there, so that no machine is too fast for the test.
        time.sleep(rng.uniform(0.3, 4.0) if kills else 0.1)
        if tasks.jobs_show(job)["state"] == "done":
            break
        found = workers()
        if not found:
            tasks.submit_measure(model, "kl_flip", **asked)  # asking again starts a worker and joins the job
            continue
        found[0].send_signal(signal.SIGKILL)
        found[0].wait(10)
        kills += 1
        tasks.submit_measure(model, "kl_flip", **asked)
    done = tasks.measure(model, "kl_flip", wait=True, **asked)
    assert done["id"] == job
    assert kills > 0
    rows = Store(Home.default()).rows(done["result"]["runs"]["kl_flip"])
    key = lambda r: (r.metric, r.unit, r.format)  # noqa: E731 - used twice, right here
    rows, expected = sorted(rows, key=key), sorted(expected, key=key)
    assert list(map(key, rows)) == list(map(key, expected))  # none missing, none twice
    # Another process may sum in another order (memory alignment), so the last bits are free.
    assert np.allclose([r.value for r in rows], [r.value for r in expected], rtol=1e-5, equal_nan=True)
    assert [r.count for r in rows] == [r.count for r in expected]
