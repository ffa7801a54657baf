"""How stable an allocation is: the same question, its own metric, other damages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitatlas.analysis.fisher.matrix import ProbeMatrix
from bitatlas.analysis.schema import NO_FORMAT, Budget, DamageRow, SensitivityTable
from bitatlas.app.expert_rules import ExpertRules
from bitatlas.app.tasks.solving import solve_table
from bitatlas.app.tasks.stability import solved_again, stability
from bitatlas.cache.store import Store


@pytest.fixture
def world(home, fakes):
    """A dense model with one table without errors, one with, and one that probes stand behind."""
    index, store = fakes.dense_index(4, "stable-4"), Store(home)
    store.put_model(index)
    base = fakes.damage_table(index)
    tables = {
        "weight_error": replace(base, metric="weight_error", stderr=np.full(base.damage.shape, np.nan), run="r-we"),
        "kl_flip": replace(base, metric="kl_flip", stderr=base.damage * 0.3, run="r-kl"),
        "fisher_projection": replace(base, run="r-fisher", stderr=np.full(base.damage.shape, np.nan)),
    }  # fmt: skip
    for table in tables.values():
        store.begin_run(table.run, index.digest, table.metric, formats=table.formats)
        store.write_step(table.run, "all", fakes.rows(table))
        store.finish_run(table.run)
    return index, store, tables


def _probes(store: Store, table: SensitivityTable, noise: float) -> None:
    """Sixteen sequences whose damages scatter by ``noise`` around the table, unit by unit."""
    rng = np.random.default_rng(0)
    u, f = table.damage.shape
    a = np.sqrt(2 * 32 * table.damage) * rng.lognormal(0, noise, (16, u, 1))
    ProbeMatrix(
        table.units, table.formats, a.astype(np.float32), np.ones((16, u)), np.arange(16), np.full(16, 32.0),
        np.full((16, u), 32), table.damage,
    ).save(store.home.runs(table.run) / "probes.npz")  # fmt: skip


def _plan(world, metric: str, share: float = 0.4, pins: dict[str, str] | None = None, solver: str = "mckp"):
    index, _, tables = world
    from bitatlas.analysis.schema import parse_format

    size = index.bytes_table([parse_format(f) for f in tables[metric].formats])
    low, high = size.min(1).sum(), size.max(1).sum()
    budget = Budget(int(low + share * (high - low)) + index.kept_bytes)
    return solve_table(index, tables[metric], tables[metric].formats, budget, solver, pins or {})


def test_a_metric_without_text_has_no_stability(world):
    index, store, _ = world
    found = stability(store, index, _plan(world, "weight_error"))
    assert found.kept is None
    assert np.isnan(found.share)
    assert found.how == "weight_error reads no calibration text"


def test_standard_errors_are_called_that(world):
    index, store, _ = world
    found = stability(store, index, _plan(world, "kl_flip"))
    assert "standard errors" in found.how
    assert "resampled" not in found.how
    assert 0.3 < found.share < 0.98


def test_sequences_are_resampled_where_they_are_kept(world):
    index, store, tables = world
    plan = _plan(world, "fisher_projection")
    assert stability(store, index, plan).kept is None  # no probes, no errors
    shares = {}
    for noise in (0.0, 0.5):
        _probes(store, tables["fisher_projection"], noise)
        found = stability(store, index, plan)
        assert "the 16 calibration sequences of fisher_projection resampled" in found.how
        shares[noise] = found.share
    assert shares[0.0] == pytest.approx(1)
    assert 0.2 < shares[0.5] < 0.95


def test_pinned_units_stay_and_do_not_count(world):
    index, store, tables = world
    _probes(store, tables["fisher_projection"], 0.5)
    pins = {u.key: "int8-g64" for u in index.units if u.role == "down"}
    plan = _plan(world, "fisher_projection", 0.6, pins)
    found = stability(store, index, plan)
    at = np.array([u.key in pins for u in index.units])
    assert (found.kept[at] == 1).all()
    assert found.share == pytest.approx(found.kept[~at].mean())
    assert found.share < 0.95


def test_the_question_is_the_plan_s_own(world):
    index, store, tables = world
    plan = _plan(world, "kl_flip", pins={index.units[3].key: "int8-g64"})
    rules = replace(plan, provenance=replace(plan.provenance, settings=plan.provenance.settings | ExpertRules(ties="free").settings()))  # fmt: skip
    problem, table = solved_again(store, index, rules)
    assert table.metric == "kl_flip"
    assert problem.pins == plan.pins
    assert problem.limit_bytes == plan.budget.weights_bytes - index.kept_bytes
    limits = _limits(index)
    target = solve_table(index, tables["kl_flip"], limits.formats, Budget(900_000), "mckp", {}, limits)
    posed, _ = solved_again(store, index, target)
    assert posed.ties == limits.ties
    assert np.array_equal(posed.bytes, limits.bytes(index, posed.formats))


def _limits(index):
    from bitatlas.app.targets import get_target
    from bitatlas.app.targets.limits import limits_of

    return limits_of(get_target("mlx"), index, ("int4-g64", "int8-g64"))


@pytest.mark.parametrize(
    ("solver", "words"), [("uniform", "whatever the damages are"), ("evopress", "none to solve again")]
)
def test_plans_that_no_table_was_solved_for(world, solver, words):
    index, store, _ = world
    plan = _plan(world, "kl_flip")
    plan = replace(
        plan,
        solver=solver,
        provenance=replace(plan.provenance, settings=plan.provenance.settings | {"solver": solver}),
    )
    found = stability(store, index, plan)
    assert found.kept is None
    assert words in found.how


def test_a_plan_that_is_not_found_again_says_so(world):
    index, store, tables = world
    _probes(store, tables["fisher_projection"], 0.0)
    plan = _plan(world, "fisher_projection")
    swapped = dict(plan.formats)
    a, b = "model.layers.0.mlp.gate_proj", "model.layers.3.mlp.gate_proj"
    swapped[a], swapped[b] = "int2-g64", "int8-g64"
    found = stability(store, index, replace(plan, formats=swapped))
    assert "differ from A already without that" in found.how
    assert found.share < 1


def test_a_ranking_has_no_damages_to_draw_again(world):
    """`threshold` on a metric without formats: said in these words, not as formats that were not measured."""
    index, store, tables = world
    base = tables["kl_flip"]
    score = SensitivityTable("lim", base.units, (NO_FORMAT,), base.damage[:, :1], base.stderr[:, :1], base.count[:, :1], 0.0, "r-lim")  # fmt: skip
    store.begin_run("r-lim", index.digest, "lim")
    store.write_step("r-lim", "all", [DamageRow("lim", u, NO_FORMAT, float(d)) for u, d in zip(base.units, score.damage[:, 0])])  # fmt: skip
    store.finish_run("r-lim")
    plan = solve_table(index, score, base.formats, Budget(900_000), "threshold", {})
    found = stability(store, index, plan)
    assert found.kept is None
    assert found.how == "threshold ranks the units by lim, which has no damages to solve with again"
    # The same solver on damages is solved again.
    assert stability(store, index, _plan(world, "kl_flip", solver="threshold")).kept is not None
