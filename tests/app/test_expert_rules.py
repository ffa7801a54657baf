"""Budgets for experts by groups, floors for rare ones, what shares a format."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bitatlas.analysis.schema import FORMATS, NO_FORMAT, SensitivityTable, UserError
from bitatlas.app import tasks
from bitatlas.app.cli import app
from bitatlas.app.expert_groups import group_experts, parse_grouping
from bitatlas.app.expert_rules import ExpertRules, expert_ties, under_rules
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, get_solver


def plain(index, name: str, values: np.ndarray) -> SensitivityTable:
    column = np.asarray(values, float)[:, None]
    return SensitivityTable(name, index.unit_keys(), (NO_FORMAT,), column, np.full(column.shape, np.nan), np.ones(column.shape, int), 0.0, "run-" + name)  # fmt: skip


@pytest.fixture(scope="module")
def world(fakes):
    """4 layers of 8 experts with damage and routing; expert 5 of layer 2 was never reached."""
    index = fakes.moe_index(4, 8, "rules-4x8")
    damage = fakes.damage_table(index)
    count = np.array(
        [(7 * u.expert + 3 * u.layer) % 40 + 1 if u.expert >= 0 else np.nan for u in index.units], float
    )
    dead = [i for i, u in enumerate(index.units) if (u.layer, u.expert) == (2, 5)]
    count[dead] = 0
    return index, {damage.metric: damage, "routing_count": plain(index, "routing_count", count)}, dead


def experts_of(index):
    return np.array([u.expert for u in index.units])


def posed(world, share=0.5, ties="free", **more) -> Problem:
    index, tables, _ = world
    table = tables["fisher_projection"]
    size = index.bytes_table([FORMATS[f] for f in table.formats])
    limit = int(size[:, 0].sum() + share * (size[:, -1].sum() - size[:, 0].sum()))
    return Problem.build(index, table, table.formats, limit, ties=expert_ties(index, ties), **more)


def test_groups_hold_whole_experts_and_equal_shares(world):
    index, tables, _ = world
    count = tables["routing_count"].damage[:, 0]
    groups = group_experts(index, tables, "frequency:4")
    assert groups.names == ("q1", "q2", "q3", "q4")
    assert (groups.of_unit[experts_of(index) < 0] == -1).all()
    sizes = np.bincount(groups.of_unit[groups.of_unit >= 0])
    assert sizes.tolist() == [24] * 4  # 8 experts of 3 projections each
    for low, high in ((0, 1), (1, 2), (2, 3)):
        assert count[groups.of_unit == low].max() <= count[groups.of_unit == high].min()
    layers = group_experts(index, tables, "layer")
    assert layers.names == ("0", "1", "2", "3")
    assert all(layers.names[g] == str(u.layer) for u, g in zip(index.units, layers.of_unit) if g >= 0)
    named = group_experts(index, tables, r"regex:layers\.1\..*experts\.[34]\.")
    assert named.members("matched").sum() == 6


def test_unknown_damage_is_a_group_of_its_own(world):
    index, tables, dead = world
    hurt = tables["fisher_projection"].damage.copy()
    hurt[dead[0]] = np.nan
    table = SensitivityTable(
        "x",
        index.unit_keys(),
        tables["fisher_projection"].formats,
        hurt,
        hurt,
        np.ones(hurt.shape, int),
        0.0,
        "r",
    )
    groups = group_experts(index, {"x": table}, "damage:3", "x")
    assert groups.names == ("q1", "q2", "q3", "unknown")
    assert groups.members("unknown")[dead].all()


def test_clusters_find_two_kinds_and_name_them_by_damage(world):
    index, tables, _ = world
    table = tables["fisher_projection"]
    wild = np.array([u.expert in (2, 6) for u in index.units])
    damage = (
        np.where(wild[:, None], 5.0, 0.05)
        * np.linspace(1, 1.2, len(wild))[:, None]
        * 4.0 ** -np.arange(len(table.formats))
    )
    made = SensitivityTable(
        "x", index.unit_keys(), table.formats, damage, damage, np.ones(damage.shape, int), 0.0, "r"
    )
    groups = group_experts(index, {"x": made}, "cluster:2", "x", seed=3)
    inside = experts_of(index) >= 0
    assert groups.names == ("c1", "c2")
    assert ((groups.of_unit == 1) == wild)[inside].all()
    again = group_experts(index, {"x": made}, "cluster:2", "x", seed=3)
    assert (again.of_unit == groups.of_unit).all()


def test_limits_on_groups_hold_and_cost_damage(world):
    index, tables, _ = world
    problem = posed(world)
    free = get_solver("hull").solve(problem)
    rules = ExpertRules("frequency:4", ("q1=2.9", "q4=30000", "*=4"))
    limited = under_rules(problem, index, tables, rules, "fisher_projection")
    assert [s.name for s in limited.side] == ["group q1", "group q4", "group q2", "group q3"]
    groups = group_experts(index, tables, "frequency:4")
    found = get_solver("hull").solve(limited)
    exact = get_solver("ilp").solve(limited)
    size = problem.bytes[np.arange(len(index.units)), found.choice]
    bits = {
        n: size[groups.members(n)].sum() * 8 / problem.params[groups.members(n)].sum() for n in groups.names
    }
    assert bits["q1"] <= 2.9
    assert bits["q2"] <= 4 >= bits["q3"]
    assert size[groups.members("q4")].sum() <= 30000
    assert (
        free.certificate.objective < exact.certificate.objective <= found.certificate.objective * (1 + 1e-9)
    )
    assert exact.certificate.objective >= found.certificate.lower_bound - 1e-12
    assert found.certificate.objective <= 1.02 * exact.certificate.objective


def test_rare_experts_get_their_floor_and_pins_come_first(world):
    index, tables, dead = world
    problem = posed(world, 0.05)
    rules = ExpertRules(floor="int5-g64")
    limited = under_rules(problem, index, tables, rules, "fisher_projection")
    at = problem.formats.index("int5-g64")
    assert (get_solver("hull").solve(limited.with_limit(problem.limit_bytes + 5000)).choice[dead] >= at).all()
    changed = np.flatnonzero((limited.allowed != problem.allowed).any(axis=1))
    assert set(changed) == set(dead) | set(np.flatnonzero(problem.imputed & (problem.experts >= 0)))
    pinned = posed(world, 0.05, pins={index.units[dead[0]].key: "int2-g64"})
    kept = under_rules(pinned, index, tables, rules, "fisher_projection")
    assert kept.allowed[dead[0]].tolist() == pinned.allowed[dead[0]].tolist()
    few = under_rules(problem, index, tables, ExpertRules(floor="int4-g64", below=6), "fisher_projection")
    count = tables["routing_count"].damage[:, 0]
    assert (
        few.allowed[:, :2].any(axis=1) == ~((count < 6) | (problem.imputed & (problem.experts >= 0)))
    ).all()


def test_ties(world):
    index, *_ = world
    roles = {u.key: u.role for u in index.units}
    assert {roles[k] for t in expert_ties(index, "gate-up") for k in t.units} == {"gate", "up"}
    assert [len(t.units) for t in expert_ties(index, "expert")] == [3] * 32
    assert [len(t.units) for t in expert_ties(index, "layer")] == [24] * 4
    assert expert_ties(index, "free") == ()
    with pytest.raises(UserError, match="no such rule"):
        expert_ties(index, "all")


def test_any_units_can_be_grouped(world, dense):
    index, tables, _ = world
    keys = np.array(dense.keys)
    layers = np.array([u.layer for u in dense.index.units])
    by_layer = group_experts(dense.index, dense.tables, "layer")
    assert [by_layer.names[g] for g in by_layer.of_unit] == [str(n) if n >= 0 else "outside" for n in layers]
    by_role = group_experts(dense.index, dense.tables, "role")
    assert [by_role.names[g] for g in by_role.of_unit] == [u.role for u in dense.index.units]
    assert keys[group_experts(dense.index, {}, r"regex:\.1\.").members("matched")].tolist() == [
        k for k in keys if ".1." in k
    ]
    assert np.flatnonzero(group_experts(dense.index, {}, "units:0-2").members("selected")).tolist() == [
        0,
        1,
        2,
    ]
    hurt = group_experts(dense.index, dense.tables, "damage:3", "fisher_projection")
    damage = dense.tables["fisher_projection"].damage[:, 0]
    assert damage[hurt.members("q1")].mean() < damage[hurt.members("q3")].mean()
    assert (group_experts(index, tables, "role").of_unit >= 0).all()  # of experts and of all else
    assert set(
        np.array([u.expert for u in index.units])[group_experts(index, tables, "layer").of_unit >= 0]
    ) == set(range(8))


def test_a_group_of_a_dense_model_keeps_to_its_limit(index):
    down = [u for u in index.units if u.role == "down"]

    def bits(formats):
        taken = sum(FORMATS[formats[u.key]].payload_bytes(u.rows, u.cols) for u in down)
        return 8 * taken / sum(u.params for u in down)

    rules = ExpertRules("role", ("down=3",))
    asked = {"metric": "fisher_projection", "formats": "int{2,3,4,8}-g64"}
    assert bits(tasks.solve("m", **asked, bits=4.5, experts=rules).formats) <= 3
    assert bits(tasks.solve("m", **asked, bits=4.5).formats) > 3
    front = tasks.frontier("m", **asked, experts=rules)
    assert bits({u: front.formats[j] for u, j in zip(front.units, front.choice[-1])}) <= 3


def test_rules_for_experts_are_not_ignored_on_a_dense_model(dense):
    assert expert_ties(dense.index, "free") == ()
    with pytest.raises(UserError, match="no experts that could share"):
        expert_ties(dense.index, "layer")
    problem = tasks.build_problem(
        dense.index, dense.tables["fisher_projection"], ("int2-g64", "int4-g64"), 1 << 40, {}
    )
    with pytest.raises(UserError, match="no experts that could be rare"):
        under_rules(problem, dense.index, dense.tables, ExpertRules(floor="int4-g64"), "fisher_projection")


@pytest.mark.parametrize(("rules", "words"), [
    (ExpertRules(limits=("q1=3",)), "need a way to group"),
    (ExpertRules("frequency:4", ("q9=3",)), "no group called 'q9'"),
    (ExpertRules("frequency:4", ("q1",)), "written NAME=BITS"),
    (ExpertRules("alpha:3", ("q1=3",)), "cannot be grouped like this"),
    (ExpertRules(floor="bf16"), "as large as the floor"),
    (ExpertRules("frequency:4", ("q1=1",)), "cannot be met"),
])  # fmt: skip
def test_rules_that_cannot_be(world, rules, words):
    index, tables, _ = world
    with pytest.raises(UserError, match=words):
        get_solver("hull").solve(under_rules(posed(world), index, tables, rules, "fisher_projection"))


def test_evidence_that_is_missing_is_named(world, dense):
    index, tables, _ = world
    only = {"fisher_projection": tables["fisher_projection"]}
    with pytest.raises(UserError, match="not been measured|cannot be grouped") as error:
        group_experts(index, only, "frequency:4")
    assert "--metric routing" in str(error.value.fix)
    with pytest.raises(UserError, match="how often"):
        under_rules(posed(world), index, only, ExpertRules(floor="int4-g64", below=9), "fisher_projection")
    with pytest.raises(UserError, match="no experts"):
        group_experts(dense.index, dense.tables, "cluster:4")
    assert parse_grouping("cluster") == ("cluster", "4")


def test_the_task_and_the_command_line(home, fakes, world, monkeypatch):
    index, tables, _ = world
    store = Store(home)
    fakes.fill(store, index)
    count = tables["routing_count"]
    store.begin_run("run-c", index.digest, "routing", formats=count.formats)
    store.write_step("run-c", "all", fakes.rows(count))
    store.finish_run("run-c")
    for module in ("solving", "describing"):
        monkeypatch.setattr(f"bitatlas.app.tasks.{module}.register", lambda model: index)
    asked = {"metric": "fisher_projection", "bits": 4.0}
    rules = ExpertRules("frequency:2", ("q1=3",), ties="gate-up")
    plan = tasks.solve("m", **asked, experts=rules)
    assert plan.solver == "hull"
    assert plan.provenance.settings["experts"]["groups"] == "frequency:2"
    gate = [k for k in plan.formats if "gate" in k]
    assert all(plan.formats[k] == plan.formats[k.replace("gate", "up")] for k in gate)
    words = ["solve", "m", "--metric", "fisher_projection", "--bits", "4", "--expert-groups", "frequency:2", "--group-limit", "q1=3",
             "--expert-ties", "gate-up", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["predicted"] == pytest.approx(plan.predicted)
    front = tasks.describe_frontier(
        tasks.frontier("m", metric="fisher_projection", points=6, experts=rules), "m"
    )
    read = [row["active_bytes"] for row in front]
    assert all(0 < a <= row["payload_bytes"] for a, row in zip(read, front))
    assert read == sorted(read)
