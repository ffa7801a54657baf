"""`solve --fit … --kv`: weights and K/V under one budget, from the store to the file."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from bitatlas.analysis.schema import DamageRow, KvLayout, UserError, kv_unit, parse_format, parse_pair
from bitatlas.app import fronts
from bitatlas.app.cli import app
from bitatlas.app.tasks import joint, solving
from bitatlas.app.tasks.describing import describe_allocation
from bitatlas.cache.store import Store, rebuild

PAIRS = [f"kv{a}-channel/kv{b}-token" for a in (2, 4, 8) for b in (2, 4, 8)]


@pytest.fixture
def index(home, index):
    """With a run of the cache beside the others."""
    store = Store(home)
    store.begin_run("kvrun", index.digest, "kv_fisher", settings={"kv_block": 16, "kv_residual": 8})
    rows = []
    for layer in range(6):
        for pair in PAIRS:
            p = parse_pair(pair)
            value = (1 + layer) * 0.02 * (4 * 4.0**-p.k.bits + 4.0**-p.v.bits)
            rows.append(DamageRow("kv_fisher", kv_unit(layer), pair, value, count=5))
        rows += [
            DamageRow("kv_fisher", kv_unit(layer, "k"), f"kv{b}-channel", 0.08 * 4.0**-b, count=5)
            for b in (2, 4, 8)
        ]
        rows += [
            DamageRow("kv_fisher", kv_unit(layer, "v"), f"kv{b}-token", 0.02 * 4.0**-b, count=5)
            for b in (2, 4, 8)
        ]
    store.write_step("kvrun", "all", rows)
    store.finish_run("kvrun")
    return index


def test_joint_never_worse_than_a_uniform_cache_at_the_same_bytes(index):
    options = {"metric": "fisher_projection", "fit": 2_400_000, "context": 4096, "reserve": 1000}
    together = solving.solve("m", kv=True, **options)
    table = joint.find_kv_table(Store(joint_home()), index)
    assert table.layout == KvLayout(16, 8)
    assert together.kv_layout == table.layout
    plan = together.kv_plan
    kv = index.kv.plan_bytes(plan, 4096, 1, together.kv_layout)
    assert together.budget.kv_bytes == kv
    assert together.weights_bytes + kv + 1000 <= 2_400_000
    together.check_model(index)
    for bits in (8, 4):
        alone = solving.solve("m", kv_bits=bits, **options)
        assert set(alone.kv_plan) == set(range(6))
        row = table.select([next(iter(alone.kv_plan.values())).name]).damage
        assert together.predicted <= alone.predicted + float(row.sum()) + 1e-9
    described = describe_allocation(together)
    assert described["kv_bytes"] == kv
    assert sum(described["kv"].values()) == len(plan)


def test_the_front_of_both_is_the_best_split_of_every_memory(index):
    asked = {"metric": "fisher_projection", "kv": True, "context": 4096, "batch": 2}
    front = solving.frontier("m", **asked, points=40)
    assert front.metric == "fisher_projection+kv_fisher"
    assert 10 < len(front.payload_bytes) <= 40
    assert (np.diff(front.payload_bytes) > 0).all()
    assert (np.diff(front.predicted) < 0).all()
    layout, damages = KvLayout(16, 8), joint.find_kv_table(Store(joint_home()), index)
    weights = solving.find_table(
        Store(joint_home()), index, "fisher_projection", tuple(f for f in front.formats if f[:2] != "kv")
    )
    for p in range(0, len(front.payload_bytes), 4):
        names = dict(zip(front.units, np.array(front.formats)[front.choice[p]].tolist()))
        pairs = {layer: parse_pair(names.pop(kv_unit(layer))) for layer in range(6)}
        cache = index.kv.plan_bytes(pairs, 4096, 2, layout)
        payload = sum(parse_format(names[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
        assert (front.payload_bytes[p], front.kv_bytes[p]) == (payload + cache, cache)
        lost = sum(weights.damage[i, weights.formats.index(names[u])] for i, u in enumerate(weights.units))
        lost += sum(damages.damage[layer, damages.pairs.index(pair.name)] for layer, pair in pairs.items())
        assert front.predicted[p] == pytest.approx(lost)
        # Points of the hull are the exact optimum of their own size.
        memory = int(front.payload_bytes[p]) + index.kept_bytes
        exact = solving.solve("m", **asked, fit=memory, reserve=0)
        assert exact.predicted == pytest.approx(front.predicted[p], rel=1e-9)
    assert len(set((front.kv_bytes / front.payload_bytes).round(3).tolist())) > 5


def test_a_front_of_both_is_kept_and_found_again(index, monkeypatch):
    asked = {"metric": "fisher_projection", "kv": True, "context": 1024, "points": 12}
    made = solving.frontier("m", **asked)
    with monkeypatch.context() as patch:
        patch.setattr(fronts, "frontier", lambda *_, **__: pytest.fail("solved again"))
        found = solving.frontier("m", **asked)
        rebuild(joint_home())
        again = solving.frontier("m", **asked)
    for name in ("payload_bytes", "predicted", "choice", "kv_bytes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    for other in ({"context": 2048}, {"batch": 2}):
        more = solving.frontier("m", **asked | other)
        assert more.kv_bytes[-1] > made.kv_bytes[-1]
    alone = solving.frontier("m", metric="fisher_projection", points=12)
    assert len(alone.kv_bytes) == 0
    assert len(alone.units) == len(index.units)
    assert len(Store(joint_home()).frontiers(index.digest)) == 4


@pytest.mark.parametrize("solver", ["mckp", "projection_descent"])
def test_other_solvers_make_fronts_of_both(index, solver, monkeypatch):
    def with_pairs(problem, table, algorithm):
        if not algorithm.USES_INTERACTION:
            return problem
        rng = np.random.default_rng(0)
        return replace(
            problem, interaction=1e-3 * rng.normal(size=(4, *problem.damage.shape)).astype(np.float32)
        )

    monkeypatch.setattr(solving, "with_probes", with_pairs)
    front = solving.frontier("m", metric="fisher_projection", solver=solver, kv=True, context=1024, points=5)
    assert front.solver == solver
    assert len(front.kv_bytes) == len(front.predicted) > 2
    assert (np.diff(front.predicted) < 0).all()


def test_the_command_line_tells_how_to_share(index):
    line = [
        "frontier",
        "m",
        "--metric",
        "fisher_projection",
        "--points",
        "8",
        "--context",
        "4096",
        "--batch",
        "2",
    ]
    told = CliRunner().invoke(app, [*line, "--kv", "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.output)["rows"] if told.output.startswith("{") else json.loads(told.output)
    front = solving.frontier("m", metric="fisher_projection", points=8, kv=True, context=4096, batch=2)
    assert [r["total_bytes"] for r in rows] == (front.payload_bytes + index.kept_bytes).tolist()
    for row, cache in zip(rows, front.kv_bytes.tolist()):
        assert row["payload_bytes"] + row["kv_bytes"] + index.kept_bytes == row["total_bytes"]
        assert (row["kv_bytes"], row["kv_share"]) == (cache, cache / row["total_bytes"])
        assert sum(int(part.partition("x")[0]) for part in row["kv"].split()) == 6
        assert "kv" not in row["units"]
        assert row["bits_per_weight"] == row["payload_bytes"] * 8 / index.params
    for wrong, words in (
        (line, "--kv as well"),
        ([*line[:-4], "--kv"], "--context"),
        ([*line, "--kv", "--kv-metric", "kv_error"], "cannot be added"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2
        assert words in refused.output


def joint_home():
    from bitatlas.cache.paths import Home

    return Home.default()


def test_what_does_not_go_together_is_said(index):
    with pytest.raises(UserError, match="share a budget"):
        solving.solve("m", metric="fisher_projection", bits=4, kv=True)
    with pytest.raises(UserError, match="context"):
        solving.solve("m", metric="fisher_projection", fit=2_400_000, kv=True, reserve=1)
    with pytest.raises(UserError, match="too small"):
        solving.solve("m", metric="fisher_projection", fit=200_000, context=4096, kv=True, reserve=1)
    with pytest.raises(UserError, match="cannot be added"):
        solving.solve(
            "m",
            metric="fisher_projection",
            fit=2_400_000,
            context=64,
            kv=True,
            kv_metric="kv_error",
            reserve=1,
        )
    with pytest.raises(UserError, match="about the KV cache"):
        solving.solve("m", metric="kv_fisher", bits=4)


def test_the_page_draws_from_a_link(index):
    from pathlib import Path

    from streamlit.util import calc_hash

    import bitatlas.app

    at = AppTest.from_file(str(Path(next(iter(bitatlas.app.__path__))) / "main.py"), default_timeout=120)
    at.query_params["study"] = f"{index.name}@{index.digest[:8]}"
    at.query_params["kv_context"] = "4096"
    at._page_hash = calc_hash("kv")
    at.run()
    assert not at.exception, [e.value for e in at.exception]
    assert "K at 4 bits hurts" in next(m.value for m in at.markdown if m.value.startswith("## "))
    assert any("--kv" in c.value and "--context 4096" in c.value for c in at.code)
    assert any("Give the KV cache" in m.value for m in at.markdown)
    assert any("The KV cache should get" in m.value for m in at.markdown)
    line = next(c.value for c in at.code if "bitatlas frontier" in c.value)
    assert "--kv --kv-metric kv_fisher --context 4096 --batch 1" in line
    # What the page solved is what the command line finds.
    stored = Store(joint_home()).frontiers(index.digest)
    assert [f["metric"] for f in stored] == ["fisher_projection+kv_fisher"]
    options = shlex.split(line)
    solving.frontier(
        "m",
        metric="fisher_projection",
        formats=options[options.index("--formats") + 1],
        kv=True,
        context=4096,
    )
    assert len(Store(joint_home()).frontiers(index.digest)) == 1


def test_settings_of_the_solver_reach_it_from_the_command_line(index, tmp_path):
    from bitatlas.analysis.schema import Allocation

    def run(*more):
        out = tmp_path / "a.json"
        told = CliRunner().invoke(
            app, ["solve", "m", "--metric", "fisher_projection", "--fit", "2400000", "--context", "4096", "--reserve", "1000",
                  "--solver", "kvtuner", "-o", str(out), "--json", *more]
        )  # fmt: skip
        return told, out

    kv = ("--kv",)
    done, out = run(*kv, "--set", "exact=false", "--set", "trials=40")
    assert done.exit_code == 0, done.output
    published = Allocation.from_json(out.read_text())
    assert published.provenance.settings["solver_settings"] == {"exact": False, "trials": 40}
    done, out = run(*kv)
    exact = Allocation.from_json(out.read_text())
    assert "solver_settings" not in exact.provenance.settings
    assert exact.predicted < published.predicted
    done, out = run("--kv-bits", "4", "--set", "exact=false", "--set", "trials=40")
    assert done.exit_code == 0, done.output
    weights = Allocation.from_json(out.read_text())
    assert weights.provenance.settings["solver_settings"]["trials"] == 40
    wrong, _ = run("--kv-bits", "4", "--set", "exact=perhaps")
    assert wrong.exit_code == 2
    assert "wrong kind" in wrong.output
