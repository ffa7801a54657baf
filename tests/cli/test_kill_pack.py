"""A real packing whose worker is killed: what was finished is not made again, and the result is the undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.app.work.pack import pack_model
from bitatlas.kernels.packed import load

FORMAT = "int3-g64"
TEXT = {"tokens": 512, "seq_len": 64}


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Shard -> what tells that it was not written again."""
    found = [(p.name, p.stat()) for p in out.glob("packed-*.safetensors")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


@pytest.mark.slow
def test_finished_shards_outlive_a_kill(
    workers: Callable[[], list[psutil.Process]], allocate: Callable[..., Allocation], tmp_path: Path
) -> None:
    index = index_model(tasks.demo_path())
    plan = allocate(index, dict.fromkeys(index.unit_keys(), FORMAT))
    out = tmp_path / "packed"
    job = tasks.submit_pack("demo", plan, out, quantizer="gptq", **TEXT)
    deadline = time.monotonic() + 120
    while len(finished(out)) < 4:
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.002)
    (worker,) = workers()
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    before = finished(out)
    assert not (out / "bitatlas.json").exists(), "too fast: the packing was over before it was killed"
    status = tasks.jobs_show(job)
    assert 1 <= status["done"] <= len(before) < status["total"]
    done = tasks.pack("demo", plan, out, quantizer="gptq", **TEXT)
    after = finished(out)
    assert before.items() <= after.items()
    assert done["shards"] == len(after) >= 12
    text = make_calibration(
        load_tokenizer(index.path), Path(index.path).parent / "text" / "calibration.txt", **TEXT, vocab_size=index.vocab_size
    )  # fmt: skip
    pack_model(index, plan, tmp_path / "whole", quantizer="gptq", calibration=text)
    for file in sorted((tmp_path / "whole").glob("packed-*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    load(out)
