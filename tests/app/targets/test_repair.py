"""The plan with the smallest change, and that a person at a terminal is told everything that --json holds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation, Budget, UserError
from bitatlas.app import tasks
from bitatlas.app.cli import app
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS
from bitatlas.app.targets.repair import repaired

VLLM = TARGETS["vllm"]


@pytest.fixture
def folder(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny MoE and an empty data folder."""
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    return tiny_checkpoint("qwen3_moe")


@pytest.fixture
def plan(folder: Path, allocate) -> Allocation:
    """Servable by vLLM, with a note; K and V at 8 bits."""
    index = index_model(folder)
    formats = {
        u.key: "bf16" if u.role in ("embed", "head") else f"int{4 * (u.layer + 1)}-channel-sym"
        for u in index.units
    }
    return replace(
        allocate(index, formats), kv=dict.fromkeys(range(index.n_layers), ("kv8-channel", "kv8-token"))
    )


def say(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def test_notes_size_and_the_cache_reach_the_terminal(folder: Path, plan: Allocation, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    verdict = tasks.check(plan, "vllm", model=str(folder))
    assert verdict["status"] == SERVABLE
    out = say("check", file, "--target", "vllm", "--model", folder)
    assert "note: vLLM only: transformers would decode the experts wrong, because layers differ" in out
    assert "note: vLLM rounds in its own way" in out
    assert "KV cache: --kv-cache-dtype fp8" in out
    assert f"({verdict['bytes']} bytes)" in out
    every = say("check", file, "--model", folder)
    assert "vllm: vLLM only: transformers would decode" in every


def test_refused_units_are_named_with_what_helps_and_bounded(
    folder: Path, plan: Allocation, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(replace(plan, formats=dict.fromkeys(plan.formats, "int3-channel")).to_json())
    verdict = tasks.check(file, "vllm", model=str(folder))
    assert len(verdict["units"]) > 20
    out = say("check", file, "--target", "vllm", "--model", folder)
    assert "size:" not in out  # of something that it does not load
    assert f"what helps: {verdict['change']}; `bitatlas check --repair FILE`" in out
    unit, reason = next(iter(verdict["units"].items()))
    assert f"  {unit}: {reason} -> {verdict['changes'][unit]}\n" in out
    assert f"and {len(verdict['units']) - 20} more units" in out
    assert len(out.splitlines()) < 40


def test_the_repaired_plan_is_servable_and_claims_nothing_it_does_not_know(
    folder: Path, plan: Allocation, allocate, tmp_path: Path
) -> None:
    index = index_model(folder)
    unit = next(u.key for u in index.units if u.role == "q")
    broken = replace(
        plan, formats=plan.formats | {unit: "int3-channel"}, pins={unit: "int3-channel", "lm_head": "bf16"}, predicted=0.1,
        lower_bound=0.09, gap=0.1, solver="mckp", status="optimal", budget=Budget(plan.weights_bytes),
    )  # fmt: skip
    file, out = tmp_path / "plan.json", tmp_path / "fixed.json"
    file.write_text(broken.to_json())
    said = say("check", file, "--target", "vllm", "--model", folder, "--repair", out)
    fixed = tasks.read_allocation(out)
    assert VLLM.check(broken, index).status == REJECTED
    assert VLLM.check(fixed, index).status == SERVABLE
    assert {u for u in fixed.formats if fixed.formats[u] != broken.formats[u]} == set(
        VLLM.check(broken, index).changes or ()
    )
    assert fixed.pins == {"lm_head": "bf16"}
    assert all(math.isnan(x) for x in (fixed.predicted, fixed.lower_bound, fixed.gap))
    assert (fixed.solver, fixed.status) == ("mckp+repair", "feasible")
    assert fixed.payload_bytes == allocate(index, fixed.formats).payload_bytes
    assert fixed.kv == broken.kv
    assert "repaired: " in said
    assert "1 pins do not hold any more" in said
    over = VLLM.engine_bytes(fixed, index) - plan.weights_bytes
    assert ("over its budget" in said) == (over > 0)


def test_nothing_to_repair_and_nothing_that_helps(
    folder: Path, plan: Allocation, make_index, allocate, tmp_path: Path
) -> None:
    assert repaired(plan, index_model(folder), VLLM) is plan
    strange = make_index("nobody_knows_it")
    with pytest.raises(UserError, match="cannot be given this model"):
        repaired(allocate(strange, "int4-g64"), strange, TARGETS["mlx"])
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert "--target vllm" in say(
        "check", file, "--repair", tmp_path / "never.json", "--model", folder, code=2
    )
    assert not (tmp_path / "never.json").exists()
