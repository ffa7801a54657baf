"""`solve --fit … --kv`: weights and K/V under one budget, from the store to the file."""

from __future__ import annotations

import pytest
from streamlit.testing.v1 import AppTest

from bitatlas.analysis.schema import DamageRow, KvLayout, UserError, kv_unit, parse_pair
from bitatlas.app.tasks import joint, solving
from bitatlas.app.tasks.describing import describe_allocation
from bitatlas.cache.store import Store

PAIRS = [f"kv{a}-channel/kv{b}-token" for a in (2, 4, 8) for b in (2, 4, 8)]


@pytest.fixture
def index(home, fakes, monkeypatch):
    index = fakes.dense_index(6, "dense-6")
    store = Store(home)
    fakes.fill(store, index)
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
    monkeypatch.setattr(solving, "register", lambda model: index)
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


def test_settings_of_the_solver_reach_it_from_the_command_line(index, tmp_path):
    from typer.testing import CliRunner

    from bitatlas.analysis.schema import Allocation
    from bitatlas.app.cli import app

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
