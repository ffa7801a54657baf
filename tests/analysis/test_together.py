"""Metrics that share a read leave what each would have left alone; huge units are never whole in memory."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitatlas.analysis import measure, weights
from bitatlas.analysis.measure import MeasureContext, run_metric, save_step
from bitatlas.analysis.metrics import METRICS
from bitatlas.analysis.metrics.base import StepResult, UnitMetric
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.together import run_together
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels.formats import expand_formats

FORMATS = expand_formats("int{2,4}-g32,int3-channel")
METRICS_OF_WEIGHTS = [m for m in METRICS.values() if issubclass(m, UnitMetric)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An embedding and two blocks, bfloat16 but for one float32 matrix; wider and taller than a tile."""
    folder = tmp_path_factory.mktemp("m")
    generator = torch.Generator().manual_seed(3)

    def weight(rows, cols, dtype=torch.bfloat16):
        w = torch.randn(rows, cols, generator=generator) * torch.rand(cols, generator=generator).pow(-0.7)
        return w.to(dtype).contiguous()

    state = {"model.embed_tokens.weight": weight(650, 130)}
    for i in range(2):
        state[f"model.layers.{i}.mlp.up_proj.weight"] = weight(270, 130)
        state[f"model.layers.{i}.mlp.down_proj.weight"] = weight(
            130, 270, torch.float32 if i else torch.bfloat16
        )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 130}))
    save_file(state, folder / "model.safetensors")
    return index_model(folder)


def values(rows):
    return {(r.metric, r.unit, r.format): (r.value, r.stderr, r.count) for r in rows}


@pytest.fixture(scope="module")
def alone(index, tmp_path_factory):
    with MeasureContext(index, FORMATS) as ctx:
        return {m: values(run_metric(m(), ctx, tmp_path_factory.mktemp("alone"))) for m in METRICS_OF_WEIGHTS}


def test_together_is_as_alone_with_one_read_for_all(index, alone, tmp_path, monkeypatch):
    assert len(METRICS_OF_WEIGHTS) >= 5
    read, get = [], WeightReader.get
    monkeypatch.setattr(WeightReader, "get", lambda self, unit: read.append(unit.key) or get(self, unit))
    metrics = {m(): tmp_path / m.NAME for m in METRICS_OF_WEIGHTS}
    first = next(iter(metrics))
    with MeasureContext(index, FORMATS) as ctx:
        plan = first.plan(ctx)
        save_step(metrics[first], plan[0], StepResult())  # there already: stays as it is
        for key in plan:
            run_together(metrics, ctx, key)
        assert read == list(index.unit_keys())
        for m, parts in list(metrics.items())[1:]:
            assert repr(values(run_metric(m, ctx, parts))) == repr(alone[type(m)]), m.NAME
        assert run_metric(first, ctx, metrics[first])[0].unit not in ctx.index.units[0].key


def test_a_huge_unit_in_blocks_is_as_one_in_one_piece(index, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "WHOLE", 1)
    monkeypatch.setattr(weights, "BLOCK", 128 * 130)
    largest, window = [0], WeightReader.window

    def watched(self, *where):
        found = window(self, *where)
        largest[0] = max(largest[0], found.numel())
        return found

    monkeypatch.setattr(WeightReader, "window", watched)
    monkeypatch.setattr(WeightReader, "get", None)
    with MeasureContext(index, FORMATS) as ctx:
        for m in METRICS_OF_WEIGHTS:
            found = values(run_metric(m(), ctx, tmp_path / m.NAME))
            assert list(found) == list(alone[m])
            for key, want in alone[m].items():
                # Block sums in another order: the last bits differ, a weight at the very limit may change sides.
                assert found[key] == pytest.approx(want, rel=2e-5, nan_ok=True), key
    assert largest[0] <= 128 * 270


def test_slabs_make_the_gram_matrix(index, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK", 128 * 130)
    for whole in (1 << 24, 1):
        monkeypatch.setattr(measure, "WHOLE", whole)
        with MeasureContext(index) as ctx:
            for unit in index.units:
                w = ctx.reader.get(unit).double()
                want = w.T @ w if unit.rows >= unit.cols else w @ w.T
                got = sum(s.double().T @ s.double() for s in ctx.slabs(unit))
                torch.testing.assert_close(got, want)
                assert sum(1 for _ in ctx.slabs(unit)) == (
                    1 if whole > 1 else math.ceil(max(unit.rows, unit.cols) / 128)
                )


def test_what_a_unit_shares_is_made_once_and_forgotten_with_the_next(index):
    with MeasureContext(index) as ctx:
        made = []
        ask = lambda u: ctx.of_unit(u, "x", lambda: made.append(u.key) or np.zeros(1))  # noqa: E731
        one, two = index.units[:2]
        for u in (one, one, two, one):
            ask(u)
        assert made == [one.key, two.key, one.key]
