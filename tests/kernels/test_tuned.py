"""Launch settings as data; a damaged file is as good as none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitatlas.kernels import tuned
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.packed.matrix import PackedMatrix, pack_weight
from bitatlas.kernels.reference import quantize

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton on this platform"
)
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
        {"what": "nothing"},
        {"what": "many_rows", "rows": 0},
        {"what": "experts", "block": 8, "rows": 64},
        {"what": "experts", "block": 16},
        {
            "what": "kv",
            "k_bits": 4,
            "v_bits": 4,
            "dim": 64,
            "heads": 8,
            "tokens": 64,
            "chunk": 48,
            "tile": 32,
        },
    ],
    ids=str,
)
def test_a_row_that_cannot_be_launched_spoils_the_file(change: dict, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps([ROW]))
    (tmp_path / "bad.json").write_text(json.dumps([ROW, ROW | {"m": 16} | change]))
    assert tuned.read(tmp_path / "good.json") == {
        ("linear", 4, 64, 96, 128, 8): tuned.Launch((16, 64, 32), 2)
    }
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


ROWS = [
    {"what": "many_rows", "bits": 4, "n": 128, "k": 256, "rows": 4},
    {"what": "experts", "n": 40, "k": 64, "m": 4, "block": 32, "rows": 128},
    {
        "what": "kv",
        "k_bits": 4,
        "v_bits": 2,
        "dim": 128,
        "heads": 8,
        "tokens": 4096,
        "chunk": 1024,
        "tile": 64,
    },
]


def test_every_kind_is_looked_up_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITATLAS_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    (tmp_path / "some-gpu.json").write_text(json.dumps(ROWS))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert tuned.many_rows(gpu, 4, 100, 200) == 4
    assert tuned.many_rows(gpu, 4, 129, 200) is None
    assert tuned.experts(gpu, 40, 64, 30, 8) == (32, 128)  # four pairs an expert
    assert tuned.experts(gpu, 40, 64, 40, 8) is None
    assert tuned.kv_chunk(gpu, (4, 2), 128, 6, 3000) == (1024, 64)
    assert tuned.kv_chunk(gpu, (2, 4), 128, 6, 3000) is None
    assert tuned.many_rows(cpu, 4, 100, 200) is None


def _packed(n: int, k: int) -> PackedMatrix:
    fmt = parse_format("int4-g32")
    return PackedMatrix(fmt, n, k, pack_weight(torch.randn(n, k), fmt, quantize))


@needs_triton
@pytest.mark.parametrize(("measured", "first"), [(None, 256), (4, 4), (1024, 1024)])
def test_dequantising_starts_where_it_was_measured(
    measured: int | None, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitatlas.kernels import triton_linear

    used: list[str] = []
    asked: list[tuple] = []
    matrix = _packed(8, 64)

    def dense(m: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
        used.append("dense")
        return m.dequantize(dtype=dtype)

    monkeypatch.setattr(triton_linear, "many_rows", lambda *a: asked.append(a) or measured)
    monkeypatch.setattr(triton_linear, "dequantize", dense)
    monkeypatch.setattr(
        triton_linear, "linear_fused", lambda x, m: used.append("fused") or x @ m.dequantize().T
    )
    for rows in (first - 1, first):
        assert triton_linear.linear(torch.randn(rows, 64), matrix).shape == (rows, 8)
    assert used == ["fused", "dense"]
    assert asked[0] == (torch.device("cpu"), 4, 8, 64)


@needs_triton
def test_experts_and_cache_are_launched_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitatlas.kernels import triton_experts, triton_kv
    from bitatlas.kernels.kv import parse_pair
    from bitatlas.kernels.kv.quantize import pack_kv

    class Kernel:
        grids: list[tuple[int, ...]] = []
        tiles: list[tuple[int, ...]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            self.grids.append(grid)
            return lambda *a: self.tiles.append(a)

    kernel = Kernel()
    table = triton_experts.ExpertTable.build([_packed(200, 64) for _ in range(2)])
    monkeypatch.setattr(triton_experts, "grouped_kernel", kernel)
    index = torch.zeros(40, 1, dtype=torch.int64)
    for found, grid in ((None, (3, 4)), ((32, 128), (2, 2))):
        monkeypatch.setattr(tuned, "experts", lambda device, n, k, pairs, count, found=found: found)
        routing = triton_experts.route(index, table)
        triton_experts.grouped_linear(torch.randn(40, 64), routing.token, routing, table)
        assert kernel.grids[-1] == grid
        assert kernel.tiles[-1][-3:-1] == (found or (16, 64))
    k, v = (pack_kv(torch.randn(1, 2, 1024, 16), f, 32) for f in parse_pair("kv4-token"))
    monkeypatch.setattr(triton_kv, "decode_kernel", kernel)
    plain = torch.randn(1, 2, 3, 16)
    for found, splits in ((None, 2), ((128, 64), 8)):
        monkeypatch.setattr(triton_kv, "kv_chunk", lambda *a, found=found: found)
        triton_kv.decode_attention(torch.randn(1, 4, 16), k, v, plain, plain, 0.25)
        assert kernel.grids[-1] == (2, splits)
        assert kernel.tiles[-1][-3] == (found or (512, 32))[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_none() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert "Traceback" not in done.stderr
