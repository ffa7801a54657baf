"""The RAMP-style policy on a pretended model whose units' sensitivity is a function of one feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.solvers import Problem
from bitatlas.solvers.ramp import Ramp
from tests.conformance.searcher import Pretended, search_problem, sensitivity_features

UNITS = 100
SETTINGS: dict[str, Any] = {"steps": 12, "episodes": 8, "updates": 32, "hidden": 16, "batch": 16 * UNITS}


def _model(problem: Problem) -> Pretended:
    """KL is the sum of damages that the first feature tells, over seven decades."""
    out = Pretended(problem)
    spread = np.exp(1.5 * sensitivity_features(problem)[:, :1])
    out.true, out.cross = problem.damage * spread, np.zeros_like(out.cross)
    return out


def _search(problem: Problem, objective: Pretended | None = None, **options: Any) -> Ramp:
    options = {"settings": SETTINGS, "features": sensitivity_features(problem), **options}
    return Ramp(problem, objective or _model(problem), **options)


def _policy(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v for k, v in state.items() if k.startswith("policy.")}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return search_problem(UNITS)


@pytest.fixture(scope="module")
def trained(problem) -> dict[str, np.ndarray]:
    return _search(problem).run()


def _bits(problem: Problem, choice: np.ndarray) -> np.ndarray:
    return np.array([int(problem.formats[j][3:]) for j in choice])


def test_the_policy_itself_learns_which_units_are_sensitive(problem, trained):
    """Without noise and without what the rounds found on the way: one walk, nothing measured."""
    objective = _model(problem)
    untrained = _search(problem, objective).proposal()
    learned = _search(problem, objective, policy=_policy(trained)).proposal()
    assert objective.calls == []
    assert problem.payload(learned) <= problem.limit_bytes
    assert objective.kl(learned) < 0.4 * objective.kl(untrained)
    sensitive = sensitivity_features(problem)[:, 0]
    assert np.corrcoef(_bits(problem, learned), sensitive)[0, 1] > 0.7
    assert abs(np.corrcoef(_bits(problem, untrained), sensitive)[0, 1]) < 0.5


def test_the_policy_works_on_a_model_that_it_never_met(trained):
    other = search_problem(25, seed=5)
    objective, policy = _model(other), _policy(trained)
    untrained = _search(other).proposal()
    applied = _search(other, objective, policy=policy, settings={**SETTINGS, "steps": 0})
    state = applied.run()
    assert other.payload(state["choice"]) <= other.limit_bytes
    assert objective.kl(state["choice"]) < 0.6 * objective.kl(untrained)
    for name, value in policy.items():
        np.testing.assert_array_equal(state[name], value)  # unchanged


def test_a_seed_says_everything(problem):
    short = {**SETTINGS, "steps": 2, "updates": 8}
    one, two, other = (_search(problem, settings=short, seed=s).run() for s in (3, 3, 4))
    assert all((one[k] == two[k]).all() for k in one)
    assert any((one[k] != other[k]).any() for k in _policy(one))


def test_a_killed_search_goes_on_with_the_same_networks(problem):
    short = {**SETTINGS, "steps": 3, "updates": 8}
    whole = _search(problem, settings=short).run()
    state = _search(problem, settings=short).begin()
    for number in (1, 2, 3):
        state = {k: np.array(v) for k, v in _search(problem, settings=short).step(state, number).items()}
    assert all((np.asarray(whole[k]) == state[k]).all() for k in whole)


def test_it_learns_from_what_was_measured(problem, trained):
    """The replay holds allocations within the budget, and the states are those of a walk that wanted just these."""
    search, c = _search(problem), problem.classes
    given = trained["given"]
    assert given.shape == (SETTINGS["steps"] * SETTINGS["episodes"], UNITS)
    assert max(c.payload(g) for g in given) <= problem.limit_bytes
    e = search._episodes(given[:3], trained["log_kl"][:3])
    bits = c.bytes[np.arange(UNITS), given[0]] * 8 / problem.params
    np.testing.assert_allclose(e.state[0, 1:, 9], bits[:-1] / 8)
    left = problem.limit_bytes - (bits * problem.params)[:7].sum() / 8
    assert e.state[0, 7, 10] == pytest.approx(left / problem.params[7:].sum())
    np.testing.assert_array_equal(e.state[0, :, :9], sensitivity_features(problem))
    assert e.weight.sum() == pytest.approx(1)


def test_policies_that_do_not_fit_are_refused(problem, trained):
    policy = _policy(trained)
    with pytest.raises(UserError, match="does not fit"):
        _search(problem, policy=policy, settings={"hidden": 7}).begin()
    # Critics of returns, as they were called before damages were summed: same shapes, another meaning.
    old = {k.replace("damage", "critic"): v for k, v in policy.items() if "price" not in k}
    with pytest.raises(UserError, match="does not fit") as refused:
        _search(problem, policy=old).begin()
    assert "this version" in str(refused.value)
    with pytest.raises(UserError, match="no policy"):
        _search(problem, policy={"weights": np.zeros(3)}).begin()
    with pytest.raises(UserError, match="features"):
        Ramp(problem, Pretended(problem)).begin()


def test_the_reward_has_a_cliff_and_is_steeper_beyond_the_budget():
    ramp, kl = _search(search_problem(), settings={**SETTINGS, "cliff": 1.0}), float(np.exp(-2))
    assert ramp.reward(kl, 1.0) == pytest.approx(2.0)
    assert ramp.reward(kl, 0.9) == pytest.approx(1.9)
    assert ramp.reward(kl, 1.0001) < 1.0
    assert ramp.reward(kl, 1.1) == pytest.approx(0.0)
    assert np.isfinite(ramp.reward(0.0, 1.0))


def test_the_cliff_reaches_the_policy():
    problem = search_problem()
    short = {**SETTINGS, "steps": 2, "updates": 8}
    actors = [
        _search(problem, settings={**short, "cliff": cliff}).run()["policy.actor.w0"]
        for cliff in (0.0, 1.0, 1000.0)
    ]
    assert not np.array_equal(actors[0], actors[1])
    assert not np.array_equal(actors[1], actors[2])
