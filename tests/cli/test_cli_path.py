"""The whole path on a tiny MoE, through the command line: scan, measure, solve, verify, pack, generate, export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.kernels.packed import load

Cli = Callable[..., Any]
FORMATS = "int{2,4,8}-g64"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3_moe")


def test_scan_loads_no_torch(model: Path):
    code = f"""
import sys
from bitatlas.app.cli import main
try:
    main(["scan", {str(model)!r}, "--json"])
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = json.loads(out)
    assert found["units"] == len(found["unit_list"]) > 0
    assert {u["expert"] for u in found["unit_list"]} >= {-1, 0, 1}
    assert found["params"] == sum(u["rows"] * u["cols"] for u in found["unit_list"])


@pytest.fixture(scope="module")
def path(home: Path, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the path once; the tests look at what it left."""
    from bitatlas.app import tasks

    folder = tmp_path_factory.mktemp("out")
    measured = tasks.measure(
        model, "fisher,routing", formats=FORMATS, calibration=text, tokens=256, seq_len=32, wait=True
    )
    plan = tasks.solve(model, metric="fisher", bits=5.0, formats=FORMATS, output=folder / "plan.json")
    verified = tasks.verify(model, folder / "plan.json", text=text, tokens=256, seq_len=32)
    packed = tasks.pack(model, folder / "plan.json", folder / "packed")
    return {"folder": folder, "measured": measured, "plan": plan, "verified": verified, "packed": packed}


def test_measured_rows_cover_every_unit(path: dict[str, Any], model: Path, cli: Cli):
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    assert path["measured"]["state"] == "done"
    index = index_model(model)
    table = Store(Home.default()).table(
        path["measured"]["result"]["runs"]["fisher_projection"], "fisher", index.unit_keys()
    )
    assert table.damage.shape == (len(index.units), 3)
    known = np.isfinite(table.damage)
    assert known.any()
    assert (table.damage[known] >= 0).all()
    # Unknown is NaN with count 0, never a zero.
    assert (table.count[~known] == 0).all()


def test_the_same_measurement_is_the_same_job(path: dict[str, Any], cli: Cli, model: Path, text: Path):
    again = cli(
        "measure",
        model,
        "--metric",
        "fisher,routing",
        "--formats",
        FORMATS,
        "--calibration",
        text,
        "--tokens",
        256,
        "--seq-len",
        32,
    )
    assert again["id"] == path["measured"]["id"]
    assert again["state"] == "done"


def test_the_allocation_fits_and_is_certified(path: dict[str, Any], model: Path):
    plan: Allocation = path["plan"]
    index = index_model(model)
    assert plan.payload_bytes * 8 <= 5.0 * index.params
    assert plan.payload_bytes == sum(
        f.payload_bytes(u.rows, u.cols) for u in index.units for f in [_format(plan.formats[u.key])]
    )
    assert plan.status == "optimal"
    assert plan.lower_bound <= plan.predicted * (1 + 1e-9)
    assert Allocation.from_json((path["folder"] / "plan.json").read_text()) == plan


def _format(name: str) -> Any:
    from bitatlas.kernels.formats import parse_format

    return parse_format(name)


def test_the_packed_model_is_the_one_that_was_verified(path: dict[str, Any], model: Path, text: Path):
    (result,) = path["verified"]["results"]
    assert result["kl_mean"] > 0
    packed = load(path["folder"] / "packed")
    tokens = torch.from_numpy(make_calibration(load_tokenizer(model), text, 256, 32, 0).tokens)
    loaded = LoadedModel.open(index_model(model))
    from bitatlas.kernels.reference import quantize_dequantize

    weights = {
        key: quantize_dequantize(loaded.handle(key).get(), _format(name))
        for key, name in path["plan"].formats.items()
    }
    with torch.no_grad():
        original = loaded.logits(tokens)
        with loaded.swapped(weights):
            simulated = loaded.logits(tokens)
        shipped = packed(tokens).logits
    assert (shipped - simulated).abs().max() <= 1e-3
    p = torch.log_softmax(original.double(), -1)
    q = torch.log_softmax(shipped.double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert float(kl) == pytest.approx(result["kl_mean"], rel=1e-3)


def test_the_packed_size_is_the_predicted_one(path: dict[str, Any]):
    from safetensors import safe_open

    total = 0
    for shard in (path["folder"] / "packed").glob("*.safetensors"):
        with safe_open(shard, "np") as f:
            total += sum(f.get_tensor(k).nbytes for k in f.keys())  # noqa: SIM118 - not a dict
    assert total == path["packed"]["predicted_bytes"] == path["plan"].weights_bytes


def test_generate_and_export(path: dict[str, Any], cli: Cli, model: Path):
    said = cli("generate", path["folder"] / "packed", "the of and", "-n", 4)
    assert said["tokens"] == 4
    assert said["text"].startswith("the of and")
    out = path["folder"] / "exported"
    done = cli("export", path["folder"] / "plan.json", "--target", "bitatlas", "-o", out)
    assert done["status"] == "servable"
    assert done["files"]
    assert all(Path(f).is_file() for f in done["files"])
    assert cli("check", path["folder"] / "plan.json", "--target", "llama.cpp")["status"] in (
        "rejected",
        "loads but decodes wrong",
    )


def test_frontier_is_sorted_and_stored(path: dict[str, Any], cli: Cli, model: Path):
    rows = cli("frontier", model, "--metric", "fisher", "--formats", FORMATS, "--points", 8)
    sizes = [r["payload_bytes"] for r in rows]
    damages = [r["predicted"] for r in rows]
    assert 2 <= len(rows) <= 8
    assert sizes == sorted(sizes)
    assert damages == sorted(damages, reverse=True)


def test_two_allocations_side_by_side(path: dict[str, Any], cli: Cli, model: Path):
    plan = path["folder"] / "plan.json"
    other = path["folder"] / "smaller.json"
    cli("solve", model, "--metric", "fisher", "--bits", 4.0, "--formats", FORMATS, "-o", other)
    found = cli("compare", model, plan, other, "--metric", "fisher")
    assert found["nbytes"][0] == path["plan"].payload_bytes
    assert found["nbytes"][1] - found["nbytes"][0] == sum(r["nbytes"] for r in found["roles"]) < 0
    assert found["damage"][1] > found["damage"][0]
    assert 0 < found["stable"] <= 1
    assert cli("compare", model, plan, plan)["title"] == "Both give every unit the same bits"


@pytest.mark.parametrize("command", ["metrics", "formats", "solvers", "targets", "doctor"])
def test_lists(cli: Cli, command: str):
    rows = cli(command)
    assert len(rows) >= 3
    assert all(isinstance(r, dict) for r in rows)


def test_jobs_can_be_looked_at(path: dict[str, Any], cli: Cli):
    rows = cli("jobs", "list")
    assert {r["id"] for r in rows} >= {path["measured"]["id"]}
    assert cli("jobs", "show", path["measured"]["id"])["state"] == "done"
    assert "fisher" in cli("jobs", "logs", path["measured"]["id"])["text"]


def test_estimate_names_a_cost_for_every_metric(cli: Cli, model: Path):
    rows = cli("estimate", model, "--metric", "all", "--tokens", 512, "--seq-len", 32)
    assert len(rows) >= 6
    assert all(r["seconds"] > 0 for r in rows if not r["skipped"])


def test_refining_keeps_the_budget_and_never_gets_worse_where_it_judges(
    path: dict[str, Any], cli: Cli, model: Path, text: Path
):
    out = path["folder"] / "refined.json"
    cli(
        "refine",
        model,
        path["folder"] / "plan.json",
        "-o",
        out,
        "--calibration",
        text,
        "--tokens",
        256,
        "--seq-len",
        32,
        "--rounds",
        2,
    )
    refined, plan = Allocation.from_json(out.read_text()), path["plan"]
    limit = plan.budget.weights_bytes - plan.kept_bytes
    assert set(refined.formats) == set(plan.formats)
    assert refined.payload_bytes <= limit
    told = refined.provenance.settings["refined"]
    assert told["kl"] == refined.predicted <= told["kl_before"]


def test_the_results_file_can_be_made_again(path: dict[str, Any], cli: Cli, model: Path, home: Path):
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    run = path["measured"]["result"]["runs"]["fisher_projection"]
    before = Store(Home.default()).rows(run)
    Home.default().db.unlink()
    made = cli("rebuild")
    assert made["models"] >= 1
    assert made["runs"] >= 2
    assert sorted(map(repr, Store(Home.default()).rows(run))) == sorted(map(repr, before))
