"""Fixtures for all test folders."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test processes on two cores: one thread each, or they wait for one another at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _helper(name: str) -> ModuleType:
    """tests/<name>.py; the test folders are no packages, so it cannot be imported by name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def checkpoints() -> ModuleType:
    """The module tests/checkpoints.py: `make_checkpoint`, `write_tokenizer`, `FAMILIES`, `MOE_FAMILIES`."""
    return _helper("checkpoints")


@pytest.fixture(scope="session")
def allocate() -> Callable[..., Any]:
    """``allocate(index, {unit: format})`` -> an `Allocation` with its bytes; one name is for the linears, embedding and head
    then stay at 16 bits."""
    from bitatlas.analysis.schema import Allocation, ModelIndex, parse_format

    def make(index: ModelIndex, formats: str | Mapping[str, str]) -> Allocation:
        if isinstance(formats, str):
            formats = {u.key: "bf16" if u.role in ("embed", "head") else formats for u in index.units}
        payload = sum(parse_format(formats[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
        return Allocation(
            index.digest, index.name, dict(formats), payload, index.kept_bytes, payload * 8 / index.params
        )

    return make


@pytest.fixture(scope="session")
def on_gpu() -> Callable[..., Any]:
    """``with on_gpu():`` a GPU made of CPU tensors (tests/emulated_gpu.py)."""
    made: Callable[..., Any] = _helper("emulated_gpu").emulated_gpu
    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, checkpoints: ModuleType) -> Callable[..., Path]:
    """``tiny_checkpoint("qwen3_moe")`` -> folder of a tiny random model with a tokenizer, made once per session.

    Do not write into the folder; copy it first. Keywords go to `make_checkpoint`.
    """
    made: dict[str, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / family
            made[key] = checkpoints.make_checkpoint(family, folder, **options)
        return made[key]

    return get
