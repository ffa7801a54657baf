"""What packing with inputs takes of the memory, estimated before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.analysis.weights import WeightReader
from bitatlas.app.work import pack_memory
from bitatlas.app.work.pack import pack_model
from bitatlas.app.work.pack_memory import free_memory, needed_memory, statistics_limit
from bitatlas.kernels.errors import UserError

TEXT = CalibrationSet.of(np.random.default_rng(0).integers(1, 250, (4, 16)))


@pytest.mark.parametrize("quantizer", ["gptq", "awq", "mse"])
def test_too_little_memory_is_refused_before_the_work(
    quantizer: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_model(tiny_checkpoint("llama"))
    plan = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), "int4-g32"), 1, 1, 4.0)
    pack_model(index, plan, tmp_path / "before", quantizer=quantizer, calibration=TEXT)
    monkeypatch.setattr(pack_memory, "free_memory", lambda: 100 << 20)
    real = LoadedModel.open
    monkeypatch.setattr(LoadedModel, "open", None)
    with pytest.raises(UserError, match="too little memory") as error:
        pack_model(index, plan, tmp_path / "packed", quantizer=quantizer, calibration=TEXT)
    assert "100.0 MiB free" in error.value.found
    assert "--quantizer rtn" in error.value.fix
    assert not (tmp_path / "packed").exists()
    # What is finished, or reads one matrix at a time, is not refused.
    assert pack_model(index, plan, tmp_path / "before", quantizer=quantizer, calibration=TEXT)["shards"]
    pack_model(index, plan, tmp_path / "rtn")
    monkeypatch.setattr(LoadedModel, "open", real)
    monkeypatch.setattr(pack_memory, "free_memory", lambda: 1 << 40)
    pack_model(index, plan, tmp_path / "packed", quantizer=quantizer, calibration=TEXT)


def test_the_estimate_counts_the_model_and_what_it_was_loaded_from(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    need = {}
    for dtype in ("float32", "bfloat16"):
        index = index_model(tiny_checkpoint("llama", dtype=dtype))
        with WeightReader(index) as reader:
            need[dtype] = needed_memory(reader, list(index.units))
        weights = 4 * index.params
        assert need[dtype] > weights + statistics_limit(index)
    assert need["bfloat16"] == need["float32"]  # small: the statistics outweigh what was stored
    with WeightReader(index) as reader:
        big = SimpleNamespace(nbytes=1 << 40, dtype="BF16")
        name = index.units[0].tensor
        reader.files.tensors[name] = (reader.files.tensors[name][0], big)
        assert needed_memory(reader, []) > 1 << 40


def test_a_container_leaves_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("700\n")
    assert free_memory(tmp_path) == 450
