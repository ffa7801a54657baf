from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import DamageRow, KeptTensor, KvGeometry, ModelIndex, QuantUnit
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store


def make_index(layers: int = 2, experts: int = 3, digest: str = "d" * 20) -> ModelIndex:
    units = []
    for layer in range(layers):
        units.append(QuantUnit(f"layers.{layer}.q", "q", layer, -1, 6, 5, f"layers.{layer}.q.weight"))
        units += [
            QuantUnit(
                f"layers.{layer}.gate_up[{e}].gate", "gate", layer, e, 4, 7, f"l{layer}.gu", "gate", True
            )
            for e in range(experts)
        ]
    return ModelIndex(
        "/models/tiny", digest, "tiny", "TinyForCausalLM", "tiny", tuple(units),
        (KeptTensor("norm.weight", (5,), "BF16", 10),), layers, experts, 2,
        KvGeometry((2,) * layers, 4, (0,) * layers), 99, notes=("a note",),
    )  # fmt: skip


def make_rows(
    index: ModelIndex, metric: str = "weight_error", seed: int = 0, formats=("int2-g64", "int4-g64")
):
    rng = np.random.default_rng(seed)
    return [
        DamageRow(metric, u.key, f, float(rng.exponential()), float(rng.random()), int(rng.integers(9)), 0.25)
        for u in index.units
        for f in formats
    ]


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def store(home) -> Store:
    return Store(home)


@pytest.fixture
def index() -> ModelIndex:
    return make_index()


@pytest.fixture
def rows(index):
    return make_rows(index)
