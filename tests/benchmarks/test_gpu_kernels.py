"""The GPU benchmark runs through on the CPU, every kind of case, and nothing is kept of that."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton on this platform")
def test_dry_fills_every_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, str(SCRIPT), "--dry", "--out", str(out)], capture_output=True, text=True,
                          timeout=900, check=False, env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not out.exists()
    lines = done.stdout.splitlines()
    rows = [json.loads(x) for x in lines if x.startswith("{")]
    kernels = {(r["what"], r["kernel"]) for r in rows}
    ours = {("linear", f"bitatlas W{b}") for b in (2, 3, 4, 5, 6, 8)} | {("linear", "cublas W16")}
    ours |= {("experts", n) for n in ("mixed", "launch per width", "uniform W2", "uniform W8", "dense W16")}
    ours |= {("kv", n) for n in ("bitatlas kv4-token", "bitatlas kv8-channel/kv4-token", "torch sdpa bf16")}
    ours |= {("packing", n) for n in ("copy", "pack W3", "unpack W5", "dequantize W6", "kv pack kv4-channel")}
    assert ours <= kernels
    assert all(0 < r["us_p20"] <= r["us_p50"] <= r["us_p80"] and r["nbytes"] > 0 for r in rows)
    table = {x[:3].strip() for x in lines if not x.startswith("{")}
    assert {"1a", "1b", "1c", "2a", "2b", "3", "4"} <= table
    # Peers that are not installed are named, nothing else is left out.
    left = [x for x in done.stderr.splitlines() if "left out" in x]
    assert all(any(p in x for p in ("gemlite", "torchao", "flash-attn")) for x in left), left
