"""A model whose last layers read the K/V cache of earlier ones: no block of it can be run from the middle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import KlReference
from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.prefix import PrefixRunner, stream_behind
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize

# Those that run blocks alone, resume in the middle, or look at the stream between blocks.
NAMES = (
    "kl_flip",
    "activation_error",
    "gptq_error",
    "prune",
    "lim",
    "cka",
    "block_influence",
    "camera_energy",
    "kv_flip",
)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_that_look_between_blocks(name: str, context: Any, tmp_path: Path) -> None:
    settings = {"moment_bytes": 1} if "moment_bytes" in get_metric(name).SETTINGS else {}  # layer by layer
    with context("gemma3n", "int3-g32", tokens=200, seq_len=100, settings=settings) as ctx:
        rows = run_metric(get_metric(name), ctx, tmp_path)
    assert rows
    assert all(math.isfinite(r.value) for r in rows if r.count)
    assert sum(r.count > 0 for r in rows) > len(rows) / 2


def test_a_flip_is_measured_on_the_whole_model(context: Any, tmp_path: Path) -> None:
    """In a layer whose K and V later layers read."""
    with context("gemma3n", "int3-g32", tokens=60) as ctx:
        runner = PrefixRunner(ctx.loaded, ctx.index.n_layers)
        ids = torch.from_numpy(ctx.calibration.tokens)
        runner.record(ids)
        assert runner.exact is False
        rows = {
            r.unit: r.value for r in run_metric(get_metric("kl_flip"), ctx, tmp_path) if r.metric == "kl_flip"
        }
        key = next(u.key for u in ctx.index.units if u.layer == 1 and u.role == "v")
        with torch.no_grad():
            reference = KlReference(ctx.loaded.logits(ids))
            rough = quantize_dequantize(ctx.loaded.handle(key).get().clone(), parse_format("int3-g32"))
            with ctx.loaded.swapped({key: rough}):
                expected = float(reference.kl(ctx.loaded.logits(ids)).double().mean())
    assert rows[key] == pytest.approx(expected, rel=1e-4)


def test_copies_of_the_stream_lie_side_by_side() -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # (A, B, T, d)
    found = stream_behind((x, None))
    assert found.shape == (3, 4, 10)
    np.testing.assert_array_equal(found[1, 2], torch.cat([x[0, 1, 2], x[1, 1, 2]]))
    np.testing.assert_array_equal(stream_behind(x[0]), x[0])
