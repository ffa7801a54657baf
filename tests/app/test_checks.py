"""Numbers that cannot be: told at once, as the user's to mend, and nothing is stored."""

from __future__ import annotations

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.budgets import resolve_budget
from bitatlas.app.tasks import jobs, solving
from bitatlas.cache.store import Store


@pytest.fixture
def index(home, fakes, monkeypatch):
    index = fakes.dense_index(6, "dense-6")
    fakes.fill(Store(home), index)
    monkeypatch.setattr(solving, "register", lambda model: index)
    return index


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
