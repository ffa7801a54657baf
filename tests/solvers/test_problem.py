from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitatlas.analysis.schema import FORMATS, TieGroup, UserError
from bitatlas.solvers import Problem, get_solver

FOUR = ["int2-g64", "int3-g64", "int4-g64", "int8-g64"]


def test_build_follows_the_index_and_the_table(index, make_table):
    table = make_table()
    problem = Problem.build(index, table, ["int4-g64", "int2-g64"], 9000)
    assert problem.units == index.unit_keys()
    assert problem.damage[:, 0].tolist() == table.damage[:, 2].tolist()
    assert problem.bytes[3, 1] == FORMATS["int2-g64"].payload_bytes(24, 24)
    assert problem.allowed.all()
    assert problem.kept_bytes == 48
    assert not problem.imputed.any()


def test_rows_of_the_table_may_come_in_any_order(index, make_table):
    table = make_table()
    back = dataclasses.replace(table, units=table.units[::-1], damage=table.damage[::-1])
    a, b = (Problem.build(index, t, FOUR, 14_000) for t in (table, back))
    assert (a.damage == b.damage).all()


def test_format_that_was_not_measured(index, make_table):
    with pytest.raises(UserError, match="not measured for int5-g64"):
        Problem.build(index, make_table(), ["int4-g64", "int5-g64"], 9000)


def test_pass_through_needs_no_measurement(index, make_table):
    problem = Problem.build(index, make_table(), ["int4-g64", "bf16"], 9000)
    assert (problem.damage[:, 1] == 0).all()


def test_a_metric_without_formats(index, make_table):
    table = make_table()
    alpha = dataclasses.replace(table, formats=("-",), damage=table.damage[:, :1])
    with pytest.raises(UserError, match="does not depend on the format"):
        Problem.build(index, alpha, FOUR, 14_000)


class TestPins:
    def test_a_format_of_its_own(self, index, make_table):
        problem = Problem.build(
            index, make_table(), ["int2-g64", "int3-g64"], 20_000, pins={"embed": "int8-g64"}
        )
        assert problem.formats == ("int2-g64", "int3-g64", "int8-g64")
        assert problem.allowed[0].tolist() == [False, False, True]
        assert not problem.allowed[1:, 2].any()
        solution = get_solver("mckp").solve(problem)
        assert solution.choice[0] == 2
        assert (solution.choice[1:] < 2).all()

    def test_reaches_tied_units(self, index, make_table):
        tie = TieGroup("qkv", ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"))
        pins = {"layers.0.k_proj": "int8-g64"}
        problem = Problem.build(index, make_table(), FOUR[:3], 20_000, pins, [tie])
        assert get_solver("mckp").solve(problem).choice[1:4].tolist() == [3, 3, 3]

    def test_contradiction_through_a_tie(self, index, make_table):
        tie = TieGroup("qkv", ("layers.0.q_proj", "layers.0.k_proj"))
        pins = {"layers.0.q_proj": "int2-g64", "layers.0.k_proj": "int8-g64"}
        with pytest.raises(UserError, match="two pins contradict"):
            Problem.build(index, make_table(), FOUR, 20_000, pins, [tie])

    def test_unknown_unit(self, index, make_table):
        with pytest.raises(UserError, match="does not have"):
            Problem.build(index, make_table(), FOUR, 20_000, {"layers.9.q_proj": "int8-g64"})

    def test_to_a_format_whose_damage_is_unknown(self, index, make_table):
        table = make_table()
        table.damage[1, 3] = np.nan
        with pytest.raises(UserError, match="pinned to int8-g64, whose damage is unknown"):
            Problem.build(index, table, FOUR, 20_000, {index.units[1].key: "int8-g64"})


class TestTies:
    def test_overlapping_groups_become_one(self):
        ties = [TieGroup("x", ("a", "b")), TieGroup("y", ("c", "d")), TieGroup("z", ("b", "d"))]
        problem = Problem.of(
            np.arange(10.0).reshape(5, 2), np.ones((5, 2)), 5, units=list("eabcd"), ties=ties
        )
        assert problem.classes.of_unit.tolist() == [0, 1, 1, 1, 1]
        assert problem.classes.damage.tolist() == [[0, 1], [2 + 4 + 6 + 8, 3 + 5 + 7 + 9]]
        assert problem.classes.bytes.tolist() == [[1, 1], [4, 4]]

    def test_nothing_in_common(self):
        damage = np.array([[1.0, np.nan], [np.nan, 1.0]])
        with pytest.raises(UserError, match="none in common"):
            Problem.of(damage, np.ones((2, 2)), 5, ties=[TieGroup("t", ("unit0", "unit1"))])

    def test_unknown_unit(self):
        with pytest.raises(UserError, match="tie 't' names a unit"):
            Problem.of(np.ones((1, 1)), np.ones((1, 1)), 5, ties=[TieGroup("t", ("unit0", "nobody"))])


class TestUnknownDamage:
    def test_expert_takes_the_mean_of_its_layer_s_others(self, index, make_table):
        table = make_table()
        row = {u.key: i for i, u in enumerate(index.units)}
        lost = row["layers.1.experts.2.gate"]
        table.damage[lost] = np.nan
        problem = Problem.build(index, table, FOUR, 14_000)
        others = [row[f"layers.1.experts.{e}.gate"] for e in (0, 1, 3)]
        assert problem.damage[lost] == pytest.approx(table.damage[others].mean(axis=0))
        assert np.flatnonzero(problem.imputed).tolist() == [lost]
        solution = get_solver("hull").solve(problem)
        assert solution.certificate.imputed == 1

    def test_a_whole_layer_lost_falls_back_to_the_role(self, index, make_table):
        table = make_table()
        lost = [i for i, u in enumerate(index.units) if u.layer == 1 and u.role == "down"]
        kept = [i for i, u in enumerate(index.units) if u.layer == 0 and u.role == "down"]
        table.damage[lost] = np.nan
        problem = Problem.build(index, table, FOUR, 14_000)
        assert problem.damage[lost[0]] == pytest.approx(table.damage[kept].mean(axis=0))

    def test_a_role_lost_falls_back_to_damage_per_weight(self, index, make_table):
        table = make_table()
        table.damage[0] = np.nan
        problem = Problem.build(index, table, FOUR, 14_000)
        params = np.array([u.params for u in index.units])
        rate = (table.damage[1:] / params[1:, None]).mean(axis=0)
        assert problem.damage[0] == pytest.approx(rate * params[0])

    def test_never_zero(self, index, make_table):
        table = make_table()
        table.damage[5:20] = np.nan
        problem = Problem.build(index, table, [*FOUR, "bf16"], 90_000)
        assert (problem.damage[5:20, :4] > 0).all()

    def test_a_unit_known_in_part_loses_only_those_formats(self, index, make_table):
        table = make_table()
        table.damage[4, 1] = np.nan
        problem = Problem.build(index, table, FOUR, 14_000)
        assert problem.allowed[4].tolist() == [True, False, True, True]
        assert not problem.imputed.any()

    def test_nothing_measured(self, index, make_table):
        table = make_table()
        table.damage[:] = np.nan
        with pytest.raises(UserError, match="no unit measured in all formats"):
            Problem.build(index, table, FOUR, 14_000)


class TestImpossibleBudget:
    def test_names_the_smallest_and_the_format_that_would_fit(self, index, make_table):
        three = Problem.build(index, make_table(), ["int3-g64", "int4-g64"], 0)
        two = Problem.build(index, make_table(), ["int2-g64"], 0).min_bytes
        with pytest.raises(UserError) as error:
            get_solver("hull").solve(three.with_limit(three.min_bytes - 1))
        assert f"({three.min_bytes} bytes)" in error.value.found
        assert "allow int" in error.value.fix
        # One byte too little: the smallest change is the largest format below int3-g64.
        name = error.value.fix.removeprefix("allow ").split(":")[0]
        total = Problem.build(index, None, [name], 0).min_bytes
        assert two < total < three.min_bytes

    def test_the_format_it_names_really_fits(self, index, make_table):
        problem = Problem.build(index, make_table(), ["int4-g64", "int8-g64"], 0)
        for share in (0.95, 0.9, 0.8, 0.75):
            limit = int(problem.min_bytes * share)
            with pytest.raises(UserError) as error:
                get_solver("mckp").solve(problem.with_limit(limit))
            name = error.value.fix.removeprefix("allow ").split(":")[0]
            retry = Problem.build(index, None, ["int4-g64", "int8-g64", name], limit)
            assert get_solver("uniform").solve(retry).certificate.payload_bytes <= limit

    def test_nothing_at_all_would_fit(self, index, make_table):
        problem = Problem.build(index, make_table(), ["int4-g64"], 100)
        with pytest.raises(UserError, match="the smallest there is"):
            get_solver("mckp").solve(problem)

    def test_pins_are_named_when_they_are_the_reason(self, index, make_table):
        free = Problem.build(index, make_table(), FOUR, 0)
        pins = {"embed": "int8-g64"}
        pinned = Problem.build(index, make_table(), FOUR, free.min_bytes + 10, pins)
        with pytest.raises(UserError, match="the pins make the budget impossible"):
            get_solver("mckp").solve(pinned)
        with pytest.raises(UserError, match="the budget is too small"):
            get_solver("mckp").solve(pinned.with_limit(free.min_bytes - 1))

    def test_pin_outside_the_formats(self, index, make_table):
        free = Problem.build(index, make_table(), FOUR[:2], 0)
        pinned = Problem.build(index, make_table(), FOUR[:2], free.min_bytes, {"embed": "int8-g64"})
        with pytest.raises(UserError, match="the pins make the budget impossible"):
            get_solver("hull").solve(pinned)


def test_tables_that_do_not_go_together():
    with pytest.raises(ValueError, match="one \\(U, F\\) shape"):
        Problem.of(np.ones((2, 3)), np.ones((3, 2)), 5)


def test_merged_ties_survive_a_new_limit():
    problem = Problem.of(
        np.ones((4, 2)), np.full((4, 2), [1, 2]), 5, ties=[TieGroup("t", ("unit0", "unit2"))]
    )
    classes = problem.classes
    assert problem.with_limit(7).classes is classes
    assert problem.with_limit(7).limit_bytes == 7


def test_quadratic_is_the_mean_square_of_the_sums():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(7, 4, 3))
    scale = 1 / (2 * 128)
    damage = scale * (a**2).mean(axis=0)
    choice = np.array([0, 2, 1, 1])
    sums = a[:, np.arange(4), choice].sum(axis=1)
    full = Problem.of(damage, np.ones((4, 3)), 9, interaction=a, interaction_scale=scale)
    assert full.quadratic(choice) == pytest.approx(scale * np.mean(sums**2))
    none = dataclasses.replace(full, shrinkage=0.0)
    assert none.quadratic(choice) == pytest.approx(full.objective(choice))
