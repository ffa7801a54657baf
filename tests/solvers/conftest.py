from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import FORMATS, KeptTensor, ModelIndex, QuantUnit, SensitivityTable


@pytest.fixture
def index() -> ModelIndex:
    """Two MoE blocks of q, k, v, o and four experts with odd shapes, and an embedding."""
    units = [QuantUnit("embed", "embed", -1, -1, 50, 24, "embed.weight")]
    for layer in range(2):
        for role in ("q", "k", "v", "o"):
            key = f"layers.{layer}.{role}_proj"
            units.append(QuantUnit(key, role, layer, -1, 24, 24, f"{key}.weight"))
        for expert in range(4):
            for role, rows, cols in (("gate", 40, 24), ("up", 40, 24), ("down", 24, 40)):
                key = f"layers.{layer}.experts.{expert}.{role}"
                units.append(QuantUnit(key, role, layer, expert, rows, cols, f"{key}.weight"))
    return ModelIndex(
        path="/m", digest="d" * 20, name="tiny", architecture="A", model_type="a", units=tuple(units),
        kept=(KeptTensor("norm", (24,), "BF16", 48),), n_layers=2, n_experts=4, top_k=2, kv=None,
    )  # fmt: skip


@pytest.fixture
def make_table(index):
    """Sensitivity table over the index's units: damage falls fourfold a bit, each unit with its own scale."""

    def make(formats=("int2-g64", "int3-g64", "int4-g64", "int8-g64"), seed=0) -> SensitivityTable:
        rng = np.random.default_rng(seed)
        scale = rng.lognormal(0, 1.5, len(index.units))[:, None]
        bits = np.array([FORMATS[f].bits for f in formats], float)
        damage = scale * 4.0**-bits
        return SensitivityTable(
            "weight_error", index.unit_keys(), tuple(formats), damage, np.full(damage.shape, np.nan),
            np.ones(damage.shape, np.int64),
        )  # fmt: skip

    return make
