"""Solving under an engine gives what the engine serves."""

from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import Budget, SensitivityTable, UserError, expand_formats
from bitatlas.app.targets import SERVABLE, TARGETS
from bitatlas.app.targets.limits import limits_of
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
