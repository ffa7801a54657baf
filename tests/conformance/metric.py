"""What every metric must do. A metric's test subclasses `MetricConformance` and gives it one fixture, ``case``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitatlas.analysis.cost import estimate
from bitatlas.analysis.measure import MeasureContext, finish_metric, part_path, run_metric, run_step
from bitatlas.analysis.metrics.base import Metric
from bitatlas.analysis.schema import NO_FORMAT, DamageRow, SensitivityTable

__all__ = ["Case", "MetricConformance"]


@dataclass(frozen=True)
class Case:
    """A metric and how to make a fresh context for it; ``make(seed)`` opens everything anew."""

    metric: type[Metric]
    make: Callable[[int], MeasureContext]


def same(a: list[DamageRow], b: list[DamageRow]) -> bool:
    """Equal rows, NaN equal to NaN, to the last bit."""
    return [repr(r) for r in a] == [repr(r) for r in b]


class MetricConformance:
    """Subclass it and define ``@pytest.fixture(scope="class") def case(self, ...) -> Case``."""

    @pytest.fixture(scope="class")
    @classmethod
    def direct(cls, case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[DamageRow], Path]:
        """Rows of an undisturbed run, and its parts."""
        parts = tmp_path_factory.mktemp("parts")
        with case.make(0) as ctx:
            return run_metric(case.metric(), ctx, parts), parts

    def test_describes_itself(self, case: Case) -> None:
        kind = case.metric
        # Its own values first: a damage carries the metric's name, so that one name is enough to ask for it.
        assert kind.NAME in kind.EMITS or not kind.PER_FORMAT
        assert not kind.PER_FORMAT or kind.EMITS[0] == kind.NAME
        assert len(set(kind.EMITS)) == len(kind.EMITS)
        assert kind.__module__.rpartition(".")[2] == kind.NAME or "test" in kind.__module__
        assert kind.NAME.isidentifier()
        assert kind.NAME.islower()
        for words in (kind.TITLE, kind.UNIT, kind.SOURCE, kind.__doc__):
            assert words
            assert words.strip()
        assert kind.NEEDS in ("weights", "activations", "gradients", "forwards")
        assert isinstance(kind.ADDITIVE, bool)
        assert isinstance(kind.PER_FORMAT, bool)
        assert kind.VERSION >= 1
        for name in ("plan", "step", "cost"):
            assert getattr(kind, name).__doc__

    def test_plan_is_deterministic_and_its_keys_are_unique(self, case: Case, tmp_path: Path) -> None:
        with case.make(0) as one, case.make(0) as two:
            plan = case.metric().plan(one)
            assert plan == case.metric().plan(two)
        assert plan
        assert len({part_path(tmp_path, key) for key in plan}) == len(plan)

    def test_cost_is_known_before_anything_is_loaded(self, case: Case) -> None:
        with case.make(0) as ctx:
            metric = case.metric()
            cost = estimate(metric, ctx)
            assert cost.steps == len(metric.plan(ctx))
            assert cost.seconds > 0
            assert math.isfinite(cost.seconds)
            assert "loaded" not in ctx.__dict__ or "loaded" in ctx._given
            if metric.NEEDS != "weights":
                assert cost.forward_tokens >= ctx.calibration_tokens

    def test_one_row_for_every_unit_and_format(self, case: Case, direct: Any) -> None:
        rows, _ = direct
        with case.make(0) as ctx:
            formats = {f.name for f in ctx.formats}
            units = set(case.metric().unit_keys(ctx))
        found: dict[str, set[tuple[str, str]]] = {}
        for r in rows:
            assert r.metric in case.metric.EMITS
            assert (r.unit, r.format) not in found.setdefault(r.metric, set()), r
            found[r.metric].add((r.unit, r.format))
            assert r.unit in units
            assert r.format in formats | {NO_FORMAT} or case.metric.SUBJECT == "kv"
        assert set(found) == set(case.metric.EMITS)
        if case.metric.PER_FORMAT:
            assert found[case.metric.NAME] == {(u, f) for u in units for f in formats}

    def test_values_are_numbers_or_unknown_and_spread_is_not_negative(self, case: Case, direct: Any) -> None:
        rows, _ = direct
        assert any(math.isfinite(r.value) for r in rows)
        for r in rows:
            assert isinstance(r.value, float)
            assert isinstance(r.count, int)
            assert not math.isinf(r.value)
            assert math.isnan(r.stderr) or 0 <= r.stderr < math.inf
            assert r.floor >= 0
            if r.count == 0:
                # Nothing was seen: a value would be invented.
                assert math.isnan(r.value)

    def test_rows_make_a_table(self, case: Case, direct: Any) -> None:
        rows, _ = direct
        with case.make(0) as ctx:
            units = case.metric().unit_keys(ctx)
        for name in case.metric.EMITS:
            table = SensitivityTable.from_rows([r for r in rows if r.metric == name], units)
            assert table.damage.shape == (len(units), len(table.formats))
            assert np.isfinite(table.damage).any()

    def test_same_seed_same_rows(self, case: Case, direct: Any, tmp_path: Path) -> None:
        with case.make(0) as ctx:
            assert same(run_metric(case.metric(), ctx, tmp_path), direct[0])

    def test_finish_from_parts_equals_the_run(self, case: Case, direct: Any) -> None:
        rows, parts = direct
        with case.make(0) as ctx:
            metric = case.metric()
            steps = [r for key in metric.plan(ctx) for r in run_step(metric, ctx, parts, key)]
            assert same(steps + finish_metric(metric, ctx, parts), rows)
            assert same(finish_metric(metric, ctx, parts), rows[len(steps) :])

    def test_killed_and_resumed_by_another_process_gives_the_same_rows(
        self, case: Case, direct: Any, tmp_path: Path
    ) -> None:
        with case.make(0) as ctx:
            plan = case.metric().plan(ctx)
            done = plan[: (len(plan) + 1) // 2]
            # Backwards, as a second worker might take them.
            for key in reversed(done):
                run_step(case.metric(), ctx, tmp_path, key)
        with case.make(0) as fresh:
            reused = []
            rows = run_metric(case.metric(), fresh, tmp_path, lambda s: reused.append(s.reused))
        assert same(rows, direct[0])
        assert reused == [key in done for key in plan]
