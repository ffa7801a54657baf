"""Solving under an engine without naming formats: what was measured and is stored as planned, or what to measure."""

from __future__ import annotations

import re

import pytest

from bitatlas.analysis.schema import DamageRow, ModelIndex, UserError, parse_format
from bitatlas.app import tasks
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.tasks.models import register
from bitatlas.app.tasks.solving import solve
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

DEFAULT = tuple(f"int{b}-g64" for b in (2, 3, 4, 5, 6, 8))


@pytest.fixture
def index(home) -> ModelIndex:
    """The demo: 128 columns, experts, an embedding; nothing measured."""
    return register(tasks.demo_path())


def measured(index: ModelIndex, run: str, formats: tuple[str, ...], metric: str = "fisher") -> None:
    """A finished run with damages that fall with the bits."""
    store = Store(Home.default())
    store.begin_run(run=run, model_digest=index.digest, metric=metric, settings={}, calibration="", provenance={},
                    formats=list(formats))  # fmt: skip
    rows = [DamageRow(metric, u.key, f, u.params * 1e-6 * 4.0 ** -parse_format(f).bits, 0.0, 1, 0.0)
            for u in index.units for f in formats]  # fmt: skip
    store.write_step(run, "all", rows)
    store.finish_run(run)


def advised(fix: str) -> tuple[str, ...]:
    found = re.search(r"bitatlas measure .* --metric fisher --formats (\S+) --wait", fix)
    assert found, fix
    return tuple(found[1].split(","))


@pytest.mark.parametrize("target", ["vllm", "compressed-tensors", "llama.cpp"])
def test_the_command_that_is_advised_leads_to_a_plan(index: ModelIndex, target: str) -> None:
    measured(index, "usual", DEFAULT)
    with pytest.raises(UserError, match=f"too few formats that {target} takes") as error:
        solve(index.path, bits=5.5, target=target)
    formats = advised(error.value.fix)
    measured(index, "advised", formats)
    plan = solve(index.path, bits=5.5, target=target)
    engine = TARGETS[target]
    assert set(plan.formats.values()) <= {*formats, "bf16"}
    assert len(set(plan.formats.values()) - {"bf16"}) > 1
    assert engine.check(plan, index).status == SERVABLE
    assert engine.engine_bytes(plan, index) <= plan.budget.weights_bytes
    if target == "llama.cpp":
        assert all(asked == got for asked, got, _ in engine.types(plan, index).values())
        assert "int4-g32-sym" in plan.formats.values()


@pytest.mark.parametrize("target", ["mlx", "gptqmodel", "auto-round"])
def test_the_usual_formats_are_enough_for_some(index: ModelIndex, target: str) -> None:
    measured(index, "usual", DEFAULT)
    plan = solve(index.path, bits=5, target=target)
    assert set(plan.formats.values()) <= {*DEFAULT, "bf16"}


def test_the_engines_own_grids_come_first_whenever_they_were_measured(index: ModelIndex) -> None:
    own = ("int4-g32", "int5-g32-sym", "int8-g32-sym")
    measured(index, "own", own)
    measured(index, "newer", ("int6-g64", "int8-g64"))
    assert set(solve(index.path, bits=8, target="llama.cpp").formats.values()) <= set(own)
    with pytest.raises(UserError, match="too few"):  # int6-g64 would fall back to q8_0
        solve(index.path, bits=8, target="llama.cpp", metric="fisher_scaled")
    named = solve(index.path, bits=9, target="llama.cpp", formats="int8-g64")
    assert set(named.formats.values()) == {"int8-g64"}


def test_the_engines_pins_are_not_called_the_users(index: ModelIndex) -> None:
    measured(index, "usual", DEFAULT)
    with pytest.raises(UserError) as error:
        solve(index.path, bits=4.5, target="vllm", formats=DEFAULT)
    assert error.value.what == "the budget is too small for this model in vllm"
    assert "vllm has none of these formats for 97 units" in error.value.found
    assert "pins" not in error.value.found + error.value.fix
    least = re.search(r"\((\d+) bytes in all\)", error.value.fix)
    assert least
    with pytest.raises(UserError, match="without the 1 pinned units it fits"):
        solve(
            index.path,
            bytes_=int(least[1]),
            target="vllm",
            formats=DEFAULT,
            pins=["model.layers.0.self_attn.o_proj=bf16"],
        )
    plan = solve(index.path, bits=16, target="vllm", formats=DEFAULT)
    assert plan.pins == {}


def test_what_is_advised_for_a_small_budget_is_enough_in_the_engine(index: ModelIndex) -> None:
    measured(index, "usual", DEFAULT)
    measured(index, "own", ("int5-g32-sym", "int8-g32-sym"))
    with pytest.raises(UserError) as error:
        solve(index.path, bits=4.6, target="llama.cpp", formats="int5-g32-sym,int8-g32-sym")
    name = error.value.fix.removeprefix("allow ").split(":")[0]
    assert TARGETS["llama.cpp"].loads(parse_format(name))
    measured(index, "more", ("int5-g32-sym", "int8-g32-sym", name))
    plan = solve(index.path, bits=4.6, target="llama.cpp", formats=f"int5-g32-sym,int8-g32-sym,{name}")
    assert TARGETS["llama.cpp"].engine_bytes(plan, index) <= plan.budget.weights_bytes
    with pytest.raises(UserError) as error:
        solve(index.path, bits=3, target="llama.cpp", formats="int5-g32-sym,int8-g32-sym")
    assert "allow" not in error.value.fix  # none would do
    least = re.search(r"\((\d+) bytes in all\)", error.value.fix)
    assert least
    plan = solve(index.path, bytes_=int(least[1]), target="llama.cpp", formats="int5-g32-sym,int8-g32-sym")
    assert TARGETS["llama.cpp"].engine_bytes(plan, index) <= int(least[1])


def test_a_solver_without_damage_needs_no_measurement(index: ModelIndex) -> None:
    plan = solve(index.path, bits=5.5, target="vllm", solver="uniform")
    assert TARGETS["vllm"].check(plan, index).status == SERVABLE
    assert set(tasks.solve(index.path, bits=5.5, solver="uniform").formats.values()) <= set(DEFAULT)
