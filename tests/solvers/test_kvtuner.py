"""KVTuner's three steps, each against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.solvers import Problem, get_solver
from bitatlas.solvers.kvtuner import KvTuner, cluster, pareto
from tests.conformance.solver import SolverConformance


class TestKvTuner(SolverConformance):
    SEEDS = 40

    @pytest.fixture
    def solver(self):
        return KvTuner()


def test_pruning_keeps_what_no_other_format_beats():
    rng = np.random.default_rng(0)
    damage, size = rng.random((50, 7)), rng.integers(1, 9, (50, 7))
    allowed = rng.random((50, 7)) > 0.2
    allowed[:, 3] = True
    kept = pareto(damage, size, allowed)
    for i in range(50):
        for j in range(7):
            beaten = any(
                allowed[i, k] and size[i, k] <= size[i, j] and damage[i, k] <= damage[i, j] and k != j
                for k in range(7)
            )
            assert kept[i, j] == (allowed[i, j] and not beaten), (i, j)


def test_clusters_are_chains_of_neighbours_with_the_same_formats():
    levels = np.array([1.0, 1.2, 1.5, 9.0, 10.0, 1.1])
    damage = levels[:, None] * np.array([1.0, 0.1, 0.01])
    kept = np.ones((6, 3), bool)
    kept[5, 1] = False
    labels = cluster(damage, kept, 0.25)
    assert labels[0] == labels[1] == labels[2]
    assert labels[3] == labels[4]
    assert len(set(labels.tolist())) == 3


def test_the_clustered_optimum_is_exact_and_the_published_search_comes_near():
    rng = np.random.default_rng(1)
    group = np.repeat([1.0, 20.0, 400.0], 4)
    damage = (group * rng.uniform(0.95, 1.05, 12))[:, None] * np.array([1.0, 0.2, 0.04, 0.0])
    size = np.tile([25, 45, 85, 160], (12, 1))
    problem = Problem.of(damage, size, 12 * 60)
    best = min(
        sum(damage[4 * g : 4 * g + 4, f].sum() for g, f in enumerate(formats))
        for formats in itertools.product(range(4), repeat=3)
        if sum(4 * size[0, f] for f in formats) <= 12 * 60
    )
    assert KvTuner().solve(problem).certificate.objective == pytest.approx(best)
    assert best <= KvTuner(exact=False).solve(problem, seed=0).certificate.objective <= 1.5 * best


def test_settings_reach_it_by_name():
    exact, published = (
        get_solver("kvtuner"),
        get_solver("kvtuner", {"exact": False, "trials": 60, "eps": 0.5}),
    )
    assert isinstance(exact, KvTuner)
    assert isinstance(published, KvTuner)
    assert (exact.exact, exact.eps) == (True, 0.35)
    assert (published.exact, published.eps, published.search.trials) == (False, 0.5, 60)
    problem = Problem.of(np.outer([4.0, 2.0, 1.0], [1.0, 0.2, 0.04]), np.full((3, 3), [10, 20, 30]), 60)
    assert published.solve(problem).evaluations == 60


@pytest.mark.parametrize(
    ("solver", "settings", "words"),
    [("kvtuner", {"exact": "no"}, "exact of kvtuner has the wrong kind"), ("kvtuner", {"trial": 3}, "no setting trial"),
     ("kvtuner", {"population": 1, "exact": False}, "two plans"), ("mckp", {"eps": 1}, "mckp has no setting eps"),
     ("tpe", {"trials": 2.5}, "wrong kind"), ("tpe", {"trials": float("inf")}, "wrong kind"),
     ("kvtuner", {"eps": True}, "wrong kind")],
)  # fmt: skip
def test_wrong_settings(solver, settings, words):
    with pytest.raises(UserError, match=words):
        get_solver(solver, settings)
