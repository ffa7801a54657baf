"""Slopes around an allocation against differences of the measured KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.operating_point import OperatingPoint
from bitatlas.kernels.formats import expand_formats, parse_format
from bitatlas.kernels.reference import quantize_dequantize


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_slopes_are_the_derivative_of_the_kl(tiny_checkpoint: Callable[..., Path], family: str):
    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    formats = expand_formats("int2-g64,int3-g64,int4-g64")
    tokens = np.random.default_rng(0).integers(3, 200, (3, 24))
    point = OperatingPoint(loaded, index.unit_keys(), formats, tokens)
    now = dict.fromkeys(index.unit_keys(), "int3-g64")
    slopes = point.slopes(now)
    assert slopes.kl == pytest.approx(point.kl(now), rel=1e-4)
    assert (slopes.first[:, 1] == 0).all()
    assert (slopes.squared[:, 1] == 0).all()
    assert np.isfinite(slopes.first).all()  # every format is within one step of the middle one

    ids = torch.from_numpy(tokens)
    original, weights = loaded.logits(ids).detach(), point.weights(now)

    def kl(unit: str, change: torch.Tensor, t: float) -> float:
        with torch.no_grad(), loaded.swapped({**weights, unit: weights[unit] + t * change}):
            return float(token_kl(original, loaded.logits(ids)).mean())

    worst = np.argsort(-np.abs(slopes.first[:, 0]))[:4]
    for i in worst:
        unit = index.unit_keys()[i]
        change = quantize_dequantize(loaded.handle(unit).get(), parse_format("int2-g64")) - weights[unit]
        # So short a step that no token changes its experts: across such a change the KL has no derivative.
        numeric = (kl(unit, change, 0.002) - kl(unit, change, -0.002)) / 0.004
        assert slopes.first[i, 0] == pytest.approx(numeric, rel=0.05, abs=1e-6)


def test_formats_out_of_reach_are_infinite(tiny_checkpoint: Callable[..., Path]):
    index = index_model(tiny_checkpoint("llama"))
    point = OperatingPoint(
        LoadedModel.open(index),
        index.unit_keys(),
        expand_formats("int2-g64,int3-g64,int4-g64"),
        np.full((1, 8), 5),
    )
    slopes = point.slopes(dict.fromkeys(index.unit_keys(), "int2-g64"))
    assert np.isinf(slopes.first[:, 2]).all()
    assert np.isfinite(slopes.first[:, :2]).all()
