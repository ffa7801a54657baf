from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from bitatlas.analysis.evaluator import Evaluator
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.unit_features import FEATURES, unit_features
from bitatlas.kernels.formats import expand_formats


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_features_are_size_free_and_right(tiny_checkpoint: Callable[..., Path], family: str):
    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    tokens = np.random.default_rng(0).integers(3, 200, (4, 16))
    evaluator = Evaluator(loaded, index.unit_keys(), expand_formats("int4-g64"), tokens)
    found = unit_features(evaluator, 64)
    assert found.shape == (len(index.units), len(FEATURES))
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 5
    weights = [loaded.handle(u).get().numpy().ravel() for u in index.unit_keys()]
    raw = np.log([scipy.stats.kurtosis(w, fisher=False) for w in weights])
    spread = 1.4826 * np.median(np.abs(raw - np.median(raw)))
    np.testing.assert_allclose(
        found[:, 5], np.clip((raw - np.median(raw)) / spread, -5, 5), rtol=1e-4, atol=1e-6
    )
    roles = np.array([u.role for u in index.units])
    assert set(found[roles == "down", 6]) == {1.0}
    assert set(found[roles == "q", 6]) == {0.0}
    layers = np.array([u.layer for u in index.units])
    assert found[layers == index.n_layers - 1, 7].max() == 1.0
