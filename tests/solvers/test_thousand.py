"""Bar of the whole folder: a thousand random problems, every solver, every certificate."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bitatlas.solvers import SOLVERS, Problem
from bitatlas.solvers.random_best import RandomBest
from tests.conformance.problems import solved

# Searchers and the external program are slow; their own conformance tests run fewer problems.
FAST = [name for name in SOLVERS if name not in ("ilp", "tpe", "nsga2")]


def _prepared(problem: Problem) -> Problem:
    """With experts (for PMQ) and probes (for projection descent)."""
    n = len(problem.units)
    damage = np.maximum(np.nan_to_num(problem.damage), 0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4, *damage.shape))
    return dataclasses.replace(problem, experts=np.arange(n), layers=np.arange(n) // 2,
                               interaction=signs * np.sqrt(damage))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_thousand_random_problems(name):
    solver = RandomBest(samples=4) if name == "random_best" else SOLVERS[name]()
    # Projection descent restarts 24 times a problem.
    for seed in range(200 if name == "projection_descent" else 1000):
        problem, best = solved(seed, True)
        solution = solver.solve(_prepared(problem))
        proof = solution.certificate
        scale = float(np.abs(problem.damage[problem.allowed]).sum())
        assert proof.feasible
        assert proof.payload_bytes <= problem.limit_bytes
        assert proof.lower_bound - 1e-9 * scale <= best <= proof.objective + 1e-9 * scale, seed
        if solver.EXACT:
            assert proof.objective <= best + 1e-9 * scale, seed
