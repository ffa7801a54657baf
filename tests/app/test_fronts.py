"""Fronts are solved once: whatever changes the question makes another key, the same one is read from the store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitatlas.analysis.schema import TieGroup, UserError, parse_format
from bitatlas.app import fronts
from bitatlas.app.fronts import front_key, kept_front
from bitatlas.app.targets import get_target
from bitatlas.app.targets.limits import limits_of
from bitatlas.app.tasks.solving import build_problem
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store, rebuild
from bitatlas.solvers import Problem, SideBudget, get_solver


@pytest.fixture
def problem(fakes) -> Problem:
    index = fakes.dense_index(3, "fronts-3")
    table = fakes.damage_table(index)
    return Problem.build(index, table, [parse_format(f) for f in table.formats], 1 << 40)


def _key(problem: Problem, name: str = "mckp", run: str = "r", points: int = 5, time: float = 8.0) -> str:
    return front_key(problem, get_solver(name), "m", run, points, time)


def test_every_part_of_the_question_is_in_the_key(problem):
    base = _key(problem)
    assert _key(replace(problem)) == base
    assert _key(problem.with_limit(5)) == base  # a front has all budgets
    louder = problem.damage.copy()
    louder[3, 1] *= 1.0000001
    allowed = problem.allowed.copy()
    allowed[0, 0] = False
    a, b = problem.units[1:3]
    side = SideBudget("group q1", problem.bytes.astype(float), 1e6)
    others = [
        _key(replace(problem, damage=louder)), _key(replace(problem, allowed=allowed)), _key(replace(problem, bytes=problem.bytes + 1)),
        _key(replace(problem, pins={a: "int8-g64"})), _key(replace(problem, ties=(TieGroup("t", (a, b)),))),
        _key(replace(problem, side=(side,))), _key(replace(problem, side=(replace(side, limit=2e6),))),
        _key(replace(problem, metric="other")), _key(replace(problem, formats=problem.formats[::-1])),
        _key(problem, "hull"), _key(problem, run="s"), _key(problem, points=6), _key(problem, time=9.0),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
    assert _key(problem, "hull", time=1.0) == _key(problem, "hull", time=2.0)  # has its whole front at once


def test_the_same_engine_asked_again_is_the_same_question(fakes):
    index = fakes.dense_index(3, "fronts-3")
    table = fakes.damage_table(index)

    def under(target: str) -> Problem:
        limits = limits_of(get_target(target), index, table.formats)
        return build_problem(index, table.select(limits.formats), limits.formats, 1 << 40, {}, limits)

    key = _key(under("mlx"))
    assert _key(under("mlx")) == key
    assert _key(under("gptqmodel")) != key
    # Another process may go through a set in another order.
    pinned = under("mlx")
    assert _key(replace(pinned, engine_pins=frozenset(pinned.units))) == key


def test_settings_of_the_solver_are_in_the_key(problem):
    keys = {
        front_key(problem, get_solver("random_best", {"samples": n} if n else None), "m", "r", 5, 8.0)
        for n in (0, 3, 4)
    }
    assert len(keys) == 3


def test_other_code_is_another_front(problem, monkeypatch):
    base = _key(problem)
    monkeypatch.setattr(fronts, "_code", lambda: "other")
    assert _key(problem) != base


def test_the_same_question_is_not_solved_again(problem, tmp_path, monkeypatch):
    store, solver = Store(Home(tmp_path)), get_solver("mckp")
    made = kept_front(store, "m", "r", problem, solver, points=5)
    monkeypatch.setattr(fronts, "frontier", lambda *_, **__: pytest.fail("solved again"))
    prepare = lambda p: pytest.fail("prepared again")  # noqa: E731
    for _ in range(2):
        found = kept_front(store, "m", "r", problem, solver, points=5, prepare=prepare)
        for name in ("payload_bytes", "predicted", "choice", "supported"):
            np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
        assert (found.seconds, found.evaluations, found.metric) == (
            made.seconds,
            made.evaluations,
            made.metric,
        )
        rebuild(store.home)  # the second time from its copy
    assert [f["run"] for f in store.frontiers("m")] == ["r"]


def test_a_store_that_cannot_be_written_does_not_hide_the_answer(problem, tmp_path, monkeypatch):
    store = Store(Home(tmp_path))

    def refuse(*_: object) -> str:
        raise UserError("the disk is full")

    monkeypatch.setattr(store, "put_frontier", refuse)
    assert len(kept_front(store, "m", "r", problem, get_solver("hull"), points=5).payload_bytes) > 1
    assert store.frontiers("m") == []
