"""Limits beside the bytes: what a decoding step reads, multiplies and takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitatlas.analysis.schema import FORMATS, Budget, ModelIndex, QuantUnit, SensitivityTable, UserError
from bitatlas.app import tasks
from bitatlas.app.side_budgets import LATENCY_SCHEMA, SideLimits, active_bytes, bit_operations, latency
from bitatlas.app.tasks.solving import solve_table

NAMES = ("int2-g64", "int4-g64", "int8-g64")


def moe(head: bool = True) -> ModelIndex:
    units = [QuantUnit("embed", "embed", -1, -1, 100, 64, "e")]
    units += [QuantUnit(f"x.{e}", "up", 0, e, 128, 64, f"x{e}") for e in range(4)]
    units += [QuantUnit("q", "q", 0, -1, 64, 64, "q")]
    units += [QuantUnit("head", "head", -1, -1, 100, 64, "h")] if head else []
    return ModelIndex("/m", "d", "m", "X", "qwen3_moe", tuple(units), (), 1, 4, 2, None, 100)


def table_of(index: ModelIndex) -> SensitivityTable:
    damage = np.random.default_rng(0).lognormal(size=(len(index.units), 1)) * np.array([[1.0, 0.1, 0.001]])
    nan = np.full(damage.shape, np.nan)
    return SensitivityTable("made", index.unit_keys(), NAMES, damage, nan, np.ones(damage.shape), 0.0, "r")


def test_an_expert_is_read_as_often_as_it_is_chosen() -> None:
    index = moe()
    whole = index.bytes_table([FORMATS[f] for f in NAMES])
    one, many = active_bytes(index, NAMES, 1), active_bytes(index, NAMES, 3)
    assert np.allclose(one[1:5], whole[1:5] / 2)
    assert np.allclose(many[1:5], whole[1:5] * (1 - 0.5**3))
    assert np.allclose(one[0], whole[0] / 100)  # a look-up
    assert np.allclose(one[5:], whole[5:])
    assert np.allclose(active_bytes(moe(head=False), NAMES)[0], whole[0])  # the table is the head too
    ops = bit_operations(index, NAMES)
    assert ops[5].tolist() == [64 * 64 * b * 16 for b in (2, 4, 8)]
    assert ops[1].tolist() == [64 * 128 * b * 16 / 2 for b in (2, 4, 8)]
    assert not ops[0].any()


def test_latency_is_looked_up_or_interpolated() -> None:
    rows = [{"rows": r, "cols": 64, "format": f, "batch": 1, "us": 5 + r * 64 * FORMATS[f].bits / 1000}
            for r in (64, 128) for f in NAMES]  # fmt: skip
    us = latency(moe(), NAMES, {"rows": rows, "device": "d"})
    assert us[5].tolist() == [5 + 64 * 64 * b / 1000 for b in (2, 4, 8)]
    assert us[6] == pytest.approx([5 + 100 * 64 * b / 1000 for b in (2, 4, 8)])  # 100 rows were not timed
    with pytest.raises(UserError, match="batch 2"):
        latency(moe(), NAMES, {"rows": rows, "device": "d"}, 2)


def test_the_solution_keeps_to_every_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path))
    index = moe()
    rows = [{"rows": r, "cols": 64, "format": f, "batch": 1, "us": FORMATS[f].bits * r / 10.0}
            for r in (64, 100, 128) for f in NAMES]  # fmt: skip
    (tmp_path / "latency.json").write_text(
        json.dumps({"schema": LATENCY_SCHEMA, "device": "d", "rows": rows})
    )
    table, budget = table_of(index), Budget(10**9)
    free = solve_table(index, table, NAMES, budget, "ilp", {})
    assert set(free.formats.values()) == {"int8-g64"}

    def spent(plan, cost: np.ndarray) -> float:
        return sum(cost[i, NAMES.index(plan.formats[u.key])] for i, u in enumerate(index.units))

    for side, cost, limit in (
        (SideLimits(latency_ms=0.2), latency(index, NAMES, {"rows": rows}), 200),
        (SideLimits(active_bytes=14_000), active_bytes(index, NAMES), 14_000),
        (SideLimits(bops=0.003), bit_operations(index, NAMES), 3e6),
    ):
        assert spent(free, cost) > limit
        plan = solve_table(index, table, NAMES, budget, "ilp", {}, side=side)
        assert spent(plan, cost) <= limit
        assert set(plan.formats.values()) != {"int2-g64"}
        assert plan.provenance.settings["side"]["batch"] == 1
    with pytest.raises(UserError, match="ilp"):
        solve_table(index, table, NAMES, budget, "hull", {}, side=SideLimits(bops=1))
    with pytest.raises(UserError, match="positive"):
        SideLimits(bops=-1).budgets(index, NAMES)


def test_kernels_are_timed_kept_written_and_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint
) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tasks.benching, "_SECONDS", 0.0)
    with pytest.raises(UserError, match="not been timed"):
        SideLimits(latency_ms=1).budgets(moe(), NAMES)
    folder = tiny_checkpoint("llama")
    shapes = {(u.rows, u.cols) for u in tasks.open_index(folder).units}
    table = tasks.bench_kernels(folder, formats="int4-g32,bf16", batches="1,2", out=tmp_path / "t.json")
    assert len(table["rows"]) == len(shapes) * 4
    assert all(r["us"] > 0 for r in table["rows"])
    more = tasks.bench_kernels(folder, formats="int4-g32,int2-g32", batches="1")
    assert len(more["rows"]) == len(shapes) * 5
    assert json.loads((tmp_path / "home/latency.json").read_text()) == more
    tasks.bench_kernels(import_=tmp_path / "t.json")
    assert json.loads((tmp_path / "home/latency.json").read_text()) == table
    (tmp_path / "bad.json").write_text('{"schema": "bitatlas/latency/1", "rows": [{"format": "x"}]}')
    with pytest.raises(UserError, match="not a latency table"):
        tasks.bench_kernels(import_=tmp_path / "bad.json")
    with pytest.raises(UserError, match="positive numbers"):
        tasks.bench_kernels(batches="0")
