"""Solving under an engine gives what the engine serves."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import (
    Budget,
    SensitivityTable,
    UserError,
    expand_formats,
    parse_format,
)
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.targets.limits import limits_of
from bitatlas.app.tasks.describing import describe_allocation
from bitatlas.app.tasks.solving import build_problem, solve_table

FORMATS = tuple(
    f.name for f in expand_formats("int{2,3,4,6,8}-g128,int{3,4,8}-g64-sym,int{4,8}-g128-sym,bf16")
)


def table_of(index, formats) -> SensitivityTable:
    rng = np.random.default_rng(0)
    bits = np.array([float(f[3]) if f[0] == "i" else 16 for f in formats])
    damage = rng.lognormal(size=(len(index.units), 1)) * 4.0**-bits * rng.uniform(0.8, 1.2, (1, len(formats)))
    shape = damage.shape
    return SensitivityTable(
        "made", index.unit_keys(), tuple(formats), damage, np.full(shape, np.nan), np.ones(shape), 0.0, "r"
    )


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("model", [{"kind": "llama"}, {"kind": "qwen3_moe", "experts": 3}], ids=str)
@pytest.mark.parametrize("solver", ["mckp", "hull", "uniform"])
def test_the_allocation_is_servable(name: str, model: dict, solver: str, make_index) -> None:
    index = make_index(**model)
    limits = limits_of(TARGETS[name], index, FORMATS)
    table = table_of(index, limits.formats)
    bits = 16 if name == "torchao" else 9  # its experts stay as they are
    budget = Budget(int(index.params * bits / 8) + index.kept_bytes)
    plan = solve_table(index, table, limits.formats, budget, solver, {}, limits)
    verdict = TARGETS[name].check(plan, index)
    assert verdict.status == SERVABLE, verdict.reasons
    assert plan.weights_bytes <= budget.weights_bytes


def test_what_may_not_be_quantised_is_pinned_and_a_pin_by_hand_comes_first(make_index) -> None:
    index = make_index()
    limits = limits_of(TARGETS["vllm"], index, ("int4-g128-sym", "int8-g128-sym"))
    assert limits.pins == {"model.embed_tokens": "bf16", "lm_head": "bf16"}
    by_hand = {"lm_head": "int8-g128-sym"}
    problem = build_problem(index, table_of(index, limits.formats), limits.formats, 10**9, by_hand, limits)
    at = problem.units.index("lm_head")
    assert [f for f, ok in zip(problem.formats, problem.allowed[at]) if ok] == ["int8-g128-sym"]


def test_formats_that_do_not_fit_a_unit_are_not_offered_to_its_ties(make_index) -> None:
    index = make_index("qwen3_moe", experts=2)  # down has 128 columns, the rest 256
    formats = ("int4-channel-sym", "int4-g128-sym", "int3-g64")
    limits = limits_of(TARGETS["mlx"], index, formats)
    assert limits.formats == ("int4-g128-sym", "int3-g64")
    assert limits.mask(index, limits.formats).all()


def test_no_format_at_all(make_index) -> None:
    with pytest.raises(UserError, match="none of these"):
        limits_of(TARGETS["mlx"], make_index(), ("int4-channel",))


def test_a_type_that_falls_back_is_not_offered(make_index) -> None:
    index, target = make_index("qwen3_moe", experts=2), TARGETS["llama.cpp"]
    # Down has 128 columns, the rest 256.
    formats = ("int3-g64", "int4-g32-sym", "int8-g32-sym")
    limits = limits_of(target, index, formats)
    takes = dict(zip(index.unit_keys(), limits.mask(index, formats).tolist()))
    assert all(takes[u.key] == [u.cols == 256, True, True] for u in index.units)
    table = table_of(index, formats)
    smallest = sum(min(target.unit_bytes(u, parse_format(f)) for f in formats) for u in index.units)
    plan = solve_table(index, table, formats, Budget(smallest + target.kept_bytes(index)), "mckp", {}, limits)
    assert {plan.formats[u.key] for u in index.units} == {"int3-g64", "int4-g32-sym"}
    types = target.types(plan, index)
    assert all(asked == got for asked, got, _ in types.values())
    # llama-quantize does make it, as q4_0.
    everywhere = replace(plan, formats=dict.fromkeys(plan.formats, "int3-g64"))
    assert target.check(everywhere, index).status == SERVABLE


def test_only_types_that_fall_back(tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint("llama"))
    with pytest.raises(UserError, match="none of these formats for") as caught:
        limits_of(TARGETS["llama.cpp"], index, ("int3-g64", "int4-g64"))
    assert "whole blocks" in caught.value.found


def test_the_size_in_the_engine_is_told(make_index, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from bitatlas.app.cli_io import emit
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path))
    index, target = make_index(), TARGETS["mlx"]
    Store(Home.default()).put_model(index)
    limits = limits_of(target, index, ("int3-g64", "int4-g64"))
    budget = Budget(int(index.params * 4 / 8) + index.kept_bytes)
    plan = solve_table(index, table_of(index, limits.formats), limits.formats, budget, "mckp", {}, limits)
    told = describe_allocation(plan)
    assert (told["target"], told["engine_bytes"]) == ("mlx", target.engine_bytes(plan, index))
    assert told["bits_per_weight"] < told["engine_bits"] <= 4.0
    assert told["weights_bytes"] == plan.weights_bytes < told["engine_bytes"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        emit(told, False, "allocation")
    assert f"in mlx: {told['engine_bits']:.3f} bits per weight" in said.getvalue()
    free = solve_table(index, table_of(index, limits.formats), limits.formats, budget, "mckp", {})
    assert "target" not in describe_allocation(free)
