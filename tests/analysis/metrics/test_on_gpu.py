"""Every metric with its model on an (emulated) GPU: the same rows as on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics import METRICS, get_metric

# What would take long and is settled by a few steps.
FEW: dict[str, dict[str, Any]] = {
    "hawq_trace": {"min_probes": 2, "max_probes": 2}, "hawq_eigenvalue": {"eigen_iterations": 2}, "prune": {"prune_sequences": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.NEEDS != "weights"])
def test_the_same_as_on_the_cpu(name: str, context: Any, on_gpu: Any, tmp_path: Path) -> None:
    known = {k: v for k, v in FEW.get(name, {}).items() if k in METRICS[name].SETTINGS}
    assert known.keys() == FEW.get(name, {}).keys()
    text = {"tokens": 200, "seq_len": 100} if name.startswith("kv_") else {"tokens": 60}
    with context("qwen3_moe", "int3-g32", settings=known, **text) as ctx:
        expected = run_metric(get_metric(name), ctx, tmp_path / "cpu")
    with on_gpu(), context("qwen3_moe", "int3-g32", settings=known, device="cuda", **text) as ctx:
        found = run_metric(get_metric(name), ctx, tmp_path / "gpu")
    assert [(r.metric, r.unit, r.format, r.count) for r in found] == [
        (r.metric, r.unit, r.format, r.count) for r in expected
    ]
    for a, b in zip(found, expected, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-4, abs=1e-7, nan_ok=True), a
        assert math.isnan(a.stderr) or a.stderr == pytest.approx(b.stderr, rel=1e-3, abs=1e-7)
