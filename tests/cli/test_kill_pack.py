"""A real packing whose worker is killed: what was finished is not made again, and the result is the undisturbed one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app import tasks
from bitatlas.app.work.pack import pack_model
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.packed import load

FORMAT = "int3-g64"
TEXT = {"tokens": 512, "seq_len": 64}


def worker_of(folder: Path) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "bitatlas.app.worker" in line and str(folder) in line:
            return process
    return None


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Shard -> what tells that it was not written again."""
    found = [(p.name, p.stat()) for p in out.glob("packed-*.safetensors")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


@pytest.mark.slow
def test_finished_shards_outlive_a_kill(home: Path, tmp_path: Path) -> None:
    index = index_model(tasks.demo_path())
    payload = sum(parse_format(FORMAT).payload_bytes(u.rows, u.cols) for u in index.units)
    plan = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), FORMAT), payload, index.kept_bytes,
                      payload * 8 / index.params)  # fmt: skip
    out = tmp_path / "packed"
    job = tasks.submit_pack("demo", plan, out, quantizer="gptq", **TEXT)
    deadline = time.monotonic() + 120
    while len(finished(out)) < 4:
        assert time.monotonic() < deadline, "no shard was written"
        time.sleep(0.002)
    worker = worker_of(home)
    assert worker is not None
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
    source = index_model(tasks.demo_path())
    text = make_calibration(
        load_tokenizer(source.path), Path(source.path).parent / "text" / "calibration.txt", TEXT["tokens"],
        TEXT["seq_len"], 0, vocab_size=source.vocab_size,
    )  # fmt: skip
    pack_model(source, plan, tmp_path / "whole", quantizer="gptq", calibration=text)
    for file in sorted((tmp_path / "whole").glob("packed-*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    load(out)
