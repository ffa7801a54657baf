from __future__ import annotations

import numpy as np
import pytest

from bitatlas.analysis.schema import (
    Budget,
    KeptTensor,
    KvGeometry,
    ModelIndex,
    QuantUnit,
    SensitivityTable,
    UserError,
    parse_format,
)
from bitatlas.app.views.fit import FitControls, build_fit, front_line
from bitatlas.app.views.fit_controls import (
    Asked,
    bounds,
    decode_question,
    encode_question,
    preferred,
    twin,
    usual,
)
from bitatlas.solvers import FrontCache, Problem, get_solver

FORMATS = ("int2-g64", "int4-g64", "int8-g64")


@pytest.fixture
def index() -> ModelIndex:
    units = tuple(
        QuantUnit(f"layers.{i}.down", "down", i, -1, 64, 192, f"layers.{i}.down.weight") for i in range(6)
    )
    kept = (KeptTensor("norm.weight", (64,), "BF16", 128),)
    return ModelIndex(
        "/m", "d" * 20, "toy", "Toy", "toy", units, kept, 6, 0, 0, KvGeometry((2,) * 6, 32, (0,) * 6)
    )


@pytest.fixture
def table(index: ModelIndex) -> SensitivityTable:
    scale = np.array([8.0, 1, 1, 1, 1, 1])[:, None]
    damage = scale * np.array([1.0, 0.1, 0.001])
    return SensitivityTable(
        "fisher", index.unit_keys(), FORMATS, damage, damage * 0.1, np.full(damage.shape, 64), run="r"
    )


def controls(
    index: ModelIndex, weights: int, kv: int = 0, reserve: int = 0, total: int | None = None
) -> FitControls:
    budget = Budget(weights, kv, reserve, 128 if kv else 0, 1)
    return FitControls(total or budget.total_bytes, budget, "fisher", "nats per token")


def build(index: ModelIndex, table: SensitivityTable, limit: int, pins: dict[str, str] | None = None):
    problem = Problem.build(index, table, [parse_format(f) for f in FORMATS], 1 << 40, pins=pins or {})
    cache = FrontCache.of(problem)
    return problem, cache, build_fit(index, problem, cache, controls(index, limit, kv=1000, reserve=500))


def test_the_memory_bar_adds_up_and_the_answer_fits(index: ModelIndex, table: SensitivityTable):
    _, _, view = build(index, table, 45_000)
    assert sum(s.nbytes for s in view.segments) == view.total_bytes == 46_500
    assert view.here[0] <= 45_000
    assert sum(s.units for s in view.shares) == 6
    assert {s.kind for s in view.segments} >= {"weights", "kept", "kv", "reserve"}


def test_it_is_the_solvers_answer(index: ModelIndex, table: SensitivityTable):
    problem, _, view = build(index, table, 45_000)
    solved = get_solver("hull").solve(problem.with_limit(45_000 - index.kept_bytes))
    assert view.here[1] == pytest.approx(solved.certificate.objective)
    assert view.lower_bound <= view.here[1]


def test_the_worst_layer_is_named_in_the_title(index: ModelIndex, table: SensitivityTable):
    small = int(index.bytes_table([parse_format("int2-g64")]).sum()) + index.kept_bytes
    _, _, view = build(index, table, small)
    assert "1 of 6 layer carries half of the predicted damage" in view.title
    assert view.detail.startswith("+")


def test_pins_hold(index: ModelIndex, table: SensitivityTable):
    _, _, view = build(index, table, 45_000, {"layers.3.down": "int8-g64"})
    assert view.formats[view.choice[3]] == "int8-g64"
    assert view.pinned == 1


def test_an_impossible_budget_names_the_smallest(index: ModelIndex, table: SensitivityTable):
    smallest = int(index.bytes_table([parse_format("int2-g64")]).sum()) + index.kept_bytes
    with pytest.raises(UserError, match="smallest weights take"):
        build(index, table, smallest - 1)
    build(index, table, smallest)


def test_an_impossible_budget_names_a_format_that_would_fit(index: ModelIndex, table: SensitivityTable):
    four = table.select(("int4-g64", "int8-g64"))
    problem = Problem.build(index, four, [parse_format(f) for f in four.formats], 1 << 40)
    room = int(index.bytes_table([parse_format("int3-g64")]).sum()) + index.kept_bytes
    asked = controls(index, room, kv=1000, reserve=500)
    with pytest.raises(UserError, match="measure and allow int") as caught:
        build_fit(index, problem, FrontCache.of(problem), asked)
    name = caught.value.fix.rpartition(" allow ")[2].split(":")[0]
    assert int(index.bytes_table([parse_format(name)]).sum()) + index.kept_bytes <= room
    known = FitControls(asked.total_bytes, asked.budget, "fisher", "nats per token", (name,))
    with pytest.raises(UserError, match=f", or allow {name}"):
        build_fit(index, problem, FrontCache.of(problem), known)


def test_memory_without_room_for_weights_is_told_the_least(index: ModelIndex):
    asked = Asked("fisher", FORMATS, 4096, 128, 1, "16/16", 1000)
    with pytest.raises(UserError, match="nothing is left") as caught:
        asked.budget(index, 30_000)
    assert "at least " in caught.value.fix
    assert "--" not in str(caught.value)  # a page has no options


def test_the_line_is_thinned_with_its_ends(index: ModelIndex, table: SensitivityTable):
    _, cache, _ = build(index, table, 45_000)
    line = front_line(cache, index.kept_bytes, points=4)
    assert len(line.damage) <= 4
    assert line.weights_bytes[0] == cache.cum_bytes[0] + index.kept_bytes
    assert line.weights_bytes[-1] == cache.cum_bytes[-1] + index.kept_bytes
    assert (np.diff(line.damage) <= 0).all()


def test_bounds_suit_the_model(index: ModelIndex):
    b = bounds(index)
    assert b.word == "MiB"
    assert b.low < b.start < b.high
    assert (b.start / b.step) == pytest.approx(round(b.start / b.step))


def test_the_budget_takes_the_cache_and_the_reserve_off(index: ModelIndex):
    asked = Asked("fisher", FORMATS, 1 << 20, 128, 2, "8/8", 1000)
    # Of 128 tokens 96 are packed, with 4 bytes a channel and block (K) or a token (V); 32 stay at 16 bits. Two heads of 32.
    kv = 6 * 2 * 2 * (2 * 96 * 32 + 3 * 32 * 4 + 96 * 4 + 2 * 32 * 32 * 2)
    assert asked.budget(index).weights_bytes == (1 << 20) - kv - 1000


def test_the_twin_is_a_command_that_means_the_same(index: ModelIndex):
    asked = Asked("fisher", FORMATS, 1 << 20, 128, 1, "16/16", 1000)
    line = twin("/a model", asked, {"layers.1.down": "int8-g64", "layers.2.down": "int8-g64"})
    assert "'/a model'" in line
    assert line.count("--pin") == 1
    assert "--fit 1048576 --context 128" in line


def test_engine_and_groups_are_in_the_link_and_in_the_twin(index: ModelIndex):
    asked = Asked("fisher", FORMATS, 1 << 20, 128, 1, "16/16", 1000, "vllm", "role", ("down=3", "*=4"))
    assert decode_question(encode_question(asked)) == asked
    assert (
        decode_question('["fisher",["int4-g64"],1048576,0,1,"16/16",1000]').target == ""
    )  # a link of before
    line = twin("/m", asked, {})
    assert "--target vllm --expert-groups role --group-limit down=3 --group-limit '*=4'" in line
    with pytest.raises(UserError, match="cannot be read"):
        decode_question('["fisher",["int4-g64"],1048576,0,1,"16/16",1000,3,"",[]]')


def test_defaults():
    assert usual(("int2-g64", "int4-g64", "int4-g128")) == ["int2-g64", "int4-g64"]
    assert preferred(("weight_error", "fisher", "alphaq")) == 1
