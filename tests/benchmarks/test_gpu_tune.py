"""Tuning with made-up times: what is chosen, and that the kernels' table reads what was written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gpu_timing import Machine

from bitatlas.kernels import tuned

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton on this platform"
)


def test_the_fastest_option_that_can_be_launched() -> None:
    from gpu_tune import fastest

    times = {1: 5.0, 2: 3.0, 4: 4.0}
    assert fastest((1, 2, 3, 4), lambda o: times[o]) == 2  # 3 raises
    assert fastest((3,), lambda o: times[o]) is None


@pytest.mark.parametrize(
    ("dense", "expected"),
    [((9, 9, 1, 1), 64), ((1, 1, 1, 1), 16), ((9, 9, 9, 9), 256), ((1, 9, 1, 1), 64), ((9, 9, 1, 9), 256)],
)
def test_crossover(dense: tuple[int, ...], expected: int) -> None:
    from gpu_tune import crossover

    sizes = (16, 32, 64, 128)
    assert crossover(sizes, lambda m: 5.0, lambda m: dense[sizes.index(m)]) == expected


def test_what_is_tuned_is_what_the_kernels_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_tune import tune

    calls: list[int] = []

    def clock(run: object, copies: int) -> float:
        calls.append(copies)
        return 1.0 / len(calls)  # the last option wins

    cases = [
        ("linear", {"n": 96, "k": 128, "m": 3}),
        ("experts", {"n": 16, "k": 64, "m": 3, "count": 4, "top_k": 2}),
        ("kv", {"batch": 1, "heads": 4, "kv_heads": 2, "tokens": 64, "dim": 16}),
    ]
    path = tmp_path / "some-gpu.json"
    tune(Machine.dry(), path, cases, clock)
    tune(Machine.dry(), path, cases[:1], clock)  # merges
    monkeypatch.setenv("BITATLAS_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    gpu = torch.device("cuda", 0)
    for bits in (2, 3, 4, 5, 6, 8):
        assert tuned.launch(gpu, bits, 64, 96, 128, 4) == tuned.Launch((16, 128, 64), 16)
        assert tuned.many_rows(gpu, bits, 96, 128) == 4  # each dense time is above the fused one after it
    assert tuned.experts(gpu, 16, 64, 6, 4) == (16, 128)
    assert tuned.kv_chunk(gpu, (8, 4), 16, 2, 64) == (128, 64)
    assert len(json.loads(path.read_text())) == 6 + 6 + 1 + 5
    assert len(calls) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["some-gpu.json"]
