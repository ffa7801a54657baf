"""Small contexts for metrics: real checkpoints of a few thousand weights, real text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def _load_conformance() -> None:
    """Makes tests/conformance/metric.py importable as ``conformance_metric``; the test folders are no packages."""
    if "conformance_metric" not in sys.modules:
        path = Path(__file__).parents[2] / "conformance" / "metric.py"
        spec = importlib.util.spec_from_file_location("conformance_metric", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["conformance_metric"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["conformance_metric"])


_load_conformance()


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20 kB with some structure, so that sequences differ."""
    rng = np.random.default_rng(11)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(150)]
    lines = (" ".join(rng.choice(words[i % 50 : i % 50 + 60], 10)) for i in range(320))
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def context(tiny_checkpoint: Callable[..., Path], prose: Path) -> Callable[..., Any]:
    """``context("qwen3_moe", "int2-g32,int4-g32", seed=0, settings={})`` -> a fresh MeasureContext."""
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.model_index import index_model
    from bitatlas.kernels.formats import expand_formats

    def make(
        family: str, formats: str = "int2-g32,int4-g32", seed: int = 0, changes: Any = None, **options: Any
    ) -> MeasureContext:
        index = index_model(tiny_checkpoint(family, **(changes or {})))
        options = {"tokens": 160, "seq_len": 20} | options
        return MeasureContext(index, expand_formats(formats), seed=seed, text=prose, **options)

    return make
