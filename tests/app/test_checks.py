"""Numbers that cannot be: told at once, as the user's to mend, and nothing is stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.budgets import resolve_budget
from bitatlas.app.expert_groups import group_experts
from bitatlas.app.side_budgets import LATENCY_SCHEMA, read_latency
from bitatlas.app.sizes import parse_bytes
from bitatlas.app.tasks import jobs, solving
from bitatlas.cache.paths import write_output
from bitatlas.cache.store import Store
from bitatlas.solvers import Problem, SideBudget, get_solver


@pytest.mark.parametrize("points", [-3, 0, 1])
def test_a_front_needs_two_points(index, home, points) -> None:
    before = len(Store(home).frontiers(index.digest))
    with pytest.raises(UserError, match="points must be at least 2"):
        solving.frontier("m", metric="fisher_projection", points=points)
    assert len(Store(home).frontiers(index.digest)) == before
    assert len(solving.frontier("m", metric="fisher_projection", points=2).payload_bytes) == 2


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_is_one_that_the_generators_take(index, monkeypatch, seed) -> None:
    with pytest.raises(UserError, match="seed must be 0 or more"):
        solving.solve("m", metric="fisher_projection", solver="random_best", bits=3.5, seed=seed)
    queued: list[object] = []
    monkeypatch.setattr(jobs, "the_jobs", lambda: queued.append)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        jobs.submit("measure", {"seed": seed}, "title")
    assert not queued


@pytest.mark.parametrize(("numbers", "words"), [({"context": -5}, "context must be at least 0"), ({"batch": 0}, "batch must be at least 1")])  # fmt: skip
@pytest.mark.parametrize("kv", [False, True])
def test_context_and_batch_are_counts(index, numbers, words, kv) -> None:
    with pytest.raises(UserError, match=words):
        resolve_budget(index, fit="1GiB", **numbers)
    with pytest.raises(UserError, match=words):
        solving.solve("m", metric="fisher_projection", fit="1GiB", kv=kv, **numbers)


def test_nothing_may_be_set_aside_for_both_kinds_of_budget(index) -> None:
    assert resolve_budget(index, fit="1MiB", reserve="0").weights_bytes == 1 << 20
    with pytest.raises(
        UserError, match="kv_output has not been measured"
    ):  # the reserve is no longer the trouble
        solving.solve("m", metric="fisher_projection", fit="1GiB", context=64, reserve="0", kv=True)


def test_units_of_a_group_are_not_a_link(moe) -> None:
    with pytest.raises(UserError, match="units of this group") as caught:
        group_experts(moe.index, {}, "units:0-99999999")
    assert "unit 99999999, but the model has units 0 to" in caught.value.found


def test_a_table_to_import_that_is_not_there(home, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such latency table"):
        read_latency(home, tmp_path / "none.json")
    with pytest.raises(UserError, match="kernels of this machine have not been timed"):
        read_latency(home)


@pytest.mark.parametrize("name", ["/proc/x.json", "taken"])
def test_a_file_that_the_user_named_is_not_the_data_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="this file cannot be written") as caught:
        write_output(tmp_path / name, b"x")  # an absolute name stays as it is
    assert "BITATLAS_HOME" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["taken"]


def test_a_context_without_a_cache_to_share_memory_with_is_refused(index) -> None:
    with pytest.raises(UserError, match="context length counts only"):
        solving.solve("m", metric="fisher_projection", bits=3.5, context=4096)


def test_a_solver_that_was_named_is_not_replaced(index) -> None:
    asked = {"metric": "fisher_projection", "bits": 4.0, "active_bytes": "1GB"}
    assert solving.solve("m", **asked).solver == "ilp"
    with pytest.raises(UserError, match="mckp knows one budget only"):
        solving.solve("m", solver="mckp", **asked)
    assert solving.solve("m", metric="fisher_projection", bits=4.0).solver == "mckp"


def _in_all(error: UserError) -> str:
    """The memory that an error says is enough, as it may be typed."""
    found = re.search(r"at least ([0-9.]+) (\w+) in all", error.fix)
    assert found, error.fix
    return found[1] + found[2]


def test_memory_that_is_too_small_is_told_what_would_do(index) -> None:
    asked = {"metric": "fisher_projection", "context": 256, "reserve": "64KiB", "formats": "int{2,4}-g64"}
    with pytest.raises(UserError, match="nothing is left") as caught:
        solving.solve("m", fit="70KiB", **asked)
    told = _in_all(caught.value)
    enough = solving.solve("m", fit=told, **asked)
    assert set(enough.formats.values()) == {"int2-g64"}  # nothing was to spare
    with pytest.raises(
        UserError, match="too small for this model"
    ) as caught:  # something is left, but not enough
        solving.solve("m", fit=int(0.95 * parse_bytes(told)), **asked)
    assert _in_all(caught.value) == told
    assert "a budget of" not in caught.value.fix


@pytest.mark.parametrize("limit", [{"bops": 1e-6}, {"active_bytes": "2kB"}, {"latency_ms": 1e-6}])
def test_a_further_limit_that_cannot_be_met_is_told_its_least(index, home, limit) -> None:
    names = ("int2-g64", "int4-g64")
    rows = [{"rows": u.rows, "cols": u.cols, "format": f, "batch": 1, "us": u.params * (4 if f == "int4-g64" else 2) / 1e5}
            for u in index.units for f in names]  # fmt: skip
    (home.root / "latency.json").write_text(
        json.dumps({"schema": LATENCY_SCHEMA, "device": "d", "rows": rows})
    )
    asked = {"metric": "fisher_projection", "bits": 8.0, "formats": names}
    with pytest.raises(UserError, match="cannot be met") as caught:
        solving.solve("m", **asked, **limit)
    option, value = re.search(r"at least --(\S+) (\S+?),", caught.value.fix).groups()
    least = {option.replace("-", "_"): float(value) if "bytes" not in option else value}
    assert set(solving.solve("m", **asked, **least).formats.values()) == {"int2-g64"}


def test_limits_that_can_be_met_one_at_a_time_only() -> None:
    damage, size = np.ones((2, 2)), np.array([[10, 20], [10, 20]])
    slow = SideBudget(
        "latency in microseconds", np.array([[9000.0, 1000.0]] * 2), 2500.0, "--latency-ms", 1e3
    )
    with pytest.raises(UserError, match="no allocation meets all limits together") as caught:
        get_solver("ilp").solve(Problem.of(damage, size, 25, side=[slow]))
    assert "20 bytes, --latency-ms 2" in caught.value.fix
