"""Launch settings as data; a damaged file is as good as none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitatlas.kernels import tuned

ROW = {"bits": 4, "group": 64, "n": 96, "k": 128, "m": 8, "tile": [16, 64, 32], "splits": 2}


def test_names_and_buckets() -> None:
    assert tuned.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert [tuned.bucket(m) for m in (1, 2, 3, 8, 9, 255)] == [1, 2, 4, 8, 16, 256]


@pytest.mark.parametrize(
    "change",
    [
        {"tile": [16, 64]},
        {"tile": [16, 60, 32]},
        {"tile": [16, 64, 128]},
        {"splits": 0},
        {"splits": "x"},
        {"k": None},
    ],
    ids=str,
)
def test_a_row_that_cannot_be_launched_spoils_the_file(change: dict, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps([ROW]))
    (tmp_path / "bad.json").write_text(json.dumps([ROW, ROW | {"m": 16} | change]))
    assert tuned.read(tmp_path / "good.json") == {(4, 64, 96, 128, 8): tuned.Launch((16, 64, 32), 2)}
    assert tuned.read(tmp_path / "bad.json") == {}
    assert tuned.read(tmp_path / "none.json") == {}


def test_the_gpu_at_hand_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITATLAS_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    (tmp_path / "some-gpu.json").write_text(json.dumps([ROW]))
    gpu = torch.device("cuda", 0)
    assert tuned.launch(gpu, 4, 64, 96, 128, 7) == tuned.Launch((16, 64, 32), 2)
    assert tuned.launch(gpu, 4, 64, 96, 128, 9) is None
    assert tuned.launch(torch.device("cpu"), 4, 64, 96, 128, 7) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr
