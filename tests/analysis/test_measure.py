from __future__ import annotations

import math

import numpy as np
import pytest

from bitatlas.analysis.measure import (
    MeasureContext,
    PartsOnDisk,
    finish_metric,
    part_path,
    run_metric,
    run_step,
)
from bitatlas.analysis.metrics import METRICS, get_metric
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, chunks_by_layer
from bitatlas.analysis.schema import DamageRow, ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError


def unit(key, layer, params=(4, 4)):
    return QuantUnit(key, "q", layer, -1, *params, tensor=key)


@pytest.fixture
def ctx():
    units = tuple(unit(f"layers.{i}/q", i) for i in range(4))
    index = ModelIndex("/nowhere", "d", "toy", "A", "a", units, (), 4, 0, 0, None)
    return MeasureContext(index, seed=5)


class Counting(Metric):
    """Adds up random numbers; says how often each step ran."""

    NAME, TITLE, UNIT, SOURCE = "counting", "t", "u", "s"
    NEEDS, ADDITIVE, PER_FORMAT, EMITS = "weights", True, False, ("counting", "counting_total")
    SETTINGS = {"scale": 2.0}

    def __init__(self):
        self.ran: list[str] = []

    def plan(self, ctx):
        return [u.key for u in ctx.index.units]

    def step(self, ctx, key):
        self.ran.append(key)
        value = float(ctx.rng(key).random()) * self.option(ctx, "scale")
        rows = [DamageRow("counting", key, "-", value, float("nan"), 3)]
        return StepResult(rows, {"value": np.array([value])})

    def finish(self, ctx, parts):
        total = sum(float(parts[k]["value"][0]) for k in parts)
        return [DamageRow("counting_total", "all", "-", total)]

    def cost(self, ctx):
        return Cost(len(ctx.index.units))


def test_rows_come_back_exactly_and_steps_are_not_repeated(ctx, tmp_path):
    metric = Counting()
    first = run_metric(metric, ctx, tmp_path)
    assert len(metric.ran) == 4
    again = run_metric(metric, ctx, tmp_path)
    assert len(metric.ran) == 4
    assert [(r.metric, r.unit, r.value, r.count) for r in first] == [
        (r.metric, r.unit, r.value, r.count) for r in again
    ]
    assert all(math.isnan(r.stderr) for r in again)
    assert first[-1].value == pytest.approx(sum(r.value for r in first[:-1]))


def test_a_damaged_part_is_measured_again(ctx, tmp_path):
    metric = Counting()
    rows = run_metric(metric, ctx, tmp_path)
    path = part_path(tmp_path, "layers.1/q")
    path.write_bytes(path.read_bytes()[:100])
    again = run_metric(metric, ctx, tmp_path)
    assert metric.ran[4:] == ["layers.1/q"]
    assert [r.value for r in rows] == [r.value for r in again]


def test_cancel_by_exception_keeps_what_is_done(ctx, tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def on_step(step):
        seen.append((step.key, step.done, step.total, step.reused))
        if step.done == 2:
            raise Stop

    metric = Counting()
    with pytest.raises(Stop):
        run_metric(metric, ctx, tmp_path, on_step)
    with pytest.raises(RuntimeError, match="2 of 4 steps are missing"):
        finish_metric(metric, ctx, tmp_path)
    told = [s[0] for s in seen]
    seen.clear()
    run_metric(metric, ctx, tmp_path, lambda s: seen.append((s.key, s.done, s.total, s.reused)), done=told)
    assert seen == [("layers.2/q", 3, 4, False), ("layers.3/q", 4, 4, False)]
    assert len(metric.ran) == 4


def test_nothing_half_written_when_a_step_fails_or_the_disk_is_full(ctx, tmp_path, monkeypatch):
    import bitatlas.analysis.measure as measure

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run_step(Counting(), ctx, tmp_path, "layers.0/q")
    assert list(tmp_path.iterdir()) == []


def test_file_names_are_safe_and_distinct(tmp_path):
    keys = ["a/b", "a-b", "a b", "../x", "", "x" * 500, "größe"]
    paths = {part_path(tmp_path, k) for k in keys}
    assert len(paths) == len(keys)
    assert all(p.parent == tmp_path and len(p.name) < 120 and p.name.isascii() for p in paths)


def test_parts_are_a_mapping_of_the_plan(ctx, tmp_path):
    metric = Counting()
    run_metric(metric, ctx, tmp_path)
    parts = PartsOnDisk(tmp_path, metric.plan(ctx))
    assert list(parts) == metric.plan(ctx)
    assert set(parts["layers.0/q"]) == {"value"}
    with pytest.raises(KeyError):
        parts["layers.9/q"]


def test_random_numbers_depend_on_seed_and_label_only(ctx):
    same = MeasureContext(ctx.index, seed=5)
    other = MeasureContext(ctx.index, seed=6)
    assert ctx.rng("a", 1).random() == same.rng("a", 1).random()
    assert len({ctx.random_seed("a", 1), ctx.random_seed("a1"), other.random_seed("a", 1)}) == 3


def test_chunks_follow_layers_and_sizes():
    units = [unit("e", -1), *(unit(f"a{i}", 0) for i in range(5)), unit("b", 1, (8, 8))]
    chunks = chunks_by_layer(units, max_params=32)
    assert {k: [u.key for u in v] for k, v in chunks.items()} == {
        "outside the layers": ["e"],
        "layer 0 part 0": ["a0", "a1"],
        "layer 0 part 1": ["a2", "a3"],
        "layer 0 part 2": ["a4"],
        "layer 1": ["b"],
    }


def test_unknown_metric_and_setting(monkeypatch):
    monkeypatch.setitem(METRICS, "counting", Counting)
    assert isinstance(get_metric("Counting"), Counting)
    with pytest.raises(UserError, match="nearest: counting"):
        get_metric("countin")
    assert isinstance(get_metric("counting_total"), Counting)
